//! Checkpoints as a user meets them: those of the Python package become runs, runs become files for other programs,
//! and a flipped bit is found.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use safetensors::SafeTensors;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn mblm(folder: &Path, args: &[&str]) -> Ran {
    let mut command = Command::cargo_bin("mblm").unwrap();
    let output = command.current_dir(folder).args(args).env("XDG_DATA_HOME", folder).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let code = output.status.code().unwrap_or_else(|| panic!("mblm {args:?} was killed"));
    Ran { code, out: text(output.stdout), err: text(output.stderr) }
}

#[track_caller]
fn succeeds(folder: &Path, args: &[&str]) -> String {
    let Ran { code, out, err } = mblm(folder, args);
    assert_eq!(code, 0, "mblm {args:?}\n{out}\n{err}");
    out
}

/// A training configuration around the model of `tt_2d`; its data do not exist.
fn write_config(folder: &Path) {
    let model = fs::read_to_string(format!("{GOLDEN}/tt_2d.yaml")).unwrap();
    let model: String = model.lines().map(|line| format!("  {line}\n")).collect();
    let yaml = format!(
        "io: {{name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 3, \
         validate_amount: 2, log_train_loss_amount: 10}}\n\
         train: {{target_elements: 384, target_elements_strategy: sequence, batch_size: 4, max_eval_steps: 2, \
         learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 1}}\n\
         params:\n  input_seq_len: 24\n{model}"
    );
    fs::write(folder.join("run.yaml"), yaml).unwrap();
}

fn import(folder: &Path, file: &str, run: &str) -> String {
    succeeds(folder, &["import", file, "--config", "run.yaml", "--out", run])
}

/// Name, shape and bits of every tensor whose name begins with `prefix`, without it.
fn tensors(path: PathBuf, prefix: &str) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut found: Vec<_> = file
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.into(), t.shape().into(), t.data().into())))
        .collect();
    found.sort();
    found
}

fn exported(folder: &Path, run: &str, name: &str) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    succeeds(folder, &["checkpoint", "export", run, "--out", name]);
    tensors(folder.join(name), "")
}

#[test]
fn both_layouts_of_the_package_are_imported_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_config(folder);
    let want = tensors(format!("{GOLDEN}/tt_2d.safetensors").into(), "param.");
    assert_eq!(want.len(), 45);
    for (file, run) in [("tt_2d.pth", "new"), ("tt_2d_v040.pth", "old")] {
        let out = import(folder, &format!("{GOLDEN}/{file}"), run);
        assert!(out.contains("47 tensors, loss 1.2500"), "{out}");
        assert!(exported(folder, run, &format!("{run}.safetensors")) == want, "{file}: the weights differ");
    }
    let log = fs::read_to_string(folder.join("old/train.log")).unwrap();
    assert!(log.contains("tt_2d_v040.pth (loss 1.2500)"), "{log}");
}

#[test]
fn an_imported_run_is_listed_generated_from_evaluated_and_trained_further() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_config(folder);
    import(folder, &format!("{GOLDEN}/tt_2d.pth"), "run");
    let list = succeeds(folder, &["checkpoint", "list", "run"]);
    let row: Vec<&str> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..4], ["batch-0000000000", "0", "1.2500", "1.8034"], "{list}");
    assert!(list.trim_end().ends_with("newest, best, whole"), "{list}");
    fs::write(folder.join("data.txt"), "some text of many lines\n".repeat(40)).unwrap();
    succeeds(folder, &["generate", "run", "--prompt", "a", "--max-bytes", "4"]);
    assert!(succeeds(folder, &["eval", "run", "data.txt"]).contains("bpb"));
    succeeds(folder, &["train", "--resume", "run"]);
    let list = succeeds(folder, &["checkpoint", "list", "run"]);
    assert_eq!(list.lines().count(), 4, "the imported weights are the best, so they stay:\n{list}");
    assert!(list.contains("1.8034") && list.lines().nth(1).unwrap().contains("best, whole"), "{list}");
    assert!(list.lines().last().unwrap().contains("newest, whole"), "{list}");
}

#[test]
fn what_is_exported_is_imported_again() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_config(folder);
    import(folder, &format!("{GOLDEN}/tt_2d.pth"), "first");
    succeeds(folder, &["checkpoint", "export", "first", "--best", "--pth-names", "--out", "x.pth"]);
    assert!(import(folder, "x.pth", "second").contains("47 tensors, loss 1.2500"));
    assert!(exported(folder, "first", "1.safetensors") == exported(folder, "second", "2.safetensors"));
    let again = mblm(folder, &["checkpoint", "export", "first", "--out", "1.safetensors"]);
    assert!(again.code == 2 && again.err.contains("1.safetensors: already exists"), "{}", again.err);
    let again = mblm(folder, &["import", "x.pth", "--config", "run.yaml", "--out", "first"]);
    assert!(again.code == 2 && again.err.contains("first: already exists"), "{}", again.err);
    let named = mblm(folder, &["checkpoint", "export", "first", "--out", "y.pth"]);
    assert!(named.code == 2 && named.err.contains("--pth-names"), "{}", named.err);
}

#[test]
fn another_model_is_told_with_all_that_differs_and_nothing_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_config(folder);
    let config = fs::read_to_string(folder.join("run.yaml")).unwrap();
    let attempt = |config: String, more: &[&str]| {
        fs::write(folder.join("other.yaml"), config).unwrap();
        let file = format!("{GOLDEN}/tt_2d.pth");
        mblm(folder, &[&["import", &file, "--config", "other.yaml", "--out", "run"], more].concat())
    };
    let ran = attempt(config.replace("  - 2\n", "  - 3\n").replace("seq_lens:\n  - 6", "seq_lens:\n  - 7"), &[]);
    assert_eq!(ran.code, 1);
    for expected in [
        "tt_2d.pth: the weights do not fit this model",
        "missing stage_models.0.layers.2.0.norm.g",
        "pos_embs.0.weight: expected shape [7, 32], found [6, 32]",
    ] {
        assert!(ran.err.contains(expected), "{expected}\n{}", ran.err);
    }
    let ran = attempt(config.replace("attn_use_rot_embs: true", "attn_use_rot_embs: false"), &[]);
    assert!(ran.err.contains("unknown stage_models.1.rotary_emb.inv_freq"), "{}", ran.err);
    let larger = config.replace("num_tokens: 259", "num_tokens: 261");
    let ran = attempt(larger.clone(), &[]);
    assert!(ran.err.contains("to_logits.bias: expected shape [261], found [259]"), "{}", ran.err);
    assert!(!folder.join("run").exists() && !folder.join("runs").exists());
    let ran = attempt(larger, &["--migrate-embeddings"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
}

#[test]
fn a_flipped_bit_is_found_and_an_older_checkpoint_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_config(folder);
    fs::write(folder.join("data.txt"), "some text of many lines\n".repeat(40)).unwrap();
    import(folder, &format!("{GOLDEN}/tt_2d.pth"), "run");
    succeeds(folder, &["train", "--resume", "run"]);
    assert_eq!(succeeds(folder, &["checkpoint", "verify", "run"]).matches(": whole").count(), 3);
    let newest = folder.join("run/checkpoints/batch-0000000004");
    let weights = newest.join("weights.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    for path in ["run", newest.to_str().unwrap()] {
        let ran = mblm(folder, &["checkpoint", "verify", path]);
        assert_eq!(ran.code, 1);
        for expected in ["batch-0000000004/weights.safetensors: SHA-256", "batch-0000000001 is intact"] {
            assert!(ran.err.contains(expected), "{expected}\n{}", ran.err);
        }
    }
    let list = succeeds(folder, &["checkpoint", "list", "run"]);
    assert!(list.lines().last().unwrap().contains("damaged: "), "{list}");
    let ran = mblm(folder, &["checkpoint", "export", "run", "--out", "x.safetensors"]);
    assert!(ran.code == 1 && !folder.join("x.safetensors").exists(), "{}", ran.err);
    let older = mblm(folder, &["checkpoint", "verify", "run/checkpoints/batch-0000000001"]);
    assert_eq!(older.code, 0, "{}", older.err);
}

#[test]
fn what_is_no_checkpoint_of_the_package_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_config(folder);
    fs::write(folder.join("legacy.pth"), b"\x80\x02\x8a\x0alegacy").unwrap();
    let ran = mblm(folder, &["import", "legacy.pth", "--config", "run.yaml"]);
    assert!(ran.code == 1 && ran.err.contains("legacy.pth: a file in the format of torch before 1.6"), "{}", ran.err);
    assert!(!folder.join("runs").exists());
    let ran = mblm(folder, &["checkpoint", "verify", "."]);
    assert!(ran.code == 2 && ran.err.contains("expected a run folder"), "{}", ran.err);
}
