//! What every stage promises: its outputs follow from its parameters and its input alone, sequence by sequence; if it
//! generates, from earlier positions alone, and its decoder gives the same. Each stage is held to it alone, so that the one
//! at fault is named.

use std::sync::Arc;

use mblm_core::config::MblmConfig;
use mblm_core::layer::Dims;
use mblm_core::param::Part;
use mblm_core::testing::{build_alone, decoder_equals_forward, is_causal, is_independent, variation};
use mblm_core::{Param, ParamStore, StageModel};

use super::checks::{CACHED, CAUSAL, Check, INDEPENDENT, LONGEST_DECODED, SAME_BITS, SAME_OUTPUTS, TOLERANCE, spread};
use super::nudge;
use crate::error::Result;

/// The longest sequences that a stage is tried on.
const LONGEST: usize = 2048;
/// The length and the layers of a stage that is looked at before every training.
const SHORT: usize = 9;
const FEW_LAYERS: usize = 2;

/// The model of a stage and its parameters, whose values are not those that hide something.
struct Stage<'a> {
    config: &'a MblmConfig,
    /// From 0.
    n: usize,
    num_layers: usize,
    model: &'a dyn StageModel,
    params: Vec<Arc<Param>>,
    generates: bool,
}

/// Checks the stages of a model whose parameters were moved away from their initial values, on sequences of at most
/// `tokens` tokens of the first stage.
pub(super) fn all(
    config: &MblmConfig,
    models: &[&dyn StageModel],
    params: &ParamStore,
    tokens: usize,
    generates: bool,
) -> Result<Vec<Check>> {
    let mut checks = vec![];
    for (n, &model) in models.iter().enumerate() {
        let params = params.iter().filter(|param| param.part() == Some(Part::Stage(n))).cloned().collect();
        let stage = Stage { config, n, num_layers: config.num_layers[n], model, params, generates };
        let seq = 1 + if n == 0 { tokens } else { config.seq_lens[n] };
        checks.extend(stage.checks(seq.min(LONGEST), seq.min(LONGEST_DECODED))?);
    }
    Ok(checks)
}

/// A look before training takes no time to speak of: more parameters than this are left to `mblm doctor`.
const MOST_PARAMETERS: usize = 1 << 25;

/// Checks stage `n` (from 0) of a model that is about to be trained, with few layers and on a short sequence. Returns
/// whether it has parameters, too.
pub(super) fn shortly(config: &MblmConfig, n: usize, generates: bool) -> Result<(Vec<Check>, bool)> {
    let build = |num_layers| build_stage(config, n, num_layers).map(|built| (built, num_layers));
    // Few layers show what all do, unless the block wants another number of them.
    let ((store, model), num_layers) =
        build(config.num_layers[n].min(FEW_LAYERS)).or_else(|_| build(config.num_layers[n]))?;
    let has_params = store.iter().next().is_some();
    if store.num_elements() > MOST_PARAMETERS {
        return Ok((vec![], has_params));
    }
    nudge(&store)?;
    let params: Vec<_> = store.iter().cloned().collect();
    let stage = Stage { config, n, num_layers, model: &*model, params, generates };
    let seq = (1 + config.seq_lens[n]).min(SHORT);
    Ok((stage.checks(seq, seq)?, has_params))
}

fn build_stage(config: &MblmConfig, n: usize, num_layers: usize) -> Result<(ParamStore, Box<dyn StageModel>)> {
    let (block, dim) = (&*config.blocks[n], config.hidden_dims[n]);
    // No run has this seed by chance, so that values from the building show.
    Ok(build_alone(block, n, dim, num_layers, u64::MAX - n as u64)?)
}

impl Stage<'_> {
    /// Runs all checks on sequences of `seq` positions; decoders, and what runs the stage several times, on `shorter` ones.
    fn checks(&self, seq: usize, shorter: usize) -> Result<Vec<Check>> {
        let dims = |seq| Dims { batch: 2, seq, dim: self.config.hidden_dims[self.n] };
        let mut checks = vec![];
        let mut check = |name, fault| checks.push(Check { name, stage: Some(self.n + 1), fault });
        let (outputs, bits) = self.variation(dims(shorter))?;
        check(SAME_OUTPUTS, outputs);
        check(SAME_BITS, bits);
        check(INDEPENDENT, is_independent(self.model, dims(shorter)).err());
        if self.generates {
            check(CAUSAL, is_causal(self.model, dims(seq), &spread(seq, 1)).err());
            check(CACHED, decoder_equals_forward(self.model, dims(shorter), TOLERANCE).err());
        }
        Ok(checks)
    }

    /// What is wrong with the outputs of the stage and of one that is built again, and with their bits.
    fn variation(&self, dims: Dims) -> Result<(Option<String>, Option<String>)> {
        let (store, rebuilt) = build_stage(self.config, self.n, self.num_layers)?;
        Ok(match variation(self.model, &self.params, (&*rebuilt, &store), dims)? {
            Some(variation) if !variation.changes_results => (None, Some(variation.what)),
            other => (other.map(|variation| variation.what), None),
        })
    }
}
