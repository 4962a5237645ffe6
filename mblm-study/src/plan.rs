//! What a study will do: every run with its configuration, checked and brought to the budget, before anything runs.

use std::fmt;
use std::path::{Path, PathBuf};

use mblm_base::files;
use mblm_base::memory::Memory;
use mblm_core::registry::BlockRegistry;
use mblm_data::Fingerprint;
use mblm_train::checkpoint::Shelf;
use mblm_train::config::{RunConfig, TargetStrategy};
use mblm_train::cost::{self, STEP_PER_FORWARD, Step, bytes as binary, metric, write_table};
use mblm_train::error::{AtPath, Error, Result};
use mblm_train::journal::folder::RunFolder;
use mblm_train::model::{Model, TrainModel};
use mblm_train::processes::Solo;
use mblm_train::session::open_data;
use mblm_train::trainer::Trainer;
use mblm_yaml::Document;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::budget::{Amount, Parameters};
use crate::solve::{num_parameters, solve};
use crate::spec::{Spec, slug};

const FILE: &str = "study.json";
/// A study with more runs than this is damaged.
const MAX_RUNS: usize = 100_000;

/// Fields that the study decides, which therefore are no differences between variants.
const DECIDED: [&str; 5] =
    ["train.seed", "train.target_elements", "train.target_elements_strategy", "io.name_model", "io.output_dir"];

/// A study, checked.
#[derive(Debug)]
pub struct Plan {
    /// What the YAML says.
    pub spec: Spec,
    /// In the order of the YAML.
    pub variants: Vec<PlannedVariant>,
}

/// A variant, with what it costs.
#[derive(Clone, Debug)]
pub struct PlannedVariant {
    /// Its configuration, with the first seed.
    pub config: RunConfig,
    /// Its data.
    pub data: Fingerprint,
    /// What the report needs to know.
    pub about: AboutVariant,
}

/// A variant as `study.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AboutVariant {
    /// Its name.
    pub name: String,
    /// Training bytes of each run; none if that is measured first.
    pub bytes: Option<u64>,
    /// What was solved for, and how close it is.
    pub solved: Option<String>,
    /// How its configuration differs from the base's.
    pub differences: Vec<String>,
    /// What it costs.
    pub cost: cost::ModelCost,
}

/// What `study.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanFile {
    /// The study's name.
    pub name: String,
    /// What it asks.
    pub description: Option<String>,
    /// What was equal.
    pub amount: Amount,
    /// Whether models were brought to one size.
    pub equal_parameters: bool,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// Runs at a time.
    pub jobs: usize,
    /// The variants.
    pub variants: Vec<AboutVariant>,
}

/// One run of a plan.
#[derive(Clone, Debug)]
pub struct PlannedRun {
    /// The number of its variant.
    pub variant: usize,
    /// Its seed.
    pub seed: u64,
    /// `NAME-seedN`
    pub name: String,
}

impl Plan {
    /// Checks a study and solves for what is to be equal.
    ///
    /// # Errors
    /// Everything that cannot be trained, of all variants at once.
    pub fn new(spec: Spec, registry: &BlockRegistry) -> Result<Self> {
        check_folder(&spec.output_dir)?;
        if let (Some(_), Amount::Seconds(_)) = (&spec.launcher, spec.budget.amount) {
            return Err(Error::Config(
                "budget.seconds: the speed is measured on this machine, and --launcher has others train; give a budget \
                 of bytes or flops"
                    .into(),
            ));
        }
        let base = RunConfig::from_document(&spec.base, registry)
            .map_err(|error| Error::Config(format!("the base cannot be trained: {error}")))?;
        let target = match &spec.budget.parameters {
            Some(Parameters { number: Some(number), .. }) => Some(*number),
            Some(Parameters { number: None, .. }) => Some(num_parameters(&base)?),
            None => None,
        };
        let earlier = PlanFile::read(&spec.output_dir).ok();
        let planner = Planner { spec: &spec, registry, base: &base, target, earlier };
        let results: Vec<Result<PlannedVariant>> =
            spec.variants.par_iter().map(|(name, document)| planner.variant(name, document)).collect();
        let mut variants = Vec::new();
        let mut wrong = Vec::new();
        for (result, (name, _)) in results.into_iter().zip(&spec.variants) {
            match result {
                Ok(variant) => variants.push(variant),
                Err(error) => wrong.push(format!("variant {name:?}: {error}")),
            }
        }
        match wrong.len() {
            0 => Ok(Plan { spec, variants }),
            1 => Err(Error::Config(wrong.remove(0))),
            n => Err(Error::Config(format!(
                "{n} of {} variants cannot be trained:\n  {}",
                spec.variants.len(),
                wrong.join("\n  ")
            ))),
        }
    }

    /// The study's folder.
    pub fn folder(&self) -> &Path {
        &self.spec.output_dir
    }

    /// All runs: the first seed of every variant, then the second.
    pub fn runs(&self) -> Vec<PlannedRun> {
        let of_seed = |&seed: &u64| {
            let run = move |(i, variant): (usize, &PlannedVariant)| PlannedRun {
                variant: i,
                seed,
                name: run_name(&variant.about.name, seed),
            };
            self.variants.iter().enumerate().map(run)
        };
        self.spec.seeds.iter().flat_map(of_seed).collect()
    }

    /// The folder of a run.
    pub fn run_folder(&self, run: &PlannedRun) -> PathBuf {
        run_folder(self.folder(), &run.name)
    }

    /// The configuration of a run, which trains `bytes`.
    pub fn config(&self, run: &PlannedRun, bytes: u64) -> RunConfig {
        let mut config = self.variants[run.variant].config.clone();
        config.train.seed = run.seed;
        config.train.target_elements = bytes;
        config
    }

    /// Holds the runs that are there already against the plan.
    ///
    /// # Errors
    /// One was trained with another configuration, or on other data.
    pub fn check_earlier_runs(&self, registry: &BlockRegistry) -> Result<()> {
        for run in self.runs() {
            let folder = self.run_folder(&run);
            let state = Shelf::of_run(&folder).and_then(|shelf| shelf.newest()).and_then(|newest| newest.state());
            if state.is_ok_and(|state| !state.data.is_empty() && !self.variants[run.variant].data.is(&state.data)) {
                return Err(Error::Config(format!(
                    "{} was trained on other data; restore them, remove that folder to train it again, or \
                     name another output_dir",
                    folder.display()
                )));
            }
            let (true, Some(bytes)) = (folder.exists(), self.variants[run.variant].about.bytes) else { continue };
            let name = folder.join("config.yaml").display().to_string();
            let document = Document::parse(&RunFolder::config_yaml(&folder)?, &name)
                .map_err(|error| Error::Config(error.to_string()))?;
            let before =
                RunConfig::from_document(&document, registry).map_err(|error| Error::Config(error.to_string()))?;
            let changes = before.differences(&self.config(&run, bytes))?;
            if !changes.is_empty() {
                return Err(Error::Config(format!(
                    "{} was trained with another configuration:\n  {}\nremove that folder to train it again, or name \
                     another output_dir",
                    folder.display(),
                    changes.join("\n  ")
                )));
            }
        }
        Ok(())
    }

    /// Writes `study.json`.
    pub fn write(&self) -> Result<()> {
        let path = self.folder().join(FILE);
        let file = PlanFile {
            name: self.spec.name.clone(),
            description: self.spec.description.clone(),
            amount: self.spec.budget.amount,
            equal_parameters: self.spec.budget.parameters.is_some(),
            seeds: self.spec.seeds.clone(),
            jobs: self.spec.jobs,
            variants: self.variants.iter().map(|variant| variant.about.clone()).collect(),
        };
        let text = serde_json::to_string_pretty(&file).map_err(std::io::Error::from).at(&path)?;
        files::replace_text(&path, &text).at(&path)
    }

    /// A warning if the runs at a time need more memory than there is; none if they are on other machines.
    pub fn memory_warning(&self) -> Option<String> {
        if self.spec.launcher.is_some() {
            return None;
        }
        let memory = Memory::now()?.total as f64;
        let largest = self.variants.iter().filter_map(|variant| variant.about.cost.peak_bytes()).fold(0.0, f64::max);
        let needed = largest * self.spec.jobs as f64;
        (needed > memory).then(|| {
            format!(
                "warning: {} run(s) at a time may need {} of memory, and this machine has {}; lower --jobs or the models",
                self.spec.jobs,
                binary(needed),
                binary(memory)
            )
        })
    }
}

/// What the run of a variant with a seed is called.
pub(crate) fn run_name(variant: &str, seed: u64) -> String {
    format!("{}-seed{seed}", slug(variant))
}

/// Where a study says why the run `name` failed.
pub(crate) fn failure_file(study: &Path, name: &str) -> PathBuf {
    study.join("failed").join(format!("{name}.txt"))
}

/// The folder of the run `name` in a study's folder.
pub(crate) fn run_folder(study: &Path, name: &str) -> PathBuf {
    study.join("runs").join(name)
}

/// Whether a study can be in `folder`.
fn check_folder(folder: &Path) -> Result<()> {
    let refuse =
        |why: String| Err(Error::Config(format!("{}: {why}; choose another output_dir, or --out", folder.display())));
    match RunFolder::around(folder) {
        Some(run) => refuse(format!("{} is the folder of a run; a study needs one of its own", run.display())),
        None if folder.to_str().is_none() => refuse("the name of a study's folder must be UTF-8".into()),
        None => Ok(()),
    }
}

impl PlanFile {
    /// Reads the plan of the study in `folder`.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let text = files::read(&path, files::SMALL).at(&path)?;
        let plan: PlanFile = serde_json::from_slice(&text).map_err(std::io::Error::from).at(&path)?;
        match plan.variants.len().saturating_mul(plan.seeds.len()) {
            0..=MAX_RUNS => Ok(plan),
            runs => Err(Error::Config(format!("{}: {runs} runs; expected at most {MAX_RUNS}", path.display()))),
        }
    }

    /// Whether `folder` looks like a study's.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(FILE).is_file()
    }
}

/// What is the same for all variants.
struct Planner<'a> {
    spec: &'a Spec,
    registry: &'a BlockRegistry,
    base: &'a RunConfig,
    /// Parameters of every model.
    target: Option<u64>,
    /// The plan of an earlier call.
    earlier: Option<PlanFile>,
}

impl Planner<'_> {
    fn variant(&self, name: &str, document: &Document) -> Result<PlannedVariant> {
        let mut config =
            RunConfig::from_document(document, self.registry).map_err(|error| Error::Config(error.to_string()))?;
        self.refuse(&config).map_err(|error| error.located(document))?;
        // What devices other machines have is not known here.
        if self.spec.launcher.is_none() {
            config.train.place().map_err(|error| Error::from(error).located(document))?;
        }
        let budget = &self.spec.budget;
        let solved = match (&budget.parameters, self.target) {
            (Some(parameters), Some(target)) => Some(solve(&mut config, parameters, target, budget.tolerance)?),
            _ => None,
        };
        config.io.name_model = slug(name);
        config.io.output_dir = self.spec.output_dir.join("runs");
        config.train.target_elements_strategy = TargetStrategy::Sequence;
        config.train.seed = self.spec.seeds[0];
        let model = Model::new(&config, 0)?;
        let step = Step { batch: config.train.batch_size, bytes: config.params.input_seq_len };
        let cost = cost::ModelCost::new(config.params.model.hierarchy(), model.params(), &model.stage_models(), step);
        let wanted = self.bytes(name, &cost)?;
        let smallest = (step.batch * step.bytes * config.train.gradient_accumulate_every) as u64;
        config.train.target_elements = wanted.unwrap_or(smallest);
        // Everything else that a run checks before it begins.
        let planned = open_data(&config).and_then(|splits| {
            let data = splits.fingerprint.clone();
            Ok((data, Trainer::new(&model, splits, &config, &Solo)?.plan().batches))
        });
        let (data, batches) = planned.map_err(|error| error.located(document))?;
        let bytes = batches * (step.batch * step.bytes) as u64;
        if let Some(wanted) = wanted {
            self.check_rounding(wanted, bytes, step)?;
        }
        let mut differences = self.base.differences(&config)?;
        differences.retain(|line| !DECIDED.iter().any(|field| line.starts_with(&format!("{field}:"))));
        let bytes = wanted.map(|_| bytes);
        let about = AboutVariant { name: name.into(), bytes, solved, differences, cost };
        Ok(PlannedVariant { config, data, about })
    }

    /// What a study does not let a configuration say.
    fn refuse(&self, config: &RunConfig) -> Result<()> {
        let refuse = |field: &str, why: &str| Err(Error::Config(format!("{field}: {why}; remove it")));
        match config {
            RunConfig { resume: Some(_), .. } => refuse("resume", "the runs of a study begin with new weights"),
            config if config.train.max_seconds.is_some() => {
                refuse("train.max_seconds", "would end runs before they have had the budget (see budget.seconds)")
            }
            _ => Ok(()),
        }
    }

    /// How many bytes a run trains on; none if that must be measured first.
    fn bytes(&self, name: &str, cost: &cost::ModelCost) -> Result<Option<u64>> {
        match self.spec.budget.amount {
            Amount::Bytes(bytes) => Ok(Some(bytes)),
            Amount::Flops(flops) => match cost.total.flops_per_byte {
                Some(per_byte) => Ok(Some((flops / (per_byte * STEP_PER_FORWARD)).round().max(1.0) as u64)),
                None => {
                    let unknown = cost.stages.iter().find(|stage| stage.part.flops_per_byte.is_none());
                    let block = unknown.map_or("?", |stage| &stage.block_type);
                    Err(Error::Config(format!(
                        "budget.flops: the block {block:?} does not say how many FLOPs it takes (`cost`); choose \
                         budget.bytes or budget.seconds"
                    )))
                }
            },
            Amount::Seconds(_) => {
                let earlier = self.earlier.as_ref().filter(|file| file.amount == self.spec.budget.amount);
                Ok(earlier.and_then(|file| file.variants.iter().find(|v| v.name == name)?.bytes))
            }
        }
    }

    /// Runs consist of whole batches: a few large ones may be far from the budget.
    fn check_rounding(&self, wanted: u64, bytes: u64, step: Step) -> Result<()> {
        if (bytes as f64 / wanted as f64 - 1.0).abs() <= self.spec.budget.tolerance {
            return Ok(());
        }
        Err(Error::Config(format!(
            "budget: {} of training are less than whole batches of {} x {} bytes can match: {} would be trained; lower \
             train.batch_size or params.input_seq_len, or raise the budget",
            Amount::Bytes(wanted),
            step.batch,
            step.bytes,
            Amount::Bytes(bytes)
        )))
    }
}

/// The table of `mblm compare --dry-run`.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spec { name, seeds, jobs, budget, .. } = &self.spec;
        let (variants, runs) = (self.variants.len(), self.variants.len() * seeds.len());
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        writeln!(
            f,
            "{name}: {} x {} = {}, {} each, {jobs} at a time\n",
            plural(variants, "variant"),
            plural(seeds.len(), "seed"),
            plural(runs, "run"),
            budget.amount
        )?;
        let header = ["variant", "blocks", "widths", "layers", "parameters", "FLOP/byte", "bytes", "memory"];
        let mut rows = vec![header.map(String::from)];
        rows.extend(self.variants.iter().map(|variant| variant.about.cells()));
        write_table(f, &rows)?;
        let solved: Vec<_> =
            self.variants.iter().filter_map(|v| Some((&v.about.name, v.about.solved.as_ref()?))).collect();
        if !solved.is_empty() {
            writeln!(f, "\nsolved for equal parameters:")?;
            let width = solved.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
            solved.iter().try_for_each(|(name, solved)| writeln!(f, "  {name:width$}  {solved}"))?;
        }
        Ok(())
    }
}

impl AboutVariant {
    fn cells(&self) -> [String; 8] {
        let stages = &self.cost.stages;
        let join =
            |cell: &dyn Fn(&cost::Stage) -> String, by: &str| stages.iter().map(cell).collect::<Vec<_>>().join(by);
        let short = |number: f64| metric(number).trim_end().to_string();
        [
            self.name.clone(),
            join(&|stage| stage.block_type.clone(), " / "),
            join(&|stage| stage.hidden_dim.to_string(), " / "),
            join(&|stage| stage.num_layers.to_string(), " / "),
            short(self.cost.total.parameters as f64),
            self.cost.total.flops_per_byte.map_or("unknown".into(), short),
            self.bytes.map_or("measured".into(), |bytes| short(bytes as f64)),
            self.cost.peak_bytes().map_or("unknown".into(), binary),
        ]
    }
}
