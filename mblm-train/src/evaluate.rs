//! Evaluation: the mean loss over batches of a split, and the bits per byte of files.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use mblm_base::terminal;
use mblm_core::Mode;
use mblm_core::config::MblmConfig;
use mblm_core::model::Sequences;
use mblm_core::patching::Cutter;
use mblm_data::batches::{Batches, Cursor};
use mblm_data::bytes::check_vocabulary;
use mblm_data::cut::Cut;
use mblm_data::files::corpus::Corpus;
use mblm_data::share::Share;

use crate::error::{Error, Result};
use crate::model::{LossSum, TrainModel, sequences};
use crate::processes::{Processes, caught, sum_of, sum_of_weights};

/// Bits per byte of a mean loss in nats.
pub fn bpb(loss: f64) -> f64 {
    loss / std::f64::consts::LN_2
}

/// The losses of the first `max_batches` batches, or of all, to which each process contributes those of every so many
/// batches. Every element that counts does so alike: the size of the batches makes no difference to the mean. `None` if
/// `stop` was raised meanwhile.
///
/// The sum is made batch by batch: it has the same bits whoever computed which.
pub(crate) fn losses(
    model: &dyn TrainModel,
    batches: &Batches,
    max_batches: Option<usize>,
    stop: &AtomicBool,
    processes: &dyn Processes,
) -> Result<Option<LossSum>> {
    let count = batches.first(max_batches);
    let (mut sums, mut counts, mut stopped) = (vec![0.0; count as usize], vec![0.0; count as usize], false);
    let mine = caught(|| {
        for batch in (processes.rank() as u64..count).step_by(processes.size()) {
            stopped = stop.load(Ordering::Relaxed);
            if stopped {
                break;
            }
            let read = batches.read(Cursor { epoch: 0, batch })?;
            let LossSum { sum, count } = model.loss(&sequences(&read), Mode::Eval)?.sum()?;
            (sums[batch as usize], counts[batch as usize]) = (sum, count as f64);
        }
        Ok(())
    });
    processes.agree(mine)?;
    if processes.any(stopped) {
        return Ok(None);
    }
    processes.sum(&mut sums);
    processes.sum(&mut counts);
    let mut all = LossSum::default();
    sums.into_iter().zip(counts).for_each(|(sum, count)| all.add(LossSum { sum, count: count as u64 }));
    Ok(Some(all))
}

/// Whether an element counts in the first `max_batches` batches, or in all: it is not the pad token, and its loss has a
/// weight. Reads no further than to the first.
pub(crate) fn anything_counts(batches: &Batches, max_batches: Option<usize>, pad: usize) -> Result<bool> {
    for batch in 0..batches.first(max_batches) {
        let batch = batches.read(Cursor { epoch: 0, batch })?;
        let weight = |i: usize| batch.loss_mask.as_ref().map_or(1.0, |mask| mask[i]);
        if batch.ids.iter().enumerate().any(|(i, id)| *id as usize != pad && weight(i) != 0.0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How to read files for [`evaluate`].
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// The model's vocabulary size.
    pub num_tokens: usize,
    /// Files are cut into sequences of this length; the last one may be shorter.
    pub seq_len: usize,
    /// Where patches follow the content: how sequences of at most that length are cut, which end with the pad token.
    pub cut: Option<(Cut, usize)>,
    /// Sequences at once.
    pub batch_size: usize,
    /// At most this many bytes, from the start on.
    pub max_bytes: Option<u64>,
}

/// What [`evaluate`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Bytes predicted: all but the pad token; of an encoder, those that were masked.
    pub bytes: u64,
    /// The mean loss of these, in nats; not a number if there are none.
    pub loss: f64,
}

impl From<LossSum> for Evaluation {
    fn from(losses: LossSum) -> Self {
        Evaluation { bytes: losses.count, loss: losses.mean().unwrap_or(f64::NAN) }
    }
}

impl Evaluation {
    /// Bits per byte.
    pub fn bpb(&self) -> f64 {
        bpb(self.loss)
    }
}

/// The loss of every byte in `place`, a file, a folder or a glob. Sequences do not overlap and each starts without
/// context, so the first bytes of a sequence are predicted from little: a larger `seq_len` gives a lower loss.
///
/// # Errors
/// Nothing to read or to predict, a byte outside the vocabulary, or the model's own.
pub fn evaluate(
    model: &dyn TrainModel,
    place: &str,
    options: &EvaluateOptions,
    processes: &dyn Processes,
) -> Result<Evaluation> {
    let corpus = processes.agree(open(place, options))?;
    must_be_alike(model, &corpus, processes)?;
    let batches = processes.agree(batches(&corpus, options))?;
    // Of each batch, so that the sum has the same bits whoever computed which.
    let mut losses = vec![LossSum::default(); batches.len()];
    let mine = caught(|| {
        for_sequences(&corpus, options, &batches, processes.share(), |batch, sequences| {
            losses[batch] = model.loss(sequences, Mode::Eval)?.sum()?;
            Ok(())
        })
    });
    processes.agree(mine)?;
    sum(&mut losses, processes);
    let mut all = LossSum::default();
    losses.into_iter().for_each(|loss| all.add(loss));
    some(all, place)
}

/// Refuses to share the work among processes that have other weights or data than the first.
fn must_be_alike(model: &dyn TrainModel, corpus: &Corpus, processes: &dyn Processes) -> Result<()> {
    if processes.size() == 1 {
        return Ok(());
    }
    processes.must_have_the_same("weights", sum_of_weights(model.params()))?;
    let fingerprint = processes.agree(corpus.fingerprint().map_err(Error::from))?;
    processes.must_have_the_same("data", sum_of(&(corpus.len(), fingerprint.as_str())))
}

/// Adds up what each process has in the same place.
fn sum(losses: &mut [LossSum], processes: &dyn Processes) {
    let mut numbers: Vec<f64> = losses.iter().flat_map(|loss| [loss.sum, loss.count as f64]).collect();
    processes.sum(&mut numbers);
    for (loss, [sum, count]) in losses.iter_mut().zip(numbers.as_chunks::<2>().0) {
        *loss = LossSum { sum: *sum, count: *count as u64 };
    }
}

/// What was found, if anything was predicted.
fn some(losses: LossSum, place: &str) -> Result<Evaluation> {
    match losses.count {
        0 => Err(Error::Config(format!("{place:?} has no byte to predict: all bytes are the pad token"))),
        _ => Ok(losses.into()),
    }
}

/// What [`evaluate_parts`] found: as much as [`evaluate`], and where the loss is.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Everything. The pad token is no byte that is predicted.
    pub all: Evaluation,
    /// Each file that a byte was predicted of, in the order of their paths. Sequences run on from one file to the next.
    pub files: Vec<(PathBuf, Evaluation)>,
    /// For each stage, from global to local, and each position of its sequences, the bytes of the token there, which
    /// may be none.
    pub stages: Vec<Vec<Evaluation>>,
}

/// As [`evaluate`], and the loss of each file, and of each position in the sequences of each stage: of the local stage
/// the byte within its patch, of those above the patch within the sequence. `hierarchy` is the model's.
///
/// # Errors
/// As [`evaluate`]; or the model does not predict single bytes, as an encoder does not.
pub fn evaluate_parts(
    model: &dyn TrainModel,
    hierarchy: &MblmConfig,
    place: &str,
    options: &EvaluateOptions,
    processes: &dyn Processes,
) -> Result<Parts> {
    let corpus = processes.agree(open(place, options))?;
    must_be_alike(model, &corpus, processes)?;
    let starts: Vec<(PathBuf, u64)> = corpus.files().map(|(path, start)| (path.into(), start)).collect();
    let (mut all, mut files) = (LossSum::default(), vec![LossSum::default(); starts.len()]);
    let batches = processes.agree(batches(&corpus, options))?;
    let seq_lens = &hierarchy.seq_lens;
    let mut stages: Vec<Vec<LossSum>> = seq_lens.iter().map(|_| vec![]).collect();
    let mut file = 0;
    let receive = |batch: usize, sequences: &Sequences| {
        let Some(losses) = model.byte_losses(sequences)? else {
            return Err(Error::Config("this is an encoder; only its mean loss can be measured".into()));
        };
        let rows = sequences.ids.chunks_exact(sequences.len).zip(losses.chunks_exact(sequences.len));
        for (range, (ids, losses)) in batches[batch].iter().zip(rows) {
            let len = (range.end - range.start) as usize;
            let places = match hierarchy.is_fixed() {
                true => (0..len).collect(),
                false => Cutter::new(hierarchy).places(&ids[..len])?,
            };
            for ((at, mut position), &loss) in (range.start..).zip(places).zip(losses) {
                // That of the pad token is not a number, and does not count.
                let loss = if loss.is_nan() { LossSum::default() } else { LossSum { sum: f64::from(loss), count: 1 } };
                while starts.get(file + 1).is_some_and(|(_, start)| *start <= at) {
                    file += 1;
                }
                for (n, sums) in stages.iter_mut().enumerate() {
                    let patch: usize = seq_lens[n + 1..].iter().product();
                    let place = position / patch;
                    position %= patch;
                    sums.resize(sums.len().max(place + 1), LossSum::default());
                    sums[place].add(loss);
                }
                files[file].add(loss);
                all.add(loss);
            }
        }
        Ok(())
    };
    processes.agree(caught(|| for_sequences(&corpus, options, &batches, processes.share(), receive)))?;
    if processes.size() > 1 {
        sum(std::slice::from_mut(&mut all), processes);
        sum(&mut files, processes);
        for sums in &mut stages {
            let longest = processes.gather(sums.len() as f64).into_iter().fold(0.0, f64::max);
            sums.resize(longest as usize, LossSum::default());
            sum(sums, processes);
        }
    }
    let files = starts.into_iter().zip(files).filter(|(_, losses)| losses.count > 0);
    Ok(Parts {
        all: some(all, place)?,
        files: files.map(|((path, _), losses)| (path, losses.into())).collect(),
        stages: stages.into_iter().map(|sums| sums.into_iter().map(Evaluation::from).collect()).collect(),
    })
}

/// Opens what is to be evaluated.
pub(crate) fn open(place: &str, options: &EvaluateOptions) -> Result<Corpus> {
    let corpus = Corpus::open(place, &[]).map_err(|error| match error.into() {
        // Here the place is an argument, and no field of a configuration.
        Error::Config(text) => Error::Config(text.strip_prefix("io.dataset_dir: ").unwrap_or(&text).into()),
        other => other,
    })?;
    let left_out = corpus.left_out().to_string();
    if !left_out.is_empty() {
        terminal::line(format!("note: {place:?}{left_out}"));
    }
    if num_bytes(&corpus, options) == 0 {
        return Err(Error::Config(format!("{place:?} contains no bytes; expected at least one")));
    }
    check_vocabulary(&corpus, options.num_tokens)?;
    Ok(corpus)
}

fn num_bytes(corpus: &Corpus, options: &EvaluateOptions) -> u64 {
    options.max_bytes.map_or(corpus.len(), |max| max.min(corpus.len()))
}

/// The bytes of each sequence of each batch. Sequences of one length are batched; what is left of the last one comes by
/// itself.
fn batches(corpus: &Corpus, options: &EvaluateOptions) -> Result<Vec<Vec<Range<u64>>>> {
    let (len, seq_len) = (num_bytes(corpus, options), options.seq_len as u64);
    let starts: Vec<u64> = match &options.cut {
        Some((cut, _)) => cut.starts(corpus, 0..len, options.seq_len)?,
        None => (0..len).step_by(options.seq_len).collect(),
    };
    let ends = starts.iter().skip(1).copied().chain([len]);
    let mut sequences: Vec<Range<u64>> = starts.iter().zip(ends).map(|(start, end)| *start..end).collect();
    let is_short = |last: &Range<u64>| options.cut.is_none() && last.end - last.start < seq_len;
    let short = sequences.pop_if(|last| is_short(last));
    let whole = sequences.chunks(options.batch_size).map(<[_]>::to_vec);
    Ok(whole.chain(short.map(|last| vec![last])).collect())
}

/// Calls `receive` with the number of each batch and its sequences; of every so many batches, as this process has its
/// `share`.
fn for_sequences(
    corpus: &Corpus,
    options: &EvaluateOptions,
    batches: &[Vec<Range<u64>>],
    share: Share,
    mut receive: impl FnMut(usize, &Sequences) -> Result<()>,
) -> Result<()> {
    let pad = options.cut.as_ref().map_or(0, |(_, pad)| *pad as u32);
    for (number, batch) in batches.iter().enumerate().skip(share.rank).step_by(share.size) {
        let longest = batch.iter().map(|range| range.end - range.start).max().unwrap_or(0) as usize;
        let mut ids = vec![pad; batch.len() * longest];
        for (row, range) in ids.chunks_exact_mut(longest).zip(batch) {
            corpus.read(range.start, &mut row[..(range.end - range.start) as usize])?;
        }
        receive(number, &Sequences { ids: &ids, len: longest, loss_mask: None })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use mblm_core::ParamStore;

    use super::*;
    use crate::bigram;
    use crate::model::Loss;
    use crate::processes::Solo;
    use crate::processes::threads::together;

    /// The loss is the mean of the ids, so that what was read shows in the number.
    struct MeanId(ParamStore);

    impl TrainModel for MeanId {
        fn params(&self) -> &ParamStore {
            &self.0
        }
        fn loss(&self, sequences: &Sequences, _: Mode) -> mblm_core::Result<Loss> {
            let mean = sequences.ids.iter().sum::<u32>() as f32 / sequences.ids.len() as f32;
            Ok((Tensor::new(mean, &Device::Cpu)?, sequences.ids.len()).into())
        }
    }

    #[test]
    fn every_byte_counts_once_and_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), (0..101).collect::<Vec<u8>>()).unwrap();
        let place = file.path().to_str().unwrap();
        let model = MeanId(ParamStore::new(0));
        for (seq_len, batch_size) in [(10, 3), (7, 1), (200, 4), (101, 2)] {
            let options = EvaluateOptions { num_tokens: 256, seq_len, batch_size, max_bytes: None, cut: None };
            let found = evaluate(&model, place, &options, &Solo).unwrap();
            assert_eq!(found.bytes, 101);
            let shared =
                together(3, |processes| evaluate(&MeanId(ParamStore::new(0)), place, &options, processes).unwrap());
            assert_eq!(shared, [found; 3], "shared among processes");
            assert!((found.loss - 50.0).abs() < 1e-5, "{found:?}");
        }
        let options = EvaluateOptions { num_tokens: 256, seq_len: 10, batch_size: 2, max_bytes: Some(21), cut: None };
        let found = evaluate(&model, place, &options, &Solo).unwrap();
        assert_eq!((found.bytes, found.loss as f32), (21, 10.0));
        assert!((found.bpb() - 10.0 / std::f64::consts::LN_2).abs() < 1e-5);
        let error = evaluate_parts(&model, &hierarchy(&[10]), place, &options, &Solo).unwrap_err().to_string();
        assert!(error.contains("only its mean loss"), "{error}");
        let small = EvaluateOptions { num_tokens: 100, ..options.clone() };
        assert!(evaluate(&model, place, &small, &Solo).unwrap_err().to_string().contains("the byte 100"));
    }

    /// The loss of a byte is its value, and the pad token is 255.
    struct Value(ParamStore);

    impl TrainModel for Value {
        fn params(&self) -> &ParamStore {
            &self.0
        }
        fn loss(&self, _: &Sequences, _: Mode) -> mblm_core::Result<Loss> {
            Err(mblm_core::Error::Input("not asked for".into()))
        }
        fn byte_losses(&self, sequences: &Sequences) -> mblm_core::Result<Option<Vec<f32>>> {
            Ok(Some(sequences.ids.iter().map(|&id| if id == 255 { f32::NAN } else { id as f32 }).collect()))
        }
    }

    fn hierarchy(seq_lens: &[usize]) -> MblmConfig {
        MblmConfig { seq_lens: seq_lens.to_vec(), ..bigram::model(256).hierarchy().clone() }
    }

    #[test]
    fn losses_are_told_apart_by_file_and_position() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a", &[0, 1, 2, 3, 4, 5, 6][..]), ("b", &[7, 8, 9]), ("c", &[10, 255, 12, 13, 14, 15])] {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        // 2 patches of 3 bytes: sequences of 6 bytes, the last of 4.
        let options = EvaluateOptions { num_tokens: 256, seq_len: 6, batch_size: 2, max_bytes: None, cut: None };
        let evaluate = |processes: &dyn Processes| {
            let model = Value(ParamStore::new(0));
            evaluate_parts(&model, &hierarchy(&[2, 3]), folder.path().to_str().unwrap(), &options, processes).unwrap()
        };
        let found = evaluate(&Solo);
        let of = |bytes: &[u64]| Evaluation {
            bytes: bytes.len() as u64,
            loss: bytes.iter().sum::<u64>() as f64 / bytes.len() as f64,
        };
        assert_eq!(found.all, of(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15]));
        let files: Vec<Evaluation> = found.files.iter().map(|(_, file)| *file).collect();
        assert_eq!(files, [of(&[0, 1, 2, 3, 4, 5, 6]), of(&[7, 8, 9]), of(&[10, 12, 13, 14, 15])]);
        let patches = [of(&[0, 1, 2, 6, 7, 8, 12, 13, 14]), of(&[3, 4, 5, 9, 10, 15])];
        let bytes = [of(&[0, 3, 6, 9, 12, 15]), of(&[1, 4, 7, 10, 13]), of(&[2, 5, 8, 14])];
        assert_eq!(found.stages, [patches.to_vec(), bytes.to_vec()]);
        assert_eq!(together(2, evaluate), [found.clone(), found], "shared among processes");
    }
}
