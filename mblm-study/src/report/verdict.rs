//! What the numbers say, in words that do not say more than they do.

use super::format::count;
use super::standing::Standings;
use super::variant::{Spread, Variant};
use crate::statistics::ALPHA;

/// Names that are listed before the rest is counted.
const MOST_NAMES: usize = 6;

/// What a comparison shows: the answer, and how sure it is. `looks` is how often the study may look at the data while it
/// adds seeds.
pub(super) fn verdict(variants: &[Variant], looks: usize) -> Option<(String, String)> {
    let ranked: Vec<(&Variant, Spread)> =
        variants.iter().filter(|v| v.is_finished()).filter_map(|v| Some((v, v.valid_bpb()?))).collect();
    let (best, bpb) = ranked.first()?;
    let seeds = if bpb.count > 1 { format!(" (mean of {} seeds)", bpb.count) } else { String::new() };
    let reached = format!("{} reaches {} bits per byte{seeds}", best.name, bpb.text(3));
    let Some((second, other)) = ranked.get(1) else {
        return Some((format!("{reached}."), "There is nothing to compare it with yet.".into()));
    };
    let standings = Standings::of(variants, looks);
    let lead = standings.behind(1);
    let percent = 100.0 * lead / other.mean;
    let answer = match format!("{lead:.3}") {
        none if none == "0.000" => format!("{reached}, as {} does.", second.name),
        lead => format!("{reached}, {lead} ({percent:.1}%) below {}, the second.", second.name),
    };
    let surety = if standings.is_tested() { tested(&ranked, &standings) } else { untested(&ranked, &standings) };
    Some((answer, surety))
}

/// Why nothing is tested.
fn untested(ranked: &[(&Variant, Spread)], standings: &Standings) -> String {
    if standings.has_unknown_seeds {
        return "Nothing is tested: the seeds of some runs are not known, so the runs cannot be paired.".into();
    }
    let alone = ranked.iter().filter(|(_, spread)| spread.count == 1).map(|(variant, _)| &variant.name[..]);
    let alone: Vec<&str> = alone.collect();
    let why = match alone.len() {
        0 => "No variant shares two seeds with the best one".into(),
        n if n == ranked.len() => "One seed each".into(),
        _ => format!("One seed of {}", listed(&alone)),
    };
    format!("{why}: nothing is tested, so small differences may be due to chance.")
}

/// What the tests say of the first and the others.
fn tested(ranked: &[(&Variant, Spread)], standings: &Standings) -> String {
    let (mut ties, mut worse, mut skipped) = (vec![], 0, vec![]);
    for (i, (variant, _)) in ranked.iter().enumerate().skip(1) {
        match (standings.to_first(i), standings.group(i)) {
            (None, _) => skipped.push(&variant.name[..]),
            (_, Some(1)) => ties.push(&variant.name[..]),
            _ => worse += 1,
        }
    }
    let mut text = match (&ties[..], worse) {
        ([], 1) => "It is distinguishable from the other one".into(),
        ([], n) if skipped.is_empty() => format!("It is distinguishable from all {n} others"),
        ([], n) => format!("It is distinguishable from {n} others"),
        (ties, 0) => format!("It is not distinguishable from {}", listed(ties)),
        (ties, n) => format!("It is not distinguishable from {}, but from {}", listed(ties), count(n, "other")),
    };
    text += &format!(" ({}).", how(standings));
    match skipped.len() {
        0 => {}
        1 => text += &format!(" {} is not tested: it shares fewer than two seeds with the best.", listed(&skipped)),
        _ => text += &format!(" {} are not tested: they share fewer than two seeds with the best.", listed(&skipped)),
    }
    text
}

/// Which tests these are, and what they are adjusted for.
pub(super) fn how(standings: &Standings) -> String {
    let seeds = standings.fewest_seeds().unwrap_or_default();
    let mut reasons = Vec::new();
    match standings.compared() {
        0 | 1 => {}
        n => reasons.push(format!("{n} comparisons (Holm)")),
    }
    match standings.looks {
        0 | 1 => {}
        n => reasons.push(format!("{n} possible looks at the seeds (Bonferroni)")),
    }
    let adjusted = if reasons.is_empty() { String::new() } else { format!(", adjusted for {}", reasons.join(" and ")) };
    format!("paired t tests over {seeds} seeds at {}%{adjusted}", 100.0 * ALPHA)
}

fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => one.to_string(),
        names if names.len() > MOST_NAMES => {
            format!("{} and {} more", names[..MOST_NAMES - 1].join(", "), names.len() - MOST_NAMES + 1)
        }
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::run::Status::Finished;
    use super::super::variant::tests::{run, variant};
    use super::*;

    fn variants(bpbs: &[&[f64]]) -> Vec<Variant> {
        let variant = |(i, bpbs): (usize, &&[f64])| {
            let runs = bpbs.iter().zip(0..).map(|(bpb, seed)| run(seed, Finished, &[*bpb]));
            variant(&format!("v{i}"), runs.collect())
        };
        bpbs.iter().enumerate().map(variant).collect()
    }

    fn of(bpbs: &[&[f64]]) -> (String, String) {
        verdict(&variants(bpbs), 1).unwrap()
    }

    #[test]
    fn one_seed_tests_nothing() {
        let (answer, surety) = of(&[&[2.0], &[2.5]]);
        assert_eq!(answer, "v0 reaches 2.000 bits per byte, 0.500 (20.0%) below v1, the second.");
        assert!(surety.starts_with("One seed each: nothing is tested"), "{surety}");
        assert!(of(&[&[2.0], &[2.5, 2.6]]).1.starts_with("One seed of v0: nothing is tested"));
        assert!(of(&[&[2.0, 2.1], &[2.5]]).1.starts_with("One seed of v1: nothing"));
        assert_eq!(of(&[&[2.0], &[2.0001]]).0, "v0 reaches 2.000 bits per byte, as v1 does.");
        assert!(of(&[&[2.0]]).1.contains("nothing to compare"));
        assert_eq!(verdict(&[], 1), None);
        let mut unknown = variants(&[&[2.0, 2.1], &[2.5, 2.6]]);
        unknown.iter_mut().flat_map(|variant| &mut variant.runs).for_each(|run| run.seed = None);
        assert!(verdict(&unknown, 1).unwrap().1.contains("seeds of some runs are not known"));
    }

    #[test]
    fn it_is_as_sure_as_the_tests_are() {
        let best: &[f64] = &[2.0, 2.1, 2.2];
        let (answer, surety) = of(&[best, &[2.5, 2.61, 2.69]]);
        assert!(answer.starts_with("v0 reaches 2.100 ± 0.100 bits per byte (mean of 3 seeds), 0.500"), "{answer}");
        let want = "It is distinguishable from the other one (paired t tests over 3 seeds at 5%).";
        assert_eq!(surety, want);
        let all = [best, &[2.01, 2.08, 2.25], &[2.5, 2.61, 2.69], &[2.7]];
        let want = "It is not distinguishable from v1, but from 1 other (paired t tests over 3 seeds at 5%, adjusted \
                    for 2 comparisons (Holm)). v3 is not tested: it shares fewer than two seeds with the best.";
        assert_eq!(of(&all).1, want);
        let adjusted = verdict(&variants(&[best, &[2.01, 2.08, 2.25]]), 3).unwrap().1;
        assert!(adjusted.ends_with("at 5%, adjusted for 3 possible looks at the seeds (Bonferroni))."), "{adjusted}");
    }
}
