//! The rule of patching `entropy`: a patch ends where a small model finds the next byte hard to predict (BLT, Pagnoni et al.
//! 2024, arXiv 2412.09871, section 2.3).
//!
//! The entropy of the byte behind `t` is that of the small model's distribution over its vocabulary, `-Σ p log2 p`, in bits. The
//! small model sees the sequence up to `t` and nothing else: at most its `input_seq_len` bytes, so that a sequence is read
//! in windows that move by half their length. What was found for a sequence is kept in the folder of the small model's run.

mod follower;
mod memo;
mod small;

use std::path::PathBuf;
use std::sync::OnceLock;

use mblm_core::block::FieldError;
use mblm_core::error::Error;
use mblm_core::patching::{Follow, PatchRule, RuleModel};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use self::follower::Follower;
use self::memo::Memo;
use self::small::Small;

mblm_core::register_patching!(Entropy, name = "entropy");

/// A patch ends where the next byte is hard to predict for a small model (BLT, Pagnoni et al. 2024, section 2.3). Needs exactly
/// one of `threshold` and `jump`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// The small model: the run folder of a trained model with one stage, or one of its checkpoints. Of a run, the checkpoint
    /// with the lowest validation loss is used, or the one with the sum `weights`. A relative path starts at the current
    /// directory, or else at one of the folders around the configuration file.
    pub model: PathBuf,
    /// A patch ends where the entropy of the next byte is above this many bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub threshold: Option<f64>,
    /// A patch ends where the entropy of the next byte is more than this many bits above that of the byte before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub jump: Option<f64>,
    /// The most bytes in a patch (in an outer one: inner patches). Default and upper limit: the stage's entry of `seq_lens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_patch: Option<usize>,
    /// The sum of the small model's weights and fields, `sha256:` and 16 digits. A run fills it in, so that another model is
    /// refused.
    #[serde(default, serialize_with = "write_sum", deserialize_with = "read_sum")]
    #[schemars(with = "Option<String>")]
    pub weights: OnceLock<String>,
    #[serde(skip)]
    loaded: OnceLock<Loaded>,
}

fn write_sum<S: Serializer>(sum: &OnceLock<String>, to: S) -> Result<S::Ok, S::Error> {
    sum.get().serialize(to)
}

fn read_sum<'de, D: Deserializer<'de>>(from: D) -> Result<OnceLock<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.map_or_else(OnceLock::new, OnceLock::from))
}

/// What the rule computes with.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    small: &'static Small,
    cut: Criterion,
    memo: &'static Memo,
}

/// What ends a patch.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Criterion {
    /// An entropy above so many bits.
    Above(f64),
    /// An entropy more than so many bits above the one before.
    Jump(f64),
}

impl Criterion {
    /// How far the entropy of the next byte is above the one at which a patch ends. `before`: that of the byte before it; there
    /// is none at the first byte of a sequence.
    fn excess(self, before: Option<f64>, now: f64) -> f64 {
        match (self, before) {
            (Criterion::Above(limit), _) => now - limit,
            (Criterion::Jump(limit), Some(before)) => now - before - limit,
            (Criterion::Jump(_), None) => f64::NEG_INFINITY,
        }
    }
}

impl Entropy {
    fn loaded(&self) -> Result<Loaded, Error> {
        let not_loaded = || Error::Input("the rule entropy was not checked, and so has no model".into());
        self.loaded.get().copied().ok_or_else(not_loaded)
    }

    fn criterion(&self) -> Result<Criterion, FieldError> {
        let (field, value, cut) = match (self.threshold, self.jump) {
            (Some(limit), None) => ("threshold", limit, Criterion::Above(limit)),
            (None, Some(limit)) => ("jump", limit, Criterion::Jump(limit)),
            (None, None) => {
                return Err(FieldError::new("threshold", "expected either threshold or jump, found neither"));
            }
            (Some(_), Some(_)) => return Err(FieldError::new("jump", "expected either threshold or jump, found both")),
        };
        match value.is_finite() && value >= 0.0 {
            true => Ok(cut),
            false => Err(FieldError::new(field, format!("expected a number of bits from 0 on, found {value}"))),
        }
    }

    fn load(&self, model: &RuleModel) -> Result<Loaded, FieldError> {
        let cut = self.criterion()?;
        let wanted = self.weights.get().map(String::as_str);
        let small = Small::load(&self.model, model, wanted).map_err(|message| FieldError::new("model", message))?;
        let (found, wanted) = (small.num_tokens(), model.num_tokens);
        if found != wanted {
            let message = format!(
                "{:?} has a vocabulary of {found} tokens, but params.num_tokens is {wanted}; expected a model of the same vocabulary",
                self.model
            );
            return Err(FieldError::new("model", message));
        }
        let sum = self.weights.get_or_init(|| small.sum().into());
        if sum != small.sum() {
            let message = format!(
                "expected the model with which patches were cut so far, whose weights have the sum {sum:?}, but no checkpoint of \
                 {:?} has it: it was trained further, or is another run; restore the checkpoint, or begin a new run",
                self.model
            );
            return Err(FieldError::new("weights", message));
        }
        Ok(Loaded { small, cut, memo: Memo::of(small, cut) })
    }
}

/// Removes what does not matter from `patching`, rules as they are written: a model whose weights are known may lie anywhere.
pub(crate) fn forget_places(patching: &mut serde_yaml::Value) {
    for rule in patching.as_sequence_mut().into_iter().flatten().filter_map(|rule| rule.as_mapping_mut()) {
        if rule.get("weights").is_some_and(|sum| !sum.is_null()) {
            rule.remove("model");
        }
    }
}

#[typetag::serde(name = "entropy")]
impl PatchRule for Entropy {
    fn ends_patch(&self, bytes: &[u32]) -> Result<bool, Error> {
        self.ends(bytes).last().unwrap_or(Ok(false))
    }

    fn ends<'a>(&'a self, bytes: &'a [u32]) -> Box<dyn Iterator<Item = Result<bool, Error>> + 'a> {
        match self.loaded() {
            Ok(loaded) => Box::new(Ends::new(loaded, bytes)),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn follow(&self) -> Result<Option<Box<dyn Follow>>, Error> {
        let Loaded { small, cut, .. } = self.loaded()?;
        Ok(Some(Box::new(Follower::new(small, cut)?)))
    }

    fn max_patch(&self) -> Option<usize> {
        self.max_patch
    }

    fn validate(&self, model: &RuleModel) -> Result<(), FieldError> {
        let loaded = self.load(model)?;
        self.loaded.get_or_init(|| loaded);
        Ok(())
    }
}

/// Whether a patch ends after each byte of a sequence. Computes window by window, as far as it is asked.
struct Ends<'a> {
    rule: Loaded,
    bytes: &'a [u32],
    /// As far as it is known.
    known: Vec<bool>,
    /// Whether it was computed, and not remembered.
    is_new: bool,
    /// The entropy of the byte behind the last known one.
    before: Option<f64>,
    next: usize,
}

impl<'a> Ends<'a> {
    fn new(rule: Loaded, bytes: &'a [u32]) -> Self {
        let known = rule.memo.find(bytes).unwrap_or_default();
        Ends { rule, bytes, known, is_new: false, before: None, next: 0 }
    }

    /// Computes one more window.
    fn compute(&mut self) -> Result<(), Error> {
        let Loaded { small, cut, .. } = self.rule;
        small.say_that_it_takes_time();
        if !self.is_new {
            // The sequence goes on where what was remembered ends.
            self.known.clear();
            self.is_new = true;
        }
        for now in small.window_from(self.bytes, self.known.len())? {
            self.known.push(cut.excess(self.before, now) > 0.0);
            self.before = Some(now);
        }
        Ok(())
    }
}

impl Iterator for Ends<'_> {
    type Item = Result<bool, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.bytes.len() {
            return None;
        }
        while self.known.len() <= self.next {
            if let Err(error) = self.compute() {
                return Some(Err(error));
            }
        }
        self.next += 1;
        Some(Ok(self.known[self.next - 1]))
    }
}

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if self.is_new {
            // What was asked for is most likely a whole sequence.
            self.rule.memo.keep(&self.bytes[..self.next], &self.known[..self.next]);
        }
    }
}
