//! What a model configuration is like before it is trained: a few training steps and forward passes on a little data show
//! dead and exploding gradients, activations out of scale, outputs that see later bytes, and decoders that decode
//! something else. For whoever writes a block, as a plugin or compiled in, the first thing to run.

mod checks;
mod report;
mod stage;

use std::time::Instant;

pub use checks::Check;
use checks::SAME_OUTPUTS;
use mblm_base::random::noise;
use mblm_core::device::Place;
use mblm_core::model::{Seen, Sequences};
use mblm_core::registry::block_type;
use mblm_core::{Mode, ParamStore, transfer};
pub use report::{Examination, Finding, Group, Severity, StageReport};
use report::{findings, groups};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::{Model, TrainModel};

/// The dropout seed of all steps: they are one step, repeated.
const MODE: Mode = Mode::Train { seed: 1 };

/// Builds the model of `config` with initial values from `seed` and examines it on `sequences`.
///
/// The sequences have at least two patches of the first stage, or some parameters see nothing.
///
/// # Errors
/// The model cannot be built, or a pass fails; what is merely wrong is in the report.
pub fn examine(
    config: &ModelConfig,
    masking_proba: f64,
    seed: u64,
    sequences: &Sequences,
    place: Place,
) -> Result<Examination> {
    let model = Model::of(config, masking_proba, seed, place.clone())?;
    let hierarchy = config.hierarchy();
    // The first step takes memory that later ones have; the second shows the time.
    let first = Step::run(&model, sequences)?;
    let step = Step::run(&model, sequences)?;
    let stage = |(n, seen): (usize, &Seen)| StageReport {
        stage: n + 1,
        block_type: block_type(&*hierarchy.blocks[n]),
        seq_len: hierarchy.seq_lens[n],
        hidden_dim: hierarchy.hidden_dims[n],
        num_layers: hierarchy.num_layers[n],
        seen: Seen { memory: first.seen[n].memory, ..*seen },
    };
    let (batch, bytes) = (sequences.batch(), sequences.len);
    let mut report = Examination {
        batch,
        bytes,
        parameters: model.params().num_elements(),
        loss: step.loss,
        uniform_loss: (hierarchy.num_tokens as f64).ln(),
        forward_seconds: step.forward_seconds,
        backward_seconds: step.backward_seconds,
        stages: step.seen.iter().enumerate().map(stage).collect(),
        groups: groups(model.params()),
        checks: vec![],
        findings: vec![],
    };
    let still: Vec<String> = zero_gradients(model.params());
    nudge(model.params())?;
    let dead = match still.is_empty() {
        true => vec![],
        false => {
            Step::run(&model, sequences)?;
            zero_gradients(model.params())
        }
    };
    let asleep: Vec<String> = still.into_iter().filter(|name| !dead.contains(name)).collect();
    let generates = matches!(model, Model::Generative(_));
    let tokens = bytes.div_ceil(hierarchy.seq_lens[1..].iter().product());
    // Stages are held to what they promise on the CPU, wherever the step ran.
    let here = match place.is_host() {
        true => None,
        false => Some(Model::of(config, masking_proba, seed, Place::default())?),
    };
    if let Some(here) = &here {
        nudge(here.params())?;
    }
    let stages = here.as_ref().unwrap_or(&model);
    report.checks = stage::all(hierarchy, &stages.stage_models(), stages.params(), tokens, generates)?;
    if let Model::Generative(model) = &model {
        report.checks.extend(checks::whole(model, sequences)?);
    }
    report.findings = findings(&report, &dead, &asleep, model.params());
    Ok(report)
}

/// Looks at the stages of a model that is about to be trained: a few passes over a short sequence. Returns what looks wrong.
///
/// # Errors
/// A block cannot be built or trained, or its outputs follow from something else than its parameters and its input: each
/// load would be another model.
pub fn glance(config: &ModelConfig) -> Result<Vec<Finding>> {
    let (hierarchy, generates) = (config.hierarchy(), matches!(config, ModelConfig::Generative(_)));
    let block_types: Vec<&str> = hierarchy.blocks.iter().map(|block| block_type(&**block)).collect();
    let mut findings = vec![];
    for (n, block_type) in block_types.iter().enumerate() {
        let (checks, has_params) = stage::shortly(hierarchy, n, generates)?;
        findings.extend(report::of_stage(n, block_type, has_params));
        findings.extend(report::of_checks(&checks, &block_types));
        if let Some(fault) = checks.into_iter().find(|check| check.name == SAME_OUTPUTS).and_then(|check| check.fault) {
            return Err(mblm_core::Error::Block(format!("stage {} ({block_type}): {fault}", n + 1)).into());
        }
    }
    Ok(findings)
}

/// One training step without an update: it leaves its gradients in the parameters.
struct Step {
    loss: f64,
    forward_seconds: f64,
    backward_seconds: f64,
    seen: Vec<Seen>,
}

impl Step {
    fn run(model: &Model, sequences: &Sequences) -> Result<Self> {
        model.params().zero_grad();
        let (step, seen) = model.watch_stages(|| -> Result<Step> {
            let start = Instant::now();
            let loss = model.loss(sequences, MODE)?.mean;
            let forward = start.elapsed().as_secs_f64();
            model.params().backward(&loss)?;
            Ok(Step {
                loss: transfer::to_scalar(&loss)?,
                forward_seconds: forward,
                backward_seconds: start.elapsed().as_secs_f64() - forward,
                seen: vec![],
            })
        });
        Ok(Step { seen, ..step? })
    }
}

/// The parameters without any gradient.
fn zero_gradients(store: &ParamStore) -> Vec<String> {
    let zero = |grad: &[f32]| grad.iter().all(|value| *value == 0.0);
    store.iter().filter(|param| zero(&param.grad())).map(|param| param.name().to_string()).collect()
}

/// Moves every parameter a little away from its initial value, where a zero or a one may hide what is wrong.
fn nudge(store: &ParamStore) -> Result<()> {
    for (i, param) in store.iter().enumerate() {
        let noise = noise(param.len(), i as u64);
        let largest = param.values().iter().fold(0.01f32, |max, value| max.max(value.abs()));
        param.update(|values| {
            values.iter_mut().zip(&noise).for_each(|(value, noise)| *value += 0.1 * largest * noise)
        })?;
    }
    Ok(())
}
