//! `mblm measure-run`, which a study calls when a run has ended: what the model costs, what it writes and how fast,
//! and what it spends on single bytes.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::device::DeviceName;
use mblm::generate::{Format, Sampler, Sampling, TokenStream, Until, generate};
use mblm::model::Mblm;
use mblm::study::passage::{Reading, score};
use mblm::study::report::{Generation, Measured};
use mblm::train::cost::{ModelCost, Step};
use mblm::train::model::{Model, TrainModel};
use mblm::train::patches::PatchLengths;
use mblm::train::session;

use crate::commands::train;
use crate::plugins::Plugins;
use crate::{model, orphan};

/// Bytes that are written.
const SAMPLE: usize = 320;
/// Below 1 sharper than what the model predicts: samples are to be read.
const TEMPERATURE: f32 = 0.7;

/// Arguments of `mblm measure-run`.
#[derive(clap::Args)]
pub struct Args {
    run: PathBuf,
    /// What the sample continues [default: the beginning of the validation data]
    #[arg(long, allow_hyphen_values = true)]
    prompt: Option<String>,
}

/// Runs `mblm measure-run`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    orphan::end_with_parent(Duration::ZERO);
    let of_run = model::Args { run: args.run.clone(), best: true, device: DeviceName::Cpu, allow_plugin_change: false };
    let trained = model::load(&of_run, plugins)?;
    let config = &trained.config;
    let step = Step { batch: config.train.batch_size, bytes: config.params.input_seq_len };
    let (hierarchy, stages) = (config.params.model.hierarchy(), trained.model.stage_models());
    let data = session::open_data_of(&args.run, config)?.0;
    let patches = PatchLengths::measure(hierarchy, &*data.train, step.bytes)?;
    let cost = ModelCost::with_patches(hierarchy, trained.model.params(), &stages, step, patches.as_ref())
        .trained_by(config.train.optimizer);
    let mut measured = Measured { cost: Some(cost), ..Measured::default() };
    if let Model::Generative(model) = &trained.model {
        let prompt = match &args.prompt {
            Some(text) => text.bytes().map(u32::from).collect(),
            None => train::prompt(&data, &config.params)?,
        };
        measured.generation = Some(sample(model, prompt)?);
        let patching = Some(hierarchy).filter(|hierarchy| !hierarchy.is_fixed());
        let reading = Reading { seq_len: step.bytes, batch_size: step.batch, stages: &hierarchy.seq_lens, patching };
        let scores = score(model, &*data.valid, reading)?;
        (measured.passage, measured.place_bits) = (scores.passage, scores.place_bits);
    }
    Ok(writeln!(Output::new(), "{}", serde_json::to_string(&measured)?)?)
}

/// Continues `prompt`, or its end if it would leave no room in the context.
fn sample(model: &Mblm, prompt: Vec<u32>) -> Result<Generation> {
    let prompt = train::with_room(model.config(), prompt)?;
    let mut stream = TokenStream::new(Vec::new(), Format::Utf8);
    let mut samplers = [Sampler::new(Sampling { temperature: TEMPERATURE, ..Sampling::default() })?];
    let until = Until { max_tokens: Some(SAMPLE), stop_token: None };
    // The first byte comes after the prompt was read, which is no generation.
    let (mut first, mut last, mut bytes) = (None, Instant::now(), 0);
    generate(model, std::slice::from_ref(&prompt), &mut samplers, &until, |_, token| {
        stream.write(token)?;
        bytes += 1;
        last = Instant::now();
        first.get_or_insert(last);
        Ok(true)
    })?;
    let seconds = first.map_or(0.0, |first| (last - first).as_secs_f64());
    let rate = if seconds > 0.0 { (bytes - 1) as f64 / seconds } else { 0.0 };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let prompt = prompt.into_iter().filter_map(|token| u8::try_from(token).ok()).collect();
    Ok(Generation { prompt: text(prompt), text: text(stream.finish()?), bytes, bytes_per_second: rate })
}
