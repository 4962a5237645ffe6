//! The rule `entropy` byte by byte, for generation: a cached decoder of the small model instead of a pass over the window.

use mblm_core::error::Result;
use mblm_core::generate::Decoder;
use mblm_core::patching::Follow;

use super::Criterion;
use super::small::Small;

/// Bits by which the decoder's entropies may differ from those of a pass over the window. Where this decides, that pass is made,
/// so that patches always end where they do in training.
const DOUBT: f64 = 1e-3;

/// Follows one sequence.
pub(super) struct Follower {
    small: &'static Small,
    cut: Criterion,
    bytes: Vec<u32>,
    /// Of the present window.
    decoder: Decoder<'static>,
    before: Option<f64>,
}

impl Follower {
    pub(super) fn new(small: &'static Small, cut: Criterion) -> Result<Self> {
        let decoder = Decoder::new(small.model(), 1)?;
        Ok(Follower { small, cut, bytes: vec![], decoder, before: None })
    }

    /// The entropy of the byte behind the last one, by the decoder.
    fn advance(&mut self) -> Result<f64> {
        let last = self.bytes.len() - 1;
        if self.decoder.len() == self.small.window() {
            self.decoder = Decoder::new(self.small.model(), 1)?;
            self.decoder.prefill(&self.bytes[self.small.window_start(last)..last])?;
        }
        self.decoder.step(&self.bytes[last..])?;
        self.small.entropy(self.decoder.logits())
    }

    /// By passes over the windows.
    fn exact(&self) -> Result<f64> {
        let last = self.bytes.len() - 1;
        let before = last.checked_sub(1).map(|t| self.small.entropy_behind(&self.bytes, t)).transpose()?;
        Ok(self.cut.excess(before, self.small.entropy_behind(&self.bytes, last)?))
    }
}

impl Follow for Follower {
    fn push(&mut self, id: u32) -> Result<bool> {
        self.bytes.push(id);
        let now = self.advance()?;
        let excess = self.cut.excess(self.before, now);
        self.before = Some(now);
        Ok(if excess.abs() < DOUBT { self.exact()? > 0.0 } else { excess > 0.0 })
    }
}
