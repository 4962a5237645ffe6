//! The contract of a data set: splits of sequences that can be read in any order.

use std::ops::Range;
use std::path::Path;

use mblm_yaml::{from_value, join};
use serde::de::DeserializeOwned;

use crate::cut::Cut;
use crate::error::{Error, Result};
use crate::files::fingerprint::Fingerprint;

/// A split of a data set: sequences of a fixed length, in a fixed order.
///
/// As in the reference package, sequential data is read with an offset that grows by one with every epoch, so that
/// the borders between sequences move; hence `epoch`.
pub trait Dataset: Send + Sync {
    /// The number of sequences in epoch `epoch`.
    fn num_sequences(&self, epoch: u64) -> u64;

    /// Reads sequence `index` of epoch `epoch` into `ids`, which is one sequence long. If the data set
    /// [has one](Self::has_loss_mask), the weight of each position's loss goes to `loss_mask`; else that is empty.
    fn sample(&self, epoch: u64, index: u64, ids: &mut [u32], loss_mask: &mut [f32]) -> Result<()>;

    /// Whether sequences come with a loss mask.
    fn has_loss_mask(&self) -> bool {
        false
    }

    /// Mean bytes of a sequence without its padding, if [`DatasetOptions::cut`] makes sequences differ in length.
    fn mean_len(&self) -> Option<f64> {
        None
    }

    /// How often each byte value occurs, for the entropy a model must beat; `None` if the data are not bytes, or too
    /// many to count in passing.
    ///
    /// # Errors
    /// The data cannot be read.
    fn byte_counts(&self) -> Result<Option<[u64; 256]>> {
        Ok(None)
    }

    /// The part that is `share`, if it is not made of whole sequences of this one. Its [byte
    /// counts](Self::byte_counts) are those of all the data.
    fn share(&self, _share: Share) -> Option<Box<dyn Dataset>> {
        None
    }
}

/// Which one of several processes reads a [share](crate::share) of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Counted from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
}

impl Share {
    /// The share of `len` things.
    pub fn range(self, len: u64) -> Range<u64> {
        let each = len / self.size as u64;
        self.rank as u64 * each..(self.rank as u64 + 1) * each
    }
}

/// A data set, opened and checked.
pub struct Splits {
    /// The training split.
    pub train: Box<dyn Dataset>,
    /// The validation split.
    pub valid: Box<dyn Dataset>,
    /// The test split, if the data set has one.
    pub test: Option<Box<dyn Dataset>>,
    /// A line for the log: what was read and how it was split.
    pub about: String,
    /// Identifies the data, so that a run is not resumed on other data.
    pub fingerprint: Fingerprint,
}

/// The options for opening a data set.
#[derive(Clone, Copy, Debug)]
pub struct DatasetOptions<'a> {
    /// `io.dataset_dir`.
    pub dir: &'a Path,
    /// `io.output_dir`, which is not read where it lies below `dir`.
    pub output_dir: Option<&'a Path>,
    /// `io.dataset_args`.
    pub args: Option<&'a serde_json::Value>,
    /// `params.input_seq_len`.
    pub seq_len: usize,
    /// The model's vocabulary size.
    pub num_tokens: usize,
    /// The token after the end of a sample that is shorter than a sequence.
    pub pad_token_id: usize,
    /// How a run of bytes is cut into sequences of at most [`seq_len`](Self::seq_len) bytes, if patches follow the content.
    pub cut: Option<&'a Cut>,
}

impl DatasetOptions<'_> {
    /// [`args`](Self::args) as the struct of a data set; none are read as an empty mapping.
    ///
    /// # Errors
    /// Says which field is unknown, missing or of the wrong type.
    pub fn read_args<T: DeserializeOwned>(&self) -> Result<T> {
        const PATH: &str = "io.dataset_args";
        let empty = serde_json::json!({});
        let value = serde_yaml::to_value(self.args.unwrap_or(&empty))
            .map_err(|error| Error::Config(format!("{PATH}: {error}")))?;
        from_value(&value).map_err(|error| Error::Config(format!("{}: {}", join(PATH, &error.path), error.message)))
    }
}

/// The arguments of a data set that takes none.
#[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoArgs {}

/// The entropy in bits per byte of the distribution `counts`: what a model reaches that knows only how often each
/// byte occurs.
pub fn unigram_entropy(counts: &[u64; 256]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    let share = |&count: &u64| count as f64 / total;
    counts.iter().filter(|&&count| count > 0).map(share).map(|p| -p * p.log2()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_known_distributions() {
        let mut counts = [0; 256];
        counts[7] = 5;
        assert_eq!(unigram_entropy(&counts), 0.0);
        counts[8] = 5;
        assert_eq!(unigram_entropy(&counts), 1.0);
        assert_eq!(unigram_entropy(&[3; 256]), 8.0);
    }
}
