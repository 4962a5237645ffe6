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

    /// The number of ids in the first `patches` tokens of the first stage; of all ids if there are fewer tokens.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patching::{ByteSet, Delimiters, Spacelike};

    /// Levels of at most two patches of at most four bytes.
    fn cutter(rules: &[Arc<dyn PatchRule>]) -> Cutter {
        let level = |(rule, len): (&Arc<dyn PatchRule>, usize)| Level { rule: rule.clone(), len, most: len, tokens: 0 };
        Cutter { levels: rules.iter().zip([2, 4]).map(level).collect(), bytes: vec![] }
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_patch_ends_by_its_rule_by_that_of_a_larger_one_or_when_it_is_full() {
        let lines = Delimiters { bytes: ByteSet::Characters(";".into()), max_patch: None };
        let cutter = cutter(&[Arc::new(lines), Arc::new(Spacelike::default())]);
        let ids = ids("ab cdefg;h ;");
        let mut levels = cutter.clone();
        let ended: Vec<usize> = ids.iter().map(|&id| levels.push(id).unwrap()).collect();
        // The second word is full, and with it the line of two words; `;` after a space ends both by the outer rule.
        assert_eq!(ended, [0, 0, 1, 0, 0, 0, 2, 0, 2, 0, 1, 2]);
        assert_eq!(cutter.clone().places(&ids).unwrap(), [0, 1, 2, 4, 5, 6, 7, 8, 9, 16, 17, 20]);
        let lens = [1, 2, 3, 4].map(|lines| cutter.clone().sequence_len(&ids, lines).unwrap());
        assert_eq!(lens, [7, 9, 12, 12], "all of the bytes, if there are fewer lines");
    }
}
