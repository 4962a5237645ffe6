//! Training steps on random bytes, for the commands that measure.

use anyhow::Result;
use candle_core::Device;
use mblm::base::random::noise;
use mblm::config::MblmConfig;
use mblm::model::Sequences;
use mblm::patching::Cutter;
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
    let (ids, len) = sequences(config.hierarchy(), step.batch, step.bytes)?;
    let mut step = training_step(&model, Sequences { ids: &ids, len, loss_mask: None }, optimizer);
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

/// `batch` sequences for a model, and their length. It is `len` if patches are full. Otherwise, they are made-up words of one
/// to seven letters, cut to the number of patches that `len` bytes have with full patches.
///
/// # Errors
/// A rule of patching fails.
pub fn sequences(hierarchy: &MblmConfig, batch: usize, len: usize) -> Result<(Vec<u32>, usize)> {
    match hierarchy.is_fixed() {
        true => Ok((random_bytes(batch * len, hierarchy.num_tokens), len)),
        false => fitting(hierarchy, &words(batch * len, hierarchy.num_tokens), len),
    }
}

/// The length of [`sequences`], which is known without them where all patches are full.
///
/// # Errors
/// A rule of patching fails.
pub fn length(hierarchy: &MblmConfig, batch: usize, len: usize) -> Result<usize> {
    if hierarchy.is_fixed() { Ok(len) } else { Ok(sequences(hierarchy, batch, len)?.1) }
}

/// Shortens sequences of `len` bytes to the number of patches that `len` bytes have with full patches. All get the length of
/// the shortest.
///
/// # Errors
/// A rule of patching fails.
pub fn fitting(hierarchy: &MblmConfig, ids: &[u32], len: usize) -> Result<(Vec<u32>, usize)> {
    if hierarchy.is_fixed() {
        return Ok((ids.to_vec(), len));
    }
    let patches = len.div_ceil(hierarchy.seq_lens[1..].iter().product());
    let rows = || ids.chunks_exact(len);
    let fits = rows().map(|row| Cutter::new(hierarchy).sequence_len(row, patches));
    let fits = fits.collect::<mblm::Result<Vec<usize>>>()?.into_iter().min().unwrap_or(len);
    Ok((rows().flat_map(|row| &row[..fits]).copied().collect(), fits))
}

/// Made-up words with a space behind each.
fn words(len: usize, num_tokens: usize) -> Vec<u32> {
    let mut left = 0;
    let letter = |noise: f32| {
        left -= 1;
        match left {
            -1 => {
                left = 1 + ((noise + 1.0) * 3.49) as i32;
                b' '
            }
            _ => b'a' + ((noise + 1.0) * 12.9) as u8,
        }
    };
    noise(len, 1).into_iter().map(letter).map(|byte| u32::from(byte) % num_tokens as u32).collect()
}

/// As many bytes, the same every time.
fn random_bytes(len: usize, num_tokens: usize) -> Vec<u32> {
    noise(len, 1).iter().map(|v| ((v + 1.0) * 127.9) as u32 % num_tokens as u32).collect()
}
