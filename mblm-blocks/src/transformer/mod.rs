//! The Transformer as a stage: `transformer`, causal with token shift (MEGABYTE's decoder), and `transformerEncoder`,
//! which sees the whole sequence and takes an attention mask.

mod decoder;
mod layer;

use std::sync::Arc;

use candle_core::Tensor;
use layer::{Kind, TransformerLayer};
use mblm_sdk::block::{Cost, FieldError, PosEmb, StageBlock, StageDecoder, StageModel, TensorDecoder, stacked, width};
use mblm_sdk::layer::{Group, apply, apply_packed};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::norm_layer::RmsNormLayer;
use mblm_sdk::ops::rms_norm::Eps;
use mblm_sdk::ops::rotary::Rotary;
use mblm_sdk::param::{Init, ParamScope};
use mblm_sdk::{Error, Result, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const EPS: Eps = Eps::Floor(1e-8);

fn default_ff_multiplier() -> usize {
    2
}

/// What both Transformer blocks are configured by.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct TransformerConfig {
    /// Position embeddings of the stage: `fixed`, `rope` or none.
    #[serde(default)]
    pub pos_emb_type: Option<PosEmb>,
    /// Width of an attention head.
    pub attn_head_dims: usize,
    /// Number of attention heads.
    pub attn_num_heads: usize,
    /// Whether to apply rotary position embeddings to queries and keys.
    pub attn_use_rot_embs: bool,
    /// Dropout probability of the attention weights.
    #[serde(default)]
    pub attn_dropout: f32,
    /// Width of the feed-forward layer as a multiple of the stage's width.
    #[serde(default = "default_ff_multiplier")]
    pub ff_multiplier: usize,
    /// Dropout probability inside the feed-forward layer.
    #[serde(default)]
    pub ff_dropout: f32,
    /// Accepted for compatibility with the package and ignored: attention is always computed in tiles.
    #[serde(default)]
    pub use_flash_attn: bool,
}

/// `transformer`: causal attention and a feed-forward layer, each after a token shift.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Transformer(pub TransformerConfig);

/// `transformerEncoder`: attention over the whole sequence, with an attention mask, without token shift.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct TransformerEncoder(pub TransformerConfig);

register_block!(
    Transformer,
    name = "transformer",
    about = "Causal attention and feed-forward layers with token shift (MEGABYTE's decoder)",
    infer = true
);

#[typetag::serde(name = "transformer")]
impl StageBlock for Transformer {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.0.pos_emb_type
    }

    fn takes_mask(&self) -> bool {
        false
    }

    fn validate(&self, dim: usize) -> Result<(), FieldError> {
        self.0.validate(dim)
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        Ok(Box::new(TransformerModel::new(&self.0, Kind::Decoder, dim, num_layers, params)?))
    }
}

register_block!(
    TransformerEncoder,
    name = "transformerEncoder",
    about = "Attention over the whole sequence under a mask, and feed-forward layers; for encoders"
);

#[typetag::serde(name = "transformerEncoder")]
impl StageBlock for TransformerEncoder {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.0.pos_emb_type
    }

    fn validate(&self, dim: usize) -> Result<(), FieldError> {
        self.0.validate(dim)
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        Ok(Box::new(TransformerModel::new(&self.0, Kind::Encoder, dim, num_layers, params)?))
    }
}

impl TransformerConfig {
    fn validate(&self, dim: usize) -> Result<(), FieldError> {
        width(&[("attn_head_dims", self.attn_head_dims), ("attn_num_heads", self.attn_num_heads)], 1)?;
        width(&[("ff_multiplier", self.ff_multiplier)], dim)?;
        for (field, p) in [("attn_dropout", self.attn_dropout), ("ff_dropout", self.ff_dropout)] {
            if !(0.0..1.0).contains(&p) {
                return Err(FieldError::new(field, format!("expected a probability in [0, 1), found {p}")));
            }
        }
        if self.attn_use_rot_embs && self.attn_head_dims % 2 == 1 {
            let message =
                format!("rotary positions rotate halves: expected an even number, found {}", self.attn_head_dims);
            return Err(FieldError::new("attn_head_dims", message));
        }
        Ok(())
    }
}

/// The layers of a stage and the final norm.
struct TransformerModel {
    layers: Vec<Arc<TransformerLayer>>,
    norm: Arc<RmsNormLayer>,
    rotary: Option<Arc<Rotary>>,
    dim: usize,
}

impl TransformerModel {
    fn new(
        config: &TransformerConfig,
        kind: Kind,
        dim: usize,
        num_layers: usize,
        params: &mut ParamScope,
    ) -> Result<Self> {
        let rotary = config.attn_use_rot_embs.then(|| Arc::new(Rotary::new(config.attn_head_dims)));
        let layers = (0..num_layers)
            .map(|i| {
                let mut scope = params.sub("layers");
                Ok(Arc::new(TransformerLayer::new(config, kind, dim, rotary.clone(), &mut scope.sub(i))?))
            })
            .collect::<Result<_>>()?;
        let gain = params.sub("norm").param("g", &[dim], Init::Const(1.0))?;
        Ok(TransformerModel { layers, norm: Arc::new(RmsNormLayer { gain, eps: EPS }), rotary, dim })
    }
}

impl TransformerModel {
    fn check_causal(&self) -> Result<()> {
        match self.is_causal() {
            true => Ok(()),
            false => Err(Error::Block("`transformerEncoder` sees the whole sequence and cannot generate".into())),
        }
    }
}

impl StageModel for TransformerModel {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if mask.is_some() && self.is_causal() {
            return Err(Error::Block(
                "`transformer` is causal and takes no attention mask; use `transformerEncoder`".into(),
            ));
        }
        let hidden = self.layers.iter().try_fold(x.clone(), |x, layer| apply(layer, &x, mask, mode))?;
        apply(&self.norm, &hidden, None, mode)
    }

    fn forward_packed(&self, x: &Tensor, groups: &Arc<[Group]>, mode: Mode) -> Result<Tensor> {
        let hidden = self.layers.iter().try_fold(x.clone(), |x, layer| apply_packed(layer, &x, groups, mode))?;
        apply(&self.norm, &hidden, None, mode)
    }

    fn is_causal(&self) -> bool {
        self.layers.iter().all(|layer| layer.kind() == Kind::Decoder)
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        self.check_causal()?;
        Ok(Box::new(decoder::TransformerDecoder::new(self, batch)))
    }

    fn tensor_decoder(&self, _batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
        self.check_causal()?;
        Ok(stacked(&self.layers, TransformerLayer::advance, |y| apply(&self.norm, y, None, Mode::Eval)))
    }

    fn buffers(&self) -> Vec<(&'static str, Vec<f32>)> {
        let rotary = self.rotary.iter();
        rotary.map(|rotary| ("rotary_emb.inv_freq", rotary.inverse_frequencies().to_vec())).collect()
    }

    fn cost(&self, seq_len: usize) -> Option<Cost> {
        let layers = self.layers.iter().map(|layer| layer.cost(seq_len));
        let sum = |a: Cost, b: Cost| Cost { flops: a.flops + b.flops, activations: a.activations + b.activations };
        Some(layers.fold(Cost { flops: 4.0 * self.dim as f64, activations: self.dim as f64 }, sum))
    }
}

#[cfg(test)]
mod tests;
