//! `mblm bench`: speed and memory of a model configuration.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use mblm::base::random::noise;
use mblm::base::terminal::Output;
use mblm::gemm::{self, autocast};
use mblm::generate::Decoder;
use mblm::model::Mblm;
use mblm::train::config::ModelConfig;
use mblm::train::cost::Step;
use mblm::train::model::{Model, TrainModel};
use mblm::train::trainer::optimizer::{Adam, AdamConfig, clip_grad_norm};
use mblm::yaml::Document;
use mblm::{Mode, buffer};
use serde::Serialize;

use crate::commands::{inspect, train};
use crate::exit::Usage;
use crate::plugins::Plugins;

/// The share of bytes that an encoder restores, as in BERT.
const MASKING_PROBA: f64 = 0.15;
/// Bytes that are generated if nothing is said.
const MOST_BYTES: usize = 64;

/// Measure training, forward and generation on random bytes
#[derive(clap::Args)]
pub struct Args {
    /// A model configuration, or a training configuration (its `params`)
    config: PathBuf,
    /// Sequences per batch
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Timed repetitions, after one warm-up; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Bytes of context before the generated ones [default: half the context, or what `--bytes` leaves of it]
    #[arg(long)]
    prefix: Option<usize>,
    /// Bytes to generate [default: 64, or what the prefix leaves of the context]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    bytes: Option<u32>,
    /// Sequences generated side by side; their bytes add up
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    streams: u32,
    /// Measure this alone
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Precision of the matrix products of training and forward: f32, or bf16 where the CPU has AVX-512 BF16
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Override a field of the configuration, as in `--set params.num_layers=[4,2]`
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Part {
    Train,
    Forward,
    Generate,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Precision {
    #[default]
    F32,
    Bf16,
}

#[derive(Serialize)]
struct Measurements {
    config: String,
    threads: usize,
    batch: usize,
    length: usize,
    params: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    train_bytes_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_bytes_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generate_bytes_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_rss_mb: Option<u64>,
}

/// Runs `mblm bench`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let mut document = Document::read(&args.config)?;
    args.set.iter().try_for_each(|assignment| document.set(assignment))?;
    let (config, _) = inspect::read(&document, &plugins.registry(Some(&args.config))?)?;
    let length = config.hierarchy().context_len();
    let generation = Generation::new(args, &config, length)?;
    let precision = args.precision.available()?;
    if args.only.is_none_or(|only| only == Part::Train) {
        train::must_fit(&config, Step { batch: args.batch as usize, bytes: length })?;
    }
    let model = Model::of(&config, MASKING_PROBA, 0)?;
    let mut report = Measurements {
        config: args.config.to_string_lossy().into_owned(),
        threads: rayon::current_num_threads(),
        batch: args.batch as usize,
        length,
        params: model.params().num_elements(),
        train_bytes_per_s: None,
        forward_bytes_per_s: None,
        prefix: None,
        generate_bytes_per_s: None,
        peak_rss_mb: None,
    };
    if !args.json {
        begin(&report)?;
    }
    let measured = measure(args, &model, precision, generation, &mut report);
    // What was measured before a failure is shown.
    end(&report, args.json)?;
    measured
}

/// Measures what is wanted, and notes each result in `report` as soon as it is there.
fn measure(
    args: &Args,
    model: &Model,
    precision: gemm::Precision,
    generation: Option<Generation>,
    report: &mut Measurements,
) -> Result<()> {
    let wanted = |part| args.only.is_none_or(|only| only == part);
    let (shape, num_tokens) = ((report.batch, report.length), num_tokens(model));
    let ids = || -> Result<Tensor> {
        Ok(Tensor::from_vec(random_bytes(shape.0 * shape.1, num_tokens), shape, &Device::Cpu)?)
    };
    if wanted(Part::Train) {
        let ids = ids()?;
        let mut step = trainer(model, &ids);
        let step = || autocast(precision, &mut step);
        report.train_bytes_per_s = Some(show(args, "train", rate(shape.0 * shape.1, args.steps, step)?)?);
        report.peak_rss_mb = peak_rss_mb();
        buffer::release_unused();
    }
    if wanted(Part::Forward) {
        let ids = ids()?;
        let forward = || {
            autocast(precision, || model.loss(&ids, None, Mode::Eval))?;
            Ok(())
        };
        report.forward_bytes_per_s = Some(show(args, "forward", rate(shape.0 * shape.1, args.steps, forward)?)?);
    }
    if let (Model::Generative(model), Some(generation)) = (model, generation) {
        report.prefix = Some(generation.prefix);
        let what = format!("generate at {}", generation.prefix);
        report.generate_bytes_per_s = Some(show(args, &what, generation.rate(model, args)?)?);
    }
    Ok(())
}

fn num_tokens(model: &Model) -> usize {
    match model {
        Model::Generative(model) => model.config().num_tokens,
        Model::Masked(model) => model.encoder().config().mblm_config.num_tokens,
    }
}

/// How many bytes are generated after how many.
struct Generation {
    prefix: usize,
    bytes: usize,
}

impl Generation {
    /// What `args` ask for, and else what fits a context of `length` bytes. None if no generation is measured.
    fn new(args: &Args, config: &ModelConfig, length: usize) -> Result<Option<Self>> {
        let is_encoder = matches!(config, ModelConfig::Encoder(_));
        match args.only {
            Some(Part::Generate) if is_encoder => {
                return Err(Usage("--only generate: an encoder restores masked bytes and generates none".into()).into());
            }
            None | Some(Part::Generate) if !is_encoder => {}
            _ => return Ok(None),
        }
        let bytes = args.bytes.map(|bytes| bytes as usize);
        let prefix = args.prefix.unwrap_or_else(|| (length / 2).min(length.saturating_sub(bytes.unwrap_or(1))));
        let bytes = bytes.unwrap_or_else(|| MOST_BYTES.min(length.saturating_sub(prefix)).max(1));
        match prefix.checked_add(bytes) {
            Some(end) if end <= length => Ok(Some(Generation { prefix, bytes })),
            _ => Err(Usage(format!(
                "--prefix {prefix} and --bytes {bytes} do not fit the model's context of {length} bytes; lower one of them"
            ))
            .into()),
        }
    }

    /// Bytes per second after the prefix, of all streams; the prefix itself is not timed.
    fn rate(&self, model: &Mblm, args: &Args) -> Result<f64> {
        let streams = args.streams as usize;
        let random = |len| random_bytes(len, model.config().num_tokens);
        let (prompt, new) = (random(self.prefix), random(self.bytes));
        let run = || -> Result<f64> {
            let mut decoder = Decoder::new(model, streams)?;
            decoder.prefill(&prompt.repeat(streams))?;
            let start = Instant::now();
            new.iter().try_for_each(|byte| decoder.step(&vec![*byte; streams]))?;
            Ok(start.elapsed().as_secs_f64())
        };
        run()?;
        Ok((self.bytes * streams) as f64 / median((0..args.steps).map(|_| run()).collect::<Result<_>>()?))
    }
}

impl Precision {
    fn available(self) -> Result<gemm::Precision> {
        let precision = match self {
            Precision::F32 => gemm::Precision::F32,
            Precision::Bf16 => gemm::Precision::Bf16,
        };
        ensure!(precision.is_available(), Usage("--precision bf16: this CPU lacks AVX-512 BF16; use f32".into()));
        Ok(precision)
    }
}

/// One step as the package takes it: forward, backward, clip to norm 1, Adam.
fn trainer(model: &Model, ids: &Tensor) -> impl FnMut() -> Result<()> {
    let mut adam = Adam::new(model.params(), AdamConfig::default());
    let mut step = 0;
    move || {
        step += 1;
        let loss = model.loss(ids, None, Mode::train(step))?.mean;
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0);
        Ok(adam.step(model.params(), 1e-3)?)
    }
}

/// Units per second of the median repetition.
fn rate(units: usize, steps: u32, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let seconds = (0..steps).map(|_| {
        let start = Instant::now();
        work().map(|()| start.elapsed().as_secs_f64())
    });
    Ok(units as f64 / median(seconds.collect::<Result<_>>()?))
}

fn random_bytes(len: usize, num_tokens: usize) -> Vec<u32> {
    noise(len, 1).iter().map(|v| ((v + 1.0) * 127.9) as u32 % num_tokens as u32).collect()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// The highest resident memory of this process so far, where the system tells.
fn peak_rss_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

fn begin(report: &Measurements) -> Result<()> {
    let Measurements { config, params, threads, batch, length, .. } = report;
    let mut out = Output::new();
    writeln!(out, "{config} · {params} parameters · {threads} threads\nbatch {batch} x {length} bytes")?;
    Ok(())
}

/// Shows a speed as soon as it is measured: the next one may be interrupted, or end for want of memory.
fn show(args: &Args, what: &str, rate: f64) -> Result<f64> {
    if !args.json {
        writeln!(Output::new(), "{what:<18} {rate:>10.0} bytes/s")?;
    }
    Ok(rate)
}

fn end(report: &Measurements, json: bool) -> Result<()> {
    let mut out = Output::new();
    match report.peak_rss_mb {
        _ if json => writeln!(out, "{}", serde_json::to_string(report)?)?,
        Some(peak) => writeln!(out, "{:<18} {peak:>10} MB", "peak memory")?,
        None => {}
    }
    Ok(())
}
