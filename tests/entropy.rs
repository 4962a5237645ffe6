//! Patches that end where a small model finds the next byte hard to predict: byte by byte as all at once, remembered from run
//! to run, and refused with another model.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assert_cmd::Command;
use candle_core::{Device, Tensor};
use mblm::Mode;
use mblm::config::MblmConfig;
use mblm::generate::Decoder;
use mblm::model::Mblm;
use mblm::registry::BlockRegistry;
use mblm::testing::{assert_close, perturb};
use mblm::yaml::Document;

/// A run of a model of one stage or two; `SMALL` and `PARAMS` are filled in.
const RUN: &str = "
io: {name_model: NAME, output_dir: runs, dataset_dir: text.txt, dataset_id: bytes, num_models_to_save: 1,
  validate_amount: 4, log_train_loss_amount: 10}
train: {target_elements: ELEMENTS, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: null,
  learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 1, shuffle_train: true}
params:
  num_tokens: 257
  pad_token_id: 256
";
const SMALL: &str = "
  input_seq_len: 48
  hidden_dims: [16]
  num_layers: [1]
  seq_lens: [48]
  block: [BLOCK]
";
const LARGE: &str = "
  input_seq_len: 128
  hidden_dims: [16, 16]
  num_layers: [1, 1]
  seq_lens: [16, 8]
  block: {block_type: mamba2, d_state: 8, d_conv: 4, expand: 2, headdim: 8}
";
const BLOCKS: [&str; 2] = [
    "{block_type: transformer, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true, pos_emb_type: fixed}",
    "{block_type: mamba2, d_state: 8, d_conv: 4, expand: 2, headdim: 8}",
];

/// A folder with text, a trained small model in `runs/small`, and `large.yaml`.
fn workplace(block: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..1500).map(|n| format!("{n} times {} is {}\n", n % 7, n * (n % 7))).collect();
    fs::write(folder.path().join("text.txt"), text).unwrap();
    small(folder.path(), block, "small", 60_000);
    let large = RUN.replace("NAME", "large").replace("ELEMENTS", "20000") + LARGE;
    fs::write(folder.path().join("large.yaml"), large).unwrap();
    folder
}

fn small(folder: &Path, block: &str, name: &str, elements: usize) {
    let yaml = RUN.replace("NAME", name).replace("ELEMENTS", &elements.to_string()) + &SMALL.replace("BLOCK", block);
    fs::write(folder.join("small.yaml"), yaml).unwrap();
    let (run, _) = train(folder, "small.yaml", &[]);
    fs::rename(run, folder.join("runs").join(name)).unwrap();
}

/// Exit code, standard output and error.
fn mblm(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("mblm").unwrap().current_dir(folder).args(args).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn train(folder: &Path, config: &str, set: &[&str]) -> (PathBuf, String) {
    let set: Vec<&str> = set.iter().flat_map(|assignment| ["--set", assignment]).collect();
    let (code, out, error) = mblm(folder, &[&["train", config], &set[..]].concat());
    assert_eq!(code, 0, "{error}");
    let run = error.lines().find_map(|line| line.strip_prefix("run: ")).unwrap();
    (folder.join(run), out + &error)
}

fn rule(folder: &Path, fields: &str) -> String {
    let model = folder.join("runs/small");
    format!("{{patching_type: entropy, model: {:?}, {fields}}}", model.to_str().unwrap())
}

fn config(patching: &str) -> MblmConfig {
    let yaml = format!("num_tokens: 257\npad_token_id: 256{}  patching: {patching}\n", LARGE.replace("\n  ", "\n"));
    let yaml = yaml.replace("input_seq_len: 128\n", "").replace("\n  patching", "\npatching");
    let document = Document::parse(&yaml, "test.yaml").unwrap();
    MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap()
}

fn text(folder: &Path, len: usize) -> Vec<u32> {
    fs::read(folder.join("text.txt")).unwrap()[20_000..20_000 + len].iter().map(|&byte| byte.into()).collect()
}

/// Over several windows of the small model, whose decoder differs in the last bits from a pass over the window.
#[test]
fn patches_end_at_the_same_bytes_all_at_once_byte_by_byte_and_whatever_follows() {
    for block in BLOCKS {
        let folder = workplace(block);
        let ids = text(folder.path(), 230);
        for (fields, least, most) in [("threshold: 1.5", 0.1, 0.8), ("jump: 0.3", 0.1, 0.6)] {
            let rule = &config(&rule(folder.path(), fields)).patching[0];
            let all = |len: usize| rule.ends(&ids[..len]).collect::<mblm::Result<Vec<bool>>>().unwrap();
            let ends = all(ids.len());
            let share = ends.iter().filter(|ends| **ends).count() as f64 / ids.len() as f64;
            assert!((least..most).contains(&share), "{fields}: {share}");
            let mut follower = rule.follow().unwrap().unwrap();
            let followed: Vec<bool> = ids.iter().map(|&id| follower.push(id).unwrap()).collect();
            assert_eq!(ends, followed, "{fields}");
            for len in [1, 20, 48, 49, 72, 73, 100, 229] {
                assert_eq!(all(len), ends[..len], "{fields}: the first {len}");
                assert_eq!(rule.ends_patch(&ids[..len]).unwrap(), ends[len - 1], "{fields}: {len}");
            }
        }
    }
}

#[test]
fn cached_decoding_equals_the_full_pass() {
    let folder = workplace(BLOCKS[0]);
    let model = Mblm::new(&config(&rule(folder.path(), "threshold: 1.5")), 1).unwrap();
    perturb(model.params());
    let (ids, other) = (text(folder.path(), 40), text(folder.path(), 80).split_off(40));
    let both = Tensor::from_vec([&ids[..], &other].concat(), (2, 40), &Device::Cpu).unwrap();
    let want: Vec<f32> = model.logits(&both, Mode::Eval).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    for prefix in [1, 7, 30] {
        let mut decoder = Decoder::new(&model, 2).unwrap();
        decoder.prefill(&[&ids[..prefix], &other[..prefix]].concat()).unwrap();
        for l in prefix..40 {
            for (b, got) in decoder.logits().chunks_exact(257).enumerate() {
                let want = &want[(b * 40 + l - 1) * 257..][..257];
                assert_close(&format!("byte {l} of {b} after {prefix}"), got, want, 2e-5);
            }
            decoder.step(&[ids[l], other[l]]).unwrap();
        }
    }
}

/// `batches` and the losses in `loss.csv`.
fn losses(run: &Path) -> String {
    let text = fs::read_to_string(run.join("loss.csv")).unwrap();
    // Times differ.
    text.lines().map(|line| line.split(',').skip(3).collect::<Vec<_>>().join(",") + "\n").collect()
}

#[test]
fn runs_remember_where_patches_end_and_refuse_another_small_model() {
    let folder = workplace(BLOCKS[0]);
    let set = "params.patching={patching_type: entropy, model: runs/small, threshold: 1.5}";
    let (first, said) = train(folder.path(), "large.yaml", &[set]);
    assert!(said.contains("bytes on average"), "{said}");
    let remembered = || {
        let files = fs::read_dir(folder.path().join("runs/small/patches")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).collect::<Vec<_>>()
    };
    let before = remembered();
    assert!(before.len() == 1 && before[0] > 500, "{before:?}");
    let (second, _) = train(folder.path(), "large.yaml", &[set]);
    assert_eq!(losses(&first), losses(&second));
    assert_eq!(remembered(), before, "nothing was computed again");

    // Stopped by its time and trained on, a run has the same losses.
    let (parts, said) = train(folder.path(), "large.yaml", &[set, "train.max_seconds=0.05"]);
    assert!(said.contains("time limit reached"), "{said}");
    let run = parts.to_str().unwrap();
    let (code, _, error) =
        mblm(folder.path(), &["train", "--resume", run, "--set", "train.max_seconds=null", "--force"]);
    assert_eq!(code, 0, "{error}");
    let last = |run: &Path| losses(run).lines().last().map(String::from);
    assert_eq!(last(&parts), last(&first));

    // From elsewhere too, and with a copy of the small model.
    let elsewhere = folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let run = first.to_str().unwrap();
    let generate = |from: &Path| mblm(from, &["generate", run, "--prompt", "1 times", "--max-bytes", "5"]);
    assert_eq!(generate(&elsewhere).1, generate(folder.path()).1);
    let copy = folder.path().join("runs/copy");
    fs::rename(folder.path().join("runs/small"), &copy).unwrap();
    let set = "params.patching[0].model=runs/copy";
    let (code, _, error) = mblm(folder.path(), &["train", "--resume", run, "--set", set]);
    std::os::unix::fs::symlink(&copy, folder.path().join("runs/small")).unwrap();
    assert!(code == 0 && error.contains("batches are trained"), "{error}");

    // The small model may be trained further, if its checkpoint stays.
    let config = fs::read_to_string(first.join("config.yaml")).unwrap();
    let sum = config.lines().find_map(|line| line.trim().strip_prefix("weights: ")).expect("the run names the weights");
    let more = ["--set", "train.target_elements=80000", "--set", "io.num_models_to_save=4", "--force"];
    let (code, _, error) = mblm(folder.path(), &[&["train", "--resume", "runs/copy"], &more[..]].concat());
    assert_eq!(code, 0, "{error}");
    assert_eq!(generate(folder.path()).0, 0);

    fs::remove_file(folder.path().join("runs/small")).unwrap();
    let (code, _, error) = generate(folder.path());
    assert!(
        code != 0 && error.contains("model: expected the folder of a run, but \"runs/small\" does not exist"),
        "{error}"
    );
    small(folder.path(), BLOCKS[0], "small", 50_000);
    let (code, _, error) = mblm(folder.path(), &["train", "--resume", run]);
    assert!(code != 0 && error.contains("whose weights have the sum") && error.contains(sum), "{error}");
}

/// The only thread waits for a batch, which is read ahead with the small model: later epochs begin at bytes that nobody has
/// looked at before.
#[test]
fn one_thread_reads_ahead_over_several_epochs() {
    let folder = workplace(BLOCKS[1]);
    let rule = "params.patching={patching_type: entropy, model: runs/small, threshold: 1.5}";
    let args = ["train", "large.yaml", "--set", rule, "--set", "train.target_elements=90000"];
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.current_dir(folder.path()).args(args).env("RAYON_NUM_THREADS", "1").timeout(Duration::from_secs(120));
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.contains("finished: saved"), "{error}");
}

#[test]
fn what_is_no_small_model_is_refused() {
    let folder = workplace(BLOCKS[0]);
    for (name, rule) in [("large", "fixed"), ("itself", "{patching_type: entropy, model: runs/small, threshold: 2}")] {
        let (run, _) = train(folder.path(), "large.yaml", &[&format!("params.patching={rule}")]);
        fs::rename(run, folder.path().join("runs").join(name)).unwrap();
    }
    let refused = |fields: &str, more: &[&str], want: &str| {
        let rule = format!("params.patching={{patching_type: entropy, {fields}}}");
        let (code, _, error) = mblm(folder.path(), &[&["check", "large.yaml", "--set", &rule], more].concat());
        assert!(code != 0 && error.contains(want), "{fields}: {error}");
    };
    refused("model: runs/none, threshold: 1", &[], "\"runs/none\" does not exist");
    refused("model: '', threshold: 1", &[], "\"\" does not exist");
    refused("model: runs/large, threshold: 1", &[], "expected a model with one stage, found 2 stages");
    refused("model: runs/itself, threshold: 1", &[], "expected a model with one stage, found 2 stages");
    refused("model: text.txt, threshold: 1", &[], "params.patching.model: ");
    refused("model: runs/small", &[], "expected either threshold or jump, found neither");
    refused("model: runs/small, threshold: 1, jump: 1", &[], "expected either threshold or jump, found both");
    refused("model: runs/small, jump: -1", &[], "expected a number of bits from 0 on, found -1");
    refused("model: runs/small, jump: .nan", &[], "expected a number of bits from 0 on, found NaN");
    refused("model: runs/small, threshold: 1, max_patch: 9", &[], "expected a number from 1 to 8");
    refused("threshold: 1", &[], "missing field `model`");
    let vocabulary = ["--set", "params.num_tokens=300"];
    refused(
        "model: runs/small, threshold: 1",
        &vocabulary,
        "has a vocabulary of 257 tokens, but params.num_tokens is 300",
    );
    let checkpoints = folder.path().join("runs/small/checkpoints");
    let newest = fs::read_dir(&checkpoints).unwrap().next().unwrap().unwrap().path();
    let weights = newest.join("weights.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    refused("model: runs/small, threshold: 1", &[], "weights.safetensors");
}
