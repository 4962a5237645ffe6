//! How large a stage's output is, and where it stops being finite. Squares are summed up while a pass is measured: no
//! tensor is kept, and the output need not exist as a whole, as that of a local stage in chunks does not.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use mblm_sdk::error::Result;
use mblm_sdk::node::with_floats;
use mblm_sdk::parallel::MIN_PARALLEL;
use rayon::prelude::*;

/// What was summed up of one stage; nothing while nobody measures.
#[derive(Default)]
pub(crate) struct Activations(Mutex<Option<Sum>>);

#[derive(Default)]
struct Sum {
    squares: f64,
    elements: usize,
    sequences: usize,
    not_finite: Option<NotFinite>,
}

/// The first value of a stage's output that is infinite or not a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NotFinite {
    pub(crate) value: f32,
    pub(crate) sequence: usize,
    /// Where in the sequence; the start token, if the stage has one, is position 0.
    pub(crate) position: usize,
}

impl Activations {
    pub(crate) fn start(&self) {
        *self.sum() = Some(Sum::default());
    }

    /// Adds an output, or a part of one, if somebody measures.
    pub(crate) fn add(&self, output: &Tensor) -> Result<()> {
        if let Some(sum) = &mut *self.sum() {
            let (sequences, positions, dim) = output.dims3()?;
            let of_output = match output.device() {
                Device::Cpu => with_floats(output, squares)?,
                _ => f64::from(output.detach().sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?),
            };
            if sum.not_finite.is_none() && !of_output.is_finite() {
                let first = with_floats(output, |x| {
                    let at = x.iter().position(|value| !value.is_finite())?;
                    let (row, value) = (at / dim, x[at]);
                    Some(NotFinite { value, sequence: sum.sequences + row / positions, position: row % positions })
                })?;
                sum.not_finite = first;
            }
            sum.squares += of_output;
            sum.elements += output.elem_count();
            sum.sequences += sequences;
        }
        Ok(())
    }

    /// The root mean square of all elements since the start, which is not a number if there was none, and the first
    /// element that is not finite.
    pub(crate) fn finish(&self) -> (f64, Option<NotFinite>) {
        let sum = self.sum().take().unwrap_or_default();
        ((sum.squares / sum.elements as f64).sqrt(), sum.not_finite)
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
