//! The training configuration: the reference package's YAML, with optional additions.

use std::path::PathBuf;

use mblm_core::block::{PluginOrigin, PosEmb};
use mblm_core::config::{MblmConfig, MblmEncoderConfig};
use mblm_core::registry::BlockRegistry;
use mblm_core::yaml::{ConfigError, Document};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use crate::difference::differences;

/// A whole training YAML: `params`, `train`, `io`, `resume`. Serialised, it reads back as the same, without `resume`.
#[derive(Clone, Debug, Serialize)]
pub struct RunConfig {
    /// The model and its training sequence length.
    pub params: Params,
    /// How to train.
    pub train: TrainSection,
    /// What to read and where to write.
    pub io: IoSection,
    /// What a new run begins with.
    #[serde(skip)]
    pub resume: Option<ResumeSection>,
}

/// Section `params`.
#[derive(Clone, Debug, Serialize)]
pub struct Params {
    /// The model.
    #[serde(flatten)]
    pub model: ModelConfig,
    /// Bytes of one training sequence.
    pub input_seq_len: usize,
}

/// A model that predicts the next byte, or, with `mblm_config`, one that restores masked bytes.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum ModelConfig {
    /// Predicts the next byte.
    Generative(MblmConfig),
    /// Restores masked bytes.
    Encoder(MblmEncoderConfig),
}

impl ModelConfig {
    /// Its stages.
    pub fn hierarchy(&self) -> &MblmConfig {
        match self {
            ModelConfig::Generative(model) => model,
            ModelConfig::Encoder(encoder) => &encoder.mblm_config,
        }
    }

    fn from_document(document: &Document, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        const LENGTH: &[&str] = &["input_seq_len"];
        if document.get("params.mblm_config").is_some() {
            document.check_fields("params", &[MblmEncoderConfig::FIELDS.as_slice(), LENGTH].concat())?;
            return MblmEncoderConfig::from_section(document, "params", registry).map(ModelConfig::Encoder);
        }
        document.check_fields("params", &[MblmConfig::FIELDS.as_slice(), LENGTH].concat())?;
        MblmConfig::from_section(document, "params", registry).map(ModelConfig::Generative)
    }
}

/// How elements count towards `target_elements`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetStrategy {
    /// One per sequence of a batch.
    Batch,
    /// One per byte of a batch.
    Sequence,
}

/// Section `train`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Elements to train on; a lower bound, rounded up to whole batches.
    pub target_elements: u64,
    /// How elements count.
    pub target_elements_strategy: TargetStrategy,
    /// The share of gradient steps that warm up.
    #[serde(default = "default_warmup")]
    pub warmup_steps_perc: f64,
    /// Sequences per batch.
    pub batch_size: usize,
    /// Whether training sequences come in random order.
    #[serde(default)]
    pub shuffle_train: bool,
    /// Whether validation sequences come in random order.
    #[serde(default)]
    pub shuffle_eval: bool,
    /// At most this many validation batches.
    #[serde(default)]
    pub max_eval_steps: Option<usize>,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// Gradients are clipped to this global norm.
    #[serde(default)]
    pub gradient_clipping: Option<f64>,
    /// Batches per gradient step.
    pub gradient_accumulate_every: usize,
    /// The probability that a byte is masked; for encoders, and only for these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masking_proba: Option<f64>,
    /// Decoupled weight decay of matrices (addition; the package has none).
    #[serde(default)]
    pub weight_decay: f64,
    /// Adam's decay rates of the mean gradient and of its square (addition; the package's values are the default).
    #[serde(default = "default_betas")]
    pub betas: (f64, f64),
    /// What numbers are computed in (addition).
    #[serde(default)]
    pub precision: Precision,
    /// Validate (and save) after every so many batches, in place of `io.validate_amount` (addition).
    #[serde(default)]
    pub validate_every: Option<u64>,
    /// End after so many validations in a row without a new best loss (addition).
    #[serde(default)]
    pub early_stop: Option<u64>,
    /// End with a checkpoint after so many seconds, from which the run can be resumed (addition).
    #[serde(default)]
    pub max_seconds: Option<f64>,
    /// Seed of initial values, shuffling and dropout (addition).
    #[serde(default)]
    pub seed: u64,
}

fn default_warmup() -> f64 {
    0.1
}

fn default_betas() -> (f64, f64) {
    (0.9, 0.95)
}

/// What numbers are computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
}

/// Section `io`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoSection {
    /// Name of the model, part of the run folder's name.
    pub name_model: String,
    /// Where run folders are made.
    pub output_dir: PathBuf,
    /// The data: a file, a folder or a glob for `bytes`.
    pub dataset_dir: String,
    /// Which data set reads it.
    pub dataset_id: String,
    /// Options of the data set.
    #[serde(default)]
    pub dataset_args: Option<serde_json::Value>,
    /// At most this many best models are kept.
    pub num_models_to_save: usize,
    /// How often to validate (and save) in all.
    pub validate_amount: usize,
    /// How often to log the training loss in all.
    pub log_train_loss_amount: usize,
    /// Only the first worker logs here; accepted for the package's configs.
    #[serde(default)]
    pub enabled_loss_log_for_gpus: Option<Vec<usize>>,
    /// Anything worth remembering.
    #[serde(default)]
    pub description: Option<String>,
}

/// Section `resume`: a new run that begins with the weights of an earlier one, further on in the data. A run writes it
/// into its `config.yaml`, so that training with that file chains runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeSection {
    /// A run, one of its checkpoints, or a `.pth` file of the package.
    pub checkpoint_file: PathBuf,
    /// The epoch to begin in.
    pub next_epoch_index: u64,
    /// The batch of that epoch to begin with.
    pub next_batch_index: u64,
    /// Whether the weights may be of a model with fewer tokens.
    #[serde(default)]
    pub migrate_embeddings: bool,
    /// Accepted for the package's configs: names of its earlier versions are known without.
    #[serde(default)]
    pub rename_modules: bool,
    /// What the run that wrote this section began with.
    #[serde(default)]
    pub resumed_from: Option<PathBuf>,
}

/// A section that the package's output configurations hold and that says nothing about a new run.
const SUMMARY: &str = "summary";

impl RunConfig {
    /// Reads and checks a whole document.
    pub fn from_document(document: &Document, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        document.check_fields("", &["params", "train", "io", "resume", SUMMARY])?;
        let config = RunConfig {
            params: Params::from_document(document, registry)?,
            train: document.section("train")?,
            io: document.section("io")?,
            resume: match document.get("resume") {
                None | Some(Value::Null) => None,
                Some(_) => Some(document.section("resume")?),
            },
        };
        config.train.check(document)?;
        config.check_masking(document)?;
        config.io.check(document)?;
        Ok(config)
    }

    fn check_masking(&self, document: &Document) -> Result<(), ConfigError> {
        const PATH: &str = "train.masking_proba";
        match (&self.params.model, self.train.masking_proba) {
            (ModelConfig::Generative(_), None) => Ok(()),
            (ModelConfig::Generative(_), Some(_)) => {
                Err(document.error(PATH, "is for encoders, whose `params` hold `mblm_config`; remove it"))
            }
            (ModelConfig::Encoder(_), Some(share)) => {
                check(document, PATH, share > 0.0 && share <= 1.0, "a share above 0, up to 1", share)
            }
            (ModelConfig::Encoder(_), None) => {
                Err(document.error("train", "missing field `masking_proba`, the share of bytes to mask, such as 0.15"))
            }
        }
    }

    /// The plugins that blocks of the model come from, each once.
    pub fn plugins(&self) -> Vec<PluginOrigin> {
        let mut plugins: Vec<_> =
            self.params.model.hierarchy().blocks.iter().filter_map(|block| block.plugin().cloned()).collect();
        plugins.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
        plugins.dedup();
        plugins
    }

    /// What is another one in `other`, a line per field: `train.batch_size: 8, now 16`.
    pub fn differences(&self, other: &RunConfig) -> mblm_core::Result<Vec<String>> {
        let value = |config: &RunConfig| {
            serde_yaml::to_value(config)
                .map_err(|error| mblm_core::Error::Block(format!("a block's configuration cannot be written: {error}")))
        };
        Ok(differences(&value(self)?, &value(other)?))
    }

    /// The configuration as YAML, with every default and `block_type` filled in.
    pub fn to_yaml(&self) -> mblm_core::Result<String> {
        serde_yaml::to_string(self)
            .map_err(|error| mblm_core::Error::Block(format!("a block's configuration cannot be written: {error}")))
    }
}

impl Params {
    fn from_document(document: &Document, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        const PATH: &str = "params.input_seq_len";
        let config = ModelConfig::from_document(document, registry)?;
        let model = config.hierarchy();
        let input_seq_len: usize = document.section(PATH)?;
        check(document, PATH, input_seq_len > 0, "a positive integer", input_seq_len)?;
        let is_limited = model.blocks.first().is_some_and(|block| block.pos_emb_type() == Some(PosEmb::Fixed));
        let context_len = model.context_len();
        if is_limited && input_seq_len > context_len {
            let lens: Vec<String> = model.seq_lens.iter().map(usize::to_string).collect();
            let product = if lens.len() == 1 { String::new() } else { format!("{} = ", lens.join(" · ")) };
            let message = format!(
                "expected at most {product}{context_len}, found {input_seq_len}: the first stage has fixed positions \
                 for seq_lens[0] = {} patches; raise that, or shorten the input",
                lens[0]
            );
            return Err(document.error(PATH, message));
        }
        Ok(Params { model: config, input_seq_len })
    }
}

impl TrainSection {
    fn check(&self, document: &Document) -> Result<(), ConfigError> {
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
        let decay = self.weight_decay;
        check(document, "train.weight_decay", decay >= 0.0 && decay.is_finite(), "a number of at least 0", decay)
    }
}

impl IoSection {
    fn check(&self, document: &Document) -> Result<(), ConfigError> {
        let name = &self.name_model;
        let is_name = !name.trim().is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
        let expected = "a name for the run folder, without slashes";
        check(document, "io.name_model", is_name, expected, format!("{name:?}"))?;
        let (validate, log) = (self.validate_amount, self.log_train_loss_amount);
        check(document, "io.validate_amount", validate > 0, "a positive integer", validate)?;
        check(document, "io.log_train_loss_amount", log > 0, "a positive integer", log)?;
        match &self.dataset_args {
            Some(args) if !args.is_object() => check(document, "io.dataset_args", false, "a mapping or nothing", args),
            _ => Ok(()),
        }
    }
}

fn check(
    document: &Document,
    path: &str,
    fits: bool,
    expected: &str,
    found: impl std::fmt::Display,
) -> Result<(), ConfigError> {
    if fits { Ok(()) } else { Err(document.error(path, format!("expected {expected}, found {found}"))) }
}

#[cfg(test)]
mod tests {
    use mblm_core::block::{StageBlock, StageModel};
    use mblm_core::{ParamScope, register_block, schemars};
    use schemars::JsonSchema;

    use super::*;

    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Toy {
        toy_size: usize,
        #[serde(default)]
        pos_emb_type: Option<PosEmb>,
    }

    register_block!(Toy, name = "toy", infer = true);

    #[typetag::serde(name = "toy")]
    impl StageBlock for Toy {
        fn pos_emb_type(&self) -> Option<PosEmb> {
            self.pos_emb_type
        }
        fn build(&self, _: usize, _: usize, _: &mut ParamScope) -> mblm_core::Result<Box<dyn StageModel>> {
            Err(mblm_core::Error::Block("blocks of tests build nothing".into()))
        }
    }

    const RUN: &str = "\
io:
  name_model: toy
  output_dir: runs < set this!
  dataset_dir: data/*.bin
  dataset_id: bytes
  dataset_args: {mode: a, mask: [0.0, 1]}
  num_models_to_save: 5
  validate_amount: 100
  log_train_loss_amount: 1_000
params:
  num_tokens: 256
  pad_token_id: 0
  input_seq_len: 1_024
  seq_lens: [64, 16]
  hidden_dims: [32, 16]
  num_layers: [1, 1]
  train_checkpoint_chunks: null
  block:
    toy_size: 3
    pos_emb_type: fixed
train:
  target_elements: 200_000_000_000
  target_elements_strategy: sequence
  batch_size: 2
  max_eval_steps: 10
  learning_rate: 1e-3
  gradient_clipping: 1
  gradient_accumulate_every: 4
";

    fn read(text: &str) -> Result<RunConfig, ConfigError> {
        let registry = BlockRegistry::builtin().unwrap();
        RunConfig::from_document(&Document::parse(text, "run.yaml")?, &registry)
    }

    #[test]
    fn a_run_is_read_and_written_back() {
        let config = read(RUN).unwrap();
        assert_eq!((config.train.target_elements, config.train.learning_rate), (200_000_000_000, 1e-3));
        assert_eq!((config.train.warmup_steps_perc, config.train.gradient_clipping), (0.1, Some(1.0)));
        assert_eq!((config.params.input_seq_len, config.io.log_train_loss_amount), (1024, 1000));
        assert_eq!(config.io.output_dir, PathBuf::from("runs < set this!"));
        let text = config.to_yaml().unwrap();
        assert_eq!(text.matches("block_type: toy").count(), 2, "{text}");
        assert_eq!(read(&text).unwrap().to_yaml().unwrap(), text);
    }

    #[test]
    fn differences_are_listed_by_field() {
        let old = read(RUN).unwrap();
        assert_eq!(old.differences(&read(RUN).unwrap()).unwrap(), [""; 0]);
        let want = ["train.learning_rate: 0.001, now 0.002"];
        let found = old.differences(&read(&RUN.replace("1e-3", "2e-3")).unwrap()).unwrap();
        assert_eq!(found, want);
        let found = old.differences(&read(&RUN.replace("toy_size: 3", "toy_size: 4")).unwrap()).unwrap();
        assert_eq!(found, ["params.block[0].toy_size: 3, now 4", "params.block[1].toy_size: 3, now 4"]);
    }

    #[test]
    fn the_packages_output_configurations_are_read() {
        let text = format!(
            "{RUN}resume: {{checkpoint_file: a.pth, next_epoch_index: 1, next_batch_index: 7, rename_modules: true}}\n\
             summary: {{parameter_count: 5}}\n"
        );
        let resume = read(&text).unwrap().resume.unwrap();
        assert_eq!((resume.checkpoint_file.to_str(), resume.next_batch_index), (Some("a.pth"), 7));
        assert_eq!(read(&format!("{RUN}resume: null\n")).unwrap().resume, None);
        let error = read(&text.replace("next_batch_index: 7, ", "")).unwrap_err().to_string();
        assert!(error.contains("resume: missing field `next_batch_index`"), "{error}");
    }

    #[test]
    fn an_override_is_checked_as_the_file_is() {
        let mut document = Document::parse(RUN, "run.yaml").unwrap();
        let registry = BlockRegistry::builtin().unwrap();
        document.set("train.learning_rate=3e-4").unwrap();
        assert_eq!(RunConfig::from_document(&document, &registry).unwrap().train.learning_rate, 3e-4);
        document.set("train.warmup_steps_perc=10").unwrap();
        let error = RunConfig::from_document(&document, &registry).unwrap_err().to_string();
        let want = "expected a share from 0 to 1, found 10 (--set train.warmup_steps_perc=10)";
        assert_eq!(error, format!("run.yaml: train.warmup_steps_perc: {want}"));
    }

    #[test]
    fn longer_inputs_need_positions_that_are_not_fixed() {
        let text = RUN.replace("1_024", "1_025");
        let want = "run.yaml: params.input_seq_len: expected at most 64 · 16 = 1024, found 1025: the first stage has \
                    fixed positions for seq_lens[0] = 64 patches; raise that, or shorten the input (line 13)";
        assert_eq!(read(&text).unwrap_err().to_string(), want);
        assert_eq!(read(&text.replace("fixed", "null")).unwrap().params.input_seq_len, 1025);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let cases = [
            ("io:\n", "in:\n", "in: unknown field; did you mean `io`? (line 1)"),
            (
                "input_seq_len",
                "input_len",
                "params.input_len: unknown field; expected one of `num_tokens`, \
             `pad_token_id`, `hidden_dims`, `num_layers`, `seq_lens`, `train_checkpoint_chunks`, `block`, \
             `input_seq_len` (line 13)",
            ),
            ("  input_seq_len: 1_024\n", "", "params: missing field `input_seq_len` (line 10)"),
            ("1_024", "0", "params.input_seq_len: expected a positive integer, found 0 (line 13)"),
            (
                "toy_size: 3",
                "toy_sizes: 3",
                "params.block: these fields fit no block type; name the one you mean \
             with `block_type` (line 18)\n  toy: toy_sizes: unknown field; did you mean `toy_size`?",
            ),
            (
                "toy_size: 3",
                "toy_size: many\n    block_type: toy",
                "params.block.toy_size: expected a positive integer, found \"many\" (line 19)",
            ),
            ("200_000_000_000", "0", "train.target_elements: expected a positive integer, found 0 (line 22)"),
            (
                "y: sequence",
                "y: byte",
                "train.target_elements_strategy: unknown value \"byte\"; expected one of \
             `batch`, `sequence` (line 23)",
            ),
            ("batch_size: 2", "batch_size: 0", "train.batch_size: expected a positive integer, found 0 (line 24)"),
            (
                "max_eval_steps: 10",
                "max_eval_steps: 0",
                "train.max_eval_steps: expected a positive integer, found 0 (line 25)",
            ),
            ("1e-3", "-1e-3", "train.learning_rate: expected a positive number, found -0.001 (line 26)"),
            ("1e-3", "fast", "train.learning_rate: expected a number, found \"fast\" (line 26)"),
            ("1e-3", ".nan", "train.learning_rate: expected a positive number, found NaN (line 26)"),
            (
                "clipping: 1",
                "clipping: 0",
                "train.gradient_clipping: expected a positive number or null, found 0 \
             (line 27)",
            ),
            ("every: 4", "every: 0", "train.gradient_accumulate_every: expected a positive integer, found 0 (line 28)"),
            (
                "batch_size: 2\n",
                "batch_size: 2\n  weight_decay: -1\n",
                "train.weight_decay: expected a number of at least 0, found -1 (line 25)",
            ),
            (
                "batch_size: 2\n",
                "batch_size: 2\n  shuffle_train: 1\n",
                "train.shuffle_train: expected true or false, found 1 (line 25)",
            ),
            ("  batch_size: 2\n", "", "train: missing field `batch_size` (line 21)"),
            ("batch_size", "batchsize", "train.batchsize: unknown field; did you mean `batch_size`? (line 24)"),
            (
                "validate_amount: 100",
                "validate_amount: 0",
                "io.validate_amount: expected a positive integer, found 0 (line 8)",
            ),
            ("1_000", "0", "io.log_train_loss_amount: expected a positive integer, found 0 (line 9)"),
            (
                "model: toy",
                "model: a/b",
                "io.name_model: expected a name for the run folder, without slashes, found \
             \"a/b\" (line 2)",
            ),
            ("model: toy", "model: 2024", "io.name_model: expected a string, found 2024 (line 2)"),
            ("{mode: a, mask: [0.0, 1]}", "a", "io.dataset_args: expected a mapping or nothing, found \"a\" (line 6)"),
        ];
        for (from, to, want) in cases {
            assert!(RUN.contains(from), "{from}");
            let found = read(&RUN.replacen(from, to, 1)).unwrap_err().to_string();
            assert_eq!(found, format!("run.yaml: {want}"));
        }
    }

    #[test]
    fn a_section_is_missing() {
        let text = RUN.split_once("train:").unwrap().0;
        assert_eq!(read(text).unwrap_err().to_string(), "run.yaml: missing field `train`");
        assert_eq!(
            read(&format!("{text}train: 3")).unwrap_err().to_string(),
            "run.yaml: train: expected a mapping, found 3 (line 21)"
        );
    }
}
