//! What a model spends on single bytes: the bits of each byte of a passage, and the mean bits of each place in a patch.

use mblm_core::config::MblmConfig;
use mblm_core::model::Sequences;
use mblm_core::patching::Cutter;
use mblm_data::Dataset;
use mblm_train::error::Result;
use mblm_train::evaluate::bpb;
use mblm_train::model::TrainModel;
use serde::{Deserialize, Serialize};

/// Bytes of a passage, at most.
const PASSAGE: usize = 2 << 10;
/// Bytes that the means are of, at most.
const SAMPLE: usize = 32 << 10;

/// The bytes of a passage and what each of them costs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// Its bytes; hexadecimal in files.
    #[serde(with = "hexadecimal")]
    pub bytes: Vec<u8>,
    /// Bits of each byte, to three decimals.
    pub bits: Vec<f32>,
}

/// What [`score`] finds. Nothing for an encoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// The beginning of the data.
    pub passage: Option<Passage>,
    /// Mean bits by the byte's place in the innermost patch. Empty for a model of one stage, which has no patches.
    pub place_bits: Vec<f64>,
}

/// How a model reads data.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// `params.input_seq_len`
    pub seq_len: usize,
    /// Sequences at once.
    pub batch_size: usize,
    /// The lengths of the stages' sequences, from global to local.
    pub stages: &'a [usize],
    /// The model's configuration, if its patches follow the content.
    pub patching: Option<&'a MblmConfig>,
}

/// Scores the beginning of `data`. Each sequence starts without context, as in a validation. Bytes that are not
/// predicted in a validation (padding, and those that the loss mask leaves out) are skipped.
///
/// # Errors
/// The data cannot be read, or the model's own.
pub fn score(model: &dyn TrainModel, data: &dyn Dataset, reading: Reading) -> Result<Scores> {
    let Reading { seq_len, batch_size, stages, .. } = reading;
    // What comes after the sample has no effect on the losses in it.
    let len = seq_len.min(SAMPLE);
    let sequences = (SAMPLE / len).min(data.num_sequences(0) as usize);
    let patch = stages.last().copied().filter(|_| stages.len() > 1);
    let mut places = vec![(0.0, 0u64); patch.unwrap_or(0)];
    let mut passage = Passage::default();
    for first in (0..sequences).step_by(batch_size.max(1)) {
        let (mut ids, mut counts, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for index in first..sequences.min(first + batch_size.max(1)) {
            let (read, weights) = sequence(data, index as u64, seq_len)?;
            ids.extend_from_slice(&read[..len]);
            match reading.patching {
                Some(config) => positions.extend(Cutter::new(config).places(&read[..len])?),
                None => positions.extend(0..len),
            }
            counts.extend((0..len).map(|i| weights.get(i).is_none_or(|weight| *weight > 0.0)));
        }
        let Some(losses) = model.byte_losses(&Sequences { ids: &ids, len, loss_mask: None })? else {
            return Ok(Scores::default());
        };
        for (i, loss) in losses.into_iter().enumerate().filter(|(i, loss)| counts[*i] && loss.is_finite()) {
            let Ok(byte) = u8::try_from(ids[i]) else { continue };
            let bits = bpb(f64::from(loss));
            if passage.bytes.len() < PASSAGE {
                passage.bytes.push(byte);
                passage.bits.push(((bits * 1e3).round() / 1e3) as f32);
            }
            if let Some(patch) = patch {
                let (sum, count) = &mut places[positions[i] % patch];
                (*sum, *count) = (*sum + bits, *count + 1);
            }
        }
    }
    // Only places at the end can be without bytes, unless a loss mask leaves some out: then there is no mean for all.
    let means = places.into_iter().map_while(|(sum, count)| (count > 0).then(|| sum / count as f64));
    Ok(Scores { passage: Some(passage).filter(|passage| !passage.bytes.is_empty()), place_bits: means.collect() })
}

/// A sequence and the weights of its losses, which are none if all count.
fn sequence(data: &dyn Dataset, index: u64, seq_len: usize) -> Result<(Vec<u32>, Vec<f32>)> {
    let mut ids = vec![0; seq_len];
    let mut weights = vec![0.0; if data.has_loss_mask() { seq_len } else { 0 }];
    data.sample(0, index, &mut ids, &mut weights)?;
    Ok((ids, weights))
}

mod hexadecimal {
    use std::fmt::Write;

    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let byte = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?;
            u8::from_str_radix(pair, 16).ok()
        };
        let bytes = text.as_bytes().chunks(2).map(byte).collect::<Option<Vec<u8>>>();
        bytes.ok_or_else(|| D::Error::custom("expected pairs of hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use mblm_core::{Mode, ParamStore};
    use mblm_train::model::Loss;

    use super::*;

    /// A byte costs as many bits as its value says; 255 is the pad token.
    struct Value(ParamStore);

    impl TrainModel for Value {
        fn params(&self) -> &ParamStore {
            &self.0
        }
        fn loss(&self, _: &Sequences, _: Mode) -> mblm_core::Result<Loss> {
            Err(mblm_core::Error::Input("not asked for".into()))
        }
        fn byte_losses(&self, sequences: &Sequences) -> mblm_core::Result<Option<Vec<f32>>> {
            let nats = |id: u32| if id == 255 { f32::NAN } else { id as f32 * std::f32::consts::LN_2 };
            Ok(Some(sequences.ids.iter().map(|&id| nats(id)).collect()))
        }
    }

    /// Sequences of six bytes, `10 n` to `10 n + 5`; the last byte of an even one is padding. With a mask, the first
    /// byte does not count.
    struct Tens {
        sequences: u64,
        masked: bool,
    }

    impl Dataset for Tens {
        fn num_sequences(&self, _: u64) -> u64 {
            self.sequences
        }
        fn sample(&self, _: u64, index: u64, ids: &mut [u32], mask: &mut [f32]) -> mblm_data::Result<()> {
            ids.iter_mut().zip(0..).for_each(|(id, i)| *id = 10 * (index as u32 % 10) + i);
            if index.is_multiple_of(2) {
                ids[5] = 255;
            }
            mask.iter_mut().zip(0..).for_each(|(weight, i)| *weight = if i == 0 { 0.0 } else { 1.0 });
            Ok(())
        }
        fn has_loss_mask(&self) -> bool {
            self.masked
        }
    }

    fn scores(sequences: u64, masked: bool, stages: &[usize]) -> Scores {
        let reading = Reading { seq_len: 6, batch_size: 2, stages, patching: None };
        score(&Value(ParamStore::new(0)), &Tens { sequences, masked }, reading).unwrap()
    }

    #[test]
    fn every_byte_that_counts_has_its_bits() {
        let found = scores(3, false, &[2, 3]);
        let passage = found.passage.as_ref().unwrap();
        assert_eq!(passage.bytes, [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24]);
        assert_eq!(passage.bits, passage.bytes.iter().map(|&byte| f32::from(byte)).collect::<Vec<_>>());
        // Places of 0, 3, 10, 13, 20, 23; of 1, 4, 11, …; of 2, 12, 15, 22 without the padding.
        let want = [69.0 / 6.0, 75.0 / 6.0, 51.0 / 4.0];
        assert!(found.place_bits.iter().zip(want).all(|(bits, want)| (bits - want).abs() < 1e-5), "{found:?}");
        assert_eq!(found.place_bits.len(), 3);
        assert_eq!(scores(1, true, &[2, 3]).passage.unwrap().bytes, [1, 2, 3, 4]);
        assert!(scores(3, false, &[6]).place_bits.is_empty(), "one stage has no patches");
        assert_eq!(scores(0, false, &[2, 3]), Scores::default());
        assert_eq!(scores(5000, false, &[2, 3]).passage.unwrap().bytes.len(), PASSAGE);
    }

    #[test]
    fn a_passage_is_read_as_it_was_written() {
        let passage = Passage { bytes: vec![0, 10, 255], bits: vec![0.123, 2.5, 11.0] };
        let text = serde_json::to_string(&passage).unwrap();
        assert_eq!(text, r#"{"bytes":"000aff","bits":[0.123,2.5,11.0]}"#);
        assert_eq!(serde_json::from_str::<Passage>(&text).unwrap(), passage);
        for wrong in ["0", "0g", "é"] {
            let text = format!(r#"{{"bytes":"{wrong}","bits":[]}}"#);
            assert!(serde_json::from_str::<Passage>(&text).unwrap_err().to_string().contains("hexadecimal"), "{wrong}");
        }
    }
}
