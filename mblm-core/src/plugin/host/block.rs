//! A plugin's block as a [`StageBlock`], and a plugin as a source of blocks for the registry.

use std::sync::Arc;

use mblm_base::nearest::suggestion;
use mblm_sdk::abi::{self, Text};
use mblm_sdk::block::{FieldError, PluginOrigin, PosEmb, StageBlock, StageModel};
use mblm_sdk::error::{Error, Result};
use mblm_sdk::param::ParamScope;
use mblm_yaml::ValueError;
use serde::Serialize;
use serde_yaml::Value;

use super::calls::{Callee, Failure};
use super::instance::Instance;
use super::library::{Library, LibraryBlock};
use super::model::PluginModel;
use crate::registry::{BlockInfo, BlockSource};

/// The blocks of a plugin.
pub struct PluginSource(pub Arc<Library>);

impl BlockSource for PluginSource {
    fn blocks(&self) -> Vec<BlockInfo> {
        let info = |block: &LibraryBlock| BlockInfo {
            name: block.block_type.into(),
            about: block.about.clone(),
            aliases: vec![],
            infers: true,
            schema: block.schema.clone(),
            location: self.0.origin().path.display().to_string(),
        };
        self.0.blocks().iter().map(info).collect()
    }

    fn parse(&self, block_type: &str, fields: &Value) -> std::result::Result<Arc<dyn StageBlock>, ValueError> {
        let invalid = |message: String| ValueError { path: String::new(), message };
        let Some(index) = self.0.blocks().iter().position(|block| block.block_type == block_type) else {
            return Err(invalid(format!("{} has no such block", self.0.origin().path.display())));
        };
        check_fields(&self.0.blocks()[index].schema, fields)?;
        let config = serde_json::to_string(fields).map_err(|error| invalid(error.to_string()))?;
        let mut block =
            PluginBlock { fields: fields.clone(), library: self.0.clone(), index, config, pos_emb_type: None };
        block.pos_emb_type = block.check(0).map_err(value_error)?;
        Ok(Arc::new(block))
    }
}

/// Unknown fields are refused here, in the host's words, if the plugin's schema says that there are no others.
fn check_fields(schema: &serde_json::Value, fields: &Value) -> std::result::Result<(), ValueError> {
    let Some(known) = schema["properties"].as_object().filter(|_| schema["additionalProperties"] == false) else {
        return Ok(());
    };
    let mut names = fields.as_mapping().into_iter().flat_map(|fields| fields.keys()).filter_map(Value::as_str);
    match names.find(|name| !known.contains_key(*name)) {
        Some(name) => {
            let known: Vec<&str> = known.keys().map(String::as_str).collect();
            Err(ValueError { path: name.into(), message: format!("unknown field; {}", suggestion(name, &known)) })
        }
        None => Ok(()),
    }
}

/// A block's configuration, of which the plugin knows the meaning.
#[derive(Serialize)]
#[serde(transparent)]
struct PluginBlock {
    fields: Value,
    #[serde(skip)]
    library: Arc<Library>,
    /// Among the library's blocks.
    #[serde(skip)]
    index: usize,
    /// `fields` as JSON.
    #[serde(skip)]
    config: String,
    #[serde(skip)]
    pos_emb_type: Option<PosEmb>,
}

impl std::fmt::Debug for PluginBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}({})", self.block().block_type, self.config)
    }
}

impl PluginBlock {
    fn block(&self) -> &LibraryBlock {
        &self.library.blocks()[self.index]
    }

    /// Asks the plugin; `dim` is 0 if it is not known yet.
    fn check(&self, dim: usize) -> std::result::Result<Option<PosEmb>, Failure> {
        let table = self.block().table;
        let mut positions = abi::POS_NONE;
        let callee = Callee::new(self.library.description(), true);
        let failed = |message: &str| callee.failure("check", abi::FAILED, message);
        let check = table.check.ok_or_else(|| failed("it has no check"))?;
        let config = Text::of(&self.config);
        // SAFETY: as the contract says; the text lives during the call.
        callee.call("check", || unsafe { check(table, config, dim as u64, &mut positions) })?;
        match positions {
            abi::POS_NONE => Ok(None),
            abi::POS_FIXED => Ok(Some(PosEmb::Fixed)),
            abi::POS_ROPE => Ok(Some(PosEmb::Rope)),
            other => Err(failed(&format!("unknown kind of positions, {other}"))),
        }
    }
}

/// What the plugin says of a configuration is the user's to mend; anything else is the plugin's author's.
fn value_error(failure: Failure) -> ValueError {
    match failure.status {
        abi::INVALID if !failure.message.is_empty() => ValueError { path: failure.field, message: failure.message },
        _ => ValueError { path: String::new(), message: Error::from(failure).to_string() },
    }
}

impl StageBlock for PluginBlock {
    fn typetag_name(&self) -> &'static str {
        self.block().block_type
    }

    fn typetag_deserialize(&self) {}

    fn pos_emb_type(&self) -> Option<PosEmb> {
        self.pos_emb_type
    }

    fn takes_mask(&self) -> bool {
        self.block().table.flags & abi::MASK != 0
    }

    fn plugin(&self) -> Option<&PluginOrigin> {
        Some(self.library.origin())
    }

    fn validate(&self, dim: usize) -> std::result::Result<(), FieldError> {
        self.check(dim).map(drop).map_err(|failure| {
            let ValueError { path, message } = value_error(failure);
            FieldError::new(path, message)
        })
    }

    fn build(&self, dim: usize, num_layers: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let instance = Instance::new(
            &self.library,
            self.block(),
            &self.config,
            (params.prefix(), params.part()),
            dim,
            num_layers,
        )?;
        // A plugin reads its parameters as slices.
        let mut params = params.on_host();
        let create = |spec: &super::instance::ParamSpec| match spec.decays {
            true => params.weight(&spec.name, &spec.shape, spec.start),
            false => params.param(&spec.name, &spec.shape, spec.start),
        };
        let params = instance.params().iter().map(create).collect::<Result<Vec<_>, Error>>()?;
        Ok(Box::new(PluginModel::new(instance, params)))
    }
}
