//! Configurations read, refused and written back.

use std::path::PathBuf;

use mblm_core::block::{PosEmb, StageBlock, StageModel};
use mblm_core::{ParamScope, register_block, schemars};
use schemars::JsonSchema;
use serde::Deserialize;

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
        (
            "batch_size: 2",
            "batch_size: 2\n  lr_scale: [1]",
            "train.lr_scale: expected 2 numbers, one per stage, found 1 (line 25)",
        ),
        (
            "batch_size: 2",
            "batch_size: 2\n  lr_scale: [1, -0.5]",
            "train.lr_scale[1]: expected a positive number, found -0.5 (line 25)",
        ),
        (
            "batch_size: 2",
            "batch_size: 2\n  decay_steps_perc: 20",
            "train.decay_steps_perc: expected a share from 0 to 1, found 20 (line 25)",
        ),
        ("io:\n", "in:\n", "in: unknown field; did you mean `io`? (line 1)"),
        ("input_seq_len", "input_len", "params.input_len: unknown field; did you mean `input_seq_len`? (line 13)"),
        ("  input_seq_len: 1_024\n", "", "params: missing field `input_seq_len` (line 10)"),
        ("1_024", "0", "params.input_seq_len: expected a positive integer, found 0 (line 13)"),
        (
            "toy_size: 3",
            "toy_sizes: 3\n    block_type: toy",
            "params.block.toy_sizes: unknown field; did you mean `toy_size`? (line 19)",
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
    // Without `block_type`, every type that could have been meant says what does not fit.
    let found = read(&RUN.replacen("toy_size", "toy_sizes", 1)).unwrap_err().to_string();
    assert!(found.contains("params.block: these fields fit no block type; choose one with `block_type`"));
    assert!(found.contains("\n  toy: toy_sizes: unknown field; did you mean `toy_size`?"), "{found}");
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
