//! Section `train`: how to train.

use std::fmt;

use mblm_core::device::{DeviceName, Place};
use mblm_core::gemm::Precision;
use mblm_yaml::{ConfigError, Document};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check;
use crate::trainer::optimizer::{AdamConfig, MuonConfig, OptimizerConfig};
use crate::trainer::schedule::Shape;

/// How elements count towards `target_elements`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TargetStrategy {
    /// One per sequence of a batch.
    Batch,
    /// One per byte of a batch.
    Sequence,
}

/// What a gradient step over several batches is the mean of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LossAverage {
    /// All elements of the batches that count: the same as one large batch.
    #[default]
    Window,
    /// The batches' own means, as in the package.
    Batch,
}

/// The learning rate schedule after linear warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Falls to zero along a cosine, as in the package.
    #[default]
    Cosine,
    /// Falls linearly to zero.
    Linear,
    /// Stays at the peak.
    Constant,
    /// Stays at the peak, then falls linearly to zero in the last steps: warm-up, stable, decay
    /// (Hu et al. 2024; Hägele et al. 2024).
    Wsd,
}

/// The optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW, without weight decay the package's Adam.
    #[default]
    Adamw,
    /// Muon for the weight matrices of the stages, AdamW for everything else (Jordan et al. 2024).
    Muon,
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptimizerKind::Adamw => "adamw",
            OptimizerKind::Muon => "muon",
        })
    }
}

impl From<OptimizerKind> for OptimizerConfig {
    fn from(kind: OptimizerKind) -> Self {
        let muon = (kind == OptimizerKind::Muon).then(MuonConfig::default);
        OptimizerConfig { muon, ..OptimizerConfig::default() }
    }
}

/// Section `train`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Number of elements to train on, rounded up to whole batches; those of all processes together.
    pub target_elements: u64,
    /// What counts as an element: a sequence (`batch`) or a byte (`sequence`).
    pub target_elements_strategy: TargetStrategy,
    /// The fraction of gradient steps used for warm-up.
    #[serde(default = "default_warmup")]
    pub warmup_steps_perc: f64,
    /// Sequences per batch; of each process.
    pub batch_size: usize,
    /// Whether to shuffle the training sequences.
    #[serde(default)]
    pub shuffle_train: bool,
    /// Whether to shuffle the validation sequences, into one fixed order.
    #[serde(default)]
    pub shuffle_eval: bool,
    /// Maximum number of validation batches.
    #[serde(default)]
    pub max_eval_steps: Option<usize>,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// Factors of the learning rate, one per stage from global to local (addition). A stage includes its embeddings, its
    /// positions and the projection to the stage below. The output layer belongs to the local stage.
    #[serde(default)]
    pub lr_scale: Option<Vec<f64>>,
    /// The optimizer (addition): `adamw`, or `muon`, which uses Muon for the weight matrices of the stages and AdamW for
    /// everything else.
    #[serde(default)]
    pub optimizer: OptimizerKind,
    /// Clip gradients to this global norm.
    #[serde(default)]
    pub gradient_clipping: Option<f64>,
    /// The learning rate schedule after warm-up (addition): `cosine` and `linear` fall to zero, `constant` stays at the
    /// peak, and `wsd` stays at the peak and falls to zero in the last steps.
    #[serde(default)]
    pub schedule: ScheduleKind,
    /// With `schedule: wsd`, the fraction of gradient steps in which the learning rate falls to zero (addition).
    #[serde(default = "default_decay")]
    pub decay_steps_perc: f64,
    /// Batches per gradient step; of each process.
    pub gradient_accumulate_every: usize,
    /// How to average the loss of a gradient step over several batches (addition): over all elements that count, or
    /// over the means of the batches, as the package does. They differ if padding or loss masks leave batches with
    /// different numbers of elements.
    #[serde(default)]
    pub loss_average: LossAverage,
    /// For a resumed run whose number of gradient steps or schedule changes: the fraction of the remaining steps in which
    /// the learning rate rises again to `learning_rate`. Without it, the rate continues from its current value. It applies to
    /// one such change; after that, the run no longer has it (addition).
    #[serde(default)]
    pub rewarm_steps_perc: Option<f64>,
    /// The probability that a byte is masked. Encoders require it; other models do not accept it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masking_proba: Option<f64>,
    /// Decoupled weight decay of weight matrices (addition; the package has none).
    #[serde(default)]
    pub weight_decay: f64,
    /// Adam's decay rates for the mean of the gradient and of its square (addition; the defaults are the package's
    /// values).
    #[serde(default = "default_betas")]
    pub betas: (f64, f64),
    /// Precision of the operands of large matrix products in training, including those of attention (addition).
    /// Everything else stays in `f32`: weights, moments, sums, validation, evaluation and generation.
    #[serde(default)]
    pub precision: Precision,
    /// Validate and save after this many batches, instead of `io.validate_amount` times (addition).
    #[serde(default)]
    pub validate_every: Option<u64>,
    /// Stop after this many validations in a row without a new best loss (addition).
    #[serde(default)]
    pub early_stop: Option<u64>,
    /// Stop after this many seconds with a checkpoint, a validation and a test (addition). The run can be resumed; the
    /// time then starts again.
    #[serde(default)]
    pub max_seconds: Option<f64>,
    /// Where to train (addition): `cpu`, `cuda` (the first NVIDIA card), `cuda:N`, `metal`, or `auto`. Devices besides the
    /// CPU need a program that was built with them.
    #[serde(default)]
    pub device: DeviceName,
    /// Seed of initial weights, shuffling and dropout (addition).
    #[serde(default)]
    pub seed: u64,
}

fn default_warmup() -> f64 {
    0.1
}

/// As Hägele et al. 2024 recommend.
fn default_decay() -> f64 {
    0.2
}

fn default_betas() -> (f64, f64) {
    (0.9, 0.95)
}

impl TrainSection {
    /// Where the model's parameters lie.
    ///
    /// # Errors
    /// This program or this machine does not have the device.
    pub fn place(&self) -> mblm_core::Result<Place> {
        Ok(self.device.open()?.into())
    }

    /// The optimizer that it describes.
    pub fn optimizer(&self) -> OptimizerConfig {
        let (beta1, beta2) = self.betas;
        OptimizerConfig {
            adam: AdamConfig { beta1, beta2, weight_decay: self.weight_decay, ..AdamConfig::default() },
            lr_scale: self.lr_scale.clone().unwrap_or_default(),
            ..self.optimizer.into()
        }
    }

    /// How the learning rate goes on after warm-up.
    pub(crate) fn shape(&self) -> Shape {
        match self.schedule {
            ScheduleKind::Cosine => Shape::Cosine,
            ScheduleKind::Linear => Shape::Linear,
            ScheduleKind::Constant => Shape::Constant,
            ScheduleKind::Wsd => Shape::Wsd { decay_steps_perc: self.decay_steps_perc },
        }
    }

    /// What a batch of sequences of `seq_len` bytes adds to the elements seen.
    pub(crate) fn elements_per_batch(&self, seq_len: usize) -> u64 {
        match self.target_elements_strategy {
            TargetStrategy::Batch => self.batch_size as u64,
            TargetStrategy::Sequence => (self.batch_size as u64).saturating_mul(seq_len as u64),
        }
    }

    /// The batches in which each of `processes` sees its part of `elements`, rounded up; as in the package, what is left
    /// over when the elements are divided is not counted.
    pub(crate) fn batches_of(&self, elements: u64, seq_len: usize, processes: usize) -> u64 {
        (elements / processes as u64).div_ceil(self.elements_per_batch(seq_len).max(1))
    }

    pub(super) fn check(&self, document: &Document) -> Result<(), ConfigError> {
        let positive = [
            ("train.target_elements", self.target_elements),
            ("train.batch_size", self.batch_size as u64),
            ("train.gradient_accumulate_every", self.gradient_accumulate_every as u64),
            ("train.max_eval_steps", self.max_eval_steps.unwrap_or(1) as u64),
            ("train.validate_every", self.validate_every.unwrap_or(1)),
            ("train.early_stop", self.early_stop.unwrap_or(1)),
        ];
        for (path, number) in positive {
            check(document, path, number > 0, "a positive integer", number)?;
        }
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let clipping = self.gradient_clipping.unwrap_or(1.0);
        check(
            document,
            "train.learning_rate",
            is_positive(self.learning_rate),
            "a positive number",
            self.learning_rate,
        )?;
        check(document, "train.gradient_clipping", is_positive(clipping), "a positive number or null", clipping)?;
        let limit = self.max_seconds.unwrap_or(1.0);
        check(document, "train.max_seconds", is_positive(limit), "a positive number or null", limit)?;
        let (first, second) = self.betas;
        let are_rates = (0.0..1.0).contains(&first) && (0.0..1.0).contains(&second);
        check(document, "train.betas", are_rates, "two rates from 0 to below 1", format!("[{first}, {second}]"))?;
        let warmup = self.warmup_steps_perc;
        check(document, "train.warmup_steps_perc", (0.0..=1.0).contains(&warmup), "a share from 0 to 1", warmup)?;
        let decay = self.decay_steps_perc;
        check(document, "train.decay_steps_perc", (0.0..=1.0).contains(&decay), "a share from 0 to 1", decay)?;
        let rewarm = self.rewarm_steps_perc.unwrap_or(0.0);
        let is_share = (0.0..=1.0).contains(&rewarm);
        check(document, "train.rewarm_steps_perc", is_share, "a share from 0 to 1, or null", rewarm)?;
        let decay = self.weight_decay;
        check(document, "train.weight_decay", decay >= 0.0 && decay.is_finite(), "a number of at least 0", decay)
    }
}
