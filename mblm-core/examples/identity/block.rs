//! The block itself, which `benches/plugin_border.rs` also compiles in.

use candle_core::Tensor;
use mblm_core::{Init, Mode, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// It has no fields.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Identity {}

register_block!(Identity, name = "identity", about = "Gives back what it is given", infer = false);

#[typetag::serde(name = "identity")]
impl StageBlock for Identity {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        // A transformer's layer has 4 square matrices in its attention and 8 in its feed-forward part.
        params.param("unused", &[num_layers, 12, dim, dim], Init::Const(0.0))?;
        Ok(Box::new(Identity {}))
    }
}

impl StageModel for Identity {
    fn forward(&self, x: &Tensor, _mask: Option<&Tensor>, _mode: Mode) -> Result<Tensor> {
        Ok(x.clone())
    }
}
