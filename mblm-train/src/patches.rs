//! How long the patches of data are, where they follow the content.

use mblm_core::config::MblmConfig;
use mblm_core::patching::{Cutter, without_padding};
use mblm_data::Dataset;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// Sequences that are looked at, spread over the data: no more than so many, of so many bytes together.
const LOOKED_AT: u64 = 256;
const BYTES: u64 = 4 << 20;

/// Above this share of patches that end only because they are full, a rule does not fit the data.
const MOSTLY_FULL: f64 = 0.9;
/// Below so many bytes, the stages above run for nearly every byte.
const SHORT: f64 = 1.5;

/// The lengths of patches in some sequences of a data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PatchLengths {
    /// Mean tokens in a sequence of each stage but the first, from the outside in.
    pub means: Vec<f64>,
    /// The number of innermost patches of 1, 2, … bytes.
    pub histogram: Vec<u64>,
    /// The share of innermost patches that end because they are full, and by no rule.
    pub full: f64,
}

impl PatchLengths {
    /// The lengths in `dataset`, whose sequences are `seq_len` long; none where all patches are full.
    ///
    /// # Errors
    /// The data cannot be read, or the rule fails.
    pub fn measure(config: &MblmConfig, dataset: &dyn Dataset, seq_len: usize) -> Result<Option<Self>> {
        if config.is_fixed() {
            return Ok(None);
        }
        let (count, mut ids) = (dataset.num_sequences(0), vec![0; seq_len]);
        let mut mask = vec![0.0; if dataset.has_loss_mask() { seq_len } else { 0 }];
        let mut found = Counts { sequences: vec![0; config.num_stages()], ..Counts::default() };
        let looked_at = count.min(LOOKED_AT).min((BYTES / seq_len as u64).max(1));
        for n in 0..looked_at {
            dataset.sample(0, n * count / looked_at, &mut ids, &mut mask)?;
            found.add(config, &ids)?;
        }
        Ok(Some(found.lengths()))
    }

    /// Mean bytes of an innermost patch.
    pub fn mean(&self) -> f64 {
        self.means.last().copied().unwrap_or(f64::NAN)
    }

    /// What is wrong with the rule for these data.
    pub fn warning(&self) -> Option<String> {
        match (100.0 * self.full, self.mean()) {
            (full, _) if self.full > MOSTLY_FULL => Some(format!(
                "params.patching: {full:.0}% of the patches end because they are full, not by the rule; another rule may fit these \
                 data better"
            )),
            (_, mean) if mean < SHORT => Some(format!(
                "params.patching: patches have {mean:.2} bytes on average, so that the stages above run for nearly every byte; \
                 another rule may fit these data better"
            )),
            _ => None,
        }
    }
}

#[derive(Default)]
struct Counts {
    /// Of each stage but the first, and the bytes at the end.
    sequences: Vec<u64>,
    histogram: Vec<u64>,
    full: u64,
}

impl Counts {
    fn add(&mut self, config: &MblmConfig, ids: &[u32]) -> Result<()> {
        let ids = without_padding(ids, config.pad_token_id as u32);
        let (real, places) = (ids.len(), Cutter::new(config).places(ids)?);
        // Of the sequences of stage n, each has its first token where the number of whole patches before it changes.
        let (levels, mut room) = (self.sequences.len() - 1, 1);
        let mut ends = vec![false; real];
        for rule in config.rules() {
            for (ends, by_rule) in ends.iter_mut().zip(rule.ends(ids)) {
                *ends |= by_rule?;
            }
        }
        self.sequences[levels] += real as u64;
        for n in (0..levels).rev() {
            room *= config.seq_lens[n + 1];
            let mut end = 0;
            for patch in places.chunk_by(|a, b| a / room == b / room) {
                self.sequences[n] += 1;
                end += patch.len();
                // The last one may have been cut off by the end of the sequence.
                if n + 1 == levels && (end < real || patch.len() == room) {
                    self.histogram.resize(self.histogram.len().max(patch.len()), 0);
                    self.histogram[patch.len() - 1] += 1;
                    self.full += u64::from(!ends[end - 1]);
                }
            }
        }
        Ok(())
    }

    fn lengths(self) -> PatchLengths {
        let means = self.sequences.windows(2).map(|pair| pair[1] as f64 / pair[0].max(1) as f64).collect();
        let full = self.full as f64 / self.histogram.iter().sum::<u64>().max(1) as f64;
        PatchLengths { means, histogram: self.histogram, full }
    }
}
