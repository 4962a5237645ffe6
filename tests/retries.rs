//! A run that fails goes on where that is asked for: after errors and panics of data and blocks and after a full disk, but
//! not after a loss that is not finite. It ends as if nothing had happened, bit for bit.
#![cfg(unix)]

mod compiled;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use assert_cmd::cargo::CommandCargoExt;
use candle_core::Tensor;
use mblm::data::Error;
use mblm::data::register_dataset;
use mblm::data::{Dataset, DatasetOptions, Splits};
use mblm::registry::BlockRegistry;
use mblm::train::config::RunConfig;
use mblm::train::session::Session;
use mblm::yaml::Document;
use mblm::{Init, Mode, Param, ParamScope, PosEmb, StageBlock, StageModel};

const RUN: &str = "\
io: {name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 1,
  validate_amount: 6, log_train_loss_amount: 30}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 32, seq_lens: [8, 4], hidden_dims: [16, 16],
  num_layers: [1, 1], block: {block_type: leaky}}
train: {target_elements: 7680, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 2,
  learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 2, shuffle_train: true}
";

/// A folder with a configuration and its data.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..300).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
    fs::write(folder.path().join("data.txt"), text).unwrap();
    fs::write(folder.path().join("run.yaml"), RUN).unwrap();
    folder
}

/// Trains with a plugin; `prelude` is for the shell.
fn train(folder: &Path, plugin: &Path, prelude: &str, more: &str) -> Output {
    let program = Command::cargo_bin("mblm").unwrap().get_program().to_str().unwrap().to_string();
    let script = format!("{prelude} exec {program} train run.yaml --plugin-dir {} {more}", plugin.display());
    Command::new("bash").current_dir(folder).args(["-c", &script]).env("XDG_DATA_HOME", folder).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The folder of the run that was begun.
fn run_of(folder: &Path, output: &Output) -> PathBuf {
    let said = said(output);
    folder.join(said.lines().find_map(|line| line.strip_prefix("run: ")).unwrap_or_else(|| panic!("{said}")))
}

/// What runs that end alike have in common: the last weights, and the losses without their times.
fn fate(run: &Path) -> (Vec<u8>, Vec<String>) {
    let newest = run.join("checkpoints").read_dir().unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let losses = fs::read_to_string(run.join("loss.csv")).unwrap();
    let without_time = |line: &str| line.split(',').enumerate().filter(|(i, _)| *i != 1).map(|(_, c)| c).collect();
    (fs::read(newest.join("weights.safetensors")).unwrap(), losses.lines().map(without_time).collect())
}

#[test]
fn a_plugin_that_fails_once_costs_a_retry_and_nothing_else() {
    let folder = workplace();
    let whole = compiled::compile("tests/plugins/broken.c", folder.path(), "leaky", &[]);
    let want = fate(&run_of(folder.path(), &train(folder.path(), &whole, "", "")));
    assert!(want.1.len() > 30, "{:?}", want.1);
    for (fault, what) in
        [("LATE_ERROR", "forward: the sensor came off"), ("LATE_PANIC", "the sensor fell off (panicked)")]
    {
        let plugin = compiled::broken(folder.path(), fault);
        let output = train(folder.path(), &plugin, "", "--retries 2");
        let (said, run) = (said(&output), run_of(folder.path(), &output));
        let log = fs::read_to_string(run.join("train.log")).unwrap();
        for text in [&said, &log] {
            let line = text.lines().find(|line| line.contains("training failed; retry 1 of 2 in 1 s: "));
            assert!(line.is_some_and(|line| line.contains(what)), "{text}");
            assert!(text.contains("resume: batch ") && !text.contains("retry 2"), "{text}");
        }
        assert!(output.status.success(), "{said}");
        assert!(fate(&run) == want, "{fault}: another end");

        let output = train(folder.path(), &plugin, "", "");
        let said = self::said(&output);
        assert!(output.status.code() == Some(1) && said.contains(what) && !said.contains("retry"), "{said}");
    }
}

#[test]
fn a_loss_that_is_not_finite_is_not_retried() {
    let folder = workplace();
    let block =
        "--set 'params.block={attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true, pos_emb_type: null}'";
    let output =
        train(folder.path(), folder.path(), "", &format!("{block} --retries 3 --set train.learning_rate=1e30"));
    let said = said(&output);
    assert!(output.status.code() == Some(1) && said.contains("before the weights changed"), "{said}");
    assert!(!said.contains("retry"), "{said}");
}

#[test]
fn retries_are_used_up() {
    let folder = workplace();
    let plugin = compiled::compile("tests/plugins/broken.c", folder.path(), "leaky", &[]);
    // The log grows past a limit that the checkpoints keep to; from then on no line of a loss can be written.
    let limit = "trap '' XFSZ; ulimit -f 200;";
    let output = train(
        folder.path(),
        &plugin,
        limit,
        "--retries 1 --set io.log_train_loss_amount=1000 --set train.target_elements=256000",
    );
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.matches("retry 1 of 1").count(), 1, "{said}");
    assert_eq!(said.matches("File too large").count(), 2, "the failure, and that of the retry: {said}");
}

/// What can go wrong in this process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// A sequence cannot be read.
    Read,
    /// Reading a sequence panics.
    ReadPanics,
    /// The data cannot be opened.
    Open,
    /// A block panics in training.
    BlockPanics,
}

/// What will go wrong, one after the other, each after so many times that it did not.
static FAULTS: Mutex<Vec<(Fault, usize)>> = Mutex::new(Vec::new());

/// Whether `fault` is due now.
fn due(fault: Fault) -> bool {
    let mut faults = FAULTS.lock().unwrap();
    match faults.first_mut() {
        Some((next, 0)) if *next == fault => drop(faults.remove(0)),
        Some((next, left)) if *next == fault => {
            *left -= 1;
            return false;
        }
        _ => return false,
    }
    true
}

register_dataset!("flaky", "bytes that cannot be read now and then", open);

fn open(_: &DatasetOptions) -> mblm::data::Result<Splits> {
    if due(Fault::Open) {
        return Err(Error::Config("io.dataset_dir: the disk is gone".into()));
    }
    let split = |seed| Box::new(Flaky(seed)) as Box<dyn Dataset>;
    Ok(Splits { train: split(1), valid: split(2), test: None, about: "made up".into(), fingerprint: "1".into() })
}

struct Flaky(u64);

impl Dataset for Flaky {
    fn num_sequences(&self, _: u64) -> u64 {
        100
    }

    fn sample(&self, _: u64, index: u64, ids: &mut [u32], _: &mut [f32]) -> mblm::data::Result<()> {
        if due(Fault::Read) {
            return Err(Error::Io { path: "sequence".into(), error: io::Error::other("the cable came off") });
        }
        assert!(!due(Fault::ReadPanics), "the cable burns");
        ids.iter_mut().zip(0..).for_each(|(id, at)| *id = ((index * self.0 + at) % 7 + 97) as u32);
        Ok(())
    }
}

/// A gain in plain operations.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Fragile {}

mblm::register_block!(Fragile, name = "fragile", about = "A gain that may panic");

#[typetag::serde(name = "fragile")]
impl StageBlock for Fragile {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, _: usize, params: &mut ParamScope) -> mblm::Result<Box<dyn StageModel>> {
        Ok(Box::new(FragileModel(params.param("gain", &[dim], Init::Normal)?)))
    }
}

struct FragileModel(Arc<Param>);

impl StageModel for FragileModel {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> mblm::Result<Tensor> {
        assert!(mode == Mode::Eval || !due(Fault::BlockPanics), "the block is {}", "worn out");
        Ok(x.broadcast_mul(&self.0.tensor(mode))?)
    }
}

#[test]
fn data_and_blocks_of_this_process_may_fail_and_panic() {
    let folder = workplace();
    let mut document = Document::read(folder.path().join("run.yaml")).unwrap();
    let output = folder.path().join("runs").display().to_string();
    let set = ["params.block={block_type: fragile}", "io.dataset_id=flaky", &format!("io.output_dir={output}")];
    set.iter().for_each(|assignment| document.set(assignment).unwrap());
    let config = RunConfig::from_document(&document, &BlockRegistry::builtin().unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let train = |retries, faults: &[(Fault, usize)]| {
        *FAULTS.lock().unwrap() = faults.to_vec();
        Session { retries, ..Session::new(&config, &stop).unwrap() }.train()
    };
    let want = fate(&train(0, &[]).unwrap().0);
    // Batches of 8 sequences, and two stages run in a training pass.
    let cases = [
        ((Fault::Read, 100), (Fault::Open, 0), ["sequence: the cable came off", "io.dataset_dir: the disk is gone"]),
        (
            (Fault::ReadPanics, 60),
            (Fault::BlockPanics, 11),
            ["training panicked: the cable burns", "training panicked: the block is worn out"],
        ),
    ];
    for (first, second, [one, two]) in cases {
        let (run, _) = train(2, &[first, second]).unwrap();
        assert!(fate(&run) == want, "{first:?}, {second:?}");
        let log = fs::read_to_string(run.join("train.log")).unwrap();
        for line in ["training failed; retry 1 of 2 in 1 s: ONE", "training failed; retry 2 of 2 in 2 s: TWO"] {
            let line = line.replace("ONE", one).replace("TWO", two);
            assert!(log.contains(&line), "{line}\n{log}");
        }
    }
    let error = train(0, &[(Fault::BlockPanics, 11)]).unwrap_err().to_string();
    assert_eq!(error, "training panicked: the block is worn out");
    assert!(train(9, &[(Fault::Open, 0)]).unwrap_err().is_configuration(), "before the start it is no failure");
    // Whoever asks for the end while a run rests gets it.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(700));
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(train(9, &[(Fault::Read, 100)]).unwrap_err().to_string(), "sequence: the cable came off");
    });
}
