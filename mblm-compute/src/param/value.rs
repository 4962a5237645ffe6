//! One parameter: its value, its gradient buffer, and how it started.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, StorageRef, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use super::gradient::Gradient;
use super::init::Start;
use super::part::Part;
use crate::device::Place;
use crate::error::{Error, Result};
use crate::mode::Mode;
use crate::transfer;

/// One learned tensor: its value, and the gradient that backward passes add to.
pub struct Param {
    name: String,
    shape: Vec<usize>,
    /// Initialized when it is first read.
    var: OnceLock<Var>,
    grad: Mutex<Gradient>,
    version: AtomicU64,
    place: Place,
    /// The values of a version, where they were read from another place.
    copy: Mutex<Option<(u64, Arc<Vec<f32>>)>>,
    made: Made,
}

/// What is said of a parameter where it is created.
#[derive(Clone, Copy)]
pub(super) struct Made {
    /// Of the store.
    pub seed: u64,
    pub start: Start,
    pub zero_row: Option<usize>,
    pub weight_decay: bool,
    pub part: Option<Part>,
}

/// Ends a loan when it is dropped.
pub struct Loan<'a>(&'a Param);

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.0.grad().end_loan();
    }
}

impl std::fmt::Debug for Param {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Param({} {:?})", self.name, self.shape())
    }
}

/// A parameter's values as a slice: borrowed where they are `f32` on the CPU, and copied from any other place.
pub struct Values<'a>(Lent<'a>);

enum Lent<'a> {
    Borrowed(StorageRef<'a>),
    Copied(Arc<Vec<f32>>),
}

impl Deref for Values<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &self.0 {
            Lent::Copied(values) => values,
            Lent::Borrowed(storage) => match &**storage {
                Storage::Cpu(CpuStorage::F32(values)) => values,
                _ => unreachable!("only f32 on the CPU is borrowed"),
            },
        }
    }
}

impl Param {
    /// A parameter whose values are drawn later, by the store's seed and `name`.
    pub(super) fn new(name: String, shape: &[usize], place: Place, made: Made) -> Self {
        let (var, grad, version) = (OnceLock::new(), Mutex::default(), AtomicU64::new(0));
        Param { name, shape: shape.into(), var, grad, version, place, copy: Mutex::default(), made }
    }

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

    /// Whether the parameter has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether weight decay applies. False for biases, gains, embeddings, `A_log` and `D`.
    pub fn weight_decay(&self) -> bool {
        self.made.weight_decay
    }

    /// Whether it is the matrix of a linear map: created with [`weight`](super::ParamScope::weight), in a scope that may
    /// decay, with two dimensions. False for embeddings and for tensors such as `A_log`, whatever their shape.
    pub fn is_matrix(&self) -> bool {
        self.made.weight_decay && self.shape.len() == 2
    }

    /// Where the values lie.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// How the initial values were drawn.
    pub fn start(&self) -> Start {
        self.made.start
    }

    /// The part of the model that it belongs to, if whoever created it says.
    pub fn part(&self) -> Option<Part> {
        self.made.part
    }

    /// The row of an embedding that stays zero.
    pub fn zero_row(&self) -> Option<usize> {
        self.made.zero_row
    }

    /// The variable, if its values were drawn.
    pub(super) fn drawn(&self) -> Option<&Var> {
        self.var.get()
    }

    pub(super) fn var(&self) -> &Var {
        self.var.get_or_init(|| {
            let mut hash = Sha256::new();
            hash.update(self.made.seed.to_le_bytes());
            hash.update(self.name.as_bytes());
            let Start { init, gain } = self.made.start;
            let mut values = init.values(&self.shape, &mut ChaCha8Rng::from_seed(hash.finalize().into()));
            values.iter_mut().for_each(|v| *v *= gain);
            if let Some(row) = self.made.zero_row {
                values[row * self.shape[1]..(row + 1) * self.shape[1]].fill(0.0);
            }
            match self.placed(values).and_then(|values| Ok(Var::from_tensor(&values)?)) {
                Ok(var) => var,
                // As when the CPU's memory is used up: nobody can go on without the parameter.
                Err(error) => panic!("parameter {} cannot be created: {error}", self.name),
            }
        })
    }

    /// As many values as the parameter has, where it lies.
    pub(super) fn placed(&self, values: Vec<f32>) -> Result<Tensor> {
        let values = Tensor::from_vec(values, &self.shape[..], &Device::Cpu)?;
        transfer::to_device(&values.to_dtype(self.place.dtype)?, &self.place.device)
    }

    /// The value as a tensor: a node of the graph in training, detached in evaluation.
    pub fn tensor(&self, mode: Mode) -> Tensor {
        match mode {
            Mode::Train { .. } => self.var().as_tensor().clone(),
            Mode::Eval => self.var().as_detached_tensor(),
        }
    }

    /// The value as a slice. Do not update the parameter while you hold the borrow.
    ///
    /// # Panics
    /// The device that holds the parameter fails.
    pub fn values(&self) -> Values<'_> {
        if self.place.is_host() {
            return Values(Lent::Borrowed(self.var().storage_and_layout().0));
        }
        match self.copied() {
            Ok(values) => Values(Lent::Copied(values)),
            Err(error) => panic!("parameter {} cannot be read: {error}", self.name),
        }
    }

    /// The values of now, read from their place once.
    fn copied(&self) -> Result<Arc<Vec<f32>>> {
        let mut copy = self.copy.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let version = self.version();
        match &*copy {
            Some((of, values)) if *of == version => Ok(values.clone()),
            _ => {
                let values = Arc::new(self.read()?);
                *copy = Some((version, values.clone()));
                Ok(values)
            }
        }
    }

    fn read(&self) -> Result<Vec<f32>> {
        transfer::to_vec(&self.var().as_detached_tensor())
    }

    /// Notes that somebody changed the values where they lie.
    pub fn changed(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// Replaces the values by a tensor of the same place and shape.
    pub fn set(&self, values: &Tensor) -> Result<()> {
        self.var().set(values)?;
        self.version.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// The accumulated gradient. Empty until something is added.
    pub fn grad(&self) -> MutexGuard<'_, Gradient> {
        self.grad.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The accumulated gradient, allocated. Backward passes add to it.
    ///
    /// # Panics
    /// The parameter is not `f32` on the CPU.
    pub fn grad_mut(&self) -> MutexGuard<'_, Gradient> {
        assert!(self.place.is_host(), "the gradient of {} is no slice: use add_grad", self.name);
        let mut grad = self.grad();
        grad.allocate(self.len());
        grad
    }

    /// Adds a tensor of the parameter's place and shape to its gradient.
    pub fn add_grad(&self, grad: &Tensor) -> Result<()> {
        match self.place.is_host() {
            true => Ok(crate::node::with_floats(grad, |grad| crate::simd::add(grad, &mut self.grad_mut()))?),
            false => self.grad().add_tensor(grad),
        }
    }

    /// Replaces the gradient, as when a checkpoint is loaded.
    pub fn set_grad(&self, grad: &[f32]) -> Result<()> {
        if grad.len() != self.len() {
            return Err(Error::Weights(format!("{} gradients for {}", grad.len(), self.name)));
        }
        match self.place.is_host() {
            true => self.grad_mut().copy_from_slice(grad),
            false => {
                let sum = self.placed(grad.to_vec())?;
                self.grad().set_tensor(sum);
            }
        }
        Ok(())
    }

    /// Sets row `row` of the gradient to zero, if there is a gradient.
    pub(super) fn zero_grad_row(&self, row: usize) -> Result<()> {
        let width = self.shape[1];
        let mut grad = self.grad();
        match grad.tensor() {
            Some(sum) => {
                let (before, after) = (sum.narrow(0, 0, row)?, self.shape[0] - row - 1);
                let rest = sum.narrow(0, row + 1, after)?.pad_with_zeros(0, 1, 0)?;
                let sum = Tensor::cat(&[before, rest], 0)?;
                grad.set_tensor(sum);
            }
            None => {
                if let Some(row) = grad.get_mut(row * width..(row + 1) * width) {
                    row.fill(0.0);
                }
            }
        }
        Ok(())
    }

    /// Until the loan is dropped, gradients are added to `memory`.
    ///
    /// # Safety
    /// The loan must be dropped, not forgotten.
    pub unsafe fn lend_grad<'a>(&'a self, memory: &'a mut [f32]) -> Loan<'a> {
        assert_eq!(memory.len(), self.len(), "memory for the gradient of {}", self.name);
        // SAFETY: the loan borrows `memory` mutably and ends the use of it when it is dropped.
        unsafe { self.grad().lend(memory) };
        Loan(self)
    }

    /// Increases with every update, so that the owner of a copy can tell when it is stale.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Changes the value: in place on the CPU, through a copy elsewhere.
    pub fn update(&self, mut change: impl FnMut(&mut [f32])) -> Result<()> {
        if !self.place.is_host() {
            let mut values = self.read()?;
            change(&mut values);
            return self.set(&self.placed(values)?);
        }
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

#[cfg(test)]
mod tests {
    use crate::param::{Init, ParamStore};

    #[test]
    fn an_update_changes_the_version() {
        let mut store = ParamStore::new(0);
        let param = store.root().param("a", &[2], Init::Const(1.0)).unwrap();
        let before = param.version();
        param.update(|v| v[0] = 5.0).unwrap();
        assert_eq!((&param.values()[..], param.version() > before), (&[5.0, 1.0][..], true));
    }
}
