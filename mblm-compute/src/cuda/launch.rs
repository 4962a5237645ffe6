//! Launching kernels over tensors.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{DType, Device, Result, Storage, Tensor, bail};

const SOURCE: &str = concat!(include_str!("kernels.cu"), include_str!("selective_scan.cu"));

/// Threads of a block where a kernel does not say otherwise.
const THREADS: usize = 256;

/// Whether kernels take `x`: `f32` on an NVIDIA card.
pub fn available(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cuda()
}

/// What a kernel is given.
pub(super) enum Arg<'a> {
    /// The address of a contiguous tensor's elements.
    Tensor(&'a Tensor),
    /// No tensor.
    Null,
    Int(usize),
    Long(usize),
    Float(f32),
    Key(u64),
    Word(u32),
}

/// Blocks, threads per block, and bytes of shared memory.
pub(super) struct Grid {
    pub blocks: (usize, usize),
    pub threads: usize,
    pub shared: usize,
}

impl Grid {
    /// One thread for each of `len` elements.
    pub(super) fn elements(len: usize) -> Self {
        Grid { blocks: (len.div_ceil(THREADS).max(1), 1), threads: THREADS, shared: 0 }
    }

    /// One block for each of `rows` rows of `width` elements.
    pub(super) fn rows(rows: usize, width: usize) -> Self {
        Grid { blocks: (rows.max(1), 1), threads: width.next_multiple_of(32).clamp(32, 512), shared: 0 }
    }
}

/// A tensor whose elements a kernel writes, all of them.
pub(super) fn unwritten(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every element is written by the kernel that the tensor is made for, before it is read.
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// As [`unwritten`], `f32` in the shape and the place of `x`.
pub(super) fn like(x: &Tensor) -> Result<Tensor> {
    unwritten(x.dims(), DType::F32, x.device())
}

/// Tensors, then how many elements or rows there are, then sizes.
pub(super) fn sized<'a>(tensors: &[&'a Tensor], len: usize, sizes: &[usize]) -> Vec<Arg<'a>> {
    let tensors = tensors.iter().map(|tensor| Arg::Tensor(tensor));
    tensors.chain([Arg::Long(len)]).chain(sizes.iter().map(|size| Arg::Int(*size))).collect()
}

/// Runs a kernel. What it writes are tensors that nobody else has seen yet, or that their owner gives it to change.
pub(super) fn launch(device: &Device, kernel: &'static str, grid: Grid, args: &[Arg]) -> Result<()> {
    let Device::Cuda(device) = device else { bail!("{kernel} runs on an NVIDIA card, found {:?}", device.location()) };
    let function = device.get_or_load_custom_func(kernel, "mblm", compiled(device)?)?;
    let mut guards = Vec::with_capacity(args.len());
    for arg in args {
        let Arg::Tensor(tensor) = arg else { continue };
        if !tensor.is_contiguous() {
            bail!("{kernel} takes contiguous tensors");
        }
        guards.push(tensor.storage_and_layout());
    }
    let stream = device.cuda_stream();
    let mut addresses = Vec::with_capacity(guards.len());
    for (storage, layout) in &guards {
        let Storage::Cuda(storage) = &**storage else { bail!("{kernel} takes tensors of a card") };
        let (address, size) = match storage.dtype() {
            DType::F32 => (storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0, 4),
            DType::F64 => (storage.as_cuda_slice::<f64>()?.device_ptr(&stream).0, 8),
            DType::U32 => (storage.as_cuda_slice::<u32>()?.device_ptr(&stream).0, 4),
            DType::U8 => (storage.as_cuda_slice::<u8>()?.device_ptr(&stream).0, 1),
            other => bail!("{kernel} does not take {other:?}"),
        };
        addresses.push(address + (layout.start_offset() * size) as u64);
    }
    let words: Vec<Word> = words(args, &addresses);
    let mut builder = function.builder();
    for word in &words {
        match word {
            Word::Long(value) => builder.arg(value),
            Word::Int(value) => builder.arg(value),
            Word::Float(value) => builder.arg(value),
        };
    }
    let config = LaunchConfig {
        grid_dim: (grid.blocks.0 as u32, grid.blocks.1 as u32, 1),
        block_dim: (grid.threads as u32, 1, 1),
        shared_mem_bytes: grid.shared as u32,
    };
    // SAFETY: the arguments are those of the kernel's signature; the tensors are borrowed until it is in the stream, and
    // their memory is freed in the order of the stream.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

enum Word {
    Long(u64),
    Int(u32),
    Float(f32),
}

fn words(args: &[Arg], addresses: &[u64]) -> Vec<Word> {
    let mut addresses = addresses.iter();
    let word = |arg: &Arg| match arg {
        Arg::Tensor(_) => Word::Long(addresses.next().copied().unwrap_or_default()),
        Arg::Null => Word::Long(0),
        Arg::Long(value) => Word::Long(*value as u64),
        Arg::Key(value) => Word::Long(*value),
        Arg::Int(value) => Word::Int(*value as u32),
        Arg::Word(value) => Word::Int(*value),
        Arg::Float(value) => Word::Float(*value),
    };
    args.iter().map(word).collect()
}

/// The kernels as code for the card's generation, compiled once per process.
fn compiled(device: &CudaDevice) -> Result<&'static str> {
    static COMPILED: OnceLock<Mutex<HashMap<String, &'static str>>> = OnceLock::new();
    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    let arch = format!("--gpu-architecture=compute_{major}{minor}");
    let mut compiled = COMPILED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = compiled.get(&arch) {
        return Ok(code);
    }
    let options = CompileOptions { options: vec![arch.clone()], ..CompileOptions::default() };
    let code = compile_ptx_with_opts(SOURCE, options)
        .map_err(|error| candle_core::Error::Msg(format!("the kernels do not compile for this card: {error:?}")))?;
    let code: &'static str = code.to_src().leak();
    compiled.insert(arch, code);
    Ok(code)
}
