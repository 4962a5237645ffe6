//! Stages that are watched: a block that builds what another block builds, and notes what goes in and out of it.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use candle_core::{Shape, Tensor};
use mblm_base::memory::Memory;
use mblm_core::backward::with_backward;
use mblm_core::block::{Cost, FieldError, PluginOrigin, StageBlock, StageDecoder, StageModel};
use mblm_core::config::MblmConfig;
use mblm_core::node::{Node, apply1, with_floats};
use mblm_core::{Mode, ParamScope, PosEmb, Result};
use serde::Serialize;

/// What was seen of a stage in training passes since it was last asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seen {
    /// Root mean square of the inputs.
    pub input: Mean,
    /// Root mean square of the outputs.
    pub output: Mean,
    /// Root mean square of the gradient of the loss with respect to the inputs.
    pub input_gradient: Mean,
    /// Root mean square of the gradient with respect to the outputs.
    pub output_gradient: Mean,
    /// Seconds in forward passes.
    pub forward_seconds: f64,
    /// Seconds in backward passes.
    pub backward_seconds: f64,
    /// Bytes by which the process grew in forward passes.
    pub memory: u64,
}

/// A root mean square that numbers are added to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    squares: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, values: &[f32]) {
        self.squares += values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
        self.count += values.len() as u64;
    }

    /// The root mean square; 0 of nothing.
    pub fn rms(self) -> f64 {
        (self.squares / self.count.max(1) as f64).sqrt()
    }
}

impl Serialize for Mean {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.rms())
    }
}

/// Where one stage writes.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Mutex<Seen>>);

impl Watch {
    /// Has every stage of `config` watched.
    pub fn every_stage(config: &mut MblmConfig) -> Vec<Watch> {
        let watches: Vec<Watch> = config.blocks.iter().map(|_| Watch::default()).collect();
        for (block, watch) in config.blocks.iter_mut().zip(&watches) {
            *block = Arc::new(WatchedBlock { inner: block.clone(), watch: watch.clone() });
        }
        watches
    }

    /// What was seen so far; begins anew.
    pub fn take(&self) -> Seen {
        std::mem::take(&mut self.seen())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[derive(Debug, Serialize)]
struct WatchedBlock {
    #[serde(skip)]
    inner: Arc<dyn StageBlock>,
    #[serde(skip)]
    watch: Watch,
}

impl StageBlock for WatchedBlock {
    fn typetag_name(&self) -> &'static str {
        self.inner.typetag_name()
    }

    fn typetag_deserialize(&self) {}

    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.inner.pos_emb_type()
    }

    fn plugin(&self) -> Option<&PluginOrigin> {
        self.inner.plugin()
    }

    fn validate(&self, dim: usize) -> Result<(), FieldError> {
        self.inner.validate(dim)
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let inner = self.inner.build(dim, num_layers, params)?;
        Ok(Box::new(WatchedModel { inner, watch: self.watch.clone() }))
    }
}

struct WatchedModel {
    inner: Box<dyn StageModel>,
    watch: Watch,
}

impl StageModel for WatchedModel {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if mode == Mode::Eval {
            return self.inner.forward(x, mask, mode);
        }
        let began = Arc::new(Mutex::new(None));
        let border = |end| Border { watch: self.watch.clone(), end, began: began.clone(), shape: x.shape().clone() };
        let x = apply1(border(End::Input), x, mode)?;
        let (start, before) = (Instant::now(), resident());
        let y = self.inner.forward(&x, mask, mode)?;
        let mut seen = self.watch.seen();
        seen.forward_seconds += start.elapsed().as_secs_f64();
        seen.memory += resident().saturating_sub(before);
        drop(seen);
        match y.dims() == x.dims() {
            true => apply1(border(End::Output), &y, mode),
            // The hierarchy says what is wrong with it.
            false => Ok(y),
        }
    }

    fn is_causal(&self) -> bool {
        self.inner.is_causal()
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        self.inner.decoder(batch)
    }

    fn decodes_on_host(&self) -> bool {
        self.inner.decodes_on_host()
    }

    fn buffers(&self) -> Vec<(&'static str, Vec<f32>)> {
        self.inner.buffers()
    }

    fn cost(&self, seq_len: usize) -> Option<Cost> {
        self.inner.cost(seq_len)
    }
}

fn resident() -> u64 {
    Memory::now().map_or(0, |memory| memory.resident)
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Input,
    Output,
}

/// The identity, before a stage and after it: backward comes to the output first, and to the input when it is through.
#[derive(Clone)]
struct Border {
    watch: Watch,
    end: End,
    /// When backward came to the output.
    began: Arc<Mutex<Option<Instant>>>,
    shape: Shape,
}

impl Node for Border {
    type Tape = ();

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        y.copy_from_slice(inputs[0]);
        self.passes(y);
        Ok(())
    }

    fn backward(&self, _: &[&[f32]], _: (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        grads[0].copy_from_slice(dy);
        self.returns(dy);
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], _: Mode) -> Result<Tensor> {
        let x = inputs[0];
        with_floats(x, |x| self.passes(x))?;
        let border = self.clone();
        with_backward(&[x], x, move |_, dy| {
            with_floats(dy, |dy| border.returns(dy))?;
            Ok(vec![dy.clone()])
        })
    }
}

impl Border {
    /// Notes what goes through.
    fn passes(&self, x: &[f32]) {
        let mut seen = self.watch.seen();
        match self.end {
            End::Input => seen.input.add(x),
            End::Output => seen.output.add(x),
        }
    }

    /// Notes the gradient that comes back.
    fn returns(&self, dy: &[f32]) {
        let mut began = self.began.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut seen = self.watch.seen();
        match self.end {
            End::Output => {
                seen.output_gradient.add(dy);
                *began = Some(Instant::now());
            }
            End::Input => {
                seen.backward_seconds += began.take().map_or(0.0, |began| began.elapsed().as_secs_f64());
                seen.input_gradient.add(dy);
            }
        }
    }
}
