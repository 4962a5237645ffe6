//! Patching: where patches end. A rule looks at the bytes so far; `params.patching` names one for the innermost patches, or
//! one for each level of patches.
//!
//! A rule is a type that implements [`PatchRule`] and is registered with [`register_patching!`](crate::register_patching):
//!
//! ```
//! use mblm_core::patching::PatchRule;
//!
//! /// A patch ends after each zero byte.
//! #[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct AfterZero {}
//!
//! mblm_core::register_patching!(AfterZero, name = "after_zero");
//!
//! #[typetag::serde(name = "after_zero")]
//! impl PatchRule for AfterZero {
//!     fn ends_patch(&self, bytes: &[u32]) -> mblm_core::Result<bool> {
//!         Ok(bytes.last() == Some(&0))
//!     }
//! }
//! # assert!(mblm_core::patching::registry::known("after_zero").is_some());
//! ```

mod cutter;
pub mod registry;
mod rules;

use std::fmt::Debug;
use std::path::Path;

pub use cutter::{Cutter, Following};
use mblm_sdk::block::FieldError;
use mblm_sdk::error::Result;
pub use rules::{ByteSet, Delimiters, Fixed, Spacelike};

use crate::registry::BlockRegistry;

/// The field that names a rule.
pub const TAG: &str = "patching_type";

/// A sequence without the pad tokens at its end.
pub fn without_padding(ids: &[u32], pad: u32) -> &[u32] {
    let end = ids.iter().rposition(|&id| id != pad).map_or(0, |last| last + 1);
    &ids[..end]
}

/// A rule that says where patches end.
///
/// It must be causal: whether a patch ends after a byte follows from that byte and those before it. Otherwise generation
/// could not follow it.
#[typetag::serde(tag = "patching_type")]
pub trait PatchRule: Debug + Send + Sync {
    /// Whether a patch ends after the last of `bytes`: all ids of the sequence so far, at least one. Ids from 256 on are
    /// special tokens.
    ///
    /// # Errors
    /// The rule cannot be computed.
    fn ends_patch(&self, bytes: &[u32]) -> Result<bool>;

    /// Whether a patch ends after each of `bytes`, the first ids of a sequence: what [`ends_patch`](Self::ends_patch) says, for
    /// rules that find it faster together. The caller may stop before the end.
    fn ends<'a>(&'a self, bytes: &'a [u32]) -> Box<dyn Iterator<Item = Result<bool>> + 'a> {
        Box::new((1..=bytes.len()).map(|len| self.ends_patch(&bytes[..len])))
    }

    /// Follows a sequence from its start, for rules that find [`ends_patch`](Self::ends_patch) faster with a state. None if
    /// there is nothing to keep.
    ///
    /// # Errors
    /// The rule cannot be computed.
    fn follow(&self) -> Result<Option<Box<dyn Follow>>> {
        Ok(None)
    }

    /// The most bytes in a patch (in an outer one: inner patches), if fewer than the stage's entry of `seq_lens`, which
    /// limits patches in any case.
    fn max_patch(&self) -> Option<usize> {
        None
    }

    /// Checks the fields beyond their types. Called once, before anything else.
    ///
    /// # Errors
    /// Names the field, what was found and what was expected.
    fn validate(&self, _model: &RuleModel) -> std::result::Result<(), FieldError> {
        Ok(())
    }

    /// Whether patches end where they are full and nowhere else.
    fn is_fixed(&self) -> bool {
        false
    }
}

/// The state of a rule that follows one sequence.
pub trait Follow: Send {
    /// Takes the next id. Returns whether a patch ends after it.
    ///
    /// # Errors
    /// The rule cannot be computed.
    fn push(&mut self, id: u32) -> Result<bool>;
}

/// What a rule is checked against: the model whose patches it ends.
#[derive(Clone, Copy)]
pub struct RuleModel<'a> {
    /// Tokens of its vocabulary.
    pub num_tokens: usize,
    /// The blocks that it is built from.
    pub registry: &'a BlockRegistry,
    /// The folder of its configuration's file.
    pub folder: &'a Path,
}
