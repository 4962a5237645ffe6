//! How well a model predicts bytes: the mean loss over batches of a split, and the bits per byte of whole files.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use mblm_core::Mode;

use crate::data::batches::{Batches, Cursor};
use crate::data::bytes::check_vocabulary;
use crate::data::corpus::Corpus;
use crate::error::{Error, Result};
use crate::model::TrainModel;

/// Bits per byte of a mean loss in nats.
pub fn bpb(loss: f64) -> f64 {
    loss / std::f64::consts::LN_2
}

/// The mean of the losses of the first `max_batches` batches, or of all; every batch counts the same, as in the
/// reference package, also a smaller last one. `None` if `stop` was raised meanwhile.
pub(crate) fn mean_loss(
    model: &dyn TrainModel,
    batches: &Batches,
    max_batches: Option<usize>,
    stop: &AtomicBool,
) -> Result<Option<f64>> {
    let available = batches.num_batches(0);
    let count = max_batches.filter(|&max| max > 0).map_or(available, |max| available.min(max as u64));
    let mut sum = 0.0;
    for batch in 0..count {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = batches.read(Cursor { epoch: 0, batch })?;
        sum += loss_of(model, &batch.ids, batch.loss_mask.as_ref())?;
    }
    Ok(Some(sum / count as f64))
}

pub(crate) fn loss_of(model: &dyn TrainModel, ids: &Tensor, mask: Option<&Tensor>) -> Result<f64> {
    Ok(model.loss(ids, mask, Mode::Eval)?.to_scalar::<f32>()? as f64)
}

/// How to read files for [`evaluate`].
#[derive(Clone, Copy, Debug)]
pub struct EvaluateOptions {
    /// The model's vocabulary size.
    pub num_tokens: usize,
    /// Files are cut into sequences of this length; the last one may be shorter.
    pub seq_len: usize,
    /// Sequences at once.
    pub batch_size: usize,
    /// At most this many bytes, from the start on.
    pub max_bytes: Option<u64>,
}

/// What [`evaluate`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Bytes predicted: all of them.
    pub bytes: u64,
    /// The mean loss per byte, in nats.
    pub loss: f64,
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
/// Nothing to read, a byte outside the vocabulary, or the model's own.
pub fn evaluate(model: &dyn TrainModel, place: &str, options: &EvaluateOptions) -> Result<Evaluation> {
    let corpus = Corpus::open(place, &[])?;
    let len = options.max_bytes.map_or(corpus.len(), |max| max.min(corpus.len()));
    if len == 0 {
        return Err(Error::Config(format!("{place:?} holds no bytes; expected at least one")));
    }
    check_vocabulary(&corpus, options.num_tokens)?;
    let seq_len = options.seq_len as u64;
    let (mut at, mut sum) = (0, 0.0);
    while at < len {
        let whole = ((len - at) / seq_len).min(options.batch_size as u64);
        let (rows, cols) = if whole > 0 { (whole, seq_len) } else { (1, len - at) };
        let mut ids = vec![0; (rows * cols) as usize];
        corpus.read(at, &mut ids);
        let ids = Tensor::from_vec(ids, (rows as usize, cols as usize), &Device::Cpu)?;
        sum += loss_of(model, &ids, None)? * (rows * cols) as f64;
        at += rows * cols;
    }
    Ok(Evaluation { bytes: len, loss: sum / len as f64 })
}

#[cfg(test)]
mod tests {
    use mblm_core::ParamStore;

    use super::*;

    /// The loss is the mean of the ids, so that what was read shows in the number.
    struct MeanId(ParamStore);

    impl TrainModel for MeanId {
        fn params(&self) -> &ParamStore {
            &self.0
        }
        fn loss(&self, ids: &Tensor, _: Option<&Tensor>, _: Mode) -> mblm_core::Result<Tensor> {
            Ok(ids.to_dtype(candle_core::DType::F32)?.mean_all()?)
        }
    }

    #[test]
    fn every_byte_counts_once_and_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), (0..101).collect::<Vec<u8>>()).unwrap();
        let place = file.path().to_str().unwrap();
        let model = MeanId(ParamStore::new(0));
        for (seq_len, batch_size) in [(10, 3), (7, 1), (200, 4), (101, 2)] {
            let options = EvaluateOptions { num_tokens: 256, seq_len, batch_size, max_bytes: None };
            let found = evaluate(&model, place, &options).unwrap();
            assert_eq!(found.bytes, 101);
            assert!((found.loss - 50.0).abs() < 1e-5, "{found:?}");
        }
        let options = EvaluateOptions { num_tokens: 256, seq_len: 10, batch_size: 2, max_bytes: Some(21) };
        let found = evaluate(&model, place, &options).unwrap();
        assert_eq!((found.bytes, found.loss as f32), (21, 10.0));
        assert!((found.bpb() - 10.0 / std::f64::consts::LN_2).abs() < 1e-5);
        let small = EvaluateOptions { num_tokens: 100, ..options };
        assert!(evaluate(&model, place, &small).unwrap_err().to_string().contains("the byte 100"));
    }
}
