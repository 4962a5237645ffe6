//! Instances, tapes and states of a plugin. Types enforce the contract's rules about lifetime and threads.

use std::collections::HashSet;
use std::sync::Arc;

use mblm_sdk::abi::{self, Block, Text};
use mblm_sdk::block::Cost;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::param::{Init, MAX_TENSORS, Part, Start, decays_by_name};

use super::calls::{Callee, Failure};
use super::library::{Library, LibraryBlock};

/// A parameter that an instance asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Below the stage's prefix.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
    /// How it starts.
    pub start: Start,
    /// Whether weight decay acts on it.
    pub decays: bool,
}

/// The values of an instance's parameters, in its order, with the number that grows when one changes.
#[derive(Clone, Copy)]
pub struct ParamValues<'a> {
    /// One slice per parameter.
    pub values: &'a [&'a [f32]],
    /// Grows when any value changes.
    pub version: u64,
}

/// A stage's model inside a plugin.
pub struct Instance {
    pointer: *mut abi::Instance,
    table: &'static Block,
    callee: Callee,
    is_causal: bool,
    params: Vec<ParamSpec>,
    _library: Arc<Library>,
}

// SAFETY: the contract lets an instance move between threads; `callee` keeps calls from overlapping where they must not.
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

impl Instance {
    /// Builds the model of a stage of width `dim`. `place` is the prefix of its parameters, such as `stage_models.0`, and
    /// `part` says which stage that is.
    pub fn new(
        library: &Arc<Library>,
        block: &LibraryBlock,
        config: &str,
        (place, part): (&str, Option<Part>),
        dim: usize,
        num_layers: usize,
    ) -> Result<Arc<Self>> {
        let table = block.table;
        let callee = Callee::new(describe(library, block, part), table.flags & abi::CONCURRENT != 0);
        let create = table.create.ok_or_else(|| missing(&callee.name, "create"))?;
        let mut info = abi::InstanceInfo { struct_size: abi::size::<abi::InstanceInfo>(), is_causal: 1, num_params: 0 };
        let mut pointer = std::ptr::null_mut();
        let (config, place) = (Text::of(config), Text::of(place));
        // SAFETY: as the contract says; all pointers live during the call.
        callee.call("create", || unsafe {
            create(table, config, place, dim as u64, num_layers as u64, &mut info, &mut pointer)
        })?;
        if pointer.is_null() {
            return Err(Error::Block(format!("{}: create returned no instance", callee.name)));
        }
        let mut instance = Instance {
            pointer,
            table,
            callee,
            is_causal: info.is_causal != 0,
            params: vec![],
            _library: library.clone(),
        };
        if info.num_params > MAX_TENSORS as u64 {
            let (name, found) = (instance.name(), info.num_params);
            return Err(Error::Block(format!("{name}: expected at most {MAX_TENSORS} parameters, found {found}")));
        }
        instance.params = (0..info.num_params).map(|index| instance.param(index)).collect::<Result<_>>()?;
        let mut names = HashSet::new();
        if let Some(twice) = instance.params.iter().find(|param| !names.insert(&param.name)) {
            return Err(Error::Block(format!("{}: it lists parameter {} twice", instance.name(), twice.name)));
        }
        Ok(Arc::new(instance))
    }

    /// The parameters that it asks for.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.callee.name
    }

    /// Whether outputs depend on earlier inputs alone.
    pub fn is_causal(&self) -> bool {
        self.is_causal
    }

    /// Whether the block says all of `flags`.
    pub fn can(&self, flags: u32) -> bool {
        self.table.flags & flags == flags
    }

    /// Asks for parameter `index` (again).
    pub(crate) fn param(&self, index: u64) -> Result<ParamSpec> {
        let mut info = abi::ParamInfo {
            struct_size: abi::size::<abi::ParamInfo>(),
            init: abi::INIT_CONST,
            a: 0.0,
            b: 0.0,
            gain: 1.0,
            num_dims: 0,
            dims: [0; abi::MAX_DIMS],
            name: Text::EMPTY,
            decay: abi::DECAY_BY_NAME,
            reserved: 0,
        };
        let param = self.table.param.ok_or_else(|| missing(self.name(), "param"))?;
        // SAFETY: as the contract says.
        self.callee.call("param", || unsafe { param(self.pointer, index, &mut info) })?;
        // SAFETY: valid until the instance is destroyed, by the contract.
        let name = String::from_utf8_lossy(unsafe { info.name.bytes() }).into_owned();
        let wrong = |what: String| Error::Block(format!("{}: parameter {index} ({name}): {what}", self.name()));
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(is_name) || name.split('.').any(str::is_empty) {
            return Err(wrong("its name is not made of letters, digits, `_` and single `.`".into()));
        }
        let dims = info.dims.get(..info.num_dims as usize);
        let shape: Vec<usize> = match dims {
            Some(dims) => dims.iter().map(|&dim| dim as usize).collect(),
            None => return Err(wrong(format!("{} dimensions, expected at most {}", info.num_dims, abi::MAX_DIMS))),
        };
        let elements = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        if elements.is_none_or(|elements| elements == 0 || elements > 1 << 40) {
            return Err(wrong(format!("shape {shape:?} is empty or too large")));
        }
        let init = match info.init {
            abi::INIT_CONST => Init::Const(info.a),
            abi::INIT_NORMAL => Init::Normal,
            abi::INIT_UNIFORM => Init::Uniform(info.a),
            abi::INIT_LOG_UNIFORM => Init::LogUniform(info.a, info.b),
            abi::INIT_LOG_RANGE => Init::LogRange,
            abi::INIT_INVERSE_SOFTPLUS_DT => Init::InverseSoftplusDt,
            abi::INIT_NORMAL_WITH => Init::NormalWith { mean: info.a, std: info.b },
            abi::INIT_UNIFORM_BETWEEN => Init::UniformBetween { low: info.a, high: info.b },
            other => return Err(wrong(format!("unknown kind of initial values, {other}"))),
        };
        let decays = match info.decay {
            abi::DECAY_BY_NAME => decays_by_name(&name, &shape),
            abi::DECAY_YES => true,
            abi::DECAY_NO => false,
            other => return Err(wrong(format!("unknown kind of decay, {other}"))),
        };
        Ok(ParamSpec { name, shape, start: init.times(info.gain), decays })
    }

    /// Writes the output to `y`; returns a tape if `keep`.
    pub fn forward(
        self: &Arc<Self>,
        params: ParamValues,
        pass: &Pass,
        x: &[f32],
        y: &mut [f32],
        keep: bool,
    ) -> Result<Option<Tape>> {
        assert_eq!((x.len(), y.len()), (pass.dims.len(), pass.dims.len()), "buffers of {:?}", pass.dims);
        let forward = self.table.forward.ok_or_else(|| missing(self.name(), "forward"))?;
        if keep && !self.can(abi::BACKWARD) {
            return Err(Error::Block(format!("{}: it has no backward pass, so it cannot be trained", self.name())));
        }
        let pointers: Vec<*const f32> = params.values.iter().map(|values| values.as_ptr()).collect();
        let (params, about) = (abi_params(&pointers, params.version), pass.abi());
        let mut tape = std::ptr::null_mut();
        let out = if keep { &raw mut tape } else { std::ptr::null_mut() };
        let (instance, x, y) = (self.pointer, x.as_ptr(), y.as_mut_ptr());
        // SAFETY: buffers have the lengths of `pass`, and all pointers live during the call.
        self.callee.call("forward", || unsafe { forward(instance, &params, &about, x, y, out) })?;
        match keep {
            true if tape.is_null() => Err(Error::Block(format!("{}: forward left no tape", self.name()))),
            true => Ok(Some(Tape { pointer: tape, instance: self.clone() })),
            false => Ok(None),
        }
    }

    /// Writes the gradient of `x` to `dx` and adds those of the parameters to `dparams`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        params: ParamValues,
        pass: &Pass,
        tape: &mut Tape,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        dparams: &mut [&mut [f32]],
    ) -> Result<()> {
        let len = pass.dims.len();
        assert_eq!((x.len(), dy.len(), dx.len()), (len, len, len), "buffers of {:?}", pass.dims);
        let lens = dparams.iter().map(|grad| grad.len());
        assert!(lens.eq(params.values.iter().map(|value| value.len())), "gradients fit parameters");
        let backward = self.table.backward.ok_or_else(|| missing(self.name(), "backward"))?;
        let pointers: Vec<*const f32> = params.values.iter().map(|values| values.as_ptr()).collect();
        let grads: Vec<*mut f32> = dparams.iter_mut().map(|grad| grad.as_mut_ptr()).collect();
        let (params, about) = (abi_params(&pointers, params.version), pass.abi());
        let (instance, tape) = (self.pointer, tape.pointer);
        let (x, dy, dx, grads) = (x.as_ptr(), dy.as_ptr(), dx.as_mut_ptr(), grads.as_ptr());
        // SAFETY: buffers have the lengths of `pass` and of the parameters, and live during the call.
        Ok(self.callee.call("backward", || unsafe { backward(instance, &params, &about, tape, x, dy, dx, grads) })?)
    }

    /// Starts `batch` sequences.
    pub fn state(self: &Arc<Self>, params: ParamValues, batch: usize) -> Result<State> {
        let create = self.table.state_create.ok_or_else(|| missing(self.name(), "state_create"))?;
        let pointers: Vec<*const f32> = params.values.iter().map(|values| values.as_ptr()).collect();
        let params = abi_params(&pointers, params.version);
        let mut state = std::ptr::null_mut();
        // SAFETY: as the contract says.
        self.callee.call("state_create", || unsafe { create(self.pointer, &params, batch as u64, &mut state) })?;
        match state.is_null() {
            true => Err(Error::Block(format!("{}: state_create returned no state", self.name()))),
            false => Ok(State { pointer: state, batch, instance: self.clone() }),
        }
    }

    /// What a position costs, if the block knows.
    pub fn cost(&self, seq_len: usize) -> Option<Cost> {
        let cost = self.table.cost?;
        let (mut flops, mut activations, seq_len) = (0.0, 0.0, seq_len as u64);
        // SAFETY: as the contract says.
        self.callee.call("cost", || unsafe { cost(self.pointer, seq_len, &mut flops, &mut activations) }).ok()?;
        Some(Cost { flops, activations })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(destroy) = self.table.destroy {
            // SAFETY: tapes and states hold the instance, so none is left.
            self.callee.call_void("destroy", || unsafe { destroy(self.pointer) });
        }
    }
}

/// What a forward pass is about.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// The shape of input and output.
    pub dims: Dims,
    /// `(batch, seq)`, nonzero = attend.
    pub mask: Option<&'a [u8]>,
    /// Whether it is part of training, and the dropout seed.
    pub mode: Mode,
}

impl Pass<'_> {
    fn abi(&self) -> abi::Pass {
        if let Some(mask) = self.mask {
            assert_eq!(mask.len(), self.dims.rows(), "a mask of {:?}", self.dims);
        }
        let (training, seed) = match self.mode {
            Mode::Train { seed } => (1, seed),
            Mode::Eval => (0, 0),
        };
        abi::Pass {
            struct_size: abi::size::<abi::Pass>(),
            training,
            batch: self.dims.batch as u64,
            seq: self.dims.seq as u64,
            dim: self.dims.dim as u64,
            seed,
            mask: self.mask.map_or(std::ptr::null(), <[u8]>::as_ptr),
        }
    }
}

/// What forward kept for backward.
pub struct Tape {
    pointer: *mut abi::Tape,
    instance: Arc<Instance>,
}

// SAFETY: the contract lets a tape move between threads.
unsafe impl Send for Tape {}

impl Drop for Tape {
    fn drop(&mut self) {
        if let Some(free) = self.instance.table.tape_free {
            // SAFETY: freed once, before its instance.
            self.instance.callee.call_void("tape_free", || unsafe { free(self.pointer) });
        }
    }
}

/// A batch of sequences being decoded.
pub struct State {
    pointer: *mut abi::State,
    batch: usize,
    instance: Arc<Instance>,
}

// SAFETY: the contract lets a state move between threads.
unsafe impl Send for State {}

impl State {
    /// Back to position 0.
    pub fn reset(&mut self) -> Result<()> {
        let reset = self.instance.table.state_reset.ok_or_else(|| missing(self.instance.name(), "state_reset"))?;
        // SAFETY: as the contract says.
        Ok(self.instance.callee.call("state_reset", || unsafe { reset(self.pointer) })?)
    }

    /// Advances by one position; `x` and `y` are `(batch, dim)`.
    pub fn step(&mut self, params: ParamValues, x: &[f32], y: &mut [f32]) -> Result<()> {
        assert!(x.len() == y.len() && x.len().is_multiple_of(self.batch), "buffers of a step");
        let step = self.instance.table.step.ok_or_else(|| missing(self.instance.name(), "step"))?;
        let pointers: Vec<*const f32> = params.values.iter().map(|values| values.as_ptr()).collect();
        let params = abi_params(&pointers, params.version);
        let (instance, state, x, y) = (self.instance.pointer, self.pointer, x.as_ptr(), y.as_mut_ptr());
        // SAFETY: as the contract says; buffers live during the call.
        Ok(self.instance.callee.call("step", || unsafe { step(instance, &params, state, x, y) })?)
    }

    /// Advances by `seq` positions; `x` and `y` are `(seq, batch, dim)`.
    pub fn prefill(&mut self, params: ParamValues, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        let Some(prefill) = self.instance.table.prefill else {
            let row = x.len() / seq.max(1);
            let mut rows = x.chunks_exact(row.max(1)).zip(y.chunks_exact_mut(row.max(1)));
            return rows.try_for_each(|(x, y)| self.step(params, x, y));
        };
        assert!(x.len() == y.len() && x.len().is_multiple_of(self.batch * seq.max(1)), "buffers of {seq} steps");
        let pointers: Vec<*const f32> = params.values.iter().map(|values| values.as_ptr()).collect();
        let params = abi_params(&pointers, params.version);
        let (instance, state, x, y) = (self.instance.pointer, self.pointer, x.as_ptr(), y.as_mut_ptr());
        // SAFETY: as the contract says; buffers live during the call.
        Ok(self.instance.callee.call("prefill", || unsafe { prefill(instance, &params, state, seq as u64, x, y) })?)
    }

    /// A second state at the same position; `None` if the block has no such function.
    pub fn try_clone(&self) -> Result<Option<State>> {
        let Some(clone) = self.instance.table.state_clone else { return Ok(None) };
        let mut copy = std::ptr::null_mut();
        // SAFETY: as the contract says.
        let cloned = self.instance.callee.call("state_clone", || unsafe { clone(self.pointer, &mut copy) });
        match if_supported(cloned)? {
            None => Ok(None),
            Some(()) if copy.is_null() => {
                Err(Error::Block(format!("{}: state_clone returned no state", self.instance.name())))
            }
            Some(()) => Ok(Some(State { pointer: copy, batch: self.batch, instance: self.instance.clone() })),
        }
    }

    /// The state as bytes; `None` if the block has no such function.
    pub fn save(&self) -> Result<Option<Vec<u8>>> {
        let Some(save) = self.instance.table.state_save else { return Ok(None) };
        let mut len = 0;
        // SAFETY: a null buffer asks for the size.
        let sized = || unsafe { save(self.pointer, std::ptr::null_mut(), &mut len) };
        if if_supported(self.instance.callee.call("state_save", sized))?.is_none() {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        // SAFETY: a buffer of `len` bytes.
        self.instance.callee.call("state_save", || unsafe { save(self.pointer, bytes.as_mut_ptr(), &mut len) })?;
        bytes.truncate(len as usize);
        Ok(Some(bytes))
    }

    /// Puts back what [`save`](Self::save) gave; `None` if the block has no such function.
    pub fn load(&mut self, bytes: &[u8]) -> Result<Option<()>> {
        let Some(load) = self.instance.table.state_load else { return Ok(None) };
        let (pointer, len) = (bytes.as_ptr(), bytes.len() as u64);
        // SAFETY: as the contract says.
        if_supported(self.instance.callee.call("state_load", || unsafe { load(self.pointer, pointer, len) }))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(free) = self.instance.table.state_free {
            // SAFETY: freed once, before its instance.
            self.instance.callee.call_void("state_free", || unsafe { free(self.pointer) });
        }
    }
}

fn abi_params(pointers: &[*const f32], version: u64) -> abi::Params {
    abi::Params {
        struct_size: abi::size::<abi::Params>(),
        count: pointers.len() as u32,
        version,
        values: pointers.as_ptr(),
    }
}

/// Plugin, block type and stage, for messages.
fn describe(library: &Library, block: &LibraryBlock, part: Option<Part>) -> String {
    let stage = match part {
        Some(Part::Stage(n)) => format!(" at stage {}", n + 1),
        _ => String::new(),
    };
    format!("block `{}`{stage}, of {}", block.block_type, library.description())
}

/// `None` if the plugin says that it does not do this.
fn if_supported(done: std::result::Result<(), Failure>) -> Result<Option<()>> {
    match done {
        Err(failure) if failure.status == abi::UNSUPPORTED => Ok(None),
        done => Ok(Some(done?)),
    }
}

fn missing(name: &str, what: &str) -> Error {
    Error::Block(format!("{name}: it has no {what}"))
}
