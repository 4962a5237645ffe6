//! All parameters of a model, and the scopes in which modules create them.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use mblm_base::memory;
use rayon::prelude::*;

use super::arena::Arena;
use super::init::{Init, Start};
use super::part::Part;
use super::value::{Made, Param};
use crate::device::Place;
use crate::error::{Error, Result};

/// The maximum number of tensors in a model. It stops a mistyped number of layers before it fills the memory with
/// names.
pub const MAX_TENSORS: usize = 1 << 20;
/// The maximum number of learned numbers in a model. The bytes of several copies fit in 63 bits.
const MAX_ELEMENTS: usize = 1 << 56;

/// All parameters of a model, sorted by name.
pub struct ParamStore {
    params: BTreeMap<String, Arc<Param>>,
    seed: u64,
    num_elements: usize,
    /// Bytes that the values may take; none if they are not to be read.
    limit: Option<memory::Limit>,
    place: Place,
    /// Where all gradients lie together, once somebody wanted them so.
    pub(super) arena: OnceLock<Arc<Arena>>,
}

impl ParamStore {
    /// Creates an empty store. `seed` determines all initial values. Parameters that do not fit in memory are an error.
    pub fn new(seed: u64) -> Self {
        ParamStore { limit: memory::available(), ..Self::unlimited(seed) }
    }

    /// Like [`new`](Self::new), but without the limit: for counting parameters that need not fit in memory. Their
    /// values can still be read.
    pub fn unlimited(seed: u64) -> Self {
        ParamStore {
            params: BTreeMap::new(),
            seed,
            num_elements: 0,
            limit: None,
            place: Place::default(),
            arena: OnceLock::new(),
        }
    }

    /// Creates parameters at `place`, those that are created later.
    pub fn at(self, place: Place) -> Self {
        ParamStore { place, ..self }
    }

    /// Where parameters are created.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Draws all initial values on all threads. Values that are created later are drawn when they are first read.
    pub fn draw(&self) {
        self.params.par_iter().for_each(|(_, param)| _ = param.var());
    }

    /// Returns the scope without a prefix.
    pub fn root(&mut self) -> ParamScope<'_> {
        let place = self.place.clone();
        ParamScope { store: self, prefix: String::new(), may_decay: true, part: None, place }
    }

    /// The parameters, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Param>> {
        self.params.values()
    }

    /// Returns the parameter with this name.
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

    /// Runs the backward pass from `loss` and adds the gradient of every parameter to its buffer.
    ///
    /// Fused layers add the gradients of their parameters during the pass. Gradients in candle's graph are added here,
    /// and only here. The row of the pad token gets no gradient. Returns the gradients of the graph itself, for example
    /// of inputs.
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        let grads = loss.backward()?;
        fold_gradients(self.iter(), &grads)?;
        for param in self.iter() {
            if let Some(row) = param.zero_row() {
                param.zero_grad_row(row)?;
            }
        }
        Ok(grads)
    }

    /// Sets every gradient to zero.
    pub fn zero_grad(&self) {
        self.iter().for_each(|param| param.grad().clear());
    }

    /// Replaces all values. Names and shapes must match exactly; the error lists what does not match.
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
pub fn fold_gradients<'a>(params: impl Iterator<Item = &'a Arc<Param>>, grads: &GradStore) -> Result<()> {
    for param in params {
        // What was never drawn is in no graph.
        if let Some(from_graph) = param.drawn().and_then(|var| grads.get(var.as_tensor())) {
            param.add_grad(from_graph)?;
        }
    }
    Ok(())
}

/// The place in which a module creates its parameters: a store and a name prefix.
pub struct ParamScope<'a> {
    store: &'a mut ParamStore,
    prefix: String,
    /// Whether weight decay may act on what is created here.
    may_decay: bool,
    part: Option<Part>,
    place: Place,
}

impl ParamScope<'_> {
    /// The scope `prefix.name`.
    pub fn sub(&mut self, name: impl std::fmt::Display) -> ParamScope<'_> {
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        ParamScope { prefix, ..self.reborrow() }
    }

    /// The same scope, but parameters created in it do not decay, and none counts as the matrix of a linear layer. Use it for
    /// embeddings, for example.
    pub fn no_decay(&mut self) -> ParamScope<'_> {
        ParamScope { may_decay: false, ..self.reborrow() }
    }

    /// The same scope, for a part of the model: what is created in it belongs to that part.
    pub fn of(&mut self, part: Part) -> ParamScope<'_> {
        ParamScope { part: Some(part), ..self.reborrow() }
    }

    /// The part of the model that the scope is for.
    pub fn part(&self) -> Option<Part> {
        self.part
    }

    /// The same scope, but parameters created in it are `f32` on the CPU, wherever those of the model lie.
    pub fn on_host(&mut self) -> ParamScope<'_> {
        ParamScope { place: Place::default(), ..self.reborrow() }
    }

    /// Where parameters are created.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The same scope, for a shorter time.
    pub(super) fn reborrow(&mut self) -> ParamScope<'_> {
        let (prefix, place) = (self.prefix.clone(), self.place.clone());
        ParamScope { store: self.store, prefix, may_decay: self.may_decay, part: self.part, place }
    }

    /// The prefix of this scope. Together with the model's seed, it identifies the random stream of a module.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Creates a parameter without weight decay: a bias, a gain, `A_log`, `D`. Use [`weight`](Self::weight) for the
    /// matrix of a linear layer or a convolution.
    pub fn param(&mut self, name: &str, shape: &[usize], start: impl Into<Start>) -> Result<Arc<Param>> {
        self.create(name, shape, start.into(), None, false)
    }

    /// Creates a parameter with weight decay: the matrix of a linear layer or a convolution. With `train.optimizer: muon`, the
    /// one of a linear layer, which has two dimensions, is updated by Muon.
    pub fn weight(&mut self, name: &str, shape: &[usize], start: impl Into<Start>) -> Result<Arc<Param>> {
        self.create(name, shape, start.into(), None, true)
    }

    /// Creates an embedding table `(rows, dim)` without weight decay. Row `zero_row` is zero and stays zero.
    pub fn embedding(&mut self, rows: usize, dim: usize, zero_row: Option<usize>) -> Result<Arc<Param>> {
        self.create("weight", &[rows, dim], Init::Normal.into(), zero_row, false)
    }

    fn create(
        &mut self,
        name: &str,
        shape: &[usize],
        start: Start,
        zero_row: Option<usize>,
        decay: bool,
    ) -> Result<Arc<Param>> {
        let name = self.sub(name).prefix;
        if self.store.params.contains_key(&name) {
            return Err(Error::Weights(format!("parameter {name} is created twice")));
        }
        let num_elements = self.store.num_elements_with(&name, shape)?;
        let decay = decay && self.may_decay;
        let made = Made { seed: self.store.seed, start, zero_row, weight_decay: decay, part: self.part };
        let param = Arc::new(Param::new(name.clone(), shape, self.place.clone(), made));
        self.store.num_elements = num_elements;
        self.store.params.insert(name, param.clone());
        Ok(param)
    }
}

/// Whether weight decay acts on a parameter whose maker does not say: on tensors of two or more dimensions whose last name
/// begins with `weight`, as layers call their matrices.
pub fn decays_by_name(name: &str, shape: &[usize]) -> bool {
    shape.len() >= 2 && name.rsplit('.').next().is_some_and(|last| last.starts_with("weight"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::Mode;

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
    fn whether_a_parameter_decays_is_said_where_it_is_created() {
        let mut store = ParamStore::new(0);
        let mut root = store.root();
        let mut scope = root.sub("member.emb");
        assert!(scope.weight("weight", &[4, 4], Init::Normal).unwrap().weight_decay());
        assert!(scope.weight("table", &[4], Init::Normal).unwrap().weight_decay());
        assert!(!scope.param("weight_1", &[4, 4], Init::Normal).unwrap().weight_decay());
        assert!(!scope.sub("embedding").embedding(3, 2, Some(1)).unwrap().weight_decay());
        assert!(!scope.no_decay().sub("a").weight("weight", &[4, 4], Init::Normal).unwrap().weight_decay());
    }

    #[test]
    fn a_matrix_is_a_weight_of_two_dimensions() {
        let mut store = ParamStore::new(0);
        let mut root = store.root();
        assert!(root.weight("in_proj", &[6, 4], Init::Normal).unwrap().is_matrix());
        assert!(!root.weight("conv", &[6, 1, 4], Init::Normal).unwrap().is_matrix());
        assert!(!root.param("A_log", &[6, 4], Init::Normal).unwrap().is_matrix());
        assert!(!root.sub("table").embedding(3, 2, None).unwrap().is_matrix());
        assert!(!root.no_decay().weight("candle_table", &[3, 2], Init::Normal).unwrap().is_matrix());
    }

    #[test]
    fn names_decide_only_for_makers_that_do_not_say() {
        assert!(decays_by_name("a.weight", &[4, 4]) && decays_by_name("weight_ih_l0", &[4, 4]));
        assert!(!decays_by_name("bias", &[4]) && !decays_by_name("A_log", &[4, 4]) && !decays_by_name("weight", &[4]));
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
            assert_eq!(table.drawn().is_some(), draw);
            table.values().to_vec()
        };
        assert_eq!(make(true), make(false));
        assert_eq!(make(true)[6..9], [0.0; 3]);
    }
}
