//! Masked pre-training: an encoder learns to restore bytes, and then fills gaps in a text.
//!
//!     cargo run --release --example masked_encoder

use anyhow::Result;
use candle_core::{D, Device, Tensor};
use mblm::Mode;
use mblm::base::random::mix;
use mblm::blocks as _;
use mblm::config::MblmEncoderConfig;
use mblm::model::MblmEncoder;
use mblm::registry::BlockRegistry;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;

const MASK: u32 = 257;

const CONFIG: &str = "
mask_token_id: 257
mblm_config:
  num_tokens: 258
  pad_token_id: 256
  hidden_dims: [64, 64]
  num_layers: [1, 2]
  seq_lens: [8, 4]
  block: {block_type: transformerEncoder, attn_head_dims: 16, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}
";

fn main() -> Result<()> {
    let document = Document::parse(CONFIG, "masked_encoder.rs")?;
    let model = MblmEncoder::new(&MblmEncoderConfig::from_document(&document, "", &BlockRegistry::builtin()?)?, 0)?;
    let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
    for step in 0..400u64 {
        let labels: Vec<u32> = (0..16).flat_map(|row| sentence(mix(16 * step + row))).collect();
        // A fifth of the bytes is masked; all are attended to, and the loss is that of the masked ones.
        let is_masked = |i: usize| mix(step ^ ((i as u64) << 32)).is_multiple_of(5);
        let masked = labels.iter().enumerate().map(|(i, &byte)| if is_masked(i) { MASK } else { byte }).collect();
        let weights = (0..labels.len()).map(|i| f32::from(is_masked(i))).collect();
        let tensor = |ids: Vec<u32>| Tensor::from_vec(ids, (16, LEN), &Device::Cpu);
        let weights = Tensor::from_vec::<_, f32>(weights, (16, LEN), &Device::Cpu)?;
        let loss = model.loss(&tensor(masked)?, &tensor(labels)?, None, Some(&weights), Mode::train(step))?;
        if step % 100 == 0 {
            println!("step {step}: {:.3} nats for each masked byte", loss.to_scalar::<f32>()?);
        }
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        optimizer.step(model.params(), 3e-3)?;
    }
    for text in ["the r_d fox ran over the hill.  ", "the _rown dog ran ov_r the h_ll."] {
        let ids: Vec<u32> = text.bytes().map(|byte| if byte == b'_' { MASK } else { u32::from(byte) }).collect();
        let logits = model.logits(&Tensor::from_vec(ids, (1, LEN), &Device::Cpu)?, None, Mode::Eval)?;
        let restored: Vec<u32> = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1()?;
        let filled: Vec<u8> =
            text.bytes().zip(restored).map(|(byte, id)| if byte == b'_' { id as u8 } else { byte }).collect();
        println!("{text} -> {}", String::from_utf8_lossy(&filled));
    }
    Ok(())
}

const LEN: usize = 32;

/// A sentence of `LEN` bytes that `random` chooses.
fn sentence(random: u64) -> Vec<u32> {
    let colour = ["red", "brown", "white"][random as usize % 3];
    let animal = ["fox", "dog", "hen"][(random >> 8) as usize % 3];
    let text = format!("the {colour} {animal} ran over the hill.");
    text.bytes().chain(std::iter::repeat(b' ')).take(LEN).map(u32::from).collect()
}
