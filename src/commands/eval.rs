//! `mblm eval`: the bits per byte of a model on data.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use mblm::base::terminal::Output;
use mblm::study::report::inert;
use mblm::train::documents::{Documents, Reach, evaluate_documents};
use mblm::train::evaluate::{EvaluateOptions, Evaluation, Parts, evaluate, evaluate_parts};
use mblm::train::model::Model;
use serde_json::json;

use crate::exit::Usage;
use crate::model::{self, Trained};
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
    /// The context that bytes are predicted from: none before the sequence of `input_seq_len` bytes that they are in; all bytes
    /// of the file before them; or a window of `input_seq_len` bytes that slides over the file
    #[arg(long, value_enum, default_value = "none")]
    context: Context,
    /// With --context slide: the bytes that the window moves by [default: half the window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Show bits per byte for each file
    #[arg(long)]
    files: bool,
    /// Show bits per byte for each byte position within a patch
    #[arg(long)]
    positions: bool,
    /// Write the losses of each file, and of each position of each stage (or place in the document), to this CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--context` may be.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Context {
    /// Sequences of `input_seq_len` bytes, each without context
    None,
    /// All bytes of the file before
    Whole,
    /// A window of `input_seq_len` bytes
    Slide,
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
    if args.stride.is_some() && args.context != Context::Slide {
        return Err(Usage("--stride is for --context slide".into()).into());
    }
    if let Some(reach) = args.context.reach(args.stride.unwrap_or(options.seq_len.div_ceil(2))) {
        return with_context(args, &trained, &options, reach, joined);
    }
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
        write_csv(path, &csv(parts)?)?;
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

impl Context {
    fn reach(self, stride: usize) -> Option<Reach> {
        match self {
            Context::None => None,
            Context::Whole => Some(Reach::Whole),
            Context::Slide => Some(Reach::Slide(stride)),
        }
    }
}

/// Evaluates documents, each byte with the context before it.
fn with_context(
    args: &Args,
    trained: &Trained,
    options: &EvaluateOptions,
    reach: Reach,
    joined: &Joined,
) -> Result<()> {
    if args.positions {
        return Err(Usage(
            "--positions is for --context none: with context, the table shows the place in the document".into(),
        )
        .into());
    }
    if matches!(trained.model, Model::Masked(_)) {
        return Err(Usage("--context does not support encoders".into()).into());
    }
    if joined.all().size() > 1 {
        return Err(Usage("--context runs in one process".into()).into());
    }
    let documents = evaluate_documents(trained.generative()?, &args.data, options, reach)?;
    if let Some(path) = &args.csv {
        write_csv(path, &csv_of_documents(&documents)?)?;
    }
    let (Documents { all, words, depths, files, limit }, mut out) = (&documents, Output::new());
    let of = |found: &Evaluation| json!({"bytes": found.bytes, "loss": found.loss, "bpb": found.bpb()});
    if args.json {
        let mut json = of(all);
        json["checkpoint"] = json!(trained.checkpoint.to_string_lossy());
        json["data"] = json!(args.data);
        json["context"] = json!(args.context.to_possible_value().map(|value| value.get_name().to_owned()));
        json["begins_anew_after"] = json!(limit);
        json["words"] = json!(words);
        json["word_perplexity"] = json!(documents.word_perplexity());
        json["depths"] = depths.iter().map(|(from, found)| with(of(found), "from", json!(from))).collect();
        json["files"] =
            files.iter().map(|(path, found)| with(of(found), "path", json!(path.to_string_lossy()))).collect();
        return Ok(writeln!(out, "{json}")?);
    }
    writeln!(out, "{:.4} bpb  (loss {:.4} nats) on {} bytes of {}", all.bpb(), all.loss, all.bytes, args.data)?;
    let perplexity = match documents.word_perplexity() {
        small if small < 1e6 => format!("{small:.1}"),
        large => format!("{large:.3e}"),
    };
    if *words > 0 {
        writeln!(out, "{perplexity} perplexity per word, of {words} word{}", if *words == 1 { "" } else { "s" })?;
    }
    if let Some(limit) = limit {
        writeln!(
            out,
            "note: in files longer than {limit} bytes, where the positions of stage 1 end, the context begins anew every {limit} bytes"
        )?;
    }
    if args.files {
        print_files(&mut out, files)?;
    }
    writeln!(out, "\n{:>8} {:>12}  from byte of the document", "bpb", "bytes")?;
    let worst = depths.iter().map(|(_, found)| found.bpb()).fold(f64::MIN_POSITIVE, f64::max);
    for (from, found) in depths {
        let bar = "▇".repeat((found.bpb() / worst * BAR) as usize);
        writeln!(out, "{:>8.4} {:>12}  {from:>9} {bar}", found.bpb(), found.bytes)?;
    }
    Ok(())
}

fn with(mut json: serde_json::Value, field: &str, value: serde_json::Value) -> serde_json::Value {
    json[field] = value;
    json
}

fn print_files(out: &mut Output, files: &[(PathBuf, Evaluation)]) -> io::Result<()> {
    writeln!(out, "\n{:>8} {:>12}  file", "bpb", "bytes")?;
    files
        .iter()
        .try_for_each(|(path, found)| writeln!(out, "{:>8.4} {:>12}  {}", found.bpb(), found.bytes, path.display()))
}

fn print(out: &mut Output, parts: &Parts, args: &Args) -> io::Result<()> {
    if args.files {
        print_files(out, &parts.files)?;
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

fn write_csv(path: &Path, text: &[u8]) -> Result<()> {
    let written = fs::write(path, text);
    Ok(written.map_err(|error| Usage(format!("--csv {}: {error}; choose a writable file", path.display())))?)
}

/// A table of losses, row by row.
struct Table(csv::Writer<Vec<u8>>);

impl Table {
    fn new() -> Result<Self> {
        let mut csv = csv::Writer::from_writer(vec![]);
        csv.write_record(["part", "name", "position", "bytes", "loss", "bpb"])?;
        Ok(Table(csv))
    }

    fn row(&mut self, part: &str, name: &str, position: &str, found: &Evaluation) -> Result<()> {
        let number = |number: f64| if found.bytes > 0 { number.to_string() } else { String::new() };
        let [bytes, loss, bpb] = [found.bytes.to_string(), number(found.loss), number(found.bpb())];
        Ok(self.0.write_record([part, name, position, &bytes, &loss, &bpb])?)
    }

    fn begin(&mut self, all: &Evaluation, files: &[(PathBuf, Evaluation)]) -> Result<()> {
        self.row("all", "", "", all)?;
        files.iter().try_for_each(|(path, found)| self.row("file", &inert(&path.to_string_lossy()), "", found))
    }
}

/// One row for everything, one per file, and one per position of each stage; stages and positions are counted from 1.
fn csv(parts: &Parts) -> Result<Vec<u8>> {
    let mut table = Table::new()?;
    table.begin(&parts.all, &parts.files)?;
    for (n, stage) in parts.stages.iter().enumerate() {
        for (at, found) in stage.iter().enumerate() {
            table.row("stage", &(n + 1).to_string(), &(at + 1).to_string(), found)?;
        }
    }
    Ok(table.0.into_inner()?)
}

/// One row for everything, one per file, and one per place in the document, from which on its bytes are counted.
fn csv_of_documents(documents: &Documents) -> Result<Vec<u8>> {
    let mut table = Table::new()?;
    table.begin(&documents.all, &documents.files)?;
    documents.depths.iter().try_for_each(|(from, found)| table.row("document", "", &from.to_string(), found))?;
    Ok(table.0.into_inner()?)
}
