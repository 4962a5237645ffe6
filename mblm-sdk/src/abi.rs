//! The plugin contract as Rust types, field by field those of `include/mblm_plugin.h`, which documents them.
//!
//! A test compiles the header and compares sizes, offsets and constants.
#![allow(missing_docs)] // the header is the manual

use std::ffi::c_void;

pub const MAGIC: u32 = 0x4D4C_424D;
pub const MAJOR: u32 = 1;
pub const MINOR: u32 = 1;
pub const ENTRY: &str = "mblm_plugin_entry";
pub const MAX_DIMS: usize = 4;

/// The header, for programs that write plugins.
pub const HEADER: &str = include_str!("../include/mblm_plugin.h");

pub type Status = i32;
pub const OK: Status = 0;
pub const INVALID: Status = 1;
pub const UNSUPPORTED: Status = 2;
pub const FAILED: Status = 3;
pub const PANICKED: Status = 4;

pub const LOG_ERROR: i32 = 1;
pub const LOG_WARN: i32 = 2;
pub const LOG_INFO: i32 = 3;
pub const LOG_DEBUG: i32 = 4;

pub const POS_NONE: u32 = 0;
pub const POS_FIXED: u32 = 1;
pub const POS_ROPE: u32 = 2;

pub const INIT_CONST: u32 = 0;
pub const INIT_NORMAL: u32 = 1;
pub const INIT_UNIFORM: u32 = 2;
pub const INIT_LOG_UNIFORM: u32 = 3;
pub const INIT_LOG_RANGE: u32 = 4;
pub const INIT_INVERSE_SOFTPLUS_DT: u32 = 5;
pub const INIT_NORMAL_WITH: u32 = 6;
pub const INIT_UNIFORM_BETWEEN: u32 = 7;

pub const DECAY_BY_NAME: u32 = 0;
pub const DECAY_YES: u32 = 1;
pub const DECAY_NO: u32 = 2;

pub const BACKWARD: u32 = 1;
pub const STEP: u32 = 2;
pub const MASK: u32 = 4;
pub const CONCURRENT: u32 = 8;
pub const DETERMINISTIC: u32 = 16;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Text {
    pub data: *const u8,
    pub len: u64,
}

// SAFETY: whoever makes a `Text` promises how long it lives; it is never written through.
unsafe impl Send for Text {}
// SAFETY: as above.
unsafe impl Sync for Text {}

impl Text {
    /// The empty text.
    pub const EMPTY: Text = Text { data: std::ptr::null(), len: 0 };

    /// Borrows `text`, without its lifetime.
    pub const fn of(text: &str) -> Self {
        Text { data: text.as_ptr(), len: text.len() as u64 }
    }

    /// The bytes.
    ///
    /// # Safety
    /// `data` must be valid for `len` bytes for `'a`, unless `len` is 0.
    pub unsafe fn bytes<'a>(self) -> &'a [u8] {
        match self.len {
            0 => &[],
            // SAFETY: by the contract of this function.
            len => unsafe { std::slice::from_raw_parts(self.data, len as usize) },
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub struct_size: u32,
    pub major: u32,
    pub minor: u32,
    pub num_threads: u32,
    pub context: *mut c_void,
    pub set_error: Option<unsafe extern "C" fn(*mut c_void, Text, Text)>,
    pub log: Option<unsafe extern "C" fn(*mut c_void, i32, Text)>,
}

// SAFETY: `context` is for the functions alone, which may be called from any thread.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ParamInfo {
    pub struct_size: u32,
    pub init: u32,
    pub a: f32,
    pub b: f32,
    pub gain: f32,
    pub num_dims: u32,
    pub dims: [u64; MAX_DIMS],
    pub name: Text,
    /// From here on since 1.1.
    pub decay: u32,
    pub reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    pub struct_size: u32,
    pub count: u32,
    pub version: u64,
    pub values: *const *const f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    pub struct_size: u32,
    pub training: u32,
    pub batch: u64,
    pub seq: u64,
    pub dim: u64,
    pub seed: u64,
    pub mask: *const u8,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct InstanceInfo {
    pub struct_size: u32,
    pub is_causal: u32,
    pub num_params: u64,
}

/// What only the plugin can look into.
#[repr(C)]
pub struct Instance {
    _opaque: [u8; 0],
}

#[repr(C)]
pub struct Tape {
    _opaque: [u8; 0],
}

#[repr(C)]
pub struct State {
    _opaque: [u8; 0],
}

pub type Check = unsafe extern "C" fn(*const Block, Text, u64, *mut u32) -> Status;
pub type Create =
    unsafe extern "C" fn(*const Block, Text, Text, u64, u64, *mut InstanceInfo, *mut *mut Instance) -> Status;
pub type Forward =
    unsafe extern "C" fn(*mut Instance, *const Params, *const Pass, *const f32, *mut f32, *mut *mut Tape) -> Status;
pub type Backward = unsafe extern "C" fn(
    *mut Instance,
    *const Params,
    *const Pass,
    *mut Tape,
    *const f32,
    *const f32,
    *mut f32,
    *const *mut f32,
) -> Status;
pub type Step = unsafe extern "C" fn(*mut Instance, *const Params, *mut State, *const f32, *mut f32) -> Status;
pub type Prefill = unsafe extern "C" fn(*mut Instance, *const Params, *mut State, u64, *const f32, *mut f32) -> Status;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Block {
    pub struct_size: u32,
    pub flags: u32,
    pub block_type: Text,
    pub version: Text,
    pub about: Text,
    pub schema: Text,
    pub user: *mut c_void,
    pub check: Option<Check>,
    pub create: Option<Create>,
    pub destroy: Option<unsafe extern "C" fn(*mut Instance)>,
    pub param: Option<unsafe extern "C" fn(*const Instance, u64, *mut ParamInfo) -> Status>,
    pub forward: Option<Forward>,
    pub backward: Option<Backward>,
    pub tape_free: Option<unsafe extern "C" fn(*mut Tape)>,
    pub state_create: Option<unsafe extern "C" fn(*mut Instance, *const Params, u64, *mut *mut State) -> Status>,
    pub state_reset: Option<unsafe extern "C" fn(*mut State) -> Status>,
    pub state_clone: Option<unsafe extern "C" fn(*const State, *mut *mut State) -> Status>,
    pub state_save: Option<unsafe extern "C" fn(*const State, *mut u8, *mut u64) -> Status>,
    pub state_load: Option<unsafe extern "C" fn(*mut State, *const u8, u64) -> Status>,
    pub state_free: Option<unsafe extern "C" fn(*mut State)>,
    pub step: Option<Step>,
    pub prefill: Option<Prefill>,
    pub cost: Option<unsafe extern "C" fn(*const Instance, u64, *mut f64, *mut f64) -> Status>,
}

// SAFETY: a block is static and read only; `user` is for the plugin alone, whose functions may be called from any thread.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Plugin {
    pub magic: u32,
    pub struct_size: u32,
    pub major: u32,
    pub minor: u32,
    pub name: Text,
    pub version: Text,
    pub num_blocks: u64,
    pub blocks: *const *const Block,
    pub init: Option<unsafe extern "C" fn(*const Host) -> Status>,
}

// SAFETY: a plugin's table is static and read only.
unsafe impl Send for Plugin {}
// SAFETY: as above.
unsafe impl Sync for Plugin {}

pub type Entry = unsafe extern "C" fn() -> *const Plugin;

/// The size of a struct, as it is put into its `struct_size`.
pub const fn size<T>() -> u32 {
    size_of::<T>() as u32
}
