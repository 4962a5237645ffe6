//! Cuts a sequence into patches by the rules and the largest lengths of all levels: as a whole, or byte by byte.

use std::sync::Arc;

use mblm_sdk::error::Result;

use super::{Follow, PatchRule};
use crate::config::MblmConfig;

/// Cuts one sequence.
///
/// The levels are those of the stages below the first: the innermost patches are the sequences of the local stage. A patch
/// ends where its rule or that of a patch around it says so, and where it is full.
#[derive(Clone, Debug)]
pub struct Cutter {
    rules: Vec<Arc<dyn PatchRule>>,
    levels: Vec<Level>,
}

#[derive(Clone, Copy, Debug)]
struct Level {
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
        let rules = config.rules();
        let level = |(rule, &len): (&Arc<dyn PatchRule>, &usize)| Level {
            len,
            most: rule.max_patch().map_or(len, |most| most.min(len)),
            tokens: 0,
        };
        let levels = rules.iter().zip(&config.seq_lens[1..]).map(level).collect();
        Cutter { rules, levels }
    }

    /// The place of each of `ids`, the first of a sequence, where patches are padded to their full length: a patch that ends
    /// early is followed by the next multiple of its places.
    ///
    /// # Errors
    /// A rule fails.
    pub fn places(self, ids: &[u32]) -> Result<Vec<usize>> {
        let lens: Vec<usize> = self.levels.iter().map(|level| level.len).collect();
        let (mut next, mut places) = (0usize, Vec::with_capacity(ids.len()));
        self.cut(ids, |ended| {
            places.push(next);
            next = (next + 1).next_multiple_of(lens[lens.len() - ended..].iter().product());
            true
        })?;
        Ok(places)
    }

    /// The number of ids in the first `patches` tokens of the first stage; of all ids if there are fewer tokens.
    ///
    /// # Errors
    /// A rule fails.
    pub fn sequence_len(self, ids: &[u32], patches: usize) -> Result<usize> {
        let (mut done, mut len, all) = (0, 0, self.levels.len());
        self.cut(ids, |ended| {
            len += 1;
            done += usize::from(ended == all);
            done < patches
        })?;
        Ok(len)
    }

    /// Calls `each` after each id with the number of levels of patches that end, while it returns true.
    fn cut(self, ids: &[u32], mut each: impl FnMut(usize) -> bool) -> Result<()> {
        let Cutter { rules, mut levels } = self;
        let mut by_rule: Vec<_> = rules.iter().map(|rule| rule.ends(ids)).collect();
        for _ in ids {
            let ends = |n: usize| by_rule[n].next().unwrap_or(Ok(false));
            if !each(advance(&mut levels, ends)?) {
                break;
            }
        }
        Ok(())
    }

    /// Follows a sequence byte by byte.
    ///
    /// # Errors
    /// A rule fails.
    pub fn follow(self) -> Result<Following> {
        let followers = self.rules.iter().map(|rule| rule.follow()).collect::<Result<_>>()?;
        Ok(Following { cutter: self, followers, bytes: vec![] })
    }
}

/// Counts one more token in. Returns how many levels of patches end after it; `ends` says whether the rule of a level ends its
/// patch, and is asked once for each.
fn advance(levels: &mut [Level], mut ends: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
    // The outermost patch that ends by its rule ends those in it.
    let mut outermost = levels.len();
    for n in (0..levels.len()).rev() {
        if ends(n)? {
            outermost = n;
        }
    }
    let mut ended = 0;
    for (n, level) in levels.iter_mut().enumerate().rev() {
        level.tokens += 1;
        if n < outermost && level.tokens < level.most {
            break;
        }
        level.tokens = 0;
        ended += 1;
    }
    Ok(ended)
}

/// A sequence that grows byte by byte.
pub struct Following {
    cutter: Cutter,
    /// Of the rules that keep a state.
    followers: Vec<Option<Box<dyn Follow>>>,
    bytes: Vec<u32>,
}

impl Following {
    /// Takes the next byte. Returns how many levels of patches end after it: 1 is an innermost patch alone.
    ///
    /// # Errors
    /// A rule fails.
    pub fn push(&mut self, id: u32) -> Result<usize> {
        self.bytes.push(id);
        let Cutter { rules, levels } = &mut self.cutter;
        advance(levels, |n| match &mut self.followers[n] {
            Some(follower) => follower.push(id),
            None => rules[n].ends_patch(&self.bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patching::{ByteSet, Delimiters, Spacelike};

    /// Levels of at most two patches of at most four bytes.
    fn cutter(rules: &[Arc<dyn PatchRule>]) -> Cutter {
        Cutter { rules: rules.to_vec(), levels: [2, 4].map(|len| Level { len, most: len, tokens: 0 }).into() }
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_patch_ends_by_its_rule_by_that_of_a_larger_one_or_when_it_is_full() {
        let lines = Delimiters { bytes: ByteSet::Characters(";".into()), max_patch: None };
        let cutter = cutter(&[Arc::new(lines), Arc::new(Spacelike::default())]);
        let ids = ids("ab cdefg;h ;");
        let mut following = cutter.clone().follow().unwrap();
        let ended: Vec<usize> = ids.iter().map(|&id| following.push(id).unwrap()).collect();
        // The second word is full, and with it the line of two words; `;` after a space ends both by the outer rule.
        assert_eq!(ended, [0, 0, 1, 0, 0, 0, 2, 0, 2, 0, 1, 2]);
        assert_eq!(cutter.clone().places(&ids).unwrap(), [0, 1, 2, 4, 5, 6, 7, 8, 9, 16, 17, 20]);
        let lens = [1, 2, 3, 4].map(|lines| cutter.clone().sequence_len(&ids, lines).unwrap());
        assert_eq!(lens, [7, 9, 12, 12], "all of the bytes, if there are fewer lines");
    }
}
