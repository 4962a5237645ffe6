//! Hidden states as embeddings: texts of one kind lie closer to each other than to those of another.
//!
//!     cargo run --release --example hidden_states
//!
//! A small model is trained on both kinds for a few seconds. The vector of a text is the mean of its bytes' hidden states,
//! which are what the output layer reads. Of a run's model they come the same way: `mblm_train::checkpoint::find`, then
//! `model.params().load(&checkpoint.weights()?)`.

use anyhow::Result;
use candle_core::{Device, Tensor};
use mblm::Mode;
use mblm::blocks as _;
use mblm::config::MblmConfig;
use mblm::model::Mblm;
use mblm::registry::BlockRegistry;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;

const CONFIG: &str = "
num_tokens: 257
pad_token_id: 256
hidden_dims: [64, 32]
num_layers: [2, 1]
seq_lens: [16, 4]
block: {attn_head_dims: 16, attn_num_heads: 2, attn_use_rot_embs: true, pos_emb_type: fixed}
";

/// Sums and sentences, of one length.
const TEXTS: [(&str, &str); 6] = [
    ("sum", "3 + 4 = 7; 12 + 9 = 21; 5 + 8 = 13; 6 + 6 = 12; 7 + 2 = 9;  "),
    ("sum", "8 + 1 = 9; 4 + 4 = 8; 10 + 7 = 17; 2 + 5 = 7; 11 + 3 = 14;  "),
    ("sum", "2 + 2 = 4; 9 + 9 = 18; 1 + 6 = 7; 13 + 4 = 17; 3 + 3 = 6;  "),
    ("sentence", "the cat sat on the mat and the dog lay by the door all day  "),
    ("sentence", "a bird sang in the tree while the rain fell on the roof     "),
    ("sentence", "the old man by the sea told the boy of the fish he saw      "),
];

fn main() -> Result<()> {
    let document = Document::parse(CONFIG, "hidden_states.rs")?;
    let model = Mblm::new(&MblmConfig::from_document(&document, "", &BlockRegistry::builtin()?)?, 0)?;
    let ids = Tensor::cat(&TEXTS.iter().map(|(_, text)| ids(text)).collect::<Result<Vec<_>>>()?, 0)?;
    train(&model, &ids)?;
    // (texts, bytes, width), then the mean over the bytes.
    let states = model.hidden_state(&ids, Mode::Eval)?;
    println!("hidden states {:?}", states.dims());
    let vectors = states.mean(1)?.to_vec2::<f32>()?;
    let (mut same, mut other) = (vec![], vec![]);
    for (i, a) in vectors.iter().enumerate() {
        let row: Vec<f32> = vectors.iter().map(|b| cosine(a, b)).collect();
        println!(
            "{:<8} {}",
            TEXTS[i].0,
            row.iter().map(|cosine| format!("{cosine:6.3}")).collect::<Vec<_>>().join(" ")
        );
        for (j, cosine) in row.into_iter().enumerate().filter(|&(j, _)| j != i) {
            if TEXTS[i].0 == TEXTS[j].0 { same.push(cosine) } else { other.push(cosine) }
        }
    }
    let mean = |cosines: &[f32]| cosines.iter().sum::<f32>() / cosines.len() as f32;
    println!("mean cosine within a kind: {:.3}, across: {:.3}", mean(&same), mean(&other));
    Ok(())
}

/// `(1, bytes)`
fn ids(text: &str) -> Result<Tensor> {
    let ids: Vec<u32> = text.bytes().take(56).map(u32::from).collect();
    Ok(Tensor::from_vec(ids, (1, 56), &Device::Cpu)?)
}

fn train(model: &Mblm, ids: &Tensor) -> Result<()> {
    let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
    for step in 0..80 {
        let loss = model.loss(ids, None, Mode::train(step))?;
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        optimizer.step(model.params(), 3e-3)?;
    }
    Ok(())
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
