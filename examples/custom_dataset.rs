//! A data set of your own: a trait, a line that registers it, and `dataset_id` names it like a built-in one.
//!
//!     cargo run --release --example custom_dataset
//!
//! It makes sums such as `417+38=455` up as it goes; the loss mask asks for the results alone.

use std::sync::atomic::AtomicBool;

use anyhow::Result;
use mblm::base::random::mix;
use mblm::data::register_dataset;
use mblm::data::{Dataset, DatasetOptions, Splits};
use mblm::registry::BlockRegistry;
use mblm::train::config::RunConfig;
use mblm::train::evaluate::bpb;
use mblm::train::session::Session;
use mblm::yaml::Document;
use mblm_blocks as _;

register_dataset!("sums", "sums of two numbers below 1,000", open);

fn open(options: &DatasetOptions) -> mblm::data::Result<Splits> {
    let split = |seed, count| Box::new(Sums { seed, count, pad: options.pad_token_id as u32 }) as Box<dyn Dataset>;
    Ok(Splits {
        train: split(1, 100_000),
        valid: split(2, 200),
        test: None,
        about: "sums, made up".into(),
        // Data in files would have their names and sizes here: a run is not resumed on other data.
        fingerprint: "sums 1".into(),
    })
}

struct Sums {
    seed: u64,
    count: u64,
    pad: u32,
}

impl Dataset for Sums {
    fn num_sequences(&self, _epoch: u64) -> u64 {
        self.count
    }

    /// The same place gives the same sum, so that a run can be resumed anywhere.
    fn sample(&self, epoch: u64, index: u64, ids: &mut [u32], loss_mask: &mut [f32]) -> mblm::data::Result<()> {
        let random = mix(mix(self.seed + epoch) ^ index);
        let (a, b) = (random % 1000, random / 1000 % 1000);
        let (question, answer) = (format!("{a}+{b}="), format!("{}\n", a + b));
        ids.fill(self.pad);
        loss_mask.fill(0.0);
        let bytes = question.bytes().chain(answer.bytes());
        ids.iter_mut().zip(bytes).for_each(|(id, byte)| *id = byte as u32);
        loss_mask[question.len()..question.len() + answer.len()].fill(1.0);
        Ok(())
    }

    fn has_loss_mask(&self) -> bool {
        true
    }
}

const CONFIG: &str = "
io: {name_model: sums, output_dir: OUTPUT, dataset_dir: none, dataset_id: sums, num_models_to_save: 1,
  validate_amount: 4, log_train_loss_amount: 10}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 16, seq_lens: [16], hidden_dims: [64], num_layers: [2],
  block: {attn_head_dims: 16, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}}
train: {target_elements: 20000, target_elements_strategy: batch, batch_size: 50, learning_rate: 0.005,
  gradient_clipping: 1.0, gradient_accumulate_every: 1, shuffle_train: true}
";

fn main() -> Result<()> {
    let output = std::env::temp_dir().join("mblm-custom-dataset");
    let document = Document::parse(&CONFIG.replace("OUTPUT", &output.display().to_string()), "custom_dataset.rs")?;
    let config = RunConfig::from_document(&document, &BlockRegistry::builtin()?)?;
    let (run, outcome) = Session::new(&config, &AtomicBool::new(false))?.train()?;
    let loss = outcome.state.valid_loss.unwrap_or(f64::NAN);
    println!("{:.3} bits per byte of a result, in {}", bpb(loss), run.display());
    std::fs::remove_dir_all(&output)?;
    Ok(())
}
