//! Data set `pg19`: the books of [PG-19](https://github.com/google-deepmind/pg19), byte by byte.
//!
//! `io.dataset_dir` is laid out as the original: folders `train`, `validation` and `test` of `.txt` files; other files
//! are not read, and `test` may be missing. The books of a folder are one run of bytes, in the order of their names
//! (the reference package takes them in the order in which the file system lists them). Files are read and sequences
//! are cut as in [`bytes`](super::bytes).

use std::path::PathBuf;
use std::sync::Arc;

use crate::bytes::{BytesSplit, check_vocabulary};
use crate::dataset::{DatasetOptions, NoArgs, Splits};
use crate::error::{Error, Result};
use crate::files::corpus::Corpus;
use crate::files::fingerprint::Fingerprint;
use crate::files::listing::Listing;

crate::register_dataset!(
    "pg19",
    "a folder of books with train, validation and test, byte by byte",
    open,
    args = NoArgs
);
// The package's name for the same books under an encoder, which masks them itself.
crate::register_dataset!("pg19masked", "the books of pg19, for encoders", open, args = NoArgs);

fn open(options: &DatasetOptions) -> Result<Splits> {
    let NoArgs {} = options.read_args()?;
    let train = books(options, "train")?;
    let valid = books(options, "validation")?;
    let test = folder(options, "test").is_dir().then(|| books(options, "test")).transpose()?;
    let size = |books: &Corpus| format!("{} bytes in {} file(s)", books.len(), books.num_files());
    let test_size = test.as_ref().map_or_else(|| "nothing".into(), |books| size(books));
    let split = |books: Arc<Corpus>, shifts| {
        let range = 0..books.len();
        BytesSplit::boxed(books, range, options, shifts)
    };
    let sums = [train.sums("train")?, valid.sums("validation")?].concat();
    Ok(Splits {
        about: format!(
            "{:?}: {} train, {} validate, {test_size} to test on{}{}",
            options.dir,
            size(&train),
            size(&valid),
            train.left_out(),
            valid.left_out()
        ),
        fingerprint: Fingerprint::new(sums, format!("{}-{}", train.names_and_sizes(), valid.names_and_sizes())),
        train: split(train, true)?,
        valid: split(valid, false)?,
        test: test.map(|books| split(books, false)).transpose()?,
    })
}

fn folder(options: &DatasetOptions, name: &str) -> PathBuf {
    options.dir.join(name)
}

/// The books of one folder: at least a sequence of bytes, each of them a token.
fn books(options: &DatasetOptions, name: &str) -> Result<Arc<Corpus>> {
    let folder = folder(options, name);
    if !folder.is_dir() {
        return Err(Error::Config(format!(
            "io.dataset_dir: there is no folder {folder:?}; data set pg19 expects folders train, validation and, if \
             wanted, test of .txt files, as in https://github.com/google-deepmind/pg19"
        )));
    }
    let books = Corpus::new(Listing::find(&folder, &["**/*.txt".into()], options.output_dir)?);
    if books.len() < options.seq_len as u64 {
        return Err(Error::Config(format!(
            "io.dataset_dir: the {} .txt file(s) in {folder:?} hold {} bytes; expected at least {}, a sequence of \
             params.input_seq_len: add books or shorten it",
            books.num_files(),
            books.len(),
            options.seq_len
        )));
    }
    check_vocabulary(&books, options.num_tokens)?;
    Ok(Arc::new(books))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::dataset::Dataset;

    /// A data set of `sizes[i]` bytes in the i-th of the splits' books, which number the bytes of a folder.
    fn write(sizes: [&[usize]; 3]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("metadata.csv"), "not read").unwrap();
        for (name, sizes) in ["train", "validation", "test"].into_iter().zip(sizes) {
            let folder = root.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("0.csv"), "not read").unwrap();
            let mut next = 0..=255;
            for (book, &size) in sizes.iter().enumerate() {
                fs::write(folder.join(format!("{book}.txt")), next.by_ref().take(size).collect::<Vec<u8>>()).unwrap();
            }
        }
        root
    }

    fn open_root(root: &Path, seq_len: usize, args: Option<&Value>) -> Result<Splits> {
        let options =
            DatasetOptions { dir: root, output_dir: None, args, seq_len, num_tokens: 256, pad_token_id: 0, cut: None };
        crate::registry::open("pg19", &options)
    }

    fn sample(split: &dyn Dataset, epoch: u64, index: u64) -> Vec<u32> {
        let mut ids = vec![0; 4];
        split.sample(epoch, index, &mut ids, &mut []).unwrap();
        ids
    }

    #[test]
    fn each_folder_is_a_split_of_its_books() {
        let root = write([&[5, 0, 6], &[9], &[4, 4]]);
        let splits = open_root(root.path(), 4, Some(&json!({}))).unwrap();
        let want = "11 bytes in 2 file(s) train, 9 bytes in 1 file(s) validate, 8 bytes in 2 file(s) to test on";
        assert!(splits.about.contains(want), "{}", splits.about);
        let (train, valid, test) = (&*splits.train, &*splits.valid, &*splits.test.unwrap());
        assert_eq!([0, 3, 4].map(|epoch| train.num_sequences(epoch)), [2, 2, 2]);
        assert_eq!(sample(train, 0, 1), [4, 5, 6, 7], "across books");
        assert_eq!(sample(train, 3, 1), [7, 8, 9, 10], "shifted by the epoch");
        assert_eq!((valid.num_sequences(1), sample(valid, 1, 1)), (2, vec![4, 5, 6, 7]));
        assert_eq!((test.num_sequences(1), sample(test, 1, 0)), (2, vec![0, 1, 2, 3]));
        assert!(!train.has_loss_mask());
        assert_eq!(train.byte_counts().unwrap().unwrap().iter().sum::<u64>(), 11);
    }

    #[test]
    fn the_test_folder_may_be_missing_and_books_may_not_change() {
        let root = write([&[4], &[4], &[4]]);
        let before = open_root(root.path(), 4, None).unwrap().fingerprint;
        fs::remove_dir_all(root.path().join("test")).unwrap();
        let splits = open_root(root.path(), 4, None).unwrap();
        assert!(splits.test.is_none());
        assert_eq!(splits.fingerprint, before, "a run does not read the test split");
        fs::write(root.path().join("validation/1.txt"), "more").unwrap();
        assert_ne!(open_root(root.path(), 4, None).unwrap().fingerprint, before);
    }

    #[test]
    fn mistakes_are_named() {
        let root = write([&[8], &[3], &[4]]);
        let message = |seq_len, args: Option<Value>| {
            let error = open_root(root.path(), seq_len, args.as_ref()).err().unwrap();
            assert!(error.is_configuration());
            error.to_string()
        };
        let short = message(4, None);
        assert!(short.contains("validation\" hold 3 bytes; expected at least 4"), "{short}");
        let args = message(2, Some(json!({"files": ["a"]})));
        assert_eq!(args, "io.dataset_args.files: unknown field; none is expected here");
        fs::rename(root.path().join("validation"), root.path().join("valid")).unwrap();
        let missing = message(2, None);
        assert!(missing.contains("there is no folder") && missing.contains("validation"), "{missing}");
    }
}
