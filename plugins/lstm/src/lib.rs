//! LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000) as a stage: the stack of
//! `torch.nn.LSTM(dim, dim, num_layers, batch_first=True, dropout=…)`, of which the outputs alone go on.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::block::{Cost, FieldError, PosEmb, StageBlock, StageDecoder, StageModel, TensorDecoder, stacked};
use mblm_sdk::layer::apply;
use mblm_sdk::mode::Mode;
use mblm_sdk::{Error, ParamScope, Result};
use mblm_sdk::{export_plugin, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod decoder;
mod layer;
mod lockstep;
mod panels;
mod recurrence;
mod table;

use decoder::Decoder;
use layer::LstmLayer;

/// A stack of LSTM layers; cost per position does not grow with the sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lstm {
    /// Dropout probability of the outputs of every layer except the last.
    #[serde(default)]
    pub dropout: f32,
    /// Position embeddings of the stage. None by default, because the recurrence knows the order.
    #[serde(default)]
    pub pos_emb_type: Option<PosEmb>,
}

register_block!(
    Lstm,
    name = "lstm",
    about = "A stack of LSTM layers (Hochreiter & Schmidhuber 1997), as torch.nn.LSTM",
    infer = true
);

export_plugin!();

#[typetag::serde(name = "lstm")]
impl StageBlock for Lstm {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.pos_emb_type
    }

    fn takes_mask(&self) -> bool {
        false
    }

    fn validate(&self, _dim: usize) -> std::result::Result<(), FieldError> {
        match (0.0..1.0).contains(&self.dropout) {
            true => Ok(()),
            false => {
                let message = format!("expected a probability in [0, 1), found {}", self.dropout);
                Err(FieldError::new("dropout", message))
            }
        }
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        self.validate(dim).map_err(|e| Error::Block(format!("{}: {}", e.field, e.message)))?;
        let mut params = params.sub("lstm");
        let layers = (0..num_layers)
            .map(|k| {
                let dropout = if k + 1 < num_layers { self.dropout } else { 0.0 };
                Ok(Arc::new(LstmLayer::new(dim, k, dropout, &mut params)?))
            })
            .collect::<Result<_>>()?;
        Ok(Box::new(LstmModel { dim, layers }))
    }
}

struct LstmModel {
    dim: usize,
    layers: Vec<Arc<LstmLayer>>,
}

impl StageModel for LstmModel {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        if mask.is_some() {
            return Err(Error::Block("lstm is causal and takes no attention mask".into()));
        }
        self.layers.iter().try_fold(x.clone(), |x, layer| apply(layer, &x, None, mode))
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        Ok(Box::new(Decoder::new(&self.layers, self.dim, batch)))
    }

    fn tensor_decoder(&self, _batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
        Ok(stacked(&self.layers, LstmLayer::advance, |y| Ok(y.clone())))
    }

    fn cost(&self, _seq_len: usize) -> Option<Cost> {
        let (dim, layers) = (self.dim as f64, self.layers.len() as f64);
        // The products with input and state, and per unit: five activations of about 20 operations, and the cell.
        let flops = 2.0 * 8.0 * dim * dim + 110.0 * dim;
        // The input, four gates and the cell state.
        Some(Cost { flops: layers * flops, activations: layers * 6.0 * dim })
    }
}

#[cfg(test)]
mod tests;
