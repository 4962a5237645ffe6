//! Holding a plugin against the contract. Every check is a function of a [`Subject`]; `mblm plugin check` runs each in a
//! process of its own, so that a crash or a hang is a finding and not the end.

mod config;
mod decoding;
mod gradient;
mod life;
mod output;
mod rig;
mod table;

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
    /// Looks; an error says what is wrong.
    pub run: fn(&Subject) -> Result<Outcome, String>,
}

/// All checks, in the order in which they make sense of each other.
pub const CHECKS: &[Check] = &[
    Check { name: "header", about: "magic, sizes and versions of the tables", run: table::header },
    Check { name: "schema", about: "a JSON Schema that accepts the configuration", run: table::schema },
    Check { name: "configs", about: "wrong configurations are refused, without a crash", run: config::hostile },
    Check { name: "params", about: "the list of parameters never changes", run: config::params },
    Check { name: "outputs", about: "outputs are written, all of them and nothing else", run: output::buffers },
    Check { name: "sizes", about: "batch 1, length 1, odd sizes, several layers", run: output::sizes },
    Check { name: "reproducible", about: "outputs follow from parameters and input alone", run: output::reproducible },
    Check { name: "causality", about: "no output depends on a later input", run: output::causality },
    Check { name: "deterministic", about: "the same bits again, if it says so", run: output::deterministic },
    Check { name: "gradients", about: "finite differences, for the input and every parameter", run: gradient::finite },
    Check { name: "accumulation", about: "gradients of parameters are added", run: gradient::accumulation },
    Check { name: "tapes", about: "two tapes at once, backward in either order", run: gradient::tapes },
    Check { name: "decoding", about: "steps and prefill give what forward gives", run: decoding::steps },
    Check { name: "states", about: "states can be cloned, saved and loaded", run: decoding::states },
    Check { name: "threads", about: "calls come from several threads", run: life::threads },
    Check { name: "leaks", about: "1,000 rounds of everything do not grow memory", run: life::leaks },
    Check { name: "panic", about: "a panic becomes an error", run: life::panic },
];

/// The environment variable that makes a plugin of the Rust SDK panic in `forward`.
pub const PANIC_VARIABLE: &str = "MBLM_PLUGIN_PANIC";
