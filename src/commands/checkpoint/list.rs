//! `mblm checkpoint list`: the checkpoints of a run, oldest first.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::train::checkpoint::{Entry, Shelf};
use mblm::train::evaluate::bpb;

/// Arguments of `mblm checkpoint list`.
#[derive(clap::Args)]
pub struct Args {
    /// A run folder
    run: PathBuf,
}

/// Runs `mblm checkpoint list`.
pub fn run(args: &Args) -> Result<()> {
    let entries = Shelf::of_run(&args.run)?.survey()?;
    let mut out = Output::new();
    writeln!(out, "checkpoint            step  valid loss     bpb        size")?;
    for entry in entries {
        let name = entry.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let dash = || "-".to_string();
        let step = entry.state.as_ref().map_or_else(dash, |state| state.step.to_string());
        let loss = entry.state.as_ref().and_then(|state| state.valid_loss);
        let (loss, bits) = match loss {
            Some(loss) => (format!("{loss:.4}"), format!("{:.4}", bpb(loss))),
            None => (dash(), dash()),
        };
        let size = entry.bytes.map_or_else(dash, |bytes| format!("{:.1} MB", bytes as f64 / 1e6));
        writeln!(out, "{name:16}  {step:>8}  {loss:>10}  {bits:>6}  {size:>10}  {}", remarks(&entry))?;
    }
    Ok(())
}

fn remarks(entry: &Entry) -> String {
    let whole = match &entry.fault {
        None => "whole".to_string(),
        Some(fault) => format!("damaged: {fault}"),
    };
    let marks = [(entry.is_newest, "newest"), (entry.is_best, "best")];
    let marks = marks.iter().filter(|(is, _)| *is).map(|(_, mark)| mark.to_string());
    marks.chain([whole]).collect::<Vec<_>>().join(", ")
}
