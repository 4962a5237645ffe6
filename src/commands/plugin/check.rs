//! `mblm plugin check`: a plugin against the contract. Everything that runs the plugin's code runs in a child process
//! with a time limit: opening the library, finding a configuration, and each check.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::plugin::check::{CHECKS, Check, Outcome, PANIC_VARIABLE, Subject, TRIALS};
use mblm::plugin::host::Library;
use mblm::plugin::host::child::{self, Ended, fate};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::exit::Usage;

/// Arguments of `mblm plugin check`.
#[derive(clap::Args)]
pub struct Args {
    /// The shared library
    file: PathBuf,
    /// Check only this block
    #[arg(long, value_name = "TYPE")]
    block: Option<String>,
    /// The fields of the block as a JSON object [default: generated from its schema]
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Run only this check; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Time limit of each check in seconds
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Answer a question in this process (for internal use)
    #[arg(long, hide = true)]
    here: bool,
}

/// What an opened library says of itself.
#[derive(Serialize, Deserialize)]
struct About {
    name: String,
    version: String,
    blocks: Vec<String>,
}

impl About {
    fn of(library: &Library) -> Self {
        let blocks = library.blocks().iter().map(|block| block.block_type.to_string());
        About {
            name: library.origin().name.clone(),
            version: library.origin().version.clone(),
            blocks: blocks.collect(),
        }
    }
}

/// Runs `mblm plugin check`.
pub fn run(args: &Args) -> Result<()> {
    if args.here {
        answer(args);
        return Ok(());
    }
    let names: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
    if let Some(unknown) = args.only.iter().find(|only| !names.contains(&only.as_str())) {
        let suggestion = mblm::base::nearest::suggestion(unknown, &names);
        return Err(Usage(format!("--only: unknown check {unknown:?}; {suggestion}")).into());
    }
    let mut report = Findings { out: Output::new(), file: super::library_file(&args.file)?, args, faults: 0 };
    let about: About = match report.ask(&[], None)? {
        Ok(about) => about,
        Err(fault) => {
            writeln!(report.out, "plugin {}", report.file.display())?;
            report.failed("opening", "the library loads, and its tables are valid", &fault)?;
            return report.end();
        }
    };
    writeln!(report.out, "plugin {} {}  {}", about.name, about.version, report.file.display())?;
    let is_wanted = |block: &&String| args.block.as_ref().is_none_or(|only| only == *block);
    let blocks: Vec<&String> = about.blocks.iter().filter(is_wanted).collect();
    if let (true, Some(block)) = (blocks.is_empty(), &args.block) {
        let suggestion =
            mblm::base::nearest::suggestion(block, &about.blocks.iter().map(String::as_str).collect::<Vec<_>>());
        return Err(Usage(format!("{} has no block type {block:?}; {suggestion}", report.file.display())).into());
    }
    blocks.into_iter().try_for_each(|block| report.block(block))?;
    report.end()
}

/// What is asked of children, and what is printed.
struct Findings<'a> {
    out: Output,
    file: PathBuf,
    args: &'a Args,
    faults: usize,
}

impl Findings<'_> {
    /// Finds a configuration for a block, and runs the checks.
    fn block(&mut self, block: &str) -> Result<()> {
        let given = self.args.config.iter().flat_map(|config| ["--config", config]);
        let question: Vec<&str> = ["--block", block].into_iter().chain(given).collect();
        let config: String = match self.ask(&question, None)? {
            Ok(config) => config,
            Err(fault) => {
                writeln!(self.out, "\nblock {block}")?;
                return self.failed("configuration", "the block accepts a configuration that fits its schema", &fault);
            }
        };
        writeln!(self.out, "\nblock {block}  {config}")?;
        let is_wanted =
            |check: &&Check| self.args.only.is_empty() || self.args.only.iter().any(|only| only == check.name);
        let checks: Vec<&Check> = CHECKS.iter().filter(is_wanted).collect();
        let mut hanging = None;
        if checks.iter().any(|check| check.builds) {
            hanging = self.hanging(block, &config)?;
        }
        for check in checks {
            if let Some(call) = hanging.filter(|_| check.builds) {
                writeln!(self.out, "  skipped  {:<15}not tried: {call} hangs", check.name)?;
                continue;
            }
            let variable = (check.name == "panic").then_some(PANIC_VARIABLE);
            match self.ask(&["--block", block, "--config", &config, "--only", check.name], variable)? {
                Ok(Outcome::Passed(text)) => writeln!(self.out, "  passed   {:<15}{text}", check.name)?,
                Ok(Outcome::Skipped(text)) => writeln!(self.out, "  skipped  {:<15}{text}", check.name)?,
                Err(fault) => self.failed(check.name, check.about, &fault)?,
            }
        }
        Ok(())
    }

    /// The first function of the block that does not return, which is a fault.
    fn hanging(&mut self, block: &str, config: &str) -> Result<Option<&'static str>> {
        for trial in TRIALS {
            let question = ["--block", block, "--config", config, "--only", trial.name];
            let ended: Ended<Result<(), String>> = self.child(&question, None)?;
            if ended.status.is_none() {
                let fault = format!("the plugin did not finish within {} s", self.args.limit);
                self.failed(trial.name, "the call returns", &fault)?;
                return Ok(Some(trial.name));
            }
        }
        Ok(None)
    }

    /// Has a child of this program answer, and makes a fault of however else it ends.
    fn ask<T: DeserializeOwned>(&self, question: &[&str], variable: Option<&str>) -> Result<Result<T, String>> {
        let ended = self.child(question, variable)?;
        let fault = match (ended.status, ended.answer) {
            (Some(status), Some(answer)) if status.success() => return Ok(answer),
            (Some(status), _) => format!("the plugin {} in a call", fate(status)),
            (None, _) => format!("the plugin did not finish within {} s", self.args.limit),
        };
        Ok(Err(ended.error.map_or(fault.clone(), |error| format!("{fault}\n{error}"))))
    }

    /// Asks a child of this program.
    fn child<T: DeserializeOwned>(&self, question: &[&str], variable: Option<&str>) -> Result<Ended<T>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["plugin", "check", "--here"]).args(question).arg("--").arg(&self.file);
        command.envs(variable.map(|name| (name, "1")));
        Ok(child::ask(command, Duration::from_secs(self.args.limit))?)
    }

    fn failed(&mut self, name: &str, about: &str, fault: &str) -> Result<()> {
        self.faults += 1;
        writeln!(self.out, "  FAILED   {name:<15}{about}")?;
        Ok(fault.lines().try_for_each(|line| writeln!(self.out, "{:26}{line}", ""))?)
    }

    fn end(mut self) -> Result<()> {
        match self.faults {
            0 => Ok(writeln!(self.out, "\nno fault found")?),
            faults => Err(anyhow::anyhow!("{faults} check(s) failed")),
        }
    }
}

/// The child's side: opens the library, or finds a configuration of a block, or runs a trial or a check.
fn answer(args: &Args) {
    child::end_with_parent();
    let library = Library::open(&args.file);
    let subject = |block: &str| Subject::new(library.clone()?, block, args.config.as_deref());
    let is_asked = |name: &str| args.only.iter().any(|only| only == name);
    let trial = TRIALS.iter().find(|trial| is_asked(trial.name));
    if let (Some(block), Some(trial)) = (&args.block, trial) {
        return child::answer(&subject(block).and_then(|subject| (trial.run)(&subject)));
    }
    match (&args.block, CHECKS.iter().find(|check| is_asked(check.name))) {
        (None, _) => child::answer(&library.as_ref().map(|library| About::of(library))),
        (Some(block), None) => child::answer(&subject(block).map(|subject| subject.config().to_string())),
        (Some(block), Some(check)) => child::answer(&subject(block).and_then(|subject| (check.run)(&subject))),
    }
}
