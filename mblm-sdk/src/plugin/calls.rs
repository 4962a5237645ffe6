//! The functions that the host calls: pointers become slices, statuses leave.
//!
//! Pointers are what `include/mblm_plugin.h` says they are: that is what every `SAFETY` below rests on.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mblm_compute::layer::Dims;
use mblm_compute::param::{Init, Param};

use super::instance::{Instance, Pass, State, Tape, parse};
use super::{Failure, guard, panics_on_demand, registration, user};
use crate::abi::{self, Block, InstanceInfo, ParamInfo, Params, Status, Text};
use crate::block::PosEmb;
use crate::registration::Registration;

/// The table of one block.
pub(super) fn block(
    registration: &'static Registration,
    flags: u32,
    version: Text,
    about: Text,
    schema: Text,
) -> Block {
    Block {
        struct_size: abi::size::<Block>(),
        flags,
        block_type: Text::of(registration.name),
        version,
        about,
        schema,
        user: user(registration),
        check: Some(check),
        create: Some(create),
        destroy: Some(destroy),
        param: Some(param),
        forward: Some(forward),
        backward: Some(backward),
        tape_free: Some(tape_free),
        state_create: Some(state_create),
        state_reset: Some(state_reset),
        state_clone: None,
        state_save: None,
        state_load: None,
        state_free: Some(state_free),
        step: Some(step),
        prefill: Some(prefill),
        cost: Some(cost),
    }
}

/// The instance behind the host's pointer.
///
/// # Safety
/// The pointer must come from [`create`].
unsafe fn instance<'a>(pointer: *const abi::Instance) -> &'a Instance {
    // SAFETY: made by `Arc::into_raw` in `create`, and not destroyed while the host calls.
    unsafe { &*(pointer as *const Instance) }
}

/// The values of the host's parameters and their version.
///
/// # Safety
/// `params` must be what the contract says, for this instance.
unsafe fn values<'a>(instance: &Instance, params: *const Params) -> (u64, Vec<&'a [f32]>) {
    // SAFETY: by the contract, one pointer per parameter, each valid for the parameter's length.
    unsafe {
        let params = &*params;
        let lens = instance.params.iter().map(|(_, param)| param.len());
        let slices = lens.enumerate().map(|(i, len)| std::slice::from_raw_parts(*params.values.add(i), len));
        (params.version, slices.collect())
    }
}

/// # Safety
/// `pass` must be what the contract says.
unsafe fn pass<'a>(pass: *const abi::Pass) -> Pass<'a> {
    // SAFETY: by the contract; a mask is (batch, seq).
    unsafe {
        let pass = &*pass;
        let dims = Dims { batch: pass.batch as usize, seq: pass.seq as usize, dim: pass.dim as usize };
        let mask = (!pass.mask.is_null()).then(|| std::slice::from_raw_parts(pass.mask, dims.rows()));
        Pass { dims, mask, seed: (pass.training != 0).then_some(pass.seed) }
    }
}

unsafe extern "C" fn check(block: *const Block, config: Text, dim: u64, positions: *mut u32) -> Status {
    // SAFETY: by the contract.
    let (registration, config, positions) = unsafe { (registration(block), config.bytes(), &mut *positions) };
    guard(None, || {
        *positions = match parse(registration, config, dim as usize)?.pos_emb_type() {
            None => abi::POS_NONE,
            Some(PosEmb::Fixed) => abi::POS_FIXED,
            Some(PosEmb::Rope) => abi::POS_ROPE,
        };
        Ok(())
    })
}

unsafe extern "C" fn create(
    block: *const Block,
    config: Text,
    place: Text,
    dim: u64,
    num_layers: u64,
    info: *mut InstanceInfo,
    out: *mut *mut abi::Instance,
) -> Status {
    // SAFETY: by the contract.
    let (registration, config, place) = unsafe { (registration(block), config.bytes(), place.bytes()) };
    // SAFETY: by the contract.
    let info = unsafe { &mut *info };
    let mut made = None;
    let status = guard(None, || {
        let place = String::from_utf8_lossy(place);
        if dim == 0 || num_layers == 0 {
            return Err(Failure::new(abi::INVALID, "", "expected a positive width and number of layers"));
        }
        let block = parse(registration, config, dim as usize)?;
        made = Some(Arc::new(Instance::new(&*block, &place, dim as usize, num_layers as usize)?));
        Ok(())
    });
    if let Some(instance) = made {
        info.is_causal = instance.is_causal() as u32;
        info.num_params = instance.params.len() as u64;
        // SAFETY: by the contract.
        unsafe { *out = Arc::into_raw(instance) as *mut abi::Instance };
    }
    status
}

unsafe extern "C" fn destroy(pointer: *mut abi::Instance) {
    // SAFETY: made by `Arc::into_raw` in `create`; the host does not use it again.
    let instance = unsafe { Arc::from_raw(pointer as *const Instance) };
    guard(None, || {
        drop(instance);
        Ok(())
    });
}

unsafe extern "C" fn param(pointer: *const abi::Instance, index: u64, info: *mut ParamInfo) -> Status {
    // SAFETY: by the contract.
    let instance = unsafe { instance(pointer) };
    let described = Described(info);
    guard(Some(&instance.panicked), move || {
        let Some((name, param)) = instance.params.get(index as usize) else {
            return Err(Failure::new(abi::INVALID, "", format!("there is no parameter {index}")));
        };
        // SAFETY: by the contract, valid for its `struct_size`.
        unsafe { described.write(name, param) }
    })
}

/// The host's memory for the description of a parameter. A host of 1.0 has less of it than [`ParamInfo`] says, so it is
/// never borrowed as a whole.
struct Described(*mut ParamInfo);

// SAFETY: the host's memory is this call's alone.
unsafe impl Send for Described {}

impl Described {
    /// # Safety
    /// The memory must be valid for as many bytes as its `struct_size` says, and at least for the fields of 1.0.
    unsafe fn write(self, name: &str, param: &Param) -> Result<(), Failure> {
        let unsupported = |message: String| Failure::new(abi::UNSUPPORTED, "", message);
        let shape = param.shape();
        if shape.len() > abi::MAX_DIMS {
            let (found, most) = (shape.len(), abi::MAX_DIMS);
            return Err(unsupported(format!("parameter {name} has {found} dimensions, more than {most}")));
        }
        let info = self.0;
        // SAFETY: by the contract of this function.
        let size = unsafe { (*info).struct_size as usize };
        let knows_decay = size >= offset_of!(ParamInfo, decay) + size_of::<u32>();
        let mut dims = [0; abi::MAX_DIMS];
        dims.iter_mut().zip(shape).for_each(|(slot, &dim)| *slot = dim as u64);
        let start = param.start();
        let (init, a, b) = match start.init {
            Init::Const(value) => (abi::INIT_CONST, value, 0.0),
            Init::Normal => (abi::INIT_NORMAL, 0.0, 0.0),
            Init::Uniform(bound) => (abi::INIT_UNIFORM, bound, 0.0),
            Init::LogUniform(low, high) => (abi::INIT_LOG_UNIFORM, low, high),
            Init::LogRange => (abi::INIT_LOG_RANGE, 0.0, 0.0),
            Init::InverseSoftplusDt => (abi::INIT_INVERSE_SOFTPLUS_DT, 0.0, 0.0),
            Init::NormalWith { mean, std } => (abi::INIT_NORMAL_WITH, mean, std),
            Init::UniformBetween { low, high } => (abi::INIT_UNIFORM_BETWEEN, low, high),
        };
        if init > abi::INIT_INVERSE_SOFTPLUS_DT && !knows_decay {
            let init = start.init;
            return Err(unsupported(format!(
                "parameter {name} starts as {init:?}, which this mblm does not know: update it"
            )));
        }
        // SAFETY: by the contract of this function; the last field lies within what the host knows.
        unsafe {
            (*info).name = Text::of(name);
            (*info).num_dims = shape.len() as u32;
            (*info).dims = dims;
            (*info).gain = start.gain;
            (*info).init = init;
            (*info).a = a;
            (*info).b = b;
            if knows_decay {
                (*info).decay = if param.weight_decay() { abi::DECAY_YES } else { abi::DECAY_NO };
            }
        }
        Ok(())
    }
}

unsafe extern "C" fn forward(
    pointer: *mut abi::Instance,
    params: *const Params,
    about: *const abi::Pass,
    x: *const f32,
    y: *mut f32,
    out: *mut *mut abi::Tape,
) -> Status {
    // SAFETY: by the contract.
    let (instance, pass) = unsafe { (instance(pointer), pass(about)) };
    let len = pass.dims.len();
    // SAFETY: by the contract.
    let ((version, values), x, y) = unsafe {
        (values(instance, params), std::slice::from_raw_parts(x, len), std::slice::from_raw_parts_mut(y, len))
    };
    let keep = !out.is_null();
    let mut tape = None;
    let status = guard(Some(&instance.panicked), || {
        assert!(!panics_on_demand(), "a panic on demand");
        instance.sync(version, &values)?;
        tape = instance.forward(&pass, x, y, keep)?;
        Ok(())
    });
    if let Some(tape) = tape {
        // SAFETY: not null, since the tape was asked for.
        unsafe { *out = Box::into_raw(Box::new(Some(tape))) as *mut abi::Tape };
    }
    status
}

unsafe extern "C" fn backward(
    pointer: *mut abi::Instance,
    params: *const Params,
    about: *const abi::Pass,
    tape: *mut abi::Tape,
    _x: *const f32,
    dy: *const f32,
    dx: *mut f32,
    dparams: *const *mut f32,
) -> Status {
    // SAFETY: by the contract; the tape was made by `forward`.
    let (instance, len, tape) =
        unsafe { (instance(pointer), pass(about).dims.len(), &mut *(tape as *mut Option<Tape>)) };
    // SAFETY: by the contract.
    let ((version, values), dy, dx) = unsafe {
        (values(instance, params), std::slice::from_raw_parts(dy, len), std::slice::from_raw_parts_mut(dx, len))
    };
    let lens = instance.params.iter().map(|(_, param)| param.len());
    // SAFETY: by the contract, one buffer per parameter, none overlaps another.
    let slice = |(i, len)| unsafe { std::slice::from_raw_parts_mut(*dparams.add(i), len) };
    let dparams: Vec<&mut [f32]> = lens.enumerate().map(slice).collect();
    guard(Some(&instance.panicked), || {
        instance.sync(version, &values)?;
        let Some(tape) = tape.take() else {
            return Err(Failure::new(abi::INVALID, "", "backward ran on this tape before"));
        };
        instance.backward(tape, dy, dx, dparams)
    })
}

unsafe extern "C" fn tape_free(tape: *mut abi::Tape) {
    // SAFETY: made by `Box::into_raw` in `forward`; the host does not use it again.
    let tape = unsafe { Box::from_raw(tape as *mut Option<Tape>) };
    guard(None, || {
        drop(tape);
        Ok(())
    });
}

/// The state behind the host's pointer, with the flag that its instance panicked.
///
/// # Safety
/// The pointer must come from [`state_create`], and nothing else may use the state meanwhile.
unsafe fn state<'a>(pointer: *mut abi::State) -> (&'a mut State, Arc<Instance>) {
    // SAFETY: by the contract.
    let state = unsafe { &mut *(pointer as *mut State) };
    let instance = state.instance.clone();
    (state, instance)
}

fn leak(state: State) -> *mut abi::State {
    Box::into_raw(Box::new(state)) as *mut abi::State
}

unsafe extern "C" fn state_create(
    pointer: *mut abi::Instance,
    params: *const Params,
    batch: u64,
    out: *mut *mut abi::State,
) -> Status {
    // SAFETY: by the contract; the count of a pointer that `Arc::into_raw` gave is raised, then taken over.
    let owner = unsafe {
        Arc::increment_strong_count(pointer as *const Instance);
        Arc::from_raw(pointer as *const Instance)
    };
    // SAFETY: by the contract.
    let (version, values) = unsafe { values(&owner, params) };
    let mut made = None;
    let status = guard(Some(&owner.panicked), || {
        owner.sync(version, &values)?;
        if batch == 0 {
            return Err(Failure::new(abi::INVALID, "", "expected at least one sequence"));
        }
        made = Some(State::new(owner.clone(), batch as usize)?);
        Ok(())
    });
    if let Some(state) = made {
        // SAFETY: by the contract.
        unsafe { *out = leak(state) };
    }
    status
}

unsafe extern "C" fn state_reset(pointer: *mut abi::State) -> Status {
    // SAFETY: by the contract.
    let (state, instance) = unsafe { state(pointer) };
    guard(Some(&instance.panicked), || {
        state.reset();
        Ok(())
    })
}

unsafe extern "C" fn state_free(pointer: *mut abi::State) {
    // SAFETY: made by `Box::into_raw`; the host does not use it again.
    let state = unsafe { Box::from_raw(pointer as *mut State) };
    guard(None, || {
        drop(state);
        Ok(())
    });
}

unsafe extern "C" fn step(
    pointer: *mut abi::Instance,
    params: *const Params,
    state: *mut abi::State,
    x: *const f32,
    y: *mut f32,
) -> Status {
    // SAFETY: that of `prefill`.
    unsafe { advance(pointer, params, state, None, x, y) }
}

unsafe extern "C" fn prefill(
    pointer: *mut abi::Instance,
    params: *const Params,
    state: *mut abi::State,
    seq: u64,
    x: *const f32,
    y: *mut f32,
) -> Status {
    // SAFETY: by the contract.
    unsafe { advance(pointer, params, state, Some(seq as usize), x, y) }
}

/// A step, or `seq` of them.
///
/// # Safety
/// As the contract of `prefill` says.
unsafe fn advance(
    pointer: *mut abi::Instance,
    params: *const Params,
    pointer_to_state: *mut abi::State,
    seq: Option<usize>,
    x: *const f32,
    y: *mut f32,
) -> Status {
    // SAFETY: by the contract.
    let (instance, (state, _)) = unsafe { (instance(pointer), state(pointer_to_state)) };
    let len = state.batch * instance.dim * seq.unwrap_or(1);
    // SAFETY: by the contract.
    let ((version, values), x, y) = unsafe {
        (values(instance, params), std::slice::from_raw_parts(x, len), std::slice::from_raw_parts_mut(y, len))
    };
    let panicked: &AtomicBool = &instance.panicked;
    guard(Some(panicked), || {
        instance.sync(version, &values)?;
        match seq {
            Some(seq) => state.prefill(x, y, seq),
            None => state.step(x, y),
        }
    })
}

unsafe extern "C" fn cost(
    pointer: *const abi::Instance,
    seq_len: u64,
    flops: *mut f64,
    activations: *mut f64,
) -> Status {
    // SAFETY: by the contract.
    let (instance, flops, activations) = unsafe { (instance(pointer), &mut *flops, &mut *activations) };
    guard(Some(&instance.panicked), || match instance.cost(seq_len as usize) {
        Some(cost) => {
            (*flops, *activations) = (cost.flops, cost.activations);
            Ok(())
        }
        None => Err(Failure::new(abi::UNSUPPORTED, "", "the block does not know its cost")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParamStore;

    /// What a parameter says of itself to a host that knows `struct_size` bytes, the rest of which are 0xAA.
    fn described(start: impl Into<crate::param::Start>, struct_size: usize) -> Result<ParamInfo, String> {
        let mut store = ParamStore::new(0);
        let param = store.root().weight("w", &[2, 3], start).unwrap();
        // SAFETY: numbers and pointers, which any bits are.
        let mut info: ParamInfo = unsafe { std::mem::transmute([0xAAu8; size_of::<ParamInfo>()]) };
        info.struct_size = struct_size as u32;
        // SAFETY: valid for more than `struct_size`.
        unsafe { Described(&raw mut info).write("w", &param) }.map_err(|failure| failure.message)?;
        Ok(info)
    }

    #[test]
    fn a_host_of_the_first_version_gets_what_it_knows_and_no_more() {
        let old = offset_of!(ParamInfo, decay);
        assert_eq!(old, 72, "the size of mblm_param_info in 1.0");
        let info = described(Init::Normal.times(0.5), old).unwrap();
        assert_eq!((info.init, info.gain, info.decay, info.reserved), (1, 0.5, 0xAAAA_AAAA, 0xAAAA_AAAA));
        assert_eq!(described(Init::Normal, size_of::<ParamInfo>()).unwrap().decay, abi::DECAY_YES);
        let start = Init::NormalWith { mean: 1.0, std: 2.0 };
        let error = described(start, old).unwrap_err();
        assert!(error.contains("parameter w starts as NormalWith") && error.contains("update it"), "{error}");
        let info = described(start, size_of::<ParamInfo>()).unwrap();
        assert_eq!((info.init, info.a, info.b), (abi::INIT_NORMAL_WITH, 1.0, 2.0));
    }
}
