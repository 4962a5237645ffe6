//! `mblm generate`: continue a prompt.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use mblm::generate::{Ended, Format, Sampler, Sampling, TokenStream, Until, generate};

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
    /// The same seed gives the same bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End after this token
    #[arg(long, value_name = "ID")]
    stop_token: Option<u32>,
    /// How to print: text, bytes as they are, or token numbers
    #[arg(long, value_enum, default_value = "text")]
    format: Output,
    /// Do not print the prompt before its continuation
    #[arg(long)]
    no_prompt: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Output {
    Text,
    Raw,
    Ids,
}

/// Runs `mblm generate`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let mut samplers = [Sampler::new(sampling(args))?];
    let trained = model::load(&args.model, plugins)?;
    let model = trained.generative()?;
    let prompt: Vec<u32> = prompt(args)?.into_iter().map(u32::from).collect();
    let format = match args.format {
        Output::Text => Format::Utf8,
        Output::Raw => Format::Raw,
        Output::Ids => Format::Ids,
    };
    let mut stream = TokenStream::new(std::io::stdout().lock(), format);
    if !args.no_prompt {
        prompt.iter().try_for_each(|token| stream.write(*token))?;
    }
    let until = Until { max_tokens: args.max_bytes, stop_token: args.stop_token };
    let (start, mut made) = (Instant::now(), 0);
    let ended = generate(model, &[prompt], &mut samplers, &until, |_, token| {
        made += 1;
        stream.write(token)?;
        Ok(true)
    })?;
    let mut out = stream.finish()?;
    if args.format == Output::Text {
        writeln!(out)?;
    }
    let why = match ended[0] {
        Ended::ContextLength => {
            format!("the context of {} bytes is full", model.config().context_len())
        }
        Ended::StopToken => format!("stop token {}", args.stop_token.unwrap_or_default()),
        Ended::MaxTokens | Ended::Receiver => "as many as asked for".into(),
    };
    let rate = made as f64 / start.elapsed().as_secs_f64();
    eprintln!("{made} bytes ({why}), {rate:.0} bytes/s");
    Ok(())
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
