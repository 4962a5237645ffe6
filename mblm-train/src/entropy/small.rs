//! The small model of the rule `entropy`, which is loaded once per process, and the entropies of its predictions.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use mblm_base::terminal;
use mblm_core::error::{Error, Result};
use mblm_core::model::Mblm;
use mblm_core::patching::RuleModel;
use mblm_core::registry::BlockRegistry;
use mblm_core::{Mode, transfer};
use mblm_yaml::Document;
use sha2::{Digest, Sha256};

use crate::checkpoint::{self, Checkpoint, Shelf, Which};
use crate::config::RunConfig;

/// Digits of the SHA-256 that tell models apart.
const DIGITS: usize = 16;
/// After so long, what is waited for is said.
const PATIENCE: Duration = Duration::from_secs(1);

/// All that were loaded. They live as long as the process, like the decoders that read them.
static LOADED: Mutex<Vec<&'static Small>> = Mutex::new(Vec::new());

/// A trained model with one stage.
pub(super) struct Small {
    model: Mblm,
    checkpoint: PathBuf,
    sum: String,
    window: usize,
}

impl std::fmt::Debug for Small {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Small({} {})", self.checkpoint.display(), self.sum)
    }
}

impl Small {
    /// The model of the run or checkpoint at `path`: of a run, the checkpoint whose sum is `wanted`, or else the best one.
    ///
    /// # Errors
    /// There is no such run, or its model has several stages, or is an encoder.
    pub(super) fn load(
        path: &Path,
        large: &RuleModel,
        wanted: Option<&str>,
    ) -> std::result::Result<&'static Self, String> {
        let path = resolve(path, large.folder).ok_or_else(|| {
            format!(
                "expected the folder of a run, but {path:?} does not exist, neither in the current directory nor in a folder \
                 around {:?}; train a model with one stage first, or restore the folder",
                large.folder
            )
        })?;
        let (checkpoint, sum) = choose(&path, wanted).map_err(|error| error.to_string())?;
        let is_it = |small: &&&Small| small.sum == sum && small.checkpoint == checkpoint.path();
        let loaded = || LOADED.lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(small) = loaded().iter().find(is_it) {
            return Ok(small);
        }
        // Not under the lock: a thread that waits for others may begin to read another configuration.
        let read = Self::read(&checkpoint, sum.clone(), large.registry)?;
        let mut loaded = loaded();
        if let Some(small) = loaded.iter().find(is_it) {
            return Ok(small);
        }
        let small: &'static Small = Box::leak(Box::new(read));
        loaded.push(small);
        Ok(small)
    }

    fn read(checkpoint: &Checkpoint, sum: String, registry: &BlockRegistry) -> std::result::Result<Self, String> {
        let path = checkpoint.path();
        let name = path.join("config.yaml").display().to_string();
        let yaml = checkpoint.config_yaml().map_err(|error| error.to_string())?;
        let document = Document::parse(&yaml, &name).map_err(|error| error.to_string())?;
        // Before a rule of that model is read, which could name this one.
        if let Some(lens) =
            document.get("params.seq_lens").and_then(|lens| lens.as_sequence()).filter(|lens| lens.len() != 1)
        {
            return Err(format!("{name}: expected a model with one stage, found {} stages", lens.len()));
        }
        if document.get("params.mblm_config").is_some() {
            return Err(format!("{name}: expected a model that predicts bytes, found an encoder"));
        }
        let config = RunConfig::from_document(&document, registry).map_err(|error| error.to_string())?;
        let (window, hierarchy) = (config.params.input_seq_len, config.params.model.hierarchy());
        if window < 2 {
            return Err(format!("{name}: expected an input_seq_len of at least 2, found {window}"));
        }
        let load = || -> crate::Result<Mblm> {
            checkpoint.state()?.check_plugins(&config.plugins())?;
            let model = Mblm::new(hierarchy, 0)?;
            model.params().load(&checkpoint.weights()?)?;
            Ok(model)
        };
        let model = load().map_err(|error| error.to_string())?;
        Ok(Small { model, checkpoint: path.into(), sum, window })
    }

    /// Says once what the program waits for, if it waits.
    pub(super) fn say_that_it_takes_time(&self) {
        static BEGUN: OnceLock<Instant> = OnceLock::new();
        static SAID: AtomicBool = AtomicBool::new(false);
        if BEGUN.get_or_init(Instant::now).elapsed() > PATIENCE && !SAID.swap(true, Ordering::Relaxed) {
            terminal::line(format!(
                "patches: {} reads the data, to find where patches end; the next run with these data will know",
                self.checkpoint.display()
            ));
        }
    }

    /// What tells it from other models.
    pub(super) fn sum(&self) -> &str {
        &self.sum
    }

    /// Its checkpoint's folder.
    pub(super) fn checkpoint(&self) -> &Path {
        &self.checkpoint
    }

    pub(super) fn model(&self) -> &Mblm {
        &self.model
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.model.config().num_tokens
    }

    /// The most bytes that it sees: those of a training sequence.
    pub(super) fn window(&self) -> usize {
        self.window
    }

    /// Where the window begins that ends behind byte `t` of a sequence, or later.
    pub(super) fn window_start(&self, t: usize) -> usize {
        let step = self.window / 2;
        match t.checked_sub(self.window) {
            None => 0,
            Some(past) => (past / step + 1) * step,
        }
    }

    /// The places of a window that are computed for its byte `place`: a quarter, half or all of it, since most sequences are
    /// shorter than a window.
    fn computed(&self, place: usize) -> usize {
        let parts = [self.window / 4, self.window / 2, self.window];
        parts.into_iter().find(|len| place < *len).unwrap_or(self.window)
    }

    /// The entropies of the bytes behind `from`, `from + 1`, … of a sequence, as many as one pass gives, in bits.
    ///
    /// # Errors
    /// An id lies outside the vocabulary, or the model's output is not finite.
    pub(super) fn window_from(&self, bytes: &[u32], from: usize) -> Result<Vec<f64>> {
        let start = self.window_start(from);
        // The same length for the same byte, so that what follows it does not change a bit of the result.
        let len = self.computed(from - start);
        let end = bytes.len().min(start + len);
        let mut ids = bytes[start..end].to_vec();
        ids.resize(len, 0);
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.num_tokens()) {
            return Err(Error::Input(format!("id {id} lies outside the vocabulary of {} tokens", self.num_tokens())));
        }
        let ids = Tensor::from_vec(ids, (1, len), &Device::Cpu)?;
        let logits = transfer::to_vec::<f32>(&self.model.logits(&ids, Mode::Eval)?.flatten_all()?)?;
        let rows = logits.chunks_exact(self.num_tokens()).take(end - start).skip(from - start);
        rows.map(|row| self.entropy(row)).collect()
    }

    /// The entropy of the byte behind `t` of a sequence, as [`window_from`](Self::window_from) computes it.
    pub(super) fn entropy_behind(&self, bytes: &[u32], t: usize) -> Result<f64> {
        Ok(self.window_from(&bytes[..=t], t)?[0])
    }

    /// The entropy of the distribution with these logits, in bits.
    ///
    /// # Errors
    /// The logits are not finite.
    pub(super) fn entropy(&self, logits: &[f32]) -> Result<f64> {
        let bits = entropy(logits);
        match bits.is_finite() {
            true => Ok(bits),
            false => Err(Error::NotFinite(format!("the entropy of the model {} is {bits}", self.checkpoint.display()))),
        }
    }
}

/// The folder that `path` names: from the current directory, or from one of the folders around `folder`.
fn resolve(path: &Path, folder: &Path) -> Option<PathBuf> {
    if path.as_os_str().is_empty() {
        return None;
    }
    let around = std::path::absolute(folder).unwrap_or_default();
    let around = around.ancestors().map(|folder| folder.join(path));
    std::iter::once(path.to_path_buf()).chain(around).find(|path| path.exists())
}

/// The checkpoint of `path` with the sum `wanted`; if there is none, the best one. And its sum.
fn choose(path: &Path, wanted: Option<&str>) -> crate::Result<(Checkpoint, String)> {
    if let (Some(wanted), Ok(shelf)) = (wanted, Shelf::of_run(path)) {
        let readable =
            shelf.list()?.into_iter().rev().filter_map(|path| Checkpoint::open(&path).and_then(with_sum).ok());
        if let Some(found) = readable.into_iter().find(|(_, sum)| sum == wanted) {
            return Ok(found);
        }
    }
    with_sum(checkpoint::find(path, Which::Best).or_else(|_| checkpoint::find(path, Which::Newest))?)
}

/// The sum of a model's weights and of the fields that say how they are used.
fn with_sum(checkpoint: Checkpoint) -> crate::Result<(Checkpoint, String)> {
    let yaml = checkpoint.config_yaml()?;
    let config: serde_yaml::Value = serde_yaml::from_str(&yaml).unwrap_or_default();
    let params = serde_json::to_string(&config.get("params")).unwrap_or_default();
    let sum = Sha256::new().chain_update(checkpoint.weights_sum()).chain_update(params).finalize();
    let digits: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((checkpoint, format!("sha256:{}", &digits[..DIGITS])))
}

/// `-Σ p log2 p` of `p = softmax(logits)`.
fn entropy(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut weighted) = (0.0, 0.0);
    for &logit in logits {
        let below = f64::from(logit - most);
        let weight = below.exp();
        sum += weight;
        weighted += weight * below;
    }
    (sum.ln() - weighted / sum) / std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_are_those_of_the_distribution() {
        assert!((entropy(&[3.0; 8]) - 3.0).abs() < 1e-12);
        assert!(entropy(&[100.0, 0.0]) < 1e-9);
        // Probabilities 1/2, 1/4 and 1/4.
        assert!((entropy(&[2f32.ln(), 0.0, 0.0]) - 1.5).abs() < 1e-6);
        assert!(entropy(&[f32::NAN, 0.0]).is_nan());
    }
}
