//! Evaluation of documents with the context that stands before each byte, beside [`evaluate`](crate::evaluate), where every
//! sequence begins without.
//!
//! A document is a file. Losses are of its bytes alone, and context never reaches over its start.

use std::ops::Range;
use std::path::{Path, PathBuf};

use mblm_core::model::{Mblm, Reader, Sequences};
use mblm_data::files::corpus::Corpus;

use crate::error::{Error, Result};
use crate::evaluate::{EvaluateOptions, Evaluation, open};
use crate::model::LossSum;

/// About so many bytes are read at once.
const PIECE: usize = 1 << 15;

/// The context that a byte of a document is predicted from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reach {
    /// All bytes before it, up to the model's length: where positions end, the context begins anew.
    Whole,
    /// A window of [`EvaluateOptions::seq_len`] bytes that moves by this many: at least the window's length less this.
    Slide(usize),
}

/// What [`evaluate_documents`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Documents {
    /// All bytes that were predicted.
    pub all: Evaluation,
    /// Words that begin in the bytes: parts without ASCII whitespace.
    pub words: u64,
    /// Each document of which a byte was predicted.
    pub files: Vec<(PathBuf, Evaluation)>,
    /// By the place in the document: from 0, 256, 512, 1024, … bytes on.
    pub depths: Vec<(u64, Evaluation)>,
    /// The longest context, if documents are longer, so that it began anew in them.
    pub limit: Option<usize>,
}

impl Documents {
    /// The perplexity per word, `exp(nats / words)`: the convention of PG-19 (Rae et al. 2020, section 4.3), which makes models
    /// with different tokens comparable.
    pub fn word_perplexity(&self) -> f64 {
        (self.all.loss * self.all.bytes as f64 / self.words as f64).exp()
    }
}

/// The losses of the bytes of every file in `place`, a file, a folder or a glob, each with the context that `reach` gives it.
///
/// # Errors
/// Nothing to read or to predict, a byte outside the vocabulary, patches that follow the content, a stride that is 0 or above the
/// window, or the model's own.
pub fn evaluate_documents(model: &Mblm, place: &str, options: &EvaluateOptions, reach: Reach) -> Result<Documents> {
    if !model.config().is_fixed() {
        let message =
            "context is measured only for patches of full length (params.patching: fixed); use --context none";
        return Err(Error::Config(message.into()));
    }
    if let Reach::Slide(stride) = reach
        && !(1..=options.seq_len).contains(&stride)
    {
        let window = options.seq_len;
        return Err(Error::Config(format!("the stride is {stride}; expected 1 to {window}, the bytes of the window")));
    }
    let corpus = open(place, options)?;
    let end = options.max_bytes.map_or(corpus.len(), |most| most.min(corpus.len()));
    let files: Vec<(&Path, u64)> = corpus.files().collect();
    let ends = files.iter().skip(1).map(|(_, start)| *start).chain([end]);
    let mut sums = Sums::default();
    let limit = Reader::new(model)?.limit();
    let mut exceeded = false;
    for (&(path, start), next) in files.iter().zip(ends) {
        let file = start.min(end)..next.min(end);
        sums.begin(path);
        let done = match reach {
            Reach::Whole => {
                exceeded |= limit.is_some_and(|limit| file.end - file.start > limit as u64);
                whole(model, &corpus, file, limit, &mut sums)
            }
            Reach::Slide(stride) => slide(model, &corpus, file, options, stride, &mut sums),
        };
        done.map_err(|error| sums.locate(error))?;
    }
    if sums.all.count == 0 {
        return Err(Error::Config(format!("{place:?} has no byte to predict: all bytes are the pad token")));
    }
    Ok(sums.found(limit.filter(|_| exceeded)))
}

/// A document through a reader, or several where positions end.
fn whole(model: &Mblm, corpus: &Corpus, file: Range<u64>, limit: Option<usize>, sums: &mut Sums) -> Result<()> {
    let mut reader = Reader::new(model)?;
    let piece = PIECE.next_multiple_of(reader.unit());
    let (mut at, mut read) = (file.start, 0);
    while at < file.end {
        if limit == Some(read) {
            (reader, read) = (Reader::new(model)?, 0);
        }
        let room = limit.map_or(piece, |limit| piece.min(limit - read));
        let mut ids = vec![0; room.min((file.end - at) as usize)];
        corpus.read(at, &mut ids)?;
        let losses = reader.losses(&ids)?;
        sums.add(&ids, &losses);
        (at, read) = (at + ids.len() as u64, read + ids.len());
    }
    Ok(())
}

/// A document through windows, of which each counts the bytes that the one before did not reach.
fn slide(
    model: &Mblm,
    corpus: &Corpus,
    file: Range<u64>,
    options: &EvaluateOptions,
    stride: usize,
    sums: &mut Sums,
) -> Result<()> {
    let window = (options.seq_len as u64).min(file.end - file.start);
    let mut ends: Vec<u64> = (file.start + window..file.end).step_by(stride).collect();
    ends.push(file.end);
    let mut counted = file.start;
    for ends in ends.chunks(options.batch_size) {
        let len = window as usize;
        let mut ids = vec![0; ends.len() * len];
        for (ids, end) in ids.chunks_exact_mut(len.max(1)).zip(ends) {
            corpus.read(end - window, ids)?;
        }
        if len == 0 {
            return Ok(());
        }
        let losses = model.byte_losses(&Sequences { ids: &ids, len, loss_mask: None })?;
        for ((ids, losses), end) in ids.chunks_exact(len).zip(losses.chunks_exact(len)).zip(ends) {
            let new = len - (end - counted) as usize..len;
            sums.add(&ids[new.clone()], &losses[new]);
            counted = *end;
        }
    }
    Ok(())
}

#[derive(Default)]
struct Sums {
    all: LossSum,
    words: u64,
    files: Vec<(PathBuf, LossSum)>,
    depths: Vec<LossSum>,
    /// Bytes of the present document so far, and whether the last one was part of a word.
    place: u64,
    in_word: bool,
}

impl Sums {
    fn begin(&mut self, path: &Path) {
        self.files.push((path.into(), LossSum::default()));
        (self.place, self.in_word) = (0, false);
    }

    /// Says where a loss is not finite.
    fn locate(&self, error: Error) -> Error {
        match (error, self.files.last()) {
            (Error::Core(mblm_core::Error::NotFinite(message)), Some((path, _))) => {
                let (path, place) = (path.display(), self.place);
                Error::Core(mblm_core::Error::NotFinite(format!("{path}, behind byte {place}: {message}")))
            }
            (other, _) => other,
        }
    }

    /// Takes the next bytes of the document in.
    fn add(&mut self, ids: &[u32], losses: &[f32]) {
        for (&id, &loss) in ids.iter().zip(losses) {
            let is_space = u8::try_from(id).is_ok_and(|byte| byte.is_ascii_whitespace());
            self.words += u64::from(!is_space && !self.in_word);
            self.in_word = !is_space;
            let depth = depth(self.place);
            self.place += 1;
            // That of the pad token is not a number, and does not count.
            if loss.is_nan() {
                continue;
            }
            let loss = LossSum { sum: f64::from(loss), count: 1 };
            self.depths.resize(self.depths.len().max(depth + 1), LossSum::default());
            self.depths[depth].add(loss);
            self.all.add(loss);
            if let Some((_, file)) = self.files.last_mut() {
                file.add(loss);
            }
        }
    }

    fn found(self, limit: Option<usize>) -> Documents {
        let files = self.files.into_iter().filter(|(_, losses)| losses.count > 0);
        let depths = self.depths.into_iter().enumerate().filter(|(_, losses)| losses.count > 0);
        Documents {
            all: self.all.into(),
            words: self.words,
            files: files.map(|(path, losses)| (path, losses.into())).collect(),
            depths: depths.map(|(depth, losses)| (begin(depth), losses.into())).collect(),
            limit,
        }
    }
}

/// Places of a document are told apart by their powers of two, from this one on.
const FIRST_DEPTH: u32 = 8;

fn depth(place: u64) -> usize {
    place.checked_ilog2().map_or(0, |power| (power + 1).saturating_sub(FIRST_DEPTH)) as usize
}

/// The first place at a depth.
fn begin(depth: usize) -> u64 {
    if depth == 0 { 0 } else { 1 << (depth as u32 + FIRST_DEPTH - 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_are_powers_of_two() {
        let places = [0, 1, 255, 256, 511, 512, 1023, 1024, 100_000];
        assert_eq!(places.map(depth), [0, 0, 0, 1, 1, 2, 2, 3, 9]);
        assert_eq!([0, 1, 2, 3, 9].map(begin), [0, 256, 512, 1024, 65_536]);
    }

    #[test]
    fn words_are_counted_across_pieces_and_the_pad_token_has_no_loss() {
        let mut sums = Sums::default();
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        for document in [vec!["To b", "e, or\n", "\tnot"], vec!["to", " be"]] {
            sums.begin(Path::new("x"));
            for piece in document {
                sums.add(&ids(piece), &vec![0.5; piece.len()]);
            }
        }
        sums.add(&[256], &[f32::NAN]);
        let found = sums.found(None);
        assert_eq!((found.words, found.all.bytes), (6, 19));
        assert!((found.word_perplexity() - (19.0 * 0.5 / 6.0f64).exp()).abs() < 1e-12);
        assert_eq!(found.files.iter().map(|(_, file)| file.bytes).collect::<Vec<_>>(), [14, 5]);
    }
}
