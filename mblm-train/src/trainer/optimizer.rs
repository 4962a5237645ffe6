//! The optimizer: what a gradient step does to the parameters of a store, and what it remembers of gradients.
//!
//! AdamW updates all of them. With Muon, it leaves the matrices of the stages to that.

use std::borrow::Cow;

use mblm_core::gemm::{autocast, requested};
use mblm_core::param::Part;
use mblm_core::{Param, ParamStore};
use rayon::prelude::*;

pub use self::adam::AdamConfig;
pub use self::gradients::{GradNorm, clip_grad_norm, first_non_finite, scale_grads};
pub(crate) use self::gradients::{grad_sums, sums};
pub use self::muon::{AdjustRate, MuonConfig};
use self::tensors::TensorMoments;
use crate::error::Result;

mod adam;
mod gradients;
mod muon;
mod tensors;

/// How parameters are updated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerConfig {
    /// AdamW; its weight decay is Muon's too.
    pub adam: AdamConfig,
    /// Muon, for the matrices of the stages; none for AdamW alone.
    pub muon: Option<MuonConfig>,
    /// What the learning rate is multiplied by for each stage, from global to local; empty if by nothing.
    pub lr_scale: Vec<f64>,
}

impl From<AdamConfig> for OptimizerConfig {
    fn from(adam: AdamConfig) -> Self {
        OptimizerConfig { adam, ..OptimizerConfig::default() }
    }
}

/// Whether Muon updates a parameter: the matrices of the stages' blocks. The logits and the maps between stages are
/// matrices too, but of another kind: they begin or end at single bytes.
pub fn is_for_muon(param: &Param) -> bool {
    param.is_matrix() && matches!(param.part(), Some(Part::Stage(_)))
}

/// What the optimizer remembers of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// The running mean of the gradient: Adam's first moment, Muon's momentum.
    pub m: Vec<f32>,
    /// The running mean of its square, Adam's second moment; none of a parameter that Muon updates.
    pub v: Option<Vec<f32>>,
}

/// An optimizer over all parameters of a store.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    step: u64,
    /// In the order of the store.
    slots: Vec<Slot>,
}

/// One parameter's part.
#[derive(Clone, Debug)]
struct Slot {
    is_muon: bool,
    /// What the learning rate is multiplied by.
    scale: f64,
    held: Held,
}

/// The moments of one parameter, where it lies.
#[derive(Clone, Debug)]
enum Held {
    Host(Moments),
    Device(TensorMoments),
}

impl Slot {
    fn new(param: &Param, config: &OptimizerConfig) -> Self {
        let is_muon = config.muon.is_some() && is_for_muon(param);
        let stages = config.lr_scale.len();
        let scale = param.part().and_then(|part| config.lr_scale.get(part.stage(stages)));
        let zeros = || vec![0.0; param.len()];
        let held = match param.place().is_host() {
            true => Held::Host(Moments { m: zeros(), v: (!is_muon).then(zeros) }),
            false => Held::Device(TensorMoments::default()),
        };
        Slot { is_muon, scale: scale.copied().unwrap_or(1.0), held }
    }
}

impl Optimizer {
    /// An optimizer that has taken no step.
    pub fn new(store: &ParamStore, config: impl Into<OptimizerConfig>) -> Self {
        let config = config.into();
        let slots = store.iter().map(|param| Slot::new(param, &config)).collect();
        Optimizer { config, step: 0, slots }
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Whether each parameter, in the order of the store, has a second moment.
    pub(crate) fn has_second(&self) -> impl Iterator<Item = bool> {
        self.slots.iter().map(|slot| !slot.is_muon)
    }

    /// The moments of each parameter, in the order of `store`, which it was made for. Those of a device are copied.
    pub fn moments(&self, store: &ParamStore) -> Result<Vec<Cow<'_, Moments>>> {
        let slots = self.slots.iter().zip(store.iter());
        slots
            .map(|(slot, param)| match &slot.held {
                Held::Host(moments) => Ok(Cow::Borrowed(moments)),
                Held::Device(moments) => Ok(Cow::Owned(moments.read(param, slot.is_muon)?)),
            })
            .collect()
    }

    /// Goes on from saved moments, one per parameter of the store and as long as it, after `step` steps. They have second
    /// moments where the optimizer keeps them.
    pub fn restore(&mut self, store: &ParamStore, moments: Vec<Moments>, step: u64) -> Result<()> {
        for ((slot, param), moments) in self.slots.iter_mut().zip(store.iter()).zip(moments) {
            slot.held = match param.place().is_host() {
                true => Held::Host(moments),
                false => Held::Device(TensorMoments::new(param, &moments)?),
            };
        }
        self.step = step;
        Ok(())
    }

    /// Changes every parameter that has a gradient. The gradients stay as they are.
    ///
    /// Muon's products are in the precision of [`autocast`]. Matrices are updated several at a time, so that small ones use
    /// all threads.
    pub fn step(&mut self, store: &ParamStore, lr: f64) -> Result<()> {
        self.step += 1;
        let OptimizerConfig { adam, muon, .. } = &self.config;
        let precision = requested();
        let mut matrices = Vec::new();
        for (param, slot) in store.iter().zip(&mut self.slots) {
            let lr = lr * slot.scale;
            let decay = if param.weight_decay() { 1.0 - lr * adam.weight_decay } else { 1.0 };
            let rule = muon.as_ref().filter(|_| slot.is_muon);
            match (rule, &mut slot.held) {
                (Some(muon), Held::Host(moments)) => {
                    matrices.push((muon.step(param, lr, decay), param, &mut moments.m))
                }
                (Some(muon), Held::Device(held)) => held.muon(param, &muon.step(param, lr, decay))?,
                (None, Held::Host(moments)) => adam::update(param, moments, &adam.step(self.step, lr, decay))?,
                (None, Held::Device(held)) => held.adam(param, &adam.step(self.step, lr, decay))?,
            }
        }
        matrices.into_par_iter().try_for_each(|(step, param, momentum)| {
            // Each thread has a precision of its own.
            autocast(precision, || muon::update(param, momentum, &step))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use mblm_core::Init;
    use mblm_core::device::Place;

    use super::*;

    /// Two parameters, the second of which decays, and three steps' gradients.
    pub(super) fn store() -> ParamStore {
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

    pub(super) fn set_grads(store: &ParamStore, (p, q): ([f32; 4], [f32; 2])) {
        store.get("p.bias").unwrap().grad_mut().copy_from_slice(&p);
        store.get("q.weight").unwrap().grad_mut().copy_from_slice(&q);
    }

    fn train(weight_decay: f64) -> (Vec<f32>, Vec<f32>, Vec<f64>) {
        let store = store();
        let mut optimizer = Optimizer::new(&store, AdamConfig { weight_decay, ..Default::default() });
        let mut norms = Vec::new();
        for grads in GRADS {
            set_grads(&store, grads);
            norms.push(clip_grad_norm(&store, 1.0).unwrap().norm);
            optimizer.step(&store, 0.01).unwrap();
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
        let mut first = Optimizer::new(&straight, AdamConfig::default());
        let mut second = Optimizer::new(&resumed, AdamConfig::default());
        for grads in GRADS {
            set_grads(&straight, grads);
            first.step(&straight, 0.01).unwrap();
            set_grads(&resumed, grads);
            let mut fresh = Optimizer::new(&resumed, AdamConfig::default());
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
        let mut optimizers = [&slices, &straight, &resumed].map(|store| Optimizer::new(store, config));
        for (p, q) in GRADS {
            set_grads(&slices, (p, q));
            for store in [&straight, &resumed] {
                store.zero_grad();
                store.get("p.bias").unwrap().set_grad(&p).unwrap();
                store.get("q.weight").unwrap().set_grad(&q).unwrap();
            }
            let moments = optimizers[2].moments(&resumed).unwrap().into_iter().map(Cow::into_owned).collect();
            let steps = optimizers[2].step_count();
            optimizers[2].restore(&resumed, moments, steps).unwrap();
            let norms: Vec<GradNorm> =
                [&slices, &straight, &resumed].map(|store| clip_grad_norm(store, 1.0).unwrap()).into();
            assert!((norms[0].norm - norms[1].norm).abs() < 1e-6 && norms[1] == norms[2], "{norms:?}");
            assert!((norms[0].mean - norms[1].mean).abs() < 1e-6, "{norms:?}");
            for (optimizer, store) in optimizers.iter_mut().zip([&slices, &straight, &resumed]) {
                optimizer.step(store, 0.01).unwrap();
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
}
