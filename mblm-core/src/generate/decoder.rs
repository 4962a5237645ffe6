//! Incremental decoding through the whole hierarchy. The local stage advances with every byte, a stage above with every
//! complete patch. The logits are those of the full forward pass.

use candle_core::{DType, Device, Tensor};
use mblm_sdk::error::{Error, Result};
use mblm_sdk::mode::Mode;
use mblm_sdk::transfer;
use rayon::prelude::*;

use crate::model::{Mblm, Positions};

mod lane;
mod slices;
mod tensors;

use lane::Lane;

/// The state of a batch of sequences that have the same length and grow together.
pub struct Decoder<'m> {
    model: &'m Mblm,
    batch: usize,
    lanes: Vec<Lane<'m>>,
    logits: Vec<f32>,
}

/// The states of all stages: over slices where fused ops run, and over tensors elsewhere.
trait Stages: Send {
    /// Opens a sequence of stage `n`, whose decoder is new or reset: asks the stage above about its tokens and feeds the start
    /// token.
    fn begin(&mut self, n: usize) -> Result<()>;

    /// Resets the decoder of stage `n`.
    fn reset(&mut self, n: usize);

    /// Feeds the next tokens of the current sequence to stage `n`, from `position` on.
    ///
    /// # Shapes
    /// - `ids`: `(tokens, B, bytes of a token)`
    fn feed(&mut self, n: usize, position: usize, ids: Vec<u32>) -> Result<()>;

    /// Writes the logits, `(B, V)`, that the local stage's newest output gives.
    fn logits(&mut self, logits: &mut [f32]) -> Result<()>;

    /// A copy of the newest output of stage `n`, `(B, D_n)`.
    fn output(&self, n: usize) -> Result<Vec<f32>>;

    /// Goes on as `times` sequences with the state of the only one so far. Returns false, and is not used any more, if a
    /// block cannot do this.
    fn repeat(&mut self, _times: usize) -> bool {
        false
    }
}

impl<'m> Decoder<'m> {
    /// Creates an empty state.
    pub fn new(model: &'m Mblm, batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Input("expected a batch of at least one sequence, found none".into()));
        }
        let logits = empty_logits(model, batch)?;
        let lanes = match model.config().is_fixed() {
            true => vec![Lane::new(model, batch, logits.clone())?],
            false => {
                let lane = |logits: &[f32]| Lane::new(model, 1, logits.to_vec());
                logits.chunks_exact(model.config().num_tokens).map(lane).collect::<Result<_>>()?
            }
        };
        Ok(Decoder { model, batch, lanes, logits })
    }

    /// The largest number of bytes that any of the sequences has so far.
    pub fn len(&self) -> usize {
        self.lanes.iter().map(Lane::len).max().unwrap_or(0)
    }

    /// Whether there are no bytes yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The maximum number of bytes of a sequence. `None` if stage 1 has no fixed positions and there is no limit; an upper
    /// bound where patches follow the content.
    pub fn limit(&self) -> Option<usize> {
        let hierarchy = self.model.hierarchy();
        match hierarchy.stages[0].input.positions {
            Positions::Fixed(_) => Some(hierarchy.config.context_len()),
            _ => None,
        }
    }

    /// Whether sequence `b` fills the context, so that no byte can follow.
    pub fn is_full(&self, b: usize) -> bool {
        self.lanes[b / self.lanes[0].batch()].is_full()
    }

    /// The logits of the next byte, `(B, V)`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Feeds a prompt `(B, L)` to an empty state. This costs little more than one pass of the global stage, because
    /// only the newest sequence of every other stage runs.
    ///
    /// # Errors
    /// The state is not empty, the prompt is too long or has ids outside the vocabulary, or the logits are not finite.
    pub fn prefill(&mut self, prompt: &[u32]) -> Result<()> {
        if !self.is_empty() {
            return Err(Error::Input("prefill expects an empty decoder".into()));
        }
        let len = prompt.len() / self.batch;
        self.check(prompt, len)?;
        if len == 0 {
            return Ok(());
        }
        let mut first = 0;
        let prompts = self.lanes.iter().map(|lane| {
            let sequences = first..first + lane.batch();
            first = sequences.end;
            (0..len).flat_map(|l| sequences.clone().map(move |b| prompt[b * len + l])).collect()
        });
        let prompts: Vec<Vec<u32>> = prompts.collect();
        self.advance(|n, lane| lane.prefill(&prompts[n]))
    }

    /// The state after a prompt that all of `batch` sequences begin with. It is read once, if the blocks can copy their state.
    ///
    /// # Errors
    /// Those of [`prefill`](Self::prefill).
    pub fn after(model: &'m Mblm, prompt: &[u32], batch: usize) -> Result<Self> {
        if batch > 1 && !prompt.is_empty() && model.config().is_fixed() {
            let mut decoder = Decoder::new(model, 1)?;
            decoder.prefill(prompt)?;
            if decoder.lanes[0].repeat(batch) {
                decoder.logits = decoder.lanes[0].logits.clone();
                return Ok(Decoder { batch, ..decoder });
            }
        }
        let mut decoder = Decoder::new(model, batch)?;
        decoder.prefill(&prompt.repeat(batch))?;
        Ok(decoder)
    }

    /// Feeds the next byte of each sequence, `(B)`.
    ///
    /// # Errors
    /// An id is outside the vocabulary, the context is full, a block fails, or the logits are not finite.
    pub fn step(&mut self, bytes: &[u32]) -> Result<()> {
        self.step_some(bytes, |_| true)
    }

    /// Like [`step`](Self::step), for the sequences that go on. Others may advance too, or stand still.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn step_some(&mut self, bytes: &[u32], goes_on: impl Fn(usize) -> bool + Sync) -> Result<()> {
        self.check(bytes, 1)?;
        let each = self.lanes[0].batch();
        self.advance(|n, lane| {
            let sequences = n * each..(n + 1) * each;
            match sequences.clone().any(&goes_on) {
                true => lane.step(&bytes[sequences]),
                false => Ok(()),
            }
        })
    }

    /// Does `work` with every lane and its number, and gathers their logits.
    fn advance(&mut self, work: impl Fn(usize, &mut Lane<'m>) -> Result<()> + Sync) -> Result<()> {
        match &mut self.lanes[..] {
            [only] => work(0, only)?,
            lanes => lanes.par_iter_mut().enumerate().try_for_each(|(n, lane)| work(n, lane))?,
        }
        let mut rest = &mut self.logits[..];
        for lane in &self.lanes {
            let (own, others) = rest.split_at_mut(lane.logits.len());
            own.copy_from_slice(&lane.logits);
            rest = others;
        }
        Ok(())
    }

    fn check(&self, bytes: &[u32], more: usize) -> Result<()> {
        let vocab = self.model.config().num_tokens;
        if bytes.len() != self.batch * more {
            let message = format!("expected {} x {more} ids, found {}", self.batch, bytes.len());
            return Err(Error::Input(message));
        }
        if let Some(id) = bytes.iter().find(|id| **id as usize >= vocab) {
            let message = format!("id {id} lies outside the vocabulary of {vocab} tokens (0 to {})", vocab - 1);
            return Err(Error::Input(message));
        }
        match self.limit() {
            Some(limit) if self.len() + more > limit => Err(Error::Input(format!(
                "{} bytes are more than the context of {limit} bytes, at which the fixed positions of stage 1 end",
                self.len() + more
            ))),
            _ => Ok(()),
        }
    }
}

/// The logits of the first byte of each sequence, `(B, V)`.
fn empty_logits(model: &Mblm, batch: usize) -> Result<Vec<f32>> {
    let empty = Tensor::zeros((batch, 0), DType::U32, &Device::Cpu)?;
    let logits = || model.logits(&empty, Mode::Eval);
    let values = transfer::to_vec::<f32>(&logits()?)?;
    match values.iter().all(|logit| logit.is_finite()) {
        true => Ok(values),
        false => Err(model.hierarchy().not_finite("the logits of the first byte are not finite", logits)),
    }
}
