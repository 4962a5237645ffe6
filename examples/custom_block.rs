//! A stage block of your own, compiled in: a stack of exponential moving averages, written in plain candle ops.
//!
//!     cargo run --release --example custom_block
//!
//! It is a config struct, one registration line and one `forward`. Gradients come from candle, generation from the
//! default decoder, which re-runs `forward`; a fused layer and a recurrent decoder can follow once the idea proves good.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use mblm::blocks as _;
use mblm::config::MblmConfig;
use mblm::generate::{Sampler, Sampling, Until, generate};
use mblm::model::Mblm;
use mblm::registry::BlockRegistry;
use mblm::train::evaluate::bpb;
use mblm::train::trainer::optimizer::{Adam, AdamConfig, clip_grad_norm};
use mblm::yaml::Document;
use mblm::{Init, Mode, Param, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Layers `x + W silu(ema(x))`, each average with one learned decay.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Ema {
    /// How positions enter the stage.
    #[serde(default)]
    pos_emb_type: Option<PosEmb>,
    /// The rate at which the first layer forgets, per position; each further layer starts with half of it.
    forget: f32,
}

register_block!(Ema, name = "ema", about = "Exponential moving averages", infer = true);

#[typetag::serde(name = "ema")]
impl StageBlock for Ema {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.pos_emb_type
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let layer = |i: usize| -> Result<EmaLayer> {
            let mut scope = params.sub("layers");
            let mut scope = scope.sub(i);
            let log_forget = Init::Const((self.forget / 2f32.powi(i as i32)).ln());
            Ok(EmaLayer {
                log_forget: scope.param("log_forget", &[1], log_forget)?,
                out: scope.param("weight", &[dim, dim], Init::linear(dim))?,
            })
        };
        Ok(Box::new(EmaModel { layers: (0..num_layers).map(layer).collect::<Result<_>>()? }))
    }
}

struct EmaLayer {
    log_forget: Arc<Param>,
    out: Arc<Param>,
}

struct EmaModel {
    layers: Vec<EmaLayer>,
}

impl StageModel for EmaModel {
    fn forward(&self, x: &Tensor, _mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        // Position i weighs position j ≤ i by e^(-forget · (i - j)), and a later one by 0.
        let pairs = || (0..seq * seq).map(|at| (at / seq, at % seq));
        let age: Vec<f32> = pairs().map(|(i, j)| i.saturating_sub(j) as f32).collect();
        let past: Vec<f32> = pairs().map(|(i, j)| (j <= i) as u8 as f32).collect();
        let age = Tensor::from_vec(age, (seq, seq), &Device::Cpu)?;
        let past = Tensor::from_vec(past, (seq, seq), &Device::Cpu)?;
        let mut x = x.clone();
        for layer in &self.layers {
            let forget = layer.log_forget.tensor(mode).exp()?;
            let weights = (age.broadcast_mul(&forget.neg()?)?.exp()? * &past)?;
            let average = weights.unsqueeze(0)?.broadcast_matmul(&x)?;
            let mixed = average.silu()?.reshape((batch * seq, dim))?.matmul(&layer.out.tensor(mode).t()?)?;
            x = (x + mixed.reshape((batch, seq, dim))?)?;
        }
        Ok(x)
    }
}

const CONFIG: &str = "
num_tokens: 257
pad_token_id: 256
hidden_dims: [64, 64]
num_layers: [3, 2]
seq_lens: [32, 4]
block:
  - {block_type: ema, forget: 0.5}
  - {attn_head_dims: 16, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}
";

fn main() -> anyhow::Result<()> {
    let document = Document::parse(CONFIG, "custom_block.rs")?;
    let model = Mblm::new(&MblmConfig::from_document(&document, "", &BlockRegistry::builtin()?)?, 0)?;
    let text: Vec<u32> = include_bytes!("custom_block.rs").iter().map(|b| *b as u32).collect();
    let batch = |step: usize| {
        let start = |b: usize| (step * 997 + b * 389) % (text.len() - 128);
        let ids: Vec<u32> = (0..8).flat_map(|b| text[start(b)..start(b) + 128].to_vec()).collect();
        Tensor::from_vec(ids, (8, 128), &Device::Cpu)
    };
    let mut adam = Adam::new(model.params(), AdamConfig::default());
    for step in 0..200 {
        let loss = model.loss(&batch(step)?, None, Mode::train(step as u64))?;
        if step % 40 == 0 || step == 199 {
            println!("step {step:>3}: {:.3} bpb", bpb(loss.to_scalar::<f32>()? as f64));
        }
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0);
        adam.step(model.params(), 3e-3).map_err(|error| mblm::Error::Block(error.to_string()))?;
    }
    let prompt = b"use mblm::".map(u32::from).to_vec();
    let (mut out, until) = (b"use mblm::".to_vec(), Until { max_tokens: Some(60), stop_token: None });
    generate(&model, &[prompt], &mut [Sampler::new(Sampling::greedy())?], &until, |_, token| {
        out.push(token as u8);
        Ok(true)
    })?;
    println!("{}", String::from_utf8_lossy(&out));
    Ok(())
}
