//! candle-nn for training: its modules, with those replaced that have no backward pass or no seed.
//!
//! Write `mblm_sdk::nn` where you would write `candle_nn`. What is listed here without a file of its own is candle-nn's own
//! item. [`Conv1d`], [`LayerNorm`], [`RmsNorm`], [`Dropout`], [`ops`] and [`rotary_emb`] have the same signatures as candle-nn's, give the
//! same outputs, and have the right gradient or, for dropout, a seed. See [`ParamScope::candle`](crate::param::ParamScope::candle).
//!
//! The other convolutions (candle passes transposed views to kernels that take them for contiguous, so that the gradient of
//! the weights is wrong for batches), `sdpa`, `BatchNorm` (whose running statistics would be trained), `kv_cache`, `moe` and `VarMap` (whose weights are not
//! saved) are left out.

mod conv1d;
mod dropout;
mod layer_norm;
pub mod ops;
mod rms_norm;
pub mod rotary_emb;

use candle_core::Tensor;
pub use candle_core::{Module, ModuleT};
pub use candle_nn::{
    Activation, Embedding, Func, FuncT, GRU, GRUConfig, GroupNorm, Init, LSTM, LSTMConfig, LayerNormConfig, Linear,
    PReLU, RNN, Sequential, VarBuilder, embedding, func, func_t, group_norm, gru, init, linear, linear_b,
    linear_no_bias, lstm, prelu, rnn, seq,
};
pub use conv1d::{Conv1d, Conv1dConfig, conv1d, conv1d_no_bias};
pub use dropout::Dropout;
pub use layer_norm::{LayerNorm, layer_norm, layer_norm_no_bias};
pub use rms_norm::{RmsNorm, rms_norm};

use crate::device;
use crate::mode::Mode;

/// Whether backward may follow: candle's own rule.
fn mode(inputs: &[&Tensor]) -> Mode {
    if inputs.iter().any(|input| input.track_op()) { Mode::train(0) } else { Mode::Eval }
}

/// Whether fused ops can take these.
fn is_fusible(inputs: &[&Tensor]) -> bool {
    inputs.iter().all(|input| device::fuses(input))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::param::ParamStore;
    use crate::testing::{noise, perturb};

    type Apply<M> = fn(&M, &Tensor) -> candle_core::Result<Tensor>;

    /// Builds a module, and holds the gradient of every parameter against differences of `Σ f(x)²` along a direction.
    #[track_caller]
    fn check<M: 'static>(
        build: impl Fn(VarBuilder) -> candle_core::Result<M> + Send + Sync + 'static,
        x: &Tensor,
        apply: Apply<M>,
    ) {
        let module_type = std::any::type_name::<M>();
        let mut store = ParamStore::new(5);
        let module = store.root().candle(build).unwrap();
        perturb(&store);
        let loss = |mode| apply(&module.at(mode).unwrap(), x).unwrap().sqr().unwrap().sum_all().unwrap();
        assert!(!loss(Mode::Eval).track_op());
        store.backward(&loss(Mode::train(1))).unwrap();
        assert!(store.iter().count() > 0);
        for (param, seed) in store.iter().zip(60..) {
            let direction: Vec<f32> = noise(param.len(), seed).iter().map(|value| value.signum()).collect();
            let grad = param.grad().to_vec();
            let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{}: no gradient", param.name());
            let want: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            let moved = |step: f32| {
                let add = |values: &mut [f32]| values.iter_mut().zip(&direction).for_each(|(v, d)| *v += step * d);
                param.update(add).unwrap();
                f64::from(loss(Mode::Eval).to_scalar::<f32>().unwrap())
            };
            let (up, down) = (moved(1e-3), moved(-2e-3));
            moved(1e-3);
            let found = (up - down) / 2e-3;
            assert!(
                (found - want).abs() < 0.02 * norm.max(1.0),
                "{} of {module_type}: {found} and {want}",
                param.name()
            );
        }
    }

    fn input(shape: &[usize]) -> Tensor {
        Tensor::from_vec(noise(shape.iter().product(), 3), shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn modules_of_candle_are_trained_through() {
        let rows = input(&[2, 5, 6]);
        check(|vb| linear(6, 4, vb), &rows, Linear::forward);
        check(|vb| gru(6, 3, GRUConfig::default(), vb), &rows, |m, x| m.states_to_tensor(&m.seq(x)?));
        check(|vb| lstm(6, 3, LSTMConfig::default(), vb), &rows, |m, x| m.states_to_tensor(&m.seq(x)?));
        check(|vb| layer_norm(6, 1e-5, vb), &rows, LayerNorm::forward);
        check(|vb| layer_norm_no_bias(6, 1e-5, vb), &rows, LayerNorm::forward);
        check(|vb| rms_norm(6, 1e-5, vb), &rows, RmsNorm::forward);
        check(|vb| prelu(None, vb), &rows, PReLU::forward);
        let causal = Conv1dConfig::default();
        check(
            move |vb| conv1d(6, 4, 3, causal, vb),
            &rows.transpose(1, 2).unwrap().contiguous().unwrap(),
            |m, x| m.forward(&x.pad_with_zeros(2, 2, 0)?),
        );
        check(
            |vb| group_norm(2, 6, 1e-5, vb),
            &rows.transpose(1, 2).unwrap().contiguous().unwrap(),
            GroupNorm::forward,
        );
        let ids = Tensor::new(&[[1u32, 4], [0, 1]], &Device::Cpu).unwrap();
        check(|vb| embedding(5, 3, vb), &ids, Embedding::forward);
        for activation in
            [Activation::Gelu, Activation::NewGelu, Activation::Silu, Activation::Relu, Activation::Sigmoid]
        {
            let stack = move |vb: VarBuilder| {
                Ok(seq()
                    .add(linear(6, 8, vb.pp(0))?)
                    .add(activation)
                    .add(linear_no_bias(8, 6, vb.pp(2))?)
                    .add_fn(|x| x.tanh()))
            };
            check(stack, &rows, Sequential::forward);
        }
    }
}
