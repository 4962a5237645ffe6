//! The registry of block types. It finds the block that a YAML mapping means.
//!
//! typetag and inventory know only the blocks of one linked binary. A [`BlockSource`] adds others, such as plugins that
//! are loaded at run time.

use std::sync::{Arc, LazyLock};

use mblm_base::nearest::{quoted, suggestion};
use mblm_sdk::block::StageBlock;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::registration::Registration;
pub use mblm_sdk::registration::{TAG, block_type};
use mblm_yaml::{ConfigError, Document, ValueError, describe, join};
use serde_yaml::Value;

/// A block type.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockInfo {
    /// Its `block_type`.
    pub name: String,
    /// A one-line description.
    pub about: String,
    /// Other names that YAML may use.
    pub aliases: Vec<String>,
    /// Whether YAML may leave out `block_type` if only this type accepts the fields.
    pub infers: bool,
    /// The JSON Schema of its fields.
    pub schema: serde_json::Value,
    /// Its origin: a source file and line, or a shared library.
    pub location: String,
}

/// A source of block types.
pub trait BlockSource: Send + Sync {
    /// The types.
    fn blocks(&self) -> Vec<BlockInfo>;

    /// Parses a block from its fields, a mapping without `block_type`. Unknown fields are an error.
    fn parse(&self, block_type: &str, fields: &Value) -> std::result::Result<Arc<dyn StageBlock>, ValueError>;
}

/// The types that are linked into this binary.
struct Builtin;

impl BlockSource for Builtin {
    fn blocks(&self) -> Vec<BlockInfo> {
        let info = |block: &Registration| {
            let (schema, about) = block.describe();
            BlockInfo {
                name: block.name.into(),
                about,
                aliases: block.aliases.iter().map(|alias| alias.to_string()).collect(),
                infers: block.infers,
                schema,
                location: format!("{}:{}", block.file, block.line),
            }
        };
        inventory::iter::<Registration>.into_iter().map(info).collect()
    }

    fn parse(&self, block_type: &str, fields: &Value) -> std::result::Result<Arc<dyn StageBlock>, ValueError> {
        let known = inventory::iter::<Registration>.into_iter().find(|block| block.name == block_type);
        let block = known.ok_or_else(|| ValueError { path: TAG.into(), message: "is not linked in".into() })?;
        block.parse(fields.as_mapping().cloned().unwrap_or_default()).map(Arc::from)
    }
}

/// All block types that a configuration may use.
pub struct BlockRegistry {
    sources: Vec<Box<dyn BlockSource>>,
    /// Sorted by name, each with the index of its source.
    blocks: Vec<(BlockInfo, usize)>,
    /// Added to "unknown block type".
    advice: String,
    /// Made when a configuration asks for a type that is not in `blocks`.
    fallback: Option<Box<LazyLock<BlockRegistry, MakeRegistry>>>,
}

type MakeRegistry = Box<dyn FnOnce() -> BlockRegistry + Send>;

impl BlockRegistry {
    /// An empty registry. Use [`with_source`](Self::with_source) to add types.
    pub fn empty() -> Self {
        BlockRegistry { sources: vec![], blocks: vec![], advice: String::new(), fallback: None }
    }

    /// The types that are linked into this binary.
    ///
    /// # Errors
    /// Two types have the same name. The error names both places.
    pub fn builtin() -> Result<Self> {
        Self::empty().with_source(Builtin)
    }

    /// Adds a fallback registry. It is used if a configuration names a `block_type` that is not in this registry, or
    /// leaves it out and no type of this registry accepts the fields. `make` is called only then, and once. So a plugin
    /// is opened only for a configuration that needs one.
    pub fn with_fallback(mut self, make: impl FnOnce() -> BlockRegistry + Send + 'static) -> Self {
        self.fallback = Some(Box::new(LazyLock::new(Box::new(make))));
        self
    }

    /// Adds a sentence to the error about an unknown block type, for example where else to look.
    pub fn with_advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// Adds the types of a source.
    ///
    /// # Errors
    /// Two types have the same name. The error names both origins.
    pub fn with_source(mut self, source: impl BlockSource + 'static) -> Result<Self> {
        self.add_source(source)?;
        Ok(self)
    }

    /// Adds all types of a source, or none if that fails.
    ///
    /// # Errors
    /// Two types have the same name. The error names both origins.
    pub fn add_source(&mut self, source: impl BlockSource + 'static) -> Result<()> {
        let before = self.blocks.clone();
        for block in source.blocks() {
            for name in std::iter::once(&block.name).chain(&block.aliases) {
                if let Some(other) = self.get(name) {
                    let message = format!(
                        "the block type `{name}` is registered twice: in {} and in {}",
                        other.location, block.location
                    );
                    self.blocks = before;
                    return Err(Error::Block(message));
                }
            }
            let at = self.blocks.partition_point(|(other, _)| other.name < block.name);
            self.blocks.insert(at, (block, self.sources.len()));
        }
        self.sources.push(Box::new(source));
        Ok(())
    }

    /// The types, sorted by name.
    pub fn blocks(&self) -> impl Iterator<Item = &BlockInfo> {
        self.blocks.iter().map(|(block, _)| block)
    }

    /// The type with this name or alias.
    pub fn get(&self, name: &str) -> Option<&BlockInfo> {
        self.blocks().find(|block| block.name == name || block.aliases.iter().any(|alias| alias == name))
    }

    /// The advice to add to "unknown block type".
    pub fn suggestion(&self, name: &str) -> String {
        let text = suggestion(name, &self.blocks().map(|block| block.name.as_str()).collect::<Vec<_>>());
        if self.advice.is_empty() { text } else { format!("{text}; {}", self.advice) }
    }

    /// The registry to use for a type that this one lacks.
    fn fallback(&self) -> &BlockRegistry {
        self.fallback.as_ref().map_or(self, |fallback| LazyLock::force(fallback))
    }

    /// Parses the block at `path` of a document. Its type is the one that `block_type` names, or else the only type
    /// that accepts the fields, among those that opt in.
    pub fn parse(&self, document: &Document, path: &str) -> std::result::Result<Arc<dyn StageBlock>, ConfigError> {
        let value = document.require(path)?;
        let Some(fields) = value.as_mapping() else {
            let message = format!("expected a block, such as {{block_type: …}}, found {}", describe(value));
            return Err(document.error(path, message));
        };
        let mut fields = fields.clone();
        match fields.shift_remove(TAG) {
            Some(Value::String(name)) => {
                let registry = if self.get(&name).is_some() { self } else { self.fallback() };
                let Some(block) = registry.get(&name) else {
                    let message = format!("unknown block type {name:?}; {}", registry.suggestion(&name));
                    return Err(document.error(&join(path, TAG), message));
                };
                registry.parse_as(block, &Value::Mapping(fields)).map_err(|error| document.error_in(path, error))
            }
            Some(other) => {
                let message = format!("expected the name of a block type, found {}", describe(&other));
                Err(document.error(&join(path, TAG), message))
            }
            None => {
                let fields = Value::Mapping(fields);
                let registry = if self.fits_any(&fields) { self } else { self.fallback() };
                registry.infer(&fields).map_err(|message| document.error(path, message))
            }
        }
    }

    fn parse_as(&self, block: &BlockInfo, fields: &Value) -> std::result::Result<Arc<dyn StageBlock>, ValueError> {
        let source = self.blocks.iter().find(|(other, _)| other.name == block.name).map(|&(_, source)| source);
        match source.and_then(|source| self.sources.get(source)) {
            Some(source) => source.parse(&block.name, fields),
            None => Err(ValueError { path: TAG.into(), message: format!("unknown block type {:?}", block.name) }),
        }
    }

    /// Whether a type that opts in to inference accepts the fields.
    fn fits_any(&self, fields: &Value) -> bool {
        self.blocks().any(|block| block.infers && self.parse_as(block, fields).is_ok())
    }

    fn infer(&self, fields: &Value) -> std::result::Result<Arc<dyn StageBlock>, String> {
        let mut fitting = Vec::new();
        let mut misfits = String::new();
        for block in self.blocks().filter(|block| block.infers) {
            match self.parse_as(block, fields) {
                Ok(parsed) => fitting.push((block.name.as_str(), parsed)),
                Err(error) => misfits.push_str(&format!("\n  {}: {error}", block.name)),
            }
        }
        match fitting.len() {
            1 => Ok(fitting.remove(0).1),
            0 => {
                let others: Vec<&str> = self.blocks().filter(|b| !b.infers).map(|b| b.name.as_str()).collect();
                let others = if others.is_empty() { String::new() } else { format!(" (or {})", quoted(&others)) };
                Err(format!("these fields fit no block type; choose one with `{TAG}`{others}{misfits}"))
            }
            _ => {
                let names: Vec<&str> = fitting.iter().map(|&(name, _)| name).collect();
                Err(format!("these fields fit several block types, {}; choose one with `{TAG}`", quoted(&names)))
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use mblm_sdk::block::{FieldError, PosEmb, StageModel};
    use mblm_sdk::param::ParamScope;
    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    use super::*;

    /// Transformer layers.
    ///
    /// More text.
    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Transformer {
        attn_head_dims: usize,
        attn_num_heads: usize,
        attn_use_rot_embs: bool,
        #[serde(default)]
        attn_dropout: f32,
        #[serde(default = "two")]
        ff_multiplier: usize,
        #[serde(default)]
        ff_dropout: f32,
        #[serde(default)]
        use_flash_attn: bool,
        #[serde(default)]
        pos_emb_type: Option<PosEmb>,
    }

    fn two() -> usize {
        2
    }

    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Mamba {
        d_state: usize,
        d_conv: usize,
        expand: usize,
        headdim: usize,
        #[serde(default)]
        dropout: f32,
        #[serde(default)]
        pos_emb_type: Option<PosEmb>,
    }

    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(transparent)]
    struct Mamba1(Mamba);

    mblm_sdk::register_block!(Transformer, name = "transformer", infer = true);
    mblm_sdk::register_block!(Mamba, name = "mamba2", about = "State space layers", infer = true, aliases = ["mamba"]);
    mblm_sdk::register_block!(Mamba1, name = "mamba1", about = "Older layers");

    fn build() -> Result<Box<dyn StageModel>> {
        Err(Error::Block("blocks of tests build nothing".into()))
    }

    #[typetag::serde(name = "transformer")]
    impl StageBlock for Transformer {
        fn pos_emb_type(&self) -> Option<PosEmb> {
            self.pos_emb_type
        }
        fn build(&self, _: usize, _: usize, _: &mut ParamScope) -> Result<Box<dyn StageModel>> {
            build()
        }
    }

    #[typetag::serde(name = "mamba2")]
    impl StageBlock for Mamba {
        fn pos_emb_type(&self) -> Option<PosEmb> {
            self.pos_emb_type
        }
        fn validate(&self, dim: usize) -> std::result::Result<(), FieldError> {
            let (inner, headdim) = (dim * self.expand, self.headdim);
            match inner.is_multiple_of(headdim) {
                true => Ok(()),
                false => Err(FieldError::new("headdim", format!("expected a divisor of {inner}, found {headdim}"))),
            }
        }
        fn build(&self, _: usize, _: usize, _: &mut ParamScope) -> Result<Box<dyn StageModel>> {
            build()
        }
    }

    #[typetag::serde(name = "mamba1")]
    impl StageBlock for Mamba1 {
        fn pos_emb_type(&self) -> Option<PosEmb> {
            self.0.pos_emb_type
        }
        fn build(&self, _: usize, _: usize, _: &mut ParamScope) -> Result<Box<dyn StageModel>> {
            build()
        }
    }

    pub(crate) fn registry() -> BlockRegistry {
        BlockRegistry::builtin().unwrap()
    }

    /// A source as a plugin host would be one: its types are not known to typetag.
    struct Plugin(&'static str);

    #[derive(Debug, Serialize)]
    #[serde(transparent)]
    struct PluginBlock {
        fields: Value,
        #[serde(skip)]
        name: &'static str,
    }

    impl StageBlock for PluginBlock {
        fn typetag_name(&self) -> &'static str {
            self.name
        }
        fn typetag_deserialize(&self) {}
        fn pos_emb_type(&self) -> Option<PosEmb> {
            None
        }
        fn build(&self, _: usize, _: usize, _: &mut ParamScope) -> Result<Box<dyn StageModel>> {
            build()
        }
    }

    impl BlockSource for Plugin {
        fn blocks(&self) -> Vec<BlockInfo> {
            vec![BlockInfo {
                name: self.0.into(),
                about: "From a plugin".into(),
                aliases: vec![],
                infers: true,
                schema: json!({}),
                location: "plugins/lib.so".into(),
            }]
        }
        fn parse(&self, _: &str, fields: &Value) -> std::result::Result<Arc<dyn StageBlock>, ValueError> {
            match fields.get("gates") {
                Some(_) => Ok(Arc::new(PluginBlock { fields: fields.clone(), name: self.0 })),
                None => Err(ValueError { path: "gates".into(), message: "missing".into() }),
            }
        }
    }

    fn parse(registry: &BlockRegistry, text: &str) -> std::result::Result<String, String> {
        let document = Document::parse(&format!("block: {{{text}}}"), "b.yaml").unwrap();
        let block = registry.parse(&document, "block").map_err(|error| error.to_string())?;
        assert!(format!("{:?}", serde_yaml::to_value(&*block).unwrap()).contains(block_type(&*block)));
        Ok(block_type(&*block).into())
    }

    #[test]
    fn built_in_types_describe_themselves() {
        let registry = registry();
        let about: Vec<_> = registry.blocks().map(|b| (b.name.as_str(), b.about.as_str(), b.infers)).collect();
        let want = [
            ("mamba1", "Older layers", false),
            ("mamba2", "State space layers", true),
            ("transformer", "Transformer layers.", true),
        ];
        assert_eq!(about, want);
        let transformer = registry.get("transformer").unwrap();
        assert!(transformer.location.contains("registry.rs:"), "{}", transformer.location);
        assert_eq!(transformer.schema["required"], json!(["attn_head_dims", "attn_num_heads", "attn_use_rot_embs"]));
    }

    #[test]
    fn the_type_is_named_aliased_or_inferred() {
        let mamba = "d_state: 1, d_conv: 1, expand: 1, headdim: 1";
        let registry = registry();
        for (tag, want) in [("block_type: mamba1,", "mamba1"), ("block_type: mamba,", "mamba2"), ("", "mamba2")] {
            assert_eq!(parse(&registry, &format!("{tag} {mamba}")).as_deref(), Ok(want));
        }
        let transformer = "attn_head_dims: 1, attn_num_heads: 1, attn_use_rot_embs: true, attn_dropout: 0";
        assert_eq!(parse(&registry, transformer).as_deref(), Ok("transformer"));
        assert_eq!(parse(&registry, &format!("{transformer}, block_type: transformer")).as_deref(), Ok("transformer"));
    }

    #[test]
    fn a_source_adds_types() {
        let registry = registry().with_source(Plugin("lstm")).unwrap();
        assert_eq!(parse(&registry, "block_type: lstm, gates: 4").as_deref(), Ok("lstm"));
        assert_eq!(parse(&registry, "gates: 4").as_deref(), Ok("lstm"));
        let error = parse(&registry, "block_type: lstm, gaits: 4").unwrap_err();
        assert_eq!(error, "b.yaml: block.gates: missing (line 1)");
        let written = registry.parse(&Document::parse("{block_type: lstm, gates: 4}", "").unwrap(), "").unwrap();
        assert_eq!(serde_yaml::to_string(&*written).unwrap(), "block_type: lstm\ngates: 4\n");
    }

    #[test]
    fn the_fallback_is_made_only_for_a_type_that_is_not_built_in() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let lazy = registry().with_fallback(move || {
            count.fetch_add(1, Ordering::Relaxed);
            registry().with_source(Plugin("lstm")).unwrap().with_advice("look in the attic")
        });
        let mamba = "d_state: 1, d_conv: 1, expand: 1, headdim: 1";
        for block in [format!("block_type: mamba1, {mamba}"), mamba.into()] {
            parse(&lazy, &block).unwrap();
        }
        assert!(parse(&lazy, "block_type: mamba2, gaits: 4").is_err(), "a mistake in a built-in block");
        assert_eq!(made.load(Ordering::Relaxed), 0);
        for block in ["block_type: lstm, gates: 4", "gates: 4"] {
            assert_eq!(parse(&lazy, block).as_deref(), Ok("lstm"));
        }
        let error = parse(&lazy, "block_type: gru").unwrap_err();
        assert!(error.contains("`lstm`") && error.contains("; look in the attic (line 1)"), "{error}");
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn fields_of_several_types_need_a_name() {
        let registry = registry().with_source(Plugin("lstm")).unwrap().with_source(Plugin("gru")).unwrap();
        let error = parse(&registry, "gates: 4").unwrap_err();
        let want =
            "b.yaml: block: these fields fit several block types, `gru`, `lstm`; choose one with `block_type` (line 1)";
        assert_eq!(error, want);
    }

    #[test]
    fn a_name_is_taken_once() {
        for name in ["mamba2", "mamba"] {
            let Err(error) = registry().with_source(Plugin(name)) else { panic!("{name} was taken twice") };
            let error = error.to_string();
            let start = format!("the block type `{name}` is registered twice: in mblm-core/src/registry.rs:");
            assert!(error.starts_with(&start) && error.ends_with(" and in plugins/lib.so"), "{error}");
        }
    }
}
