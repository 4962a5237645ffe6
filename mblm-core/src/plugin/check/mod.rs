//! Holding a plugin against the contract. Every check is a function of a [`Subject`]; `mblm plugin check` runs each in a
//! process of its own, so that a crash or a hang is a finding and not the end.

mod config;
mod decoding;
mod gradient;
mod life;
mod output;
mod rig;
mod table;

pub use mblm_sdk::plugin::PANIC_VARIABLE;
pub use rig::Subject;
use serde::{Deserialize, Serialize};

/// What a check found, other than a fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All is as the contract says; what was looked at.
    Passed(String),
    /// There is nothing to check; why.
    Skipped(String),
}

/// One check.
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What it asks for, in a line.
    pub about: &'static str,
    /// Whether it builds the block's model. Such a check makes no sense if a [trial](TRIALS) hangs.
    pub builds: bool,
    /// Looks; an error says what is wrong.
    pub run: fn(&Subject) -> Result<Outcome, String>,
}

/// All checks, in the order in which they make sense of each other.
pub const CHECKS: &[Check] = &[
    Check { name: "header", about: "magic, sizes and versions of the tables", builds: false, run: table::header },
    Check { name: "schema", about: "a JSON Schema that accepts the configuration", builds: false, run: table::schema },
    Check {
        name: "configs",
        about: "wrong configurations are refused, without a crash",
        builds: false,
        run: config::hostile,
    },
    Check { name: "params", about: "the list of parameters never changes", builds: true, run: config::params },
    Check { name: "outputs", about: "all outputs are written, and nothing else", builds: true, run: output::buffers },
    Check { name: "sizes", about: "batch 1, length 1, odd sizes, several layers", builds: true, run: output::sizes },
    Check {
        name: "reproducible",
        about: "outputs depend only on parameters and input",
        builds: true,
        run: output::reproducible,
    },
    Check { name: "causality", about: "no output depends on a later input", builds: true, run: output::causality },
    Check {
        name: "deterministic",
        about: "the same bits every time, if it says so",
        builds: true,
        run: output::deterministic,
    },
    Check {
        name: "gradients",
        about: "finite differences, for the input and every parameter",
        builds: true,
        run: gradient::finite,
    },
    Check {
        name: "accumulation",
        about: "gradients of parameters are added",
        builds: true,
        run: gradient::accumulation,
    },
    Check { name: "tapes", about: "two tapes at once, backward in either order", builds: true, run: gradient::tapes },
    Check {
        name: "decoding",
        about: "steps and prefill give the outputs of forward",
        builds: true,
        run: decoding::steps,
    },
    Check { name: "states", about: "states can be cloned, saved and loaded", builds: true, run: decoding::states },
    Check { name: "threads", about: "calls from several threads", builds: true, run: life::threads },
    Check { name: "leaks", about: "1,000 rounds of everything do not grow memory", builds: true, run: life::leaks },
    Check { name: "panic", about: "a panic becomes an error", builds: true, run: life::panic },
];

/// Makes a call that many checks make too.
pub struct Trial {
    /// The function of the contract that it is about.
    pub name: &'static str,
    /// Makes it. What it returns is for the checks to judge.
    pub run: fn(&Subject) -> Result<(), String>,
}

/// The calls that are tried before the checks, so that a hang in one takes the time limit once and not in every check.
pub const TRIALS: &[Trial] = &[
    Trial { name: "create", run: |subject| subject.rig(1).map(drop) },
    Trial { name: "forward", run: output::forward },
];
