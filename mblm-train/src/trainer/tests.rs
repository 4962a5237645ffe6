//! Whole runs of the bigram stand-in.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::bigram::{Bigram, VOCABULARY, config, model};
use crate::checkpoint::{Which, find};
use crate::run::{RunFolder, read_losses};
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
    Session { config, config_yaml: "yaml".into(), build, place: None, retries: 0, quiet: false, stop, listening: None }
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
    assert_eq!((outcome.interrupted, outcome.state.batches, outcome.state.step), (false, 200, 66));
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
    assert!(chain.starts_with("yamlresume:\n  checkpoint_file: /") && chain.contains("next_batch_index: "), "{chain}");
    let log = fs::read_to_string(run.join("train.log")).unwrap();
    for part in ["byte-unigram entropy", "model: 72 parameters", "ETA", "valid loss", "finished: saved"] {
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
    assert_eq!((outcome.interrupted, outcome.state.batches), (true, at + 1));
    let resumed = Bigram::new();
    let outcome = resume(&resumed, &run, config, &never()).unwrap();
    assert!(!outcome.interrupted);
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
    let mut trainer = Trainer::new(&model, open_data(&config).unwrap(), &config, "").unwrap();
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
        (|c| c.io.dataset_dir += ".missing", "names nothing"),
        (|c| c.io.dataset_dir = c.io.dataset_dir.replace("data.bin", "*.txt"), "names nothing"),
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
    fs::write(folder.path().join("data.bin"), data).unwrap();
    assert!(message(&config).contains("the data are not those of"));
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
    let gradient = ["bytes_seen", "grad_norm", "grad_norm_clipped", "step"].to_vec();
    let valid = ["bpb", "bytes_seen", "loss", "step"].to_vec();
    // Points are batches 0, 9 and 19; a step follows batches 2, 5, …, 17. The last two batches are not stepped on.
    let want = [
        (0, "train", &loss),
        (0, "valid", &valid),
        (2, "train", &gradient),
        (6, "valid", &valid),
        (9, "train", &loss),
        (11, "train", &gradient),
        (12, "valid", &valid),
        (19, "train", &loss),
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
