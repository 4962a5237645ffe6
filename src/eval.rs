//! `mblm eval`: the bits per byte of a model on data.

use anyhow::Result;
use mblm::train::evaluate::{EvaluateOptions, evaluate};

use crate::model;
use crate::plugins::Plugins;

/// Arguments of `mblm eval`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// A file, a folder or a glob
    data: String,
    /// Sequences per batch [default: as in training]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Read no more than this many bytes
    #[arg(long)]
    max_bytes: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `mblm eval`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let trained = model::load(&args.model, plugins)?;
    let options = EvaluateOptions {
        num_tokens: trained.config.params.model.hierarchy().num_tokens,
        seq_len: trained.config.params.input_seq_len,
        batch_size: args.batch.map_or(trained.config.train.batch_size, |batch| batch as usize),
        max_bytes: args.max_bytes,
    };
    let found = evaluate(&trained.model, &args.data, &options)?;
    if args.json {
        let json = serde_json::json!({
            "checkpoint": trained.checkpoint, "data": args.data, "bytes": found.bytes, "loss": found.loss, "bpb": found.bpb()
        });
        println!("{json}");
    } else {
        println!("{:.4} bpb  (loss {:.4} nats) on {} bytes of {}", found.bpb(), found.loss, found.bytes, args.data);
    }
    Ok(())
}
