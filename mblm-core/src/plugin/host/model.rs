//! A plugin's instance as a stage model: one node of candle's graph, and a decoder.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

use super::instance::{Instance, ParamValues, Pass, State, Tape};
use mblm_sdk::abi;
use mblm_sdk::block::{Cost, StageDecoder, StageModel, replay};
use mblm_sdk::error::{Error, Result};
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{floats, with_floats};
use mblm_sdk::param::{Param, Values};
use mblm_sdk::simd::vectorize;

/// The model of a stage that a plugin runs. Its parameters are the host's.
pub(super) struct PluginModel {
    instance: Arc<Instance>,
    params: Arc<Vec<Arc<Param>>>,
}

impl PluginModel {
    pub(super) fn new(instance: Arc<Instance>, params: Vec<Arc<Param>>) -> Self {
        PluginModel { instance, params: Arc::new(params) }
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
        if x.dtype() != DType::F32 || !matches!(x.device(), Device::Cpu) {
            return Err(Error::Block(format!("{name}: plugins compute in f32 on the CPU, found {:?}", x.dtype())));
        }
        if mask.is_some() && !self.instance.can(abi::MASK) {
            return Err(Error::Block(format!("{name}: it takes no attention mask, so it cannot run in an encoder")));
        }
        let mask = mask.map(|mask| mask.flatten_all()?.to_vec1::<u8>()).transpose()?;
        let op = PluginOp {
            instance: self.instance.clone(),
            params: self.params.clone(),
            dims: Dims { batch, seq, dim },
            mask,
            mode,
            tape: Mutex::new(None),
        };
        let x = x.contiguous()?;
        Ok(match mode {
            Mode::Train { .. } => x.apply_op1(op)?,
            Mode::Eval => x.apply_op1_no_bwd(&op)?,
        })
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

    fn cost(&self, seq_len: usize) -> Option<Cost> {
        self.instance.cost(seq_len)
    }
}

/// One pass through the plugin.
struct PluginOp {
    instance: Arc<Instance>,
    params: Arc<Vec<Arc<Param>>>,
    dims: Dims,
    mask: Option<Vec<u8>>,
    mode: Mode,
    tape: Mutex<Option<Tape>>,
}

impl PluginOp {
    fn pass(&self) -> Pass<'_> {
        Pass { dims: self.dims, mask: self.mask.as_deref(), mode: self.mode }
    }

    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut y = vec![0.0; x.len()];
        let keep = self.mode != Mode::Eval;
        let tape = with_values(&self.params, |values| self.instance.forward(values, &self.pass(), x, &mut y, keep))?;
        self.blame("forward", x, &y)?;
        *self.tape.lock().unwrap_or_else(PoisonError::into_inner) = tape;
        Ok(y)
    }

    fn backward(&self, x: &[f32], dy: &[f32]) -> Result<Vec<f32>> {
        let tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut tape) = tape else {
            return Err(Error::Block(format!("{}: backward runs once per forward", self.instance.name())));
        };
        let mut dx = vec![0.0; x.len()];
        let mut guards: Vec<_> = self.params.iter().map(|param| param.grad_mut()).collect();
        let mut grads: Vec<&mut [f32]> = guards.iter_mut().map(|guard| &mut guard[..]).collect();
        with_values(&self.params, |values| {
            self.instance.backward(values, &self.pass(), &mut tape, x, dy, &mut dx, &mut grads)
        })?;
        self.blame("backward", dy, &dx)?;
        Ok(dx)
    }

    fn blame(&self, what: &str, input: &[f32], output: &[f32]) -> Result<()> {
        let Dims { seq, dim, .. } = self.dims;
        blame(&self.instance, &self.params, what, [input, output], dim, |row| (row / seq, row % seq))
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

impl CustomOp1 for PluginOp {
    fn name(&self) -> &'static str {
        "plugin"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = self.forward(floats(storage, layout)?)?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = with_floats(x, |x| with_floats(dy, |dy| self.backward(x, dy)))???;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
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
