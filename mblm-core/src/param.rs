//! Parameters: values, gradient buffers that accumulate, and reproducible initial values.
//!
//! Names are those of the reference package's `state_dict`, so weights travel both ways unchanged. Creating a parameter
//! allocates nothing: its values are drawn when they are first read. So a model can be counted without its memory.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, StorageRef, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::block::Mode;
use crate::error::{Error, Result};
use crate::{memory, parallel};

/// Tensors in a model, at most: a mistyped number of layers ends here, before it fills the memory with names.
pub(crate) const MAX_TENSORS: usize = 1 << 20;
/// Learned numbers in a model, at most: the bytes of several copies fit 63 bits.
const MAX_ELEMENTS: usize = 1 << 56;

/// How a parameter starts. The random ones draw from a stream of their own, keyed by seed and parameter name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Every element the same.
    Const(f32),
    /// Normal with mean 0 and standard deviation 1 (`torch.nn.Embedding`, `torch.randn`).
    Normal,
    /// Uniform in `[-bound, bound]`.
    Uniform(f32),
    /// `ln u` with `u` uniform in `[low, high]` (Mamba-2's `A_log`).
    LogUniform(f32, f32),
    /// `ln(1), …, ln(n)` along the last dimension (Mamba-1's `A_log`, the S4D-real initialisation).
    LogRange,
    /// The inverse softplus of a step size drawn log-uniformly from `[0.001, 0.1]`, at least 1e-4 (Mamba's `dt` bias).
    InverseSoftplusDt,
}

impl Init {
    /// PyTorch's default for the weight and the bias of `Linear` and `Conv1d`: uniform within `1 / sqrt(fan_in)`.
    pub fn linear(fan_in: usize) -> Self {
        Init::Uniform(1.0 / (fan_in as f32).sqrt())
    }

    fn values(self, shape: &[usize], rng: &mut ChaCha8Rng) -> Vec<f32> {
        let last = shape.last().copied().unwrap_or(1);
        let uniform = |rng: &mut ChaCha8Rng| (rng.next_u32() >> 8) as f64 / (1u32 << 24) as f64;
        let draw = |i: usize, rng: &mut ChaCha8Rng| -> f64 {
            match self {
                Init::Const(value) => value as f64,
                Init::Normal => {
                    // Box & Muller 1958; 1 - u keeps the logarithm finite.
                    let (u, v) = (1.0 - uniform(rng), uniform(rng));
                    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
                }
                Init::Uniform(bound) => (2.0 * uniform(rng) - 1.0) * bound as f64,
                Init::LogUniform(low, high) => (low as f64 + uniform(rng) * (high - low) as f64).ln(),
                Init::LogRange => ((i % last + 1) as f64).ln(),
                Init::InverseSoftplusDt => {
                    let (low, high) = (0.001f64.ln(), 0.1f64.ln());
                    let dt = (low + uniform(rng) * (high - low)).exp().max(1e-4);
                    dt + (-(-dt).exp_m1()).ln()
                }
            }
        };
        (0..shape.iter().product()).map(|i| draw(i, rng) as f32).collect()
    }
}

/// One learned tensor: its value, and the gradient that backward passes add to.
pub struct Param {
    name: String,
    shape: Vec<usize>,
    /// Drawn when it is first read.
    var: OnceLock<Var>,
    /// Of the store.
    seed: u64,
    grad: Mutex<Gradient>,
    version: AtomicU64,
    zero_row: Option<usize>,
    weight_decay: bool,
    start: Start,
}

/// The memory of an accumulated gradient: a parameter's own, or a host's for the length of a call.
#[derive(Debug, Default)]
pub struct Gradient {
    own: Vec<f32>,
    lent: Option<Lent>,
}

#[derive(Clone, Copy, Debug)]
struct Lent(*mut [f32]);

// SAFETY: whoever lends has the only borrow of that memory, and gives it to whoever holds the gradient's lock.
unsafe impl Send for Lent {}

impl Deref for Gradient {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self.lent {
            // SAFETY: borrowed for as long as it is lent, see `Param::lend_grad`.
            Some(Lent(memory)) => unsafe { &*memory },
            None => &self.own,
        }
    }
}

impl DerefMut for Gradient {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self.lent {
            // SAFETY: as above; the lock makes this the only access.
            Some(Lent(memory)) => unsafe { &mut *memory },
            None => &mut self.own,
        }
    }
}

/// Ends a loan when it is dropped.
pub(crate) struct Loan<'a>(&'a Param);

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.0.grad().lent = None;
    }
}

/// How a parameter started: its distribution, times a gain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// The distribution.
    pub init: Init,
    /// What its draws are multiplied by.
    pub gain: f32,
}

impl std::fmt::Debug for Param {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Param({} {:?})", self.name, self.shape())
    }
}

/// A parameter's values, borrowed as a slice.
pub struct Values<'a>(StorageRef<'a>);

impl Deref for Values<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.0 {
            Storage::Cpu(CpuStorage::F32(values)) => values,
            _ => unreachable!("parameters are created as f32 on the CPU"),
        }
    }
}

impl Param {
    /// The name in checkpoints, for example `stage_models.0.norm.g`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a parameter without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// False for the parameters that weight decay must leave alone: biases, gains, embeddings, `A_log`, `D`.
    pub fn weight_decay(&self) -> bool {
        self.weight_decay
    }

    /// How the initial values were drawn.
    pub fn start(&self) -> Start {
        self.start
    }

    /// The row of an embedding that stays zero.
    pub(crate) fn zero_row(&self) -> Option<usize> {
        self.zero_row
    }

    fn var(&self) -> &Var {
        self.var.get_or_init(|| {
            let mut hash = Sha256::new();
            hash.update(self.seed.to_le_bytes());
            hash.update(self.name.as_bytes());
            let Start { init, gain } = self.start;
            let mut values = init.values(&self.shape, &mut ChaCha8Rng::from_seed(hash.finalize().into()));
            values.iter_mut().for_each(|v| *v *= gain);
            if let Some(row) = self.zero_row {
                values[row * self.shape[1]..(row + 1) * self.shape[1]].fill(0.0);
            }
            match Tensor::from_vec(values, &self.shape[..], &Device::Cpu).and_then(|values| Var::from_tensor(&values)) {
                Ok(var) => var,
                Err(error) => unreachable!("as many values as the shape says, on the CPU: {error}"),
            }
        })
    }

    /// The value as a tensor: a node of the graph in training, detached otherwise.
    pub fn tensor(&self, mode: Mode) -> Tensor {
        match mode {
            Mode::Train { .. } => self.var().as_tensor().clone(),
            Mode::Eval => self.var().as_detached_tensor(),
        }
    }

    /// The value as a slice. Do not update the parameter while the borrow lives.
    pub fn values(&self) -> Values<'_> {
        Values(self.var().storage_and_layout().0)
    }

    /// The accumulated gradient; empty until something was added.
    pub fn grad(&self) -> MutexGuard<'_, Gradient> {
        self.grad.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The accumulated gradient, allocated, for a backward pass to add to.
    pub fn grad_mut(&self) -> MutexGuard<'_, Gradient> {
        let mut grad = self.grad();
        if grad.is_empty() {
            grad.own.resize(self.len(), 0.0);
        }
        grad
    }

    /// Until the loan is dropped, gradients are added to `memory`.
    ///
    /// # Safety
    /// The loan must be dropped, not forgotten.
    pub(crate) unsafe fn lend_grad<'a>(&'a self, memory: &'a mut [f32]) -> Loan<'a> {
        assert_eq!(memory.len(), self.len(), "memory for the gradient of {}", self.name);
        self.grad().lent = Some(Lent(memory));
        Loan(self)
    }

    /// Grows with every update, so that whoever keeps a copy knows when it is stale.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Changes the value in place.
    pub fn update(&self, change: impl FnMut(&mut [f32])) -> Result<()> {
        struct Change<F>(Mutex<F>);
        impl<F: FnMut(&mut [f32])> InplaceOp1 for Change<F> {
            fn name(&self) -> &'static str {
                "param-update"
            }
            fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
                let CpuStorage::F32(values) = storage else { candle_core::bail!("parameters are f32") };
                (*self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))(values);
                Ok(())
            }
        }
        self.var().as_tensor().inplace_op1(&Change(Mutex::new(change)))?;
        self.version.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

/// All parameters of a model, sorted by name.
pub struct ParamStore {
    params: BTreeMap<String, Arc<Param>>,
    seed: u64,
    num_elements: usize,
    /// Bytes that the values may take; none if they are not to be read.
    limit: Option<memory::Limit>,
}

impl ParamStore {
    /// An empty store whose initial values follow from `seed`. It refuses parameters that do not fit in memory.
    pub fn new(seed: u64) -> Self {
        ParamStore { limit: memory::available(), ..Self::unlimited(seed) }
    }

    /// As [`new`](Self::new), for parameters that are counted and need not fit in memory. Their values can be read all
    /// the same.
    pub fn unlimited(seed: u64) -> Self {
        ParamStore { params: BTreeMap::new(), seed, num_elements: 0, limit: None }
    }

    /// Draws all initial values, on all threads. Those that are not drawn here are drawn when they are first read.
    pub fn draw(&self) {
        self.params.par_iter().for_each(|(_, param)| _ = param.var());
    }

    /// The scope without a prefix.
    pub fn root(&mut self) -> ParamScope<'_> {
        ParamScope { store: self, prefix: String::new() }
    }

    /// The parameters, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Param>> {
        self.params.values()
    }

    /// The parameter called `name`.
    pub fn get(&self, name: &str) -> Option<&Arc<Param>> {
        self.params.get(name)
    }

    /// The number of learned numbers.
    pub fn num_elements(&self) -> usize {
        self.num_elements
    }

    /// The number of learned numbers with one more parameter.
    ///
    /// # Errors
    /// Its values do not fit in memory, where the system would end the process; or the model has too many tensors.
    fn num_elements_with(&self, name: &str, shape: &[usize]) -> Result<usize> {
        let refuse = |reason: String| {
            let before = self.num_elements;
            Err(Error::Input(format!(
                "parameter {name} of shape {shape:?} does not fit: {reason}; the model has {before} parameters before \
                 it; make it smaller"
            )))
        };
        if self.params.len() == MAX_TENSORS {
            return refuse(format!("a model may have {MAX_TENSORS} tensors"));
        }
        let elements = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let sum = elements.and_then(|elements| elements.checked_add(self.num_elements));
        let Some(sum) = sum.filter(|&sum| sum <= MAX_ELEMENTS) else {
            return refuse(format!("a model may have {MAX_ELEMENTS} parameters"));
        };
        let bytes = (sum * size_of::<f32>()) as u64;
        match &self.limit {
            Some(limit) if bytes > limit.bytes => {
                refuse(format!("the weights would take {} with it, and {limit}", memory::gib(bytes)))
            }
            _ => Ok(sum),
        }
    }

    /// Runs backward from `loss` and adds the gradient of every parameter to its buffer.
    ///
    /// Fused layers deposit theirs on the way; those that candle's graph holds are folded in here, and only here. The
    /// row of the pad token gets none. Returns the graph's own gradients, of inputs for example.
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        let grads = loss.backward()?;
        fold_gradients(self.iter(), &grads)?;
        for param in self.iter() {
            if let Some(row) = param.zero_row {
                let width = param.shape()[1];
                if let Some(row) = param.grad().get_mut(row * width..(row + 1) * width) {
                    row.fill(0.0);
                }
            }
        }
        Ok(grads)
    }

    /// Sets every gradient to zero.
    pub fn zero_grad(&self) {
        self.iter().for_each(|p| parallel::clear(&mut p.grad()));
    }

    /// Replaces all values. Names and shapes must agree exactly; an error lists what does not.
    pub fn load(&self, weights: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Result<()> {
        let mut wrong = Vec::new();
        for param in self.iter() {
            match weights.get(param.name()) {
                None => wrong.push(format!("missing {}", param.name())),
                Some((shape, _)) if shape != param.shape() => {
                    wrong.push(format!("{}: expected shape {:?}, found {shape:?}", param.name(), param.shape()));
                }
                Some(_) => {}
            }
        }
        wrong.extend(weights.keys().filter(|n| !self.params.contains_key(*n)).map(|n| format!("unknown {n}")));
        if !wrong.is_empty() {
            return Err(Error::Weights(format!("the weights do not fit this model: {}", wrong.join("; "))));
        }
        for param in self.iter() {
            let (_, values) = &weights[param.name()];
            param.update(|slot| slot.copy_from_slice(values))?;
        }
        Ok(())
    }
}

/// Adds the gradients that candle's graph holds to the buffers of their parameters.
pub(crate) fn fold_gradients<'a>(params: impl Iterator<Item = &'a Arc<Param>>, grads: &GradStore) -> Result<()> {
    for param in params {
        // What was never drawn is in no graph.
        if let Some(from_graph) = param.var.get().and_then(|var| grads.get(var.as_tensor())) {
            crate::node::with_floats(from_graph, |grad| crate::simd::add(grad, &mut param.grad_mut()))?;
        }
    }
    Ok(())
}

/// Where a module creates its parameters: a store and a name prefix.
pub struct ParamScope<'a> {
    store: &'a mut ParamStore,
    prefix: String,
}

impl ParamScope<'_> {
    /// The scope `prefix.name`.
    pub fn sub(&mut self, name: impl std::fmt::Display) -> ParamScope<'_> {
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        ParamScope { store: self.store, prefix }
    }

    /// The prefix of this scope: with the model's seed, it tells a module's random stream from all others.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Creates a parameter. If it is a matrix whose last name is `weight…`, as layers call theirs, it decays; everything
    /// else does not: biases, gains, `A_log`, `D`.
    pub fn param(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Arc<Param>> {
        self.scaled_param(name, shape, init, 1.0)
    }

    /// Creates a parameter whose initial values are multiplied by `gain`.
    pub fn scaled_param(&mut self, name: &str, shape: &[usize], init: Init, gain: f32) -> Result<Arc<Param>> {
        let is_weight = name.rsplit('.').next().is_some_and(|last| last.starts_with("weight"));
        self.create(name, shape, init, None, gain, shape.len() >= 2 && is_weight)
    }

    /// Creates an embedding table `(rows, dim)` whose row `zero_row` is zero and stays so. It does not decay.
    pub fn embedding(&mut self, rows: usize, dim: usize, zero_row: Option<usize>) -> Result<Arc<Param>> {
        self.create("weight", &[rows, dim], Init::Normal, zero_row, 1.0, false)
    }

    fn create(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
        zero_row: Option<usize>,
        gain: f32,
        weight_decay: bool,
    ) -> Result<Arc<Param>> {
        let name = self.sub(name).prefix;
        if self.store.params.contains_key(&name) {
            return Err(Error::Weights(format!("parameter {name} is created twice")));
        }
        let num_elements = self.store.num_elements_with(&name, shape)?;
        let param = Arc::new(Param {
            weight_decay,
            name: name.clone(),
            shape: shape.into(),
            var: OnceLock::new(),
            seed: self.store.seed,
            grad: Mutex::default(),
            version: AtomicU64::new(0),
            zero_row,
            start: Start { init, gain },
        });
        self.store.num_elements = num_elements;
        self.store.params.insert(name, param.clone());
        Ok(param)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_seed_and_name_alone() {
        let make = |names: &[&str], seed| {
            let mut store = ParamStore::new(seed);
            names.iter().for_each(|n| drop(store.root().param(n, &[4, 3], Init::Normal).unwrap()));
            store.get("b").unwrap().values().to_vec()
        };
        let alone = make(&["b"], 7);
        assert_eq!(alone, make(&["a", "b", "c"], 7), "other parameters must not change this one");
        assert_ne!(alone, make(&["b"], 8));
    }

    #[test]
    fn normal_and_uniform_have_their_moments() {
        let mut store = ParamStore::new(0);
        let normal = store.root().param("n", &[100_000], Init::Normal).unwrap().values().to_vec();
        let mean = normal.iter().sum::<f32>() / 1e5;
        let variance = normal.iter().map(|v| v * v).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        let uniform = store.root().param("u", &[10_000], Init::linear(16)).unwrap().values().to_vec();
        assert!(uniform.iter().all(|v| v.abs() <= 0.25) && uniform.iter().any(|v| v.abs() > 0.249));
    }

    #[test]
    fn gradients_accumulate_and_the_zero_row_gets_none() {
        let mut store = ParamStore::new(0);
        let table = store.root().embedding(3, 2, Some(1)).unwrap();
        assert_eq!(&table.values()[2..4], [0.0, 0.0]);
        for _ in 0..2 {
            let loss = (table.tensor(Mode::train(0)) * 3.0).unwrap().sum_all().unwrap();
            store.backward(&loss).unwrap();
        }
        assert_eq!(**table.grad(), [6.0, 6.0, 0.0, 0.0, 6.0, 6.0]);
        store.zero_grad();
        assert_eq!(**table.grad(), [0.0; 6]);
    }

    #[test]
    fn what_a_parameter_is_decides_whether_it_decays_and_not_where_it_stands() {
        let mut store = ParamStore::new(0);
        let mut root = store.root();
        let mut scope = root.sub("token_embs_rev.1");
        assert!(!scope.sub("embedding").embedding(3, 2, Some(1)).unwrap().weight_decay());
        let decays = |name: &str, shape: &[usize], scope: &mut ParamScope| {
            scope.sub("_post.2").param(name, shape, Init::Normal).unwrap().weight_decay()
        };
        assert!(decays("weight", &[4, 4], &mut scope) && decays("weight_ih_l0", &[4, 4], &mut scope));
        assert!(!decays("bias", &[4], &mut scope) && !decays("A_log", &[4, 4], &mut scope));
        assert!(!decays("norm.weight", &[4], &mut scope));
    }

    #[test]
    fn load_lists_everything_that_does_not_fit() {
        let mut store = ParamStore::new(0);
        store.root().param("a", &[2], Init::Normal).unwrap();
        store.root().param("b", &[2], Init::Normal).unwrap();
        let weights = BTreeMap::from([("b".into(), (vec![3], vec![0.0; 3])), ("c".into(), (vec![1], vec![0.0]))]);
        let message = store.load(&weights).unwrap_err().to_string();
        for part in ["missing a", "b: expected shape [2], found [3]", "unknown c"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_parameter_larger_than_memory_is_an_error() {
        let mut store = ParamStore::new(0);
        store.root().param("a", &[7], Init::Const(1.0)).unwrap();
        let cases: [(&[usize], &str); 2] =
            [(&[1 << 45], "the weights would take 131072.00 GiB with it, and"), (&[usize::MAX, 3], "a model may have")];
        for (shape, reason) in cases {
            let error = store.root().param("b", shape, Init::Const(1.0)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("parameter b of shape {shape:?} does not fit: {reason}")), "{error}");
            assert!(error.contains("the model has 7 parameters before it"), "{error}");
        }
        assert_eq!(store.num_elements(), 7, "what was refused is not counted");
    }

    #[test]
    fn parameters_are_counted_without_their_memory() {
        let mut store = ParamStore::unlimited(0);
        for i in 0..4 {
            store.root().param(&i.to_string(), &[1 << 26, 1 << 26], Init::Normal).unwrap();
        }
        assert_eq!(store.num_elements(), 1 << 54, "64 PiB of weights");
        let error = store.root().param("4", &[1 << 56], Init::Normal).unwrap_err().to_string();
        assert!(error.contains("a model may have 72057594037927936 parameters"), "{error}");
    }

    #[test]
    fn so_many_tensors_end_a_model() {
        let mut store = ParamStore::unlimited(0);
        let error = (0..usize::MAX).find_map(|i| store.root().param(&i.to_string(), &[1], Init::Normal).err()).unwrap();
        assert!(error.to_string().starts_with("parameter 1048576 of shape [1] does not fit"), "{error}");
    }

    #[test]
    fn values_are_the_same_whenever_they_are_drawn() {
        let make = |draw: bool| {
            let mut store = ParamStore::new(3);
            let table = store.root().sub("t").embedding(5, 3, Some(2)).unwrap();
            if draw {
                store.draw();
            }
            assert_eq!(table.var.get().is_some(), draw);
            table.values().to_vec()
        };
        assert_eq!(make(true), make(false));
        assert_eq!(make(true)[6..9], [0.0; 3]);
    }

    #[test]
    fn an_update_changes_the_version() {
        let mut store = ParamStore::new(0);
        let param = store.root().param("a", &[2], Init::Const(1.0)).unwrap();
        let before = param.version();
        param.update(|v| v[0] = 5.0).unwrap();
        assert_eq!((&param.values()[..], param.version() > before), (&[5.0, 1.0][..], true));
    }
}
