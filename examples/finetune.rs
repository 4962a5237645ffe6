//! Fine-tuning on pairs of questions and answers: first a model learns texts, then answers alone, by a loss mask.
//!
//!     cargo run --release --example finetune

use anyhow::Result;
use candle_core::{Device, Tensor};
use mblm::Mode;
use mblm::blocks as _;
use mblm::config::MblmConfig;
use mblm::generate::{Sampler, Sampling, Until, generate};
use mblm::model::Mblm;
use mblm::registry::BlockRegistry;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;

const CONFIG: &str = "
num_tokens: 257
pad_token_id: 256
hidden_dims: [64, 64]
num_layers: [2, 1]
seq_lens: [12, 4]
block: {attn_head_dims: 16, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}
";

const PAD: u32 = 256;
const LEN: usize = 48;

const FACTS: [(&str, &str); 6] = [
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Norway", "Oslo"),
    ("Egypt", "Cairo"),
    ("Peru", "Lima"),
    ("Japan", "Tokyo"),
];

fn main() -> Result<()> {
    let document = Document::parse(CONFIG, "finetune.rs")?;
    let model = Mblm::new(&MblmConfig::from_document(&document, "", &BlockRegistry::builtin()?)?, 0)?;
    let texts: Vec<_> =
        FACTS.iter().map(|(land, city)| (String::new(), format!("{city} is in {land}. {land} has {city}."))).collect();
    println!("texts: {:.4} nats for each byte", train(&model, &texts, 120)?);

    let pairs: Vec<_> =
        FACTS.iter().map(|(land, city)| (format!("Q: capital of {land}? A: "), format!("{city}.\n"))).collect();
    println!("answers: {:.4} nats for each byte", train(&model, &pairs, 120)?);
    for (question, _) in &pairs {
        let (mut answer, prompt) = (vec![], question.bytes().map(u32::from).collect());
        let until = Until { max_tokens: Some(10), stop_token: Some(u32::from(b'\n')) };
        generate(&model, &[prompt], &mut [Sampler::new(Sampling::greedy())?], &until, |_, token| {
            answer.push(token as u8);
            Ok(true)
        })?;
        print!("{question}{}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}

/// Trains on pairs: the first part is read, the loss is that of the second. Returns the last loss.
fn train(model: &Mblm, pairs: &[(String, String)], steps: u64) -> Result<f32> {
    let (mut ids, mut mask) = (vec![], vec![]);
    for (given, wanted) in pairs {
        let row = given.bytes().chain(wanted.bytes()).map(u32::from).chain(std::iter::repeat(PAD));
        ids.extend(row.take(LEN));
        // Padding is no target in any case; the question is none because its weight is 0.
        mask.extend((0..LEN).map(|at| if at < given.len() { 0f32 } else { 1.0 }));
    }
    let shape = (pairs.len(), LEN);
    let (ids, mask) = (Tensor::from_vec(ids, shape, &Device::Cpu)?, Tensor::from_vec(mask, shape, &Device::Cpu)?);
    let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
    for step in 0..steps {
        let loss = model.loss(&ids, Some(&mask), Mode::train(step))?;
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        optimizer.step(model.params(), 3e-3)?;
    }
    Ok(model.loss(&ids, Some(&mask), Mode::Eval)?.to_scalar()?)
}
