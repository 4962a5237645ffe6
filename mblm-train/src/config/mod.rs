//! The training configuration: the reference package's YAML, with optional additions, a file per section.

mod differences;
mod io;
mod params;
mod resume;
mod train;

pub use io::IoSection;
use mblm_core::block::PluginOrigin;
use mblm_core::registry::BlockRegistry;
use mblm_yaml::{ConfigError, Document};
pub use params::{ModelConfig, Params};
pub use resume::ResumeSection;
use serde::Serialize;
use serde_yaml::Value;
pub use train::{LossAverage, OptimizerKind, ScheduleKind, TargetStrategy, TrainSection};

/// A whole training YAML: `params`, `train`, `io`, `resume`. Serialised, it reads back as the same, without `resume`.
#[derive(Clone, Debug, Serialize)]
pub struct RunConfig {
    /// The model and its training sequence length.
    pub params: Params,
    /// How to train.
    pub train: TrainSection,
    /// What to read and where to write.
    pub io: IoSection,
    /// The checkpoint that a new run starts from.
    #[serde(skip)]
    pub resume: Option<ResumeSection>,
}

/// The sections that every configuration has.
pub(crate) const SECTIONS: [&str; 3] = ["params", "train", "io"];

/// A section that the package's output configurations hold and that says nothing about a new run.
pub(crate) const SUMMARY: &str = "summary";

impl RunConfig {
    /// Reads and checks a whole document.
    pub fn from_document(document: &Document, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        if document.get("budget").is_some() && document.get("params").is_none() {
            return Err(document.error("", "this is a study; run it with `mblm compare`"));
        }
        document.check_fields("", &[SECTIONS.as_slice(), &["resume", SUMMARY]].concat())?;
        let config = RunConfig {
            params: Params::from_document(document, registry)?,
            train: document.section("train")?,
            io: document.section("io")?,
            resume: match document.get("resume") {
                None | Some(Value::Null) => None,
                Some(_) => Some(document.section("resume")?),
            },
        };
        config.train.check(document)?;
        config.check_masking(document)?;
        config.check_lr_scale(document)?;
        config.check_batch(document)?;
        config.io.check(document)?;
        Ok(config)
    }

    fn check_masking(&self, document: &Document) -> Result<(), ConfigError> {
        const PATH: &str = "train.masking_proba";
        match (&self.params.model, self.train.masking_proba) {
            (ModelConfig::Generative(_), None) => Ok(()),
            (ModelConfig::Generative(_), Some(_)) => {
                Err(document.error(PATH, "only encoders (`params.mblm_config`) use it; remove it"))
            }
            (ModelConfig::Encoder(_), Some(share)) => {
                check(document, PATH, share > 0.0 && share <= 1.0, "a share above 0, up to 1", share)
            }
            (ModelConfig::Encoder(_), None) => {
                Err(document.error("train", "missing field `masking_proba`, the share of bytes to mask, such as 0.15"))
            }
        }
    }

    fn check_lr_scale(&self, document: &Document) -> Result<(), ConfigError> {
        const PATH: &str = "train.lr_scale";
        let Some(scale) = &self.train.lr_scale else { return Ok(()) };
        let stages = self.params.model.hierarchy().num_stages();
        check(document, PATH, scale.len() == stages, &format!("{stages} numbers, one per stage"), scale.len())?;
        let wrong = scale.iter().position(|scale| !(*scale > 0.0 && scale.is_finite()));
        wrong.map_or(Ok(()), |n| check(document, &format!("{PATH}[{n}]"), false, "a positive number", scale[n]))
    }

    /// A batch has fewer positions, padding and start tokens included, than 32 bits count.
    fn check_batch(&self, document: &Document) -> Result<(), ConfigError> {
        let model = self.params.model.hierarchy();
        let patch = model.context_len() / model.seq_lens[0];
        let padded = self.params.input_seq_len.div_ceil(patch).checked_mul(patch);
        // At most one start token for each byte.
        let positions = padded.and_then(|padded| padded.checked_mul(2));
        match positions.filter(|&positions| positions <= u32::MAX as usize) {
            None => {
                let found = self.params.input_seq_len;
                let message = format!(
                    "expected at most {} bytes, padded to whole patches of {patch}, found {found}",
                    u32::MAX / 2
                );
                Err(document.error("params.input_seq_len", message))
            }
            Some(positions) => {
                let most = u32::MAX as usize / positions;
                let found = self.train.batch_size;
                check(document, "train.batch_size", found <= most, &format!("at most {most} sequences so long"), found)
            }
        }
    }

    /// The plugins that blocks of the model come from, each once.
    pub fn plugins(&self) -> Vec<PluginOrigin> {
        let mut plugins: Vec<_> =
            self.params.model.hierarchy().blocks.iter().filter_map(|block| block.plugin().cloned()).collect();
        plugins.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
        plugins.dedup();
        plugins
    }

    /// The configuration as YAML, with every default and `block_type` filled in.
    pub fn to_yaml(&self) -> mblm_core::Result<String> {
        serde_yaml::to_string(self)
            .map_err(|error| mblm_core::Error::Block(format!("a block's configuration cannot be written: {error}")))
    }
}

fn check(
    document: &Document,
    path: &str,
    fits: bool,
    expected: &str,
    found: impl std::fmt::Display,
) -> Result<(), ConfigError> {
    if fits { Ok(()) } else { Err(document.error(path, format!("expected {expected}, found {found}"))) }
}

#[cfg(test)]
mod tests;
