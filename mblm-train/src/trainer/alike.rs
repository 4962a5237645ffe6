//! That all processes train the same model: each changes its own weights, by the same gradients, and nobody compares what
//! comes of it but this.

use std::hash::{DefaultHasher, Hash, Hasher};

use mblm_base::random::mix;
use rayon::prelude::*;

use super::Trainer;
use crate::error::Result;

/// Weights whose bits are mixed one after the other.
const PIECE: usize = 1 << 16;

impl Trainer<'_> {
    /// Refuses to go on if a process has another configuration, other data, or other weights than the first.
    pub(super) fn must_be_alike(&self) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        let state = &self.state;
        let place = (state.batches, state.step, state.next.epoch, state.next.batch, &state.version);
        self.processes.must_have_the_same("configuration", sum(&self.config_yaml))?;
        self.processes.must_have_the_same("data", sum(&state.data))?;
        self.processes.must_have_the_same("place in the run", sum(&place))?;
        self.processes.must_have_the_same("weights", self.sum_of_weights())
    }

    fn sum_of_weights(&self) -> u64 {
        let of_piece = |piece: &[f32]| piece.iter().fold(0, |sum, x| mix(sum ^ u64::from(x.to_bits())));
        self.model.params().iter().fold(0, |sum, param| {
            let pieces: Vec<u64> = param.values().par_chunks(PIECE).map(of_piece).collect();
            pieces.into_iter().fold(sum, |sum, piece| mix(sum ^ piece))
        })
    }

    /// Takes over the weights of the first process.
    pub(super) fn weights_of_the_first(&self) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        for param in self.model.params().iter() {
            let mut bytes = match self.processes.is_first() {
                true => param.values().iter().flat_map(|x| x.to_le_bytes()).collect(),
                false => Vec::new(),
            };
            self.processes.broadcast(0, &mut bytes);
            if !self.processes.is_first() {
                let from = bytes.as_chunks::<4>().0;
                param.update(|values| {
                    values.iter_mut().zip(from).for_each(|(x, from)| *x = f32::from_le_bytes(*from))
                })?;
            }
        }
        Ok(())
    }
}

fn sum(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
