//! Dropout with a seed.

use candle_core::{Result, Shape, Tensor};
use candle_nn::VarBuilder;

use super::is_fusible;
use crate::error;
use crate::mode::{self, Mode, stream};
use crate::node::{Node, apply1};
use crate::ops::dropout::{apply, dropout_composed};
use crate::parallel;

/// Dropout whose mask follows from the pass's seed, so that a pass can be repeated bit for bit. Unlike
/// [`candle_nn::Dropout`], it takes a builder, and a [`Mode`] instead of `train: bool`.
#[derive(Clone, Debug)]
pub struct Dropout {
    p: f32,
    stream: u64,
}

impl Dropout {
    /// Drops elements with probability `p`. The builder's prefix tells its masks from those of other places, so give each
    /// dropout one of its own: `Dropout::new(0.1, vb.pp("dropout"))`.
    pub fn new(p: f32, vb: VarBuilder) -> Self {
        Dropout { p, stream: stream(&vb.prefix()) }
    }

    /// `x` in evaluation; in training, `x` with elements dropped and the others scaled by `1 / (1 - p)`.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        match mode.dropout(self.p, self.stream) {
            None => Ok(x.clone()),
            Some(dropout) if is_fusible(&[x]) => Ok(apply1(Mask { dropout, shape: x.shape().clone() }, x, mode)?),
            dropout => Ok(dropout_composed(x, dropout)?),
        }
    }
}

struct Mask {
    dropout: mode::Dropout,
    shape: Shape,
}

impl Node for Mask {
    type Tape = ();

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> error::Result<()> {
        parallel::copy(inputs[0], y);
        apply(self.dropout, y);
        Ok(())
    }

    fn backward(&self, _: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> error::Result<()> {
        parallel::copy(dy, &mut grads[0]);
        apply(self.dropout, &mut grads[0]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    #[test]
    fn masks_follow_from_seed_and_place_and_backward_has_the_same() {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let (one, other) = (Dropout::new(0.5, vb.pp("one")), Dropout::new(0.5, vb.pp("other")));
        let x = Var::ones((50, 8), DType::F32, &Device::Cpu).unwrap();
        let floats = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let run = |dropout: &Dropout, seed| dropout.forward(&x, Mode::train(seed)).unwrap();
        let y = run(&one, 1);
        assert_eq!(floats(&y), floats(&run(&one, 1)));
        assert_ne!(floats(&y), floats(&run(&one, 2)));
        assert_ne!(floats(&y), floats(&run(&other, 1)));
        assert!(floats(&y).iter().all(|y| [0.0, 2.0].contains(y)));
        assert_eq!(floats(y.sum_all().unwrap().backward().unwrap().get(&x).unwrap()), floats(&y));
        let composed = one.forward(&x.to_dtype(DType::F64).unwrap(), Mode::train(1)).unwrap();
        assert_eq!(floats(&composed.to_dtype(DType::F32).unwrap()), floats(&y));
        assert_eq!(floats(&one.forward(&x, Mode::Eval).unwrap()), [1.0; 400]);
    }
}
