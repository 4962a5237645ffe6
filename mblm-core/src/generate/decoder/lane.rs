//! Sequences that are decoded together, since their patches end at the same bytes: a whole batch where patches have their
//! full length, and each sequence by itself where they follow the content.

use mblm_sdk::error::{Error, Result};

use super::Stages;
use super::slices::Slices;
use super::tensors::Tensors;
use crate::model::{Hierarchy, Mblm, Positions};
use crate::patching::{Cutter, Following};

/// The state of sequences that have the same length and grow together.
pub(super) struct Lane<'m> {
    model: &'m Mblm,
    batch: usize,
    /// Bytes of each sequence.
    bytes: usize,
    /// The ids so far in their places, `(places, B)`: where a patch ended early, it was padded when the next one began. Only
    /// those of the current sequence of stage 2 on are ever read again.
    history: Vec<u32>,
    patches: Following,
    /// The levels of patches that ended with the last byte, which are completed by the byte that follows.
    ended: usize,
    /// Of each stage, the tokens of the current sequence that were fed, not counting the start token.
    positions: Vec<usize>,
    stages: Box<dyn Stages + 'm>,
    pub(super) logits: Vec<f32>,
}

impl<'m> Lane<'m> {
    /// Sequences without a byte, which `logits` predict, `(B, V)`.
    pub(super) fn new(model: &'m Mblm, batch: usize, logits: Vec<f32>) -> Result<Self> {
        let hierarchy = model.hierarchy();
        let stages: Box<dyn Stages> = match model.params().place().fuses() {
            true => Box::new(Slices::new(hierarchy, batch)?),
            false => Box::new(Tensors::new(hierarchy, batch)?),
        };
        let positions = vec![0; hierarchy.stages.len()];
        let patches = Cutter::new(model.config()).follow()?;
        Ok(Lane { model, batch, bytes: 0, history: vec![], patches, ended: 0, positions, stages, logits })
    }

    pub(super) fn batch(&self) -> usize {
        self.batch
    }

    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    fn hierarchy(&self) -> &'m Hierarchy {
        self.model.hierarchy()
    }

    fn places(&self) -> usize {
        self.history.len() / self.batch
    }

    /// Whether the first stage has no position for a further byte.
    pub(super) fn is_full(&self) -> bool {
        let hierarchy = self.hierarchy();
        let is_limited = matches!(hierarchy.stages[0].input.positions, Positions::Fixed(_));
        let patches = self.places().div_ceil(hierarchy.patch_len(0));
        is_limited && self.ended == self.positions.len() - 1 && patches >= hierarchy.stages[0].seq_len
    }

    /// Feeds the first bytes of each sequence, `(L, B)`, of which there is at least one.
    pub(super) fn prefill(&mut self, prompt: &[u32]) -> Result<()> {
        for ids in prompt.chunks_exact(self.batch) {
            self.check_room()?;
            self.pad();
            self.push(ids)?;
        }
        // From local to global: how many tokens each stage's newest sequence has. Only the local stage's may be full:
        // it is completed by the byte that follows.
        let hierarchy = self.hierarchy();
        let (mut total, local) = (self.places(), self.positions.len() - 1);
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
        let mut end = 0; // places that the tokens fed so far stand for
        for (n, count) in counts.into_iter().enumerate() {
            self.begin_sequence(n)?;
            self.feed_tokens(n, end, count)?;
            end += count * hierarchy.patch_len(n);
        }
        self.output_layer()
    }

    /// Feeds the next byte of each sequence, `(B)`.
    pub(super) fn step(&mut self, ids: &[u32]) -> Result<()> {
        self.check_room()?;
        let local = self.positions.len() - 1;
        match self.bytes {
            0 => (0..=local).try_for_each(|n| self.begin_sequence(n))?,
            _ => self.complete_patches()?,
        }
        self.push(ids)?;
        self.feed_tokens(local, self.places() - 1, 1)?;
        self.output_layer()
    }

    /// Goes on as `times` sequences that begin as the only one so far. Returns false, and is not used any more, if a block
    /// cannot do this.
    pub(super) fn repeat(&mut self, times: usize) -> bool {
        self.batch = times;
        self.history = self.history.iter().flat_map(|id| std::iter::repeat_n(*id, times)).collect();
        self.logits = self.logits.repeat(times);
        self.stages.repeat(times)
    }

    fn check_room(&self) -> Result<()> {
        let (bytes, patches) = (self.bytes + 1, self.hierarchy().stages[0].seq_len);
        match self.is_full() {
            false => Ok(()),
            true => Err(Error::Input(format!(
                "{bytes} bytes are more than the {patches} patches at which the fixed positions of stage 1 end"
            ))),
        }
    }

    /// Takes the next byte of each sequence in.
    fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.history.extend_from_slice(ids);
        self.bytes += 1;
        // Where there are several, their patches do not depend on the bytes.
        self.ended = self.patches.push(ids[0])?;
        Ok(())
    }

    /// Pads the patches that ended with the last byte.
    fn pad(&mut self) {
        let n = self.positions.len() - 1 - self.ended;
        self.pad_to(self.hierarchy().patch_len(n));
    }

    fn pad_to(&mut self, patch: usize) {
        let places = self.places().next_multiple_of(patch);
        self.history.resize(places * self.batch, self.model.config().pad_token_id as u32);
    }

    /// Completes the patches that ended with the last byte: the bytes of each become a token of the stage above, whose
    /// output then opens the next sequence.
    fn complete_patches(&mut self) -> Result<()> {
        let local = self.positions.len() - 1;
        let opened = local + 1 - self.ended..local + 1;
        for n in opened.clone().rev() {
            let patch = self.hierarchy().patch_len(n - 1);
            self.pad_to(patch);
            // If the sequence of stage n - 1 ended too, nothing is projected from this output.
            self.feed_tokens(n - 1, self.places() - patch, 1)?;
        }
        opened.into_iter().try_for_each(|n| self.begin_sequence(n))
    }

    fn begin_sequence(&mut self, n: usize) -> Result<()> {
        if self.positions[n] > 0 {
            self.stages.reset(n);
        }
        self.positions[n] = 0;
        self.stages.begin(n)
    }

    /// Feeds `count` tokens to stage `n`, whose bytes begin at place `first` of the history.
    fn feed_tokens(&mut self, n: usize, first: usize, count: usize) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let (patch, batch) = (self.hierarchy().patch_len(n), self.batch);
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
        let what = format!("the logits after {} bytes are not finite", self.bytes);
        for (n, position) in self.positions.iter().enumerate() {
            let output = self.stages.output(n)?;
            if let Some(at) = output.iter().position(|value| !value.is_finite()) {
                let (sequence, value) = (at / (output.len() / self.batch), output[at]);
                return Ok(Error::NotFinite(format!(
                    "{what}: the output of {} is {value} at sequence {sequence}, position {position}",
                    self.hierarchy().stage_name(n)
                )));
            }
        }
        Ok(Error::NotFinite(format!("{what}, while the outputs of all stages are finite: the output layer overflows")))
    }
}
