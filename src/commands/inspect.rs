//! `mblm inspect`: what a configuration builds, stage by stage, and what that costs.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use mblm_base::terminal::{self, Output};
use mblm_core::config::{MblmConfig, MblmEncoderConfig};
use mblm_core::device::{self, DeviceName};
use mblm_core::model::{Mblm, MblmEncoder};
use mblm_core::registry::BlockRegistry;
use mblm_train::config::{ModelConfig, OptimizerKind, RunConfig};
use mblm_train::cost::{ModelCost, Step, bytes as shown_bytes};
use mblm_train::patches::PatchLengths;
use mblm_train::session;
use mblm_yaml::Document;
use serde_json::json;

use crate::plugins::Plugins;
use crate::trial::step_memory;

/// Characters of the longest bar of a histogram.
const BAR: f64 = 40.0;

/// Arguments of `mblm inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A model configuration, or a training configuration
    config: PathBuf,
    /// Sequences in a training step [default: `train.batch_size`, or 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Measure the memory that a training step takes on this device: cuda, cuda:N, metal or auto
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
    /// Override a field of the configuration, e.g. `--set params.num_layers=[4,2]`; may be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs `mblm inspect`.
pub fn run(args: &Args, plugins: &Plugins) -> anyhow::Result<()> {
    let mut document = Document::read(&args.config)?;
    args.set.iter().try_for_each(|assignment| document.set(assignment))?;
    let registry = plugins.registry(Some(&args.config))?;
    let Described { config, mut step, optimizer, run, .. } = read(&document, &registry)?;
    if let Some(batch) = args.batch {
        step.batch = batch as usize;
    }
    let patches = run.as_ref().map(patches).transpose()?.flatten();
    let report = match &config {
        ModelConfig::Generative(config) => {
            let model = Mblm::outline(config, 0)?;
            let stages = model.stage_models().collect::<Vec<_>>();
            ModelCost::with_patches(config, model.params(), &stages, step, patches.as_ref())
        }
        ModelConfig::Encoder(config) => {
            let model = MblmEncoder::outline(config, 0)?;
            ModelCost::new(&config.mblm_config, model.params(), &model.stage_models().collect::<Vec<_>>(), step)
        }
    };
    let report = report.trained_by(optimizer);
    let on_device = args.device.map(|name| on_device(name, &config, step, optimizer)).transpose()?;
    let text = match args.json {
        false => {
            let on_device = on_device.map_or(String::new(), |OnDevice { line, .. }| line);
            report.to_string() + &patches.as_ref().map_or(String::new(), histogram) + &on_device
        }
        true => {
            let mut json = serde_json::to_value(&report)?;
            if let Some(patches) = &patches {
                json["patches"] = json!(patches);
            }
            if let Some(OnDevice { device, bytes, .. }) = on_device {
                json["on_device"] = json!({ "device": device, "peak_bytes": bytes });
            }
            serde_json::to_string_pretty(&json)? + "\n"
        }
    };
    Output::new().write_all(text.as_bytes())?;
    Ok(())
}

/// How long patches are in the training data. Without the data, the table counts patches of full length.
fn patches(run: &RunConfig) -> anyhow::Result<Option<PatchLengths>> {
    let hierarchy = run.params.model.hierarchy();
    if hierarchy.is_fixed() {
        return Ok(None);
    }
    match session::open_data(run) {
        Ok(data) => Ok(PatchLengths::measure(hierarchy, &*data.train, run.params.input_seq_len)?),
        Err(error) => {
            terminal::line(format_args!("warning: the numbers are those of full patches, without the data: {error}"));
            Ok(None)
        }
    }
}

/// The lengths of patches as bars.
fn histogram(patches: &PatchLengths) -> String {
    let all: u64 = patches.histogram.iter().sum();
    let (mean, full) = (patches.mean(), 100.0 * patches.full);
    let mut text = format!("\npatches    {mean:.2} bytes on average; {full:.1}% end because they are full\n");
    let most = patches.histogram.iter().copied().max().unwrap_or(1).max(1) as f64;
    for (i, &count) in patches.histogram.iter().enumerate() {
        let share = 100.0 * count as f64 / all.max(1) as f64;
        let bar = "▇".repeat((count as f64 / most * BAR) as usize);
        text += &format!("{:>7} {}  {share:>5.1}%  {bar}\n", i + 1, if i == 0 { "byte " } else { "bytes" });
    }
    patches.warning().map_or(text.clone(), |warning| format!("{text}warning: {warning}\n"))
}

/// What a training step takes on a device.
struct OnDevice {
    device: String,
    bytes: Option<u64>,
    line: String,
}

fn on_device(name: DeviceName, config: &ModelConfig, step: Step, optimizer: OptimizerKind) -> anyhow::Result<OnDevice> {
    let opened = name.open()?;
    let device = device::name(&opened);
    let bytes = match opened.is_cpu() {
        true => None,
        false => step_memory(config, step, optimizer, opened)
            .with_context(|| format!("a training step of {} x {} bytes on {device}", step.batch, step.bytes))?,
    };
    let line = match bytes {
        Some(bytes) => format!("\non {device}, a training step took {} (measured)\n", shown_bytes(bytes as f64)),
        None => format!("\non {device}, the memory of tensors cannot be measured; the numbers above are for the CPU\n"),
    };
    Ok(OnDevice { device, bytes, line })
}

/// What a training configuration, or one of a model alone, says of a model and its training.
pub struct Described {
    /// The model.
    pub config: ModelConfig,
    /// What a step of its training reads.
    pub step: Step,
    /// Where it trains.
    pub device: DeviceName,
    /// What updates it.
    pub optimizer: OptimizerKind,
    /// All of a training configuration.
    pub run: Option<RunConfig>,
}

/// Reads a training YAML or a model's.
pub fn read(document: &Document, registry: &BlockRegistry) -> anyhow::Result<Described> {
    if ["params", "train", "io", "budget"].iter().any(|section| document.get(section).is_some()) {
        let run = RunConfig::from_document(document, registry)?;
        let step = Step { batch: run.train.batch_size, bytes: run.params.input_seq_len };
        return Ok(Described {
            config: run.params.model.clone(),
            step,
            device: run.train.device,
            optimizer: run.train.optimizer,
            run: Some(run),
        });
    }
    let config = match document.get("mblm_config") {
        Some(_) => ModelConfig::Encoder(MblmEncoderConfig::from_document(document, "", registry)?),
        None => ModelConfig::Generative(MblmConfig::from_document(document, "", registry)?),
    };
    let bytes = config.hierarchy().context_len();
    Ok(Described {
        config,
        step: Step { batch: 1, bytes },
        device: DeviceName::Cpu,
        optimizer: OptimizerKind::Adamw,
        run: None,
    })
}
