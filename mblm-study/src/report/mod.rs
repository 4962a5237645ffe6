//! The comparison of runs: which variant is best, by how much, at what speed and memory.
//!
//! A [`Report`] is made from the files of run folders alone, of one study or of any runs, and written as one page
//! (`report.html`), as text (`report.md`), as tables (`results.csv`, `results.json`,
//! `report.tex`) and as charts (`*.svg`).

mod basis;
mod charts;
mod format;
mod front;
mod latex;
mod markdown;
pub(crate) mod matrix;
mod page;
mod passage;
pub(crate) mod run;
mod scaling;
mod seen;
mod standing;
mod table;
mod tuning;
mod variant;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

pub use basis::Apart;
use charts::Measure;
use charts::svg::{Format, Svg};
use format::count;
pub(crate) use format::with_unit;
pub use format::{duration, inert};
use mblm_base::files;
use mblm_train::cost;
use mblm_train::error::{AtPath, Result};
use mblm_train::journal::metrics::Kind;
use mblm_yaml::difference::differences;
pub use run::{Generation, Measured, Point, Run, RunResult, Speed, Status};
pub use scaling::{Scaling, ScalingData, ScalingVariant};
pub use seen::Seen;
use serde_yaml::Value;
pub use tuning::{Try, Tuned, TunedVariant};
pub use variant::{Axis, CurvePoint, Spread, Variant};

use crate::course::outcome::{outcomes, why_lost};
use crate::course::{PlannedRun, Unit, follow};
use crate::design::budget::Amount;
use crate::design::seeds::Seeds;
use crate::folder::{AboutVariant, PlanFile, failure_file, run_folder};

/// Fields in which runs of one variant may differ.
const NO_VARIANTS: [&str; 3] = ["train.seed", "io.name_model", "io.output_dir"];

/// So many machines are named where they are counted.
const MOST_NAMES: usize = 4;

/// A comparison.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// What was asked, in words.
    pub description: Option<String>,
    /// What all runs have in common, in a few words each.
    pub facts: Vec<String>,
    /// What differences are counted from.
    pub base: String,
    /// The best first.
    pub variants: Vec<Variant>,
    /// Those that were measured on something else, and are not ranked with them.
    pub apart: Vec<Apart>,
    /// What tuning found, a part per field.
    pub tuning: Vec<Tuned>,
    /// How often the study may look at the data while it adds seeds; 0 and 1 are the same.
    pub looks: usize,
    /// How losses depend on size and budget, in a scaling study.
    pub scaling: Option<Scaling>,
}

impl Report {
    /// The report of the study in `folder`, as far as it has come.
    ///
    /// # Errors
    /// It is no study's folder.
    pub fn of_study(folder: &Path) -> Result<Self> {
        let plan = PlanFile::read(folder)?;
        let course = follow(&plan, &outcomes(folder));
        let mut seen = Seen::default();
        let mut variants = Vec::new();
        for (i, about) in plan.variants.iter().enumerate() {
            let runs = course.scoring.iter().filter(|run| run.variant == i);
            let mut runs: Vec<Run> = runs.map(|run| study_run(folder, run, &mut seen)).collect();
            let unit = course.units.iter().find(|unit| unit.variants.contains(&i));
            runs.extend(unit.and_then(|unit| lost(folder, &plan, about, unit)));
            let tuned =
                unit.zip(plan.tune.as_ref()).filter(|(unit, _)| unit.lost.is_none() && !course.scoring.is_empty());
            let tuned = tuned.into_iter().flat_map(|(unit, tune)| tune.fields.iter().zip(&unit.chosen));
            let tuned = tuned.map(|(field, value)| format!("{}: {value}, tuned", field.path));
            variants.push(Variant {
                name: about.name.clone(),
                runs,
                cost: Some(about.cost.clone()),
                differences: about.differences.iter().cloned().chain(tuned).collect(),
                solved: about.solved.clone(),
            });
        }
        let mut scaling = None;
        if plan.scale.is_some() {
            scaling = Scaling::of(ScalingData::of_study(&plan, &variants));
            variants = of_largest_budget(&plan, variants);
        }
        let facts = study_facts(&plan, &variants);
        let ranked = Report::ranked(variants);
        let names: Vec<&str> = ranked.variants.iter().filter_map(|variant| scaled_name(&plan, &variant.name)).collect();
        let scaling = scaling.map(|scaling| scaling.coloured_as(&names));
        let tuning = tuning::of_study(&plan, &course, &ranked.variants);
        let looks = match plan.seeds {
            Seeds::Listed(_) => 1,
            Seeds::Until { start, most } => (most - start + 1) as usize,
        };
        let PlanFile { name, description, .. } = plan;
        Ok(Report {
            title: name,
            description,
            facts,
            base: "the study's base".into(),
            tuning,
            looks,
            scaling,
            ..ranked
        })
    }

    /// The report of any runs. Those that differ in their seeds alone are one variant; differences are counted from the
    /// first. `cost` is asked where a run's files do not tell what its model costs.
    pub fn of_runs(runs: Vec<Run>, cost: impl Fn(&Path) -> Option<cost::ModelCost>) -> Self {
        let mut groups: Vec<(Option<Value>, Vec<Run>)> = Vec::new();
        for run in runs {
            let config = run.config.as_ref().map(without_names);
            match groups.iter_mut().find(|(other, _)| config.is_some() && *other == config) {
                Some((_, runs)) => runs.push(run),
                None => groups.push((config, vec![run])),
            }
        }
        let names = names(&groups);
        let base = groups.first().and_then(|(config, _)| config.clone());
        let first = names.first().cloned().unwrap_or_default();
        let variants: Vec<Variant> = groups
            .into_iter()
            .zip(names)
            .map(|((config, runs), name)| {
                let differences = base.as_ref().zip(config.as_ref()).map(|(base, config)| differences(base, config));
                Variant {
                    name,
                    cost: known_cost(&runs).or_else(|| runs.iter().find_map(|run| cost(run.folder.as_ref()?))),
                    runs,
                    differences: differences.unwrap_or_default(),
                    solved: None,
                }
            })
            .collect();
        let runs: usize = variants.iter().map(|variant| variant.runs.len()).sum();
        let facts = vec![count(variants.len(), "variant"), count(runs, "run")];
        Report { title: "Comparison of runs".into(), facts, base: first, ..Report::ranked(variants) }
    }

    /// A report of variants, without words.
    fn ranked(variants: Vec<Variant>) -> Self {
        let (mut variants, mut apart) = basis::grouped(variants);
        variant::rank(&mut variants);
        apart.iter_mut().for_each(|group| variant::rank(&mut group.variants));
        Report { variants, apart, ..Report::default() }
    }

    /// All groups of variants with the reasons why they are apart; those that the report is about come first.
    fn groups(&self) -> impl Iterator<Item = (&[String], &[Variant])> {
        let main: (&[String], &[Variant]) = (&[], &self.variants);
        std::iter::once(main).chain(self.apart.iter().map(|group| (&group.why[..], &group.variants[..])))
    }

    /// All variants of all groups.
    fn all_variants(&self) -> impl Iterator<Item = &Variant> {
        self.groups().flat_map(|(_, variants)| variants)
    }

    /// Writes everything to `folder`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).at(folder)?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            files::replace_text(&path, text).at(&path)
        };
        let charts = self.charts(Format::Wide);
        for (name, svg) in &charts {
            write(&format!("{name}.svg"), &svg.file())?;
        }
        let names: Vec<&str> = charts.iter().map(|(name, _)| &name[..]).collect();
        write("report.md", &markdown::text(self, &names))?;
        write("report.tex", &latex::table(self))?;
        let csv = table::csv(self)?;
        write("results.csv", &csv)?;
        write("results.json", &table::json(self)?)?;
        write("report.html", &page::html(self, &csv))
    }

    /// The ranking as text for a terminal.
    pub fn to_text(&self) -> String {
        table::text(self)
    }

    /// All charts there is something for, by name.
    fn charts(&self, format: Format) -> Vec<(String, Svg)> {
        let variants = &self.variants;
        let mut charts = vec![("ranking".to_string(), charts::ranking(variants, self.looks, format))];
        for kind in [Kind::Valid, Kind::Train] {
            for axis in Axis::ALL {
                charts.push((curve_id(kind, axis), charts::lines::curves(variants, kind, axis, format)));
            }
        }
        for measure in Measure::ALL {
            charts.push((trade_off_id(measure), charts::trade_off(variants, measure, format)));
        }
        for (n, tuned) in self.tuning.iter().enumerate() {
            charts.push((tuning_id(n), charts::sensitivity::sensitivity(tuned, &tuning_id(n), format)));
        }
        charts.extend(self.scaling.iter().flat_map(|scaling| scaling_charts(scaling, format)));
        charts.push((PLACES.to_string(), charts::lines::places(variants, format)));
        for stage in 0..self.num_stages() {
            charts.push((gradient_id(stage), charts::lines::gradients(variants, stage, format)));
        }
        charts.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect()
    }

    /// The most stages that a variant has gradients of.
    fn num_stages(&self) -> usize {
        let runs = self.variants.iter().flat_map(|variant| &variant.runs);
        runs.flat_map(|run| &run.points).map(|point| point.stage_grads.len()).max().unwrap_or(0)
    }
}

/// The name of a chart of losses against a tuned field; fields are counted from 0 here, and from 1 in its name.
fn tuning_id(field: usize) -> String {
    format!("tuning-{}", field + 1)
}

/// The name of a variant's chart of losses against size; variants are counted from 0 here, and from 1 in its name.
fn sizes_id(variant: usize) -> String {
    format!("scaling-sizes-{}", variant + 1)
}

/// The names of the charts against the budget.
const SCALING_LOSSES: &str = "scaling-losses";
const SCALING_DIFFERENCES: &str = "scaling-differences";

fn scaling_charts(scaling: &Scaling, format: Format) -> Vec<(String, Option<Svg>)> {
    let sizes = |v: usize| (sizes_id(v), Some(charts::sizes::sizes(scaling, v, &sizes_id(v), format)));
    let losses = charts::budgets::losses(scaling, SCALING_LOSSES, format);
    let differences = charts::budgets::differences(scaling, SCALING_DIFFERENCES, format);
    let mut charts: Vec<(String, Option<Svg>)> = (0..scaling.variants.len()).map(sizes).collect();
    charts.extend([(SCALING_LOSSES.into(), Some(losses)), (SCALING_DIFFERENCES.into(), differences)]);
    charts
}

/// The name of the chart of bits by place in the patch.
const PLACES: &str = "places";

/// The name of a chart of learning curves.
fn curve_id(kind: Kind, axis: Axis) -> String {
    format!("curves-{}-{}", kind.name(), axis.id())
}

/// The name of a chart with a Pareto front.
fn trade_off_id(measure: Measure) -> String {
    format!("quality-{}", measure.id())
}

/// The name of a chart of gradient norms; stages are counted from 0 here, and from 1 in its name.
fn gradient_id(stage: usize) -> String {
    format!("gradients-stage{}", stage + 1)
}

/// A run of a study: from its folder, or that it has none.
fn study_run(study: &Path, planned: &PlannedRun, seen: &mut Seen) -> Run {
    let PlannedRun { name, seed, .. } = planned;
    if let Some(why) = seen.again(&run_folder(study, name)) {
        return Run::absent(name, *seed, Status::Failed(format!("its folder is {why}")));
    }
    let mut run = Run::read(&run_folder(study, name)).unwrap_or_else(|_| Run::absent(name, *seed, Status::Unfinished));
    match files::read_text(&failure_file(study, name), files::SMALL) {
        Ok(why) => run.status = Status::Failed(why),
        // The study knows better than the log: a run it has not measured is not finished.
        Err(_) if run.result.is_none() => run.status = Status::Unfinished,
        Err(_) => run.status = Status::Finished,
    }
    (run.name, run.seed) = (name.clone(), Some(*seed));
    run
}

/// A failed run in place of the runs of a variant that could not be tuned.
fn lost(study: &Path, plan: &PlanFile, about: &AboutVariant, unit: &Unit) -> Option<Run> {
    let why = why_lost(study, plan.tune.as_ref(), unit.lost.as_ref()?);
    Some(Run::absent(&about.name, plan.seeds.first()[0], Status::Failed(why)))
}

/// The variant of a scaling study that `name` is in one size under one budget.
fn scaled_name<'a>(plan: &'a PlanFile, name: &str) -> Option<&'a str> {
    let about = plan.variants.iter().find(|about| about.name == name)?;
    about.cell.as_ref().map(|cell| &cell.variant[..])
}

/// Each variant of a scaling study in its best size for the largest budget.
fn of_largest_budget(plan: &PlanFile, variants: Vec<Variant>) -> Vec<Variant> {
    let largest = plan.scale.as_ref().and_then(|scale| scale.budgets.last().copied()).unwrap_or_default();
    let mut best: Vec<(&str, Variant)> = Vec::new();
    for (about, variant) in plan.variants.iter().zip(variants) {
        let Some(cell) = about.cell.as_ref().filter(|cell| cell.flops == largest) else { continue };
        let loss = |variant: &Variant| variant.valid_bpb().map_or(f64::INFINITY, |bpb| bpb.mean);
        match best.iter_mut().find(|(name, _)| *name == cell.variant) {
            Some((_, other)) if loss(&variant) < loss(other) => *other = variant,
            Some(_) => {}
            None => best.push((&cell.variant, variant)),
        }
    }
    best.into_iter().map(|(_, variant)| variant).collect()
}

fn study_facts(plan: &PlanFile, variants: &[Variant]) -> Vec<String> {
    let equal = match plan.amount {
        Amount::Bytes(bytes) => format!("{} of training each", format::with_unit(bytes as f64, "B")),
        Amount::Flops(flops) => format!("{} of training each", format::with_unit(flops, "FLOP")),
        Amount::Seconds(seconds) => seconds_used(seconds, variants),
    };
    let mut facts = vec![count(variants.len(), "variant"), seeds(plan)];
    match &plan.scale {
        Some(scale) => {
            facts.extend([count(scale.sizes.len(), "size"), count(scale.budgets.len(), "budget")]);
            facts.push(format!("ranked at the largest budget, {}", plan.amount));
        }
        None => facts.push(equal),
    }
    if plan.equal_parameters && plan.scale.is_none() {
        facts.push("equal parameters".into());
    }
    let results = || variants.iter().flat_map(|variant| &variant.runs).filter_map(|run| run.result.as_ref());
    let threads: BTreeSet<usize> = results().map(|result| result.threads).collect();
    if let (Some(&least), Some(&most)) = (threads.first(), threads.last()) {
        let jobs = results().map(|result| result.jobs).max().unwrap_or(1);
        let at_once = if jobs > 1 { format!(", {jobs} runs at a time") } else { String::new() };
        facts.push(match least == most {
            true => format!("{} per run{at_once}", count(most, "thread")),
            false => format!("{least} to {most} threads per run, which round differently{at_once}"),
        });
    }
    let speeds: Vec<Speed> = results().filter_map(|result| result.speed).collect();
    if let Some(speed) = speeds.first() {
        let all = if speeds.len() == results().count() { "speeds" } else { "some speeds" };
        facts.push(format!("{all} measured again, one run at a time with {}", count(speed.threads, "thread")));
    }
    let hosts: BTreeSet<&str> = results().flat_map(|result| &result.hosts).map(|host| &host[..]).collect();
    if hosts.len() > 1 {
        let names = match hosts.len() <= MOST_NAMES {
            true => format!(" ({})", hosts.iter().copied().collect::<Vec<_>>().join(", ")),
            false => String::new(),
        };
        facts.push(format!("on {} machines{names}, whose speeds may differ", hosts.len()));
    }
    let open = variants.iter().flat_map(|v| &v.runs).filter(|run| run.status == Status::Unfinished).count();
    if open > 0 {
        facts.push(format!("{} not finished", count(open, "run")));
    }
    facts
}

fn seeds(plan: &PlanFile) -> String {
    match &plan.seeds {
        Seeds::Listed(seeds) => count(seeds.len(), "seed"),
        Seeds::Until { start, most } => format!("{start} to {most} seeds"),
    }
}

/// A budget in seconds is one of bytes that were measured to take so long: what the runs took may be something else.
fn seconds_used(seconds: f64, variants: &[Variant]) -> String {
    let budget = format!("{} of training each", format::duration(seconds));
    let used = Spread::of(variants.iter().flat_map(|variant| &variant.runs).filter_map(Run::train_seconds));
    match used.map(|used| (format::duration(used.min), format::duration(used.max))) {
        None => budget,
        Some((least, most)) if least == most => format!("{budget} ({least} were used)"),
        Some((least, most)) => format!("{budget} ({least} to {most} were used)"),
    }
}

/// A configuration without what tells runs of one variant apart. How another run can begin with this one does; what this
/// one began with does not.
fn without_names(config: &Value) -> Value {
    let mut config = config.clone();
    if let Some(fields) = config.as_mapping_mut() {
        let resume = fields.shift_remove("resume");
        fields.shift_remove("summary");
        if let Some(began_with) = resume.and_then(|resume| resume.get("resumed_from").cloned()).filter(|v| !v.is_null())
        {
            fields.insert("resume".into(), began_with);
        }
    }
    for field in NO_VARIANTS {
        let (section, name) = field.split_once('.').unwrap_or((field, ""));
        if let Some(section) = config.get_mut(section).and_then(Value::as_mapping_mut) {
            section.shift_remove(name);
        }
    }
    config
}

/// A name for each group: what its model is called, or its folder where two are called the same.
fn names(groups: &[(Option<Value>, Vec<Run>)]) -> Vec<String> {
    let model = |runs: &[Run]| -> Option<String> {
        Some(runs[0].config.as_ref()?.get("io")?.get("name_model")?.as_str()?.to_string())
    };
    let mut times: BTreeMap<Option<String>, usize> = BTreeMap::new();
    groups.iter().for_each(|(_, runs)| *times.entry(model(runs)).or_default() += 1);
    let name = |(_, runs): &(_, Vec<Run>)| match model(runs) {
        Some(name) if times[&Some(name.clone())] == 1 => name,
        _ => runs[0].name.clone(),
    };
    groups.iter().map(name).collect()
}

fn known_cost(runs: &[Run]) -> Option<cost::ModelCost> {
    runs.iter().find_map(|run| run.result.as_ref()?.measured.cost.clone())
}

#[cfg(test)]
mod tests {
    use super::run::tests::folder;
    use super::*;

    fn metrics(bpb: f64) -> String {
        format!("{{\"batch\":0,\"bytes_seen\":64,\"seconds\":1.0,\"kind\":\"valid\",\"bpb\":{bpb}}}\n")
    }

    fn read(config: &str, bpb: f64) -> Run {
        let log = "2024-01-01 00:00:00.0 finished: saved x\n";
        let folder = folder(&[("config.yaml", config), ("metrics.jsonl", &metrics(bpb)), ("train.log", log)]);
        Run::read(folder.path()).unwrap()
    }

    #[test]
    fn runs_that_differ_in_their_seeds_are_one_variant() {
        let config = |name: &str, seed: u64, lr: f64| {
            format!("io: {{name_model: {name}, output_dir: x{seed}}}\ntrain: {{seed: {seed}, lr: {lr}}}\n")
        };
        let runs =
            vec![read(&config("a", 1, 0.1), 3.0), read(&config("b", 1, 0.2), 2.0), read(&config("a", 2, 0.1), 4.0)];
        let report = Report::of_runs(runs, |_| None);
        let found: Vec<_> =
            report.variants.iter().map(|v| (&v.name[..], v.runs.len(), v.valid_bpb().unwrap().mean)).collect();
        assert_eq!(found, [("b", 1, 2.0), ("a", 2, 3.5)]);
        assert_eq!(report.variants[0].differences, ["train.lr: 0.1, now 0.2"]);
        assert_eq!(report.facts, ["2 variants", "3 runs"]);
    }

    #[test]
    fn several_machines_are_named_since_their_speeds_may_differ() {
        let facts = |hosts: &[&str]| {
            let run = |host: &&str| {
                let mut run = read("io: {name_model: a}", 2.0);
                run.result =
                    Some(RunResult { threads: 8, jobs: 1, hosts: vec![host.to_string()], ..Default::default() });
                run
            };
            let variants = [variant::tests::variant("a", hosts.iter().map(run).collect())];
            let plan = PlanFile {
                name: "s".into(),
                description: None,
                amount: Amount::Bytes(100),
                equal_parameters: false,
                seeds: Seeds::Listed(vec![1]),
                tune: None,
                scale: None,
                jobs: 1,
                variants: vec![],
            };
            study_facts(&plan, &variants).split_off(4)
        };
        assert_eq!(facts(&["n1", "n1"]), [""; 0]);
        assert_eq!(facts(&["n2", "n1"]), ["on 2 machines (n1, n2), whose speeds may differ"]);
        assert_eq!(facts(&["a", "b", "c", "d", "e"]), ["on 5 machines, whose speeds may differ"]);
    }

    /// Files of a run with everything that a report reads.
    fn files() -> Vec<(&'static str, String)> {
        let line = |i: u64, kind: &str| {
            format!(
                "{{\"batch\":{i},\"bytes_seen\":{},\"seconds\":{i}.5,\"kind\":\"{kind}\",\"bpb\":{},\"bytes_per_second\":50.0,\
                 \"memory_mb\":100.0,\"stage1/grad_norm\":1.0,\"stage2/grad_norm\":0.5}}\n",
                64 * (i + 1),
                8.0 / (i + 1) as f64
            )
        };
        let result = RunResult {
            measured: Measured {
                cost: Some(super::matrix::tests::cost(&["a", "b"])),
                generation: Some(Generation { prompt: "a".into(), text: "b".into(), bytes: 1, bytes_per_second: 5.0 }),
                passage: Some(crate::passage::Passage { bytes: b"a\n".into(), bits: vec![2.5, 0.125] }),
                place_bits: vec![2.5, 1.5],
                missing: None,
            },
            peak_bytes: Some(1 << 30),
            ..RunResult::default()
        };
        vec![
            ("metrics.jsonl", (0..8).map(|i| line(i, "train") + &line(i, "valid")).collect()),
            ("loss.csv", "gpu_rank,timestamp,elements_seen,kind,epoch,batch,cum_batch,loss,lr,avg_grad,avg_grad_clipped\n\
                          0,2024-01-01 10:00:00.5,8,train,0,0,0,2.0,0.1,-1,-1\n0,2024-01-01 10:01:00,16,valid,0,0,1,1.5,-1,-1,-1\n".into()),
            ("timemem.csv", "cum_batch,allocated_max\n0,0.5\n".into()),
            ("config.yaml", "io: {name_model: a, dataset_dir: x, dataset_id: bytes}\nparams: {num_tokens: 257, input_seq_len: 64, \
                             block: [{block_type: a}, {block_type: b}]}\ntrain: {seed: 1, batch_size: 4, max_eval_steps: 3, \
                             target_elements_strategy: batch}\n".into()),
            ("train.log", "2024-01-01 00:00:00.0 run: x\n2024-01-01 00:00:01.0 finished: saved x\n".into()),
            ("result.json", serde_json::to_string(&result).unwrap()),
        ]
    }

    #[test]
    fn no_damaged_run_folder_ends_a_report() {
        let mut scrambler = mblm_base::scramble::Scrambler::new(16);
        let good = files();
        for round in 0..150 {
            let folder = tempfile::tempdir().unwrap();
            let (skipped, damaged) = (scrambler.below(2 * good.len()), scrambler.below(good.len()));
            for (i, (name, text)) in good.iter().enumerate().filter(|(i, _)| *i != skipped) {
                let is_damaged = i == damaged || scrambler.below(3) == 0;
                let bytes = if is_damaged { scrambler.damaged(text.as_bytes()) } else { text.clone().into() };
                fs::write(folder.path().join(name), bytes).unwrap();
            }
            let Ok(run) = Run::read(folder.path()) else { continue };
            let whole = self::folder(&good.iter().map(|(name, text)| (*name, &text[..])).collect::<Vec<_>>());
            let report = Report::of_runs(vec![Run::read(whole.path()).unwrap(), run], |_| None);
            let csv = table::csv(&report).unwrap();
            let page = page::html(&report, &csv);
            let text = report.to_text() + &markdown::text(&report, &[]) + &csv;
            let json = table::json(&report).unwrap();
            assert!(page.len() + text.len() + json.len() < 4 << 20, "round {round}");
            for place in [" d=\"", " x=\"", " y=\"", " cx=\"", " cy=\""] {
                for drawn in page.split(place).skip(1).filter_map(|rest| rest.split('"').next()) {
                    assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "round {round}: {drawn}");
                }
            }
            assert_eq!(page.matches("<script>").count(), 1, "round {round}");
        }
    }

    #[test]
    fn runs_that_are_called_the_same_go_by_their_folders() {
        let config = |lr: f64| format!("io: {{name_model: a}}\ntrain: {{lr: {lr}}}\n");
        let runs = vec![read(&config(0.1), 3.0), read(&config(0.2), 2.0)];
        let names = [runs[1].name.clone(), runs[0].name.clone()];
        let report = Report::of_runs(runs, |_| None);
        assert_eq!([&report.variants[0].name, &report.variants[1].name], [&names[0], &names[1]]);
    }
}
