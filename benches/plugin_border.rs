//! What crossing the plugin border costs: a training step (loss, backward, clipping, Adam) of `benches/configs/tt.yaml`
//! with other blocks in both stages, compiled in and loaded as a plugin, in alternating rounds.
//!
//!     cargo build --release -p mblm-lstm && cargo build --release -p mblm-core --example identity
//!     cargo bench --bench plugin_border

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};
use mblm::Mode;
use mblm::base::random::noise;
use mblm::config::MblmConfig;
use mblm::model::Mblm;
use mblm::plugin::host::{Library, PluginSource};
use mblm::registry::BlockRegistry;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;
use mblm_blocks as _;
use mblm_lstm as _;

#[path = "../mblm-core/examples/identity/block.rs"]
mod identity;

#[path = "../src/memory.rs"]
mod memory;

const ROUNDS: usize = 9;
const BATCH: usize = 4;

fn main() -> Result<()> {
    // Cargo's test runner calls a bench without `--bench`, to see whether it builds.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    memory::keep();
    let builtin = BlockRegistry::builtin()?;
    let mut sides = vec![Side::new("transformer", &builtin, None)?];
    for (block, library) in [("identity", "examples/libidentity.so"), ("lstm", "libmblm_lstm.so")] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release").join(library);
        let library = Library::open(&path).map_err(|e| anyhow!("{}: {e}; build it first", path.display()))?;
        let loaded = BlockRegistry::empty().with_source(PluginSource(library))?;
        sides.push(Side::new(&format!("{block}, compiled in"), &builtin, Some(block))?);
        sides.push(Side::new(&format!("{block}, plugin"), &loaded, Some(block))?);
    }
    for round in 0..=ROUNDS {
        for side in &mut sides {
            // On a thread of the pool, as the program's work runs.
            let milliseconds = rayon::scope(|_| side.step())?;
            if round > 0 {
                side.times.push(milliseconds);
            }
        }
    }
    let medians: Vec<f64> = sides.iter().map(|side| median(side.times.iter().copied())).collect();
    for (side, median) in sides.iter().zip(&medians) {
        println!("{:<22} {median:>8.1} ms", side.name);
    }
    // Pairs lie side by side in time, so that what slows the machine for a while slows both.
    let between = |plugin: usize| {
        let (ours, theirs) = (&sides[plugin - 1].times, &sides[plugin].times);
        median(ours.iter().zip(theirs).map(|(a, b)| b - a))
    };
    println!(
        "identity: the border costs {:.1} ms, {:.1}% of the transformer's step",
        between(2),
        100.0 * between(2) / medians[0]
    );
    println!("lstm: as a plugin {:+.1} ms, {:+.1}%", between(4), 100.0 * between(4) / medians[3]);
    Ok(())
}

struct Side {
    name: String,
    model: Mblm,
    optimizer: Optimizer,
    ids: Tensor,
    times: Vec<f64>,
}

impl Side {
    /// `tt.yaml`, with `block` in place of its two blocks.
    fn new(name: &str, registry: &BlockRegistry, block: Option<&str>) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/configs/tt.yaml");
        let mut yaml = std::fs::read_to_string(&path)?;
        if let Some(block) = block {
            yaml.truncate(yaml.find("block:").context("tt.yaml has blocks")?);
            yaml += &format!("block: {{block_type: {block}}}\n");
        }
        let config = MblmConfig::from_document(&Document::parse(&yaml, "tt.yaml")?, "", registry)?;
        let model = Mblm::new(&config, 0)?;
        // Every side clips and optimizes all its parameters, also those that the identity leaves without a gradient.
        model.params().iter().for_each(|param| drop(param.grad_mut()));
        let len = config.context_len();
        let bytes: Vec<u32> = noise(BATCH * len, 1).iter().map(|v| ((v + 1.0) * 127.9) as u32).collect();
        let ids = Tensor::from_vec(bytes, (BATCH, len), &Device::Cpu)?;
        let optimizer = Optimizer::new(model.params(), AdamConfig::default());
        Ok(Self { name: name.into(), model, optimizer, ids, times: Vec::new() })
    }

    /// Milliseconds of one training step.
    fn step(&mut self) -> Result<f64> {
        let start = Instant::now();
        let loss = self.model.loss(&self.ids, None, Mode::train(self.times.len() as u64))?;
        self.model.params().zero_grad();
        self.model.params().backward(&loss)?;
        clip_grad_norm(self.model.params(), 1.0).unwrap();
        self.optimizer.step(self.model.params(), 1e-3)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
