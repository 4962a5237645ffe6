//! Gated recurrent units (Cho et al. 2014) with candle-nn's `GRU`, and a decoder that takes constant time per position.

use candle_core::{Device, Tensor};
use mblm_sdk::block::StageDecoder;
use mblm_sdk::nn::{self, GRU, GRUConfig, Module, RNN, VarBuilder, rnn::GRUState};
use mblm_sdk::{CandleModule, Mode, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Layers `x + dropout(gru(norm(x)))`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GruBlock {
    /// The share of each layer's outputs that training drops.
    #[serde(default)]
    pub dropout: f32,
    /// How positions enter the stage: `fixed`, `rope` or none.
    #[serde(default)]
    pub pos_emb_type: Option<PosEmb>,
}

register_block!(GruBlock, name = "candle_gru", about = "Gated recurrent units, written with candle-nn");

#[typetag::serde(name = "candle_gru")]
impl StageBlock for GruBlock {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.pos_emb_type
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let dropout = self.dropout;
        let layers = params.candle(move |vb| (0..num_layers).map(|i| Layer::new(dim, dropout, vb.pp(i))).collect())?;
        Ok(Box::new(GruModel { layers }))
    }
}

struct Layer {
    norm: nn::RmsNorm,
    gru: GRU,
    dropout: nn::Dropout,
}

impl Layer {
    fn new(dim: usize, dropout: f32, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Layer {
            norm: nn::rms_norm(dim, 1e-5, vb.pp("norm"))?,
            gru: nn::gru(dim, dim, GRUConfig::default(), vb.pp("gru"))?,
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
    fn forward(&self, x: &Tensor, _mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in self.layers.at(mode)? {
            x = layer.forward(&x, mode)?;
        }
        Ok(x)
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        let layers = self.layers.at(Mode::Eval)?;
        let start = layers.iter().map(|layer| layer.gru.zero_state(batch)).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Box::new(GruDecoder { layers, states: start.clone(), start, batch }))
    }
}

struct GruDecoder {
    layers: Vec<Layer>,
    /// One per layer.
    states: Vec<GRUState>,
    start: Vec<GRUState>,
    batch: usize,
}

impl StageDecoder for GruDecoder {
    fn reset(&mut self) {
        self.states.clone_from(&self.start);
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let mut x = Tensor::from_slice(x, (self.batch, x.len() / self.batch), &Device::Cpu)?;
        for (layer, state) in self.layers.iter().zip(&mut self.states) {
            *state = layer.gru.step(&layer.norm.forward(&x)?, state)?;
            x = (x + state.h())?;
        }
        y.copy_from_slice(&x.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
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
        let model = GruBlock { dropout: 0.0, pos_emb_type: None }.build(8, 2, &mut store.root()).unwrap();
        assert!(store.get("1.gru.weight_hh_l0").unwrap().weight_decay());
        perturb(&store);
        let dims = Dims { batch: 2, seq: 7, dim: 8 };
        check_gradients(model.as_ref(), &store, dims);
        check_decoder(model.as_ref(), dims, 1e-5);
        check_causality(model.as_ref(), Dims { batch: 1, ..dims });
    }

    #[test]
    fn backward_walks_through_hundreds_of_positions() {
        let mut store = ParamStore::new(0);
        let model = GruBlock { dropout: 0.0, pos_emb_type: None }.build(2, 1, &mut store.root()).unwrap();
        check_gradients(model.as_ref(), &store, Dims { batch: 1, seq: 512, dim: 2 });
    }
}
