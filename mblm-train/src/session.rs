//! A run from start to end: what the program's `train` does. Nothing is written before everything is known to be good.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crate::checkpoint::Snapshot;
use crate::config::RunConfig;
use crate::data::{self, DatasetOptions, Splits, unigram_entropy};
use crate::error::Result;
use crate::import;
use crate::metrics::Metrics;
use crate::model::TrainModel;
use crate::progress::Progress;
use crate::run::RunFolder;
use crate::timemem::TimeMem;
use crate::trainer::{Outcome, Record, Trainer};

/// Opens the data that `config` names.
pub fn open_data(config: &RunConfig) -> Result<Splits> {
    let options = DatasetOptions {
        dir: &config.io.dataset_dir,
        args: config.io.dataset_args.as_ref(),
        seq_len: config.params.input_seq_len,
        num_tokens: config.params.model.hierarchy().num_tokens,
        pad_token_id: config.params.model.hierarchy().pad_token_id,
    };
    data::open(&config.io.dataset_id, &options)
}

/// Starts a run and trains until its end or until `stop` is raised. Returns the run's folder and how it ended.
///
/// # Errors
/// Mistakes in `config` or its data, before anything is written; later, what ends the run.
pub fn train(
    model: &dyn TrainModel,
    splits: Splits,
    config: &RunConfig,
    config_yaml: &str,
    stop: &AtomicBool,
) -> Result<(PathBuf, Outcome)> {
    let create = |first: Snapshot| RunFolder::create(&config.io.output_dir, &config.io.name_model, first);
    begin(create, model, splits, config, config_yaml, stop)
}

/// As [`train`], in the folder `place`, which must not be there yet.
pub fn train_at(
    place: &Path,
    model: &dyn TrainModel,
    splits: Splits,
    config: &RunConfig,
    config_yaml: &str,
    stop: &AtomicBool,
) -> Result<(PathBuf, Outcome)> {
    begin(|first| RunFolder::create_at(place, first), model, splits, config, config_yaml, stop)
}

fn begin(
    create: impl FnOnce(Snapshot) -> Result<RunFolder>,
    model: &dyn TrainModel,
    splits: Splits,
    config: &RunConfig,
    config_yaml: &str,
    stop: &AtomicBool,
) -> Result<(PathBuf, Outcome)> {
    let about = splits.about.clone();
    let mut trainer = Trainer::new(model, splits, config, config_yaml)?;
    if let Some(resume) = &config.resume {
        import::begin(&mut trainer, model, resume)?;
    }
    trainer.rehearse()?;
    let run = create(trainer.snapshot())?;
    let mut record = record(&run, &trainer, config)?;
    let progress = &mut record.progress;
    progress.line(&format!("run: {}", run.path().display()));
    progress.line(&format!("data: {about}"));
    if let Some(resume) = &config.resume {
        progress.line(&format!("begins with the weights of {}", resume.checkpoint_file.display()));
    }
    introduce(progress, &trainer, model, config);
    let outcome = run_and_test(&mut trainer, &mut record, stop);
    Ok((run.path().into(), conclude(outcome, &mut record)?))
}

/// Goes on with a run from its newest checkpoint. `config` is what the run's
/// [`config.yaml`](RunFolder::config_yaml) says.
///
/// # Errors
/// Its newest checkpoint is damaged, or the data changed.
pub fn resume(
    model: &dyn TrainModel,
    splits: Splits,
    run: RunFolder,
    config: &RunConfig,
    config_yaml: &str,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let mut trainer = Trainer::new(model, splits, config, config_yaml)?;
    run.checkpoints().recover()?;
    let checkpoint = run.checkpoints().newest()?;
    trainer.restore(&checkpoint)?;
    let mut record = record(&run, &trainer, config)?;
    let (done, total) = (trainer.state().batches, trainer.plan().batches);
    record.progress.line(&format!("resume: batch {done} of {total}, from {}", checkpoint.path().display()));
    let outcome = run_and_test(&mut trainer, &mut record, stop);
    conclude(outcome, &mut record)
}

/// Trains; at the end, measures the best model on the test split.
fn run_and_test(trainer: &mut Trainer, record: &mut Record, stop: &AtomicBool) -> Result<Outcome> {
    let outcome = trainer.run(record, stop)?;
    if !outcome.interrupted {
        trainer.test(record, stop)?;
    }
    Ok(outcome)
}

fn record(run: &RunFolder, trainer: &Trainer, config: &RunConfig) -> Result<Record> {
    let done = trainer.state().batches;
    let bytes_per_batch = (config.train.batch_size * config.params.input_seq_len) as u64;
    Ok(Record {
        folder: run.path().into(),
        checkpoints: run.checkpoints(),
        losses: run.losses(done)?,
        metrics: Metrics::open(run.path(), done)?,
        timemem: TimeMem::open(run.path(), done)?,
        progress: Progress::new(run.log()?, trainer.plan().batches, done, bytes_per_batch),
    })
}

/// Says what is going to be trained on what.
fn introduce(progress: &mut Progress, trainer: &Trainer, model: &dyn TrainModel, config: &RunConfig) {
    if let Some(counts) = trainer.training_data().dataset.byte_counts() {
        let entropy = unigram_entropy(&counts);
        progress.line(&format!("byte-unigram entropy of the training bytes: {entropy:.4} bits"));
        let pad = config.params.model.hierarchy().pad_token_id;
        if let Some(count @ 1..) = counts.get(pad) {
            progress.line(&format!(
                "warning: the pad token {pad} is also a byte of the training data ({count} times), which is not \
                 learned; a pad_token_id of 256 or more avoids that"
            ));
        }
    }
    let plan = trainer.plan();
    progress.line(&format!("model: {} parameters", model.params().num_elements()));
    progress.line(&format!(
        "training: {} batches of {} x {} bytes, {} gradient steps, {} batches per epoch",
        plan.batches,
        config.train.batch_size,
        config.params.input_seq_len,
        plan.steps(),
        trainer.training_data().num_batches(0)
    ));
}

/// Says how the run ended.
fn conclude(outcome: Result<Outcome>, record: &mut Record) -> Result<Outcome> {
    match &outcome {
        Ok(Outcome { checkpoint, interrupted, .. }) => {
            let how = if *interrupted { "interrupted" } else { "finished" };
            record.progress.line(&format!("{how}: saved {}", checkpoint.display()));
        }
        // The program shows the error; the log should know it too.
        Err(error) => record.progress.log(&format!("error: {error}")),
    }
    outcome
}
