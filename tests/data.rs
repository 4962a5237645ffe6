//! Data under a running program and between runs: files shrink, folders are renamed, projects move, runs lie in their data.
#![cfg(unix)]

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::cargo::CommandCargoExt;

const RUN: &str = "\
io: {name_model: toy, output_dir: runs, dataset_dir: d, dataset_id: bytes, num_models_to_save: 2, validate_amount: 2,
  log_train_loss_amount: 1000}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 16, seq_lens: [16], hidden_dims: [8], num_layers: [1],
  block: {attn_head_dims: 8, attn_num_heads: 1, attn_use_rot_embs: true, pos_emb_type: fixed}}
train: {target_elements: 40, target_elements_strategy: batch, batch_size: 2, max_eval_steps: 1, learning_rate: 0.01,
  gradient_accumulate_every: 1, shuffle_train: true}
";

/// A project: `run.yaml`, and its data in `d/a/x.txt` and `d/b/x.txt`, which have the same size.
fn project() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = |seed: u32| (0..2000).map(|i| char::from(b'a' + (i * i * seed % 23) as u8)).collect::<String>();
    for (name, seed) in [("d/a", 3), ("d/b", 5)] {
        fs::create_dir_all(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name).join("x.txt"), text(seed)).unwrap();
    }
    fs::write(folder.path().join("run.yaml"), RUN).unwrap();
    folder
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.current_dir(folder).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn mblm(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().unwrap()
}

/// Runs the program to its good end, and returns what it said.
fn succeed(folder: &Path, args: &[&str]) -> String {
    let output = mblm(folder, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {said}");
    said
}

/// Runs the program, which has to refuse, and returns what it said.
fn refused(folder: &Path, args: &[&str]) -> String {
    let output = mblm(folder, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    said
}

/// Begins the run `R` of a project and stops it at its first batch.
fn begin(folder: &Path) {
    mblm(folder, &["train", "-q", "run.yaml", "--out", "R", "--set", "train.max_seconds=0.000001"]);
}

/// Goes on with the run `run` to its end.
fn resume<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "-q", "--resume", run, "--force", "--set", "train.max_seconds=null"], more].concat()
}

#[test]
fn a_data_file_that_shrinks_is_an_error_that_names_it() {
    let project = project();
    let args = ["train", "run.yaml", "--out", "R", "--set", "train.target_elements=1000000000"];
    let child = command(project.path(), &args).spawn().unwrap();
    let log = project.path().join("R/loss.csv");
    let began = Instant::now();
    while fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < 2 {
        assert!(began.elapsed() < Duration::from_secs(300), "no batch was trained");
        std::thread::sleep(Duration::from_millis(10));
    }
    File::options().write(true).open(project.path().join("d/b/x.txt")).unwrap().set_len(7).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.signal(), output.status.code()), (None, Some(1)), "{said}");
    let want = "d/b/x.txt: this data file was 2000 bytes long when it was opened and is 7 bytes long now";
    assert!(said.contains(want), "{said}");
    assert!(fs::read_to_string(project.path().join("R/train.log")).unwrap().contains(want));
    succeed(project.path(), &["checkpoint", "verify", "R"]);
}

#[test]
fn data_that_changed_are_refused_with_the_files_that_did() {
    type Change = fn(&Path);
    let cases: [(&str, Change, &str); 4] = [
        ("renamed", |d| fs::rename(d.join("a"), d.join("z")).unwrap(), "renamed: a/x.txt (now z/x.txt)"),
        (
            "swapped",
            |d| {
                fs::rename(d.join("a/x.txt"), d.join("t")).unwrap();
                fs::rename(d.join("b/x.txt"), d.join("a/x.txt")).unwrap();
                fs::rename(d.join("t"), d.join("b/x.txt")).unwrap();
            },
            "changed: a/x.txt, b/x.txt",
        ),
        ("changed", |d| fs::write(d.join("b/x.txt"), "y".repeat(2000)).unwrap(), "changed: b/x.txt"),
        ("added", |d| fs::write(d.join("c.txt"), "new").unwrap(), "added: c.txt"),
    ];
    for (name, change, want) in cases {
        let project = project();
        begin(project.path());
        change(&project.path().join("d"));
        let said = refused(project.path(), &resume("R", &[]));
        assert!(said.contains("io.dataset_dir: the data are not those of R/checkpoints/"), "{name}: {said}");
        assert!(said.contains(want), "{name}: {said}");
    }
}

#[test]
fn a_run_is_resumed_from_any_directory() {
    let project = project();
    begin(project.path());
    let elsewhere = tempfile::tempdir().unwrap();
    // Not the data of the run, though they have its name.
    fs::create_dir(elsewhere.path().join("d")).unwrap();
    fs::write(elsewhere.path().join("d/x.txt"), "other data ".repeat(100)).unwrap();
    succeed(elsewhere.path(), &resume(project.path().join("R").to_str().unwrap(), &[]));
}

#[test]
fn a_run_finds_its_data_when_its_project_or_its_folder_is_moved() {
    let project = project();
    begin(project.path());
    let place = tempfile::tempdir().unwrap();
    let moved = place.path().join("moved");
    fs::rename(project.path(), &moved).unwrap();
    succeed(place.path(), &resume("moved/R", &["--set", "train.target_elements=50"]));
    fs::create_dir(place.path().join("runs")).unwrap();
    fs::rename(moved.join("R"), place.path().join("runs/R")).unwrap();
    succeed(&place.path().join("runs"), &resume("R", &["--set", "train.target_elements=60"]));
    fs::rename(moved.join("d"), moved.join("e")).unwrap();
    let said = refused(place.path(), &resume("runs/R", &["--set", "train.target_elements=70"]));
    assert!(said.contains("d\" does not exist"), "{said}");
    assert!(said.contains("; relative paths were tried in /") && said.contains("/moved"), "{said}");
    succeed(&moved, &resume("../runs/R", &["--set", "train.target_elements=70", "--set", "io.dataset_dir=e"]));
}

#[test]
fn runs_in_the_data_folder_are_not_trained_on() {
    let project = project();
    let args = |run: &'static str| {
        vec!["train", "run.yaml", "--out", run, "--set", "io.dataset_dir=.", "--set", "train.max_seconds=0.000001"]
    };
    let line = |said: &str| said.lines().find(|line| line.contains("bytes in")).unwrap_or_default().to_string();
    let first = line(&succeed(project.path(), &args("d/R1")));
    let second = line(&succeed(project.path(), &args("d/R2")));
    assert!(first.contains("in 3 file(s) of \".\""), "{first}");
    let same = |line: &str| line[line.find("data: ").unwrap()..].split(';').next().unwrap().to_string();
    assert_eq!(same(&first), same(&second));
    assert!(second.contains("; left out: 1 output folder(s) of training"), "{second}");
    succeed(project.path(), &resume("d/R1", &[]));
}

#[test]
fn the_data_set_s_name_is_checked_without_the_data() {
    let project = project();
    let said = refused(project.path(), &["check", "run.yaml", "--no-data", "--set", "io.dataset_id=byte"]);
    assert!(said.contains("io.dataset_id: unknown data set \"byte\"; did you mean `bytes`?"), "{said}");
}
