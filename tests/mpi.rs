//! Several real processes, started by `mpirun`: they train as one that accumulates the same batches, and no run is lost.
//! What does not depend on MPI is tested without it, in `mblm-train`.
#![cfg(target_os = "linux")]

mod compiled;
mod programs;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use programs::{succeed, text};
use safetensors::SafeTensors;

/// Dropout, recomputed chunks, a block from a plugin, padding: 0 is a byte of the data that does not count.
const RUN: &str = "\
io: {name_model: toy, output_dir: runs, dataset_dir: data.bin, dataset_id: bytes, num_models_to_save: 1,
  dataset_args: {validation_fraction: 0.5}, validate_amount: 4, log_train_loss_amount: 100000}
params:
  num_tokens: 256
  pad_token_id: 0
  input_seq_len: 64
  seq_lens: [16, 4]
  hidden_dims: [48, 32]
  num_layers: [1, 1]
  train_checkpoint_chunks: [3]
  block:
    - {block_type: lstm, dropout: 0.2}
    - {attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, attn_dropout: 0.1, ff_dropout: 0.1,
      pos_emb_type: fixed}
train: {target_elements: 1, target_elements_strategy: sequence, batch_size: 4, max_eval_steps: 5, learning_rate: 0.01,
  gradient_clipping: 1.0, gradient_accumulate_every: 2, weight_decay: 0.1}
";

/// Bytes of a batch, batches of a step, steps.
const BATCH: usize = 4 * 64;
const ACCUMULATE: usize = 2;
const STEPS: usize = 20;

/// How long anything may take that should end at once.
const SOON: Duration = Duration::from_secs(60);

/// Text with runs of zeros, so that batches count differently.
fn bytes(len: usize) -> Vec<u8> {
    let line = |i: usize| match i % 7 {
        0 => vec![0; 40],
        _ => format!("line {i} of {}\n", i * i % 97).into_bytes(),
    };
    (0..).flat_map(line).take(len).collect()
}

/// A folder with a configuration, data to train on and as much again to validate, and a plugin.
fn workplace(data: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("data.bin"), [data, &bytes(data.len())].concat()).unwrap();
    fs::write(folder.path().join("run.yaml"), RUN).unwrap();
    fs::create_dir(folder.path().join("plugins")).unwrap();
    fs::copy(compiled::lstm(), folder.path().join("plugins/liblstm.so")).unwrap();
    folder
}

/// `mblm` by itself, or on several processes, of one thread each.
fn mblm(folder: &Path, processes: usize, args: &[&str]) -> Command {
    let program = env!("CARGO_BIN_EXE_mblm");
    let mut command = Command::new(if processes == 1 { program } else { "mpirun" });
    if processes > 1 {
        command.args(["-n", &processes.to_string(), program]);
        // More processes than cores, also as root: what Open MPI asks for; other launchers do not mind.
        command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("OMPI_MCA_btl_base_warn_component_unused", "0");
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    }
    command.args(args).current_dir(folder).env("MBLM_PLUGIN_PATH", folder.join("plugins"));
    command.env("RAYON_NUM_THREADS", "1");
    programs::piped(command)
}

/// Ends within [`SOON`].
fn end(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > SOON {
            child.kill().unwrap();
            panic!("still there: {}", text(&child.wait_with_output().unwrap().stderr));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn target(processes: usize) -> String {
    format!("train.target_elements={}", BATCH * ACCUMULATE * STEPS * processes)
}

/// That of 3 processes that pass over their data several times, so that there is time to interrupt them.
fn long_target() -> String {
    format!("train.target_elements={}", 5 * BATCH * ACCUMULATE * STEPS * 3)
}

fn train(folder: &Path, processes: usize, out: &str, set: &[&str]) -> PathBuf {
    let target = target(processes);
    let sets = set.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["train", "run.yaml", "-q", "--out", out, "--set", &target].into_iter().chain(sets).collect();
    succeed(mblm(folder, processes, &args));
    folder.join(out)
}

fn newest(run: &Path) -> PathBuf {
    fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap()
}

fn weights(run: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = fs::read(newest(run).join("weights.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let values = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    tensors.tensors().into_iter().map(|(name, tensor)| (name, values(tensor.data()))).collect()
}

/// Numbers by kind, process and batch.
type Rows<T> = BTreeMap<(String, usize, usize), T>;

/// The losses.
fn losses(run: &Path) -> Rows<f64> {
    let text = fs::read_to_string(run.join("loss.csv")).unwrap();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        ((cells[3].into(), cells[0].parse().unwrap(), cells[6].parse().unwrap()), cells[7].parse().unwrap())
    };
    text.lines().skip(1).map(row).collect()
}

/// What two runs that went the same way have in common.
fn fate(run: &Path) -> (BTreeMap<String, Vec<u32>>, Rows<u64>) {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    let weights = weights(run).into_iter().map(|(name, values)| (name, bits(values))).collect();
    (weights, losses(run).into_iter().map(|(place, loss)| (place, loss.to_bits())).collect())
}

#[test]
fn several_processes_are_one_that_accumulates_their_batches() {
    [2, 3].into_iter().for_each(|processes| equals_one(processes, BATCH, bytes, "params.patching=fixed"));
}

/// Sequences of 16 patches have 52 bytes each here: words with patches of 2, 3, 4 and 4 bytes.
#[test]
fn patches_that_follow_the_content_are_shared_too() {
    let words = |len: usize| {
        let letter = |(i, kind): (usize, u8)| if kind == b'x' { b'a' + (i * i % 23) as u8 } else { kind };
        b"x xx xxx xxx ".iter().copied().cycle().take(len).enumerate().map(letter).collect()
    };
    equals_one(2, 4 * 52, words, "params.patching=spacelike");
}

/// `batch` bytes make a batch of data that `bytes` makes.
fn equals_one(processes: usize, batch: usize, bytes: impl Fn(usize) -> Vec<u8>, patching: &str) {
    let (rounds, long) = (ACCUMULATE * STEPS, batch);
    let shares = bytes(long * rounds * processes);
    let folder = workplace(&shares);
    let write = |data: &[u8]| fs::write(folder.path().join("data.bin"), [data, &bytes(data.len())].concat()).unwrap();
    write(&shares);
    let ranks: Vec<String> = (0..processes).map(|rank| rank.to_string()).collect();
    let logged = format!("io.enabled_loss_log_for_gpus=[{}]", ranks.join(","));
    let target = format!("train.target_elements={}", shares.len());
    let set = [logged.as_str(), patching, &target];
    let several = train(folder.path(), processes, "several", &set);
    assert_eq!(fate(&several), fate(&train(folder.path(), processes, "again", &set)), "the same bits");

    // Round by round, the batches of all shares.
    let batch = |at: usize| &shares[(at % processes * rounds + at / processes) * long..][..long];
    let in_turn: Vec<u8> = (0..processes * rounds).flat_map(batch).copied().collect();
    write(&in_turn);
    let accumulate = format!("train.gradient_accumulate_every={}", ACCUMULATE * processes);
    let one = train(folder.path(), 1, "one", &[&accumulate, patching, &target]);

    let (found, want) = (losses(&several), losses(&one));
    for at in 0..processes * rounds {
        let found = found[&("train".into(), at % processes, at / processes)];
        let want = want[&("train".into(), 0, at)];
        assert!((found - want).abs() <= 1e-5 * want, "batch {at}: {found}, want {want}");
    }
    let last = |losses: &Rows<f64>| *losses.iter().rfind(|(place, _)| place.0 == "valid").unwrap().1;
    let (got, expected) = (last(&found), last(&want));
    assert!((got - expected).abs() <= 1e-5 * expected, "{got}, expected {expected}");
    let (found, want) = (weights(&several), weights(&one));
    assert!(found.len() > 10 && found.keys().eq(want.keys()));
    for (name, want) in want {
        let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        let off = found[&name].iter().zip(&want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off <= 1e-4 * largest, "{name} is off by {off} of {largest}");
    }
}

/// Starts a run of 3 processes that goes on for long enough to be killed.
fn begin(folder: &Path, out: &str) -> Child {
    let args = ["train", "run.yaml", "-q", "--out", out, "--set", &long_target()];
    mblm(folder, 3, &args).spawn().expect("mpirun is installed")
}

/// Waits until a run has trained a few batches.
fn wait_for_batches(run: &Path, batches: usize) {
    let started = Instant::now();
    let rows = || fs::read_to_string(run.join("loss.csv")).map_or(0, |text| text.lines().count());
    while rows() < batches {
        assert!(started.elapsed() < SOON, "no batch in {}", run.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The process of a run with this rank.
fn process(run: &str, rank: usize) -> i32 {
    let is_it = |pid: &i32| {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let has = |bytes: Vec<u8>, part: &str| bytes.split(|byte| *byte == 0).any(|found| found == part.as_bytes());
        let rank = [format!("OMPI_COMM_WORLD_RANK={rank}"), format!("PMI_RANK={rank}")];
        has(read("cmdline"), run) && rank.iter().any(|rank| has(read("environ"), rank))
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.into_iter().find(is_it).unwrap_or_else(|| panic!("no process {rank} of {run}"))
}

#[test]
fn a_process_that_is_killed_costs_nothing() {
    let folder = workplace(&bytes(BATCH * ACCUMULATE * STEPS * 3));
    let straight = fate(&train(folder.path(), 3, "straight", &[&long_target()]));
    for (rank, batches) in [(1, 3), (0, 53), (2, 104)] {
        let out = format!("killed-{rank}");
        let child = begin(folder.path(), &out);
        wait_for_batches(&folder.path().join(&out), batches);
        let pid = process(&out, rank);
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
        let output = end(child);
        let said = text(&[output.stdout, output.stderr].concat());
        // Open MPI names the one that died by its rank, MPICH by its process number.
        let is_named = said.contains(&format!("rank {rank}")) || said.contains(&format!("PID {pid}"));
        assert!(!output.status.success() && is_named, "{said}");
        let run = folder.path().join(&out);
        succeed(mblm(folder.path(), 1, &["checkpoint", "verify", &out]));
        succeed(mblm(folder.path(), 3, &["train", "--resume", &out, "-q"]));
        assert_eq!(fate(&run), straight, "process {rank} was killed after batch {batches}");
    }
}

#[test]
fn a_launcher_that_is_told_to_end_leaves_a_run_that_goes_on() {
    let folder = workplace(&bytes(BATCH * ACCUMULATE * STEPS * 3));
    let straight = fate(&train(folder.path(), 3, "straight", &[&long_target()]));
    let child = begin(folder.path(), "ended");
    let run = folder.path().join("ended");
    wait_for_batches(&run, 7);
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let output = end(child);
    assert!(!output.status.success(), "{}", text(&output.stderr));
    // The launcher gave time for a batch and a checkpoint: it stands at the end of a gradient step.
    let state: serde_json::Value = serde_json::from_slice(&fs::read(newest(&run).join("state.json")).unwrap()).unwrap();
    let (batches, waiting) = (state["batches"].as_u64().unwrap(), state["accumulated"].as_u64().unwrap());
    assert!(batches >= 6 && waiting == 0, "{state}");
    succeed(mblm(folder.path(), 3, &["train", "--resume", "ended", "-q"]));
    assert_eq!(fate(&run), straight);
}

#[test]
fn what_does_not_fit_all_is_said_once_and_nothing_is_written() {
    let folder = workplace(&bytes(5 * 64));
    let refused = |args: &[&str]| {
        let output = mblm(folder.path(), 3, args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let said = refused(&["train", "run.yaml", "--set", "train.target_elements=10000", "--set", "train.batch_size=2"]);
    let want = "5 sequence(s) of 64 bytes (input_seq_len), 1 for each of 3 processes";
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    assert!(said.contains(want) && said.contains("run.yaml: train.batch_size"), "{said}");
    let said = refused(&["train", "run.yaml", "--set", "train.learning_rate=fast"]);
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    assert!(!folder.path().join("runs").exists());
    // One sequence for each.
    let five = ["train", "run.yaml", "-q", "--out", "five", "--set", "train.batch_size=1"];
    succeed(mblm(folder.path(), 3, &[&five[..], &["--set", "train.target_elements=2000"]].concat()));
    let said = refused(&["compare", "study.yaml"]);
    assert!(said.contains("each would write the same files"), "{said}");
}

#[test]
fn evaluation_is_shared_and_exact() {
    let folder = workplace(&bytes(BATCH * ACCUMULATE * STEPS * 2));
    train(folder.path(), 2, "run", &["train.max_eval_steps=null"]);
    let args = ["eval", "run", "data.bin", "--json"];
    let alone = succeed(mblm(folder.path(), 1, &args)).stdout;
    assert_eq!(text(&succeed(mblm(folder.path(), 3, &args)).stdout), text(&alone));
    let parts = ["eval", "run", "data.bin", "--files", "--positions"];
    let alone = succeed(mblm(folder.path(), 1, &parts)).stdout;
    assert_eq!(text(&succeed(mblm(folder.path(), 2, &parts)).stdout), text(&alone));
}

/// Whatever one process finds otherwise than the first, it says, and none goes on.
#[test]
fn a_process_that_has_other_files_is_heard() {
    let folder = workplace(&bytes(BATCH * ACCUMULATE * STEPS * 3));
    train(folder.path(), 1, "run", &[]);
    let script = "cd view${OMPI_COMM_WORLD_RANK}${PMI_RANK} && exec \"$0\" \"$@\"";
    let copy = |from: &str, to: String| {
        let copied = Command::new("cp").args(["-r", from, &to]).current_dir(folder.path()).status().unwrap();
        assert!(copied.success());
    };
    for rank in 0..3 {
        fs::create_dir(folder.path().join(format!("view{rank}"))).unwrap();
        ["run.yaml", "data.bin", "run"].iter().for_each(|file| copy(file, format!("view{rank}/{file}")));
    }
    let view1 = folder.path().join("view1");
    let refused = |args: &[&str], code: i32, want: &str| {
        let program = env!("CARGO_BIN_EXE_mblm");
        let mut command = mblm(folder.path(), 3, &[]);
        let mut words = vec!["-n", "3", "sh", "-c", script, program];
        words.extend(args);
        // The same environment, with another command line.
        let environment: Vec<_> =
            command.get_envs().map(|(name, value)| (name.to_owned(), value.unwrap().to_owned())).collect();
        command = Command::new("mpirun");
        let output = command.args(words).current_dir(folder.path()).envs(environment).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert_eq!(said.matches("error: ").count(), 1, "{args:?}: {said}");
        assert!(said.contains(&format!("process 1: error: {want}")), "{args:?}: {said}");
    };
    let target = target(3);
    let train = ["train", "run.yaml", "-q", "--out", "new", "--set", &target];
    fs::write(view1.join("run.yaml"), RUN.replace("learning_rate: 0.01", "learning_rate: 0.02")).unwrap();
    refused(&train, 2, "not the same configuration as in process 0");
    fs::remove_file(view1.join("run.yaml")).unwrap();
    refused(&train, 2, "run.yaml: no such file");
    assert!(!folder.path().join("view0/new").exists());
    fs::write(view1.join("data.bin"), bytes(5000)).unwrap();
    refused(&["eval", "run", "data.bin"], 2, "not the same data as in process 0");
}

/// Started without a launcher that MPI knows, the copies must not each train the run.
#[test]
fn copies_that_mpi_does_not_join_are_refused() {
    let folder = workplace(&bytes(BATCH * ACCUMULATE * STEPS));
    let mut command = mblm(folder.path(), 1, &["train", "run.yaml", "--set", &target(1)]);
    let output = command.env("SLURM_STEP_NUM_TASKS", "4").output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("srun has started 4 copies") && said.contains("--mpi=pmix"), "{said}");
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn processes_share_the_cores() {
    let folder = workplace(&bytes(BATCH * ACCUMULATE * STEPS * 2));
    let cores = std::thread::available_parallelism().unwrap().get();
    let mut command = mblm(folder.path(), 2, &["train", "run.yaml", "--out", "run", "--set", &target(2)]);
    let output = command.env_remove("RAYON_NUM_THREADS").output().unwrap();
    let log = fs::read_to_string(folder.path().join("run/train.log")).unwrap();
    let threads = log.split("threads: ").nth(1).unwrap().split(' ').next().unwrap();
    // Bound to a core each, or to none.
    let threads: usize = threads.parse().unwrap();
    assert!(threads >= 1 && 2 * threads <= cores.max(2), "{threads} threads each on {cores} cores: {log}");
    assert!(log.contains("2 processes, each with its share of the data"), "{log}");
    let shown = text(&output.stderr);
    assert_eq!(shown.matches("finished: saved").count(), 1, "one process speaks: {shown}");
}
