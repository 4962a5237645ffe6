//! The course of a study: which runs come next, from what those before have come to.
//!
//! First every variant is tuned, field by field, each with as many tries as the others; then it is scored. The course is a
//! function of the study's plan and of the runs in its folder alone: a study that goes on, and a report, follow it again.

pub(crate) mod outcome;
pub(crate) mod search;

use std::collections::{BTreeMap, BTreeSet};

use self::outcome::{Lost, Outcome};
use crate::design::seeds::Seeds;
use crate::design::slug;
use crate::design::tune::{Field, Tune, Values};
use crate::folder::PlanFile;
use crate::statistics::groups::groups;
use crate::statistics::means::adjusted;

/// One run of a study.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedRun {
    /// The number of its variant.
    pub variant: usize,
    /// Its seed.
    pub seed: u64,
    /// The values that the tuned fields have, by field.
    pub values: Vec<(String, f64)>,
    /// The share of the budget that it trains for.
    pub share: f64,
    /// `NAME-seedN`, with the values of the tuned fields after two dashes.
    pub name: String,
}

/// A value that a variant was tried with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Try {
    pub(crate) value: f64,
    /// One run per seed.
    pub(crate) runs: Vec<PlannedRun>,
    /// The mean of its runs.
    pub(crate) outcome: Outcome,
}

/// The search for the best value of one field.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Search {
    /// In the order in which they were tried.
    pub(crate) tries: Vec<Try>,
}

/// What is tuned together: a variant, or a variant in one size, with all its budgets.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    /// The numbers of its variants in the plan. Tries are of the first.
    pub(crate) variants: Vec<usize>,
    /// One search per tuned field that was begun.
    pub(crate) searches: Vec<Search>,
    /// The best values so far, one per tuned field.
    pub(crate) chosen: Vec<f64>,
    /// Why it cannot be tuned.
    pub(crate) lost: Option<Lost>,
}

/// Where a study stands.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    pub(crate) units: Vec<Unit>,
    /// The runs that score, as far as they are known, seed by seed.
    pub(crate) scoring: Vec<PlannedRun>,
    /// The runs that can be trained now; none if the study has ended.
    pub(crate) next: Vec<PlannedRun>,
}

/// Follows the course of `plan`, with what the run of a name has come to.
pub(crate) fn follow(plan: &PlanFile, outcome: &dyn Fn(&str) -> Outcome) -> Course {
    let mut course = Course { units: units(plan), scoring: vec![], next: vec![] };
    for field in 0..plan.tune.as_ref().map_or(0, |tune| tune.fields.len()) {
        if let Some(tune) = &plan.tune
            && !tuned(plan, tune, field, &mut course.units, outcome)
        {
            course.next = course.open(outcome);
            return course;
        }
    }
    score(plan, &mut course, outcome);
    course.next = course.open(outcome);
    course
}

impl Course {
    /// Whether a known run has ended.
    pub(crate) fn has_ended(&self, run: &PlannedRun) -> bool {
        !self.next.iter().any(|open| open.name == run.name)
    }

    /// The known runs that have not ended.
    fn open(&self, outcome: &dyn Fn(&str) -> Outcome) -> Vec<PlannedRun> {
        self.runs().filter(|run| outcome(&run.name) == Outcome::Open).cloned().collect()
    }

    fn runs_of_searches(&self) -> impl Iterator<Item = &PlannedRun> {
        let tries = self.units.iter().flat_map(|unit| &unit.searches).flat_map(|search| &search.tries);
        tries.flat_map(|tried| &tried.runs)
    }

    /// The runs that will come at least after those that are known: the variant of each, and its share of the budget.
    pub(crate) fn ahead(&self, plan: &PlanFile) -> Vec<(usize, f64)> {
        let mut ahead = Vec::new();
        for unit in self.units.iter().filter(|unit| unit.lost.is_none()) {
            if let Some(tune) = &plan.tune {
                let fields = tune.fields.iter().skip(unit.searches.len());
                // The value that a field has before it is tuned was tried with the field before.
                let points: usize = fields.map(|field| field.values.len() - 1).sum();
                ahead.extend(std::iter::repeat_n((unit.variants[0], tune.share), points * tune.seeds.len()));
            }
            if self.scoring.is_empty() {
                let seeds = plan.seeds.first().len();
                ahead.extend(unit.variants.iter().flat_map(|&i| std::iter::repeat_n((i, 1.0), seeds)));
            }
        }
        ahead
    }

    /// All runs that are known, each once, the tries first.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &PlannedRun> {
        let mut seen = BTreeSet::new();
        self.runs_of_searches().chain(&self.scoring).filter(move |run| seen.insert(&run.name[..]))
    }
}

impl Search {
    /// Its values with their losses.
    pub(crate) fn tried(&self) -> Vec<search::Tried> {
        let loss = |tried: &Try| match tried.outcome {
            Outcome::Loss(loss) => Some(loss),
            _ => None,
        };
        self.tries.iter().map(|tried| (tried.value, loss(tried))).collect()
    }

    fn is_open(&self) -> bool {
        self.tries.iter().any(|tried| tried.outcome == Outcome::Open)
    }
}

/// The variants that are tuned together.
fn units(plan: &PlanFile) -> Vec<Unit> {
    let mut units: Vec<(Option<(&str, u64)>, Unit)> = Vec::new();
    for (i, about) in plan.variants.iter().enumerate() {
        let of = about.cell.as_ref().map(|cell| (&cell.variant[..], cell.size));
        match units.iter_mut().find(|(other, _)| of.is_some() && *other == of) {
            Some((_, unit)) => unit.variants.push(i),
            None => {
                let unit = Unit { variants: vec![i], searches: vec![], chosen: about.tuned_from.clone(), lost: None };
                units.push((of, unit));
            }
        }
    }
    units.into_iter().map(|(_, unit)| unit).collect()
}

/// Tunes the field of this number, for all units. False if runs of it have not ended.
fn tuned(plan: &PlanFile, tune: &Tune, field: usize, units: &mut [Unit], outcome: &dyn Fn(&str) -> Outcome) -> bool {
    let Field { values, .. } = &tune.fields[field];
    let mut active: Vec<&mut Unit> = units.iter_mut().filter(|unit| unit.lost.is_none()).collect();
    for unit in &mut active {
        unit.searches.push(Search::default());
        for value in search::first(values, unit.chosen[field]) {
            unit.attempt(plan, tune, field, value, outcome);
        }
    }
    for round in 0.. {
        active.iter_mut().for_each(|unit| unit.lost = unit.lost.take().or(unit.failed(outcome)));
        active.retain(|unit| unit.lost.is_none());
        let search = |unit: &Unit| unit.searches[field].clone();
        if active.iter().any(|unit| search(unit).is_open()) {
            return false;
        }
        let Values::Grid { factor, .. } = values else { break };
        if round >= tune.widen || !active.iter().any(|unit| search::is_at_edge(&search(unit).tried())) {
            break;
        }
        for unit in &mut active {
            if let Some(value) = search::next(*factor, &search(unit).tried()) {
                unit.attempt(plan, tune, field, value, outcome);
            }
        }
    }
    for unit in &mut active {
        let tried = unit.searches[field].tried();
        match search::best(&tried) {
            Some(best) => unit.chosen[field] = tried[best].0,
            None => unit.lost = Some(Lost::NoValue(field)),
        }
    }
    true
}

impl Unit {
    /// The first try that failed, if one did.
    fn failed(&self, outcome: &dyn Fn(&str) -> Outcome) -> Option<Lost> {
        let mut runs = self.searches.iter().flat_map(|search| &search.tries).flat_map(|tried| &tried.runs);
        runs.find(|run| outcome(&run.name) == Outcome::Failed).map(|run| Lost::Failed(run.name.clone()))
    }

    /// Adds a try of `value` for a field, with the best values of the others.
    fn attempt(&mut self, plan: &PlanFile, tune: &Tune, field: usize, value: f64, outcome: &dyn Fn(&str) -> Outcome) {
        let mut values = self.chosen.clone();
        values[field] = value;
        let variant = self.variants[0];
        let name = &plan.variants[variant].name;
        let run = |&seed: &u64| PlannedRun {
            variant,
            seed,
            values: named(tune, &values),
            share: tune.share,
            name: format!("{}--try-{}-seed{seed}", slug(name), joined(&values)),
        };
        let runs: Vec<PlannedRun> = tune.seeds.iter().map(run).collect();
        let outcome = mean(runs.iter().map(|run| outcome(&run.name)));
        self.searches[field].tries.push(Try { value, runs, outcome });
    }
}

/// Adds the runs that score.
fn score(plan: &PlanFile, course: &mut Course, outcome: &dyn Fn(&str) -> Outcome) {
    let mut values: Vec<Option<&[f64]>> = vec![None; plan.variants.len()];
    for unit in course.units.iter().filter(|unit| unit.lost.is_none()) {
        unit.variants.iter().for_each(|&i| values[i] = Some(&unit.chosen));
    }
    let run = |variant: usize, seed: u64| {
        let values = values[variant]?;
        let slug = slug(&plan.variants[variant].name);
        let name = match &plan.tune {
            None => format!("{slug}-seed{seed}"),
            Some(_) => format!("{slug}--{}-seed{seed}", joined(values)),
        };
        let values = plan.tune.as_ref().map(|tune| named(tune, values)).unwrap_or_default();
        Some(PlannedRun { variant, seed, values, share: 1.0, name })
    };
    let all: Vec<usize> = (0..plan.variants.len()).collect();
    for seed in plan.seeds.first() {
        course.scoring.extend(all.iter().filter_map(|&variant| run(variant, seed)));
    }
    let Seeds::Until { start, most } = plan.seeds else { return };
    for seed in start + 1..=most {
        if course.scoring.iter().any(|run| outcome(&run.name) == Outcome::Open) {
            return;
        }
        let undecided = undecided(plan, &course.scoring, outcome);
        if undecided.len() < 2 {
            return;
        }
        course.scoring.extend(undecided.into_iter().filter_map(|variant| run(variant, seed)));
    }
}

/// The best variant and those that cannot be told from it.
fn undecided(plan: &PlanFile, runs: &[PlannedRun], outcome: &dyn Fn(&str) -> Outcome) -> Vec<usize> {
    let mut losses: BTreeMap<usize, BTreeMap<u64, f64>> = BTreeMap::new();
    for run in runs {
        if let Outcome::Loss(loss) = outcome(&run.name) {
            losses.entry(run.variant).or_default().insert(run.seed, loss);
        }
    }
    let (variants, losses): (Vec<usize>, Vec<BTreeMap<u64, f64>>) = losses.into_iter().unzip();
    let means = adjusted(&losses);
    let mut order: Vec<usize> = (0..variants.len()).collect();
    order.sort_by(|&a, &b| means[a].total_cmp(&means[b]));
    let seeds: Vec<BTreeMap<u64, f64>> = order.iter().map(|&i| losses[i].clone()).collect();
    let standings = groups(&seeds, plan.seeds.looks());
    let first = order.iter().zip(standings).filter(|(_, standing)| standing.group == Some(1));
    first.map(|(&i, _)| variants[i]).collect()
}

/// The mean of losses; if one of them is none, what it is.
fn mean(outcomes: impl Iterator<Item = Outcome>) -> Outcome {
    let (mut sum, mut count, mut other) = (0.0, 0, None);
    for outcome in outcomes {
        match outcome {
            Outcome::Loss(loss) => (sum, count) = (sum + loss, count + 1),
            Outcome::Failed => return Outcome::Failed,
            // A value that one seed diverges with need not be tried with others.
            Outcome::Diverged => other = Some(Outcome::Diverged),
            Outcome::Open => other = other.or(Some(Outcome::Open)),
        }
    }
    other.unwrap_or(Outcome::Loss(sum / count as f64))
}

fn named(tune: &Tune, values: &[f64]) -> Vec<(String, f64)> {
    tune.fields.iter().map(|field| field.path.clone()).zip(values.iter().copied()).collect()
}

/// As names have them; a slug has single dashes alone.
fn joined(values: &[f64]) -> String {
    values.iter().map(|&value| shown(value)).collect::<Vec<_>>().join("-")
}

/// A value as a name has it, never with many zeros.
fn shown(value: f64) -> String {
    let is_plain = value == 0.0 || (1e-6..1e7).contains(&value.abs());
    if is_plain { value.to_string() } else { format!("{value:e}") }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::folder::Cell;
    use crate::folder::tests::plan_file;

    fn tuned(names: &[&str], fields: &[(&str, Values)], base: &[f64]) -> PlanFile {
        let mut plan = plan_file(names, Seeds::Listed(vec![1, 2]));
        let fields = fields.iter().map(|(path, values)| Field { path: path.to_string(), values: values.clone() });
        plan.tune = Some(Tune { fields: fields.collect(), seeds: vec![1000], share: 0.5, widen: 3 });
        plan.variants.iter_mut().for_each(|variant| variant.tuned_from = base.to_vec());
        plan
    }

    fn grid() -> Values {
        Values::Grid { factor: 2.0, points: 3 }
    }

    /// Trains all runs of a study, whose losses `loss` knows, and says in which rounds; none for a run that fails.
    fn train(plan: &PlanFile, loss: impl Fn(&PlannedRun) -> Option<f64>) -> (Course, Vec<Vec<String>>) {
        let known: RefCell<BTreeMap<String, Outcome>> = RefCell::default();
        let mut rounds = Vec::new();
        loop {
            let course = follow(plan, &|name| known.borrow().get(name).copied().unwrap_or(Outcome::Open));
            if course.next.is_empty() {
                return (course, rounds);
            }
            rounds.push(course.next.iter().map(|run| run.name.clone()).collect());
            for run in course.next {
                let outcome = loss(&run).map_or(Outcome::Diverged, Outcome::Loss);
                known.borrow_mut().insert(run.name, outcome);
            }
        }
    }

    /// A loss with its best at `best`.
    fn valley(best: f64) -> impl Fn(f64) -> Option<f64> {
        move |value: f64| Some(2.0 + (value / best).ln().powi(2))
    }

    #[test]
    fn without_tuning_every_seed_of_every_variant_is_run_at_once() {
        let (course, rounds) = train(&plan_file(&["a", "b c"], Seeds::Listed(vec![3, 1])), |_| Some(2.0));
        assert_eq!(rounds, [["a-seed3", "b-c-seed3", "a-seed1", "b-c-seed1"]]);
        assert!(course.scoring.iter().all(|run| run.share == 1.0 && run.values.is_empty()));
    }

    #[test]
    fn every_variant_is_tried_equally_often_and_scored_with_its_best() {
        let plan = tuned(&["a", "b"], &[("train.lr", grid())], &[2.0]);
        // The best of `a` lies two steps beyond the grid, that of `b` inside of it.
        let (course, rounds) = train(&plan, |run| valley([16.0, 2.0][run.variant])(run.values[0].1));
        let tries =
            |unit: usize| course.units[unit].searches[0].tries.iter().map(|tried| tried.value).collect::<Vec<_>>();
        assert_eq!(tries(0), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]);
        assert_eq!(tries(1), [1.0, 2.0, 4.0, 1.414, 2.828, 1.682], "around the best");
        assert_eq!((rounds.len(), rounds[1].len()), (5, 2));
        let names: Vec<&str> = course.scoring.iter().map(|run| &run.name[..]).collect();
        assert_eq!(names, ["a--16-seed1", "b--2-seed1", "a--16-seed2", "b--2-seed2"]);
        assert_eq!(course.runs().next().unwrap().name, "a--try-1-seed1000");
    }

    #[test]
    fn a_grid_widens_no_further_than_it_may() {
        let plan = tuned(&["a"], &[("train.lr", grid())], &[2.0]);
        let (course, _) = train(&plan, |run| valley(1e9)(run.values[0].1));
        assert_eq!(course.units[0].searches[0].tries.len(), 3 + 3);
        assert_eq!(course.units[0].chosen, [32.0]);
    }

    #[test]
    fn fields_are_tuned_one_after_the_other() {
        let decay = Values::Listed(vec![0.0, 0.1]);
        let plan = tuned(&["a"], &[("train.lr", grid()), ("train.decay", decay)], &[2.0, 0.0]);
        let loss = |run: &PlannedRun| Some(valley(2.0)(run.values[0].1)? - run.values[1].1);
        let (course, rounds) = train(&plan, loss);
        assert_eq!(rounds[1], ["a--try-2-0.1-seed1000"], "2 with 0 was tried before");
        assert_eq!(course.units[0].chosen, [2.0, 0.1]);
        assert_eq!(course.runs().filter(|run| run.seed == 1000).count(), plan.tune.as_ref().unwrap().points());
    }

    #[test]
    fn a_variant_without_a_finite_loss_is_lost_and_the_others_go_on() {
        let plan = tuned(&["a", "b"], &[("train.lr", grid())], &[2.0]);
        let (course, _) = train(&plan, |run| (run.variant == 1).then_some(2.0));
        assert_eq!((&course.units[0].lost, &course.units[1].lost), (&Some(Lost::NoValue(0)), &None));
        assert!(course.scoring.iter().all(|run| run.variant == 1) && course.scoring.len() == 2);
        let lowest = course.units[0].searches[0].tries.last().unwrap();
        assert_eq!((lowest.value, lowest.outcome), (0.125, Outcome::Diverged), "it goes on below");
    }

    #[test]
    fn a_try_that_was_killed_is_no_measurement() {
        let plan = tuned(&["a", "b"], &[("train.lr", grid())], &[2.0]);
        let outcome = |name: &str| match name {
            "a--try-4-seed1000" => Outcome::Failed,
            _ => Outcome::Loss(2.0 + name.len() as f64),
        };
        let course = follow(&plan, &outcome);
        assert_eq!(course.units[0].lost, Some(Lost::Failed("a--try-4-seed1000".into())));
        assert!(course.scoring.iter().all(|run| run.variant == 1) && !course.scoring.is_empty());
    }

    #[test]
    fn a_size_is_tuned_once_at_its_smallest_budget() {
        let mut plan = tuned(&["a 1", "a 2", "b 1", "b 2"], &[("train.lr", grid())], &[2.0]);
        for (i, variant) in plan.variants.iter_mut().enumerate() {
            variant.cell = Some(Cell { variant: ["a", "b"][i / 2].into(), size: 100, flops: (i % 2) as f64 + 1.0 });
        }
        let (course, rounds) = train(&plan, |run| valley(2.0)(run.values[0].1));
        assert_eq!(rounds[0].len(), 2 * 3);
        assert!(rounds[0].iter().all(|name| name.starts_with("a-1--try") || name.starts_with("b-1--try")));
        assert_eq!((course.units.len(), course.scoring.len()), (2, 4 * 2));
    }

    #[test]
    fn what_is_ahead_is_what_will_be_run() {
        let plan =
            tuned(&["a", "b"], &[("train.lr", grid()), ("train.decay", Values::Listed(vec![0.0, 0.1]))], &[2.0, 0.0]);
        let begun = follow(&plan, &|_| Outcome::Open);
        let (_, rounds) = train(&plan, |run| valley(2.0)(run.values[0].1));
        assert_eq!(begun.runs().count() + begun.ahead(&plan).len(), rounds.iter().map(Vec::len).sum::<usize>());
    }

    #[test]
    fn seeds_are_added_to_those_that_cannot_be_told_apart() {
        let mut plan = plan_file(&["a", "b", "c"], Seeds::Until { start: 3, most: 6 });
        // The difference of `a` and `b` is noise, that of `c` is not.
        let noise = |run: &PlannedRun| (run.seed as f64 * 7.0 + run.variant as f64 * 3.0).sin() * 0.01;
        let loss = |run: &PlannedRun| Some([2.0, 2.0, 9.0][run.variant] + noise(run));
        let (course, rounds) = train(&plan, loss);
        let seeds = |variant: usize| course.scoring.iter().filter(|run| run.variant == variant).count();
        assert_eq!((seeds(0), seeds(1), seeds(2), rounds.len()), (6, 6, 3, 4));
        // What is told apart at once needs no more.
        plan.seeds = Seeds::Until { start: 4, most: 10 };
        let (course, _) = train(&plan, |run| Some(run.variant as f64 + noise(run)));
        assert_eq!(course.scoring.len(), 3 * 4);
    }
}
