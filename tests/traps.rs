//! What candle-nn computes without a gradient or without a seed is found by `doctor`, which names the parameter and the
//! counterpart in `mblm_sdk::nn`. With the counterpart, there is nothing to find.

use candle_core::{DType, Device, Tensor};
use mblm::config::MblmConfig;
use mblm::device::Place;
use mblm::model::Sequences;
use mblm::nn::{self, Linear, Module, VarBuilder};
use mblm::registry::BlockRegistry;
use mblm::testing::noise;
use mblm::train::config::ModelConfig;
use mblm::train::doctor::{Finding, examine};
use mblm::yaml::Document;
use mblm::{CandleModule, Mode, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use mblm_blocks as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Adds one operation's output to its input.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Trap {
    op: Op,
    /// Whether it is candle-nn's.
    candle: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Op {
    LayerNorm,
    RmsNorm,
    Softmax,
    Rope,
    Dropout,
}

register_block!(Trap, name = "trap", about = "A block with a trap of candle-nn");

#[typetag::serde(name = "trap")]
impl StageBlock for Trap {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, _: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let trap = self.clone();
        Ok(Box::new(TrapModel(params.candle(move |vb| Net::new(trap.clone(), dim, vb))?)))
    }
}

struct TrapModel(CandleModule<Net>);

impl StageModel for TrapModel {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        Ok(self.0.at(mode)?.forward(x, mode)?)
    }
}

struct Net {
    trap: Trap,
    up: Linear,
    norm: Box<dyn Module>,
    dropout: nn::Dropout,
}

impl Net {
    fn new(trap: Trap, dim: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let at = vb.pp("norm");
        let norm: Box<dyn Module> = match (trap.op, trap.candle) {
            (Op::LayerNorm, true) => Box::new(candle_nn::layer_norm(dim, 1e-5, at)?),
            (Op::LayerNorm, false) => Box::new(nn::layer_norm(dim, 1e-5, at)?),
            (Op::RmsNorm, true) => Box::new(candle_nn::rms_norm(dim, 1e-5, at)?),
            (Op::RmsNorm, false) => Box::new(nn::rms_norm(dim, 1e-5, at)?),
            _ => Box::new(nn::func(|x| Ok(x.clone()))),
        };
        let dropout = nn::Dropout::new(0.5, vb.pp("dropout"));
        Ok(Net { trap, up: nn::linear(dim, dim, vb.pp("up"))?, norm, dropout })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let candle = self.trap.candle;
        let y = self.norm.forward(&self.up.forward(x)?)?;
        let y = match self.trap.op {
            Op::LayerNorm | Op::RmsNorm => y,
            Op::Softmax if candle => candle_nn::ops::softmax_last_dim(&y)?,
            Op::Softmax => nn::ops::softmax_last_dim(&y)?,
            Op::Dropout if candle => candle_nn::Dropout::new(0.5).forward(&y, mode != Mode::Eval)?,
            Op::Dropout => self.dropout.forward(&y, mode)?,
            Op::Rope => {
                let (seq, dim) = (x.dim(1)?, x.dim(2)?);
                let angles = Tensor::arange(0, (seq * dim / 2) as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
                let angles = (angles.reshape((seq, dim / 2))? * 0.1)?;
                let (y, cos, sin) = (y.unsqueeze(1)?, angles.cos()?, angles.sin()?);
                let y = match candle {
                    true => candle_nn::rotary_emb::rope(&y, &cos, &sin)?,
                    false => nn::rotary_emb::rope(&y, &cos, &sin)?,
                };
                y.squeeze(1)?
            }
        };
        x + y
    }
}

fn findings(op: &str, candle: bool) -> Vec<Finding> {
    let block = format!("{{block_type: trap, op: {op}, candle: {candle}}}");
    let yaml = format!(
        "{{num_tokens: 257, pad_token_id: 256, hidden_dims: [8, 8], num_layers: [1, 1], seq_lens: [9, 4], block: {block}}}"
    );
    let document = Document::parse(&yaml, "test").unwrap();
    let config = MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap();
    let ids: Vec<u32> = noise(2 * 30, 5).iter().map(|noise| ((noise + 1.0) * 127.9) as u32).collect();
    let ids = Sequences { ids: &ids, len: 30, loss_mask: None };
    examine(&ModelConfig::Generative(config), 0.0, 1, &ids, Place::default()).unwrap().findings
}

#[test]
fn a_cut_gradient_is_named_with_the_counterpart() {
    for (op, parameter) in
        [("layer-norm", "norm.weight"), ("rms-norm", "norm.weight"), ("softmax", "up.weight"), ("rope", "up.weight")]
    {
        let found = findings(op, true);
        let place = format!("stage_models.1.{parameter}");
        let finding = found.iter().find(|finding| finding.place == place);
        let finding = finding.unwrap_or_else(|| panic!("{op}: {found:#?}"));
        assert!(finding.what.contains("it gets no gradient") && finding.advice.contains("mblm_sdk::nn"), "{finding:?}");
        assert_eq!(findings(op, false).iter().map(|finding| &finding.what).collect::<Vec<_>>(), [""; 0], "{op}");
    }
}

#[test]
fn dropout_without_a_seed_is_named_with_the_counterpart() {
    let found = findings("dropout", true);
    let named = |finding: &Finding| {
        finding.place == "stage 2 (trap)"
            && finding.what.contains("the same dropout seed")
            && finding.what.contains("mblm_sdk::nn::Dropout")
    };
    assert!(found.iter().any(named), "{found:#?}");
    assert_eq!(findings("dropout", false).iter().map(|finding| &finding.what).collect::<Vec<_>>(), [""; 0]);
}
