//! Data set `bytes`: files as they are, each byte a token.
//!
//! `io.dataset_dir` is a file, a folder or a glob. Folders are read recursively, links are followed, each file counts once,
//! and hidden files, run folders and `io.output_dir` are left out. The files are taken as one run of bytes, in the order of
//! their paths below the folder, part by part in byte order. They are read by position as they are needed, so they may be
//! larger than memory. A file that shrinks or vanishes during a run ends the run with an error. A change of contents at
//! equal length goes unnoticed until the run is resumed: do not change data that are in use.
//!
//! **Split**: the last `validation_fraction` of the bytes (a tenth by default), but at least one sequence, is the
//! validation data; what lies before is the training data. **Sequences** do not overlap: in epoch `e`, sequence `i` is
//! the `input_seq_len` bytes from `e mod input_seq_len + i * input_seq_len` on; what is left at the end is not used.
//! Validation has no such offset.
//!
//! Where patches follow the content (`params.patching`), a sequence has a fixed number of patches and is padded to
//! `input_seq_len` bytes. The sequences of the first epoch follow each other; in epoch `e`, each begins `e` patches later,
//! modulo the number of patches. The data are cut in segments of 4 MiB (or of 16 times `input_seq_len`, if that is more). The
//! last sequence of a segment may have fewer patches.

use std::ops::Range;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::cut::Cut;
use crate::dataset::{Dataset, DatasetOptions, Splits};
use crate::error::{Error, Result};
use crate::files::corpus::Corpus;
use crate::files::listing::Listing;
use crate::share::Share;

/// Counting the bytes of more data than this would delay the start of a run.
const COUNTED: u64 = 1 << 30;

crate::register_dataset!("bytes", "a file, a folder or a glob of files, byte by byte", open, args = BytesArgs);

/// `io.dataset_args` of data set `bytes`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BytesArgs {
    /// Files, folders or globs below `io.dataset_dir`. Empty: everything.
    #[serde(default)]
    pub files: Vec<String>,
    /// The fraction of the bytes, at the end, used for validation; above 0 and below 1.
    #[serde(default = "default_fraction")]
    pub validation_fraction: f64,
}

fn default_fraction() -> f64 {
    0.1
}

/// A range of a corpus, cut into sequences.
pub struct BytesSplit {
    corpus: Arc<Corpus>,
    start: u64,
    end: u64,
    /// What it is a share of.
    whole: Range<u64>,
    seq_len: u64,
    /// Whether epochs shift the borders between sequences.
    shifts: bool,
    /// Where patches follow the content.
    cut: Option<Sequences>,
}

/// Sequences of a number of patches.
struct Sequences {
    cut: Cut,
    /// Where each begins in the first epoch.
    starts: Vec<u64>,
    pad: u32,
}

impl BytesSplit {
    /// The bytes `range` of `corpus` in sequences as `options` says, whose borders move with the epoch if it `shifts`.
    ///
    /// # Errors
    /// Patches follow the content, and a file cannot be read or the rule fails.
    pub(crate) fn boxed(
        corpus: Arc<Corpus>,
        range: Range<u64>,
        options: &DatasetOptions,
        shifts: bool,
    ) -> Result<Box<dyn Dataset>> {
        let Range { start, end } = range;
        let sequences = |cut: &Cut| -> Result<Sequences> {
            let starts = cut.starts(&corpus, start..end, options.seq_len)?;
            Ok(Sequences { cut: cut.clone(), starts, pad: options.pad_token_id as u32 })
        };
        let cut = options.cut.map(sequences).transpose()?;
        Ok(Box::new(BytesSplit { corpus, start, end, whole: range, seq_len: options.seq_len as u64, shifts, cut }))
    }

    /// Reads the sequence that begins `later` patches after `start`, and pads it.
    fn sample_patches(&self, sequences: &Sequences, start: u64, later: usize, ids: &mut [u32]) -> Result<()> {
        let room = |at: u64| (self.end - at).min(self.seq_len) as usize;
        let read = |at: u64, ids: &mut [u32]| self.corpus.read(at, ids);
        let available = room(start);
        read(start, &mut ids[..available])?;
        // Nothing may be left of the last sequence. It then begins where it does in the first epoch.
        let skipped = match sequences.cut.len(&ids[..available], later)? {
            skipped if start + skipped as u64 == self.end => 0,
            skipped => skipped as u64,
        };
        let available = room(start + skipped);
        if skipped > 0 {
            read(start + skipped, &mut ids[..available])?;
        }
        let len = sequences.cut.len(&ids[..available], sequences.cut.patches)?;
        ids[len..].fill(sequences.pad);
        Ok(())
    }

    fn offset(&self, epoch: u64) -> u64 {
        if self.shifts { epoch % self.seq_len } else { 0 }
    }
}

impl Dataset for BytesSplit {
    fn num_sequences(&self, epoch: u64) -> u64 {
        if let Some(Sequences { starts, .. }) = &self.cut {
            return starts.len() as u64;
        }
        (self.end - self.start).saturating_sub(self.offset(epoch)) / self.seq_len
    }

    fn sample(&self, epoch: u64, index: u64, ids: &mut [u32], _: &mut [f32]) -> Result<()> {
        if let Some(sequences) = &self.cut {
            let later = if self.shifts { (epoch % sequences.cut.patches as u64) as usize } else { 0 };
            return self.sample_patches(sequences, sequences.starts[index as usize], later, ids);
        }
        self.corpus.read(self.start + self.offset(epoch) + index * self.seq_len, ids)
    }

    fn mean_len(&self) -> Option<f64> {
        self.cut.as_ref().map(|cut| (self.end - self.start) as f64 / cut.starts.len().max(1) as f64)
    }

    fn byte_counts(&self) -> Result<Option<[u64; 256]>> {
        let Range { start, end } = self.whole;
        (end - start <= COUNTED).then(|| self.corpus.byte_counts(start, end)).transpose()
    }

    fn share(&self, share: Share) -> Option<Box<dyn Dataset>> {
        if self.cut.is_some() {
            return None;
        }
        let part = share.range(self.end - self.start);
        let (start, end) = (self.start + part.start, self.start + part.end);
        let BytesSplit { corpus, whole, seq_len, shifts, .. } = self;
        let (corpus, whole) = (corpus.clone(), whole.clone());
        Some(Box::new(BytesSplit { corpus, start, end, whole, seq_len: *seq_len, shifts: *shifts, cut: None }))
    }
}

fn open(options: &DatasetOptions) -> Result<Splits> {
    let args: BytesArgs = options.read_args()?;
    let fraction = args.validation_fraction;
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(Error::Config(format!(
            "io.dataset_args.validation_fraction: expected a number above 0 and below 1, found {fraction}"
        )));
    }
    let corpus = Arc::new(Corpus::new(Listing::find(options.dir, &args.files, options.output_dir)?));
    let (len, seq_len) = (corpus.len(), options.seq_len as u64);
    if len == 0 {
        return Err(Error::Config(format!(
            "io.dataset_dir: {:?} contains no bytes; expected at least {} (two sequences of input_seq_len){}",
            options.dir,
            2 * seq_len,
            corpus.left_out()
        )));
    }
    let valid = ((len as f64 * fraction) as u64).max(seq_len);
    if len < valid + seq_len {
        return Err(Error::Config(format!(
            "params.input_seq_len: sequences of {seq_len} bytes do not fit the {len} bytes of {:?}: training and \
             validation need one each, {} bytes in all; shorten input_seq_len, change validation_fraction \
             ({fraction}) or add data",
            options.dir,
            valid + seq_len
        )));
    }
    check_vocabulary(&corpus, options.num_tokens)?;
    let cut = len - valid;
    let split = |range, shifts| BytesSplit::boxed(corpus.clone(), range, options, shifts);
    Ok(Splits {
        train: split(0..cut, true)?,
        valid: split(cut..len, false)?,
        test: None,
        about: format!(
            "{len} bytes in {} file(s) of {:?}: the first {cut} train, the last {valid} validate{}",
            corpus.num_files(),
            options.dir,
            corpus.left_out()
        ),
        fingerprint: corpus.fingerprint()?,
    })
}

/// Every byte must be a token.
pub fn check_vocabulary(corpus: &Corpus, num_tokens: usize) -> Result<()> {
    if num_tokens >= 256 {
        return Ok(());
    }
    match corpus.first_at_least(num_tokens)? {
        None => Ok(()),
        Some((byte, path, place)) => Err(Error::Config(format!(
            "params.num_tokens: found {num_tokens}, but {} contains the byte {byte} (at offset {place}); expected more than the \
             largest byte, and 256 suffices for all",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn file(len: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), (0..len).map(|i| i as u8).collect::<Vec<u8>>()).unwrap();
        file
    }

    fn open_file(len: usize, seq_len: usize, args: Option<serde_json::Value>, num_tokens: usize) -> Result<Splits> {
        open_at(file(len).path(), seq_len, args, num_tokens)
    }

    fn open_at(dir: &Path, seq_len: usize, args: Option<serde_json::Value>, num_tokens: usize) -> Result<Splits> {
        let args = args.as_ref();
        let options = DatasetOptions { dir, output_dir: None, args, seq_len, num_tokens, pad_token_id: 0, cut: None };
        crate::registry::open("bytes", &options)
    }

    fn sample(split: &dyn Dataset, epoch: u64, index: u64) -> Vec<u32> {
        let mut ids = vec![0; 4];
        split.sample(epoch, index, &mut ids, &mut []).unwrap();
        ids
    }

    #[test]
    fn the_end_validates_and_epochs_shift_training() {
        let file = file(100);
        let splits = open_at(file.path(), 4, None, 256).unwrap();
        assert!(splits.about.contains("the first 90 train, the last 10 validate"), "{}", splits.about);
        let (train, valid) = (&*splits.train, &*splits.valid);
        assert_eq!([0, 1, 2, 3, 4].map(|epoch| train.num_sequences(epoch)), [22, 22, 22, 21, 22]);
        assert_eq!(sample(train, 0, 21), [84, 85, 86, 87]);
        assert_eq!(sample(train, 3, 0), [3, 4, 5, 6]);
        assert_eq!(sample(train, 3, 20), [83, 84, 85, 86]);
        assert_eq!(sample(train, 4, 0), [0, 1, 2, 3], "the offset is modulo the sequence length");
        assert_eq!((valid.num_sequences(0), valid.num_sequences(1)), (2, 2));
        assert_eq!(sample(valid, 1, 1), [94, 95, 96, 97]);
        assert_eq!(train.byte_counts().unwrap().unwrap().iter().sum::<u64>(), 90);
    }

    #[test]
    fn shares_are_cut_between_bytes() {
        let file = file(100);
        let train = open_at(file.path(), 4, None, 256).unwrap().train;
        // 90 bytes: 30 each.
        let shares = [0, 1, 2].map(|rank| train.share(Share { rank, size: 3 }).unwrap());
        assert_eq!([0, 2, 3].map(|epoch| shares[1].num_sequences(epoch)), [7, 7, 6]);
        assert_eq!(sample(&*shares[1], 0, 0), [30, 31, 32, 33]);
        assert_eq!(sample(&*shares[2], 2, 6), [86, 87, 88, 89], "to the end, shifted by the epoch");
        assert_eq!(shares[1].byte_counts().unwrap().unwrap().iter().sum::<u64>(), 90, "of all the data");
    }

    #[test]
    fn validation_is_at_least_a_sequence() {
        let splits = open_file(8, 4, None, 256).unwrap();
        assert_eq!((splits.train.num_sequences(0), splits.valid.num_sequences(0)), (1, 1));
        let splits = open_file(100, 4, Some(json!({"validation_fraction": 0.5})), 256).unwrap();
        assert_eq!((splits.train.num_sequences(0), splits.valid.num_sequences(0)), (12, 12));
    }

    #[test]
    fn sequences_are_patches_and_begin_a_patch_later_with_every_epoch() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Patches end with a zero: 1 0 | 2 2 0 | 3 0 | 4 4 0 | 5 0 | 6, and then validation.
        let train = [1, 0, 2, 2, 0, 3, 0, 4, 4, 0, 5, 0, 6];
        std::fs::write(file.path(), [&train[..], &[7; 7]].concat()).unwrap();
        let cut = crate::cut::tests::to_zeros(2);
        let args = json!({"validation_fraction": 0.35});
        let options = DatasetOptions {
            dir: file.path(),
            output_dir: None,
            args: Some(&args),
            seq_len: 6,
            num_tokens: 256,
            pad_token_id: 9,
            cut: Some(&cut),
        };
        let splits = crate::registry::open("bytes", &options).unwrap();
        let read = |split: &dyn Dataset, epoch, index| {
            let mut ids = [0; 6];
            split.sample(epoch, index, &mut ids, &mut []).unwrap();
            ids
        };
        let split = &*splits.train;
        assert_eq!((split.num_sequences(0), split.num_sequences(5), split.mean_len()), (3, 3, Some(13.0 / 3.0)));
        assert_eq!([0, 1, 2].map(|i| read(split, 0, i)), [[1, 0, 2, 2, 0, 9], [3, 0, 4, 4, 0, 9], [5, 0, 6, 9, 9, 9]]);
        assert_eq!([0, 1, 2].map(|i| read(split, 1, i)), [[2, 2, 0, 3, 0, 9], [4, 4, 0, 5, 0, 9], [6, 9, 9, 9, 9, 9]]);
        assert_eq!(read(split, 2, 0), read(split, 0, 0), "modulo the patches of a sequence");
        assert_eq!(
            read(&*splits.valid, 1, 0),
            [7; 6],
            "validation does not move, and no patch is longer than a sequence"
        );
        assert_eq!(splits.valid.num_sequences(0), 2);
        let part = crate::share::share(splits.train, Share { rank: 1, size: 3 });
        assert_eq!(
            (part.num_sequences(0), read(&*part, 0, 0)),
            (1, [3, 0, 4, 4, 0, 9]),
            "shares are of whole sequences"
        );
    }

    #[test]
    fn mistakes_are_named() {
        let message = |len, seq_len, args, num_tokens| {
            let error = open_file(len, seq_len, args, num_tokens).err().unwrap();
            assert!(error.is_configuration());
            error.to_string()
        };
        assert!(message(0, 4, None, 256).contains("contains no bytes; expected at least 8"));
        let short = message(7, 4, None, 256);
        assert!(short.contains("sequences of 4 bytes do not fit the 7 bytes"), "{short}");
        let small = message(100, 4, None, 64);
        assert!(
            small.contains("params.num_tokens: found 64") && small.contains("the byte 64 (at offset 64)"),
            "{small}"
        );
        let args = message(100, 4, Some(json!({"fraction": 0.2})), 256);
        assert_eq!(args, "io.dataset_args.fraction: unknown field; did you mean `validation_fraction`?");
        assert!(message(100, 4, Some(json!({"validation_fraction": 1.0})), 256).contains("found 1"));
    }

    #[test]
    fn a_small_vocabulary_is_fine_for_small_bytes() {
        assert!(open_file(100, 4, None, 100).is_ok());
    }
}
