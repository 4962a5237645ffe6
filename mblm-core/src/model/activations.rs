//! How large a stage's output is. Squares are summed up while a pass is measured: no tensor is kept, and the output need
//! not exist as a whole, as that of a local stage in chunks does not.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;
use rayon::prelude::*;

use crate::error::Result;
use crate::node::with_floats;
use crate::parallel::MIN_PARALLEL;

/// What was summed up of one stage; nothing while nobody measures.
#[derive(Default)]
pub(crate) struct Activations(Mutex<Option<Sum>>);

#[derive(Default)]
struct Sum {
    squares: f64,
    elements: usize,
}

impl Activations {
    pub(crate) fn start(&self) {
        *self.sum() = Some(Sum::default());
    }

    /// Adds an output, or a part of one, if somebody measures.
    pub(crate) fn add(&self, output: &Tensor) -> Result<()> {
        if let Some(sum) = &mut *self.sum() {
            sum.squares += with_floats(output, squares)?;
            sum.elements += output.elem_count();
        }
        Ok(())
    }

    /// The root mean square of all elements since the start; not a number if there was none.
    pub(crate) fn finish(&self) -> f64 {
        let sum = self.sum().take().unwrap_or_default();
        (sum.squares / sum.elements as f64).sqrt()
    }

    fn sum(&self) -> MutexGuard<'_, Option<Sum>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sum of squares, chunk by chunk: the same bits on any number of threads.
fn squares(x: &[f32]) -> f64 {
    let square = |x: &f32| (*x as f64) * (*x as f64);
    let partial: Vec<f64> = x.par_chunks(MIN_PARALLEL).map(|chunk| chunk.iter().map(square).sum()).collect();
    partial.iter().sum()
}
