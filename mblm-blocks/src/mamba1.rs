//! Mamba (Gu & Dao 2023): a stack of layers `x + mixer(norm(x))` with a selective scan inside, as in the package
//! `mambapy` 1.2, which has no norm at the end.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::block::{Cost, FieldError, PosEmb, StageBlock, StageDecoder, StageModel, TensorDecoder, stacked, width};
use mblm_sdk::layer::{Group, apply, apply_packed};
use mblm_sdk::mode::Mode;
use mblm_sdk::register_block;
use mblm_sdk::{Error, ParamScope, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod decoder;
mod layer;

use decoder::Decoder;
use layer::MambaLayer;

/// Mamba 1: a selective state space model; cost per position does not grow with the sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mamba1Block {
    /// State size per channel, N.
    pub d_state: usize,
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Inner channels as a multiple of the stage's width.
    pub expand: usize,
    /// Accepted for configurations shared with mamba2 and ignored: Mamba-1 has no heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headdim: Option<usize>,
    /// Accepted for configurations shared with mamba2 and ignored: Mamba-1 has no dropout.
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
    /// Inner channels, E.
    inner: usize,
    /// N
    d_state: usize,
    /// K
    d_conv: usize,
    /// Rank of the step size's projection, `ceil(D / 16)`.
    dt_rank: usize,
}

impl Sizes {
    /// Width of the projection that gives step size, B and C.
    fn dbc(&self) -> usize {
        self.dt_rank + 2 * self.d_state
    }
}

register_block!(Mamba1Block, name = "mamba1", about = "Selective state spaces (Gu & Dao 2023), the stack of mamba.py");

#[typetag::serde(name = "mamba1")]
impl StageBlock for Mamba1Block {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.pos_emb_type
    }

    fn takes_mask(&self) -> bool {
        false
    }

    fn validate(&self, dim: usize) -> std::result::Result<(), FieldError> {
        width(&[("d_state", self.d_state)], 1)?;
        width(&[("d_conv", self.d_conv)], 1)?;
        width(&[("expand", self.expand)], dim).map(drop)
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        self.validate(dim).map_err(|e| Error::Block(format!("{}: {}", e.field, e.message)))?;
        let inner = self.expand * dim;
        let sizes = Sizes { dim, inner, d_state: self.d_state, d_conv: self.d_conv, dt_rank: dim.div_ceil(16) };
        let layers = (0..num_layers)
            .map(|i| Ok(Arc::new(MambaLayer::new(sizes, &mut params.sub("layers").sub(i))?)))
            .collect::<Result<_>>()?;
        Ok(Box::new(Mamba1 { sizes, layers }))
    }
}

struct Mamba1 {
    sizes: Sizes,
    layers: Vec<Arc<MambaLayer>>,
}

impl StageModel for Mamba1 {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if mask.is_some() {
            return Err(Error::Block("mamba1 is causal and takes no attention mask".into()));
        }
        self.layers.iter().try_fold(x.clone(), |x, layer| apply(layer, &x, None, mode))
    }

    fn forward_packed(&self, x: &Tensor, groups: &Arc<[Group]>, mode: Mode) -> Result<Tensor> {
        self.layers.iter().try_fold(x.clone(), |x, layer| apply_packed(layer, &x, groups, mode))
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        Ok(Box::new(Decoder::new(&self.layers, self.sizes, batch)))
    }

    fn tensor_decoder(&self, _batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
        Ok(stacked(&self.layers, MambaLayer::advance, |y| Ok(y.clone())))
    }

    fn cost(&self, _seq_len: usize) -> Option<Cost> {
        let Sizes { dim, inner, d_state, d_conv, dt_rank } = self.sizes;
        let matrices = 3 * dim * inner + inner * self.sizes.dbc() + dt_rank * inner;
        // Per state: a product and an exponential, decay, input and output.
        let scan = inner * (7 * d_state + 2 * d_conv + 10);
        let kept = 5 * inner + self.sizes.dbc() + inner * d_state / mblm_sdk::ops::selective_scan::CHUNK;
        let layers = self.layers.len() as f64;
        Some(Cost { flops: layers * (2 * matrices + scan) as f64, activations: layers * (dim + kept) as f64 })
    }
}

#[cfg(test)]
mod tests {
    use mblm_sdk::ParamStore;
    use mblm_sdk::layer::Dims;
    use mblm_sdk::testing::{check_causality, check_decoder, check_gradients, perturb};

    use super::*;

    fn block(d_state: usize, d_conv: usize, expand: usize) -> Mamba1Block {
        Mamba1Block { d_state, d_conv, expand, headdim: None, dropout: 0.0, pos_emb_type: None }
    }

    fn model(block: &Mamba1Block, dim: usize, num_layers: usize) -> (ParamStore, Box<dyn StageModel>) {
        let mut store = ParamStore::new(1);
        let model = block.build(dim, num_layers, &mut store.root()).unwrap();
        perturb(&store);
        (store, model)
    }

    #[test]
    fn decoder_gives_forward() {
        for (batch, seq, dim) in [(1, 150, 8), (3, 7, 17), (9, 5, 32)] {
            let (_store, model) = model(&block(5, 4, 2), dim, 2);
            check_decoder(model.as_ref(), Dims { batch, seq, dim }, 2e-5);
        }
    }

    #[test]
    fn is_causal_and_every_parameter_learns() {
        let (store, model) = model(&block(4, 3, 3), 12, 2);
        check_causality(model.as_ref(), Dims { batch: 1, seq: 9, dim: 12 });
        check_gradients(model.as_ref(), &store, Dims { batch: 3, seq: 9, dim: 12 });
    }

    #[test]
    fn parameters_have_the_packages_names_and_shapes() {
        let (store, _) = model(&block(8, 4, 2), 32, 1);
        let found: Vec<(String, Vec<usize>)> =
            store.iter().map(|p| (p.name().replace("layers.0.", ""), p.shape().to_vec())).collect();
        let want = [
            ("mixer.A_log", vec![64, 8]),
            ("mixer.D", vec![64]),
            ("mixer.conv1d.bias", vec![64]),
            ("mixer.conv1d.weight", vec![64, 1, 4]),
            ("mixer.dt_proj.bias", vec![64]),
            ("mixer.dt_proj.weight", vec![64, 2]),
            ("mixer.in_proj.weight", vec![128, 32]),
            ("mixer.out_proj.weight", vec![32, 64]),
            ("mixer.x_proj.weight", vec![18, 64]),
            ("norm.weight", vec![32]),
        ];
        assert_eq!(found, want.map(|(name, shape)| (name.to_string(), shape)));
    }

    #[test]
    fn zero_is_refused_and_a_mask_too() {
        assert_eq!(block(4, 0, 2).validate(8).unwrap_err().field, "d_conv");
        let (_store, model) = model(&block(2, 2, 1), 4, 1);
        let x = Tensor::zeros((1, 2, 4), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let message = model.forward(&x, Some(&x), Mode::Eval).unwrap_err().to_string();
        assert!(message.contains("takes no attention mask"), "{message}");
    }
}
