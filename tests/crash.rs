//! No run is lost: killed at any moment, out of space, interrupted, or started twice, it goes on as if nothing had
//! happened, with the same losses, weights, moments and data order, bit for bit.
#![cfg(unix)]

mod compiled;
mod programs;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use assert_cmd::cargo::CommandCargoExt;
use programs::{succeed, text};
use serde_json::Value;

/// Shuffled, accumulated, with dropout, recomputed in chunks, and with a block from a plugin.
const RUN: &str = "\
io: {name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 2,
  validate_amount: 7, log_train_loss_amount: 20}
params:
  num_tokens: 257
  pad_token_id: 256
  input_seq_len: 64
  seq_lens: [16, 4]
  hidden_dims: [48, 32]
  num_layers: [2, 1]
  train_checkpoint_chunks: [3]
  block:
    - {block_type: lstm, dropout: 0.2}
    - {attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, attn_dropout: 0.1, ff_dropout: 0.1,
      pos_emb_type: fixed}
train: {target_elements: 26000, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 2,
  learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 3, shuffle_train: true, weight_decay: 0.1}
";

/// A folder with a configuration, its data and its plugin.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..900).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
    fs::write(folder.path().join("data.txt"), text).unwrap();
    fs::write(folder.path().join("run.yaml"), RUN).unwrap();
    fs::create_dir(folder.path().join("plugins")).unwrap();
    fs::copy(compiled::lstm(), folder.path().join("plugins/liblstm.so")).unwrap();
    folder
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.current_dir(folder).args(args).env("MBLM_PLUGIN_PATH", folder.join("plugins"));
    programs::piped(command)
}

/// The one run below `output`, if its folder is there.
fn run_below(output: &Path) -> Option<PathBuf> {
    let entries = output.read_dir().ok()?.map(|entry| entry.unwrap().path());
    let mut runs = entries.filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'));
    let run = runs.next();
    assert_eq!(runs.next(), None, "one run in {}", output.display());
    run
}

fn checkpoints(run: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = run.join("checkpoints").read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// What a finished run must have in common with every other: sums of weights and moments, state, and losses.
fn fate(run: &Path) -> (BTreeMap<String, Value>, Value, Vec<String>) {
    let newest = checkpoints(run).pop().unwrap();
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(newest.join(name)).unwrap()).unwrap() };
    let manifest = json("manifest.json");
    let sums =
        ["weights.safetensors", "optimizer.safetensors"].map(|name| (name.into(), manifest["files"][name].clone()));
    let losses = fs::read_to_string(run.join("loss.csv")).unwrap();
    let without_time = |line: &str| {
        line.split(',').enumerate().filter(|(i, _)| *i != 1).map(|(_, cell)| cell.to_string() + ",").collect()
    };
    (sums.into(), json("state.json"), losses.lines().map(without_time).collect())
}

/// When a run is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So long after its start.
    After(Duration),
    /// So long after it begins to write its n-th checkpoint that is not the first of all.
    Writing(usize, Duration),
}

/// Kills the process at that moment, unless it ends before; true if it was killed.
fn kill_at(mut child: Child, output: &Path, moment: Moment) -> bool {
    let start = Instant::now();
    let (mut seen, mut writing) = (0, false);
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        let due = match moment {
            Moment::After(delay) => start.elapsed() >= delay,
            Moment::Writing(n, delay) => {
                let now = run_below(output).is_some_and(|run| {
                    checkpoints(&run)
                        .iter()
                        .any(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".writing"))
                });
                seen += (now && !writing) as usize;
                writing = now;
                let due = now && seen > n;
                if due {
                    std::thread::sleep(delay);
                }
                due
            }
        };
        if due {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Trains `run.yaml` below `output`, killed at each of the moments; then to the end.
fn train_through(folder: &Path, output: &str, moments: &[Moment]) -> (PathBuf, usize) {
    train_from(folder, "run.yaml", output, moments)
}

/// As [`train_through`], from any configuration.
fn train_from(folder: &Path, config: &str, output: &str, moments: &[Moment]) -> (PathBuf, usize) {
    let place = folder.join(output);
    let next = || match run_below(&place) {
        Some(run) => command(folder, &["train", "--resume", run.to_str().unwrap()]),
        None => command(folder, &["train", config, "--set", &format!("io.output_dir={output}")]),
    };
    let mut kills = 0;
    for moment in moments {
        let child = next().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        kills += kill_at(child, &place, *moment) as usize;
    }
    succeed(next());
    (run_below(&place).unwrap(), kills)
}

#[test]
fn killed_at_any_moment_a_run_ends_as_if_it_had_not_been() {
    let folder = workplace();
    let start = Instant::now();
    let (run, _) = train_through(folder.path(), "whole", &[]);
    let length = start.elapsed();
    let want = fate(&run);
    assert!(want.2.len() > 20, "{:?}", want.2);
    let mut kills = 0;
    for i in 0..20u32 {
        let at = |k: u32| Moment::After(length * (1 + (i * 7 + k * 5) % 20) / 21);
        let writing = |n: usize| Moment::Writing(n, Duration::from_micros(u64::from(i) * 150));
        let moments = match i % 4 {
            0 => vec![at(0)],
            1 => vec![at(1), at(2), at(3)],
            2 => vec![writing(i as usize % 5)],
            _ => vec![writing(0), at(4), writing(1)],
        };
        let (run, killed) = train_through(folder.path(), &format!("killed-{i}"), &moments);
        kills += killed;
        let found = fate(&run);

        assert!(found == want, "{moments:?}\n{found:#?}\n{want:#?}");
        let left = checkpoints(&run);
        assert!(left.iter().all(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.')), "{left:?}");
    }
    assert!(kills > 12, "{kills} kills hit");
}

#[test]
fn every_kind_of_beginning_survives_being_killed() {
    let folder = workplace();
    let lstm = "{block_type: lstm, dropout: 0.2}";
    let mamba = "{block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16}";
    let run = RUN.replace(lstm, mamba).replace("26000", "9000");
    let write = |name: &str, more: &str| fs::write(folder.path().join(name), run.clone() + more).unwrap();
    write("run.yaml", "");
    succeed(command(folder.path(), &["train", "run.yaml", "--out", "first"]));
    succeed(command(folder.path(), &["checkpoint", "export", "first", "--pth-names", "--out", "first.pth"]));
    // The weights of a file; weights and moments of a run, from the start of the data; and the run's configuration, which
    // goes on in the data.
    write("pth.yaml", "resume: {checkpoint_file: first.pth, next_epoch_index: 0, next_batch_index: 0}\n");
    write("taken.yaml", "resume: {checkpoint_file: first, next_epoch_index: 0, next_batch_index: 0}\n");
    let (mut fates, mut kills) = (Vec::new(), 0);
    for config in ["pth.yaml", "taken.yaml", "first/config.yaml"] {
        let output = |i: usize| format!("{}-{i}", config.replace('/', "-"));
        let (whole, _) = train_from(folder.path(), config, &output(0), &[]);
        let want = fate(&whole);
        let moments =
            [vec![Moment::Writing(0, Duration::ZERO)], vec![Moment::Writing(1, Duration::from_micros(300)); 2]];
        for (i, moments) in moments.iter().enumerate() {
            let (run, killed) = train_from(folder.path(), config, &output(1 + i), moments);
            kills += killed;
            assert!(fate(&run) == want, "{config}, {moments:?}:\n{:#?}\n{want:#?}", fate(&run));
        }
        fates.push(want);
    }
    assert!(kills > 3, "{kills} kills hit");
    assert!(fates[0] != fates[1] && fates[1] != fates[2], "three beginnings, not one");
}

/// A run that was killed in the middle.
fn killed(folder: &Path) -> PathBuf {
    let child = command(folder, &["train", "run.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(kill_at(child, &folder.join("runs"), Moment::Writing(0, Duration::ZERO)));
    run_below(&folder.join("runs")).unwrap()
}

/// Runs the program where no file may grow above 64 KiB, as on a full disk; the weights are larger.
fn without_space(folder: &Path, args: &str) -> (Option<i32>, String) {
    let program = Command::cargo_bin("mblm").unwrap().get_program().to_str().unwrap().to_string();
    let script = format!("trap '' XFSZ; ulimit -f 64; exec {program} {args}");
    let mut command = Command::new("bash");
    command.current_dir(folder).args(["-c", &script]).env("MBLM_PLUGIN_PATH", folder.join("plugins"));
    let output = command.output().unwrap();
    (output.status.code(), text(&output.stderr))
}

/// A run that ends between its changed `config.yaml` and the first checkpoint that has the change.
#[test]
fn a_change_that_was_not_saved_is_named_by_the_next_resume() {
    let folder = workplace();
    let run = killed(folder.path());
    let change = format!("train --resume {} --force --set train.learning_rate=0.02", run.display());
    let (code, error) = without_space(folder.path(), &change);
    assert!(code == Some(1) && error.contains("File too large"), "{error}");
    let resume = ["train", "--resume", run.to_str().unwrap()];
    let output = command(folder.path(), &resume).output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(
        error.contains("train.learning_rate: 0.01, now 0.02") && error.contains("accept the change with --force"),
        "{error}"
    );
    succeed(command(folder.path(), &[&resume[..], &["--force"]].concat()));
    succeed(command(folder.path(), &resume));
}

#[test]
fn without_space_the_old_checkpoint_stays() {
    let folder = workplace();
    let run = killed(folder.path());
    let limited = |args: &str| without_space(folder.path(), args);
    let (code, error) = limited(&format!("train --resume {}", run.display()));
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("File too large") && error.contains("weights.safetensors"), "{error}");
    let left = checkpoints(&run);
    assert!(left.iter().all(|path| path.join("manifest.json").is_file()), "no temporary stays: {left:?}");
    let (code, error) = limited("train run.yaml --set io.output_dir=elsewhere");
    assert!(code == Some(1) && error.contains("File too large"), "{error}");
    assert_eq!(folder.path().join("elsewhere").read_dir().unwrap().count(), 0, "no run folder stays half made");
    // With space again it goes on.
    succeed(command(folder.path(), &["train", "--resume", run.to_str().unwrap()]));
    assert!(fate(&run) == fate(&train_through(folder.path(), "whole", &[]).0));
}

#[test]
fn asked_to_end_it_saves_and_goes_on_later() {
    let folder = workplace();
    for (signal, output, code) in [("-TERM", "term", 143), ("-INT", "int", 130), ("-HUP", "hup", 129)] {
        let args = ["train", "run.yaml", "--set", &format!("io.output_dir={output}")];
        // On a busy machine a run may be over before the signal comes.
        let ended = loop {
            let child = command(folder.path(), &args).spawn().unwrap();
            while run_below(&folder.path().join(output)).is_none_or(|run| checkpoints(&run).len() < 2) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
            let ended = child.wait_with_output().unwrap();
            if ended.status.code() != Some(0) {
                break ended;
            }
            fs::remove_dir_all(folder.path().join(output)).unwrap();
        };
        let said = text(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{said}");
        assert!(said.contains("interrupted: saved") && said.contains("to continue: "), "{said}");
        let (run, _) = train_through(folder.path(), output, &[]);
        assert!(fate(&run) == fate(&train_through(folder.path(), "whole", &[]).0), "{signal}");
        fs::remove_dir_all(folder.path().join("whole")).unwrap();
    }
}

#[test]
fn a_second_process_and_a_changed_configuration_are_refused() {
    let folder = workplace();
    let run = killed(folder.path());
    let resume = |more: &[&str]| {
        let output = command(folder.path(), &[&["train", "--resume", run.to_str().unwrap()], more].concat()).output();
        let output = output.unwrap();
        (output.status.code(), text(&output.stderr))
    };
    let (code, error) = resume(&["--set", "train.learning_rate=0.02", "--set", "train.batch_size=4"]);
    assert_eq!(code, Some(2), "{error}");
    for change in ["train.batch_size: 8, now 4", "train.learning_rate: 0.01, now 0.02", "--force"] {
        assert!(error.contains(change), "{error}");
    }
    let yaml = fs::read_to_string(run.join("config.yaml")).unwrap();
    fs::write(run.join("config.yaml"), yaml.replace("weight_decay: 0.1", "weight_decay: 0.3")).unwrap();
    let (code, error) = resume(&[]);
    assert!(code == Some(2) && error.contains("train.weight_decay: 0.1, now 0.3"), "{error}");

    let lock = fs::OpenOptions::new().append(true).open(run.join("train.log")).unwrap();
    lock.try_lock().unwrap();
    let (code, error) = resume(&[]);
    assert!(code == Some(2) && error.contains("another process is training in this folder"), "{error}");
    drop(lock);

    let (code, error) = resume(&["--force"]);
    assert!(code == Some(0) && error.contains("the configuration changes:"), "{error}");
    let (code, error) = resume(&[]);
    assert_eq!(code, Some(0), "the accepted configuration is that of the run now: {error}");
}

/// Every entry of a folder: its name, what it holds, and when it was changed.
fn survey(folder: &Path) -> BTreeMap<PathBuf, (Option<Vec<u8>>, SystemTime)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap().map(|entry| entry.unwrap()) {
            let (path, about) = (entry.path(), entry.metadata().unwrap());
            if about.is_dir() {
                folders.push(path.clone());
            }
            found.insert(path.clone(), (fs::read(&path).ok(), about.modified().unwrap()));
        }
        found.insert(folder.clone(), (None, folder.metadata().unwrap().modified().unwrap()));
    }
    found
}

#[test]
fn a_refused_resume_changes_nothing() {
    let folder = workplace();
    let run = killed(folder.path());
    // As a crash leaves it: a checkpoint half written, and one between the two renames of its replacement.
    let newest = checkpoints(&run).into_iter().rfind(|path| path.join("manifest.json").exists()).unwrap();
    let replaced = newest.with_file_name(format!(".replaced-{}", newest.file_name().unwrap().to_str().unwrap()));
    fs::rename(&newest, &replaced).unwrap();
    fs::create_dir_all(newest.with_file_name(".writing-batch-0000000999")).unwrap();
    let before = survey(&run);
    let refuse = |more: &[&str], why: &str| {
        let output = command(folder.path(), &[&["train", "--resume", run.to_str().unwrap()], more].concat()).output();
        let output = output.unwrap();
        let error = text(&output.stderr);
        assert!(!output.status.success() && error.contains(why), "{why}: {error}");
        assert!(survey(&run) == before, "{why}: the folder changed");
    };
    let forced: [(&[&str], &str); 8] = [
        (&["train.learning_rate=5", "train.seed=7"], "train.seed: found 7"),
        (&["params.num_layers=[1, 1]"], "weights"),
        (&["params.hidden_dims=[48, 16]", "params.block={block_type: lstm}"], "a checkpoint of another model"),
        (&["train.batch_size=100000"], "train.target_elements: 26000 elements are 1 batch(es)"),
        (&["io.dataset_dir=nowhere.txt"], "nowhere.txt"),
        (&["io.dataset_dir=run.yaml"], "the data are not those of"),
        (&["train.learning_rat=1"], "learning_rate"),
        (&["params.input_seq_len=100000"], "input_seq_len"),
    ];
    for (changes, why) in forced {
        let sets = changes.iter().flat_map(|change| ["--set", change]);
        refuse(&["--force"].into_iter().chain(sets).collect::<Vec<_>>(), why);
    }
    refuse(&["--set", "train.learning_rate=5"], "accept the change with --force");
    fs::rename(folder.path().join("plugins"), folder.path().join("away")).unwrap();
    refuse(&["--force"], "lstm");
    fs::rename(folder.path().join("away"), folder.path().join("plugins")).unwrap();
    // What was left half done does not keep it from going on, without any change.
    succeed(command(folder.path(), &["train", "--resume", run.to_str().unwrap()]));
    assert!(fate(&run) == fate(&train_through(folder.path(), "whole", &[]).0));
}
