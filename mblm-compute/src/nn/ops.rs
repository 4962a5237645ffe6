//! [`candle_nn::ops`], those that can be trained through.

use candle_core::{D, Result, Shape, Tensor, bail};
pub use candle_nn::ops::{Identity, hard_sigmoid, leaky_relu, log_softmax, mish, selu, sigmoid, silu, softmax, swiglu};

use super::{is_fusible, mode};
use crate::error;
use crate::layer::Dims;
use crate::node::{Node, apply2, apply3};
use crate::ops::layer_norm;
use crate::ops::rms_norm::{Eps, RmsNorm};

/// Softmax over the last dimension: [`candle_nn::ops::softmax_last_dim`] with a gradient.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    // The result does not depend on what is subtracted, and neither does the gradient.
    let powers = xs.broadcast_sub(&xs.max_keepdim(D::Minus1)?.detach())?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// LayerNorm over the last dimension: [`candle_nn::ops::layer_norm`] with a gradient.
///
/// # Shapes
/// - `xs`: `(…, D)`, `alpha` (the gain) and `beta` (the bias): `(D)`; returns `(…, D)`
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    let dim = xs.dim(D::Minus1)?;
    if (dim, dim) != (alpha.dims1()?, beta.dims1()?) {
        bail!("layer_norm: expected a gain and a bias of {dim}, found {:?} and {:?}", alpha.dims(), beta.dims())
    }
    match is_fusible(&[xs, alpha, beta]) {
        true => Ok(apply3(LayerNorm { shape: xs.shape().clone(), eps }, xs, alpha, beta, mode(&[xs, alpha, beta]))?),
        false => candle_nn::ops::layer_norm_slow(xs, alpha, beta, eps),
    }
}

struct LayerNorm {
    shape: Shape,
    eps: f32,
}

impl Node for LayerNorm {
    type Tape = ();

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> error::Result<()> {
        layer_norm::forward(inputs[0], inputs[1], inputs[2], self.eps, y);
        Ok(())
    }

    fn backward(&self, inputs: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> error::Result<()> {
        if let [dx, dalpha, dbeta] = grads {
            dx.copy_from_slice(dy);
            layer_norm::backward(inputs[0], inputs[1], self.eps, dx, dalpha, dbeta);
        }
        Ok(())
    }
}

/// RMSNorm over the last dimension: [`candle_nn::ops::rms_norm`] with a gradient.
///
/// # Shapes
/// - `xs`: `(…, D)`, `alpha` (the gain): `(D)`; returns `(…, D)`
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    let dim = xs.dim(D::Minus1)?;
    if dim != alpha.dims1()? {
        bail!("rms_norm: expected a gain of {dim}, found {:?}", alpha.dims())
    }
    match is_fusible(&[xs, alpha]) {
        true => Ok(apply2(RootMeanSquare { shape: xs.shape().clone(), eps }, xs, alpha, mode(&[xs, alpha]))?),
        false => candle_nn::ops::rms_norm_slow(xs, alpha, eps),
    }
}

struct RootMeanSquare {
    shape: Shape,
    eps: f32,
}

impl RootMeanSquare {
    fn kernel<'a>(&self, gain: &'a [f32]) -> (RmsNorm<'a>, Dims) {
        let dims = Dims { batch: self.shape.elem_count() / gain.len(), seq: 1, dim: gain.len() };
        (RmsNorm { gain, eps: Eps::Inside(self.eps), shift: false }, dims)
    }
}

impl Node for RootMeanSquare {
    type Tape = ();

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> error::Result<()> {
        let (kernel, dims) = self.kernel(inputs[1]);
        kernel.forward(inputs[0], dims, y);
        Ok(())
    }

    fn backward(&self, inputs: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> error::Result<()> {
        let (kernel, dims) = self.kernel(inputs[1]);
        if let [dx, dalpha] = grads {
            kernel.backward(inputs[0], dims, dy, dx, dalpha);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::testing::{assert_close, noise};

    /// Output and gradients of `Σ f(inputs) · weights`, computed in `dtype`.
    fn run(shapes: &[&[usize]], dtype: DType, f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Vec<f32>> {
        let tensor = |shape: &[usize], seed| {
            Tensor::from_vec(noise(shape.iter().product(), seed), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let inputs: Vec<Var> =
            shapes.iter().zip(1..).map(|(shape, seed)| Var::from_tensor(&tensor(shape, seed)).unwrap()).collect();
        let y = f(&inputs.iter().map(|input| input.as_tensor().clone()).collect::<Vec<_>>()).unwrap();
        let loss = (&y * tensor(y.dims(), 9)).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let flat = |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        std::iter::once(flat(&y)).chain(inputs.iter().map(|input| grads.get(input).map_or(vec![], flat))).collect()
    }

    #[test]
    fn outputs_are_those_of_candle_and_gradients_those_of_a_composition_in_f64() {
        type Op = fn(&[Tensor]) -> Result<Tensor>;
        type Case<'a> = (&'a str, &'a [&'a [usize]], Op, Op, Op);
        let x: &[usize] = &[3, 5, 19];
        let cases: [Case; 3] = [
            (
                "layer_norm",
                &[x, &[19], &[19]],
                |i| layer_norm(&i[0], &i[1], &i[2], 1e-5),
                |i| candle_nn::ops::layer_norm(&i[0], &i[1], &i[2], 1e-5),
                |i| candle_nn::ops::layer_norm_slow(&i[0], &i[1], &i[2], 1e-5),
            ),
            (
                "rms_norm",
                &[x, &[19]],
                |i| rms_norm(&i[0], &i[1], 1e-5),
                |i| candle_nn::ops::rms_norm(&i[0], &i[1], 1e-5),
                |i| candle_nn::ops::rms_norm_slow(&i[0], &i[1], 1e-5),
            ),
            (
                "softmax_last_dim",
                &[x],
                |i| softmax_last_dim(&i[0]),
                |i| candle_nn::ops::softmax_last_dim(&i[0]),
                |i| candle_nn::ops::softmax(&i[0], D::Minus1),
            ),
        ];
        crate::buffer::poison_buffers();
        for (name, shapes, ours, candle, composed) in cases {
            let got = run(shapes, DType::F32, ours);
            let output = run(shapes, DType::F32, candle);
            assert_close(&format!("{name}: output"), &got[0], &output[0], 1e-6);
            let want = run(shapes, DType::F64, composed);
            for (part, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_close(&format!("{name}: part {part}"), got, want, 5e-6);
            }
            let wide = run(shapes, DType::F64, ours);
            assert_close(&format!("{name} in f64"), &wide.concat(), &want.concat(), 1e-6);
        }
    }

    #[test]
    fn nothing_is_kept_where_no_gradient_is_asked_for() {
        let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let gain = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
        let outputs = [layer_norm(&x, &gain, &gain, 1e-5), rms_norm(&x, &gain, 1e-5), softmax_last_dim(&x)];
        assert!(outputs.into_iter().all(|y| !y.unwrap().track_op()));
    }
}
