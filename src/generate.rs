//! `mblm generate`: continue a prompt.

mod interactive;

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use mblm::generate::{Ended, Format, Sampler, Sampling, TokenStream, Until, generate};
use mblm::model::Mblm;
use serde_json::json;

use crate::plugins::Plugins;
use crate::{Usage, model};

/// Arguments of `mblm generate`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Text to continue; without any prompt, standard input is read if it is not a terminal
    #[arg(long, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A file whose bytes are continued
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// New bytes at most [default: up to the context length]
    #[arg(long, value_name = "N")]
    max_bytes: Option<usize>,
    /// Below 1 sharper, above 1 flatter, 0 always the likeliest byte
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Choose among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the fewest tokens whose probabilities sum to P
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Choose among tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// The Python package's filter: 1 always takes the likeliest token, 0 chooses among all
    #[arg(long, value_name = "T")]
    filter_thres: Option<f32>,
    /// The same seed gives the same bytes; with --samples, of the first one
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Make N continuations of the prompt, with seeds that follow each other
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// End after this token
    #[arg(long, value_name = "ID")]
    stop_token: Option<u32>,
    /// How to print: text, bytes as they are, or token numbers
    #[arg(long, value_enum, default_value = "text")]
    format: Output,
    /// Do not print the prompt before its continuation
    #[arg(long)]
    no_prompt: bool,
    /// Print one JSON object when all is done
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Ask for a prompt again and again; `:help` says what else can be typed
    #[arg(short, long, conflicts_with_all = ["prompt", "prompt_file", "samples", "json"])]
    interactive: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Output {
    Text,
    Raw,
    Ids,
}

/// Runs `mblm generate`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    if args.format == Output::Raw && args.samples > 1 {
        return Err(Usage("--format raw is for one sample, since nothing would part them; use --json".into()).into());
    }
    // Before the model is loaded: what is wrong with a setting shows at once.
    let samplers = samplers(args)?;
    let trained = model::load(&args.model, plugins)?;
    let model = trained.generative()?;
    if args.interactive {
        return interactive::run(model, args);
    }
    let prompt: Vec<u32> = prompt(args)?.into_iter().map(u32::from).collect();
    let (start, mut made) = (Instant::now(), 0);
    let count = |_: u32| made += 1;
    let ended = match args.samples {
        1 if !args.json => stream(model, &prompt, samplers, args, count)?,
        _ => together(model, &prompt, samplers, args, count)?,
    };
    let rate = made as f64 / start.elapsed().as_secs_f64();
    let why = if args.samples == 1 { why(ended, model, args) } else { format!("{} samples", args.samples) };
    eprintln!("{made} bytes ({why}), {rate:.0} bytes/s");
    Ok(())
}

/// One for each sample: the seeds follow each other.
fn samplers(args: &Args) -> Result<Vec<Sampler>> {
    let sampler = |n| Sampler::new(Sampling { seed: args.seed.wrapping_add(n), ..sampling(args) });
    Ok((0..u64::from(args.samples)).map(sampler).collect::<Result<_, _>>()?)
}

fn until(args: &Args) -> Until {
    Until { max_tokens: args.max_bytes, stop_token: args.stop_token }
}

/// One sample, byte by byte as it comes.
fn stream(
    model: &Mblm,
    prompt: &[u32],
    mut samplers: Vec<Sampler>,
    args: &Args,
    mut count: impl FnMut(u32),
) -> Result<Ended> {
    let format = match args.format {
        Output::Text => Format::Utf8,
        Output::Raw => Format::Raw,
        Output::Ids => Format::Ids,
    };
    let mut stream = TokenStream::new(std::io::stdout().lock(), format);
    if !args.no_prompt {
        prompt.iter().try_for_each(|token| stream.write(*token))?;
    }
    let ended = generate(model, &[prompt.to_vec()], &mut samplers, &until(args), |_, token| {
        count(token);
        stream.write(token)?;
        Ok(true)
    })?;
    let mut out = stream.finish()?;
    if args.format == Output::Text {
        writeln!(out)?;
    }
    Ok(ended[0])
}

/// Several samples, or one as JSON: made as a batch, and shown when all are there.
fn together(
    model: &Mblm,
    prompt: &[u32],
    mut samplers: Vec<Sampler>,
    args: &Args,
    mut count: impl FnMut(u32),
) -> Result<Ended> {
    let prompts = vec![prompt.to_vec(); samplers.len()];
    let mut samples: Vec<Vec<u32>> = vec![vec![]; samplers.len()];
    let ended = generate(model, &prompts, &mut samplers, &until(args), |n, token| {
        count(token);
        samples[n].push(token);
        Ok(true)
    })?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let sample = |(n, ids): (usize, &Vec<u32>)| {
            let seed = args.seed.wrapping_add(n as u64);
            json!({"seed": seed, "text": text(ids), "ids": ids, "ended": name(ended[n])})
        };
        let samples: Vec<_> = samples.iter().enumerate().map(sample).collect();
        writeln!(out, "{}", json!({"prompt": text(prompt), "samples": samples}))?;
        return Ok(ended[0]);
    }
    for (n, ids) in samples.iter().enumerate() {
        writeln!(out, "── sample {}, seed {} ──", n + 1, args.seed.wrapping_add(n as u64))?;
        let shown = if args.no_prompt { ids.clone() } else { [prompt, ids].concat() };
        match args.format {
            Output::Ids => shown.iter().try_for_each(|id| writeln!(out, "{id}"))?,
            _ => writeln!(out, "{}", text(&shown))?,
        }
    }
    Ok(ended[0])
}

/// Tokens as text, as a stream shows them.
fn text(ids: &[u32]) -> String {
    let mut stream = TokenStream::new(vec![], Format::Utf8);
    // Writing to memory cannot fail.
    ids.iter().for_each(|token| drop(stream.write(*token)));
    String::from_utf8_lossy(&stream.finish().unwrap_or_default()).into_owned()
}

fn name(ended: Ended) -> &'static str {
    match ended {
        Ended::ContextLength => "context_length",
        Ended::StopToken => "stop_token",
        Ended::MaxTokens => "max_bytes",
        Ended::Receiver => "receiver",
    }
}

fn why(ended: Ended, model: &Mblm, args: &Args) -> String {
    match ended {
        Ended::ContextLength => format!("the context of {} bytes is full", model.config().context_len()),
        Ended::StopToken => format!("stop token {}", args.stop_token.unwrap_or_default()),
        Ended::MaxTokens | Ended::Receiver => "as many as asked for".into(),
    }
}

fn sampling(args: &Args) -> Sampling {
    Sampling {
        temperature: args.temperature,
        filter_thres: args.filter_thres,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
    }
}

fn prompt(args: &Args) -> Result<Vec<u8>> {
    match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Ok(text.clone().into_bytes()),
        (None, Some(path)) => std::fs::read(path).map_err(|error| {
            Usage(format!("--prompt-file {}: {error}; expected a file that can be read", path.display())).into()
        }),
        (None, None) if std::io::stdin().is_terminal() => Ok(vec![]),
        (None, None) => {
            let mut bytes = vec![];
            std::io::stdin().read_to_end(&mut bytes).context("cannot read the prompt from standard input")?;
            Ok(bytes)
        }
    }
}
