//! Section `params`: the model, and the length of its training sequences.

use mblm_core::block::PosEmb;
use mblm_core::config::{MblmConfig, MblmEncoderConfig};
use mblm_core::patching::Cutter;
use mblm_core::registry::BlockRegistry;
use mblm_data::cut::Cut;
use mblm_yaml::{ConfigError, Document};
use serde::Serialize;

use super::check;

/// Section `params`.
#[derive(Clone, Debug, Serialize)]
pub struct Params {
    /// The model.
    #[serde(flatten)]
    pub model: ModelConfig,
    /// Bytes of one training sequence.
    pub input_seq_len: usize,
}

/// A model that predicts the next byte, or, with `mblm_config`, one that restores masked bytes.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum ModelConfig {
    /// Predicts the next byte.
    Generative(MblmConfig),
    /// Restores masked bytes.
    Encoder(MblmEncoderConfig),
}

impl ModelConfig {
    /// Its stages.
    pub fn hierarchy(&self) -> &MblmConfig {
        match self {
            ModelConfig::Generative(model) => model,
            ModelConfig::Encoder(encoder) => &encoder.mblm_config,
        }
    }

    fn from_document(document: &Document, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        const LENGTH: &[&str] = &["input_seq_len"];
        if document.get("params.mblm_config").is_some() {
            document.check_fields("params", &[MblmEncoderConfig::FIELDS.as_slice(), LENGTH].concat())?;
            return MblmEncoderConfig::from_section(document, "params", registry).map(ModelConfig::Encoder);
        }
        document.check_fields("params", &[MblmConfig::FIELDS.as_slice(), LENGTH].concat())?;
        MblmConfig::from_section(document, "params", registry).map(ModelConfig::Generative)
    }
}

impl Params {
    /// How training data are cut into sequences, if patches follow the content: each sequence has as many tokens of the first
    /// stage as `input_seq_len` bytes have with full patches. None if all patches are full.
    pub fn cut(&self) -> Option<Cut> {
        let hierarchy = self.model.hierarchy();
        if hierarchy.is_fixed() {
            return None;
        }
        let patches = self.input_seq_len.div_ceil(hierarchy.seq_lens[1..].iter().product());
        let cutter = Cutter::new(hierarchy);
        Some(Cut::new(patches, move |ids, patches| {
            let len = cutter.clone().sequence_len(ids, patches);
            len.map_err(|error| mblm_data::Error::Config(format!("params.patching: {error}")))
        }))
    }

    pub(super) fn from_document(document: &Document, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        const PATH: &str = "params.input_seq_len";
        let config = ModelConfig::from_document(document, registry)?;
        let model = config.hierarchy();
        let input_seq_len: usize = document.section(PATH)?;
        check(document, PATH, input_seq_len > 0, "a positive integer", input_seq_len)?;
        let is_limited = model.blocks.first().is_some_and(|block| block.pos_emb_type() == Some(PosEmb::Fixed));
        let context_len = model.context_len();
        if is_limited && input_seq_len > context_len {
            let lens: Vec<String> = model.seq_lens.iter().map(usize::to_string).collect();
            let product = if lens.len() == 1 { String::new() } else { format!("{} = ", lens.join(" · ")) };
            let message = format!(
                "expected at most {product}{context_len}, found {input_seq_len}: the first stage has fixed positions \
                 for seq_lens[0] = {} patches; raise that, or shorten the input",
                lens[0]
            );
            return Err(document.error(PATH, message));
        }
        Ok(Params { model: config, input_seq_len })
    }
}
