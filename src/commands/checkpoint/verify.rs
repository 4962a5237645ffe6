//! `mblm checkpoint verify`: every file against the SHA-256 in its checkpoint's manifest, and every number for being finite.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use mblm::base::terminal::Output;
use mblm::train::checkpoint::{Shelf, check, shelf_of};

/// Arguments of `mblm checkpoint verify`.
#[derive(clap::Args)]
pub struct Args {
    /// A run folder (all its checkpoints are verified), or one checkpoint
    path: PathBuf,
}

/// Runs `mblm checkpoint verify`.
pub fn run(args: &Args) -> Result<()> {
    // By its full name, a checkpoint that was given as `.` tells where its older ones are.
    let path = std::fs::canonicalize(&args.path).unwrap_or_else(|_| args.path.clone());
    let shelf = match shelf_of(&path) {
        Some(shelf) => shelf,
        None => Shelf::of_run(&args.path)?,
    };
    let paths = if shelf_of(&path).is_some() { vec![path] } else { shelf.list()? };
    if paths.is_empty() {
        bail!("{}: no checkpoint yet", args.path.display());
    }
    let (mut out, mut shown, mut damaged) = (Output::new(), Ok(()), Vec::new());
    for path in paths {
        let checked = check(&path);
        let verdict = if checked.is_ok() { "whole" } else { "damaged" };
        shown = shown.and(writeln!(out, "{}: {verdict}", path.display()));
        damaged.extend(checked.err().map(|fault| (path, fault)));
    }
    let Some((newest, _)) = damaged.last() else { return Ok(shown?) };
    let older = shelf.list()?.into_iter().rev().skip_while(|path| path >= newest).find(|path| check(path).is_ok());
    let older = match older {
        Some(older) => format!("{} is intact; to continue from there, move the damaged ones away", older.display()),
        None => "no older checkpoint is intact".into(),
    };
    let faults: Vec<String> = damaged.iter().map(|(_, fault)| fault.to_string()).collect();
    bail!("{}; {older}", faults.join("; "))
}
