//! A stage's model inside a plugin: the host's parameters mirrored, its buffers as tensors.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor, Var};
use mblm_compute::backward::backward_from;
use mblm_compute::layer::Dims;
use mblm_compute::mode::Mode;
use mblm_compute::node::with_floats;
use mblm_compute::param::{Param, ParamStore, fold_gradients};
use rayon::prelude::*;
use serde_json::Value;

use super::Failure;
use crate::abi;
use crate::block::{StageBlock, StageDecoder, StageModel};
use crate::registration::Registration;

/// Floats that one thread copies.
const COPIED_AT_ONCE: usize = 1 << 16;

/// Reads and checks a block's configuration.
pub(super) fn parse(block: &Registration, config: &[u8], dim: usize) -> Result<Box<dyn StageBlock>, Failure> {
    let invalid = |field: &str, message: &dyn std::fmt::Display| Failure::new(abi::INVALID, field, message.to_string());
    let Value::Object(fields) = serde_json::from_slice(config).map_err(|error| invalid("", &error))? else {
        return Err(invalid("", &"expected an object"));
    };
    let fields = fields.into_iter().map(|(name, value)| (Value::String(name), value));
    let parsed = block.parse(fields).map_err(|error| invalid(&error.path, &error.message))?;
    if dim > 0 {
        parsed.validate(dim).map_err(|error| invalid(&error.field, &error.message))?;
    }
    Ok(parsed)
}

pub(super) struct Instance {
    model: Box<dyn StageModel>,
    /// In the order in which the host knows them, with the names that it does not know the prefix of.
    pub(super) params: Vec<(String, Arc<Param>)>,
    pub(super) dim: usize,
    /// The host's version of the values that `params` hold.
    version: Mutex<Option<u64>>,
    pub(super) panicked: AtomicBool,
}

impl Instance {
    pub(super) fn new(block: &dyn StageBlock, place: &str, dim: usize, num_layers: usize) -> Result<Self, Failure> {
        // The host owns the parameters, and refuses what does not fit.
        let mut store = ParamStore::unlimited(0);
        let model = match place {
            "" => block.build(dim, num_layers, &mut store.root())?,
            place => block.build(dim, num_layers, &mut store.root().sub(place))?,
        };
        let params = store.iter().map(|param| {
            let name = param.name().strip_prefix(place).unwrap_or(param.name()).trim_start_matches('.');
            (name.to_string(), param.clone())
        });
        let params: Vec<_> = params.collect();
        if let Some((name, _)) = params.iter().find(|(_, param)| param.zero_row().is_some()) {
            let message = format!("parameter {name}: an embedding with a row that stays zero cannot cross into a host");
            return Err(Failure::new(abi::UNSUPPORTED, "", message));
        }
        Ok(Instance { model, params, dim, version: Mutex::new(None), panicked: AtomicBool::new(false) })
    }

    pub(super) fn is_causal(&self) -> bool {
        self.model.is_causal()
    }

    pub(super) fn cost(&self, seq_len: usize) -> Option<crate::block::Cost> {
        self.model.cost(seq_len)
    }

    /// Copies the host's values if they are other ones than those of the call before.
    pub(super) fn sync(&self, version: u64, values: &[&[f32]]) -> Result<(), Failure> {
        let mut known = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != Some(version) {
            let copy = |((_, param), values): (&(String, Arc<Param>), &&[f32])| {
                param.update(|slot| {
                    let chunks = slot.par_chunks_mut(COPIED_AT_ONCE).zip(values.par_chunks(COPIED_AT_ONCE));
                    chunks.for_each(|(slot, values)| slot.copy_from_slice(values));
                })
            };
            self.params.par_iter().zip(values).try_for_each(copy)?;
            *known = Some(version);
        }
        Ok(())
    }

    /// Writes the output to `y`; returns what backward needs if `keep`.
    pub(super) fn forward(&self, pass: &Pass, x: &[f32], y: &mut [f32], keep: bool) -> Result<Option<Tape>, Failure> {
        let Dims { batch, seq, dim } = pass.dims;
        let x = match keep {
            true => Var::from_slice(x, (batch, seq, dim), &Device::Cpu)?.into_inner(),
            false => Tensor::from_slice(x, (batch, seq, dim), &Device::Cpu)?,
        };
        let mask = pass.mask.map(|mask| Tensor::from_slice(mask, (batch, seq), &Device::Cpu)).transpose()?;
        let mode = match pass.seed {
            Some(seed) => Mode::train(seed),
            None if keep => return Err(Failure::new(abi::INVALID, "", "a tape was asked for outside training")),
            None => Mode::Eval,
        };
        let output = self.model.forward(&x, mask.as_ref(), mode)?;
        if output.dims() != x.dims() {
            let message = format!("the block returned shape {:?} for {:?}", output.dims(), x.dims());
            return Err(Failure::new(abi::FAILED, "", message));
        }
        with_floats(&output, |output| y.copy_from_slice(output))?;
        Ok(keep.then_some(Tape { x, output }))
    }

    /// Writes the gradient of the input, and adds those of the parameters.
    pub(super) fn backward<'a>(
        &'a self,
        tape: Tape,
        dy: &[f32],
        dx: &mut [f32],
        dparams: Vec<&'a mut [f32]>,
    ) -> Result<(), Failure> {
        let dy = Tensor::from_slice(dy, tape.output.shape(), &Device::Cpu)?;
        // SAFETY: dropped below.
        let lend = |((_, param), memory): (&'a (String, Arc<Param>), &'a mut [f32])| unsafe { param.lend_grad(memory) };
        let loans: Vec<_> = self.params.iter().zip(dparams).map(lend).collect();
        let grads = backward_from(&tape.output, dy)?;
        fold_gradients(self.params.iter().map(|(_, param)| param), &grads)?;
        match grads.get(&tape.x) {
            Some(grad) => with_floats(grad, |grad| dx.copy_from_slice(grad))?,
            None => dx.fill(0.0),
        }
        drop(loans);
        Ok(())
    }
}

/// What a forward pass is about.
pub(super) struct Pass<'a> {
    pub(super) dims: Dims,
    pub(super) mask: Option<&'a [u8]>,
    /// The dropout seed, in training.
    pub(super) seed: Option<u64>,
}

/// The graph of one forward pass.
pub(super) struct Tape {
    x: Tensor,
    output: Tensor,
}

/// A batch of sequences being decoded.
pub(super) struct State {
    // Dropped before the instance that it borrows from.
    decoder: Box<dyn StageDecoder>,
    pub(super) instance: Arc<Instance>,
    pub(super) batch: usize,
}

impl State {
    pub(super) fn new(instance: Arc<Instance>, batch: usize) -> Result<Self, Failure> {
        let decoder = instance.model.decoder(batch)?;
        // SAFETY: the decoder borrows from the model alone, which lives in the `Arc` that this state keeps, at a fixed
        // place and never mutably borrowed; the decoder is dropped first.
        let decoder = unsafe { std::mem::transmute::<Box<dyn StageDecoder + '_>, Box<dyn StageDecoder>>(decoder) };
        Ok(State { decoder, instance, batch })
    }

    pub(super) fn reset(&mut self) {
        self.decoder.reset();
    }

    pub(super) fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<(), Failure> {
        Ok(self.decoder.step(x, y)?)
    }

    pub(super) fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<(), Failure> {
        Ok(self.decoder.prefill(x, y, seq)?)
    }
}
