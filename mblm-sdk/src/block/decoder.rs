//! The incremental forms of a stage model: over slices, where the model runs on the CPU, and over tensors elsewhere.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_compute::device::Place;
use mblm_compute::error::{Error, Result};
use mblm_compute::mode::Mode;
use mblm_compute::transfer;

use super::StageModel;

/// Decodes a batch of sequences incrementally. They advance together.
pub trait StageDecoder: Send {
    /// Resets the state. The next step is position 0.
    fn reset(&mut self);

    /// Advances by one position.
    ///
    /// # Shapes
    /// - `x`, `y`: `(batch, dim)`; `y` is overwritten with the output at this position
    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()>;

    /// Advances by `seq` positions at once.
    ///
    /// # Shapes
    /// - `x`, `y`: `(seq, batch, dim)`
    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        let row = (x.len() / seq.max(1)).max(1);
        for (x, y) in x.chunks_exact(row).zip(y.chunks_exact_mut(row)) {
            self.step(x, y)?;
        }
        Ok(())
    }

    /// Goes on as `times` sequences, each with the state of the only one so far. Returns false, and is not used any more, if
    /// the block cannot do this; the prompt is then read by each of them.
    fn repeat(&mut self, _times: usize) -> bool {
        false
    }
}

/// Decodes a batch of sequences by tensors. Its state lies where the model's parameters do.
pub trait TensorDecoder: Send {
    /// Resets the state. The next position is 0.
    fn reset(&mut self);

    /// Advances by one or more positions.
    ///
    /// # Shapes
    /// - `x`: `(batch, seq, dim)`; returns the outputs, of the same shape
    fn advance(&mut self, x: &Tensor) -> Result<Tensor>;
}

/// Decodes with a function of the next positions and of what is kept of those before, `S::default()` at the start.
struct WithState<S, F> {
    state: S,
    advance: F,
}

impl<S: Default + Send, F: FnMut(&Tensor, &mut S) -> Result<Tensor> + Send> TensorDecoder for WithState<S, F> {
    fn reset(&mut self) {
        self.state = S::default();
    }

    fn advance(&mut self, x: &Tensor) -> Result<Tensor> {
        (self.advance)(x, &mut self.state)
    }
}

/// Decodes a stack of layers, where `advance` runs the next positions through a layer with what is kept of those before
/// (`S::default()` at the start), and `finish` gives the output of the stage.
pub fn stacked<'m, L: Send + Sync, S: Default + Send + 'm>(
    layers: &'m [Arc<L>],
    advance: impl Fn(&L, &Tensor, &mut S) -> Result<Tensor> + Send + 'm,
    finish: impl Fn(&Tensor) -> Result<Tensor> + Send + 'm,
) -> Box<dyn TensorDecoder + 'm> {
    let advance = move |x: &Tensor, pasts: &mut Vec<S>| {
        pasts.resize_with(layers.len(), S::default);
        let mut layers = layers.iter().zip(pasts);
        finish(&layers.try_fold(x.clone(), |x, (layer, past)| advance(layer, &x, past))?)
    };
    Box::new(WithState { state: vec![], advance })
}

/// The tensor decoder of a block that does not implement one: runs the whole prefix again for all new positions. This is slow
/// but always correct, so a new block can generate immediately.
pub fn replay_tensors<M: StageModel + ?Sized>(model: &M) -> Box<dyn TensorDecoder + '_> {
    let advance = move |x: &Tensor, inputs: &mut Option<Tensor>| {
        let all = match inputs.take() {
            Some(before) => Tensor::cat(&[&before, x], 1)?,
            None => x.clone(),
        };
        let outputs = model.forward(&all, None, Mode::Eval)?;
        if outputs.dims() != all.dims() {
            let (found, expected) = (outputs.dims(), all.dims());
            return Err(Error::Block(format!("a stage model returned shape {found:?} for {expected:?}")));
        }
        let (seq, new) = (all.dim(1)?, x.dim(1)?);
        *inputs = Some(all);
        Ok(outputs.narrow(1, seq - new, new)?)
    };
    Box::new(WithState { state: None, advance })
}

/// The decoder of a block that does not implement one, as [`replay_tensors`].
pub fn replay<M: StageModel + ?Sized>(model: &M, batch: usize) -> Box<dyn StageDecoder + '_> {
    by_slices(replay_tensors(model), batch, Place::default())
}

/// Drives a decoder by tensors, whose parameters lie at `place`, with slices.
pub fn by_slices<'m>(decoder: Box<dyn TensorDecoder + 'm>, batch: usize, place: Place) -> Box<dyn StageDecoder + 'm> {
    Box::new(BySlices { decoder, batch, place })
}

struct BySlices<'m> {
    decoder: Box<dyn TensorDecoder + 'm>,
    batch: usize,
    place: Place,
}

impl StageDecoder for BySlices<'_> {
    fn reset(&mut self) {
        self.decoder.reset();
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        self.prefill(x, y, 1)
    }

    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        if seq == 0 {
            return Ok(());
        }
        let dims = (seq, self.batch, x.len() / (seq * self.batch));
        let x = transfer::to_tensor(x, dims, &self.place.device)?.to_dtype(self.place.dtype)?;
        let outputs = self.decoder.advance(&x.transpose(0, 1)?.contiguous()?)?;
        y.copy_from_slice(&transfer::to_vec::<f32>(&outputs.transpose(0, 1)?)?);
        Ok(())
    }
}

/// Drives a decoder by slices, which reads parameters as slices wherever they lie, with tensors. Each advance copies its
/// positions from the device and back.
pub fn by_tensors<'m>(decoder: Box<dyn StageDecoder + 'm>) -> Box<dyn TensorDecoder + 'm> {
    Box::new(ByTensors(decoder))
}

struct ByTensors<'m>(Box<dyn StageDecoder + 'm>);

impl TensorDecoder for ByTensors<'_> {
    fn reset(&mut self) {
        self.0.reset();
    }

    fn advance(&mut self, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        let rows = transfer::to_vec::<f32>(&x.transpose(0, 1)?)?;
        let mut outputs = vec![0.0; rows.len()];
        self.0.prefill(&rows, &mut outputs, seq)?;
        let outputs = transfer::to_tensor(&outputs, (seq, batch, dim), x.device())?.to_dtype(x.dtype())?;
        Ok(outputs.transpose(0, 1)?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use mblm_compute::layer::Dims;

    use super::*;
    use crate::testing::check_decoder;

    /// The sum of all positions so far, decoded by tensors, or through slices to tensors of another place.
    struct Sum(Option<Place>);

    impl StageModel for Sum {
        fn forward(&self, x: &Tensor, _: Option<&Tensor>, _: Mode) -> Result<Tensor> {
            Ok(x.cumsum(1)?)
        }

        fn tensor_decoder(&self, batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
            Ok(match &self.0 {
                None => replay_tensors(self),
                Some(place) => by_tensors(by_slices(replay_tensors(self), batch, place.clone())),
            })
        }
    }

    #[test]
    fn decoders_give_forward() {
        let wide = Place { device: Device::Cpu, dtype: DType::F64 };
        for model in [Sum(None), Sum(Some(Place::default())), Sum(Some(wide))] {
            check_decoder(&model, Dims { batch: 3, seq: 11, dim: 4 }, 1e-6);
        }
    }

    /// Returns one channel of all.
    struct Narrow;

    impl StageModel for Narrow {
        fn forward(&self, x: &Tensor, _: Option<&Tensor>, _: Mode) -> Result<Tensor> {
            Ok(x.narrow(2, 0, 1)?)
        }
    }

    #[test]
    fn a_model_that_returns_another_shape_is_refused() {
        let error = replay(&Narrow, 1).step(&[0.0; 3], &mut [0.0; 3]).unwrap_err().to_string();
        assert!(error.contains("returned shape [1, 1, 1] for [1, 1, 3]"), "{error}");
    }
}
