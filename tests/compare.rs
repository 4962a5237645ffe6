//! Studies as a user meets them: variants under one budget, runs that fail, a study that is killed, and the reports.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::cargo::CommandCargoExt;
use serde_json::Value;

mod compiled;
#[path = "compare/launcher.rs"]
mod launcher;
#[path = "compare/tuning.rs"]
mod tuning;

const BASE: &str = "
io: {name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 1,
  validate_amount: 4, log_train_loss_amount: 10}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 64, hidden_dims: [32, 32], num_layers: [2, 1],
  seq_lens: [16, 4], block: [{block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16},
  {block_type: transformer, attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}]}
train: {target_elements: 1, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 3, learning_rate: 0.01,
  gradient_clipping: 1.0, gradient_accumulate_every: 1, shuffle_train: true}
";

const TRANSFORMER: &str =
    "{block_type: transformer, attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}";

/// A folder with a base, data and this study.
fn workplace(study: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..3000).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
    fs::write(folder.path().join("data.txt"), text).unwrap();
    fs::write(folder.path().join("base.yaml"), BASE).unwrap();
    fs::write(folder.path().join("study.yaml"), study).unwrap();
    folder
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.current_dir(folder).args(args).env("XDG_DATA_HOME", folder.join("none")).env_remove("MBLM_PLUGIN_PATH");
    command
}

/// Exit code, standard output and error.
fn mblm(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = command(folder, args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_str(&read(path)).unwrap()
}

/// The lines of a run's metrics.
fn metrics(run: &Path) -> Vec<Value> {
    read(run.join("metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The columns of `results.csv` by name, a map per line.
fn csv(path: impl AsRef<Path>) -> Vec<BTreeMap<String, String>> {
    let text = read(path);
    let mut lines = text.lines().map(|line| line.split(',').map(String::from).collect::<Vec<_>>());
    let header = lines.next().unwrap();
    lines.map(|cells| header.iter().cloned().zip(cells).collect()).collect()
}

/// One variant trains at a rate at which its weights overflow.
const STUDY: &str = "
base: base.yaml
description: Which is <best>?
variants:
  - name: as it is
  - name: Two transformers
    set: {'params.block[0]': TRANSFORMER}
  - name: hopeless
    set: {train.learning_rate: 1e37, train.gradient_clipping: null, train.warmup_steps_perc: 0}
seeds: [1, 2]
budget: {bytes: 20_000}
prompt: 'line 4'
output_dir: out
";

#[test]
fn the_others_finish_when_a_variant_fails_and_the_report_says_what_their_files_say() {
    let folder = workplace(&STUDY.replace("TRANSFORMER", TRANSFORMER));
    let (code, plan, error) = mblm(folder.path(), &["compare", "study.yaml", "--dry-run"]);
    assert!(code == 0 && plan.contains("3 variants x 2 seeds = 6 runs, 20.0 kB each"), "{plan}{error}");
    assert!(!folder.path().join("out").exists(), "a dry run writes nothing");

    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml", "--jobs", "2"]);
    assert!(code == 1 && error.contains("2 of 6 runs failed"), "{error}");
    assert_eq!(
        error.lines().filter(|line| line.contains("failed: training stopped at gradient step")).count(),
        2,
        "{error}"
    );
    assert!(out.contains("-  hopeless") && out.contains("hopeless-seed2 failed: training stopped"), "{out}");
    let study = folder.path().join("out");
    for run in ["as-it-is-seed1", "as-it-is-seed2", "two-transformers-seed1", "two-transformers-seed2"] {
        let run = study.join("runs").join(run);
        let lines = metrics(&run);
        let of_kind = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).cloned().collect::<Vec<_>>();
        let last = of_kind("valid").pop().unwrap();
        assert_eq!(last["bytes_seen"], 20_480, "whole batches of 512 bytes");
        let best = of_kind("valid").iter().map(|line| line["bpb"].as_f64().unwrap()).fold(f64::MAX, f64::min);
        let name = run.file_name().unwrap().to_str().unwrap().to_string();
        let row = csv(study.join("results.csv")).into_iter().find(|row| row["run"] == name).unwrap();
        assert_eq!((row["valid_bpb"].parse::<f64>().unwrap(), &row["bytes"][..]), (best, "20480.0"));
        let result = json(run.join("result.json"));
        let rate = result["measured"]["generation"]["bytes_per_second"].as_f64().unwrap();
        assert_eq!(row["generation_bytes_per_second"].parse::<f64>().unwrap(), rate);
        assert_eq!(result["measured"]["generation"]["prompt"], "line 4");
        let passage = &result["measured"]["passage"];
        let (bytes, bits) = (passage["bytes"].as_str().unwrap(), passage["bits"].as_array().unwrap());
        assert!(bytes.len() == 2 * bits.len() && !bits.is_empty(), "{passage}");
        assert!(cfg!(not(target_os = "linux")) || row["peak_memory_bytes"].parse::<f64>().unwrap() > 1e6, "{row:?}");
    }
    let results = json(study.join("results.json"));
    let variants = results["variants"].as_array().unwrap();
    assert_eq!(variants.len(), 3);
    for variant in &variants[..2] {
        let bpb = |run: &Value| run["summary"]["valid_bpb"].as_f64().unwrap();
        let runs = variant["runs"].as_array().unwrap();
        assert_eq!(variant["valid_bpb"]["mean"].as_f64().unwrap(), (bpb(&runs[0]) + bpb(&runs[1])) / 2.0);
    }
    let change = "params.block[0]: {block_type: mamba2, ";
    let transformers = variants.iter().find(|variant| variant["name"] == "Two transformers").unwrap();
    assert!(transformers["differences"][0].as_str().unwrap().starts_with(change), "{transformers}");
    assert_eq!((&variants[2]["name"], &variants[2]["valid_bpb"]), (&"hopeless".into(), &Value::Null));

    let page = read(study.join("report.html"));
    assert!(!page.contains("http") && !page.contains("src="), "nothing from outside");
    assert!(
        page.contains("2 runs failed") && page.contains("hopeless-seed1") && page.contains("Which is &lt;best&gt;?")
    );
    assert!(read(study.join("report.md")).contains("![bits per byte of every variant](ranking.svg)"));
    for chart in ["ranking", "curves-valid-flops", "quality-training", "gradients-stage2"] {
        let svg = read(study.join(format!("{chart}.svg")));
        assert!(svg.starts_with("<svg xmlns=") && svg.trim_end().ends_with("</svg>"), "{chart}");
    }

    // Once more: nothing is done again, and failures are tried again only when asked.
    let before = read(study.join("runs/as-it-is-seed1/metrics.jsonl"));
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert!(code == 1 && error.matches("(done before)").count() == 4, "{error}");
    assert_eq!(error.matches("failed before").count(), 2, "{error}");
    assert_eq!(read(study.join("runs/as-it-is-seed1/metrics.jsonl")), before);
    let (_, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--retry-failed"]);
    assert_eq!(error.matches("failed: training stopped").count(), 2, "{error}");

    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--set", "train.batch_size=4"]);
    assert!(
        code == 2
            && error.contains("as-it-is-seed1 was trained with another configuration: ")
            && error.contains(", train.batch_size: 8, now 4\n"),
        "{error}"
    );
}

/// Two variants of one seed, each of which takes a second or so.
const SLOW: &str = "base: base.yaml\nseeds: [1]\nbudget: {bytes: 200_000}\noutput_dir: out\n\
                    grid: {'params.num_layers[0]': [2, 1]}\n";
const SLOW_RUNS: [&str; 2] = ["num_layers-0-2-seed1", "num_layers-0-1-seed1"];

/// Starts the study and returns when its first run has logged a few losses.
fn begin(folder: &Path) -> std::process::Child {
    begin_until(folder, SLOW_RUNS[0])
}

/// Starts the study and returns when this run has logged a few losses.
fn begin_until(folder: &Path, run: &str) -> std::process::Child {
    let quiet = Stdio::null;
    let child = command(folder, &["compare", "study.yaml"]).stdout(quiet()).stderr(quiet()).spawn().unwrap();
    wait_for_losses(folder, &[run]);
    child
}

/// Waits until one of these runs has logged a few losses.
fn wait_for_losses(folder: &Path, runs: &[&str]) {
    let lines = |run: &&str| {
        let metrics = folder.join("out/runs").join(run).join("metrics.jsonl");
        fs::read_to_string(metrics).map_or(0, |text| text.lines().count())
    };
    let start = Instant::now();
    while !runs.iter().any(|run| lines(run) >= 4) {
        assert!(start.elapsed() < Duration::from_secs(60), "the study did not begin");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The losses of a run in the study's folder.
fn losses(folder: &Path, run: &str) -> Vec<Value> {
    metrics(&folder.join("out/runs").join(run)).into_iter().map(|line| line["loss"].clone()).collect()
}

#[cfg(target_os = "linux")]
#[test]
fn killed_or_its_processes_killed_a_study_goes_on_where_it_was() {
    let whole = workplace(SLOW);
    assert_eq!(mblm(whole.path(), &["compare", "study.yaml"]).0, 0);

    let folder = workplace(SLOW);
    let mut study = begin(folder.path());
    study.kill().unwrap();
    study.wait().unwrap();
    let run = folder.path().join("out/runs").join(SLOW_RUNS[0]);
    assert!(!run.join("result.json").exists(), "killed too late");
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert_eq!(code, 0, "{out}{error}");
    let log = read(run.join("train.log"));
    assert!(log.contains("interrupted: saved") && log.contains("resume: batch"), "its process ended by itself:\n{log}");
    for name in SLOW_RUNS {
        assert_eq!(losses(folder.path(), name), losses(whole.path(), name), "{name} is as if nothing had happened");
    }

    // A process that the system ends, as it does when memory runs out, is one run that failed.
    let folder = workplace(SLOW);
    let mut study = begin(folder.path());
    kill_training(folder.path());
    assert_eq!(study.wait().unwrap().code(), Some(1));
    let failed = read(folder.path().join("out/failed").join(format!("{}.txt", SLOW_RUNS[0])));
    assert!(failed.contains("ended by signal 9, as the system does when memory runs out"), "{failed}");
    assert_eq!(losses(folder.path(), SLOW_RUNS[1]), losses(whole.path(), SLOW_RUNS[1]), "the other one finished");
    assert!(read(folder.path().join("out/report.html")).contains("1 run failed"));
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--retry-failed"]);
    assert_eq!(code, 0, "{error}");
    assert_eq!(losses(folder.path(), SLOW_RUNS[0]), losses(whole.path(), SLOW_RUNS[0]), "from its last checkpoint");
    assert!(!read(folder.path().join("out/report.html")).contains("1 run failed"));
}

#[test]
fn data_that_change_while_a_study_runs_make_the_next_runs_fail() {
    let folder = workplace(SLOW);
    let (data, text) = (folder.path().join("data.txt"), read(folder.path().join("data.txt")));
    let mut study = begin(folder.path());
    // Appended: a file that is emptied first would take the bytes away from the run that has mapped it.
    let mut appended = fs::OpenOptions::new().append(true).open(&data).unwrap();
    appended.write_all(b"more").unwrap();
    assert_eq!(study.wait().unwrap().code(), Some(1));
    let failed = |run: &str| fs::read_to_string(folder.path().join("out/failed").join(format!("{run}.txt")));
    let why = failed(SLOW_RUNS[1]).unwrap();
    let want = "the data are not those that the study started with: resized: data.txt (";
    assert!(why.contains(want) && failed(SLOW_RUNS[0]).is_err(), "{why}\n{:?}", failed(SLOW_RUNS[0]));
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--retry-failed"]);
    assert!(code == 2 && error.contains(&format!("{} was trained on other data", SLOW_RUNS[0])), "{error}");
    fs::write(&data, text).unwrap();
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--retry-failed"]);
    assert_eq!(code, 0, "{error}");
}

/// Kills the process that trains the study's first run, which was started in `folder`.
#[cfg(target_os = "linux")]
fn kill_training(folder: &Path) {
    let is_it = |process: &Path| {
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments);
        let here = process.join("cwd").read_link().is_ok_and(|cwd| cwd == folder.canonicalize().unwrap());
        here && arguments.split('\0').any(|word| word == "train") && arguments.contains(SLOW_RUNS[0])
    };
    let mut processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let process = processes.find(|process| is_it(process)).expect("a process that trains");
    let id = process.file_name().unwrap();
    assert!(Command::new("kill").arg("-9").arg(id).status().unwrap().success());
}

/// A study of one run whose local stage is the plugin of the tests.
const OF_A_PLUGIN: &str = "base: base.yaml\nbudget: {bytes: 20000}\nseeds: [1]\noutput_dir: out\n";
const BLOCKS: &str =
    "params.block=[{attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true}, {block_type: leaky}]";

#[test]
fn a_plugin_that_ends_the_process_is_a_run_that_failed() {
    let cases = [
        ("LATE_EXIT", "forward called exit"),
        ("LATE_UNDERSCORE_EXIT", "forward called _exit"),
        ("LATE_SEGV", "forward crashed: SIGSEGV"),
    ];
    for (fault, want) in cases {
        let folder = workplace(OF_A_PLUGIN);
        let plugin = compiled::broken(folder.path(), fault);
        let args = ["compare", "study.yaml", "--set", BLOCKS, "--plugin-dir", plugin.to_str().unwrap()];
        // The second start finds the failure of the first.
        for _ in 0..2 {
            let (code, out, error) = mblm(folder.path(), &args);
            assert!(code == 1 && error.contains("1 of 1 runs failed"), "{fault}: {out}{error}");
            let failed = folder.path().join("out/failed").read_dir().unwrap().next().unwrap().unwrap().path();
            assert!(read(&failed).contains(want), "{fault}: {}", read(&failed));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_that_hangs_in_a_plugin_ends_with_its_study() {
    let folder = workplace(OF_A_PLUGIN);
    let plugin = compiled::broken(folder.path(), "LATE_HANG");
    let args = ["compare", "study.yaml", "--set", BLOCKS, "--plugin-dir", plugin.to_str().unwrap()];
    let hangs = folder.path().join("HANGS");
    let mut study = command(folder.path(), &args);
    let mut study = study.env("MBLM_TEST_MARKER", &hangs).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !hangs.exists() {
        assert!(study.try_wait().unwrap().is_none(), "it ended before the plugin was called");
        std::thread::sleep(Duration::from_millis(10));
    }
    study.kill().unwrap();
    study.wait().unwrap();
    // The lock of the log is held for as long as the process lives.
    let log = folder.path().join("out/logs").read_dir().unwrap().next().unwrap().unwrap().path();
    let (log, start) = (fs::File::open(log).unwrap(), Instant::now());
    while log.try_lock().is_err() {
        assert!(start.elapsed() < Duration::from_secs(60), "it hangs on without its study");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_shipped_study_can_run() {
    let (plugin, root) = (compiled::lstm(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let args = ["compare", "configs/study.yaml", "--dry-run", "--plugin-dir", plugin.to_str().unwrap()];
    let (code, plan, error) = mblm(root, &args);
    assert!(code == 0 && plan.starts_with("global-or-local: 9 variants x 3 seeds = 27 runs"), "{plan}{error}");
    assert_eq!(plan.matches("parameters, ").count(), 9, "each is brought to the base's size: {plan}");
}

#[test]
fn models_are_brought_to_one_size() {
    let study = "base: base.yaml\nbudget: {flops: 4e10, parameters: base, solve: 'hidden_dims[0]', tolerance: 0.1}\noutput_dir: out\n\
                 variants: [{name: base}, {name: deep, set: {'params.num_layers[0]': 6}}]\n";
    let folder = workplace(study);
    let (code, plan, error) = mblm(folder.path(), &["compare", "study.yaml", "--dry-run"]);
    assert_eq!(code, 0, "{error}");
    let deep = plan.lines().find(|line| line.trim_start().starts_with("deep") && line.contains("→")).unwrap();
    assert!(deep.contains("hidden_dims [32, 32] → [") && deep.contains(", 32]: "), "the second stays: {deep}");
    let percent = deep.split("parameters, ").nth(1).unwrap().split('%').next().unwrap();
    assert!(percent.parse::<f64>().unwrap().abs() <= 10.0, "{deep}");
    // As many FLOPs for each: the deeper one takes more per byte and trains on fewer bytes.
    let cells = |name: &str| -> Vec<String> {
        let line = plan.lines().find(|line| line.starts_with(name)).unwrap();
        line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(String::from).collect()
    };
    let number = |cell: &str| -> f64 {
        let (digits, prefix) = cell.split_once(' ').unwrap_or((cell, ""));
        digits.parse::<f64>().unwrap() * if prefix == "M" { 1e6 } else { 1e3 }
    };
    for name in ["base ", "deep "] {
        let cells = cells(name);
        let flops = number(&cells[5]) * number(&cells[6]) * 3.0;
        assert!((flops / 4e10 - 1.0).abs() < 0.05, "{flops} from {cells:?}");
    }
}

#[test]
fn what_cannot_be_is_said_before_anything_runs() {
    let study = |budget: &str, variants: &str| {
        format!("base: base.yaml\nbudget: {budget}\noutput_dir: out\nvariants: {variants}\n")
    };
    let one = "[{name: a}]";
    let cases = [
        (
            study("{bytes: 10_000, parameters: 2_000, solve: num_layers}", one),
            vec![
                "variant \"a\": budget.parameters: num_layers of [2, 1] cannot be changed to give 2.00 k parameters: [1, 1] comes closest",
            ],
        ),
        (
            study("{bytes: 700}", one),
            vec!["budget: 700 B of training cannot be matched with whole batches of 8 x 64 bytes: 1.02 kB"],
        ),
        (
            study("{seconds: -1}", one),
            vec!["study.yaml: budget.seconds: expected a positive number, found -1 (line 2)"],
        ),
        (
            study(
                "{bytes: 10_000}",
                "\n  - name: a\n    set: {'params.block[0]': {block_type: mambo}}\n  - name: b\n    set: {train.batch_size: 9999}\n  - name: c",
            ),
            vec![
                "2 of 3 variants cannot be trained:\n  variant \"a\": base.yaml: params.block[0].block_type: unknown block type \"mambo\"",
                "(study.yaml line 6)",
                "variant \"b\": base.yaml: train.batch_size: found 9999, but the training data are",
            ],
        ),
        (
            study("{bytes: 10_000}", "[{name: a, set: {train.max_seconds: 5}}]"),
            vec!["train.max_seconds: would end runs before"],
        ),
        (
            study("{bytes: 10_000}", one) + "sets: {}\n",
            vec!["study.yaml: sets: unknown field; did you mean `set`? (line 5)"],
        ),
    ];
    for (text, wants) in cases {
        let folder = workplace(&text);
        let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml"]);
        assert_eq!((code, &out[..]), (2, ""), "{error}");
        for want in wants {
            assert!(error.contains(want), "{error}\n{want}");
        }
        assert!(!folder.path().join("out").exists(), "nothing is written");
    }
}

#[test]
fn rules_that_would_not_be_ranked_together_are_noticed() {
    let study = "base: base.yaml\ngrid: {params.patching: {fixed: fixed, words: spacelike}}\nseeds: [1]\n\
                 budget: {bytes: 20000}\noutput_dir: out\n";
    let folder = workplace(study);
    let dry = |more: &[&str]| mblm(folder.path(), &[&["compare", "study.yaml", "--dry-run"], more].concat());
    let (code, _, error) = dry(&[]);
    assert!(code == 0 && error.contains("variants with different patching will not be ranked together"), "{error}");
    let (code, _, error) = dry(&["--set", "train.max_eval_steps=null"]);
    assert!(code == 0 && !error.contains("ranked together"), "{error}");
}

#[test]
fn a_study_and_a_configuration_are_told_apart() {
    let folder = workplace("base: base.yaml\nbudget: {bytes: 512}\n");
    let cases = [
        (&["train", "study.yaml"][..], "study.yaml: this is a study; run it with `mblm compare`"),
        (&["check", "study.yaml"], "study.yaml: this is a study"),
        (&["inspect", "study.yaml"], "study.yaml: this is a study"),
        (
            &["compare", "base.yaml"],
            "base.yaml: this is a training configuration; train it with `mblm train`, or name it",
        ),
    ];
    for (args, want) in cases {
        let (code, _, error) = mblm(folder.path(), args);
        assert!(code == 2 && error.contains(want), "{args:?}: {error}");
    }
}

#[test]
fn a_study_has_a_folder_of_its_own() {
    let folder = workplace("base: base.yaml\nbudget: {bytes: 512}\n");
    let train = ["train", "-q", "base.yaml", "--out", "R", "--set", "train.target_elements=512"];
    assert_eq!(mblm(folder.path(), &train).0, 0);
    for out in ["R", "R/sub", "R/checkpoints/new"] {
        let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--out", out]);
        assert!(code == 2 && error.contains("R is the folder of a run; a study needs one of its own"), "{error}");
    }
    assert!(!folder.path().join("R/sub").exists());
}

#[test]
fn seconds_are_measured_first() {
    let study = "base: base.yaml\nbudget: {seconds: 1.5}\noutput_dir: out\n";
    let folder = workplace(study);
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert_eq!(code, 0, "{error}");
    assert!(error.contains("measuring the speed of base") && out.contains("measured"), "{error}{out}");
    let bytes = json(folder.path().join("out/study.json"))["variants"][0]["bytes"].as_u64().unwrap();
    assert!(bytes >= 512 && bytes.is_multiple_of(512), "{bytes}");
    let last = metrics(&folder.path().join("out/runs/base-seed0")).pop().unwrap();
    assert_eq!(last["bytes_seen"], bytes, "the whole schedule was run");
    assert!(!folder.path().join("out/runs/.calibration").exists());
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert!(code == 0 && !error.contains("measuring"), "measured once: {error}");
}

const CSV: &str = "\
gpu_rank,timestamp,elements_seen,kind,epoch,batch,cum_batch,loss,lr,avg_grad,avg_grad_clipped
0,2024-01-01 10:00:00.5,512,train,0,0,0,5.0,0.1,-1,-1
0,2024-01-01 10:00:30.5,1024,valid,0,1,1,1.3862943611198906,-1,-1,-1
";

#[test]
fn any_runs_can_be_compared_and_others_are_skipped() {
    let folder = workplace("");
    let path = folder.path();
    fs::write(path.join("run.yaml"), BASE.replace("target_elements: 1,", "target_elements: 5000,")).unwrap();
    assert_eq!(mblm(path, &["train", "run.yaml", "--out", "ours"]).0, 0);
    // As the Python package leaves it.
    fs::create_dir(path.join("theirs")).unwrap();
    fs::write(path.join("theirs/loss.csv"), CSV).unwrap();
    let config =
        BASE.replace("num_layers: [2, 1]", "num_layers: [3, 1]").replace("name_model: toy", "name_model: theirs");
    fs::write(path.join("theirs/config.yaml"), config + "summary: {parameter_count: 5}\n").unwrap();
    fs::create_dir(path.join("foreign")).unwrap();
    assert!(Command::new("cp").args(["-r", "ours", "copy"]).current_dir(path).status().unwrap().success());
    let (code, out, error) = mblm(path, &["report", "ours", "theirs", "foreign", "nowhere", "copy", "--out", "page"]);
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("error: 2 of 5 folders could not be read; the report is of the others"), "{error}");
    assert!(error.contains("skipped: copy is a copy of ours (their logs begin with the same line)"), "{error}");
    assert!(
        error.contains("skipped: foreign: expected a run folder") && error.contains("skipped: nowhere: "),
        "{error}"
    );
    assert!(out.contains("1  theirs") && out.contains("2.000") && out.contains("report: page/report.html"), "{out}");
    let rows = csv(path.join("page/results.csv"));
    let theirs = rows.iter().find(|row| row["run"] == "theirs").unwrap();
    assert_eq!(
        (&theirs["valid_bpb"][..], &theirs["seconds"][..], &theirs["peak_memory_bytes"][..]),
        ("2.0", "30.0", "")
    );
    assert!(theirs["parameters"].parse::<f64>().unwrap() > 10_000.0, "its model is built to count: {theirs:?}");
    let page = read(path.join("page/report.html"));
    assert!(page.contains("params.num_layers[0]: 2, now 3") && !page.contains("http"));

    let (code, _, error) = mblm(path, &["report", "foreign", "--out", "other"]);
    assert!(code == 2 && error.contains("none of these folders is a run"), "{error}");
    assert!(!path.join("other").exists());
}
