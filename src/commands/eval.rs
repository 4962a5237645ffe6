//! `mblm eval`: the bits per byte of a model on data.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::study::report::inert;
use mblm::train::evaluate::{EvaluateOptions, Evaluation, Parts, evaluate, evaluate_parts};
use mblm::train::model::Model;
use serde_json::json;

use crate::exit::Usage;
use crate::model;
use crate::plugins::Plugins;
use crate::processes::Joined;

/// Bars of the positions within a patch: the worst is this wide.
const BAR: f64 = 40.0;

/// Arguments of `mblm eval`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// A file, a folder or a glob
    data: String,
    /// Sequences per batch [default: `train.batch_size`]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Read at most this many bytes
    #[arg(long)]
    max_bytes: Option<u64>,
    /// Show bits per byte for each file
    #[arg(long)]
    files: bool,
    /// Show bits per byte for each byte position within a patch
    #[arg(long)]
    positions: bool,
    /// Write the losses of each file, and of each position of each stage, to this CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `mblm eval`.
pub fn run(args: &Args, plugins: &Plugins, joined: &Joined) -> Result<()> {
    let model = model::Args { device: joined.device(args.model.device), ..args.model.clone() };
    let trained = joined.agree(model::load(&model, plugins))?;
    let hierarchy = trained.config.params.model.hierarchy();
    let options = EvaluateOptions {
        num_tokens: hierarchy.num_tokens,
        seq_len: trained.config.params.input_seq_len,
        batch_size: args.batch.map_or(trained.config.train.batch_size, |batch| batch as usize),
        cut: trained.config.params.cut().map(|cut| (cut, hierarchy.pad_token_id)),
        max_bytes: args.max_bytes,
    };
    let wants_parts = args.files || args.positions || args.csv.is_some();
    if wants_parts && matches!(trained.model, Model::Masked(_)) {
        return Err(Usage("--files, --positions and --csv do not support encoders".into()).into());
    }
    let parts = match wants_parts {
        true => Some(evaluate_parts(&trained.model, hierarchy, &args.data, &options, joined.all())?),
        false => None,
    };
    let found = match &parts {
        Some(parts) => parts.all,
        None => evaluate(&trained.model, &args.data, &options, joined.all())?,
    };
    if !joined.all().is_first() {
        return Ok(());
    }
    if let (Some(path), Some(parts)) = (&args.csv, &parts) {
        let written = fs::write(path, csv(parts)?);
        written.map_err(|error| Usage(format!("--csv {}: {error}; choose a writable file", path.display())))?;
    }
    let mut out = Output::new();
    if args.json {
        let mut json = json!({
            "checkpoint": trained.checkpoint.to_string_lossy(), "data": args.data, "bytes": found.bytes, "loss": found.loss, "bpb": found.bpb()
        });
        if let Some(parts) = &parts {
            let of = |found: &Evaluation| json!({"bytes": found.bytes, "loss": found.loss, "bpb": found.bpb()});
            json["files"] = parts
                .files
                .iter()
                .map(
                    |(path, found)| json!({"path": path.to_string_lossy(), "bytes": found.bytes, "loss": found.loss, "bpb": found.bpb()}),
                )
                .collect();
            json["stages"] = parts.stages.iter().map(|stage| stage.iter().map(of).collect::<Vec<_>>()).collect();
        }
        return Ok(writeln!(out, "{json}")?);
    }
    let (bpb, loss, bytes) = (found.bpb(), found.loss, found.bytes);
    writeln!(out, "{bpb:.4} bpb  (loss {loss:.4} nats) on {bytes} bytes of {}", args.data)?;
    Ok(parts.map_or(Ok(()), |parts| print(&mut out, &parts, args))?)
}

fn print(out: &mut Output, parts: &Parts, args: &Args) -> io::Result<()> {
    if args.files {
        writeln!(out, "\n{:>8} {:>12}  file", "bpb", "bytes")?;
        for (path, found) in &parts.files {
            writeln!(out, "{:>8.4} {:>12}  {}", found.bpb(), found.bytes, path.display())?;
        }
    }
    if let (true, Some(local)) = (args.positions, parts.stages.last()) {
        let what = if parts.stages.len() > 1 { "patch" } else { "sequence" };
        writeln!(out, "\n{:>8} {:>12}  byte within its {what}", "bpb", "bytes")?;
        let worst = local.iter().map(Evaluation::bpb).fold(f64::MIN_POSITIVE, f64::max);
        for (position, found) in local.iter().enumerate() {
            let bar = "▇".repeat((found.bpb() / worst * BAR) as usize);
            // A position may hold nothing but padding.
            let bpb = if found.bytes > 0 { format!("{:.4}", found.bpb()) } else { "-".into() };
            writeln!(out, "{bpb:>8} {:>12}  {:>5} {bar}", found.bytes, position + 1)?;
        }
    }
    Ok(())
}

/// One row for everything, one per file, and one per position of each stage; stages and positions are counted from 1.
fn csv(parts: &Parts) -> Result<Vec<u8>> {
    let mut csv = csv::Writer::from_writer(vec![]);
    csv.write_record(["part", "name", "position", "bytes", "loss", "bpb"])?;
    let mut row = |part: &str, name: &str, position: &str, found: &Evaluation| {
        let number = |number: f64| if found.bytes > 0 { number.to_string() } else { String::new() };
        let [bytes, loss, bpb] = [found.bytes.to_string(), number(found.loss), number(found.bpb())];
        csv.write_record([part, name, position, &bytes, &loss, &bpb])
    };
    row("all", "", "", &parts.all)?;
    for (path, found) in &parts.files {
        row("file", &inert(&path.to_string_lossy()), "", found)?;
    }
    for (n, stage) in parts.stages.iter().enumerate() {
        for (at, found) in stage.iter().enumerate() {
            row("stage", &(n + 1).to_string(), &(at + 1).to_string(), found)?;
        }
    }
    Ok(csv.into_inner()?)
}
