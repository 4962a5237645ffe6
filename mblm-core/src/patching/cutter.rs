//! Cuts a sequence into patches, byte by byte, by the rules and the largest lengths of all levels.

use std::sync::Arc;

use mblm_sdk::error::Result;

use super::PatchRule;
use crate::config::MblmConfig;

/// Cuts one sequence.
///
/// The levels are those of the stages below the first: the innermost patches are the sequences of the local stage. A patch
/// ends where its rule or that of a patch around it says so, and where it is full.
#[derive(Clone, Debug)]
pub struct Cutter {
    levels: Vec<Level>,
    bytes: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Level {
    rule: Arc<dyn PatchRule>,
    /// Places of a patch.
    len: usize,
    /// Tokens of the largest patch.
    most: usize,
    /// Tokens of the present patch.
    tokens: usize,
}

impl Cutter {
    /// At the start of a sequence of `config`'s model.
    pub fn new(config: &MblmConfig) -> Self {
        let level = |(rule, &len): (&Arc<dyn PatchRule>, &usize)| Level {
            rule: rule.clone(),
            len,
            most: rule.max_patch().map_or(len, |most| most.min(len)),
            tokens: 0,
        };
        Cutter { levels: config.rules().iter().zip(&config.seq_lens[1..]).map(level).collect(), bytes: vec![] }
    }

    /// Takes the next byte. Returns how many levels of patches end after it: 1 is an innermost patch alone.
    ///
    /// # Errors
    /// A rule fails.
    pub fn push(&mut self, id: u32) -> Result<usize> {
        self.bytes.push(id);
        let count = self.levels.len();
        // The outermost patch that ends by its rule ends those in it.
        let mut outermost = count;
        for (n, level) in self.levels.iter().enumerate().rev() {
            if level.rule.ends_patch(&self.bytes)? {
                outermost = n;
            }
        }
        let mut ended = 0;
        for (n, level) in self.levels.iter_mut().enumerate().rev() {
            level.tokens += 1;
            if n < outermost && level.tokens < level.most {
                break;
            }
            level.tokens = 0;
            ended += 1;
        }
        Ok(ended)
    }

    /// The place of each of `ids`, the first of a sequence, where patches are padded to their full length: a patch that ends
    /// early is followed by the next multiple of its places.
    ///
    /// # Errors
    /// A rule fails.
    pub fn places(mut self, ids: &[u32]) -> Result<Vec<usize>> {
        let (mut next, mut places) = (0usize, Vec::with_capacity(ids.len()));
        for &id in ids {
            places.push(next);
            let ended = self.push(id)?;
            let patch = self.levels[self.levels.len() - ended..].iter().map(|level| level.len).product();
            next = (next + 1).next_multiple_of(patch);
        }
        Ok(places)
    }

    /// How many of the first `ids` fill `patches` tokens of the first stage, or all if they do not fill them.
    ///
    /// # Errors
    /// A rule fails.
    pub fn sequence_len(mut self, ids: &[u32], patches: usize) -> Result<usize> {
        let (mut done, all) = (0, self.levels.len());
        for (i, &id) in ids.iter().enumerate() {
            done += usize::from(self.push(id)? == all);
            if done == patches {
                return Ok(i + 1);
            }
        }
        Ok(ids.len())
    }
}
