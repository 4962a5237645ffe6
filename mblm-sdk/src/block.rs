//! The contracts of the hierarchy. A *block* is the configuration of what runs at a stage. It builds a *stage model*,
//! and that creates *decoders*, its incremental forms.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;
use mblm_compute::error::Result;
use mblm_compute::layer::{Group, by_group};
use mblm_compute::mode::Mode;
use mblm_compute::param::ParamScope;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod decoder;

pub use decoder::{StageDecoder, TensorDecoder, by_slices, by_tensors, replay, replay_tensors, stacked};

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

    /// Whether its models accept an attention mask. Every encoder has one, so the configuration of an encoder refuses a block
    /// that does not.
    fn takes_mask(&self) -> bool {
        true
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

    /// Runs complete sequences of several lengths, without a mask. The default runs each group of sequences of equal length
    /// by itself; a block that works row by row for the most part does better with all rows at once.
    ///
    /// # Shapes
    /// - `x`: `(1, rows, dim)`, the sequences of the groups one after another; returns the same shape
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    fn forward_packed(&self, x: &Tensor, groups: &Arc<[Group]>, mode: Mode) -> Result<Tensor> {
        by_group(x, groups, mode, |x, mode| self.forward(x, None, mode))
    }

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

    /// Creates the incremental form for a model on another device than the CPU, where `batch` sequences at once are decoded
    /// by tensors. The default keeps all inputs there and runs `forward` over them again for each position.
    fn tensor_decoder(&self, _batch: usize) -> Result<Box<dyn TensorDecoder + '_>> {
        Ok(replay_tensors(self))
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
