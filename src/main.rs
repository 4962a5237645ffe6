//! The `mblm` program. Each subcommand is a file with its arguments and one function that calls the library.

mod bench;
mod blocks;
mod eval;
mod generate;
mod inspect;
mod model;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mblm::registry::BlockRegistry;
use mblm::{Error, train as training};
use mblm_blocks as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, which its bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// A mistake in a configuration or on the command line; clap uses the same code.
const EXIT_USAGE: u8 = 2;

/// Multiscale Byte Language Models.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model from a YAML configuration, or go on with a run
    Train(train::Args),
    /// Continue a prompt with a trained model
    Generate(generate::Args),
    /// Measure the bits per byte of a trained model on data
    Eval(eval::Args),
    /// Show what a configuration builds: parameters, operations and memory of each stage
    Inspect(inspect::Args),
    /// List the block types that a configuration can use
    Blocks(blocks::Args),
    /// Measure training, forward and generation on random bytes
    Bench(bench::Args),
}

fn main() -> ExitCode {
    // SAFETY: sets an integer option of the allocator, before any other thread exists. -1: memory that was used once
    // is kept, since giving it back and getting it again costs more than the copy that fills it.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    let command = Cli::parse().command;
    // On a thread of the pool, so that a parallel loop starts by handing out work, not by waking a thread and sleeping.
    match rayon::scope(|_| run(command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if is_usage(&error) { EXIT_USAGE } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let registry = BlockRegistry::builtin()?;
    match command {
        Command::Train(args) => train::run(&args, &registry),
        Command::Generate(args) => generate::run(&args, &registry),
        Command::Eval(args) => eval::run(&args, &registry),
        Command::Inspect(args) => inspect::run(&args, &registry),
        Command::Blocks(args) => blocks::run(&args, &registry),
        Command::Bench(args) => bench::run(&args, &registry),
    }
}

/// A mistake on the command line that clap cannot know of.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Usage>()
        || error.is::<mblm::yaml::ConfigError>()
        || matches!(error.downcast_ref::<Error>(), Some(Error::Config(_) | Error::Input(_)))
        || error.downcast_ref::<training::Error>().is_some_and(|error| error.is_configuration())
}

/// Whoever reads our output, such as `head`, has had enough.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe;
    match error.downcast_ref::<Error>() {
        Some(Error::Io(error)) => closed(error),
        _ => error.downcast_ref::<std::io::Error>().is_some_and(closed),
    }
}
