//! What tests hold layers against.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
pub use mblm_base::random::noise;

use crate::error::Result;
use crate::layer::{Dims, Layer, apply};
use crate::mode::Mode;
use crate::param::{Param, ParamStore};

/// Moves every parameter away from special values such as 0 and 1, which hide errors.
pub fn perturb(store: &ParamStore) {
    for (i, param) in store.iter().enumerate() {
        let noise = noise(param.len(), i as u64);
        param.update(|v| v.iter_mut().zip(&noise).for_each(|(v, n)| *v += 0.1 * n)).expect("an in-place update");
    }
}

/// The first place where `got` is not within `tolerance` of `want`, relative to the largest element of `want`.
pub fn difference(got: &[f32], want: &[f32], tolerance: f32) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{} numbers, expected {}", got.len(), want.len()));
    }
    let scale = want.iter().fold(1e-3f32, |max, value| max.max(value.abs()));
    let close = |(got, want): (&f32, &f32)| (got - want).abs() <= tolerance * scale;
    let at = got.iter().zip(want).position(|pair| !close(pair))?;
    Some(format!("element {at} is {}, expected {} (within {tolerance:e} of the largest)", got[at], want[at]))
}

/// Panics unless `got` is within `tolerance` of `want`, relative to the largest element of `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    if let Some(difference) = difference(got, want, tolerance) {
        panic!("{what}: {difference}");
    }
}

/// What a forward and a backward pass gave.
pub struct Pass {
    /// What came out.
    pub output: Vec<f32>,
    /// The gradient of the input; empty if it got none.
    pub dx: Vec<f32>,
    /// One per parameter.
    pub grads: Vec<Vec<f32>>,
}

/// Runs `forward` in f32 or f64 on the same noise and returns output, input gradient and parameter gradients of the
/// loss `Σ output · weights`.
pub fn run(
    params: &[Arc<Param>],
    store: &ParamStore,
    dims: Dims,
    dtype: DType,
    forward: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Pass> {
    let shape = (dims.batch, dims.seq, dims.dim);
    let x = Var::from_tensor(&Tensor::from_vec(noise(dims.len(), 11), shape, &Device::Cpu)?.to_dtype(dtype)?)?;
    let weights = Tensor::from_vec(noise(dims.len(), 12), shape, &Device::Cpu)?.to_dtype(dtype)?;
    let y = forward(x.as_tensor())?;
    let loss = (&y * weights)?.sum_all()?;
    store.zero_grad();
    let dx = store.backward(&loss)?.get(x.as_tensor()).cloned();
    let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let dx = dx.map(|t| flat(&t)).transpose()?.unwrap_or_default();
    Ok(Pass { output: flat(&y)?, dx, grads: params.iter().map(|p| p.grad().to_vec()).collect() })
}

/// Holds a fused layer against its composition in f64: output, gradient of the input and of every parameter, each
/// within `tolerance` of its largest element; every parameter must get a finite, non-zero gradient.
pub fn check_layer<L: Layer>(layer: &Arc<L>, store: &ParamStore, dims: Dims, mask: Option<&Tensor>, mode: Mode) {
    const TOLERANCE: f32 = 2e-5;
    crate::buffer::poison_buffers();
    let params: Vec<_> = store.iter().cloned().collect();
    let what = |part: &str| format!("{} {dims:?} {mode:?}: {part}", std::any::type_name::<L>());
    let fused = run(&params, store, dims, DType::F32, |x| apply(layer, x, mask, mode)).expect("fused");
    let composed = run(&params, store, dims, DType::F64, |x| layer.composed(x, mask, mode)).expect("composed");
    assert_close(&what("output"), &fused.output, &composed.output, TOLERANCE);
    assert_close(&what("gradient of x"), &fused.dx, &composed.dx, TOLERANCE);
    for ((param, got), want) in params.iter().zip(&fused.grads).zip(&composed.grads) {
        assert_close(&what(param.name()), got, want, TOLERANCE);
        let live = got.iter().all(|g| g.is_finite()) && got.iter().any(|g| *g != 0.0);
        assert!(live, "{}: no finite, non-zero gradient", what(param.name()));
    }
}
