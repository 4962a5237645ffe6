//! Runs that go on with a changed configuration: their steps, their place in the data and their learning rates.

use super::*;
use crate::config::ScheduleKind;

/// A run that was stopped after batch `at`.
fn stopped_at(model: &mut Bigram, config: &RunConfig, at: u64) -> PathBuf {
    let stop = Arc::new(never());
    let raised = stop.clone();
    model.hook = Some(Box::new(move |pass| raised.store(pass + 1 == at, Ordering::Relaxed)));
    let (run, outcome) = train(model, config, &stop).unwrap();
    assert_eq!((outcome.end, outcome.state.batches), (End::Stopped, at));
    run
}

/// Goes on with a changed configuration.
fn resume_changed(run: &Path, config: &RunConfig) -> (Outcome, String) {
    let (model, stop) = (Bigram::new(), never());
    let changed = Session { changes: vec!["something: 1, now 2".into()], ..session(&model, config, &stop) };
    let outcome = changed.resume(&RunFolder::open(run).unwrap()).unwrap();
    (outcome, fs::read_to_string(run.join("train.log")).unwrap())
}

/// The learning rate of every batch that was noted.
fn rates(run: &Path) -> Vec<f64> {
    losses(run).into_iter().filter(|row| row.kind == "train").map(|row| row.lr).collect()
}

#[test]
fn a_window_that_a_change_completes_is_stepped_on() {
    let (_folder, mut config) = workplace();
    let run = stopped_at(&mut Bigram::new(), &config, 8); // two batches wait, of three
    config.train.gradient_accumulate_every = 1;
    let (outcome, log) = resume_changed(&run, &config);
    assert_eq!((outcome.state.batches, outcome.state.step), (20, 2 + 1 + 12));
    assert!(log.contains("note: the configuration changes: something: 1, now 2"), "{log}");
    config.train.gradient_accumulate_every = 7;
    let run = stopped_at(&mut Bigram::new(), &config, 8);
    config.train.gradient_accumulate_every = 3;
    let (outcome, _) = resume_changed(&run, &config);
    // One step of seven batches, then the eighth to the tenth, and so on; the last is of one batch.
    assert_eq!((outcome.state.batches, outcome.state.step), (20, 1 + 5));
    // A target that is reached already: what waits is still stepped on.
    config.train.gradient_accumulate_every = 3;
    let run = stopped_at(&mut Bigram::new(), &config, 8);
    config.train.target_elements = 5 * 64;
    let (outcome, _) = resume_changed(&run, &config);
    assert_eq!((outcome.end, outcome.state.batches, outcome.state.step), (End::Finished, 8, 3));
}

#[test]
fn a_changed_batch_size_reaches_the_target_and_counts_true_bytes() {
    let (_folder, mut config) = workplace();
    config.train.target_elements_strategy = TargetStrategy::Batch;
    config.train.target_elements = 80;
    let run = stopped_at(&mut Bigram::new(), &config, 10);
    config.train.batch_size = 7;
    let (outcome, log) = resume_changed(&run, &config);
    // 40 sequences are seen; the 40 that are left are 6 batches of 7.
    let state = outcome.state;
    assert_eq!((state.batches, state.elements_seen, state.bytes_seen), (16, 82, 82 * 16));
    // 12 sequences of the second epoch are seen, of which batch 1 of 7 holds the last five.
    assert!(log.contains("data: goes on at batch 2 of epoch 1, which was batch 3 of epoch 1"), "{log}");
    let bytes = metrics(&run).last().unwrap().2.iter().find(|(tag, _)| tag == "bytes_seen").unwrap().1;
    assert_eq!(bytes, 82.0 * 16.0);
    // The change is the run's: it goes on, and is resumed, without being told again.
    assert_eq!(find(&run, Which::Newest).unwrap().sizes().unwrap().train.batch_size, 7);
}

#[test]
fn a_longer_target_goes_on_at_the_rate_that_was_reached() {
    let (_folder, mut config) = workplace();
    (config.train.gradient_accumulate_every, config.io.log_train_loss_amount) = (1, 1000);
    let longest = |rates: &[f64]| rates.windows(2).map(|pair| (pair[1] - pair[0]).abs()).fold(0.0, f64::max);
    let (run, _) = train(&Bigram::new(), &config, &never()).unwrap();
    let before = longest(&rates(&run)[2..]);
    config.train.target_elements *= 2;
    let (_, log) = resume_changed(&run, &config);
    let found = rates(&run);
    assert_eq!((found.len(), found[20]), (40, found[19]));
    assert!(longest(&found[2..]) <= before, "{found:?}");
    assert!(
        log.contains("learning rate schedule before: 7.") && log.contains("learning rate schedule now: 7."),
        "{log}"
    );
    assert!(log.contains("warning: the learning rate stays below 0.1 of train.learning_rate"), "{log}");
    // Warmed up again where that is asked for.
    config.train.target_elements *= 2;
    config.train.rewarm_steps_perc = Some(0.5);
    let (_, log) = resume_changed(&run, &config);
    let found = rates(&run);
    assert_eq!((found.len(), found[40], found[60]), (80, found[39], config.train.learning_rate));
    assert!(longest(&found[2..]) <= before && log.contains("rises to 1.000e-1 at step 60"), "{found:?}");
    // That was for this time: the run does not have it any more, so the next one anneals.
    let kept = find(&run, Which::Newest).unwrap().sizes().unwrap();
    let yaml = RunFolder::config_yaml(&run).unwrap();
    assert!(kept.train.rewarm_steps_perc.is_none() && yaml.contains("rewarm_steps_perc: null"), "{yaml}");
    config.train.target_elements *= 2;
    config.train.rewarm_steps_perc = None;
    resume_changed(&run, &config);
    let found = rates(&run);
    assert!(found.len() == 160 && found[80..].iter().all(|rate| *rate <= found[79]), "{found:?}");
}

#[test]
fn a_run_that_is_extended_before_its_decay_goes_on_at_its_stable_rate() {
    let (_folder, mut config) = workplace();
    (config.train.gradient_accumulate_every, config.io.log_train_loss_amount) = (1, 1000);
    config.train.schedule = ScheduleKind::Wsd;
    let run = stopped_at(&mut Bigram::new(), &config, 10);
    config.train.target_elements *= 2;
    let (_, log) = resume_changed(&run, &config);
    let rates = rates(&run);
    assert!(rates.len() == 40 && rates[2..=32].iter().all(|rate| *rate == 0.1), "{rates:?}");
    assert!((rates[36] - 0.05).abs() < 1e-12, "{rates:?}");
    assert!(log.contains("schedule now: 1.000e-1 at step 10, stays there until step 32, then falls"), "{log}");
    // A finished run has no stable rate left.
    config.train.target_elements *= 2;
    let (_, log) = resume_changed(&run, &config);
    assert!(log.contains("at step 40, stays there until step 64, then falls linearly to 0 at step 80"), "{log}");
}

#[test]
fn a_retry_does_not_warm_up_again() {
    let (_folder, mut config) = workplace();
    config.train.gradient_accumulate_every = 1;
    let extended = |crash: Option<u64>| {
        let mut config = config.clone();
        let (run, _) = train(&Bigram::new(), &config, &never()).unwrap();
        config.train.target_elements *= 2;
        config.train.rewarm_steps_perc = Some(0.5);
        let mut model = Bigram::new();
        model.hook = Some(Box::new(move |pass| assert_ne!(Some(pass), crash, "crash")));
        let stop = never();
        let changes = vec!["something: 1, now 2".into()];
        let session = Session { changes, retries: 1, ..session(&model, &config, &stop) };
        session.resume(&RunFolder::open(&run).unwrap()).unwrap();
        (model.weights(), losses(&run))
    };
    // After a checkpoint on the way up.
    assert_eq!(extended(Some(10)), extended(None));
}
