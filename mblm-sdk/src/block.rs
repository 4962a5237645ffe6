//! The contracts of the hierarchy. A *block* is the configuration of what runs at a stage. It builds a *stage model*,
//! and that creates a *decoder*, its incremental form.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use mblm_compute::device::Place;
use mblm_compute::error::{Error, Result};
use mblm_compute::mode::Mode;
use mblm_compute::param::ParamScope;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Position embeddings of a stage. They are applied before the start token is prepended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PosEmb {
    /// Adds a learned vector per position. The stage's sequence can then not be longer than its `seq_lens` entry.
    Fixed,
    /// Rotates pairs of channels by the position (Su et al. 2021, eq. 34).
    Rope,
}

/// An invalid field in a block's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// The field, for example `headdim`.
    pub field: Cow<'static, str>,
    /// What was found, what was expected, and what to do.
    pub message: String,
}

impl FieldError {
    /// An error at `field`.
    pub fn new(field: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        FieldError { field: field.into(), message: message.into() }
    }
}

/// The maximum number of channels of a stage or a layer, and of tokens. A matrix between two layers of this width does
/// not fit in memory. Sizes within this limit can be added, and their products checked, without overflow.
pub const MAX_WIDTH: usize = 1 << 24;
/// The maximum number of layers of a stage.
pub const MAX_LAYERS: usize = 1 << 14;

/// Computes a width from a block's configuration: the product of `fields`, times `dim` (pass 1 for none).
///
/// # Errors
/// The width is 0 or larger than [`MAX_WIDTH`]. The error names the largest field.
pub fn width(fields: &[(&'static str, usize)], dim: usize) -> Result<usize, FieldError> {
    if let Some((field, _)) = fields.iter().find(|(_, value)| *value == 0) {
        return Err(FieldError::new(*field, "expected a positive integer, found 0"));
    }
    let product = fields.iter().try_fold(dim, |product, (_, value)| product.checked_mul(*value));
    product.filter(|&product| product <= MAX_WIDTH).ok_or_else(|| {
        let factors = || fields.iter().copied().chain((dim > 1).then_some(("width", dim)));
        let names = factors().map(|(name, _)| name).collect::<Vec<_>>().join(" x ");
        let values = factors().map(|(_, value)| value.to_string()).collect::<Vec<_>>().join(" x ");
        let of = if factors().count() > 1 { format!(" for {names}") } else { String::new() };
        let largest = fields.iter().max_by_key(|(_, value)| *value).map_or("", |(field, _)| field);
        FieldError::new(largest, format!("expected at most {MAX_WIDTH}{of}, found {values}"))
    })
}

/// The configuration of what runs at a stage.
#[typetag::serde(tag = "block_type")]
pub trait StageBlock: fmt::Debug + Send + Sync {
    /// The position embeddings of this stage.
    fn pos_emb_type(&self) -> Option<PosEmb>;

    /// The plugin that this block comes from, or `None` if the type is linked into the program.
    fn plugin(&self) -> Option<&PluginOrigin> {
        None
    }

    /// Checks the configuration at width `dim`, before anything is built.
    fn validate(&self, _dim: usize) -> Result<(), FieldError> {
        Ok(())
    }

    /// Builds the model of one stage of width `dim`. Creates its parameters in `params`, with PyTorch's names.
    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>>;
}

/// The plugin that a block comes from. A run records it to find the plugin again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginOrigin {
    /// The plugin's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The library's file.
    #[serde(serialize_with = "shown")]
    pub path: PathBuf,
    /// The SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// Serializes a path for readers. A path that is not UTF-8 must not prevent a run from being saved.
fn shown<S: serde::Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

impl PluginOrigin {
    /// Whether both are the same file, wherever it is stored. Several libraries may share a plugin name.
    pub fn is_file_of(&self, other: &Self) -> bool {
        self.sha256 == other.sha256
    }

    /// The first digits of the SHA-256, for messages.
    pub fn short_sum(&self) -> String {
        format!("{}…", self.sha256.get(..12).unwrap_or(&self.sha256))
    }
}

/// The cost of a stage, for `mblm inspect`: per position of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating point operations of a forward pass. A multiplication and an addition count as two.
    pub flops: f64,
    /// Floats that a training step keeps for the backward pass.
    pub activations: f64,
}

/// The differentiable function that runs a stage.
pub trait StageModel: Send + Sync {
    /// Runs complete sequences.
    ///
    /// # Shapes
    /// - `x`: `(batch, seq, dim)`; returns the same shape
    /// - `mask`: `(batch, seq)`, `u8`, 1 = attend
    ///
    /// # Errors
    /// A causal block may reject a mask.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor>;

    /// Whether position t of the output depends only on inputs up to t. A block that is not causal runs only in
    /// encoders and cannot generate.
    fn is_causal(&self) -> bool {
        true
    }

    /// Creates the incremental form for `batch` sequences at once. It gives the same outputs as
    /// [`forward`](Self::forward), position by position. The default keeps all inputs and runs `forward` over them
    /// again for each position.
    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        Ok(replay(self, batch))
    }

    /// Whether [`decoder`](Self::decoder) reads parameters as slices ([`Param::values`](crate::Param::values)), which works
    /// wherever they lie: it then decodes on the CPU a model that lies on a GPU. Without, such a model is decoded there, by
    /// running [`forward`](Self::forward) again for each token.
    fn decodes_on_host(&self) -> bool {
        false
    }

    /// What the Python package's `state_dict` contains besides the parameters: vectors that are derived from the
    /// configuration, under their names within the stage. Files for the package need them.
    fn buffers(&self) -> Vec<(&'static str, Vec<f32>)> {
        Vec::new()
    }

    /// The cost of one position if sequences have `seq_len` positions. `None` if it is unknown.
    fn cost(&self, _seq_len: usize) -> Option<Cost> {
        None
    }
}

/// Decodes a batch of sequences incrementally. They advance together.
pub trait StageDecoder: Send {
    /// Resets the state. The next step is position 0.
    fn reset(&mut self);

    /// Advances by one position.
    ///
    /// # Shapes
    /// - `x`, `y`: `(batch, dim)`; `y` is overwritten with the output at this position
    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()>;

    /// Advances by `seq` positions at once.
    ///
    /// # Shapes
    /// - `x`, `y`: `(seq, batch, dim)`
    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        let row = (x.len() / seq.max(1)).max(1);
        for (x, y) in x.chunks_exact(row).zip(y.chunks_exact_mut(row)) {
            self.step(x, y)?;
        }
        Ok(())
    }
}

/// The decoder of a block that does not implement one.
pub fn replay<M: StageModel + ?Sized>(model: &M, batch: usize) -> Box<dyn StageDecoder + '_> {
    replay_at(model, batch, Place::default())
}

/// As [`replay`], for a model whose parameters lie at `place`.
pub fn replay_at<M: StageModel + ?Sized>(model: &M, batch: usize, place: Place) -> Box<dyn StageDecoder + '_> {
    Box::new(ReplayDecoder {
        forward: move |x: &Tensor| model.forward(x, None, Mode::Eval),
        batch,
        place,
        inputs: vec![],
    })
}

/// Runs the whole prefix again at every step. This is slow but always correct, so a new block can generate immediately.
struct ReplayDecoder<F> {
    forward: F,
    batch: usize,
    place: Place,
    /// One entry `(batch, dim)` for each position so far.
    inputs: Vec<Tensor>,
}

impl<F: Fn(&Tensor) -> Result<Tensor> + Send> StageDecoder for ReplayDecoder<F> {
    fn reset(&mut self) {
        self.inputs.clear();
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let dim = x.len() / self.batch;
        let x = Tensor::from_slice(x, (self.batch, dim), &Device::Cpu)?;
        self.inputs.push(x.to_dtype(self.place.dtype)?.to_device(&self.place.device)?);
        let outputs = (self.forward)(&Tensor::stack(&self.inputs, 1)?)?;
        let last = outputs.narrow(1, self.inputs.len() - 1, 1)?.flatten_all()?;
        let last = last.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        if last.len() != y.len() {
            return Err(Error::Block(format!(
                "a stage model returned shape {:?} for {dim} wide input",
                outputs.dims()
            )));
        }
        y.copy_from_slice(&last);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_width_is_a_product_that_fits() {
        let heads = |dims, heads| width(&[("head_dims", dims), ("num_heads", heads)], 1);
        assert_eq!((heads(64, 8), width(&[("expand", 2)], 512)), (Ok(512), Ok(1024)));
        let cases = [
            (
                heads(1 << 32, 2),
                "head_dims",
                "expected at most 16777216 for head_dims x num_heads, found 4294967296 x 2",
            ),
            (heads(3, usize::MAX), "num_heads", "for head_dims x num_heads, found 3 x 18446744073709551615"),
            (width(&[("expand", 1 << 63)], 512), "expand", "for expand x width, found 9223372036854775808 x 512"),
            (width(&[("d_state", usize::MAX)], 1), "d_state", "expected at most 16777216, found 18446744073709551615"),
            (heads(64, 0), "num_heads", "expected a positive integer, found 0"),
        ];
        for (found, field, message) in cases {
            let error = found.unwrap_err();
            assert!(error.field == field && error.message.ends_with(message), "{error:?}");
        }
    }
}
