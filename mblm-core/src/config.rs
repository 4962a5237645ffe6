//! The model's configuration. Its fields are those of the Python package.

use std::path::Path;
use std::sync::Arc;

use mblm_sdk::block::{MAX_LAYERS, MAX_WIDTH, PosEmb, StageBlock};
use mblm_yaml::{ConfigError, Document, describe, join};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use serde_yaml::Value;

use crate::patching::{self, Fixed, PatchRule, RuleModel};
use crate::registry::BlockRegistry;

/// The maximum number of stages. With more stages of at least two tokens, the context length would not fit in 64 bits.
const MAX_STAGES: usize = 64;

/// The configuration of a [`Mblm`](crate::model::Mblm). Lists are ordered from the global stage to the local one.
///
/// In YAML, `block` is one mapping for all stages or a list with one per stage. [`BlockRegistry::parse`] finds its
/// type. Serialized, it is a list with every `block_type` filled in.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct MblmConfig {
    /// Vocabulary size `V`.
    pub num_tokens: usize,
    /// The id that pads sequences. Its embedding is zero, and it is never predicted.
    pub pad_token_id: usize,
    /// Width `D_n` of each stage.
    pub hidden_dims: Vec<usize>,
    /// Layers of each stage.
    pub num_layers: Vec<usize>,
    /// Sequence length `P_n` of each stage.
    pub seq_lens: Vec<usize>,
    /// For each stage except the first: the number of chunks that its patches are split into. Each chunk is recomputed
    /// in the backward pass, which saves memory.
    pub train_checkpoint_chunks: Option<Vec<usize>>,
    /// Where patches end: a rule for the innermost patches, or a list of rules from the outside in, at most one per stage
    /// but the first. Patches without a rule have the full length of their stage (`fixed`).
    #[serde(skip_serializing_if = "all_fixed", serialize_with = "serialize_rules")]
    #[schemars(with = "serde_json::Value", default)]
    pub patching: Vec<Arc<dyn PatchRule>>,
    /// What runs at each stage.
    #[serde(rename = "block", serialize_with = "serialize_blocks")]
    #[schemars(with = "serde_json::Value")]
    pub blocks: Vec<Arc<dyn StageBlock>>,
}

impl MblmConfig {
    /// The number of stages.
    pub fn num_stages(&self) -> usize {
        self.seq_lens.len()
    }

    /// The longest sequence in bytes, `P_1 · … · P_N`.
    pub fn context_len(&self) -> usize {
        self.seq_lens.iter().product()
    }

    /// Whether all patches have the full length of their stage.
    pub fn is_fixed(&self) -> bool {
        all_fixed(&self.patching)
    }

    /// The rule of each level of patches, from the outside in: of the sequences of each stage but the first.
    pub fn rules(&self) -> Vec<Arc<dyn PatchRule>> {
        let levels = self.num_stages().saturating_sub(1);
        let fixed = (self.patching.len()..levels).map(|_| Arc::new(Fixed {}) as Arc<dyn PatchRule>);
        fixed.chain(self.patching.iter().cloned()).collect()
    }

    /// The fields in YAML.
    pub const FIELDS: [&str; 8] = [
        "num_tokens",
        "pad_token_id",
        "hidden_dims",
        "num_layers",
        "seq_lens",
        "train_checkpoint_chunks",
        "patching",
        "block",
    ];

    /// Reads and checks the section `path` of a document; an empty path is the whole document.
    pub fn from_document(document: &Document, path: &str, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        document.check_fields(path, &Self::FIELDS)?;
        Self::from_section(document, path, registry)
    }

    /// Like [`from_document`](Self::from_document), for a section with other fields too. The caller checks for unknown
    /// fields.
    pub fn from_section(document: &Document, path: &str, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        let numbers: Numbers = document.section(path)?;
        let section = Section { document, path };
        section.check_numbers(&numbers)?;
        let folder = Path::new(document.name()).parent().unwrap_or(Path::new(""));
        let model = RuleModel { num_tokens: numbers.num_tokens, registry, folder };
        let patching = patching::registry::parse(document, &join(path, "patching"), &numbers.seq_lens, &model)?;
        let blocks = section.blocks(&numbers.hidden_dims, registry)?;
        let Numbers { num_tokens, pad_token_id, hidden_dims, num_layers, seq_lens, train_checkpoint_chunks } = numbers;
        let train_checkpoint_chunks = train_checkpoint_chunks.filter(|chunks| !chunks.is_empty());
        Ok(MblmConfig {
            num_tokens,
            pad_token_id,
            hidden_dims,
            num_layers,
            seq_lens,
            train_checkpoint_chunks,
            patching,
            blocks,
        })
    }
}

fn serialize_blocks<S: Serializer>(blocks: &[Arc<dyn StageBlock>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(blocks.iter().map(|block| &**block))
}

fn serialize_rules<S: Serializer>(rules: &[Arc<dyn PatchRule>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(rules.iter().map(|rule| &**rule))
}

fn all_fixed(rules: &[Arc<dyn PatchRule>]) -> bool {
    rules.iter().all(|rule| rule.is_fixed())
}

/// The fields of [`MblmConfig`] that are numbers.
#[derive(Deserialize)]
struct Numbers {
    num_tokens: usize,
    pad_token_id: usize,
    hidden_dims: Vec<usize>,
    num_layers: Vec<usize>,
    seq_lens: Vec<usize>,
    #[serde(default)]
    train_checkpoint_chunks: Option<Vec<usize>>,
}

/// A model's section of a document.
struct Section<'a> {
    document: &'a Document,
    path: &'a str,
}

impl Section<'_> {
    fn error(&self, field: &str, message: String) -> ConfigError {
        self.document.error(&join(self.path, field), message)
    }

    fn check_numbers(&self, numbers: &Numbers) -> Result<(), ConfigError> {
        let Numbers { num_tokens, pad_token_id, hidden_dims, num_layers, seq_lens, train_checkpoint_chunks } = numbers;
        if *num_tokens > MAX_WIDTH {
            return Err(self.error("num_tokens", format!("expected at most {MAX_WIDTH}, found {num_tokens}")));
        }
        check_token_id(self.document, &join(self.path, "pad_token_id"), *pad_token_id, *num_tokens)?;
        let (dims, layers, lens) = (hidden_dims.len(), num_layers.len(), seq_lens.len());
        if dims != layers || dims != lens {
            let odd = match (dims == layers, dims == lens, layers == lens) {
                (_, true, _) => "num_layers",
                (_, _, true) => "hidden_dims",
                _ => "seq_lens",
            };
            let found = format!("hidden_dims has {dims}, num_layers {layers}, seq_lens {lens}");
            return Err(self.error(odd, format!("expected as many entries as the other lists, one per stage: {found}")));
        }
        if lens == 0 {
            return Err(self.error("seq_lens", "expected one entry per stage, found none".into()));
        }
        if lens > MAX_STAGES {
            return Err(self.error("seq_lens", format!("expected at most {MAX_STAGES} stages, found {lens}")));
        }
        for (field, list) in [("hidden_dims", hidden_dims), ("num_layers", num_layers), ("seq_lens", seq_lens)] {
            self.check_positive(field, list)?;
        }
        let limits = [("hidden_dims", hidden_dims, MAX_WIDTH), ("num_layers", num_layers, MAX_LAYERS)];
        for (field, list, most) in limits {
            if let Some(i) = list.iter().position(|&number| number > most) {
                let message = format!("expected at most {most}, found {}", list[i]);
                return Err(self.error(&format!("{field}[{i}]"), message));
            }
        }
        if seq_lens.iter().try_fold(1usize, |product, &len| product.checked_mul(len)).is_none() {
            return Err(self.error("seq_lens", "the product of the lengths does not fit 64 bits".into()));
        }
        match train_checkpoint_chunks {
            Some(chunks) if !chunks.is_empty() && chunks.len() != lens - 1 => {
                let found = chunks.len();
                let message = format!("expected {}, one per stage but the first, or null; found {found}", lens - 1);
                Err(self.error("train_checkpoint_chunks", message))
            }
            Some(chunks) => self.check_positive("train_checkpoint_chunks", chunks),
            None => Ok(()),
        }
    }

    fn check_positive(&self, field: &str, list: &[usize]) -> Result<(), ConfigError> {
        match list.iter().position(|&number| number == 0) {
            Some(i) => Err(self.error(&format!("{field}[{i}]"), "expected a positive integer, found 0".into())),
            None => Ok(()),
        }
    }

    fn blocks(&self, dims: &[usize], registry: &BlockRegistry) -> Result<Vec<Arc<dyn StageBlock>>, ConfigError> {
        let path = join(self.path, "block");
        let paths: Vec<String> = match self.document.require(&path)? {
            Value::Sequence(blocks) if blocks.len() != dims.len() => {
                let message = format!("expected {} blocks, one per stage, found {}", dims.len(), blocks.len());
                return Err(self.document.error(&path, message));
            }
            Value::Sequence(blocks) => (0..blocks.len()).map(|i| format!("{path}[{i}]")).collect(),
            Value::Mapping(_) => vec![path],
            other => {
                let message = format!("expected a block or a list with one per stage, found {}", describe(other));
                return Err(self.document.error(&path, message));
            }
        };
        let parsed = paths.iter().map(|path| registry.parse(self.document, path)).collect::<Result<Vec<_>, _>>()?;
        let stage = |i: usize| i.min(parsed.len() - 1);
        for (i, &dim) in dims.iter().enumerate() {
            let block = &parsed[stage(i)];
            if let Err(error) = block.validate(dim) {
                return Err(self.document.error(&join(&paths[stage(i)], &error.field), error.message));
            }
            if block.pos_emb_type() == Some(PosEmb::Rope) && dim % 2 == 1 {
                let message = format!("`rope` rotates pairs of channels, so the width must be even; found {dim}");
                return Err(self.error(&format!("hidden_dims[{i}]"), message));
            }
        }
        Ok((0..dims.len()).map(|i| parsed[stage(i)].clone()).collect())
    }
}

/// Where the block of stage `stage` (from 0) of the model at `path` stands.
fn block_path(document: &Document, path: &str, stage: usize) -> String {
    let blocks = join(path, "block");
    match document.get(&blocks) {
        Some(Value::Sequence(_)) => format!("{blocks}[{stage}]"),
        _ => blocks,
    }
}

/// Checks that `id` is in the vocabulary.
fn check_token_id(document: &Document, path: &str, id: usize, num_tokens: usize) -> Result<(), ConfigError> {
    if id < num_tokens {
        return Ok(());
    }
    Err(document.error(path, format!("expected an id below num_tokens, which is {num_tokens}, found {id}")))
}

/// How the attention mask of a patch is derived from the masks of its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MaskReduce {
    /// A patch is attended to if any of its bytes is.
    #[default]
    Any,
    /// A patch is attended to if all of its bytes are.
    All,
}

/// The configuration of a [`MblmEncoder`](crate::model::MblmEncoder).
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct MblmEncoderConfig {
    /// The id that replaces a masked byte.
    pub mask_token_id: usize,
    /// How the mask of a patch is derived from the masks of its bytes.
    #[schemars(default)]
    pub mask_reduce_strat: MaskReduce,
    /// The hierarchy.
    pub mblm_config: MblmConfig,
}

impl MblmEncoderConfig {
    /// The fields in YAML.
    pub const FIELDS: [&str; 3] = ["mask_token_id", "mask_reduce_strat", "mblm_config"];

    /// Reads and checks the section `path` of a document; an empty path is the whole document.
    pub fn from_document(document: &Document, path: &str, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        document.check_fields(path, &Self::FIELDS)?;
        Self::from_section(document, path, registry)
    }

    /// Like [`from_document`](Self::from_document), for a section with other fields too.
    pub fn from_section(document: &Document, path: &str, registry: &BlockRegistry) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Fields {
            mask_token_id: usize,
            #[serde(default)]
            mask_reduce_strat: MaskReduce,
        }
        let Fields { mask_token_id, mask_reduce_strat } = document.section(path)?;
        let mblm_config = MblmConfig::from_document(document, &join(path, "mblm_config"), registry)?;
        if let Some(stage) = mblm_config.blocks.iter().position(|block| !block.takes_mask()) {
            let name = mblm_config.blocks[stage].typetag_name();
            let message = format!(
                "`{name}` takes no attention mask, which an encoder has; expected a block that does, such as \
                 `transformerEncoder`"
            );
            return Err(document.error(&block_path(document, &join(path, "mblm_config"), stage), message));
        }
        if !mblm_config.is_fixed() {
            let message = "an encoder has patches of full length: expected `fixed`, or no such field".to_string();
            return Err(document.error(&join(path, "mblm_config.patching"), message));
        }
        let field = join(path, "mask_token_id");
        check_token_id(document, &field, mask_token_id, mblm_config.num_tokens)?;
        if mask_token_id == mblm_config.pad_token_id {
            let message = format!("expected another id than pad_token_id, found {mask_token_id} for both");
            return Err(document.error(&field, message));
        }
        Ok(MblmEncoderConfig { mask_token_id, mask_reduce_strat, mblm_config })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tests::registry;

    const MODEL: &str = "\
num_tokens: 257
pad_token_id: 256
hidden_dims: [512, 256]
num_layers: [6, 3]
seq_lens: [256, 8]
train_checkpoint_chunks: null
block:
- d_state: 64
  d_conv: 4
  expand: 2
  headdim: 64
  pos_emb_type: null
- attn_head_dims: 64
  attn_num_heads: 4
  attn_use_rot_embs: true
  pos_emb_type: fixed
";

    #[test]
    fn the_schemas_describe_the_fields_that_are_read() {
        let fields = |schema: schemars::Schema| {
            let schema = schema.to_value();
            schema["properties"].as_object().unwrap().keys().cloned().collect::<Vec<String>>()
        };
        let sorted = |names: &[&str]| {
            let mut names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(fields(schemars::schema_for!(MblmConfig)), sorted(&MblmConfig::FIELDS));
        assert_eq!(fields(schemars::schema_for!(MblmEncoderConfig)), sorted(&MblmEncoderConfig::FIELDS));
    }

    fn read(text: &str) -> Result<MblmConfig, ConfigError> {
        MblmConfig::from_document(&Document::parse(text, "a.yaml")?, "", &registry())
    }

    #[test]
    fn a_model_is_read_and_written_back() {
        let config = read(MODEL).unwrap();
        assert_eq!((config.num_stages(), config.context_len(), config.pad_token_id), (2, 2048, 256));
        assert_eq!(config.blocks[1].pos_emb_type(), Some(PosEmb::Fixed));
        let text = serde_yaml::to_string(&config).unwrap();
        assert!(text.contains("- block_type: mamba2\n  d_state: 64\n"), "{text}");
        assert!(text.contains("- block_type: transformer\n"), "{text}");
        assert_eq!(serde_yaml::to_string(&read(&text).unwrap()).unwrap(), text);
    }

    #[test]
    fn one_block_runs_every_stage() {
        let block = "block: {block_type: mamba2, d_state: 64, d_conv: 4, expand: 2, headdim: 64}\n";
        let text = MODEL.split_once("block:").unwrap().0.to_string() + block;
        let config = read(&text).unwrap();
        assert!(config.blocks.len() == 2 && Arc::ptr_eq(&config.blocks[0], &config.blocks[1]));
        let error = read(&text.replace("headdim: 64", "headdim: 96")).unwrap_err().to_string();
        assert_eq!(error, "a.yaml: block.headdim: expected a divisor of 1024, found 96 (line 7)");
    }

    #[test]
    fn an_encoder_is_read() {
        let indented: String = MODEL.lines().map(|line| format!("  {line}\n")).collect();
        let read = |head: &str| {
            let document = Document::parse(&format!("{head}\nmblm_config:\n{indented}"), "e.yaml")?;
            MblmEncoderConfig::from_document(&document, "", &registry())
        };
        assert_eq!(read("mask_token_id: 3").unwrap().mask_reduce_strat, MaskReduce::Any);
        let all = read("{mask_token_id: 3, mask_reduce_strat: all}").map(|_| ()).unwrap_err();
        assert!(all.message.starts_with("not valid YAML"), "{all}");
        let config = read("mask_token_id: 3\nmask_reduce_strat: all").unwrap();
        assert_eq!((config.mask_token_id, config.mask_reduce_strat), (3, MaskReduce::All));
        let error = read("mask_token_id: 256").unwrap_err().to_string();
        assert_eq!(error, "e.yaml: mask_token_id: expected another id than pad_token_id, found 256 for both (line 1)");
        let error = read("mask_token_id: 257").unwrap_err().to_string();
        assert_eq!(error, "e.yaml: mask_token_id: expected an id below num_tokens, which is 257, found 257 (line 1)");
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let cases = [
            ("num_tokens: 257", "num_tokens: many", "num_tokens: expected a positive integer, found \"many\" (line 1)"),
            ("num_tokens: 257", "num_token: 257", "num_token: unknown field; did you mean `num_tokens`? (line 1)"),
            ("num_tokens: 257\n", "", "missing field `num_tokens`"),
            (
                "pad_token_id: 256",
                "pad_token_id: 257",
                "pad_token_id: expected an id below num_tokens, which is 257, found 257 (line 2)",
            ),
            ("id: 256", "id: -1", "pad_token_id: expected a positive integer, found -1 (line 2)"),
            ("[512, 256]", "512", "hidden_dims: expected a list, found 512 (line 3)"),
            ("[512, 256]", "[512, 0]", "hidden_dims[1]: expected a positive integer, found 0 (line 3)"),
            ("[512, 256]", "[512, 2.5]", "hidden_dims[1]: expected a positive integer, found 2.5 (line 3)"),
            (
                "[6, 3]",
                "[6, 3, 1]",
                "num_layers: expected as many entries as the other lists, one per stage: \
                 hidden_dims has 2, num_layers 3, seq_lens 2 (line 4)",
            ),
            (
                "[256, 8]",
                "[256]",
                "seq_lens: expected as many entries as the other lists, one per stage: \
                 hidden_dims has 2, num_layers 2, seq_lens 1 (line 5)",
            ),
            (
                "num_tokens: 257",
                "num_tokens: 18446744073709551615",
                "num_tokens: expected at most 16777216, found 18446744073709551615 (line 1)",
            ),
            ("[512, 256]", "[512, 4294967296]", "hidden_dims[1]: expected at most 16777216, found 4294967296 (line 3)"),
            ("[6, 3]", "[1000000, 3]", "num_layers[0]: expected at most 16384, found 1000000 (line 4)"),
            ("[256, 8]", "[9e9, 9e9]", "seq_lens: the product of the lengths does not fit 64 bits (line 5)"),
            (
                "chunks: null",
                "chunks: [2, 2]",
                "train_checkpoint_chunks: expected 1, one per stage but the first, or null; found 2 (line 6)",
            ),
            (
                "chunks: null",
                "chunks: [0]",
                "train_checkpoint_chunks[0]: expected a positive integer, found 0 (line 6)",
            ),
            ("- d_state: 64\n ", "- block_type: mamba2\n ", "block[0]: missing field `d_state` (line 8)"),
            (
                "- d_state: 64",
                "- block_type: mambo2\n  d_state: 64",
                "block[0].block_type: unknown block type \"mambo2\"; did you mean `mamba2`? (line 8)",
            ),
            (
                "- d_state: 64",
                "- block_type: rnn\n  d_state: 64",
                "block[0].block_type: unknown block type \"rnn\"; expected one of `mamba1`, `mamba2`, `transformer` \
                 (line 8)",
            ),
            (
                "- d_state: 64",
                "- block_type: 2\n  d_state: 64",
                "block[0].block_type: expected the name of a block type, found 2 (line 8)",
            ),
            (
                "- attn_head_dims: 64\n  attn_num_heads: 4",
                "- block_type: transformer\n  attn_head_dims: 64\n  attn_num_heads: \"sixteen\"",
                "block[1].attn_num_heads: expected a positive integer, found \"sixteen\" (line 15)",
            ),
            (
                "- attn_head_dims: 64\n  attn_num_heads",
                "- block_type: transformer\n  attn_head_dims: 64\n  attn_num_head",
                "block[1].attn_num_head: unknown field; did you mean `attn_num_heads`? (line 15)",
            ),
            (
                "- attn_head_dims: 64",
                "- block_type: transformer\n  attn_head_dims: [64]",
                "block[1].attn_head_dims: expected a positive integer, found a list (line 14)",
            ),
            (
                "- attn_head_dims: 64",
                "- {block_type: transformer}\n- attn_head_dims: 64",
                "block: expected 2 blocks, one per stage, found 3 (line 7)",
            ),
            (
                "- attn_head_dims: 64\n",
                "- attn_heads: 64\n  block_type: transformer\n",
                "block[1].attn_heads: unknown field; did you mean `attn_num_heads`? (line 13)",
            ),
            ("headdim: 64", "headdim: 96", "block[0].headdim: expected a divisor of 1024, found 96 (line 11)"),
            (
                "pos_emb_type: fixed",
                "pos_emb_type: learned\n  block_type: transformer",
                "block[1].pos_emb_type: unknown value \"learned\"; expected one of `fixed`, `rope` (line 16)",
            ),
            (
                "attn_use_rot_embs: true",
                "attn_use_rot_embs: 1",
                "block[1]: these fields fit no block type; choose one with `block_type` (or `mamba1`) \
                 (line 13)\n  \
                 mamba2: attn_head_dims: unknown field; expected one of `d_state`, `d_conv`, `expand`, `headdim`, \
                 `dropout`, `pos_emb_type`\n  \
                 transformer: attn_use_rot_embs: expected true or false, found 1",
            ),
            (
                "hidden_dims: [512",
                "hidden_dims: [511",
                "block[0].headdim: expected a divisor of 1022, found 64 (line 11)",
            ),
            (
                "[512, 256]\n",
                "[512, 255]\n",
                "hidden_dims[1]: `rope` rotates pairs of channels, so the width must be even; found 255 (line 3)",
            ),
            ("hidden_dims: [512, 256]", "hidden_dims: [512, 256", "not valid YAML: "),
        ];
        for (from, to, want) in cases {
            assert!(MODEL.contains(from), "{from}");
            let mut text = MODEL.replacen(from, to, 1);
            if want.contains("`rope` rotates") {
                text = text.replace("pos_emb_type: fixed", "pos_emb_type: rope");
            }
            let found = read(&text).unwrap_err().to_string();
            let want = format!("a.yaml: {want}");
            assert!(if want.ends_with(": ") { found.starts_with(&want) } else { found == want }, "{found}\n{want}");
        }
    }

    #[test]
    fn wrong_kinds_of_blocks_are_named() {
        let head = MODEL.split_once("block:").unwrap().0;
        let cases = [
            ("block: 3", "a.yaml: block: expected a block or a list with one per stage, found 3 (line 7)"),
            ("block: [1, 2]", "a.yaml: block[0]: expected a block, such as {block_type: …}, found 1 (line 7)"),
            ("", "a.yaml: missing field `block`"),
        ];
        for (block, want) in cases {
            assert_eq!(read(&format!("{head}{block}")).unwrap_err().to_string(), want);
        }
        assert_eq!(read("").unwrap_err().to_string(), "a.yaml: expected a mapping, found nothing");
        assert_eq!(read("- 1").unwrap_err().to_string(), "a.yaml: expected a mapping, found a list");
    }
}
