//! One level of the hierarchy: embedding, positions, model, and the projection to the stage below.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::block::{PosEmb, StageModel};
use mblm_sdk::error::Result;
use mblm_sdk::layer::{Group, by_group};
use mblm_sdk::mode::Mode;
use mblm_sdk::param::{Init, Param, ParamStore, Part};

use super::projection::NextStage;
use super::recompute::recompute;
use super::stage_input::{Positions, StageInput};
use super::token_embedding::{EmbeddingSizes, TokenEmbedding};
use super::watch::Watch;
use crate::config::MblmConfig;

/// One level of the hierarchy.
#[derive(Clone)]
pub(crate) struct Stage {
    pub(crate) embedding: TokenEmbedding,
    pub(crate) input: StageInput,
    pub(crate) model: Arc<dyn StageModel>,
    /// The model's parameters.
    pub(crate) params: Vec<Arc<Param>>,
    /// Into how many chunks the sequences are cut, if the model is to be recomputed in backward.
    pub(crate) chunks: Option<usize>,
    /// To the stage below; none at the local stage.
    pub(crate) next: Option<NextStage>,
    pub(crate) seq_len: usize,
    pub(crate) dim: usize,
    pub(crate) watch: Arc<Watch>,
}

impl Stage {
    pub(crate) fn new(config: &MblmConfig, n: usize, starts: bool, params: &mut ParamStore) -> Result<Self> {
        let last = config.num_stages() - 1;
        let (dim, seq_len, block) = (config.hidden_dims[n], config.seq_lens[n], &config.blocks[n]);
        let sizes = EmbeddingSizes {
            vocab: config.num_tokens,
            pad: config.pad_token_id,
            local_dim: config.hidden_dims[last],
            patch: config.seq_lens[n + 1..].iter().product(),
            dim,
            is_local: n == last,
        };
        let mut root = params.root();
        let start = match starts {
            true => Some(root.sub("start_tokens").of(Part::Start(n)).param(&n.to_string(), &[dim], Init::Normal)?),
            false => None,
        };
        let kind: Option<PosEmb> = block.pos_emb_type();
        let positions = Positions::new(kind, seq_len, dim, &mut root.sub("pos_embs").sub(n).of(Part::Positions(n)))?;
        let embedding =
            TokenEmbedding::new(&sizes, &mut root.sub("token_embs_rev").sub(last - n).of(Part::Embedding(n)))?;
        let model = block.build(dim, config.num_layers[n], &mut root.sub("stage_models").sub(n).of(Part::Stage(n)))?;
        let next = match n == last {
            true => None,
            false => {
                let (seq, width) = (config.seq_lens[n + 1], config.hidden_dims[n + 1]);
                Some(NextStage::new(
                    dim,
                    seq,
                    width,
                    &mut root.sub("to_next_stage_proj").sub(n).sub(1).of(Part::Projection(n)),
                )?)
            }
        };
        let chunks = config.train_checkpoint_chunks.as_ref().filter(|_| n > 0).map(|chunks| chunks[n - 1]);
        Ok(Stage {
            embedding,
            input: StageInput { positions, start },
            model: Arc::from(model),
            params: params.iter().filter(|p| p.part() == Some(Part::Stage(n))).cloned().collect(),
            chunks,
            next,
            seq_len,
            dim,
            watch: Arc::default(),
        })
    }

    /// The parameters of the model, of its input and of the tokens that it reads; not those of projections.
    pub(crate) fn all_params(&self) -> impl Iterator<Item = &Arc<Param>> {
        self.params.iter().chain([self.embedding.table()]).chain(self.input.params())
    }

    pub(crate) fn run(&self, input: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        self.watch.run(input, mode, |input| match self.chunks {
            Some(chunks) => recompute(&self.model, &self.params, input, mask, chunks, mode),
            None => self.model.forward(input, mask, mode),
        })
    }

    /// Runs sequences of several lengths, `(1, rows, D)`. Chunks are of the sequences of one length.
    pub(crate) fn run_packed(&self, input: &Tensor, groups: &Arc<[Group]>, mode: Mode) -> Result<Tensor> {
        self.watch.run(input, mode, |input| match self.chunks {
            Some(chunks) => {
                by_group(input, groups, mode, |x, mode| recompute(&self.model, &self.params, x, None, chunks, mode))
            }
            None => self.model.forward_packed(input, groups, mode),
        })
    }
}
