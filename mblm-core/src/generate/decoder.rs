//! Incremental decoding through the whole hierarchy. The local stage advances with every byte, a stage above with every
//! complete patch. The logits are those of the full forward pass.

use candle_core::{DType, Device, Tensor};
use mblm_sdk::error::{Error, Result};
use mblm_sdk::mode::Mode;
use mblm_sdk::transfer;

use crate::model::{Mblm, Positions};

mod slices;
mod tensors;

use slices::Slices;
use tensors::Tensors;

/// The state of a batch of sequences that have the same length and grow together.
pub struct Decoder<'m> {
    model: &'m Mblm,
    batch: usize,
    /// The bytes so far, `(L, B)`: only those of the current sequence of stage 2 on are ever read again.
    history: Vec<u32>,
    /// Of each stage, the tokens of the current sequence that were fed, not counting the start token.
    positions: Vec<usize>,
    stages: Box<dyn Stages + 'm>,
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
}

impl<'m> Decoder<'m> {
    /// Creates an empty state.
    pub fn new(model: &'m Mblm, batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Input("expected a batch of at least one sequence, found none".into()));
        }
        let hierarchy = model.hierarchy();
        let stages: Box<dyn Stages> = match model.params().place().fuses() {
            true => Box::new(Slices::new(hierarchy, batch)?),
            false => Box::new(Tensors::new(hierarchy, batch)?),
        };
        let positions = vec![0; hierarchy.stages.len()];
        let mut decoder = Decoder { model, batch, history: vec![], positions, stages, logits: vec![] };
        decoder.logits = decoder.empty_logits()?;
        Ok(decoder)
    }

    /// The number of bytes of each sequence so far.
    pub fn len(&self) -> usize {
        self.history.len() / self.batch
    }

    /// Whether there are no bytes yet.
    pub fn is_empty(&self) -> bool {
        self.history.is_empty()
    }

    /// The maximum number of bytes of a sequence. `None` if stage 1 has no fixed positions and there is no limit.
    pub fn limit(&self) -> Option<usize> {
        let hierarchy = self.model.hierarchy();
        match hierarchy.stages[0].input.positions {
            Positions::Fixed(_) => Some(hierarchy.config.context_len()),
            _ => None,
        }
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
        self.history = (0..len).flat_map(|l| (0..self.batch).map(move |b| prompt[b * len + l])).collect();
        // From local to global: how many tokens each stage's newest sequence has. Only the local stage's may be full:
        // it is completed by the byte that follows.
        let hierarchy = self.model.hierarchy();
        let (mut total, local) = (len, self.positions.len() - 1);
        let mut counts = vec![0; self.positions.len()];
        for n in (0..=local).rev() {
            let seq = hierarchy.stages[n].seq_len;
            counts[n] = match n {
                0 => total,
                _ if n == local => (total - 1) % seq + 1,
                _ => total % seq,
            };
            total = (total - counts[n]) / seq;
        }
        let mut end = 0; // bytes that the tokens fed so far stand for
        for (n, count) in counts.into_iter().enumerate() {
            let patch = hierarchy.patch_len(n);
            self.begin_sequence(n)?;
            self.feed_tokens(n, end, count)?;
            end += count * patch;
        }
        self.output_layer()
    }

    /// Feeds the next byte of each sequence, `(B)`.
    ///
    /// # Errors
    /// An id is outside the vocabulary, the context is full, a block fails, or the logits are not finite.
    pub fn step(&mut self, bytes: &[u32]) -> Result<()> {
        self.check(bytes, 1)?;
        if self.is_empty() {
            (0..self.positions.len()).try_for_each(|n| self.begin_sequence(n))?;
        }
        let local = self.positions.len() - 1;
        self.make_room(local)?;
        self.history.extend_from_slice(bytes);
        self.feed_tokens(local, self.len() - 1, 1)?;
        self.output_layer()
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

    /// Completes stage `n`'s sequence if it is full: its bytes become a token of the stage above, whose output then
    /// opens the next sequence.
    fn make_room(&mut self, n: usize) -> Result<()> {
        if n == 0 || self.positions[n] < self.model.hierarchy().stages[n].seq_len {
            return Ok(());
        }
        let patch = self.model.hierarchy().patch_len(n - 1);
        self.feed_tokens(n - 1, self.len() - patch, 1)?;
        // The stage above may be full by this: then its last output speaks of nothing, and its next sequence opens.
        self.make_room(n - 1)?;
        self.begin_sequence(n)
    }

    fn begin_sequence(&mut self, n: usize) -> Result<()> {
        if self.positions[n] > 0 {
            self.stages.reset(n);
        }
        self.positions[n] = 0;
        self.stages.begin(n)
    }

    /// Feeds `count` tokens to stage `n`, whose bytes begin at byte `first` of the history.
    fn feed_tokens(&mut self, n: usize, first: usize, count: usize) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let (patch, batch) = (self.model.hierarchy().patch_len(n), self.batch);
        let mut ids = Vec::with_capacity(count * batch * patch);
        for token in 0..count {
            for b in 0..batch {
                ids.extend((0..patch).map(|i| self.history[(first + token * patch + i) * batch + b]));
            }
        }
        self.stages.feed(n, self.positions[n], ids)?;
        self.positions[n] += count;
        Ok(())
    }

    fn output_layer(&mut self) -> Result<()> {
        self.stages.logits(&mut self.logits)?;
        match self.logits.iter().all(|logit| logit.is_finite()) {
            true => Ok(()),
            false => Err(self.not_finite()?),
        }
    }

    /// Names the first stage whose newest output is not finite: what a stage passes on reaches the logits at once.
    fn not_finite(&self) -> Result<Error> {
        let what = format!("the logits after {} bytes are not finite", self.len());
        for (n, position) in self.positions.iter().enumerate() {
            let output = self.stages.output(n)?;
            if let Some(at) = output.iter().position(|value| !value.is_finite()) {
                let (sequence, value) = (at / (output.len() / self.batch), output[at]);
                return Ok(Error::NotFinite(format!(
                    "{what}: the output of {} is {value} at sequence {sequence}, position {position}",
                    self.model.hierarchy().stage_name(n)
                )));
            }
        }
        Ok(Error::NotFinite(format!("{what}, while the outputs of all stages are finite: the output layer overflows")))
    }

    fn empty_logits(&self) -> Result<Vec<f32>> {
        let empty = Tensor::zeros((self.batch, 0), DType::U32, &Device::Cpu)?;
        let logits = || self.model.logits(&empty, Mode::Eval);
        let values = transfer::to_vec::<f32>(&logits()?)?;
        match values.iter().all(|logit| logit.is_finite()) {
            true => Ok(values),
            false => Err(self.model.hierarchy().not_finite("the logits of the first byte are not finite", logits)),
        }
    }
}
