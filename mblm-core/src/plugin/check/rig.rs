//! What the checks have in common: a block with an accepted configuration, instances of it with parameter values, and
//! buffers that show what was written.

use std::sync::Arc;

use mblm_base::random::noise;
use mblm_sdk::abi::{self, Text};
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::param::{Param, ParamStore, Part};
use mblm_sdk::testing::perturb;
use serde_json::{Map, Value, json};

use crate::plugin::host::{Callee, Failure, Instance, Library, LibraryBlock, ParamValues, Pass, Tape};
use crate::schema::Walk;

/// Widths to try, the first accepted one is taken.
const WIDTHS: [usize; 7] = [8, 12, 16, 24, 32, 64, 128];

/// A block of a plugin, and a configuration that it accepts.
pub struct Subject {
    pub(super) library: Arc<Library>,
    index: usize,
    /// A JSON object.
    pub(super) config: String,
    /// A width that goes with it.
    pub(super) dim: usize,
}

impl Subject {
    /// The block `block_type` with `config`, or one made up from its schema.
    ///
    /// # Errors
    /// There is no such block, or it accepts the configuration at no width.
    pub fn new(library: Arc<Library>, block_type: &str, config: Option<&str>) -> Result<Self, String> {
        let index = library.blocks().iter().position(|block| block.block_type == block_type);
        let index = index.ok_or_else(|| format!("there is no block `{block_type}` in it"))?;
        let config = config.map_or_else(|| from_schema(&library.blocks()[index].schema), str::to_string);
        let mut subject = Subject { library, index, config, dim: 0 };
        let mut refused = String::new();
        for width in WIDTHS {
            match subject.check(subject.config.as_bytes(), width) {
                Ok(()) => {
                    subject.dim = width;
                    return Ok(subject);
                }
                Err(failure) => refused = failure.to_string(),
            }
        }
        Err(format!(
            "`{block_type}` does not accept {} at any of the widths {WIDTHS:?}: {refused}; give a configuration with \
             --config",
            subject.config
        ))
    }

    pub(super) fn block(&self) -> &LibraryBlock {
        &self.library.blocks()[self.index]
    }

    /// The configuration that is used.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// What the block's `check` says of some bytes.
    pub(super) fn check(&self, config: &[u8], dim: usize) -> Result<(), Failure> {
        let table = self.block().table;
        let text = Text { data: config.as_ptr(), len: config.len() as u64 };
        let mut positions = abi::POS_NONE;
        match table.check {
            Some(check) => {
                let callee = Callee::new(format!("block `{}`", self.block().block_type), true);
                // SAFETY: as the contract says; the text need not be UTF-8 to be refused.
                callee.call("check", || unsafe { check(table, text, dim as u64, &mut positions) })
            }
            None => Ok(()),
        }
    }

    pub(super) fn instance(&self, dim: usize, layers: usize) -> Result<Arc<Instance>, String> {
        let made = Instance::new(
            &self.library,
            self.block(),
            &self.config,
            ("stage_models.0", Some(Part::Stage(0))),
            dim,
            layers,
        );
        made.map_err(|error| error.to_string())
    }

    /// An instance with parameter values.
    pub(super) fn rig(&self, layers: usize) -> Result<Rig, String> {
        self.rig_of(self.dim, layers)
    }

    pub(super) fn rig_of(&self, dim: usize, layers: usize) -> Result<Rig, String> {
        Rig::new(self.instance(dim, layers)?, dim)
    }
}

/// The smallest configuration that a schema describes: its required fields, each with the most harmless value.
fn from_schema(schema: &Value) -> String {
    let walk = Walk::new(schema);
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let value = |name: &str| walk.enter(&schema["properties"][name], plain_value).unwrap_or(Value::Null);
    Value::Object(required.map(|name| (name.to_string(), value(name))).collect::<Map<_, _>>()).to_string()
}

fn plain_value(schema: &Value) -> Value {
    if let Some(default) = schema.get("default") {
        return default.clone();
    }
    if let Some(first) = schema["enum"].as_array().and_then(|values| values.first()) {
        return first.clone();
    }
    let kind = schema["type"].as_str().or(schema["type"][0].as_str()).unwrap_or("null");
    match kind {
        "integer" => json!(schema["minimum"].as_i64().unwrap_or(0).max(4)),
        "number" => json!(schema["minimum"].as_f64().unwrap_or(0.0).max(0.5)),
        "boolean" => json!(false),
        "string" => json!(""),
        "array" => json!([]),
        "object" => json!({}),
        _ => Value::Null,
    }
}

/// An instance with parameter values away from 0 and 1.
pub(super) struct Rig {
    pub(super) instance: Arc<Instance>,
    params: Vec<Arc<Param>>,
    pub(super) dim: usize,
}

/// What a training pass gave.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Gradients {
    pub(super) y: Vec<f32>,
    pub(super) dx: Vec<f32>,
    pub(super) dparams: Vec<Vec<f32>>,
}

impl Rig {
    fn new(instance: Arc<Instance>, dim: usize) -> Result<Self, String> {
        let mut store = ParamStore::new(7);
        let create = |spec: &crate::plugin::host::ParamSpec| store.root().param(&spec.name, &spec.shape, spec.start);
        let params: Vec<_> =
            instance.params().iter().map(create).collect::<mblm_sdk::Result<_>>().map_err(|error| error.to_string())?;
        perturb(&store);
        Ok(Rig { instance, params, dim })
    }

    pub(super) fn dims(&self, batch: usize, seq: usize) -> Dims {
        Dims { batch, seq, dim: self.dim }
    }

    pub(super) fn values(&self) -> Vec<Vec<f32>> {
        self.params.iter().map(|param| param.values().to_vec()).collect()
    }

    pub(super) fn name(&self, index: usize) -> &str {
        self.params[index].name()
    }

    pub(super) fn forward(&self, dims: Dims, x: &[f32], mode: Mode) -> Result<(Vec<f32>, Option<Tape>), String> {
        self.forward_with(&self.values(), 1, dims, x, mode)
    }

    /// Forward with values of one's own; `version` must be another one for other values.
    pub(super) fn forward_with(
        &self,
        values: &[Vec<f32>],
        version: u64,
        dims: Dims,
        x: &[f32],
        mode: Mode,
    ) -> Result<(Vec<f32>, Option<Tape>), String> {
        let mut y = vec![f32::NAN; dims.len()];
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        let params = ParamValues { values: &slices, version };
        let pass = Pass { dims, mask: None, mode };
        let tape = self.instance.forward(params, &pass, x, &mut y, mode != Mode::Eval);
        tape.map(|tape| (y, tape)).map_err(|error| error.to_string())
    }

    /// Backward into buffers that hold `base`.
    pub(super) fn backward(
        &self,
        dims: Dims,
        mut tape: Tape,
        x: &[f32],
        dy: &[f32],
        base: f32,
    ) -> Result<(Vec<f32>, Vec<Vec<f32>>), String> {
        let values = self.values();
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        let params = ParamValues { values: &slices, version: 1 };
        let pass = Pass { dims, mask: None, mode: MODE };
        let mut dx = vec![f32::NAN; dims.len()];
        let mut dparams: Vec<Vec<f32>> = values.iter().map(|value| vec![base; value.len()]).collect();
        let mut grads: Vec<&mut [f32]> = dparams.iter_mut().map(Vec::as_mut_slice).collect();
        let done = self.instance.backward(params, &pass, &mut tape, x, dy, &mut dx, &mut grads);
        done.map(|()| (dx, dparams)).map_err(|error| error.to_string())
    }

    /// Forward and backward in one go.
    pub(super) fn train(&self, dims: Dims, x: &[f32], dy: &[f32]) -> Result<Gradients, String> {
        let (y, tape) = self.forward(dims, x, MODE)?;
        let tape = tape.ok_or("forward left no tape")?;
        let (dx, dparams) = self.backward(dims, tape, x, dy, 0.0)?;
        Ok(Gradients { y, dx, dparams })
    }

    pub(super) fn can_train(&self) -> bool {
        self.instance.can(abi::BACKWARD)
    }
}

/// The training pass of all checks: one dropout seed.
pub(super) const MODE: Mode = Mode::Train { seed: 5 };

pub(super) fn input(dims: Dims, seed: u64) -> Vec<f32> {
    noise(dims.len(), seed)
}

/// A buffer between two guards.
pub(super) struct Guarded(Vec<f32>);

const GUARD: usize = 64;
const PATTERN: u32 = 0x5AFE_C0DE;

impl Guarded {
    pub(super) fn new(contents: &[f32]) -> Self {
        let guard = vec![f32::from_bits(PATTERN); GUARD];
        Guarded([&guard, contents, &guard].concat())
    }

    pub(super) fn inner(&mut self) -> &mut [f32] {
        let end = self.0.len() - GUARD;
        &mut self.0[GUARD..end]
    }

    /// Whether the guards are as they were.
    pub(super) fn check(&mut self, what: &str) -> Result<(), String> {
        let len = self.inner().len();
        let (before, rest) = self.0.split_at(GUARD);
        let intact = |guard: &[f32]| guard.iter().all(|value| value.to_bits() == PATTERN);
        match (intact(before), intact(&rest[len..])) {
            (true, true) => Ok(()),
            (false, _) => Err(format!("{what}: something was written before the buffer")),
            (_, false) => Err(format!("{what}: something was written after the buffer")),
        }
    }
}
