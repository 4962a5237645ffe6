//! Runs on several processes, which are threads here: what all engines have in common.

use super::*;
use crate::processes::threads::together;

/// What a process returns of a run, with its weights.
type Ran = Result<(PathBuf, Outcome, Vec<u32>)>;

/// Trains on `size` processes. `prepare` changes the model of one, which may raise its flag to stop.
fn train_together(
    size: usize,
    config: &RunConfig,
    retries: u32,
    prepare: impl Fn(usize, &mut Bigram, &Arc<AtomicBool>) + Sync,
) -> Vec<Ran> {
    together(size, |processes| {
        let (mut model, stop) = (Bigram::new(), Arc::new(never()));
        prepare(processes.rank(), &mut model, &stop);
        let session = Session { processes, retries, ..session(&model, config, &stop) };
        let (run, outcome) = session.train()?;
        Ok((run, outcome, model.weights()))
    })
}

/// Resumes on `size` processes.
fn resume_together(size: usize, run: &Path, config: &RunConfig) -> Vec<Result<(Outcome, Vec<u32>)>> {
    together(size, |processes| {
        let (model, stop) = (Bigram::new(), never());
        let folder = match processes.is_first() {
            true => RunFolder::open(run)?,
            false => RunFolder::of_another(run.into()),
        };
        let outcome = Session { processes, ..session(&model, config, &stop) }.resume(&folder)?;
        Ok((outcome, model.weights()))
    })
}

fn log(run: &Path) -> String {
    fs::read_to_string(run.join("train.log")).unwrap()
}

/// Bytes as [`workplace`] has them, with padding in clusters, so that batches count differently.
fn bytes(len: usize) -> Vec<u8> {
    let mut state = 5u64;
    let byte = |i: usize| {
        state = mix(state);
        if (i / 50) % 3 == 1 && !state.is_multiple_of(4) { 7 } else { (state >> 8) as u8 % VOCABULARY as u8 }
    };
    (0..len).map(byte).collect()
}

/// 20 steps on `size` processes, and on one that accumulates the same batches: the losses of every batch, and the weights.
fn equals_one(size: usize, loss_average: LossAverage, optimizer: OptimizerKind) {
    let (folder, mut config) = workplace();
    let (accumulate, steps) = (2, 20);
    config.train.shuffle_train = false;
    (config.train.loss_average, config.train.optimizer) = (loss_average, optimizer);
    config.train.gradient_accumulate_every = accumulate;
    config.train.target_elements_strategy = TargetStrategy::Sequence;
    let block = config.train.batch_size * config.params.input_seq_len;
    let (rounds, total) = (accumulate * steps, block * accumulate * steps * size);
    config.train.target_elements = total as u64;
    (config.io.log_train_loss_amount, config.io.validate_amount) = (10 * total, 4);
    let shares = bytes(total);
    // Round by round, the batches of all shares: what one process reads in their place.
    let batch = |at: usize| &shares[(at % size * rounds + at / size) * block..][..block];
    let in_turn: Vec<u8> = (0..size * rounds).flat_map(batch).copied().collect();
    let train = |size: usize, config: &RunConfig, data: &[u8]| {
        fs::write(folder.path().join("data.bin"), [data, &bytes(total)].concat()).unwrap();
        let mut ran = train_together(size, config, 0, |_, model, _| model.pad = Some(7)).into_iter();
        let (run, outcome, weights) = ran.next().unwrap().unwrap();
        assert!(ran.all(|other| other.unwrap().2 == weights), "all processes have the same weights");
        assert_eq!((outcome.end, outcome.state.step, outcome.state.bytes_seen), (End::Finished, 20, total as u64));
        (losses(&run), weights.into_iter().map(f32::from_bits).collect::<Vec<f32>>())
    };
    config.io.enabled_loss_log_for_gpus = Some((0..size).collect());
    let several = train(size, &config, &shares);
    assert_eq!(train(size, &config, &shares), several, "the same twice: the same bits");
    config.train.gradient_accumulate_every = accumulate * size;
    let one = train(1, &config, &in_turn);
    let trained = |rows: &[LossEntry]| rows.iter().filter(|row| row.kind == "train").cloned().collect::<Vec<_>>();
    let (of_several, of_one) = (trained(&several.0), trained(&one.0));
    assert_eq!(of_several.len(), size * rounds, "a row of every batch in every process");
    for (at, want) in of_one.iter().enumerate() {
        let (rank, round) = ((at % size) as u32, (at / size) as i64);
        let found = of_several.iter().find(|row| (row.gpu_rank, row.cum_batch) == (rank, round)).unwrap();
        assert!((found.loss - want.loss).abs() < 1e-5 * want.loss, "batch {at}: {found:?}, want {want:?}");
    }
    let largest = one.1.iter().fold(0f32, |most, x| most.max(x.abs()));
    let off = several.1.iter().zip(&one.1).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(off < 1e-4 * largest, "weights are off by {off} of {largest}");
    let last = |rows: &[LossEntry]| rows.iter().rfind(|row| row.kind == "valid").unwrap().loss;
    assert!((last(&several.0) - last(&one.0)).abs() < 1e-5 * last(&one.0));
}

#[test]
fn several_processes_are_one_that_accumulates_their_batches() {
    equals_one(2, LossAverage::Window, OptimizerKind::Adamw);
    equals_one(3, LossAverage::Window, OptimizerKind::Adamw);
    equals_one(3, LossAverage::Batch, OptimizerKind::Adamw);
    equals_one(3, LossAverage::Window, OptimizerKind::Muon);
}

#[test]
fn only_the_first_process_writes() {
    let (_folder, config) = workplace();
    let ran = train_together(3, &config, 0, |_, _, _| {});
    let paths: Vec<PathBuf> = ran.into_iter().map(|ran| ran.unwrap().0).collect();
    assert!(paths.iter().all(|path| *path == paths[0]) && outputs(&config) == 1, "{paths:?}");
    let log = log(&paths[0]);
    assert!(log.contains("training: 3 processes, each with its share of the data and "), "{log}");
    assert!(losses(&paths[0]).iter().all(|row| row.gpu_rank == 0), "those of other processes are logged if asked for");
}

/// Whichever process is told to stop, and when: all finish the step, and the resumed run is the one that was not stopped.
#[test]
fn a_resumed_run_of_several_is_the_one_without_interruption() {
    let (_folder, mut config) = workplace();
    config.train.target_elements *= 3;
    let straight = train_together(3, &config, 0, |_, _, _| {}).remove(0).unwrap();
    for (rank, pass) in [(0, 0), (1, 4), (2, 5), (1, 9)] {
        let ran = train_together(3, &config, 0, |me, model, stop| {
            let raised = stop.clone();
            model.hook = Some(Box::new(move |now| _ = raised.fetch_or(me == rank && now == pass, Ordering::Relaxed)));
        });
        let ran: Vec<_> = ran.into_iter().map(Result::unwrap).collect();
        let batches = ran[0].1.state.batches;
        assert!(ran.iter().all(|(_, outcome, _)| (outcome.end, outcome.state.batches) == (End::Stopped, batches)));
        assert!(batches > pass && batches <= pass + 3 && batches.is_multiple_of(3), "{batches} after pass {pass}");
        let resumed = resume_together(3, &ran[0].0, &config);
        assert!(resumed.iter().all(|ran| ran.as_ref().unwrap().1 == straight.2), "interrupted at {pass} by {rank}");
        assert_eq!(losses(&ran[0].0), losses(&straight.0), "interrupted at {pass} by {rank}");
    }
}

#[test]
fn a_failure_of_one_ends_all() {
    let (_folder, config) = workplace();
    let spoil = |rank: usize, model: &mut Bigram, _: &Arc<AtomicBool>| {
        model.spoiled = (rank == 1).then_some((4, f64::NAN));
    };
    let ran = train_together(2, &config, 3, spoil);
    let errors: Vec<Error> = ran.into_iter().map(|ran| ran.unwrap_err()).collect();
    assert!(matches!(errors[1], Error::NonFinite { .. }) && matches!(errors[0], Error::Elsewhere { rank: 1, .. }));
    assert!(errors.iter().all(Error::is_not_finite), "{errors:?}");
    let run = fs::read_dir(&config.io.output_dir).unwrap().next().unwrap().unwrap().path();
    let log = log(&run);
    assert!(log.contains("error: process 1: training stopped at gradient step"), "{log}");
    assert!(!log.contains("retry"), "it would come again: {log}");
}

#[test]
fn all_try_again_after_a_panic_of_one() {
    let (_folder, config) = workplace();
    let straight = train_together(2, &config, 0, |_, _, _| {}).remove(0).unwrap();
    let panics = |rank: usize, model: &mut Bigram, _: &Arc<AtomicBool>| {
        model.hook = Some(Box::new(move |pass| assert!((rank, pass) != (1, 5), "a block fails")));
    };
    let ran: Vec<_> = train_together(2, &config, 1, panics).into_iter().map(Result::unwrap).collect();
    assert!(ran.iter().all(|ran| ran.2 == straight.2));
    let log = log(&ran[0].0);
    assert!(log.contains("retry 1 of 1 in 1 s: process 1: training panicked: a block fails"), "{log}");
}

#[test]
fn a_checkpoint_goes_on_with_another_number_of_processes() {
    let (_folder, mut config) = workplace();
    config.train.target_elements *= 3;
    for (before, after) in [(2, 3), (3, 1), (1, 2)] {
        let stop_early = |_: usize, model: &mut Bigram, stop: &Arc<AtomicBool>| {
            let raised = stop.clone();
            model.hook = Some(Box::new(move |pass| _ = raised.fetch_or(pass == 3, Ordering::Relaxed)));
        };
        let (run, outcome, _) = train_together(before, &config, 0, stop_early).remove(0).unwrap();
        assert_eq!(outcome.end, End::Stopped);
        let resumed: Vec<_> = resume_together(after, &run, &config).into_iter().map(Result::unwrap).collect();
        assert!(resumed.iter().all(|ran| ran.1 == resumed[0].1), "all have the same weights");
        let state = &resumed[0].0.state;
        assert_eq!((resumed[0].0.end, state.processes), (End::Finished, after));
        let target = config.train.target_elements;
        let batch = (after * config.train.batch_size * config.params.input_seq_len) as u64;
        assert!((target - batch..target + batch).contains(&state.elements_seen), "{} of {target}", state.elements_seen);
        let log = log(&run);
        assert!(log.contains(&format!("{after} process(es) instead of {before}")), "{log}");
        assert!(log.contains("each process now has another share of the data"), "{log}");
        assert!(log.contains("learning rate schedule now"), "{log}");
    }
}

#[test]
fn data_that_are_too_few_for_all_are_refused_by_all() {
    let (folder, mut config) = workplace();
    let len = config.params.input_seq_len;
    fs::write(folder.path().join("data.bin"), bytes(10 * len)).unwrap();
    (config.train.batch_size, config.train.target_elements) = (2, 20 * len as u64 * 2);
    let ran = train_together(3, &config, 0, |_, _, _| {});
    for (rank, ran) in ran.into_iter().enumerate() {
        let error = ran.unwrap_err();
        let want = "train.batch_size: found 2, but the training data are 5 sequence(s) of 16 bytes (input_seq_len), 1 for \
                    each of 3 processes";
        assert!(error.is_configuration() && error.to_string().contains(want), "process {rank}: {error}");
    }
    assert_eq!(outputs(&config), 0);
    config.train.batch_size = 1;
    let ran = train_together(3, &config, 0, |_, _, _| {});
    assert!(ran.into_iter().all(|ran| ran.unwrap().1.end == End::Finished), "5 sequences, one each");
}

#[test]
fn a_process_with_another_configuration_is_named() {
    let (_folder, config) = workplace();
    let errors = together(3, |processes| {
        let mut config = config.clone();
        if processes.rank() == 2 {
            config.train.learning_rate *= 2.0;
        }
        let (model, stop) = (Bigram::new(), never());
        let trained = Session { processes, ..session(&model, &config, &stop) }.train();
        trained.unwrap_err().to_string()
    });
    assert_eq!(outputs(&config), 0, "no folder is left");
    assert!(errors.iter().all(|error| error.contains("not the same configuration as in process 0")), "{errors:?}");
    assert!(errors[0].starts_with("process 2: "), "{errors:?}");
}

/// Validation is shared, and summed up as one process does.
#[test]
fn a_loss_that_several_measure_has_the_bits_of_one() {
    let (_folder, config) = workplace();
    let measure = |processes: &dyn crate::processes::Processes| {
        let model = Bigram::new();
        let splits = open_data(&config).unwrap();
        let trainer = Trainer::new(&model, splits, &config, processes).unwrap();
        trainer.measure_valid_loss(&never()).unwrap().unwrap().to_bits()
    };
    let one = measure(&Solo);
    assert!(together(4, measure).into_iter().all(|loss| loss == one));
    // Whoever is stopped: nobody has a loss.
    let stopped = together(3, |processes| {
        let model = Bigram::new();
        let trainer = Trainer::new(&model, open_data(&config).unwrap(), &config, processes).unwrap();
        trainer.measure_valid_loss(&AtomicBool::new(processes.rank() == 2)).unwrap()
    });
    assert_eq!(stopped, [None; 3]);
}
