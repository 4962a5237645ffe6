//! The built-in rules.

use mblm_sdk::block::FieldError;
use mblm_sdk::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{PatchRule, RuleModel};

crate::register_patching!(Fixed, name = "fixed");
crate::register_patching!(Spacelike, name = "spacelike");
crate::register_patching!(Delimiters, name = "delimiters");

/// All patches have the full length of their stage, as in the Python package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fixed {}

#[typetag::serde(name = "fixed")]
impl PatchRule for Fixed {
    fn ends_patch(&self, _: &[u32]) -> Result<bool> {
        Ok(false)
    }

    fn is_fixed(&self) -> bool {
        true
    }
}

/// A patch ends after the first byte that is not part of a word, such as a space (SpaceByte, Slagle 2024, section 3).
///
/// Bytes of words are ASCII letters, ASCII digits and the continuation bytes of UTF-8. A patch ends after any other byte,
/// unless the byte before it was one of those too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spacelike {
    /// The most bytes in a patch (in an outer one: inner patches). Default and upper limit: the stage's entry of `seq_lens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_patch: Option<usize>,
}

fn is_spacelike(id: u32) -> bool {
    u8::try_from(id).is_ok_and(|byte| !byte.is_ascii_alphanumeric() && !(0x80..=0xBF).contains(&byte))
}

#[typetag::serde(name = "spacelike")]
impl PatchRule for Spacelike {
    fn ends_patch(&self, bytes: &[u32]) -> Result<bool> {
        Ok(match bytes {
            [.., before, last] => is_spacelike(*last) && !is_spacelike(*before),
            [only] => is_spacelike(*only),
            [] => false,
        })
    }

    fn max_patch(&self) -> Option<usize> {
        self.max_patch
    }
}

/// A patch ends after each byte of a set, such as a newline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delimiters {
    /// The bytes that end a patch: ASCII characters such as `"\n"`, or a list of numbers from 0 to 255.
    pub bytes: ByteSet,
    /// The most bytes in a patch (in an outer one: inner patches). Default and upper limit: the stage's entry of `seq_lens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_patch: Option<usize>,
}

/// A set of bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected ASCII characters or a list of numbers from 0 to 255")]
pub enum ByteSet {
    /// ASCII characters.
    Characters(String),
    /// Numbers.
    Numbers(Vec<u8>),
}

impl ByteSet {
    fn as_slice(&self) -> &[u8] {
        match self {
            ByteSet::Characters(text) => text.as_bytes(),
            ByteSet::Numbers(bytes) => bytes,
        }
    }
}

#[typetag::serde(name = "delimiters")]
impl PatchRule for Delimiters {
    fn ends_patch(&self, bytes: &[u32]) -> Result<bool> {
        let last = bytes.last().and_then(|&id| u8::try_from(id).ok());
        Ok(last.is_some_and(|byte| self.bytes.as_slice().contains(&byte)))
    }

    fn max_patch(&self) -> Option<usize> {
        self.max_patch
    }

    fn validate(&self, _: &RuleModel) -> std::result::Result<(), FieldError> {
        match &self.bytes {
            set if set.as_slice().is_empty() => Err(FieldError::new("bytes", "expected at least one byte, found none")),
            ByteSet::Characters(text) if !text.is_ascii() => {
                let message = format!("expected ASCII characters or a list of numbers from 0 to 255, found {text:?}");
                Err(FieldError::new("bytes", message))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `text` with a `|` after each byte that ends a patch.
    fn cut(rule: &dyn PatchRule, text: &str) -> String {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let mut cut = Vec::new();
        for (i, byte) in text.bytes().enumerate() {
            cut.push(byte);
            if rule.ends_patch(&ids[..=i]).unwrap() {
                cut.push(b'|');
            }
        }
        String::from_utf8_lossy(&cut).into_owned()
    }

    #[test]
    fn words_end_with_the_first_byte_behind_them() {
        let rule = Spacelike::default();
        assert_eq!(cut(&rule, "To be, or 42?  Yes."), "To |be,| or |42?|  Yes.|");
        assert_eq!(cut(&rule, "\n\nfn main() {"), "\n|\nfn |main(|) {");
        // The first byte of a character of several bytes is spacelike, those that follow it are not.
        assert!(rule.ends_patch(&[b'a'.into(), 0xC3]).unwrap());
        assert!(!rule.ends_patch(&[b'a'.into(), 0xA9]).unwrap());
        assert!(!rule.ends_patch(&[b'a'.into(), 256]).unwrap(), "a special token");
    }

    #[test]
    fn lines_end_with_a_newline() {
        let rule = Delimiters { bytes: ByteSet::Characters("\n;".into()), max_patch: None };
        assert_eq!(cut(&rule, "a;b\n\nc"), "a;|b\n|\n|c");
        let numbers = Delimiters { bytes: ByteSet::Numbers(vec![0]), max_patch: None };
        assert_eq!(cut(&numbers, "a\0b"), "a\0|b");
        assert!(!cut(&Fixed {}, "a b\n").contains('|'));
    }

    #[test]
    fn sets_without_a_byte_or_beyond_ascii_are_refused() {
        let registry = crate::registry::BlockRegistry::builtin().unwrap();
        let model = RuleModel { num_tokens: 256, registry: &registry, folder: std::path::Path::new("") };
        let message = |bytes| Delimiters { bytes, max_patch: None }.validate(&model).unwrap_err().message;
        assert_eq!(message(ByteSet::Numbers(vec![])), "expected at least one byte, found none");
        assert!(message(ByteSet::Characters("é".into())).contains("found \"é\""));
    }
}
