//! Threads, memory and panics.

use mblm_sdk::abi;
use mblm_sdk::mode::Mode;

use super::PANIC_VARIABLE;
use super::rig::{Gradients, input};
use super::{Outcome, Subject};
use crate::plugin::host::ParamValues;

/// Threads that call at once.
const THREADS: usize = 4;
/// Rounds of each.
const ROUNDS: usize = 20;

/// Instances on several threads at once give what one gives alone; so does one instance that says it may be shared.
pub(super) fn threads(subject: &Subject) -> Result<Outcome, String> {
    let dims = subject.rig(1)?.dims(2, 7);
    let (x, dy) = (input(dims, 17), input(dims, 18));
    let run = |rig: &super::rig::Rig| -> Result<Gradients, String> {
        match rig.can_train() {
            true => rig.train(dims, &x, &dy),
            false => Ok(Gradients { y: rig.forward(dims, &x, Mode::Eval)?.0, dx: vec![], dparams: vec![] }),
        }
    };
    let want = run(&subject.rig(1)?)?;
    let hold = |rig: &super::rig::Rig| {
        (0..ROUNDS).try_for_each(|_| {
            let got = run(rig)?;
            let pairs = [(&got.y, &want.y), (&got.dx, &want.dx)];
            let pairs = pairs.into_iter().chain(got.dparams.iter().zip(&want.dparams));
            match pairs.into_iter().find_map(|(got, want)| mblm_sdk::testing::difference(got, want, 1e-5)) {
                Some(difference) => Err(format!("called from several threads at once: {difference}")),
                None => Ok(()),
            }
        })
    };
    let shared = subject.rig(1)?;
    let concurrent = shared.instance.can(abi::CONCURRENT);
    let all: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let start = |_| {
            scope.spawn(|| match concurrent {
                true => hold(&shared).and_then(|()| hold(&subject.rig(1)?)),
                false => hold(&subject.rig(1)?),
            })
        };
        let threads: Vec<_> = (0..THREADS).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    all.into_iter().collect::<Result<Vec<()>, _>>()?;
    // Made on one thread, used on another, destroyed on a third.
    let moved = std::thread::scope(|scope| scope.spawn(|| subject.rig(1)).join());
    let moved = moved.unwrap_or_else(|_| Err("a thread panicked".into()))?;
    hold(&moved)?;
    std::thread::scope(|scope| drop(scope.spawn(move || drop(moved))));
    let kind = if concurrent { "one shared instance and one each" } else { "an instance each" };
    Ok(Outcome::Passed(format!("{THREADS} threads, {kind}")))
}

/// Creating, running and destroying everything again and again leaves memory as it was.
pub(super) fn leaks(subject: &Subject) -> Result<Outcome, String> {
    const WARM_UP: usize = 300;
    const COUNTED: usize = 1000;
    /// Less than a small struct per round.
    const ALLOWED_KIB: u64 = 256;
    let round = || -> Result<(), String> {
        let rig = subject.rig(1)?;
        let dims = rig.dims(1, 3);
        let x = input(dims, 19);
        if rig.can_train() {
            rig.train(dims, &x, &x)?;
            drop(rig.forward(dims, &x, super::rig::MODE)?);
        }
        rig.forward(dims, &x, Mode::Eval)?;
        if rig.instance.can(abi::STEP) {
            let values = rig.values();
            let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            let params = ParamValues { values: &slices, version: 1 };
            let state = rig.instance.state(params, 1).map_err(|error| error.to_string())?;
            drop(state.try_clone());
        }
        Ok(())
    };
    let Some(_) = resident_kib() else {
        return Ok(Outcome::Skipped("this system does not tell how much memory is in use".into()));
    };
    (0..WARM_UP).try_for_each(|_| round())?;
    let before = resident_kib().unwrap_or_default();
    (0..COUNTED).try_for_each(|_| round())?;
    let grown = resident_kib().unwrap_or_default().saturating_sub(before);
    match grown > ALLOWED_KIB {
        true => Err(format!("{COUNTED} rounds grew memory by {grown} KiB, more than {ALLOWED_KIB}")),
        false => Ok(Outcome::Passed(format!("{COUNTED} rounds, {grown} KiB"))),
    }
}

/// Resident memory of this process.
fn resident_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The Rust SDK panics in `forward` where [`PANIC_VARIABLE`] is set, which whoever runs this check does.
pub(super) fn panic(subject: &Subject) -> Result<Outcome, String> {
    if std::env::var_os(PANIC_VARIABLE).is_none() {
        return Err(format!("{PANIC_VARIABLE} must be set before the plugin is opened"));
    }
    let rig = subject.rig(1)?;
    let dims = rig.dims(1, 2);
    match rig.forward(dims, &input(dims, 20), Mode::Eval) {
        Ok(_) => Ok(Outcome::Skipped("cannot be tested: not made with the Rust SDK".into())),
        Err(error) if !error.contains("panicked") => Err(format!("expected a panic as an error, found: {error}")),
        Err(_) => match rig.forward(dims, &input(dims, 20), Mode::Eval) {
            Ok(_) => Err("the instance can be used after a panic".into()),
            Err(_) => Ok(Outcome::Passed("an error, after which the instance refuses calls".into())),
        },
    }
}
