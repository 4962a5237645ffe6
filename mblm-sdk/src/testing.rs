//! Checks that every block should pass: fused equals composed (outputs and gradients), decoder equals forward,
//! causality. They are public so that block authors can use them in their tests.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use mblm_compute::device::{Place, composed};
use mblm_compute::error::{Error, Result};
use mblm_compute::layer::Dims;
use mblm_compute::mode::Mode;
use mblm_compute::param::{Param, ParamStore, Part};
pub use mblm_compute::testing::{Pass, assert_close, check_layer, difference, noise, perturb, run};

use crate::block::{StageBlock, StageDecoder, StageModel, by_slices};

/// Advice for a parameter without a gradient.
pub const WITHOUT_GRADIENT: &str = "use it in `forward`, or do not create it; no operation between it and the output may cut \
                                    the gradient: `detach` does, and so do candle_nn's LayerNorm, RmsNorm, \
                                    softmax_last_dim and rope, which have counterparts of the same name in mblm_sdk::nn";

/// A fault of a stage model, with advice.
pub const OTHER_OUTPUT_AGAIN: &str = "the same input gives another output after other calls; look for random numbers in \
                                      evaluation, for state that is kept between calls, and for anything that `forward` \
                                      reads beside its parameters and its input";

/// A fault of a stage model, with advice.
pub const OTHER_OUTPUT_REBUILT: &str = "built again, with the same parameters, it gives another output; look for weights of \
                                        its own, such as a candle `VarMap`, which are not saved: create every weight as a \
                                        parameter (`ParamScope` in Rust, `param` in C)";

/// A fault of a stage model, with advice.
pub const OTHER_OUTPUT_IN_TRAINING: &str = "the same input and the same dropout seed give another output in training; \
                                            candle_nn's Dropout draws without a seed: use mblm_sdk::nn::Dropout, or \
                                            `mode.dropout`";

/// Panics unless every parameter of `model` gets a finite, non-zero gradient.
pub fn check_gradients(model: &dyn StageModel, store: &ParamStore, dims: Dims) {
    mblm_compute::buffer::poison_buffers();
    let params: Vec<_> = store.iter().cloned().collect();
    let Pass { dx, grads, .. } =
        run(&params, store, dims, DType::F32, |x| model.forward(x, None, Mode::train(1))).expect("a training pass");
    assert!(dx.iter().any(|g| *g != 0.0), "the input gets no gradient");
    for (param, grad) in params.iter().zip(grads) {
        assert!(!grad.is_empty() && grad.iter().all(|g| g.is_finite()), "{}: not finite", param.name());
        assert!(grad.iter().any(|g| *g != 0.0), "{}: the gradient is zero", param.name());
    }
}

/// Panics unless the decoder gives the same outputs as `forward`, position by position, also after a reset; and the decoder
/// by tensors too.
pub fn check_decoder(model: &dyn StageModel, dims: Dims, tolerance: f32) {
    mblm_compute::buffer::poison_buffers();
    if let Err(fault) = decoder_equals_forward(model, dims, tolerance) {
        panic!("{fault}");
    }
    let by_tensors = composed(|| {
        let decoder = model.tensor_decoder(dims.batch).map_err(words)?;
        holds(model, by_slices(decoder, dims.batch, Place::default()), dims, tolerance)
    });
    if let Err(fault) = by_tensors {
        panic!("by tensors, {fault}");
    }
}

/// Checks that the decoder gives the same outputs as `forward`, with prefill and with steps, also after a reset.
///
/// # Errors
/// The outputs differ (the error says where), or a call failed.
pub fn decoder_equals_forward(model: &dyn StageModel, dims: Dims, tolerance: f32) -> Result<(), String> {
    holds(model, model.decoder(dims.batch).map_err(words)?, dims, tolerance)
}

/// Holds a decoder against `forward`.
fn holds(
    model: &dyn StageModel,
    mut decoder: Box<dyn StageDecoder + '_>,
    dims: Dims,
    tolerance: f32,
) -> Result<(), String> {
    let Dims { batch, seq, dim } = dims;
    let row = batch * dim;
    let input = Tensor::from_vec(noise(dims.len(), 21), (batch, seq, dim), &Device::Cpu).map_err(words)?;
    let want = by_position(&model.forward(&input, None, Mode::Eval).map_err(words)?).map_err(words)?;
    let steps = by_position(&input).map_err(words)?;
    // Round n: n single steps, then many positions at once, then single steps again.
    for (round, name) in ["", ", after a reset", ", after a second reset"].into_iter().enumerate() {
        let begin = round.min(seq);
        let end = begin.max(seq / 2);
        let mut got = vec![f32::NAN; dims.len()];
        for i in (0..begin).chain(end..seq) {
            if i == end {
                let many = begin * row..end * row;
                decoder.prefill(&steps[many.clone()], &mut got[many], end - begin).map_err(words)?;
            }
            decoder.step(&steps[i * row..][..row], &mut got[i * row..][..row]).map_err(words)?;
        }
        for (at, (got, want)) in got.chunks_exact(row).zip(want.chunks_exact(row)).enumerate() {
            if let Some(difference) = difference(got, want, tolerance) {
                return Err(format!("the decoder at position {at}{name}: {difference}"));
            }
        }
        decoder.reset();
    }
    Ok(())
}

/// `(batch, seq, dim)` as `(seq, batch, dim)`.
fn by_position(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.transpose(0, 1)?.flatten_all()?.to_vec1::<f32>()?)
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Panics if an output depends on a later input.
pub fn check_causality(model: &dyn StageModel, dims: Dims) {
    if let Err(fault) = is_causal(model, dims, &(0..dims.seq).collect::<Vec<_>>()) {
        panic!("{fault}");
    }
}

/// Checks that changing the input at each of `positions` changes no earlier output, and does change the output there.
///
/// # Errors
/// An output that should not have changed, or a call that failed.
pub fn is_causal(model: &dyn StageModel, dims: Dims, positions: &[usize]) -> Result<(), String> {
    let Dims { batch, seq, dim } = dims;
    let forward = |x: &[f32]| {
        let x = Tensor::from_slice(x, (batch, seq, dim), &Device::Cpu)?;
        Ok::<_, mblm_compute::Error>(model.forward(&x, None, Mode::Eval)?.flatten_all()?.to_vec1::<f32>()?)
    };
    let x = noise(dims.len(), 31);
    let before = forward(&x).map_err(words)?;
    for &t in positions {
        let mut changed = x.clone();
        changed[t * dim..(t + 1) * dim].iter_mut().for_each(|value| *value += 1.0);
        let after = forward(&changed).map_err(words)?;
        let rows = after.chunks_exact(dim).zip(before.chunks_exact(dim)).take(t);
        // Matrix products may round differently by a little; a leak moves outputs by far more.
        let leak = rows
            .map(|(after, before)| difference(after, before, 1e-5))
            .enumerate()
            .find_map(|(at, found)| Some((at, found?)));
        if let Some((at, difference)) = leak {
            return Err(format!("a change of position {t} shows at position {at}: {difference}"));
        }
        if after[t * dim..(t + 1) * dim] == before[t * dim..(t + 1) * dim] {
            return Err(format!("position {t} ignores its input"));
        }
    }
    Ok(())
}

/// Builds the model of a single stage.
///
/// # Errors
/// The block cannot be built at this width.
pub fn build_alone(
    block: &dyn StageBlock,
    stage: usize,
    dim: usize,
    num_layers: usize,
    seed: u64,
) -> Result<(ParamStore, Box<dyn StageModel>)> {
    let mut store = ParamStore::new(seed);
    let model =
        block.build(dim, num_layers, &mut store.root().sub("stage_models").sub(stage).of(Part::Stage(stage)))?;
    Ok((store, model))
}

/// Two outputs that should have been equal.
#[derive(Clone, Debug, PartialEq)]
pub struct Variation {
    /// What was done, what differs, and where to look.
    pub what: String,
    /// Whether evaluation gives different numbers. If not, training draws different random numbers, or sums are rounded
    /// in a different order.
    pub changes_results: bool,
}

/// The tolerance for sums in a different order, relative to the largest output.
const ROUNDING: f32 = 1e-4;

/// Checks that the outputs of `model` depend only on its parameters and its input. Compares them bit for bit after
/// other calls, and with those of `rebuilt`: the same block, built again with other initial values, which then gets the
/// values of `params`. In training, the same dropout seed must give the same outputs.
///
/// # Errors
/// A forward pass fails, or `rebuilt` has different parameters.
pub fn variation(
    model: &dyn StageModel,
    params: &[Arc<Param>],
    rebuilt: (&dyn StageModel, &ParamStore),
    dims: Dims,
) -> Result<Option<Variation>> {
    let forward = |model: &dyn StageModel, batch: usize, seed: u64, mode: Mode| {
        let shape = (batch, dims.seq, dims.dim);
        let x = Tensor::from_vec(noise(batch * dims.seq * dims.dim, seed), shape, &Device::Cpu)?;
        Ok::<_, Error>(model.forward(&x, None, mode)?.flatten_all()?.to_vec1::<f32>()?)
    };
    let (rebuilt, store) = rebuilt;
    let want = forward(model, dims.batch, 41, Mode::Eval)?;
    let trained = forward(model, dims.batch, 41, Mode::train(1))?;
    // Other inputs, and other values before, show what is kept.
    forward(model, 1, 42, Mode::Eval)?;
    store.iter().try_for_each(|param| param.update(|values| values.iter_mut().for_each(|value| *value += 0.25)))?;
    forward(rebuilt, 1, 42, Mode::Eval)?;
    copy_values(params, store)?;
    let pairs = [
        (OTHER_OUTPUT_AGAIN, forward(model, dims.batch, 41, Mode::Eval)?, &want),
        (OTHER_OUTPUT_REBUILT, forward(rebuilt, dims.batch, 41, Mode::Eval)?, &want),
        (OTHER_OUTPUT_IN_TRAINING, forward(model, dims.batch, 41, Mode::train(1))?, &trained),
    ];
    let found = pairs.into_iter().filter_map(|(what, got, want)| {
        let first = difference(&got, want, 0.0)?;
        let changes_results = what != OTHER_OUTPUT_IN_TRAINING && difference(&got, want, ROUNDING).is_some();
        Some(Variation { what: format!("{what} ({first})"), changes_results })
    });
    // The first of the worst kind.
    Ok(found.min_by_key(|variation| !variation.changes_results))
}

/// Copies values into the parameters of `store`, by name.
fn copy_values(from: &[Arc<Param>], store: &ParamStore) -> Result<()> {
    let names = |param: &Arc<Param>| (param.name().to_string(), param.shape().to_vec());
    if !from.iter().map(names).eq(store.iter().map(names)) {
        return Err(Error::Block("built again, it has other parameters".into()));
    }
    from.iter().zip(store.iter()).try_for_each(|(from, to)| {
        let values = from.values().to_vec();
        to.update(|slot| slot.copy_from_slice(&values))
    })
}

/// Checks that each sequence of a batch gives the same outputs as when it runs alone.
///
/// # Errors
/// The outputs differ (the error says where), or a call failed.
pub fn is_independent(model: &dyn StageModel, dims: Dims) -> Result<(), String> {
    let forward = |x: &[f32], batch: usize| {
        let x = Tensor::from_slice(x, (batch, dims.seq, dims.dim), &Device::Cpu)?;
        Ok::<_, Error>(model.forward(&x, None, Mode::Eval)?.flatten_all()?.to_vec1::<f32>()?)
    };
    let (x, row) = (noise(dims.len(), 51), dims.seq * dims.dim);
    let together = forward(&x, dims.batch).map_err(words)?;
    for (x, together) in x.chunks_exact(row).zip(together.chunks_exact(row)) {
        let alone = forward(x, 1).map_err(words)?;
        if let Some(difference) = difference(together, &alone, ROUNDING) {
            return Err(format!(
                "a sequence gives a different result beside another sequence than alone: {difference}"
            ));
        }
    }
    Ok(())
}
