//! What a study will do: every variant with its configuration, checked and brought to the budget, before anything runs.

mod earlier;
mod solve;
mod table;
mod tuning;

use std::path::{Path, PathBuf};

use mblm_base::memory::Memory;
use mblm_core::registry::BlockRegistry;
use mblm_data::Fingerprint;
use mblm_train::config::{RunConfig, TargetStrategy};
use mblm_train::cost::{self, STEP_PER_FORWARD, Step, bytes as binary};
use mblm_train::error::{Error, Result};
use mblm_train::journal::folder::RunFolder;
use mblm_train::model::{Model, TrainModel};
use mblm_train::patches::PatchLengths;
use mblm_train::processes::Solo;
use mblm_train::session::open_data;
use mblm_train::trainer::Trainer;
use mblm_yaml::Document;
use rayon::prelude::*;

use self::solve::{num_parameters, solve};
use crate::course::PlannedRun;
use crate::design::budget::{Amount, Parameters};
use crate::design::scale::compact;
use crate::design::{Spec, slug};
use crate::folder::{AboutVariant, Cell, PlanFile, run_folder};

/// Fields that the study sets, so that they do not count as differences between variants.
const DECIDED: [&str; 5] =
    ["train.seed", "train.target_elements", "train.target_elements_strategy", "io.name_model", "io.output_dir"];

/// A study, checked.
pub struct Plan<'a> {
    /// What the YAML says.
    pub spec: Spec,
    /// In the order of the YAML; in a scaling study each variant in every size for every budget.
    pub variants: Vec<PlannedVariant>,
    registry: &'a BlockRegistry,
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

impl<'a> Plan<'a> {
    /// Checks a study and solves for what is to be equal.
    ///
    /// # Errors
    /// Everything that cannot be trained, of all variants at once.
    pub fn new(spec: Spec, registry: &'a BlockRegistry) -> Result<Self> {
        check_folder(&spec.output_dir)?;
        if let (Some(_), Amount::Seconds(_)) = (&spec.launcher, spec.budget.amount) {
            return Err(Error::Config(
                "budget.seconds: the speed is measured on this machine, but --launcher trains on others; give a budget \
                 of bytes or flops"
                    .into(),
            ));
        }
        let base = RunConfig::from_document(&spec.base, registry)
            .map_err(|error| Error::Config(format!("the base cannot be trained: {error}")))?;
        let target = match &spec.budget.parameters {
            _ if spec.scale.is_some() => None,
            Some(Parameters { number: Some(number), .. }) => Some(*number),
            Some(Parameters { number: None, .. }) => Some(num_parameters(&base)?),
            None => None,
        };
        let earlier = PlanFile::read(&spec.output_dir).ok();
        let planner = Planner { spec: &spec, registry, base: &base, target, earlier };
        let cells = cells(&spec);
        let results: Vec<Result<PlannedVariant>> =
            cells.par_iter().map(|(name, document, cell)| planner.variant(name, document, cell.clone())).collect();
        let mut variants = Vec::new();
        let mut wrong = Vec::new();
        for (result, (name, ..)) in results.into_iter().zip(&cells) {
            match result {
                Ok(variant) => variants.push(variant),
                Err(error) => wrong.push(format!("variant {name:?}: {error}")),
            }
        }
        wrong.extend(same_size(&variants));
        match wrong.len() {
            0 => Ok(Plan { spec, variants, registry }),
            1 => Err(Error::Config(wrong.remove(0))),
            n => Err(Error::Config(format!(
                "{n} of {} variants cannot be trained:\n  {}",
                cells.len(),
                wrong.join("\n  ")
            ))),
        }
    }

    /// The study's folder.
    pub fn folder(&self) -> &Path {
        &self.spec.output_dir
    }

    /// The folder of a run.
    pub fn run_folder(&self, run: &PlannedRun) -> PathBuf {
        run_folder(self.folder(), &run.name)
    }

    /// The configuration of a run.
    ///
    /// # Errors
    /// A tuned field does not accept its value.
    pub fn config(&self, run: &PlannedRun) -> Result<RunConfig> {
        let variant = &self.variants[run.variant];
        let mut config = tuning::with_values(&variant.config, &run.values, self.registry)?;
        config.train.seed = run.seed;
        config.train.target_elements = match (variant.about.bytes.unwrap_or(1), run.share) {
            (bytes, 1.0) => bytes,
            (bytes, share) => {
                let step = step_bytes(&config);
                ((bytes as f64 * share / step as f64).round() as u64).max(1) * step
            }
        };
        Ok(config)
    }

    /// What `study.json` has of this plan.
    pub(crate) fn file(&self) -> PlanFile {
        PlanFile {
            name: self.spec.name.clone(),
            description: self.spec.description.clone(),
            amount: self.spec.budget.amount,
            equal_parameters: self.spec.budget.parameters.is_some(),
            seeds: self.spec.seeds.clone(),
            tune: self.spec.tune.clone(),
            scale: self.spec.scale.clone(),
            jobs: self.spec.jobs,
            variants: self.variants.iter().map(|variant| variant.about.clone()).collect(),
        }
    }

    /// Writes `study.json`.
    pub fn write(&self) -> Result<()> {
        self.file().write(self.folder())
    }

    /// A warning if variants cut patches by different rules, and so would validate on different bytes and not be ranked together.
    pub fn patching_warning(&self) -> Option<String> {
        let cut = |variant: &PlannedVariant| {
            let hierarchy = variant.config.params.model.hierarchy();
            let rules = hierarchy.patching.iter().map(|rule| serde_json::to_string(&**rule).unwrap_or_default());
            let lens = if hierarchy.is_fixed() { vec![] } else { hierarchy.seq_lens.clone() };
            (rules.collect::<Vec<_>>(), lens)
        };
        let limited = self.variants.iter().any(|variant| variant.config.train.max_eval_steps.is_some());
        let differ = self.variants.windows(2).any(|pair| cut(&pair[0]) != cut(&pair[1]));
        (limited && differ).then(|| {
            "warning: train.max_eval_steps counts batches, which other patches fill with other bytes: variants with different \
             patching will not be ranked together; set it to null"
                .into()
        })
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

/// Bytes of a gradient step.
pub(crate) fn step_bytes(config: &RunConfig) -> u64 {
    (config.train.batch_size * config.params.input_seq_len * config.train.gradient_accumulate_every) as u64
}

/// An error if two sizes of a scaling study give the same model.
fn same_size(variants: &[PlannedVariant]) -> Option<String> {
    let of = |variant: &PlannedVariant| {
        let cell = variant.about.cell.as_ref()?;
        Some((cell.variant.clone(), variant.about.cost.total.parameters, cell.size))
    };
    let all: Vec<_> = variants.iter().filter_map(of).collect();
    let twice = all.iter().find_map(|a| Some((a, all.iter().find(|b| (&a.0, a.1) == (&b.0, b.1) && a.2 != b.2)?)));
    twice.map(|((variant, parameters, one), (.., other))| {
        format!(
            "scale.sizes: {} and {} give the same model of {parameters} parameters for the variant {variant:?}, since \
             widths change in steps; choose sizes that are farther apart",
            compact(*one as f64),
            compact(*other as f64)
        )
    })
}

/// The variants; in a scaling study, each one in every size and for every budget.
fn cells(spec: &Spec) -> Vec<(String, &Document, Option<Cell>)> {
    let Some(scale) = &spec.scale else {
        return spec.variants.iter().map(|(name, document)| (name.clone(), document, None)).collect();
    };
    let mut cells = Vec::new();
    for (variant, document) in &spec.variants {
        for &size in &scale.sizes {
            for &flops in &scale.budgets {
                let name = format!("{variant}, {}, {}FLOP", compact(size as f64), compact(flops));
                cells.push((name, document, Some(Cell { variant: variant.clone(), size, flops })));
            }
        }
    }
    cells
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
    fn variant(&self, name: &str, document: &Document, cell: Option<Cell>) -> Result<PlannedVariant> {
        let mut config =
            RunConfig::from_document(document, self.registry).map_err(|error| Error::Config(error.to_string()))?;
        self.refuse(&config).map_err(|error| error.located(document))?;
        // What devices other machines have is not known here.
        if self.spec.launcher.is_none() {
            config.train.place().map_err(|error| Error::from(error).located(document))?;
        }
        let tolerance = self.spec.budget.tolerance;
        let solved = match (&cell, &self.spec.scale, &self.spec.budget.parameters, self.target) {
            (Some(cell), Some(scale), ..) => Some(solve::to_size(&mut config, cell.size, scale.deepens, tolerance)?),
            (_, _, Some(parameters), Some(target)) => Some(solve(&mut config, parameters, target, tolerance)?),
            _ => None,
        };
        config.io.name_model = slug(name);
        config.io.output_dir = self.spec.output_dir.join("runs");
        config.train.target_elements_strategy = TargetStrategy::Sequence;
        config.train.seed = self.spec.seeds.first()[0];
        let model = Model::new(&config, 0)?;
        let step = Step { batch: config.train.batch_size, bytes: config.params.input_seq_len };
        let splits = open_data(&config).map_err(|error| error.located(document))?;
        let hierarchy = config.params.model.hierarchy();
        let patches = PatchLengths::measure(hierarchy, &*splits.train, step.bytes);
        let patches = patches.map_err(|error| error.located(document))?;
        let cost =
            cost::ModelCost::with_patches(hierarchy, model.params(), &model.stage_models(), step, patches.as_ref());
        let amount = cell.as_ref().map_or(self.spec.budget.amount, |cell| Amount::Flops(cell.flops));
        let wanted = self.bytes(name, amount, &cost)?;
        config.train.target_elements = wanted.unwrap_or(step_bytes(&config));
        // Everything else that a run checks before it begins.
        let data = splits.fingerprint.clone();
        let trainer = Trainer::new(&model, splits, &config, &Solo).map_err(|error| error.located(document))?;
        let bytes = trainer.plan().batches * trainer.bytes_per_batch();
        if let Some(wanted) = wanted {
            self.check_rounding(wanted, bytes, Step { bytes: trainer.sequence_bytes(), ..step })?;
        }
        let mut differences = self.base.differences(&config)?;
        differences.retain(|line| !DECIDED.iter().any(|field| line.starts_with(&format!("{field}:"))));
        let bytes = wanted.map(|_| bytes);
        let tuned_from = match &self.spec.tune {
            None => vec![],
            Some(tune) => tuning::base_values(tune, &config, self.registry, &self.spec.document)?,
        };
        let about = AboutVariant { name: name.into(), cell, tuned_from, bytes, solved, differences, cost };
        Ok(PlannedVariant { config, data, about })
    }

    /// What a study does not let a configuration say.
    fn refuse(&self, config: &RunConfig) -> Result<()> {
        let refuse = |field: &str, why: &str| Err(Error::Config(format!("{field}: {why}; remove it")));
        match config {
            RunConfig { resume: Some(_), .. } => refuse("resume", "the runs of a study begin with new weights"),
            config if config.train.max_seconds.is_some() => {
                refuse("train.max_seconds", "would end runs before they have used the budget (see budget.seconds)")
            }
            _ => Ok(()),
        }
    }

    /// How many bytes a run trains on; none if that must be measured first.
    fn bytes(&self, name: &str, amount: Amount, cost: &cost::ModelCost) -> Result<Option<u64>> {
        match amount {
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
                let earlier = self.earlier.as_ref().filter(|file| file.amount == amount);
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
            "budget: {} of training cannot be matched with whole batches of {} x {} bytes: {} would be trained; lower \
             train.batch_size or params.input_seq_len, or raise the budget",
            Amount::Bytes(wanted),
            step.batch,
            step.bytes,
            Amount::Bytes(bytes)
        )))
    }
}
