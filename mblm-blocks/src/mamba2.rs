//! Mamba-2 (Dao & Gu 2024): a stack of layers `x + mixer(norm(x))` around the state space dual, then a norm, as the
//! block stack of the package `mamba_ssm` with one group of B and C.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::block::{Cost, FieldError, PosEmb, StageBlock, StageDecoder, StageModel, TensorDecoder, stacked, width};
use mblm_sdk::layer::{Group, apply, apply_packed};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::norm_layer::RmsNormLayer;
use mblm_sdk::ops::ssd;
use mblm_sdk::register_block;
use mblm_sdk::{Error, Init, ParamScope, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod decoder;
mod layer;

use decoder::Decoder;
use layer::{Mamba2Layer, NORM_EPS};

/// Mamba 2: a state space model whose training is made of matrix products.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mamba2Block {
    /// State size per channel, N.
    pub d_state: usize,
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Inner channels as a multiple of the stage's width.
    pub expand: usize,
    /// Channels per head; they share a step size. Must divide `expand` times the stage's width.
    pub headdim: usize,
    /// Dropout probability of what the last layer adds to the residual, in training.
    #[serde(default)]
    pub dropout: f32,
    /// Position embeddings of the stage. None by default, because the recurrence knows the order.
    #[serde(default)]
    pub pos_emb_type: Option<PosEmb>,
}

/// The sizes of a layer.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Width of the stage, D.
    dim: usize,
    /// H
    heads: usize,
    /// P
    headdim: usize,
    /// N
    d_state: usize,
    /// K
    d_conv: usize,
}

impl Sizes {
    /// Inner channels, E.
    fn inner(&self) -> usize {
        self.heads * self.headdim
    }

    /// What the convolution runs over: x, B and C.
    fn conv(&self) -> usize {
        self.inner() + 2 * self.d_state
    }

    /// The input projection: the gate, x, B, C and step sizes.
    fn proj(&self) -> usize {
        self.inner() + self.conv() + self.heads
    }
}

register_block!(
    Mamba2Block,
    name = "mamba2",
    about = "State space duality (Dao & Gu 2024), mamba_ssm's stack; on any CPU",
    infer = true,
    aliases = ["mamba"]
);

#[typetag::serde(name = "mamba2")]
impl StageBlock for Mamba2Block {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.pos_emb_type
    }

    fn takes_mask(&self) -> bool {
        false
    }

    fn validate(&self, dim: usize) -> std::result::Result<(), FieldError> {
        let Mamba2Block { d_state, d_conv, expand, headdim, .. } = *self;
        for field in [("d_state", d_state), ("d_conv", d_conv), ("headdim", headdim)] {
            width(&[field], 1)?;
        }
        let inner = width(&[("expand", expand)], dim)?;
        if !inner.is_multiple_of(headdim) {
            let mut divisors: Vec<usize> = (1..=inner).filter(|d| inner.is_multiple_of(*d)).collect();
            divisors.sort_by_key(|d| d.abs_diff(headdim));
            divisors.truncate(4);
            divisors.sort_unstable();
            return Err(FieldError::new(
                "headdim",
                format!(
                    "{headdim} does not divide the {inner} inner channels (expand {expand} x width {dim}); \
                     {divisors:?} would"
                ),
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(FieldError::new(
                "dropout",
                format!("expected a number from 0 to below 1, found {}", self.dropout),
            ));
        }
        Ok(())
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        self.validate(dim).map_err(|e| Error::Block(format!("{}: {}", e.field, e.message)))?;
        let Mamba2Block { d_state, d_conv, expand, headdim, .. } = *self;
        let sizes = Sizes { dim, heads: expand * dim / headdim, headdim, d_state, d_conv };
        let layers = (0..num_layers)
            .map(|i| {
                let dropout = if i + 1 == num_layers { self.dropout } else { 0.0 };
                let out_gain = 1.0 / (num_layers as f32).sqrt();
                Ok(Arc::new(Mamba2Layer::new(sizes, out_gain, dropout, &mut params.sub("layers").sub(i))?))
            })
            .collect::<Result<_>>()?;
        let gain = params.sub("norm_f").param("weight", &[dim], Init::Const(1.0))?;
        Ok(Box::new(Mamba2 { sizes, layers, norm_f: Arc::new(RmsNormLayer { gain, eps: NORM_EPS }) }))
    }
}

struct Mamba2 {
    sizes: Sizes,
    layers: Vec<Arc<Mamba2Layer>>,
    norm_f: Arc<RmsNormLayer>,
}

impl StageModel for Mamba2 {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if mask.is_some() {
            return Err(Error::Block("mamba2 is causal and takes no attention mask".into()));
        }
        let x = self.layers.iter().try_fold(x.clone(), |x, layer| apply(layer, &x, None, mode))?;
        apply(&self.norm_f, &x, None, mode)
    }

    fn forward_packed(&self, x: &Tensor, groups: &Arc<[Group]>, mode: Mode) -> Result<Tensor> {
        let x = self.layers.iter().try_fold(x.clone(), |x, layer| apply_packed(layer, &x, groups, mode))?;
        apply(&self.norm_f, &x, None, mode)
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        Ok(Box::new(Decoder::new(&self.layers, &self.norm_f, self.sizes, batch)))
    }

    fn tensor_decoder(&self, _batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
        Ok(stacked(&self.layers, Mamba2Layer::advance, |y| apply(&self.norm_f, y, None, Mode::Eval)))
    }

    fn cost(&self, seq_len: usize) -> Option<Cost> {
        let Sizes { dim, heads, d_state, d_conv, .. } = self.sizes;
        let (inner, conv, proj) = (self.sizes.inner(), self.sizes.conv(), self.sizes.proj());
        let chunk = ssd::CHUNK.min(seq_len);
        // Within a chunk C Bᵀ and its product with x, over states one product in and one out.
        let states = if seq_len > ssd::CHUNK { 2 * d_state * inner } else { 0 };
        let scan = 2 * (chunk * d_state + chunk * inner + states) + 2 * d_conv * conv + 20 * inner;
        let kept = proj + conv + inner + 2 * heads + chunk + states / (2 * ssd::CHUNK);
        let layers = self.layers.len() as f64;
        let flops = layers * (2 * dim * (proj + inner) + scan) as f64;
        Some(Cost { flops, activations: layers * (dim + kept) as f64 + dim as f64 })
    }
}

#[cfg(test)]
mod tests {
    use mblm_sdk::ParamStore;
    use mblm_sdk::layer::Dims;
    use mblm_sdk::testing::{check_causality, check_decoder, check_gradients, perturb};

    use super::*;

    fn block(d_state: usize, d_conv: usize, expand: usize, headdim: usize) -> Mamba2Block {
        Mamba2Block { d_state, d_conv, expand, headdim, dropout: 0.0, pos_emb_type: None }
    }

    fn model(block: &Mamba2Block, dim: usize, num_layers: usize) -> (ParamStore, Box<dyn StageModel>) {
        let mut store = ParamStore::new(1);
        let model = block.build(dim, num_layers, &mut store.root()).unwrap();
        perturb(&store);
        (store, model)
    }

    #[test]
    fn decoder_gives_forward() {
        for (batch, seq, dim, headdim) in [(1, 150, 8, 4), (3, 7, 17, 17), (9, 5, 32, 16)] {
            let (_store, model) = model(&block(5, 4, 2, headdim), dim, 2);
            check_decoder(model.as_ref(), Dims { batch, seq, dim }, 2e-5);
        }
    }

    #[test]
    fn is_causal_and_every_parameter_learns() {
        let (store, model) = model(&block(4, 3, 3, 9), 12, 2);
        check_causality(model.as_ref(), Dims { batch: 1, seq: 9, dim: 12 });
        check_causality(model.as_ref(), Dims { batch: 1, seq: 67, dim: 12 });
        check_gradients(model.as_ref(), &store, Dims { batch: 3, seq: 9, dim: 12 });
    }

    #[test]
    fn parameters_have_the_packages_names_and_shapes() {
        let (store, _) = model(&block(8, 4, 2, 8), 32, 1);
        let found: Vec<(String, Vec<usize>)> =
            store.iter().map(|p| (p.name().replace("layers.0.", ""), p.shape().to_vec())).collect();
        let want = [
            ("mixer.A_log", vec![8]),
            ("mixer.D", vec![8]),
            ("mixer.conv1d.bias", vec![80]),
            ("mixer.conv1d.weight", vec![80, 1, 4]),
            ("mixer.dt_bias", vec![8]),
            ("mixer.in_proj.weight", vec![152, 32]),
            ("mixer.norm.weight", vec![64]),
            ("mixer.out_proj.weight", vec![32, 64]),
            ("norm.weight", vec![32]),
            ("norm_f.weight", vec![32]),
        ];
        assert_eq!(found, want.map(|(name, shape)| (name.to_string(), shape)));
    }

    #[test]
    fn a_headdim_that_does_not_divide_is_refused_with_those_that_do() {
        let error = block(8, 4, 2, 10).validate(32).unwrap_err();
        assert_eq!(error.field, "headdim");
        for part in ["10 does not divide the 64 inner channels (expand 2 x width 32)", "[2, 4, 8, 16] would"] {
            assert!(error.message.contains(part), "{}", error.message);
        }
    }
}
