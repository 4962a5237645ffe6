//! A plugin's instance as a stage model: one node of candle's graph, and a decoder.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Shape, Tensor};
use mblm_sdk::abi;
use mblm_sdk::block::{Cost, StageDecoder, StageModel, TensorDecoder, by_tensors, replay};
use mblm_sdk::device;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1};
use mblm_sdk::param::{Param, Values};
use mblm_sdk::simd::vectorize;
use mblm_sdk::transfer;

use super::instance::{Instance, ParamValues, Pass, State, Tape};

/// The model of a stage that a plugin runs. Its parameters are the host's.
pub(super) struct PluginModel {
    instance: Arc<Instance>,
    params: Arc<Vec<Arc<Param>>>,
    has_warned: AtomicBool,
}

impl PluginModel {
    pub(super) fn new(instance: Arc<Instance>, params: Vec<Arc<Param>>) -> Self {
        PluginModel { instance, params: Arc::new(params), has_warned: AtomicBool::new(false) }
    }

    /// Says once what it costs that a plugin computes on the CPU while its model lies elsewhere.
    fn warn_of_copies(&self, x: &Tensor, mode: Mode) {
        if x.device().is_cpu() || mode == Mode::Eval || self.has_warned.swap(true, Ordering::Relaxed) {
            return;
        }
        let megabytes = 4.0 * (x.elem_count() * size_of::<f32>()) as f64 / 1e6;
        tracing::warn!(
            "{}: a plugin computes on the CPU, so each training step copies {megabytes:.1} MB from {} and back and waits \
             for it; compile the block in to run it there",
            self.instance.name(),
            device::name(x.device())
        );
    }
}

/// Lends the values of all parameters.
fn with_values<R>(params: &[Arc<Param>], work: impl FnOnce(ParamValues) -> R) -> R {
    let guards: Vec<Values> = params.iter().map(|param| param.values()).collect();
    let values: Vec<&[f32]> = guards.iter().map(|guard| &**guard).collect();
    // Every version only grows, so their sum is another one whenever one of them is.
    let version = params.iter().map(|param| param.version()).sum();
    work(ParamValues { values: &values, version })
}

impl StageModel for PluginModel {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        let name = self.instance.name();
        if mask.is_some() && !self.instance.can(abi::MASK) {
            return Err(Error::Block(format!(
                "{name}: it does not accept an attention mask, so it cannot run in an encoder"
            )));
        }
        let mask = mask.map(transfer::to_vec::<u8>).transpose()?;
        let (instance, params, dims) = (self.instance.clone(), self.params.clone(), Dims { batch, seq, dim });
        self.warn_of_copies(x, mode);
        let here = transfer::to_host(x)?;
        let pass = PluginPass { instance, params, dims, mask, mode };
        let y = device::fused(|| apply1(pass, &here, mode))?;
        Ok(transfer::to_device(&y, x.device())?.to_dtype(x.dtype())?)
    }

    fn is_causal(&self) -> bool {
        self.instance.is_causal()
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        if !self.instance.can(abi::STEP) {
            return Ok(replay(self, batch));
        }
        let state = with_values(&self.params, |values| self.instance.state(values, batch))?;
        Ok(Box::new(PluginDecoder { model: self, state, batch, position: 0, failed_reset: None }))
    }

    fn tensor_decoder(&self, batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
        Ok(by_tensors(self.decoder(batch)?))
    }

    fn cost(&self, seq_len: usize) -> Option<Cost> {
        self.instance.cost(seq_len)
    }
}

/// One pass through the plugin.
struct PluginPass {
    instance: Arc<Instance>,
    params: Arc<Vec<Arc<Param>>>,
    dims: Dims,
    mask: Option<Vec<u8>>,
    mode: Mode,
}

impl PluginPass {
    fn pass(&self) -> Pass<'_> {
        Pass { dims: self.dims, mask: self.mask.as_deref(), mode: self.mode }
    }

    fn blame(&self, what: &str, input: &[f32], output: &[f32]) -> Result<()> {
        let Dims { seq, dim, .. } = self.dims;
        blame(&self.instance, &self.params, what, [input, output], dim, |row| (row / seq, row % seq))
    }
}

impl Node for PluginPass {
    /// None in evaluation.
    type Tape = Option<Tape>;

    fn shape(&self) -> Shape {
        (self.dims.batch, self.dims.seq, self.dims.dim).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<Option<Tape>> {
        let keep = self.mode != Mode::Eval;
        let run = |values: ParamValues| self.instance.forward(values, &self.pass(), inputs[0], y, keep);
        let tape = with_values(&self.params, run)?;
        self.blame("forward", inputs[0], y)?;
        Ok(tape)
    }

    fn backward(&self, inputs: &[&[f32]], tape: Option<Tape>, dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let Some(mut tape) = tape else { return Ok(()) };
        let mut guards: Vec<_> = self.params.iter().map(|param| param.grad_mut()).collect();
        let mut dparams: Vec<&mut [f32]> = guards.iter_mut().map(|guard| &mut guard[..]).collect();
        with_values(&self.params, |values| {
            self.instance.backward(values, &self.pass(), &mut tape, inputs[0], dy, &mut grads[0], &mut dparams)
        })?;
        self.blame("backward", dy, &grads[0])
    }
}

/// An output that is not finite, from an input that is and parameters that are, is the plugin's doing. `place` gives
/// sequence and position of a row of `dim` channels.
fn blame(
    instance: &Instance,
    params: &[Arc<Param>],
    what: &str,
    [input, output]: [&[f32]; 2],
    dim: usize,
    place: impl Fn(usize) -> (usize, usize),
) -> Result<()> {
    let params_are_finite = || with_values(params, |values| values.values.iter().all(|v| all_finite(v)));
    if all_finite(output) || !all_finite(input) || !params_are_finite() {
        return Ok(());
    }
    let at = output.iter().position(|value| !value.is_finite()).unwrap_or_default();
    let (sequence, position) = place(at / dim);
    Err(Error::Block(format!(
        "{}: {what} gave {} at sequence {sequence}, position {position}, channel {}, from finite inputs",
        instance.name(),
        output[at],
        at % dim
    )))
}

fn all_finite(values: &[f32]) -> bool {
    vectorize(
        #[inline(always)]
        || {
            let mut lanes = [0.0f32; 16];
            let (chunks, rest) = values.as_chunks::<16>();
            for chunk in chunks {
                for (lane, value) in lanes.iter_mut().zip(chunk) {
                    *lane += value * 0.0; // 0, or NaN if the value is not finite
                }
            }
            lanes.iter().chain(rest).all(|value| value.is_finite())
        },
    )
}

struct PluginDecoder<'m> {
    model: &'m PluginModel,
    state: State,
    batch: usize,
    /// Of the next step.
    position: usize,
    /// A reset cannot fail, so the next step does.
    failed_reset: Option<Error>,
}

impl StageDecoder for PluginDecoder<'_> {
    fn reset(&mut self) {
        self.position = 0;
        self.failed_reset = self.state.reset().err();
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        if let Some(error) = self.failed_reset.take() {
            return Err(error);
        }
        with_values(&self.model.params, |values| self.state.step(values, x, y))?;
        self.advance(x, y, 1)
    }

    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        if let Some(error) = self.failed_reset.take() {
            return Err(error);
        }
        with_values(&self.model.params, |values| self.state.prefill(values, x, y, seq))?;
        self.advance(x, y, seq)
    }
}

impl PluginDecoder<'_> {
    /// Checks the outputs of `seq` positions, `(seq, batch, dim)`, and counts them.
    fn advance(&mut self, x: &[f32], y: &[f32], seq: usize) -> Result<()> {
        let PluginDecoder { model, batch, position, .. } = self;
        let place = |row: usize| (row % *batch, *position + row / *batch);
        let dim = y.len() / (seq * *batch).max(1);
        blame(&model.instance, &model.params, "decoding", [x, y], dim.max(1), place)?;
        self.position += seq;
        Ok(())
    }
}
