//! The registry of block types that are linked into a binary (the program or a plugin).

use mblm_base::value::{ValueError, from_deserializer};
use serde::de::IntoDeserializer;
use serde::de::value::MapDeserializer;

use crate::block::StageBlock;

/// The field that names a block type.
pub const TAG: &str = "block_type";

/// A block type that is linked into this binary. Made by [`register_block!`](crate::register_block).
#[doc(hidden)]
pub struct Registration {
    pub name: &'static str,
    pub about: &'static str,
    pub aliases: &'static [&'static str],
    pub infers: bool,
    pub schema: fn() -> schemars::Schema,
    pub file: &'static str,
    pub line: u32,
}

inventory::collect!(Registration);

impl Registration {
    /// Returns the JSON Schema of the fields and a one-line description: `about`, or the first line of the struct's
    /// docs.
    pub fn describe(&self) -> (serde_json::Value, String) {
        let schema = (self.schema)().to_value();
        let docs = schema["description"].as_str().and_then(|text| text.lines().next()).unwrap_or_default();
        let about = if self.about.is_empty() { docs } else { self.about }.to_string();
        (schema, about)
    }

    /// Parses a block from the fields of a mapping, without `block_type`.
    ///
    /// # Errors
    /// An invalid field. The error says which, what was found, and what was expected.
    pub fn parse<'de, V, E>(&self, fields: impl IntoIterator<Item = (V, V)>) -> Result<Box<dyn StageBlock>, ValueError>
    where
        V: From<&'static str> + IntoDeserializer<'de, E>,
        E: serde::de::Error,
    {
        // The tag goes first: typetag then reads the other fields one by one, and errors keep their path.
        let tag = (V::from(TAG), V::from(self.name));
        from_deserializer(MapDeserializer::new(std::iter::once(tag).chain(fields)))
    }
}

/// Registers a block type. `name` must be the one in its `#[typetag::serde(name = …)]`.
///
/// ```ignore
/// register_block!(Lstm, name = "lstm", about = "A stack of LSTM layers", infer = true);
/// ```
///
/// Optional arguments, in this order: `about`, a line for `mblm blocks` (default: the first line of the struct's docs);
/// `infer = true`, which lets YAML leave out `block_type` if only this type accepts the fields; `aliases = ["…"]`,
/// other names that YAML may use.
#[macro_export]
macro_rules! register_block {
    (
        $block:ty, name = $name:literal
        $(, about = $about:literal)? $(, infer = $infer:literal)? $(, aliases = [$($alias:literal),* $(,)?])? $(,)?
    ) => {
        $crate::inventory::submit! {
            $crate::registration::Registration {
                name: $name,
                about: concat!($($about)?),
                aliases: &[$($($alias),*)?],
                infers: false $(|| $infer)?,
                schema: || $crate::schemars::schema_for!($block),
                file: file!(),
                line: line!(),
            }
        }
    };
}

/// The `block_type` of a block.
pub fn block_type(block: &dyn StageBlock) -> &'static str {
    block.typetag_name()
}
