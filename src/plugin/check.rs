//! `mblm plugin check`: a plugin against the contract, each check in a process of its own.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use mblm::plugin::check::{CHECKS, Check, Outcome, PANIC_VARIABLE, Subject};
use mblm::plugin::host::Library;
use mblm::plugin::host::probe::{fate, wait};
use mblm::train::terminal::Output;

use crate::Usage;

/// What a check's answer begins with, amid anything that a plugin may print.
const ANSWER: &str = "mblm-check:";

/// Arguments of `mblm plugin check`.
#[derive(clap::Args)]
pub struct Args {
    /// The shared library
    file: PathBuf,
    /// Check this block alone
    #[arg(long, value_name = "TYPE")]
    block: Option<String>,
    /// The fields of the block as a JSON object [default: made up from its schema]
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Run this check alone; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Seconds that a check may take
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Run the check in this process (for internal use)
    #[arg(long, hide = true)]
    here: bool,
}

enum Verdict {
    Passed(String),
    Skipped(String),
    Failed(String),
}

/// Runs `mblm plugin check`.
pub fn run(args: &Args) -> Result<()> {
    let names: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
    if let Some(unknown) = args.only.iter().find(|only| !names.contains(&only.as_str())) {
        let suggestion = mblm::nearest::suggestion(unknown, &names);
        return Err(Usage(format!("--only: unknown check {unknown:?}; {suggestion}")).into());
    }
    let mut wanted =
        CHECKS.iter().filter(|check| args.only.is_empty() || args.only.iter().any(|only| only == check.name));
    if args.here {
        return wanted.try_for_each(|check| answer(args, check));
    }
    let library = super::open(&args.file)?;
    let origin = library.origin();
    let mut out = Output::new();
    writeln!(out, "plugin {} {}  {}", origin.name, origin.version, origin.path.display())?;
    let blocks = library.blocks().iter().map(|block| block.block_type);
    let blocks: Vec<&str> = blocks.filter(|block| args.block.as_deref().is_none_or(|only| only == *block)).collect();
    if let (true, Some(block)) = (blocks.is_empty(), &args.block) {
        return Err(Usage(format!("{} has no block type {block:?}", args.file.display())).into());
    }
    let (wanted, mut faults): (Vec<&Check>, usize) = (wanted.collect(), 0);
    for block in blocks {
        let subject = Subject::new(library.clone(), block, args.config.as_deref()).map_err(Usage)?;
        writeln!(out, "\nblock {block}  {}", subject.config())?;
        for check in &wanted {
            match in_child(args, block, subject.config(), check)? {
                Verdict::Passed(text) => writeln!(out, "  passed   {:<15}{text}", check.name)?,
                Verdict::Skipped(text) => writeln!(out, "  skipped  {:<15}{text}", check.name)?,
                Verdict::Failed(text) => {
                    faults += 1;
                    writeln!(out, "  FAILED   {:<15}{}", check.name, check.about)?;
                    writeln!(out, "{:26}{text}", "")?;
                }
            }
        }
    }
    match faults {
        0 => Ok(writeln!(out, "\nno fault found")?),
        _ => Err(anyhow::anyhow!("{faults} check(s) failed")),
    }
}

/// Runs a check in a child.
fn in_child(args: &Args, block: &str, config: &str, check: &Check) -> Result<Verdict> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["plugin", "check", "--here", "--block", block, "--config", config, "--only", check.name]);
    command.arg(&args.file).stdin(Stdio::null()).stderr(Stdio::null());
    if check.name == "panic" {
        command.env(PANIC_VARIABLE, "1");
    }
    // A file, since a pipe that nobody reads would stop a child that prints much.
    let output = tempfile::NamedTempFile::new()?;
    let mut child = command.stdout(output.reopen()?).spawn()?;
    let limit = Duration::from_secs(args.limit);
    let Some(status) = wait(&mut child, limit) else {
        return Ok(Verdict::Failed(format!("did not end within {} s", args.limit)));
    };
    let output = String::from_utf8_lossy(&std::fs::read(output.path())?).into_owned();
    let answer = output.rsplit_once(ANSWER).map(|(_, answer)| answer.trim());
    let verdict = answer.and_then(|answer| answer.split_once(' '));
    Ok(match verdict {
        _ if !status.success() => Verdict::Failed(format!("the plugin {}", fate(status))),
        Some(("passed", text)) => Verdict::Passed(text.into()),
        Some(("skipped", text)) => Verdict::Skipped(text.into()),
        Some((_, text)) => Verdict::Failed(text.into()),
        None => Verdict::Failed(format!("the plugin {} before the check did", fate(status))),
    })
}

/// Runs a check here and prints what it found, in a line.
fn answer(args: &Args, check: &Check) -> Result<()> {
    let outcome = subject(&args.file, args).and_then(|subject| (check.run)(&subject));
    let (word, text) = match outcome {
        Ok(Outcome::Passed(text)) => ("passed", text),
        Ok(Outcome::Skipped(text)) => ("skipped", text),
        Err(text) => ("failed", text),
    };
    Ok(writeln!(Output::new(), "\n{ANSWER} {word} {}", text.replace('\n', " "))?)
}

fn subject(file: &Path, args: &Args) -> Result<Subject, String> {
    Subject::new(Library::open(file)?, args.block.as_deref().unwrap_or_default(), args.config.as_deref())
}
