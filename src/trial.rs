//! Training steps on random bytes, for the commands that measure.

use anyhow::Result;
use candle_core::Device;
use mblm::base::random::noise;
use mblm::model::Sequences;
use mblm::train::config::{ModelConfig, OptimizerKind};
use mblm::train::cost::Step;
use mblm::train::model::{Model, TrainModel};
use mblm::train::trainer::optimizer::{Optimizer, clip_grad_norm};
use mblm::{Mode, device};

/// The share of bytes that an encoder restores, as in BERT.
pub const MASKING_PROBA: f64 = 0.15;

/// The most bytes that tensors have on `device` in two steps of training on random bytes; none if the device does not tell.
///
/// # Errors
/// The model or a step does not fit the device.
pub fn step_memory(config: &ModelConfig, step: Step, optimizer: OptimizerKind, device: Device) -> Result<Option<u64>> {
    let model = Model::of(config, MASKING_PROBA, 0, device.clone().into())?;
    let ids = random_bytes(step.batch * step.bytes, num_tokens(&model));
    let mut step = training_step(&model, Sequences { ids: &ids, len: step.bytes, loss_mask: None }, optimizer);
    // The second step has moments from the start.
    step().and_then(|()| step())?;
    Ok(device::peak(&device))
}

/// One step as the package takes it, but with any optimizer: forward, backward, clip to norm 1, update.
pub fn training_step<'a>(
    model: &'a Model,
    sequences: Sequences<'a>,
    optimizer: OptimizerKind,
) -> impl FnMut() -> Result<()> + use<'a> {
    let mut optimizer = Optimizer::new(model.params(), optimizer);
    let mut step = 0;
    move || {
        step += 1;
        let loss = model.loss(&sequences, Mode::train(step))?.mean;
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        Ok(optimizer.step(model.params(), 1e-3)?)
    }
}

/// As many bytes, the same every time.
pub fn random_bytes(len: usize, num_tokens: usize) -> Vec<u32> {
    noise(len, 1).iter().map(|v| ((v + 1.0) * 127.9) as u32 % num_tokens as u32).collect()
}

/// The size of the vocabulary.
pub fn num_tokens(model: &Model) -> usize {
    match model {
        Model::Generative(model) => model.config().num_tokens,
        Model::Masked(model) => model.encoder().config().mblm_config.num_tokens,
    }
}
