//! A model built in code, without YAML: its parameters, its loss, and a few training steps.
//!
//!     cargo run --release --example build_model

use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use mblm::blocks::mamba2::Mamba2Block;
use mblm::blocks::transformer::{Transformer, TransformerConfig};
use mblm::config::MblmConfig;
use mblm::model::Mblm;
use mblm::train::evaluate::bpb;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::{Mode, PosEmb};

fn main() -> Result<()> {
    // Stage 1, Mamba-2, reads 16 patches; stage 2, a Transformer, writes the 8 bytes of each.
    let global = Mamba2Block { d_state: 16, d_conv: 4, expand: 2, headdim: 16, dropout: 0.0, pos_emb_type: None };
    let local = Transformer(TransformerConfig {
        pos_emb_type: Some(PosEmb::Fixed),
        attn_head_dims: 16,
        attn_num_heads: 2,
        attn_use_rot_embs: true,
        attn_dropout: 0.0,
        ff_multiplier: 2,
        ff_dropout: 0.0,
        use_flash_attn: false,
    });
    let config = MblmConfig {
        num_tokens: 257,
        pad_token_id: 256,
        hidden_dims: vec![64, 32],
        num_layers: vec![2, 1],
        seq_lens: vec![16, 8],
        train_checkpoint_chunks: None,
        patching: vec![],
        blocks: vec![Arc::new(global), Arc::new(local)],
    };
    let model = Mblm::new(&config, 0)?;
    println!("{} parameters in {} tensors, such as", model.params().num_elements(), model.params().iter().count());
    for param in model.params().iter().take(3) {
        println!("  {} {:?}", param.name(), param.shape());
    }

    // Bytes (batch, length); the length is padded to whole patches inside.
    let text = include_bytes!("build_model.rs");
    let ids: Vec<u32> = text[..4 * 125].iter().map(|&byte| u32::from(byte)).collect();
    let ids = Tensor::from_vec(ids, (4, 125), &Device::Cpu)?;
    println!("logits {:?}, one row for every byte", model.logits(&ids, Mode::Eval)?.dims());

    let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
    for step in 0..60 {
        let loss = model.loss(&ids, None, Mode::train(step))?;
        if step % 20 == 0 {
            println!("step {step}: {:.3} bpb", bpb(f64::from(loss.to_scalar::<f32>()?)));
        }
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        optimizer.step(model.params(), 3e-3)?;
    }
    println!("at the end: {:.3} bpb", bpb(f64::from(model.loss(&ids, None, Mode::Eval)?.to_scalar::<f32>()?)));
    Ok(())
}
