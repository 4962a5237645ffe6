//! The `mblm` program. Each subcommand is a file with its arguments and one function that calls the library.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod commands;
mod exit;
mod log;
mod memory;
mod model;
mod orphan;
mod plugins;
mod processes;
mod signals;
mod streams;
mod trial;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use commands::{
    bench, blocks, check, checkpoint, compare, doctor, eval, generate, import, inspect, measure, plugin, report,
    run_of_study, schema, train,
};
use exit::{EXIT_CODES, EXIT_USAGE, Usage, is_closed_pipe, is_elsewhere, is_usage};
use mblm::base::terminal::{self, Output};
use mblm::plugin::host::blame;
use mblm_blocks as _;
use plugins::Plugins;
use processes::{Joined, Sharing};
use signals::Interrupted;

/// Train, compare and run Multiscale Byte Language Models.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    plugins: Plugins,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model from a YAML configuration, or resume a run
    Train(train::Args),
    /// Continue a prompt with a trained model
    Generate(generate::Args),
    /// Train variants of a model under one budget and report the best
    Compare(compare::Args),
    /// Compare existing runs: tables, charts and an HTML page
    Report(report::Args),
    /// Measure bits per byte of a trained model on your data
    Eval(eval::Args),
    /// Turn a checkpoint of the Python package (.pth) into a run
    Import(import::Args),
    /// List, verify and export the checkpoints of a run
    Checkpoint(checkpoint::Args),
    /// Validate a training configuration and its data, and print it with all defaults
    Check(check::Args),
    /// Count parameters, operations and memory of each stage
    Inspect(inspect::Args),
    /// Check a model before you train it: gradients, scales, causality, decoding
    Doctor(doctor::Args),
    /// List the available block types
    Blocks(blocks::Args),
    /// Print the JSON Schema of a configuration, for completion in editors
    Schema(schema::Args),
    /// Measure the speed of training, forward pass and generation on random bytes
    Bench(bench::Args),
    /// List, check, create and trust plugins: blocks that are compiled separately
    Plugin(plugin::Args),
    /// Open a plugin and report whether that worked
    #[command(name = plugins::PROBE, hide = true)]
    Probe(plugin::ProbeArgs),
    /// Measure the model of a study's run and print the result as JSON
    #[command(hide = true)]
    MeasureRun(measure::Args),
    /// Take a run of a study to its end, on the machine that the study's launcher chose
    #[command(name = mblm::study::ERRAND, hide = true)]
    RunOfStudy(run_of_study::Args),
}

fn main() -> ExitCode {
    memory::keep();
    log::start();
    blame::at_work(true);
    let code = work();
    blame::at_work(false);
    code
}

/// The `_exit` of plugins: an exit code of 0 from inside one is not that of the program.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[unsafe(no_mangle)]
extern "C" fn _exit(code: libc::c_int) -> ! {
    blame::end_process(code)
}

fn work() -> ExitCode {
    // On a thread of the pool, so that a parallel loop starts by handing out work, not by waking a thread and sleeping.
    terminal::hush(processes::is_another());
    let cli = match arguments() {
        Ok(cli) => cli,
        Err(_) if processes::is_another() => return EXIT_USAGE.into(),
        Err(answer) => return conclude(explain(&answer)),
    };
    catch_signals(&cli.command);
    let joined = match Joined::new(sharing(&cli.command)) {
        Ok(joined) => joined,
        Err(error) => return conclude(Err(error)),
    };
    // Until training begins, all would say the same.
    terminal::hush(joined.all().rank() > 0);
    let ended = joined.all_end(rayon::scope(|_| run(cli, &joined)));
    // One error, which the process shows that it happened in.
    terminal::hush(false);
    let code = conclude(ended);
    joined.wait();
    code
}

/// Says how the program ended.
fn conclude(ended: anyhow::Result<()>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<Interrupted>() {
            Some(interrupted) => interrupted.exit_code().into(),
            None => {
                if !is_elsewhere(&error) {
                    terminal::line(format_args!("error: {error:#}"));
                }
                ExitCode::from(if is_usage(&error) { EXIT_USAGE } else { 1 })
            }
        },
    }
}

fn arguments() -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&with_negative_numbers(Cli::command()).try_get_matches()?)
}

/// Has `--temperature -1` give the option the number -1, and not look for an option `-1`: what is wrong with the number is
/// then said by who reads it.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let takes_value = |arg: &clap::Arg| arg.get_long().is_some() && arg.get_action().takes_values();
    let command = command.mut_args(|arg| if takes_value(&arg) { arg.allow_negative_numbers(true) } else { arg });
    command.mut_subcommands(with_negative_numbers)
}

/// Has the commands told of a signal that have something to save, or something else to go on with; others end at once.
fn catch_signals(command: &Command) {
    match command {
        Command::Train(_) => {
            signals::catch(Some("stopping after this batch, with a checkpoint; repeat to stop immediately"))
        }
        Command::Compare(_) => signals::catch(Some("stopping the runs, with checkpoints; repeat to stop immediately")),
        Command::RunOfStudy(_) => signals::catch(None),
        Command::Generate(args) if args.is_interactive() => signals::catch(None),
        _ => {}
    }
}

/// What clap has to say: help, the version, or what is wrong with the arguments.
fn explain(answer: &clap::Error) -> anyhow::Result<()> {
    if answer.use_stderr() {
        // As plain text: the arguments in it may be the names of files.
        let text = answer.to_string();
        return Err(Usage(text.trim_start_matches("error: ").trim_end().into()).into());
    }
    streams::check_output()?;
    let text = answer.render();
    let text = if std::io::stdout().is_terminal() { text.ansi().to_string() } else { text.to_string() };
    let mut out = Output::raw();
    Ok(out.write_all(text.as_bytes()).and_then(|()| out.flush())?)
}

/// What several copies of the program may do with a command.
fn sharing(command: &Command) -> Sharing {
    match command {
        Command::Train(_) | Command::Eval(_) => Sharing::Together,
        Command::Compare(_)
        | Command::RunOfStudy(_)
        | Command::Report(_)
        | Command::Import(_)
        | Command::Checkpoint(_) => Sharing::Alone,
        _ => Sharing::Each,
    }
}

fn run(Cli { plugins, command }: Cli, joined: &Joined) -> anyhow::Result<()> {
    // What these two make is in folders, and takes long.
    if !matches!(command, Command::Train(_) | Command::Compare(_)) {
        streams::check_output()?;
    }
    match command {
        // Its product is the run, whether or not anybody can read of it.
        Command::Train(args) => return train::run(&args, &plugins, joined),
        Command::Generate(args) => generate::run(&args, &plugins),
        Command::Compare(args) => compare::run(&args, &plugins),
        Command::Report(args) => report::run(&args),
        Command::Eval(args) => eval::run(&args, &plugins, joined),
        Command::Import(args) => import::run(&args, &plugins),
        Command::Checkpoint(args) => checkpoint::run(&args),
        Command::Check(args) => check::run(&args, &plugins),
        Command::Inspect(args) => inspect::run(&args, &plugins),
        Command::Doctor(args) => doctor::run(&args, &plugins),
        Command::Blocks(args) => blocks::run(&args, &plugins),
        Command::Schema(args) => schema::run(&args, &plugins),
        Command::Bench(args) => bench::run(&args, &plugins),
        Command::Plugin(args) => plugin::run(&args, &plugins),
        Command::MeasureRun(args) => measure::run(&args, &plugins),
        Command::RunOfStudy(args) => run_of_study::run(&args, &plugins),
        Command::Probe(args) => {
            plugin::probe(&args);
            Ok(())
        }
    }?;
    streams::check_output()?;
    Ok(Output::new().flush()?)
}
