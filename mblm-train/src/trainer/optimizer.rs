//! Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), and
//! clipping of the gradient's norm; both as PyTorch computes them.

use std::borrow::Cow;

use candle_core::Tensor;
use mblm_core::ops::adam::Step;
use mblm_core::parallel::MIN_PARALLEL;
use mblm_core::simd::vectorize;
use mblm_core::{Param, ParamStore};
use rayon::prelude::*;

use self::tensors::{TensorMoments, sums_of_tensors};
use crate::error::Result;

mod tensors;

/// What the reference package trains with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// The decay of the first moment.
    pub beta1: f64,
    /// The decay of the second moment.
    pub beta2: f64,
    /// Keeps the division finite.
    pub eps: f64,
    /// The share of a decaying parameter that is taken away per unit of learning rate.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The running means of one parameter's gradient and of its square.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// The first moment, `m`.
    pub m: Vec<f32>,
    /// The second moment, `v`.
    pub v: Vec<f32>,
}

/// Adam over all parameters of a store.
#[derive(Clone, Debug)]
pub struct Adam {
    config: AdamConfig,
    step: u64,
    /// In the order of the store.
    moments: Vec<Held>,
}

/// The moments of one parameter, where it lies.
#[derive(Clone, Debug)]
enum Held {
    Host(Moments),
    Device(TensorMoments),
}

impl Held {
    fn new(param: &Param) -> Self {
        match param.place().is_host() {
            true => Held::Host(Moments { m: vec![0.0; param.len()], v: vec![0.0; param.len()] }),
            false => Held::Device(TensorMoments::default()),
        }
    }
}

impl Adam {
    /// An optimizer that has taken no step.
    pub fn new(store: &ParamStore, config: AdamConfig) -> Self {
        Adam { config, step: 0, moments: store.iter().map(|param| Held::new(param)).collect() }
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// The moments of each parameter, in the order of `store`, which it was made for. Those of a device are copied.
    pub fn moments(&self, store: &ParamStore) -> Result<Vec<Cow<'_, Moments>>> {
        let held = self.moments.iter().zip(store.iter());
        held.map(|(held, param)| match held {
            Held::Host(moments) => Ok(Cow::Borrowed(moments)),
            Held::Device(moments) => Ok(Cow::Owned(moments.read(param)?)),
        })
        .collect()
    }

    /// Goes on from saved moments, one per parameter of the store and as long as it, after `step` steps.
    pub fn restore(&mut self, store: &ParamStore, moments: Vec<Moments>, step: u64) -> Result<()> {
        let hold = |(param, moments): (&std::sync::Arc<Param>, Moments)| match param.place().is_host() {
            true => Ok(Held::Host(moments)),
            false => Ok(Held::Device(TensorMoments::new(param, &moments)?)),
        };
        self.moments = store.iter().zip(moments).map(hold).collect::<Result<_>>()?;
        self.step = step;
        Ok(())
    }

    /// Changes every parameter that has a gradient. The gradients stay as they are.
    pub fn step(&mut self, store: &ParamStore, lr: f64) -> Result<()> {
        self.step += 1;
        let AdamConfig { beta1, beta2, eps, weight_decay } = self.config;
        let bias = |beta: f64| 1.0 - beta.powf(self.step as f64);
        for (param, moments) in store.iter().zip(&mut self.moments) {
            let scalars = Step {
                beta2: beta2 as f32,
                one_minus_beta1: (1.0 - beta1) as f32,
                one_minus_beta2: (1.0 - beta2) as f32,
                root_bias2: bias(beta2).sqrt() as f32,
                eps: eps as f32,
                step_size: (lr / bias(beta1)) as f32,
                decay: if param.weight_decay() { (1.0 - lr * weight_decay) as f32 } else { 1.0 },
            };
            match moments {
                Held::Host(moments) => update(param, moments, &scalars)?,
                Held::Device(moments) => moments.update(param, &scalars)?,
            }
        }
        Ok(())
    }
}

fn update(param: &Param, moments: &mut Moments, scalars: &Step) -> Result<()> {
    let grad = param.grad();
    if grad.is_empty() {
        return Ok(());
    }
    Ok(param.update(|values| {
        values
            .par_chunks_mut(MIN_PARALLEL)
            .zip(grad.par_chunks(MIN_PARALLEL))
            .zip(moments.m.par_chunks_mut(MIN_PARALLEL))
            .zip(moments.v.par_chunks_mut(MIN_PARALLEL))
            .for_each(|(((p, g), m), v)| vectorize(|| update_chunk(p, g, m, v, scalars)));
    })?)
}

#[inline(always)]
fn update_chunk(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &Step) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *m += s.one_minus_beta1 * (g - *m);
        *v = s.beta2 * *v + s.one_minus_beta2 * g * g;
        *p = s.decay * *p - s.step_size * (*m / (v.sqrt() / s.root_bias2 + s.eps));
    }
}

/// What [`clip_grad_norm`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm {
    /// The Euclidean norm of all gradients together, before clipping. Not finite if any gradient is not.
    pub norm: f64,
    /// The mean over parameters of the mean of each one's gradient, before clipping: the reference package's
    /// `avg_grad`.
    pub mean: f64,
    /// What the gradients were multiplied by, at most 1.
    pub factor: f64,
}

/// Scales all gradients so that their common norm is at most `max_norm`: by `max_norm / (norm + 1e-6)` if that is
/// less than 1. An infinite `max_norm` only measures.
pub fn clip_grad_norm(store: &ParamStore, max_norm: f64) -> Result<GradNorm> {
    let (mut squares, mut means, mut count) = (0.0, 0.0, 0u64);
    let found = grad_sums(store)?;
    for (param, (sum, square)) in store.iter().zip(found).filter_map(|(param, sums)| Some((param, sums?))) {
        squares += square;
        means += sum / param.len() as f64;
        count += 1;
    }
    let norm = f64::sqrt(squares);
    let coefficient = max_norm / (norm + 1e-6);
    let factor = if norm.is_finite() && coefficient < 1.0 { coefficient } else { 1.0 };
    scale_grads(store, factor)?;
    Ok(GradNorm { norm, mean: means / count.max(1) as f64, factor })
}

/// The sum and the sum of squares of each parameter's gradient, in the order of the store; none for one without.
/// From a device, all of them come in one copy.
pub(crate) fn grad_sums(store: &ParamStore) -> Result<Vec<Option<(f64, f64)>>> {
    let tensors: Vec<Option<Tensor>> = store.iter().map(|param| param.grad().tensor().cloned()).collect();
    let mut of_tensors = sums_of_tensors(tensors.iter().flatten())?.into_iter();
    let sums_of = |(param, tensor): (&std::sync::Arc<Param>, &Option<Tensor>)| match tensor {
        Some(_) => of_tensors.next(),
        None => Some(param.grad()).filter(|grad| !grad.is_empty()).map(|grad| sums(&grad)),
    };
    Ok(store.iter().zip(&tensors).map(sums_of).collect())
}

/// Multiplies all gradients by `factor`.
pub fn scale_grads(store: &ParamStore, factor: f64) -> Result<()> {
    if factor == 1.0 {
        return Ok(());
    }
    for param in store.iter() {
        let mut grad = param.grad();
        match grad.tensor().map(|sum| sum.affine(factor, 0.0)) {
            Some(scaled) => grad.set_tensor(scaled?),
            None => {
                let scale = |chunk: &mut [f32]| vectorize(|| mblm_core::simd::scale(factor as f32, chunk));
                grad.par_chunks_mut(MIN_PARALLEL).for_each(scale);
            }
        }
    }
    Ok(())
}

/// The sum and the sum of squares, chunk by chunk: the same bits on any number of threads.
pub(crate) fn sums(grad: &[f32]) -> (f64, f64) {
    let partial: Vec<(f64, f64)> = grad.par_chunks(MIN_PARALLEL).map(|chunk| vectorize(|| sums_chunk(chunk))).collect();
    partial.iter().fold((0.0, 0.0), |(sum, square), part| (sum + part.0, square + part.1))
}

#[inline(always)]
fn sums_chunk(chunk: &[f32]) -> (f64, f64) {
    const LANES: usize = 8;
    let (mut sum, mut square) = ([0.0f64; LANES], [0.0f64; LANES]);
    let (groups, rest) = chunk.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            let x = group[lane] as f64;
            sum[lane] += x;
            square[lane] += x * x;
        }
    }
    for &x in rest {
        sum[0] += x as f64;
        square[0] += x as f64 * x as f64;
    }
    (sum.iter().sum(), square.iter().sum())
}

/// The first parameter, by name, for which `part` holds an infinity or a NaN.
pub fn first_non_finite(store: &ParamStore, part: impl Fn(&Param) -> bool) -> Option<String> {
    store.iter().find(|param| !part(param)).map(|param| param.name().to_string())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use mblm_core::Init;
    use mblm_core::device::Place;

    use super::*;

    /// Two parameters, the second of which decays, and three steps' gradients.
    fn store() -> ParamStore {
        let mut store = ParamStore::new(0);
        let p = store.root().param("p.bias", &[4], Init::Const(0.0)).unwrap();
        p.update(|v| v.copy_from_slice(&[0.5, -1.0, 2.0, 0.0])).unwrap();
        let q = store.root().weight("q.weight", &[1, 2], Init::Const(0.0)).unwrap();
        q.update(|v| v.copy_from_slice(&[1.0, -3.0])).unwrap();
        store
    }

    const GRADS: [([f32; 4], [f32; 2]); 3] = [
        ([0.1, -0.2, 0.3, 1e-9], [0.5, 4.0]),
        ([1.0, 0.0, -0.5, 1e-9], [-0.25, 0.0]),
        ([-3.0, 0.02, 0.1, 0.0], [2.0, 1.0]),
    ];

    fn set_grads(store: &ParamStore, (p, q): ([f32; 4], [f32; 2])) {
        store.get("p.bias").unwrap().grad_mut().copy_from_slice(&p);
        store.get("q.weight").unwrap().grad_mut().copy_from_slice(&q);
    }

    fn train(weight_decay: f64) -> (Vec<f32>, Vec<f32>, Vec<f64>) {
        let store = store();
        let mut adam = Adam::new(&store, AdamConfig { weight_decay, ..Default::default() });
        let mut norms = Vec::new();
        for grads in GRADS {
            set_grads(&store, grads);
            norms.push(clip_grad_norm(&store, 1.0).unwrap().norm);
            adam.step(&store, 0.01).unwrap();
        }
        let values = |name: &str| store.get(name).unwrap().values().to_vec();
        (values("p.bias"), values("q.weight"), norms)
    }

    fn assert_close(got: &[f32], want: &[f32]) {
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 2e-7), "{got:?}, want {want:?}");
    }

    #[test]
    fn three_clipped_steps_are_pytorchs() {
        // torch 2.9.1: Adam(lr=0.01, betas=(0.9, 0.95)) after clip_grad_norm_(1.0)
        let (p, q, norms) = train(0.0);
        for (got, want) in norms.iter().zip([4.04845619, 1.14564395, 3.74304676]) {
            assert!((got - want).abs() < 1e-6, "{got}, want {want}");
        }
        assert_close(&p, &[0.482_444_23, -0.978_638_8, 2.000_558_4, -0.001_128_013_8]);
        assert_close(&q, &[0.988_507_03, -3.023_603_4]);
    }

    #[test]
    fn weight_decay_touches_matrices_alone() {
        let (p, q, _) = train(0.1);
        assert_eq!(p, train(0.0).0, "a bias does not decay");
        // torch 2.9.1: AdamW with weight_decay=0.1
        assert_close(&q, &[0.985_526_9, -3.014_585_7]);
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let (straight, resumed) = (store(), store());
        let mut first = Adam::new(&straight, AdamConfig::default());
        let mut second = Adam::new(&resumed, AdamConfig::default());
        for grads in GRADS {
            set_grads(&straight, grads);
            first.step(&straight, 0.01).unwrap();
            set_grads(&resumed, grads);
            let mut fresh = Adam::new(&resumed, AdamConfig::default());
            let moments = second.moments(&resumed).unwrap().into_iter().map(Cow::into_owned).collect();
            fresh.restore(&resumed, moments, second.step_count()).unwrap();
            second = fresh;
            second.step(&resumed, 0.01).unwrap();
        }
        assert_eq!(second.step_count(), 3);
        assert_eq!(*straight.get("p.bias").unwrap().values(), *resumed.get("p.bias").unwrap().values());
    }

    /// The same store with tensors in place of slices.
    fn in_f64() -> ParamStore {
        let place = Place { device: Device::Cpu, dtype: DType::F64 };
        let mut store = ParamStore::new(0).at(place);
        for (name, shape, values) in
            [("p.bias", &[4][..], &[0.5, -1.0, 2.0, 0.0][..]), ("q.weight", &[1, 2], &[1.0, -3.0])]
        {
            let mut root = store.root();
            let param = match name {
                "p.bias" => root.param(name, shape, Init::Const(0.0)),
                _ => root.weight(name, shape, Init::Const(0.0)),
            };
            param.unwrap().update(|v| v.copy_from_slice(values)).unwrap();
        }
        store
    }

    #[test]
    fn tensors_are_trained_and_restored_as_slices_are() {
        let (slices, straight, resumed) = (store(), in_f64(), in_f64());
        let config = AdamConfig { weight_decay: 0.1, ..AdamConfig::default() };
        let mut adams = [&slices, &straight, &resumed].map(|store| Adam::new(store, config));
        for (p, q) in GRADS {
            set_grads(&slices, (p, q));
            for store in [&straight, &resumed] {
                store.zero_grad();
                store.get("p.bias").unwrap().set_grad(&p).unwrap();
                store.get("q.weight").unwrap().set_grad(&q).unwrap();
            }
            let moments = adams[2].moments(&resumed).unwrap().into_iter().map(Cow::into_owned).collect();
            let steps = adams[2].step_count();
            adams[2].restore(&resumed, moments, steps).unwrap();
            let norms: Vec<GradNorm> =
                [&slices, &straight, &resumed].map(|store| clip_grad_norm(store, 1.0).unwrap()).into();
            assert!((norms[0].norm - norms[1].norm).abs() < 1e-6 && norms[1] == norms[2], "{norms:?}");
            assert!((norms[0].mean - norms[1].mean).abs() < 1e-6, "{norms:?}");
            for (adam, store) in adams.iter_mut().zip([&slices, &straight, &resumed]) {
                adam.step(store, 0.01).unwrap();
            }
        }
        for name in ["p.bias", "q.weight"] {
            let [slices, straight, resumed] =
                [&slices, &straight, &resumed].map(|store| store.get(name).unwrap().values().to_vec());
            // The slices round to f32 in every step, and so do moments that are saved.
            let ulps = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a.to_bits().abs_diff(b.to_bits())).max();
            assert!(ulps(&straight, &slices) <= Some(2), "{name}: {straight:?}, as slices {slices:?}");
            assert!(ulps(&resumed, &straight) <= Some(1), "{name}: {resumed:?}, not restored {straight:?}");
        }
    }

    #[test]
    fn clipping_scales_only_what_is_too_long_and_measures_the_mean() {
        let store = store();
        set_grads(&store, ([3.0, 0.0, 0.0, 1.0], [4.0, 0.0]));
        let norm = clip_grad_norm(&store, f64::INFINITY).unwrap();
        assert_eq!((norm.norm, norm.mean, norm.factor), (26f64.sqrt(), 1.5, 1.0));
        let norm = clip_grad_norm(&store, 2.0).unwrap();
        assert!((norm.factor - 2.0 / (26f64.sqrt() + 1e-6)).abs() < 1e-12);
        assert!((clip_grad_norm(&store, 2.0).unwrap().norm - 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_long_gradient_has_the_norm_of_its_f64_sum() {
        let mut store = ParamStore::new(0);
        let len = 3 * MIN_PARALLEL + 5;
        let param = store.root().param("w", &[len], Init::Const(0.0)).unwrap();
        param.grad_mut().iter_mut().enumerate().for_each(|(i, g)| *g = (i % 7) as f32);
        let want: f64 = (0..len).map(|i| ((i % 7) * (i % 7)) as f64).sum();
        assert_eq!(clip_grad_norm(&store, f64::INFINITY).unwrap().norm, want.sqrt());
    }

    #[test]
    fn a_nan_gradient_shows_in_the_norm_and_is_not_spread() {
        let store = store();
        set_grads(&store, ([1.0, 0.0, 0.0, 0.0], [f32::NAN, 1.0]));
        let norm = clip_grad_norm(&store, 0.5).unwrap();
        assert!(norm.norm.is_nan() && norm.factor == 1.0);
        let found = first_non_finite(&store, |param| param.grad().iter().all(|g| g.is_finite()));
        assert_eq!(found.as_deref(), Some("q.weight"));
    }
}
