//! A Llama-style transformer, ported from candle-transformers' `models/llama.rs`: `candle_nn` became `mblm_sdk::nn`, the
//! key-value cache went, and the rest is as it was.

use candle_core::{DType, Tensor};
use mblm_sdk::block::{FieldError, width};
use mblm_sdk::nn::{self, Dropout, Linear, Module, RmsNorm, VarBuilder, linear_no_bias};
use mblm_sdk::{CandleModule, Error, Mode, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Layers of causal attention with rotary positions and of a gated feed-forward network.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Llama {
    /// Attention heads; the stage's width is a multiple of twice this.
    pub num_heads: usize,
    /// Width of the feed-forward network.
    pub intermediate_size: usize,
    /// The share of attention's and the network's outputs that training drops.
    #[serde(default)]
    pub dropout: f32,
}

register_block!(Llama, name = "candle_llama", about = "A Llama-style transformer, written with candle-nn");

#[typetag::serde(name = "candle_llama")]
impl StageBlock for Llama {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn takes_mask(&self) -> bool {
        false
    }

    fn validate(&self, dim: usize) -> std::result::Result<(), FieldError> {
        width(&[("intermediate_size", self.intermediate_size)], 1)?;
        match self.num_heads > 0 && dim.is_multiple_of(2 * self.num_heads) {
            true => Ok(()),
            false => {
                let message = format!("expected a divisor of {dim} / 2, found {}", self.num_heads);
                Err(FieldError::new("num_heads", message))
            }
        }
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let (config, head_dim) = (self.clone(), dim / self.num_heads);
        let net = params.candle(move |vb| Net::load(&config, dim, num_layers, vb))?;
        Ok(Box::new(LlamaModel { net, head_dim }))
    }
}

struct LlamaModel {
    net: CandleModule<Net>,
    head_dim: usize,
}

impl StageModel for LlamaModel {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if mask.is_some() {
            return Err(Error::Block("candle_llama is causal and takes no attention mask".into()));
        }
        let context = Context::new(x, self.head_dim, mode)?;
        Ok(self.net.at(mode)?.forward(x, &context)?)
    }
}

/// What all layers of a pass use.
struct Context {
    /// `(S, d / 2)` each.
    cos: Tensor,
    sin: Tensor,
    /// `(S, S)`: 0 where position i may look at position j, minus infinity elsewhere.
    mask: Tensor,
    mode: Mode,
}

impl Context {
    /// Of the device and the type of `x`.
    fn new(x: &Tensor, head_dim: usize, mode: Mode) -> candle_core::Result<Self> {
        let (seq, device, dtype) = (x.dim(1)?, x.device(), x.dtype());
        let frequency = |i: usize| 1.0 / 10_000f32.powf(i as f32 / head_dim as f32);
        let theta = Tensor::from_iter((0..head_dim).step_by(2).map(frequency), device)?;
        let positions = Tensor::arange(0, seq as u32, device)?.to_dtype(DType::F32)?.reshape((seq, 1))?;
        let angles = positions.matmul(&theta.reshape((1, head_dim / 2))?)?;
        let hidden = (0..seq * seq).map(|at| if at % seq > at / seq { f32::NEG_INFINITY } else { 0.0 });
        let mask = Tensor::from_iter(hidden, device)?.reshape((seq, seq))?.to_dtype(dtype)?;
        Ok(Context { cos: angles.cos()?.to_dtype(dtype)?, sin: angles.sin()?.to_dtype(dtype)?, mask, mode })
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    num_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(config: &Llama, dim: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Attention {
            q_proj: linear_no_bias(dim, dim, vb.pp("q_proj"))?,
            k_proj: linear_no_bias(dim, dim, vb.pp("k_proj"))?,
            v_proj: linear_no_bias(dim, dim, vb.pp("v_proj"))?,
            o_proj: linear_no_bias(dim, dim, vb.pp("o_proj"))?,
            num_heads: config.num_heads,
            head_dim: dim / config.num_heads,
        })
    }

    fn forward(&self, x: &Tensor, context: &Context) -> candle_core::Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        let heads = |x: Tensor| x.reshape((batch, seq, self.num_heads, self.head_dim))?.transpose(1, 2)?.contiguous();
        let rotated = |x: Tensor| nn::rotary_emb::rope(&heads(x)?, &context.cos, &context.sin);
        let (q, k) = (rotated(self.q_proj.forward(x)?)?, rotated(self.k_proj.forward(x)?)?);
        let v = heads(self.v_proj.forward(x)?)?;
        let scores = (q.matmul(&k.t()?)? / (self.head_dim as f64).sqrt())?.broadcast_add(&context.mask)?;
        let y = nn::ops::softmax_last_dim(&scores)?.matmul(&v)?;
        self.o_proj.forward(&y.transpose(1, 2)?.reshape((batch, seq, dim))?)
    }
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(config: &Llama, dim: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let inner = config.intermediate_size;
        Ok(Mlp {
            gate_proj: linear_no_bias(dim, inner, vb.pp("gate_proj"))?,
            up_proj: linear_no_bias(dim, inner, vb.pp("up_proj"))?,
            down_proj: linear_no_bias(inner, dim, vb.pp("down_proj"))?,
        })
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = (nn::ops::silu(&self.gate_proj.forward(x)?)? * self.up_proj.forward(x)?)?;
        self.down_proj.forward(&x)
    }
}

struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
    dropouts: [Dropout; 2],
}

impl Layer {
    fn load(config: &Llama, dim: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Layer {
            input_layernorm: nn::rms_norm(dim, 1e-5, vb.pp("input_layernorm"))?,
            self_attn: Attention::load(config, dim, vb.pp("self_attn"))?,
            post_attention_layernorm: nn::rms_norm(dim, 1e-5, vb.pp("post_attention_layernorm"))?,
            mlp: Mlp::load(config, dim, vb.pp("mlp"))?,
            dropouts: ["attention_dropout", "mlp_dropout"].map(|name| Dropout::new(config.dropout, vb.pp(name))),
        })
    }

    fn forward(&self, x: &Tensor, context: &Context) -> candle_core::Result<Tensor> {
        let y = self.self_attn.forward(&self.input_layernorm.forward(x)?, context)?;
        let x = (x + self.dropouts[0].forward(&y, context.mode)?)?;
        let y = self.mlp.forward(&self.post_attention_layernorm.forward(&x)?)?;
        x + self.dropouts[1].forward(&y, context.mode)?
    }
}

struct Net {
    layers: Vec<Layer>,
    norm: RmsNorm,
}

impl Net {
    fn load(config: &Llama, dim: usize, num_layers: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let layers = (0..num_layers).map(|i| Layer::load(config, dim, vb.pp("layers").pp(i)));
        Ok(Net { layers: layers.collect::<candle_core::Result<_>>()?, norm: nn::rms_norm(dim, 1e-5, vb.pp("norm"))? })
    }

    fn forward(&self, x: &Tensor, context: &Context) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(&x, context)?;
        }
        self.norm.forward(&x)
    }
}

#[cfg(test)]
mod tests {
    use mblm_sdk::ParamStore;
    use mblm_sdk::layer::Dims;
    use mblm_sdk::testing::{check_causality, check_decoder, check_gradients, perturb};

    use super::*;

    #[test]
    fn is_causal_decodes_and_learns() {
        let mut store = ParamStore::new(0);
        let config = Llama { num_heads: 2, intermediate_size: 12, dropout: 0.0 };
        let model = config.build(8, 2, &mut store.root()).unwrap();
        perturb(&store);
        let dims = Dims { batch: 2, seq: 7, dim: 8 };
        check_gradients(model.as_ref(), &store, dims);
        check_decoder(model.as_ref(), dims, 1e-5);
        check_causality(model.as_ref(), Dims { batch: 1, ..dims });
        let error = config.validate(10).unwrap_err();
        assert_eq!((&*error.field, &*error.message), ("num_heads", "expected a divisor of 10 / 2, found 2"));
    }
}
