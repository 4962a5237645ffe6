//! Sequences whose length follows the content: each has a fixed number of patches, which end where the model cuts them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::Result;
use crate::files::corpus::Corpus;

/// Bytes of a segment, whose sequences one thread finds. No sequence goes on into the next segment.
const SEGMENT: u64 = 1 << 22;
/// A segment has at least so many sequences.
const LEAST_SEQUENCES: u64 = 16;

/// The number of ids in the first so many patches; all ids if there are fewer patches.
type PatchesLen = dyn Fn(&[u32], usize) -> Result<usize> + Send + Sync;

/// Cuts a run of bytes into sequences of a number of patches.
#[derive(Clone)]
pub struct Cut {
    /// Patches of a sequence.
    pub patches: usize,
    len: Arc<PatchesLen>,
}

impl fmt::Debug for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cut of {} patches", self.patches)
    }
}

impl Cut {
    /// Sequences of `patches`. `len(ids, n)` is the number of ids in the first `n` patches, which begin with the first id; it
    /// is the number of all ids if there are fewer patches.
    pub fn new(patches: usize, len: impl Fn(&[u32], usize) -> Result<usize> + Send + Sync + 'static) -> Self {
        Cut { patches, len: Arc::new(len) }
    }

    /// The number of ids in the first `patches` patches; of all ids if there are fewer patches.
    ///
    /// # Errors
    /// The rule fails.
    pub fn len(&self, ids: &[u32], patches: usize) -> Result<usize> {
        match patches {
            0 => Ok(0),
            _ => (self.len)(ids, patches),
        }
    }

    /// Where each sequence of `range` begins. A sequence has at most `longest` bytes, and the last one of a segment may have
    /// fewer patches than the others.
    ///
    /// # Errors
    /// A file cannot be read, or the rule fails.
    pub fn starts(&self, corpus: &Corpus, range: Range<u64>, longest: usize) -> Result<Vec<u64>> {
        let segment = SEGMENT.max(LEAST_SEQUENCES * longest as u64);
        let starts: Vec<Vec<u64>> = (0..(range.end - range.start).div_ceil(segment))
            .into_par_iter()
            .map(|n| {
                let begin = range.start + n * segment;
                let end = range.end.min(begin + segment);
                let mut ids = vec![0; (end - begin) as usize];
                corpus.read(begin, &mut ids)?;
                let (mut at, mut starts) = (0, vec![]);
                while at < ids.len() {
                    starts.push(begin + at as u64);
                    at += self.len(&ids[at..ids.len().min(at + longest)], self.patches)?.max(1);
                }
                Ok(starts)
            })
            .collect::<Result<_>>()?;
        Ok(starts.concat())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Patches of bytes up to a zero.
    pub(crate) fn to_zeros(patches: usize) -> Cut {
        Cut::new(patches, |ids, patches| {
            let zeros = ids.iter().enumerate().filter(|(_, id)| **id == 0).map(|(i, _)| i + 1);
            Ok(zeros.take(patches).nth(patches - 1).unwrap_or(ids.len()))
        })
    }

    #[test]
    fn sequences_follow_each_other() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1, 0, 2, 2, 0, 3, 0, 4, 4, 4, 0, 5]).unwrap();
        let corpus = Corpus::open(file.path(), &[]).unwrap();
        assert_eq!(to_zeros(2).starts(&corpus, 0..12, 8).unwrap(), [0, 5, 11]);
        assert_eq!(to_zeros(1).starts(&corpus, 2..12, 3).unwrap(), [2, 5, 7, 10, 11]);
        assert_eq!(to_zeros(9).starts(&corpus, 0..12, 20).unwrap(), [0]);
    }

    #[test]
    fn no_sequence_crosses_a_border_of_segments() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let end = 2 * SEGMENT + 5;
        std::fs::write(file.path(), vec![9; end as usize]).unwrap();
        let corpus = Corpus::open(file.path(), &[]).unwrap();
        let starts = to_zeros(1).starts(&corpus, 2..end, 1000).unwrap();
        let border = starts.iter().position(|start| *start == 2 + SEGMENT).unwrap();
        assert_eq!((starts[border] - starts[border - 1], starts[border + 1] - starts[border]), (SEGMENT % 1000, 1000));
        assert_eq!(starts.last(), Some(&(2 + 2 * SEGMENT)));
    }
}
