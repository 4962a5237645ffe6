//! `mblm bench`: speed and memory of a model configuration.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use mblm::config::MblmConfig;
use mblm::gemm::{self, autocast};
use mblm::generate::Decoder;
use mblm::model::Mblm;
use mblm::testing::noise;
use mblm::train::optimizer::{Adam, AdamConfig, clip_grad_norm};
use mblm::train::terminal::Output;
use mblm::yaml::Document;
use mblm::{Mode, buffer};
use serde::Serialize;

use crate::Usage;
use crate::plugins::Plugins;

/// Measure training, forward and generation on random bytes
#[derive(clap::Args)]
pub struct Args {
    /// A model configuration, or a training configuration (its `params`)
    config: PathBuf,
    /// Sequences per batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Timed repetitions, after one warm-up; the median counts
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Bytes of context before the generated ones [default: half the context]
    #[arg(long)]
    prefix: Option<usize>,
    /// Bytes to generate
    #[arg(long, default_value_t = 64)]
    bytes: usize,
    /// Sequences generated side by side; their bytes add up
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Measure this alone
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Precision of the matrix products of training and forward: f32, or bf16 where the CPU has AVX-512 BF16
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
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
struct Report {
    config: PathBuf,
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

pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let registry = &plugins.registry(Some(&args.config))?;
    let document = Document::read(&args.config)?;
    let config = match document.get("params") {
        Some(_) => MblmConfig::from_section(&document, "params", registry)?,
        None => MblmConfig::from_document(&document, "", registry)?,
    };
    let precision = args.precision.available()?;
    let model = Mblm::new(&config, 0)?;
    let wanted = |part| args.only.is_none_or(|only| only == part);
    let length = config.context_len();
    let ids = Tensor::from_vec(random_bytes(args.batch * length), (args.batch, length), &Device::Cpu)?;
    let mut report = Report {
        config: args.config.clone(),
        threads: rayon::current_num_threads(),
        batch: args.batch,
        length,
        params: model.params().num_elements(),
        train_bytes_per_s: None,
        forward_bytes_per_s: None,
        prefix: None,
        generate_bytes_per_s: None,
        peak_rss_mb: None,
    };
    if wanted(Part::Train) {
        let mut step = trainer(&model, &ids);
        let step = || autocast(precision, &mut step);
        report.train_bytes_per_s = Some(rate(args.batch * length, args.steps, step)?);
        report.peak_rss_mb = peak_rss_mb();
        buffer::release_unused();
    }
    if wanted(Part::Forward) {
        let forward = || {
            autocast(precision, || model.loss(&ids, None, Mode::Eval))?;
            Ok(())
        };
        report.forward_bytes_per_s = Some(rate(args.batch * length, args.steps, forward)?);
    }
    if wanted(Part::Generate) {
        let prefix = args.prefix.unwrap_or(length / 2);
        report.prefix = Some(prefix);
        report.generate_bytes_per_s = Some(generation_rate(&model, prefix, args)?);
    }
    print(&report, args.json)
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
fn trainer(model: &Mblm, ids: &Tensor) -> impl FnMut() -> Result<()> {
    let mut adam = Adam::new(model.params(), AdamConfig::default());
    let mut step = 0;
    move || {
        step += 1;
        let loss = model.loss(ids, None, Mode::train(step))?;
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0);
        Ok(adam.step(model.params(), 1e-3)?)
    }
}

/// Units per second of the median repetition.
fn rate(units: usize, steps: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let seconds = (0..steps.max(1)).map(|_| {
        let start = Instant::now();
        work().map(|()| start.elapsed().as_secs_f64())
    });
    Ok(units as f64 / median(seconds.collect::<Result<_>>()?))
}

/// Bytes per second after the prefix, of all streams; the prefix itself is not timed.
fn generation_rate(model: &Mblm, prefix: usize, args: &Args) -> Result<f64> {
    let Args { bytes, streams, steps, .. } = *args;
    let (prompt, new) = (random_bytes(prefix), random_bytes(bytes));
    let run = || -> Result<f64> {
        let mut decoder = Decoder::new(model, streams)?;
        decoder.prefill(&prompt.repeat(streams))?;
        let start = Instant::now();
        new.iter().try_for_each(|byte| decoder.step(&vec![*byte; streams]))?;
        Ok(start.elapsed().as_secs_f64())
    };
    run()?;
    Ok((bytes * streams) as f64 / median((0..steps.max(1)).map(|_| run()).collect::<Result<_>>()?))
}

fn random_bytes(len: usize) -> Vec<u32> {
    noise(len, 1).iter().map(|v| ((v + 1.0) * 127.9) as u32).collect()
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

fn print(report: &Report, json: bool) -> Result<()> {
    let mut out = Output::new();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string(report)?)?);
    }
    let threads = report.threads;
    writeln!(out, "{} · {} parameters · {threads} threads", report.config.display(), report.params)?;
    writeln!(out, "batch {} x {} bytes", report.batch, report.length)?;
    let prefix = report.prefix.unwrap_or_default();
    for (what, rate) in [
        ("train".to_string(), report.train_bytes_per_s),
        ("forward".to_string(), report.forward_bytes_per_s),
        (format!("generate at {prefix}"), report.generate_bytes_per_s),
    ] {
        if let Some(rate) = rate {
            writeln!(out, "{what:<18} {rate:>10.0} bytes/s")?;
        }
    }
    if let Some(peak) = report.peak_rss_mb {
        writeln!(out, "{:<18} {peak:>10} MB", "peak memory")?;
    }
    Ok(())
}
