//! candle-nn modules whose tensors are parameters of the store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;

use super::init::{Init, Start};
use super::store::{ParamScope, decays_by_name};
use super::value::Param;
use crate::device::Place;
use crate::error::Result;
use crate::mode::Mode;

type Params = BTreeMap<String, Arc<Param>>;
type Build<M> = dyn Fn(VarBuilder) -> candle_core::Result<M> + Send + Sync;

/// A candle-nn module, or any type that is built from a [`VarBuilder`], over parameters of a store.
///
/// A candle-nn module captures its tensors when it is built, and the tensors decide whether candle records a graph.
/// This type therefore keeps the constructor, and [`at`](Self::at) builds the module again for each pass: over
/// variables in training, and over detached tensors in evaluation, so that evaluation builds no graph. Building copies
/// no weights.
pub struct CandleModule<M> {
    build: Box<Build<M>>,
    prefix: String,
    place: Place,
    params: Arc<Params>,
}

impl<M> CandleModule<M> {
    /// Builds the module over the current values of its parameters.
    ///
    /// # Errors
    /// Errors of the constructor, or a tensor that it did not ask for when the parameters were created.
    pub fn at(&self, mode: Mode) -> Result<M> {
        let given = Mutex::default();
        let backend = Present { params: self.params.clone(), mode, given };
        Ok((self.build)(builder(Box::new(backend), &self.prefix, &self.place))?)
    }
}

impl ParamScope<'_> {
    /// Creates a parameter for each tensor that a candle-nn module asks for, under the module's own names:
    ///
    /// ```
    /// # use mblm_compute::{mode::Mode, nn::{self, Module}, param::ParamStore};
    /// # let mut store = ParamStore::new(0);
    /// # let mut params = store.root();
    /// # let (dim, hidden) = (4, 8);
    /// let up = params.sub("up").candle(move |vb| nn::linear(dim, hidden, vb))?; // creates up.weight and up.bias
    /// # let x = candle_core::Tensor::zeros((2, dim), candle_core::DType::F32, &candle_core::Device::Cpu)?;
    /// let y = up.at(Mode::Eval)?.forward(&x)?;
    /// # Ok::<_, mblm_compute::Error>(())
    /// ```
    ///
    /// `build` is called once here, over zeros that take no memory, and then at each [`CandleModule::at`]. It must ask for
    /// the same tensors each time. The builder's prefix is the scope's, so [`VarBuilder::prefix`] is unique in the model.
    ///
    /// A tensor starts as its [`candle_nn::Init`] says, drawn from the store's seed. Weight decay acts on tensors of two
    /// or more dimensions whose name begins with `weight`; build an embedding in a scope with [`no_decay`](Self::no_decay).
    /// A name that is asked for twice is one parameter with two uses (tied weights).
    ///
    /// # Errors
    /// Errors of `build` and of creating a parameter; a tensor that is not `f32` on the CPU, is outside this scope, or
    /// was requested with another shape before.
    pub fn candle<M>(
        &mut self,
        build: impl Fn(VarBuilder) -> candle_core::Result<M> + Send + Sync + 'static,
    ) -> Result<CandleModule<M>> {
        let (prefix, place) = (self.prefix().to_string(), self.place().clone());
        let creator = Creator(Mutex::new(Created { scope: self.reborrow(), params: Params::new() }));
        build(builder(Box::new(&creator), &prefix, &place))?;
        let params = creator.0.into_inner().unwrap_or_else(PoisonError::into_inner).params;
        Ok(CandleModule { build: Box::new(build), prefix, place, params: Arc::new(params) })
    }
}

fn builder<'a>(backend: Box<dyn SimpleBackend + 'a>, prefix: &str, place: &Place) -> VarBuilder<'a> {
    let builder = VarBuilder::from_backend(backend, place.dtype, place.device.clone());
    if prefix.is_empty() { builder } else { builder.push_prefix(prefix) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Creates the parameters that a module asks for when it is built first.
struct Creator<'a>(Mutex<Created<'a>>);

struct Created<'a> {
    scope: ParamScope<'a>,
    params: Params,
}

impl SimpleBackend for &Creator<'_> {
    fn get(&self, shape: Shape, name: &str, init: candle_nn::Init, dtype: DType, device: &Device) -> Answer {
        let mut created = lock(&self.0);
        check_kind(name, dtype, device, created.scope.place())?;
        if let Some(param) = created.params.get(name) {
            check_shape(param, &shape)?;
        } else {
            let prefix = created.scope.prefix();
            let inside = if prefix.is_empty() { Some(name) } else { strip(name, prefix) };
            let Some(inside) = inside else {
                candle_core::bail!(
                    "a module of {prefix} asks for {name}, which lies outside: do not use `root` or `set_prefix`"
                )
            };
            let start = start(init, &shape);
            let param = match decays_by_name(name, shape.dims()) {
                true => created.scope.weight(inside, shape.dims(), start)?,
                false => created.scope.param(inside, shape.dims(), start)?,
            };
            created.params.insert(name.into(), param);
        }
        // One zero, seen as many.
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Answer {
        let shape = lock(&self.0).params.get(name).map(|param| Shape::from(param.shape()));
        match shape {
            Some(shape) => self.get(shape, name, candle_nn::init::ZERO, dtype, device),
            None => without_shape(name),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        lock(&self.0).params.contains_key(name)
    }
}

/// The parameters that exist, for one pass.
struct Present {
    params: Arc<Params>,
    mode: Mode,
    /// What was handed out. A module that asks what there is gets the same answers as when it was built first.
    given: Mutex<BTreeSet<String>>,
}

impl SimpleBackend for Present {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, dtype: DType, device: &Device) -> Answer {
        let Some(param) = self.params.get(name) else {
            candle_core::bail!(
                "a module asks for {name}, which it did not ask for when it was built first: the function given to \
                 `ParamScope::candle` must build the same module each time"
            )
        };
        check_kind(name, dtype, device, param.place())?;
        check_shape(param, &shape)?;
        lock(&self.given).insert(name.into());
        Ok(param.tensor(self.mode))
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Answer {
        match self.params.get(name).filter(|_| self.contains_tensor(name)) {
            Some(param) => self.get(param.shape().into(), name, candle_nn::init::ZERO, dtype, device),
            None => without_shape(name),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        lock(&self.given).contains(name)
    }
}

type Answer = candle_core::Result<Tensor>;

fn strip<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    name.strip_prefix(prefix)?.strip_prefix('.')
}

fn check_kind(name: &str, dtype: DType, device: &Device, place: &Place) -> candle_core::Result<()> {
    if dtype != place.dtype || !device.same_device(&place.device) {
        let (found, kind, expected) = (device.location(), place.dtype, place.device.location());
        candle_core::bail!(
            "a module asks for {name} as {dtype:?} on {found:?}; parameters are {kind:?} on {expected:?}: convert inside \
             `forward`"
        )
    }
    Ok(())
}

fn check_shape(param: &Param, shape: &Shape) -> candle_core::Result<()> {
    if param.shape() != shape.dims() {
        let (name, before) = (param.name(), param.shape());
        candle_core::bail!("a module asks for {name} of shape {:?}, and asked for {before:?} before", shape.dims())
    }
    Ok(())
}

fn without_shape(name: &str) -> Answer {
    candle_core::bail!("a module asks for {name} without its shape; a parameter that is created needs one: use `get`")
}

/// The distribution that candle's `init` means for a tensor of `shape`.
fn start(init: candle_nn::Init, shape: &Shape) -> Start {
    use candle_nn::Init::{Const, Kaiming, Randn, Uniform};
    match init {
        Const(value) => Init::Const(value as f32).into(),
        Randn { mean: 0.0, stdev } => Init::Normal.times(stdev as f32),
        Randn { mean, stdev } => Init::NormalWith { mean: mean as f32, std: stdev as f32 }.into(),
        Uniform { lo, up } if lo == -up => Init::Uniform(up as f32).into(),
        Uniform { lo, up } => Init::UniformBetween { low: lo as f32, high: up as f32 }.into(),
        // He et al. 2015.
        Kaiming { dist, fan, non_linearity } => {
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => Init::Normal.times(std as f32),
                NormalOrUniform::Uniform => Init::Uniform((3f64.sqrt() * std) as f32).into(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_nn::init::{FanInOut, NonLinearity};
    use candle_nn::{Linear, Module};

    use super::*;
    use crate::param::ParamStore;

    fn input(shape: (usize, usize)) -> Tensor {
        Tensor::from_vec(crate::testing::noise(shape.0 * shape.1, 5), shape, &Device::Cpu).unwrap()
    }

    fn floats(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_module_is_made_of_parameters_under_its_own_names() {
        let mut store = ParamStore::new(3);
        let mut root = store.root();
        let linear = root.sub("stage.0").candle(|vb| candle_nn::linear(3, 2, vb.pp("up"))).unwrap();
        let table = root.sub("emb").no_decay().candle(|vb| candle_nn::embedding(5, 4, vb)).unwrap();
        let names = |param: &Arc<Param>| (param.name().to_string(), param.shape().to_vec(), param.weight_decay());
        let want = [
            ("emb.weight", vec![5, 4], false),
            ("stage.0.up.bias", vec![2], false),
            ("stage.0.up.weight", vec![2, 3], true),
        ];
        assert_eq!(
            store.iter().map(names).collect::<Vec<_>>(),
            want.map(|(name, shape, decay)| (name.into(), shape, decay))
        );
        let (weight, bias) = (store.get("stage.0.up.weight").unwrap(), store.get("stage.0.up.bias").unwrap());
        assert_eq!(weight.start(), Init::Normal.times((2f64 / 3.0).sqrt() as f32));
        assert_eq!(bias.start(), Init::Uniform((1.0 / 3f64.sqrt()) as f32).into());
        let x = input((4, 3));
        let want = x.matmul(&weight.tensor(Mode::Eval).t().unwrap()).unwrap();
        let want = want.broadcast_add(&bias.tensor(Mode::Eval)).unwrap();
        assert_eq!(floats(&linear.at(Mode::Eval).unwrap().forward(&x).unwrap()), floats(&want));
        let ids = Tensor::new(&[4u32, 0], &Device::Cpu).unwrap();
        let rows = floats(&table.at(Mode::Eval).unwrap().forward(&ids).unwrap());
        assert_eq!(rows[..4], store.get("emb.weight").unwrap().values()[16..]);
    }

    #[test]
    fn training_and_evaluation_see_updates_and_only_training_builds_a_graph() {
        let mut store = ParamStore::new(3);
        let linear = store.root().candle(|vb| candle_nn::linear(3, 2, vb)).unwrap();
        let x = input((4, 3));
        let forward = |mode| linear.at(mode).unwrap().forward(&x).unwrap();
        let (train, eval) = (forward(Mode::train(0)), forward(Mode::Eval));
        assert_eq!(floats(&train), floats(&eval));
        assert!(train.track_op() && !eval.track_op(), "a graph keeps activations alive");
        let weight = store.get("weight").unwrap();
        weight.update(|values| values.fill(7.0)).unwrap();
        assert_ne!(floats(&forward(Mode::Eval)), floats(&eval));
        assert_eq!(floats(&forward(Mode::Eval)), floats(&forward(Mode::train(0))));
        store.backward(&train.sum_all().unwrap()).unwrap();
        assert_eq!(**store.get("bias").unwrap().grad(), [4.0, 4.0]);
        assert!(weight.grad().iter().all(|grad| grad.is_finite() && *grad != 0.0));
    }

    #[test]
    fn building_a_huge_module_takes_no_memory() {
        let mut store = ParamStore::unlimited(0);
        let size = 1 << 22;
        store.root().candle(move |vb| candle_nn::linear(size, size, vb)).unwrap();
        assert_eq!(store.num_elements(), size * size + size, "64 TiB of weights");
        let mut store = ParamStore::new(0);
        let error = store.root().candle(move |vb| candle_nn::linear(size, size, vb)).err().unwrap().to_string();
        assert!(error.contains("parameter weight of shape [4194304, 4194304] does not fit"), "{error}");
    }

    #[test]
    fn every_distribution_of_candle_has_its_counterpart() {
        let shape = Shape::from((8, 4, 3));
        let (relu, linear) = (NonLinearity::ReLU, NonLinearity::Linear);
        let kaiming = |dist, fan, non_linearity| candle_nn::Init::Kaiming { dist, fan, non_linearity };
        let cases = [
            (candle_nn::Init::Const(2.5), Init::Const(2.5).into()),
            (candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 }, Init::Normal.times(0.02)),
            (candle_nn::Init::Randn { mean: 1.0, stdev: 0.5 }, Init::NormalWith { mean: 1.0, std: 0.5 }.into()),
            (candle_nn::Init::Uniform { lo: -0.5, up: 0.5 }, Init::Uniform(0.5).into()),
            (candle_nn::Init::Uniform { lo: 1.0, up: 3.0 }, Init::UniformBetween { low: 1.0, high: 3.0 }.into()),
            // Fan in 4 x 3, fan out 8 x 3.
            (kaiming(NormalOrUniform::Normal, FanInOut::FanIn, relu), Init::Normal.times((2f64 / 12.0).sqrt() as f32)),
            (
                kaiming(NormalOrUniform::Uniform, FanInOut::FanOut, linear),
                Init::Uniform((3f64 / 24.0).sqrt() as f32).into(),
            ),
        ];
        for (init, want) in cases {
            let got = start(init, &shape);
            let close = |(a, b): (f32, f32)| (a - b).abs() < 1e-7;
            match (got.init, want.init) {
                (Init::Uniform(a), Init::Uniform(b)) => assert!(close((a, b)), "{init:?}: {got:?}"),
                (a, b) => assert!(a == b && close((got.gain, want.gain)), "{init:?}: {got:?}"),
            }
        }
    }

    #[test]
    fn one_name_is_one_parameter() {
        let mut store = ParamStore::new(0);
        let tied = |vb: VarBuilder| {
            let first = candle_nn::linear_no_bias(3, 3, vb.clone())?;
            assert!(vb.contains_tensor("weight") && !vb.contains_tensor("gamma"), "in every pass");
            Ok((first, Linear::new(vb.get_unchecked("weight")?, None)))
        };
        let tied = store.root().candle(tied).unwrap();
        let (first, second) = tied.at(Mode::train(0)).unwrap();
        let x = input((2, 3));
        let y = second.forward(&first.forward(&x).unwrap()).unwrap();
        store.backward(&y.sum_all().unwrap()).unwrap();
        assert_eq!(store.iter().count(), 1);
        assert!(store.get("weight").unwrap().grad().iter().all(|grad| *grad != 0.0));
    }

    #[test]
    fn what_cannot_be_a_parameter_is_an_error_that_says_why() {
        fn error(build: impl Fn(VarBuilder) -> candle_core::Result<Tensor> + Send + Sync + 'static) -> String {
            let mut store = ParamStore::new(0);
            store.root().param("a.taken", &[2], Init::Normal).unwrap();
            store.root().sub("a").candle(build).err().unwrap().to_string()
        }
        let twice = error(|vb| vb.get(2, "b").and_then(|_| vb.get(3, "b")));
        assert!(twice.contains("a module asks for a.b of shape [3], and asked for [2] before"), "{twice}");
        let half = error(|vb| vb.to_dtype(DType::F16).get(2, "b"));
        assert!(half.contains("a module asks for a.b as F16 on Cpu; parameters are F32 on Cpu"), "{half}");
        let unknown = error(|vb| vb.get_unchecked("b"));
        assert!(unknown.contains("a.b without its shape"), "{unknown}");
        let outside = error(|vb| vb.root().get(2, "b"));
        assert!(outside.contains("a module of a asks for b, which lies outside"), "{outside}");
        let taken = error(|vb| vb.get(2, "taken"));
        assert!(taken.contains("parameter a.taken is created twice"), "{taken}");
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let other =
            move |vb: VarBuilder| vb.get(2, &calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string());
        let mut store = ParamStore::new(0);
        let error = store.root().candle(other).unwrap().at(Mode::Eval).err().unwrap().to_string();
        assert!(error.contains("asks for 1, which it did not ask for when it was built first"), "{error}");
    }
}
