//! A stage block of your own, compiled in: a stack of gated recurrent units, written with candle-nn.
//!
//!     cargo run --release --example custom_block
//!
//! It is a config struct, one registration line, a module as candle-nn's users write it, and one `forward`. Gradients come
//! from candle, generation from the default decoder, which re-runs `forward`. `plugins/candle/src/gru.rs` is the same block
//! with a decoder that takes constant time per byte.

use candle_core::{Device, Tensor};
use mblm::blocks as _;
use mblm::config::MblmConfig;
use mblm::generate::{Sampler, Sampling, Until, generate};
use mblm::model::Mblm;
use mblm::nn::{self, Module, RNN, VarBuilder};
use mblm::registry::BlockRegistry;
use mblm::train::evaluate::bpb;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;
use mblm::{CandleModule, Mode, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The fields in YAML.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Gru {
    /// The share of each layer's outputs that training drops.
    dropout: f32,
}

register_block!(Gru, name = "gru", about = "Gated recurrent units");

#[typetag::serde(name = "gru")]
impl StageBlock for Gru {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let dropout = self.dropout;
        let layers = params.candle(move |vb| (0..num_layers).map(|i| Layer::new(dim, dropout, vb.pp(i))).collect())?;
        Ok(Box::new(GruModel { layers }))
    }
}

/// `x + dropout(gru(norm(x)))`
struct Layer {
    norm: nn::LayerNorm,
    gru: nn::GRU,
    dropout: nn::Dropout,
}

impl Layer {
    fn new(dim: usize, dropout: f32, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Layer {
            norm: nn::layer_norm(dim, 1e-5, vb.pp("norm"))?,
            gru: nn::gru(dim, dim, nn::GRUConfig::default(), vb.pp("gru"))?,
            dropout: nn::Dropout::new(dropout, vb.pp("dropout")),
        })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let states = self.gru.seq(&self.norm.forward(x)?)?;
        // candle-nn's GRU gives (batch, seq * dim).
        let y = self.gru.states_to_tensor(&states)?.reshape(x.shape())?;
        x + self.dropout.forward(&y, mode)?
    }
}

struct GruModel {
    layers: CandleModule<Vec<Layer>>,
}

impl StageModel for GruModel {
    /// `x`: `(batch, seq, dim)`; returns the same.
    fn forward(&self, x: &Tensor, _mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in self.layers.at(mode)? {
            x = layer.forward(&x, mode)?;
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
  - {block_type: gru, dropout: 0.1}
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
    let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
    for step in 0..200 {
        let loss = model.loss(&batch(step)?, None, Mode::train(step as u64))?;
        if step % 40 == 0 || step == 199 {
            println!("step {step:>3}: {:.3} bpb", bpb(loss.to_scalar::<f32>()? as f64));
        }
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        optimizer.step(model.params(), 3e-3).map_err(|error| mblm::Error::Block(error.to_string()))?;
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
