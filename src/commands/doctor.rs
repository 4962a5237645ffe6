//! `mblm doctor`: what a configuration's model is like before it is trained.

use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use candle_core::{DType, Device};
use mblm::base::random::noise;
use mblm::base::terminal::Output;
use mblm::data::files::corpus::Corpus;
use mblm::device::{DeviceName, Place};
use mblm::model::Sequences;
use mblm::train::config::ModelConfig;
use mblm::train::cost::{Step, bytes as shown_bytes};
use mblm::train::doctor::{Examination, Severity, examine};
use mblm::yaml::Document;

use crate::commands::inspect::Described;
use crate::commands::{inspect, train};
use crate::exit::Usage;
use crate::plugins::Plugins;
use crate::trial;

/// The share of bytes that an encoder has to restore, if the configuration does not say.
const MASKING: f64 = 0.15;

/// Arguments of `mblm doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// A model configuration, or a training configuration
    config: PathBuf,
    /// Read bytes from this file, folder or glob [default: random bytes]
    #[arg(long, value_name = "FILE")]
    data: Option<String>,
    /// Sequences in the step
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Where to run: cpu, cuda, cuda:N, metal or auto [default: `train.device`, or cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
    /// Compute in f64 on the CPU, composed of candle's ops: gradients without the rounding of f32
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Type,
    /// Seed of the initial weights and the random bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Override a field of the configuration, e.g. `--set params.num_layers=[4,2]`; may be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Type {
    F32,
    F64,
}

impl Args {
    /// Where to run a model that trains on `device`.
    fn place(&self, device: DeviceName) -> Result<Place> {
        match (self.dtype, self.device) {
            (Type::F32, named) => Ok(named.unwrap_or(device).open()?.into()),
            (Type::F64, None | Some(DeviceName::Cpu)) => Ok(Place { device: Device::Cpu, dtype: DType::F64 }),
            (Type::F64, Some(named)) => {
                Err(Usage(format!("--dtype f64 runs on the CPU; found --device {named}")).into())
            }
        }
    }
}

/// Runs `mblm doctor`; an error if it found a problem.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let mut document = Document::read(&args.config)?;
    args.set.iter().try_for_each(|assignment| document.set(assignment))?;
    let Described { config, step, device, optimizer, .. } =
        inspect::read(&document, &plugins.registry(Some(&args.config))?)?;
    let hierarchy = config.hierarchy();
    // With one patch alone nothing would pass from the first stage's embedding to the loss.
    let two_patches = 2 * hierarchy.seq_lens[1..].iter().product::<usize>();
    let shape = (args.batch as usize, step.bytes.max(two_patches).min(hierarchy.context_len().max(step.bytes)));
    let ids = match &args.data {
        Some(place) => read(place, shape.0 * shape.1, hierarchy.num_tokens)?,
        None => random(shape.0 * shape.1, args.seed, &config),
    };
    train::must_fit(&config, Step { batch: shape.0, bytes: shape.1 }, optimizer)?;
    let (ids, len) = trial::fitting(hierarchy, &ids, shape.1)?;
    let sequences = Sequences { ids: &ids, len, loss_mask: None };
    let report = examine(&config, MASKING, args.seed, &sequences, args.place(device)?)?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { table(&report) };
    let shown = Output::new().write_all(text.as_bytes());
    match report.findings.iter().filter(|finding| finding.severity == Severity::Problem).count() {
        0 => Ok(shown?),
        count => anyhow::bail!("{}: {count} problem(s), listed above", args.config.display()),
    }
}

/// Bytes of the vocabulary but for the pad token.
fn random(count: usize, seed: u64, config: &ModelConfig) -> Vec<u32> {
    let model = config.hierarchy();
    let bytes: Vec<u32> =
        (0..model.num_tokens.min(256) as u32).filter(|&id| id as usize != model.pad_token_id).collect();
    let at = |noise: &f32| ((noise + 1.0) / 2.0 * bytes.len() as f32) as usize;
    noise(count, seed + 1).iter().map(|noise| bytes[at(noise).min(bytes.len() - 1)]).collect()
}

fn read(place: &str, count: usize, num_tokens: usize) -> Result<Vec<u32>> {
    let corpus = Corpus::open(place, &[])?;
    if corpus.len() < count as u64 {
        return Err(Usage(format!(
            "--data {place}: expected at least {count} bytes for one step, found {}; use more data or a smaller --batch",
            corpus.len()
        ))
        .into());
    }
    if let Some((byte, path, _)) = corpus.first_at_least(num_tokens)? {
        let path = path.display();
        return Err(Usage(format!("--data {path}: contains the byte {byte}; expected bytes below {num_tokens}")).into());
    }
    let mut ids = vec![0; count];
    corpus.read(0, &mut ids)?;
    Ok(ids)
}

fn table(report: &Examination) -> String {
    let mut text = String::new();
    let ms = |seconds: f64| format!("{:.1} ms", 1e3 * seconds);
    // Writing to a string cannot fail.
    let _ = write_tables(&mut text, report, ms);
    text
}

fn write_tables(text: &mut String, report: &Examination, ms: impl Fn(f64) -> String) -> std::fmt::Result {
    writeln!(
        text,
        "one step of {} x {} bytes, {} parameters: loss {:.4} nats (guessing costs {:.4})\n",
        report.batch, report.bytes, report.parameters, report.loss, report.uniform_loss
    )?;
    writeln!(
        text,
        "{:<30} {:>9} {:>9} {:>11} {:>11} {:>10} {:>10} {:>11}",
        "stage", "input", "output", "gradient", "at input", "forward", "backward", "memory"
    )?;
    let mut rest = (report.forward_seconds, report.backward_seconds);
    for stage in &report.stages {
        let seen = &stage.seen;
        rest = (rest.0 - seen.forward_seconds, rest.1 - seen.backward_seconds);
        let name = format!(
            "{} {} x{} ({} x {})",
            stage.stage, stage.block_type, stage.num_layers, stage.seq_len, stage.hidden_dim
        );
        writeln!(
            text,
            "{name:<30} {:>9.3} {:>9.3} {:>11.2e} {:>11.2e} {:>10} {:>10} {:>11}",
            seen.input.rms(),
            seen.output.rms(),
            seen.output_gradient.rms(),
            seen.input_gradient.rms(),
            ms(seen.forward_seconds),
            ms(seen.backward_seconds),
            shown_bytes(seen.memory as f64)
        )?;
    }
    let (forward, backward) = (ms(rest.0.max(0.0)), ms(rest.1.max(0.0)));
    writeln!(
        text,
        "{:<30} {:>9} {:>9} {:>11} {:>11} {forward:>10} {backward:>10}",
        "embeddings, loss", "", "", "", ""
    )?;
    writeln!(text, "\n{:<30} {:>8} {:>12} {:>11} {:>11}", "parameters", "tensors", "numbers", "norm", "gradient")?;
    for group in &report.groups {
        writeln!(
            text,
            "{:<30} {:>8} {:>12} {:>11.3} {:>11.3e}",
            group.name, group.tensors, group.parameters, group.norm, group.gradient_norm
        )?;
    }
    if !report.checks.is_empty() {
        writeln!(text)?;
    }
    for check in &report.checks {
        let place = check.stage.map_or_else(|| "the model".into(), |stage| format!("stage {stage}"));
        let verdict = if check.fault.is_some() { "FAILED" } else { "ok" };
        writeln!(text, "{:<38} {verdict}", format!("{place}: {}", check.name))?;
    }
    writeln!(text)?;
    if report.findings.is_empty() {
        writeln!(text, "no problems found")?;
    }
    for finding in &report.findings {
        let kind = if finding.severity == Severity::Problem { "PROBLEM" } else { "warning" };
        writeln!(text, "{kind}  {}: {}\n         {}", finding.place, finding.what, finding.advice)?;
    }
    Ok(())
}
