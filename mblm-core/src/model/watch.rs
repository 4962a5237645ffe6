//! What goes in and out of a stage's model while somebody watches: how large it is and where it stops being finite, and in
//! training its gradients, time and memory. Squares are summed up: no tensor is kept, and the output need not exist as a
//! whole, as that of a local stage in chunks does not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use candle_core::{DType, Shape, Tensor};
use mblm_base::memory::Memory;
use mblm_sdk::backward::with_backward;
use mblm_sdk::error::Result;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1, with_floats};
use mblm_sdk::parallel::MIN_PARALLEL;
use mblm_sdk::transfer;
use rayon::prelude::*;
use serde::Serialize;

/// What was seen of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seen {
    /// Root mean square of the inputs.
    pub input: Mean,
    /// Root mean square of the outputs.
    pub output: Mean,
    /// Root mean square of the gradient of the loss with respect to the inputs.
    pub input_gradient: Mean,
    /// Root mean square of the gradient with respect to the outputs.
    pub output_gradient: Mean,
    /// Seconds in forward passes.
    pub forward_seconds: f64,
    /// Seconds in backward passes.
    pub backward_seconds: f64,
    /// Bytes by which the process grew in forward passes.
    pub memory: u64,
}

/// A root mean square that numbers are added to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    squares: f64,
    count: usize,
}

impl Mean {
    fn add(&mut self, values: &[f32]) {
        self.squares += squares(values);
        self.count += values.len();
    }

    /// The root mean square; 0 of nothing.
    pub fn rms(self) -> f64 {
        (self.squares / self.count.max(1) as f64).sqrt()
    }

    /// Whether nothing was added.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }
}

impl Serialize for Mean {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.rms())
    }
}

/// The first value of a stage's output that is infinite or not a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NotFinite {
    pub(crate) value: f32,
    pub(crate) sequence: usize,
    /// Where in the sequence; the start token, if the stage has one, is position 0.
    pub(crate) position: usize,
}

/// What somebody watches.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum What {
    /// The outputs.
    Outputs,
    /// Everything, in training.
    Training,
}

/// What was seen of one stage; nothing while nobody watches.
#[derive(Default)]
pub(crate) struct Watch(Mutex<Option<Watching>>);

struct Watching {
    what: What,
    seen: Seen,
    /// Sequences whose outputs were seen.
    sequences: usize,
    not_finite: Option<NotFinite>,
}

impl Watch {
    pub(crate) fn start(&self, what: What) {
        *self.watching() = Some(Watching { what, seen: Seen::default(), sequences: 0, not_finite: None });
    }

    /// What was seen since the start, and the first element of an output that is not finite.
    pub(crate) fn finish(&self) -> (Seen, Option<NotFinite>) {
        self.watching().take().map_or_else(Default::default, |watching| (watching.seen, watching.not_finite))
    }

    /// Runs the stage's model on `x`, and looks if somebody watches.
    pub(crate) fn run(
        self: &Arc<Self>,
        x: &Tensor,
        mode: Mode,
        model: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let what = self.watching().as_ref().map(|watching| watching.what);
        match (what, mode) {
            (Some(What::Outputs), _) => {
                let y = model(x)?;
                // What is wrong with another shape is said elsewhere.
                if y.dims() == x.dims() {
                    self.output(&y)?;
                }
                Ok(y)
            }
            (Some(What::Training), Mode::Train { .. }) => self.run_between_borders(x, mode, model),
            _ => model(x),
        }
    }

    fn run_between_borders(
        self: &Arc<Self>,
        x: &Tensor,
        mode: Mode,
        model: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let began = Arc::default();
        let border = |end| Border { watch: self.clone(), end, began: Arc::clone(&began), shape: x.shape().clone() };
        let x = apply1(border(End::Input), x, mode)?;
        let (start, before) = (Instant::now(), resident());
        let y = model(&x)?;
        self.see(|seen| {
            seen.forward_seconds += start.elapsed().as_secs_f64();
            seen.memory += resident().saturating_sub(before);
        });
        if y.dims() == x.dims() { apply1(border(End::Output), &y, mode) } else { Ok(y) }
    }

    /// Adds an output, or a part of one.
    fn output(&self, output: &Tensor) -> Result<()> {
        let (sequences, positions, dim) = output.dims3()?;
        let of_output = match output.device().is_cpu() && output.dtype() == DType::F32 {
            true => with_floats(output, squares)?,
            false => f64::from(transfer::to_scalar::<f32>(&output.detach().sqr()?.sum_all()?)?),
        };
        let Some(watching) = &mut *self.watching() else { return Ok(()) };
        if watching.not_finite.is_none() && !of_output.is_finite() {
            watching.not_finite = with_floats(output, |x| {
                let at = x.iter().position(|value| !value.is_finite())?;
                let (row, value) = (at / dim, x[at]);
                let sequence = watching.sequences + row / positions;
                Some(NotFinite { value, sequence, position: row % positions })
            })?;
        }
        watching.seen.output.squares += of_output;
        watching.seen.output.count += output.elem_count();
        watching.sequences += sequences;
        Ok(())
    }

    fn see(&self, note: impl FnOnce(&mut Seen)) {
        if let Some(watching) = &mut *self.watching() {
            note(&mut watching.seen);
        }
    }

    fn watching(&self) -> MutexGuard<'_, Option<Watching>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sum of squares, chunk by chunk: the same bits on any number of threads.
fn squares(x: &[f32]) -> f64 {
    let square = |x: &f32| (*x as f64) * (*x as f64);
    let partial: Vec<f64> = x.par_chunks(MIN_PARALLEL).map(|chunk| chunk.iter().map(square).sum()).collect();
    partial.iter().sum()
}

fn resident() -> u64 {
    Memory::now().map_or(0, |memory| memory.resident)
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Input,
    Output,
}

/// The identity, before a model and after it: backward comes to the output first, and to the input when it is through.
#[derive(Clone)]
struct Border {
    watch: Arc<Watch>,
    end: End,
    /// When backward came to the output.
    began: Arc<Mutex<Option<Instant>>>,
    shape: Shape,
}

impl Node for Border {
    type Tape = ();

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        y.copy_from_slice(inputs[0]);
        self.passes(y);
        Ok(())
    }

    fn backward(&self, _: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        grads[0].copy_from_slice(dy);
        self.returns(dy);
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], _: Mode) -> Result<Tensor> {
        let x = inputs[0];
        with_floats(x, |x| self.passes(x))?;
        let border = self.clone();
        with_backward(&[x], x, move |_, dy| {
            with_floats(dy, |dy| border.returns(dy))?;
            Ok(vec![dy.clone()])
        })
    }
}

impl Border {
    /// Notes what goes through.
    fn passes(&self, x: &[f32]) {
        self.watch.see(|seen| match self.end {
            End::Input => seen.input.add(x),
            End::Output => seen.output.add(x),
        });
    }

    /// Notes the gradient that comes back.
    fn returns(&self, dy: &[f32]) {
        let mut began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
        self.watch.see(|seen| match self.end {
            End::Output => {
                seen.output_gradient.add(dy);
                *began = Some(Instant::now());
            }
            End::Input => {
                seen.backward_seconds += began.take().map_or(0.0, |began| began.elapsed().as_secs_f64());
                seen.input_gradient.add(dy);
            }
        });
    }
}
