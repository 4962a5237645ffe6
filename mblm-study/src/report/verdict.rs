//! What the numbers say, in words that do not say more than they do.

use super::variant::{Spread, Variant};

/// What a comparison shows: the answer, and how sure it is.
pub(super) fn verdict(variants: &[Variant]) -> Option<(String, String)> {
    let ranked: Vec<(&Variant, Spread)> =
        variants.iter().filter(|v| v.is_finished()).filter_map(|v| Some((v, v.valid_bpb()?))).collect();
    let (best, bpb) = ranked.first()?;
    let seeds = if bpb.count > 1 { format!(" (mean of {} seeds)", bpb.count) } else { String::new() };
    let reached = format!("{} reaches {} bits per byte{seeds}", best.name, bpb.text(3));
    let Some((second, other)) = ranked.get(1) else {
        return Some((format!("{reached}."), "There is nothing to compare it with yet.".into()));
    };
    let lead = other.mean - bpb.mean;
    let percent = 100.0 * lead / other.mean;
    let answer = match format!("{lead:.3}") {
        none if none == "0.000" => format!("{reached}, as {} does.", second.name),
        lead => format!("{reached}, {lead} ({percent:.1}%) below {}, the second.", second.name),
    };
    // A variant is as good as the best, as far as one can tell, if one of its seeds beats one of the best's.
    let ties: Vec<&str> = ranked[1..].iter().filter(|(_, s)| s.min <= bpb.max).map(|(v, _)| &v.name[..]).collect();
    let surety = match (bpb.count.min(other.count), &ties[..]) {
        (1, _) => {
            let who = if ranked.iter().all(|(_, s)| s.count == 1) { "each".into() } else { of_one_seed(&ranked[..2]) };
            format!("One seed {who}: differences as small as chance between seeds cannot be told from it.")
        }
        (n, []) => format!("Every seed of it is better than every seed of any other; {n} seeds are still few."),
        (_, ties) => {
            format!("Its seeds overlap with those of {}: the order among these is not settled.", listed(ties))
        }
    };
    Some((answer, surety))
}

fn of_one_seed(ranked: &[(&Variant, Spread)]) -> String {
    let names = ranked.iter().filter(|(_, spread)| spread.count == 1).map(|(variant, _)| &variant.name[..]);
    format!("of {}", listed(&names.collect::<Vec<_>>()))
}

fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => one.to_string(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::run::Status::Finished;
    use super::super::variant::tests::{run, variant};
    use super::*;

    fn of(bpbs: &[&[f64]]) -> (String, String) {
        let variant = |(i, bpbs): (usize, &&[f64])| {
            variant(
                &format!("v{i}"),
                bpbs.iter().enumerate().map(|(seed, bpb)| run(seed as u64, Finished, &[*bpb])).collect(),
            )
        };
        verdict(&bpbs.iter().enumerate().map(variant).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn it_is_as_sure_as_the_seeds_allow() {
        let (answer, surety) = of(&[&[2.0], &[2.5]]);
        assert_eq!(answer, "v0 reaches 2.000 bits per byte, 0.500 (20.0%) below v1, the second.");
        assert!(surety.starts_with("One seed each"), "{surety}");
        assert!(of(&[&[2.0], &[2.5, 2.6]]).1.starts_with("One seed of v0: differences"));
        assert!(of(&[&[2.0, 2.1], &[2.5]]).1.starts_with("One seed of v1: differences"));
        assert!(of(&[&[2.0], &[2.5], &[2.6, 2.7]]).1.starts_with("One seed of v0 and v1: differences"));
        let (answer, surety) = of(&[&[1.9, 2.1], &[2.5, 2.7]]);
        assert!(answer.starts_with("v0 reaches 2.000 ± 0.141 bits per byte (mean of 2 seeds), 0.600"), "{answer}");
        assert!(surety.starts_with("Every seed of it is better"), "{surety}");
        let (_, surety) = of(&[&[1.9, 2.3], &[2.2, 2.7], &[2.3, 2.6], &[4.0, 4.1]]);
        assert_eq!(surety, "Its seeds overlap with those of v1 and v2: the order among these is not settled.");
        assert_eq!(of(&[&[2.0], &[2.0001]]).0, "v0 reaches 2.000 bits per byte, as v1 does.");
        assert!(of(&[&[2.0]]).1.contains("nothing to compare"));
        assert_eq!(verdict(&[]), None);
    }
}
