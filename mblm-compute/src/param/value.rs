//! One parameter: its value, its gradient buffer, and how it started.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, StorageRef, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use super::gradient::Gradient;
use super::init::Start;
use super::part::Part;
use crate::error::Result;
use crate::mode::Mode;

/// One learned tensor: its value, and the gradient that backward passes add to.
pub struct Param {
    name: String,
    shape: Vec<usize>,
    /// Initialized when it is first read.
    var: OnceLock<Var>,
    grad: Mutex<Gradient>,
    version: AtomicU64,
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
    /// A parameter whose values are drawn later, by the store's seed and `name`.
    pub(super) fn new(name: String, shape: &[usize], made: Made) -> Self {
        let (var, grad, version) = (OnceLock::new(), Mutex::default(), AtomicU64::new(0));
        Param { name, shape: shape.into(), var, grad, version, made }
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
            match Tensor::from_vec(values, &self.shape[..], &Device::Cpu).and_then(|values| Var::from_tensor(&values)) {
                Ok(var) => var,
                Err(error) => unreachable!("as many values as the shape says, on the CPU: {error}"),
            }
        })
    }

    /// The value as a tensor: a node of the graph in training, detached in evaluation.
    pub fn tensor(&self, mode: Mode) -> Tensor {
        match mode {
            Mode::Train { .. } => self.var().as_tensor().clone(),
            Mode::Eval => self.var().as_detached_tensor(),
        }
    }

    /// The value as a slice. Do not update the parameter while you hold the borrow.
    pub fn values(&self) -> Values<'_> {
        Values(self.var().storage_and_layout().0)
    }

    /// The accumulated gradient. Empty until something is added.
    pub fn grad(&self) -> MutexGuard<'_, Gradient> {
        self.grad.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The accumulated gradient, allocated. Backward passes add to it.
    pub fn grad_mut(&self) -> MutexGuard<'_, Gradient> {
        let mut grad = self.grad();
        grad.allocate(self.len());
        grad
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
