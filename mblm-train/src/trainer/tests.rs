//! Whole runs of the bigram stand-in.

mod changes;
mod together;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use mblm_base::random::mix;
use mblm_core::Mode;

use super::*;
use crate::bigram::{Bigram, VOCABULARY, config, model};
use crate::checkpoint::{Which, find};
use crate::config::{LossAverage, ModelConfig, OptimizerKind, ResumeSection, TargetStrategy};
use crate::journal::folder::{RunFolder, read_losses};
use crate::model::sequences;
use crate::processes::Solo;
use crate::session::{Session, open_data};

/// A folder with data, in which each byte follows from the one before in three of four cases, and an `output` folder.
fn workplace() -> (tempfile::TempDir, RunConfig) {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    let mut byte = 0;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        state = mix(state);
        byte = if state.is_multiple_of(4) { state >> 8 } else { byte * 3 + 1 } % VOCABULARY as u64;
        byte as u8
    })
    .take(900)
    .collect();
    fs::write(folder.path().join("data.bin"), data).unwrap();
    let mut config = config();
    config.io.dataset_dir = folder.path().join("data.bin").to_str().unwrap().into();
    config.io.dataset_args = Some(serde_json::json!({"validation_fraction": 0.5}));
    config.io.output_dir = folder.path().join("output");
    (folder, config)
}

fn session<'a>(model: &'a Bigram, config: &'a RunConfig, stop: &'a AtomicBool) -> Session<'a> {
    let build = Box::new(move || Ok(Box::new(model) as Box<dyn TrainModel>));
    Session { build, ..Session::new(config, stop).unwrap() }
}

fn train(model: &Bigram, config: &RunConfig, stop: &AtomicBool) -> Result<(PathBuf, Outcome)> {
    session(model, config, stop).train()
}

fn resume(model: &Bigram, run: &Path, config: &RunConfig, stop: &AtomicBool) -> Result<Outcome> {
    session(model, config, stop).resume(&RunFolder::open(run)?)
}

fn never() -> AtomicBool {
    AtomicBool::new(false)
}

/// The rows of `loss.csv` without the times.
fn losses(run: &Path) -> Vec<LossEntry> {
    let entries = read_losses(&run.join("loss.csv")).unwrap();
    entries.into_iter().map(|entry| LossEntry { timestamp: String::new(), ..entry }).collect()
}

fn outputs(config: &RunConfig) -> usize {
    fs::read_dir(&config.io.output_dir).map_or(0, |entries| entries.count())
}

#[test]
fn a_run_learns_and_leaves_what_it_promises() {
    let (_folder, mut config) = workplace();
    config.train.target_elements *= 10;
    let model = Bigram::new();
    let (run, outcome) = train(&model, &config, &never()).unwrap();
    assert_eq!((outcome.end, outcome.state.batches, outcome.state.step), (End::Finished, 200, 67));
    assert_eq!(outcome.state.elements_seen, 200 * 64);
    // 450 training bytes: 7 batches an epoch in the first epochs, 28 sequences; one fewer where the offset costs one.
    assert!(outcome.state.next.epoch >= 28, "{:?}", outcome.state.next);
    let rows = losses(&run);
    let valid: Vec<&LossEntry> = rows.iter().filter(|row| row.kind == "valid").collect();
    assert_eq!(valid.iter().map(|row| row.cum_batch).collect::<Vec<_>>(), [0, 66, 132, 199]);
    assert_eq!(rows.iter().filter(|row| row.kind == "train").count(), 20);
    // Uniform bytes cost ln 8 = 2.08; the source's entropy is 0.97 nats, and the table starts at random.
    assert!(valid[0].loss > 2.0 && valid[3].loss < 1.4, "{valid:?}");
    assert_eq!(outcome.state.valid_loss, Some(valid[3].loss));
    assert_eq!((rows[0].lr, rows[0].avg_grad), (config.train.learning_rate * 0.1, -1.0));
    let last = rows.iter().rfind(|row| row.kind == "train").unwrap();
    assert!(last.avg_grad != -1.0 && last.avg_grad_clipped.abs() <= last.avg_grad.abs());
    let chain = fs::read_to_string(run.join("config.yaml")).unwrap();
    let chained = chain.strip_prefix(&config.to_yaml().unwrap()).unwrap();
    assert!(chained.starts_with("resume:\n  checkpoint_file: checkpoints/batch-0000000"), "{chain}");
    assert!(chained.contains("next_batch_index: "), "{chain}");
    let log = fs::read_to_string(run.join("train.log")).unwrap();
    for part in [
        "byte-unigram entropy",
        "last gradient step is of 2 batch(es)",
        "learning rate schedule: 1.000e-2 at step 0, rises to",
        "model: 72 parameters",
        "ETA",
        "valid loss",
        "finished: saved",
    ] {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
    assert!(fs::read_dir(run.join("checkpoints")).unwrap().count() <= 3);
    let best = find(&run, Which::Best).unwrap().state().unwrap();
    assert_eq!(best.valid_loss, outcome.state.best_valid_loss);
}

/// Interrupts a run in training pass `at` (or in the evaluation after it) and resumes it; all of it must agree with
/// `straight`, bit for bit.
fn interrupt_and_resume(config: &RunConfig, at: u64, in_evaluation: bool, straight: &(Vec<u32>, Vec<LossEntry>)) {
    let stop = Arc::new(never());
    let mut model = Bigram::new();
    let raised = stop.clone();
    let reached = Arc::new(never());
    let reached_too = reached.clone();
    model.hook = Some(Box::new(move |pass| {
        reached.store(pass == at, Ordering::Relaxed);
        if pass == at && !in_evaluation {
            raised.store(true, Ordering::Relaxed);
        }
    }));
    let raised = stop.clone();
    model.eval_hook = Some(Box::new(move || {
        if in_evaluation && reached_too.load(Ordering::Relaxed) {
            raised.store(true, Ordering::Relaxed);
        }
    }));
    let (run, outcome) = train(&model, config, &stop).unwrap();
    assert_eq!((outcome.end, outcome.state.batches), (End::Stopped, at + 1));
    let resumed = Bigram::new();
    let outcome = resume(&resumed, &run, config, &never()).unwrap();
    assert_eq!(outcome.end, End::Finished);
    assert_eq!(resumed.weights(), straight.0, "weights, interrupted at {at}");
    assert_eq!(losses(&run), straight.1, "losses, interrupted at {at}");
}

#[test]
fn a_resumed_run_is_bit_identical_wherever_it_was_interrupted() {
    let (_folder, config) = workplace();
    let model = Bigram::new();
    let (run, _) = train(&model, &config, &never()).unwrap();
    let straight = (model.weights(), losses(&run));
    // Batch 8 ends an accumulation window, 6 the first epoch; validation follows 0, 6, 12 and 19.
    for at in [0, 4, 5, 6, 8, 18] {
        interrupt_and_resume(&config, at, false, &straight);
    }
    for at in [6, 19] {
        interrupt_and_resume(&config, at, true, &straight);
    }
}

#[test]
fn a_resumed_run_of_muon_is_bit_identical_too() {
    let (_folder, mut config) = workplace();
    config.train.optimizer = OptimizerKind::Muon;
    let model = Bigram::new();
    let (run, _) = train(&model, &config, &never()).unwrap();
    let straight = (model.weights(), losses(&run));
    let valid: Vec<f64> = straight.1.iter().filter(|row| row.kind == "valid").map(|row| row.loss).collect();
    assert!(valid.is_sorted_by(|a, b| a > b), "it learns: {valid:?}");
    for at in [0, 4, 8] {
        interrupt_and_resume(&config, at, false, &straight);
    }
    // The momentum is of no use to AdamW, neither in this run nor in one that begins with it.
    let mut other = config.clone();
    other.train.optimizer = OptimizerKind::Adamw;
    let error = resume(&Bigram::new(), &run, &other, &never()).unwrap_err();
    let want = "train.optimizer: found adamw, expected muon, with which ";
    assert!(error.is_configuration() && error.to_string().starts_with(want), "{error}");
    let checkpoint = find(&run, Which::Newest).unwrap();
    let bigram = Bigram::new();
    let mut trainer = Trainer::new(&bigram, open_data(&other).unwrap(), &other, &Solo).unwrap();
    assert!(trainer.take_over(&checkpoint).unwrap_err().to_string().starts_with(want));
}

#[test]
fn the_rate_of_each_stage_is_shown() {
    let (_folder, mut config) = workplace();
    config.train.lr_scale = Some(vec![1.0, 0.5]);
    let (run, _) = train(&Bigram::new(), &config, &never()).unwrap();
    let (_, _, scalars) = &metrics(&run)[0];
    let rate = |name: &str| scalars.iter().find(|(tag, _)| tag == name).unwrap().1;
    assert_eq!((rate("stage1/lr"), rate("stage2/lr")), (rate("lr"), rate("lr") * 0.5));
    assert!(fs::read_to_string(run.join("train.log")).unwrap().contains("at step 7; stage 1 x 1, stage 2 x 0.5"));
}

#[test]
fn a_run_of_little_data_passes_over_epochs_without_a_batch() {
    let (_folder, mut config) = workplace();
    // All 28 training sequences; the epochs that begin more than two bytes later have one fewer.
    config.train.batch_size = 28;
    config.train.target_elements *= 7;
    let model = Bigram::new();
    let (run, outcome) = train(&model, &config, &never()).unwrap();
    assert_eq!((outcome.state.batches, outcome.state.next.epoch), (20, 6 * 16 + 2));
    let straight = (model.weights(), losses(&run));
    interrupt_and_resume(&config, 8, false, &straight);
}

#[test]
fn a_crashed_run_goes_on_from_its_last_checkpoint() {
    let (_folder, config) = workplace();
    let model = Bigram::new();
    let (run, _) = train(&model, &config, &never()).unwrap();
    let straight = (model.weights(), losses(&run));
    let mut crashing = Bigram::new();
    crashing.hook = Some(Box::new(|pass| assert!(pass < 10, "crash")));
    let error = train(&crashing, &config, &never()).unwrap_err().to_string();
    assert_eq!(error, "training panicked: crash");
    let mut runs: Vec<PathBuf> = fs::read_dir(&config.io.output_dir).unwrap().map(|e| e.unwrap().path()).collect();
    runs.retain(|path| *path != run);
    let resumed = Bigram::new();
    resume(&resumed, &runs[0], &config, &never()).unwrap();
    assert_eq!((resumed.weights(), losses(&runs[0])), straight);
}

#[test]
fn a_device_without_memory_ends_the_run_with_a_checkpoint() {
    let (_folder, config) = workplace();
    let model = Bigram::new();
    let (run, _) = train(&model, &config, &never()).unwrap();
    let straight = (model.weights(), losses(&run));
    // Gradients of batch 9 wait at batch 10, so that the checkpoint of the validation before stands.
    for (full, saved) in [(9, 9), (10, 7)] {
        let mut model = Bigram::new();
        model.full = Some(full);
        let error = train(&model, &config, &never()).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { batch, .. } if batch == full), "{error}");
        assert!(error.to_string().contains("lower train.batch_size"), "{error}");
        let runs = fs::read_dir(&config.io.output_dir).unwrap().map(|entry| entry.unwrap().path());
        let run = runs.max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap()).unwrap();
        let newest = RunFolder::open(&run).unwrap().checkpoints().newest().unwrap();
        assert_eq!(newest.state().unwrap().batches, saved);
        let resumed = Bigram::new();
        resume(&resumed, &run, &config, &never()).unwrap();
        assert_eq!((resumed.weights(), losses(&run)), straight, "full at {full}");
    }
}

#[test]
fn the_seed_decides_and_another_one_differs() {
    let (_folder, mut config) = workplace();
    let weights = |config: &RunConfig| {
        let model = Bigram::new();
        train(&model, config, &never()).unwrap();
        model.weights()
    };
    let first = weights(&config);
    assert_eq!(first, weights(&config));
    config.train.seed += 1;
    assert_ne!(first, weights(&config));
}

#[test]
fn a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change() {
    let (_folder, config) = workplace();
    for (factor, want) in [(f64::NAN, "the loss is NaN, while all parameters are finite"), (1e300, "the loss is inf")] {
        let mut model = Bigram::new();
        model.spoiled = Some((10, factor));
        let error = train(&model, &config, &never()).unwrap_err();
        assert!(matches!(error, Error::NonFinite { step: 3, batch: 10, .. }), "{error}");
        assert!(error.to_string().contains(want), "{error}");
        assert!(model.weights().iter().all(|&bits| f32::from_bits(bits).is_finite()));
    }
    // A finite loss whose gradient is not: stands in for an overflow in backward.
    let model = Bigram::new();
    let mut trainer = Trainer::new(&model, open_data(&config).unwrap(), &config, &Solo).unwrap();
    let before = model.weights();
    model.params().get("bias").unwrap().grad_mut()[3] = f32::INFINITY;
    let error = trainer.gradient_step().unwrap_err().to_string();
    assert!(error.contains("the gradient of bias is not finite"), "{error}");
    assert_eq!(model.weights(), before);
}

#[test]
fn mistakes_leave_no_run_folder() {
    type Change = fn(&mut RunConfig);
    let cases: [(Change, &str); 8] = [
        (|c| c.io.dataset_dir += ".missing", "does not exist"),
        (|c| c.io.dataset_dir = c.io.dataset_dir.replace("data.bin", "*.txt"), "does not exist"),
        (|c| c.io.dataset_id = "pg20".into(), "unknown data set \"pg20\"; expected one of: bytes"),
        (|c| c.params.input_seq_len = 500, "sequences of 500 bytes do not fit the 900 bytes"),
        (
            |c| c.params.input_seq_len = 100,
            "the model does not take sequences of 100 bytes: 100 bytes, expected at most 64",
        ),
        (|c| c.params.model = model(5), "num_tokens: found 5"),
        (|c| c.train.batch_size = 29, "the training data are 28 sequence(s) of 16 bytes"),
        (|c| c.train.target_elements = 1, "not one gradient step"),
    ];
    for (change, want) in cases {
        let (_folder, mut config) = workplace();
        change(&mut config);
        let error = train(&Bigram::new(), &config, &never()).unwrap_err();
        assert!(error.is_configuration() && error.to_string().contains(want), "{error}");
        assert_eq!(outputs(&config), 0, "{want}");
    }
}

#[test]
fn resuming_with_other_data_or_settings_is_refused() {
    let (folder, config) = workplace();
    let (run, _) = train(&Bigram::new(), &config, &never()).unwrap();
    let message = |config: &RunConfig| resume(&Bigram::new(), &run, config, &never()).unwrap_err().to_string();
    let mut other = config.clone();
    other.train.seed = 12;
    assert!(message(&other).contains("train.seed: found 12, expected 11"));
    let mut data = fs::read(folder.path().join("data.bin")).unwrap();
    data.push(0);
    let with = |data: &[u8]| {
        fs::write(folder.path().join("data.bin"), data).unwrap();
        message(&config)
    };
    assert!(with(&data).contains("the data are not those of"));
    // Too few for a batch, for a split, and none: the reason is what was done to them.
    for (len, want) in [(60, "the data are not those of"), (10, "do not fit the 10 bytes"), (0, "contains no bytes")] {
        let said = with(&data[..len]);
        let resized = format!("resized: data.bin (900 bytes, now {len})");
        assert!(said.contains(want) && said.contains(&resized), "{said}");
    }
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let (_folder, config) = workplace();
    let model = Bigram::new();
    let (run, first) = train(&model, &config, &never()).unwrap();
    let before = losses(&run);
    let again = Bigram::new();
    let outcome = resume(&again, &run, &config, &never()).unwrap();
    assert_eq!((outcome, again.weights(), losses(&run)), (first, model.weights(), before));
}

/// `batch`, `kind` and the scalars but for times and memory, of each line of `metrics.jsonl`.
fn metrics(run: &Path) -> Vec<(u64, String, Scalars)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let parse = |line: &str| serde_json::from_str::<std::collections::BTreeMap<String, serde_json::Value>>(line);
    let line = |text: &str| {
        let mut line = parse(text).unwrap();
        let (batch, kind) = (line.remove("batch").unwrap(), line.remove("kind").unwrap());
        for varies in ["seconds", "bytes_per_second", "data_seconds", "memory_mb"] {
            line.remove(varies);
        }
        let numbers = line.into_iter().map(|(tag, value)| (tag, value.as_f64().unwrap())).collect();
        (batch.as_u64().unwrap(), kind.as_str().unwrap().into(), numbers)
    };
    text.lines().map(line).collect()
}

#[test]
fn gradients_are_measured_when_they_are_complete_and_a_resumed_run_has_the_same_metrics() {
    let (_folder, mut config) = workplace();
    config.io.log_train_loss_amount = 3;
    config.train.gradient_clipping = Some(0.05);
    let (straight, _) = train(&Bigram::new(), &config, &never()).unwrap();
    let lines = metrics(&straight);
    let shown: Vec<(u64, &str, Vec<&str>)> = lines
        .iter()
        .map(|(batch, kind, numbers)| (*batch, &kind[..], numbers.iter().map(|(tag, _)| &tag[..]).collect()))
        .collect();
    let loss = ["bpb", "bytes_seen", "loss", "lr", "step"].to_vec();
    let gradient = ["bytes_seen", "grad_norm", "grad_norm_clipped", "stage1/grad_norm", "step"].to_vec();
    let valid = ["bpb", "bytes_seen", "loss", "step"].to_vec();
    let last = [&["bpb"], &gradient[..3], &["loss", "lr"], &gradient[3..]].concat();
    // Points are batches 0, 9 and 19; a step follows batches 2, 5, …, 17, and one of two batches the last.
    let want = [
        (0, "train", &loss),
        (0, "valid", &valid),
        (2, "train", &gradient),
        (6, "valid", &valid),
        (9, "train", &loss),
        (11, "train", &gradient),
        (12, "valid", &valid),
        (19, "train", &last),
        (19, "valid", &valid),
    ];
    assert_eq!(shown, want.map(|(batch, kind, tags)| (batch, kind, tags.clone())));
    let number = |at: usize, tag: &str| lines[at].2.iter().find(|(name, _)| name == tag).unwrap().1;
    assert_eq!((number(2, "step"), number(2, "bytes_seen")), (1.0, 3.0 * 64.0));
    assert_eq!(number(0, "lr"), losses(&straight)[0].lr);
    let (norm, clipped) = (number(2, "grad_norm"), number(2, "grad_norm_clipped"));
    assert!(norm > 0.1 && (clipped - 0.05).abs() < 1e-5, "{norm} {clipped}");

    let stop = Arc::new(never());
    let mut model = Bigram::new();
    let raised = stop.clone();
    model.hook = Some(Box::new(move |pass| raised.store(pass == 10, Ordering::Relaxed)));
    let (run, _) = train(&model, &config, &stop).unwrap();
    resume(&Bigram::new(), &run, &config, &never()).unwrap();
    assert_eq!(metrics(&run), lines);
    let rows = fs::read_to_string(run.join("timemem.csv")).unwrap();
    let batches: Vec<&str> = rows.lines().skip(1).map(|row| row.split(',').next().unwrap()).collect();
    assert_eq!(batches.iter().filter(|batch| **batch == "10").count(), 1, "{rows}");
    assert_eq!(batches.len(), 20 + 4, "{rows}");
}

#[test]
fn accumulated_batches_are_one_large_batch_whatever_counts_in_them() {
    let (_folder, mut config) = workplace();
    (config.train.gradient_clipping, config.train.shuffle_train) = (None, false);
    let trained = |batch_size: usize, accumulate: usize, average| {
        let mut config = config.clone();
        let train = &mut config.train;
        (train.batch_size, train.gradient_accumulate_every, train.loss_average) = (batch_size, accumulate, average);
        (train.target_elements, train.learning_rate) = (4 * 16, 1e-3);
        // The pad token is a byte of the data.
        let mut model = Bigram::new();
        (model.pad, model.dropout) = (Some(3), 0.0);
        let mut trainer = Trainer::new(&model, open_data(&config).unwrap(), &config, &Solo).unwrap();
        for _ in 0..accumulate {
            let batch = trainer.train.read(trainer.state.next).unwrap();
            let loss = TrainModel::loss(&&model, &sequences(&batch), Mode::train(0)).unwrap();
            trainer.add_gradient(&loss).unwrap();
            trainer.state.next = trainer.train.after(trainer.state.next);
        }
        trainer.complete_window().unwrap();
        model.params().iter().flat_map(|param| param.grad().to_vec()).collect::<Vec<f32>>()
    };
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let whole = trained(4, 1, LossAverage::Window);
    assert!(apart(&whole, &trained(1, 4, LossAverage::Window)) < 1e-6);
    assert!(apart(&whole, &trained(2, 2, LossAverage::Window)) < 1e-6);
    assert!(apart(&whole, &trained(1, 4, LossAverage::Batch)) > 1e-4, "the package's means of means are others");
    assert_eq!(whole, trained(4, 1, LossAverage::Batch));
}

#[test]
fn a_chained_run_that_is_resumed_is_bit_identical() {
    let (_folder, mut config) = workplace();
    let (first, _) = train(&Bigram::new(), &config, &never()).unwrap();
    config.resume = Some(ResumeSection {
        checkpoint_file: first,
        next_epoch_index: 1,
        next_batch_index: 2,
        migrate_embeddings: false,
        rename_modules: false,
        resumed_from: None,
        run: None,
    });
    let model = Bigram::new();
    let (run, outcome) = train(&model, &config, &never()).unwrap();
    assert_eq!((outcome.state.step, outcome.state.optimizer_step), (7, 14));
    let straight = (model.weights(), losses(&run));
    for at in [0, 4, 8] {
        interrupt_and_resume(&config, at, false, &straight);
    }
}

#[test]
fn a_time_limit_validates_what_it_has_and_leaves_no_trace_in_the_run_that_goes_on() {
    let (_folder, mut config) = workplace();
    config.train.early_stop = Some(2);
    let model = Bigram::new();
    let (run, _) = train(&model, &config, &never()).unwrap();
    let straight = (model.weights(), losses(&run), metrics(&run));
    config.train.max_seconds = Some(1e-9);
    let limited = Bigram::new();
    let (run, outcome) = train(&limited, &config, &never()).unwrap();
    assert_eq!((outcome.end, outcome.state.batches), (End::TimeLimit, 0));
    let rows = losses(&run);
    assert_eq!(rows.iter().map(|row| &row.kind[..]).collect::<Vec<_>>(), ["valid"]);
    assert_eq!(outcome.state.valid_loss, Some(rows[0].loss));
    assert_eq!(find(&run, Which::Best).unwrap().state().unwrap().valid_loss, Some(rows[0].loss));
    assert_eq!(outcome.state.best_valid_loss, None, "the run's own course knows nothing of it");
    config.train.max_seconds = None;
    let resumed = Bigram::new();
    resume(&resumed, &run, &config, &never()).unwrap();
    assert_eq!((resumed.weights(), losses(&run), metrics(&run)), straight);
}

#[test]
fn validation_does_not_depend_on_the_batch_size_and_needs_something_to_predict() {
    let (folder, mut config) = workplace();
    // A third of the sequences are padding.
    let data: Vec<u8> = (0..1440u32).map(|i| if i / 16 % 3 == 0 { 7 } else { (i * i % 7) as u8 }).collect();
    fs::write(folder.path().join("data.bin"), data).unwrap();
    config.params.model = model(8);
    let valid = |size: usize| {
        let mut config = config.clone();
        (config.train.batch_size, config.train.gradient_accumulate_every) = (size, 1);
        let mut model = Bigram::new();
        model.pad = Some(7);
        let trainer = Trainer::new(&model, open_data(&config).unwrap(), &config, &Solo).unwrap();
        trainer.measure_valid_loss(&never()).unwrap().unwrap()
    };
    let one = valid(1);
    for size in [2, 3, 4, 12] {
        assert!((valid(size) - one).abs() < 1e-6, "{size}: {} and {one}", valid(size));
    }
    fs::write(folder.path().join("data.bin"), [0; 1440]).unwrap();
    if let ModelConfig::Generative(model) = &mut config.params.model {
        model.pad_token_id = 0;
    }
    let error = train(&Bigram::new(), &config, &never()).unwrap_err();
    let want = "params.pad_token_id: the training data have nothing to predict";
    assert!(error.is_configuration() && error.to_string().contains(want), "{error}");
    assert_eq!(outputs(&config), 0);
}

#[test]
fn muon_needs_a_matrix() {
    let (_folder, mut config) = workplace();
    config.train.optimizer = OptimizerKind::Muon;
    let mut model = Bigram::new();
    model.params = mblm_core::ParamStore::new(0);
    let found = Trainer::new(&model, open_data(&config).unwrap(), &config, &Solo).map(drop).unwrap_err();
    let want = "train.optimizer: expected adamw: the stages of this model have no weight matrix";
    assert!(found.is_configuration() && found.to_string().starts_with(want), "{found}");
}

#[test]
fn precision_is_checked_where_training_starts() {
    let (_folder, mut config) = workplace();
    config.train.precision = mblm_core::gemm::Precision::Bf16;
    let found = Trainer::new(&Bigram::new(), open_data(&config).unwrap(), &config, &Solo).map(drop);
    match config.train.precision.is_available() {
        true => found.unwrap(),
        false => assert!(found.unwrap_err().to_string().contains("train.precision: expected f32: this CPU")),
    }
}

#[test]
fn what_computes_otherwise_is_said() {
    let (folder, config) = workplace();
    let model = Bigram::new();
    let trainer = || Trainer::new(&model, open_data(&config).unwrap(), &config, &Solo).unwrap();
    let mut other = trainer();
    let same = Shelf::new(folder.path().into()).save(other.snapshot(), 0).unwrap();
    let remarks = trainer().restore(&Checkpoint::open(&same).unwrap()).unwrap();
    assert!(remarks.warnings.is_empty() && remarks.notes.is_empty(), "{remarks:?}");
    other.state.threads = Some(999);
    other.state.instructions = Some("AVX-1024".into());
    other.state.version = Some("0.0.1".into());
    other.state.device = Some("cuda:0".into());
    let saved = Shelf::new(folder.path().into()).save(other.snapshot(), 0).unwrap();
    let remarks = trainer().restore(&Checkpoint::open(&saved).unwrap()).unwrap();
    let parts = ["threads instead of 999", "instructions instead of AVX-1024", "of the program instead of 0.0.1"];
    for part in parts.into_iter().chain(["device cpu instead of cuda:0"]) {
        assert!(remarks.warnings[0].contains(part), "{remarks:?}");
    }
}

/// A study compares its variants seed by seed.
#[test]
fn the_seed_alone_decides_the_order_of_the_data() {
    let (_folder, config) = workplace();
    let ids = |config: &RunConfig| -> Vec<Vec<u32>> {
        let model = Bigram::new();
        let trainer = Trainer::new(&model, open_data(config).unwrap(), config, &Solo).unwrap();
        (0..4).map(|batch| trainer.train.read(Cursor { epoch: 0, batch }).unwrap().ids).collect()
    };
    let mut other = config.clone();
    (other.train.learning_rate, other.train.weight_decay, other.train.target_elements) = (9.0, 0.5, 640);
    (other.io.name_model, other.train.gradient_accumulate_every) = ("another".into(), 2);
    assert_eq!(ids(&other), ids(&config));
    other.train.seed += 1;
    assert_ne!(ids(&other), ids(&config));
}
