//! The memory of a card.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::result::{self, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute, CUmemoryPool};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Result, Tensor, bail};

/// Makes ready a device that was just opened. Freed memory stays with the process, since the driver gives it back at every
/// wait otherwise and each step would ask for all of it again. There is one stream, so tensors need no events that tell
/// when another stream may use them.
pub fn prepare(device: &Device) -> Result<()> {
    let Device::Cuda(device) = device else { return Ok(()) };
    // SAFETY: candle uses one stream per device.
    unsafe { device.disable_event_tracking() };
    let (pool, mut most) = (pool(device)?, u64::MAX);
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a 64-bit number.
    unsafe { mem_pool::set_attribute(pool, attribute, (&raw mut most).cast::<c_void>()) }.w()
}

/// The most bytes that tensors had on the device at the same time so far; none if the device is no card.
pub fn peak(device: &Device) -> Option<u64> {
    let Device::Cuda(device) = device else { return None };
    device.cuda_stream().synchronize().ok()?;
    let mut bytes = 0u64;
    let pool = pool(device).ok()?;
    // SAFETY: the attribute is a 64-bit number.
    let read = unsafe {
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast::<c_void>())
    };
    read.ok().map(|()| bytes)
}

/// The storage of a tensor that nobody else holds. The tensor is left without elements to read.
pub(crate) fn take(x: &Tensor) -> Result<CudaStorage> {
    struct Take(Mutex<Option<CudaStorage>>);
    impl InplaceOp1 for Take {
        fn name(&self) -> &'static str {
            "take"
        }
        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
            bail!("only the storage of a card is taken")
        }
        fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
            let device = storage.device().clone();
            let empty = CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f32>(1)?, device);
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::mem::replace(storage, empty));
            Ok(())
        }
    }
    let taken = Take(Mutex::default());
    x.inplace_op1(&taken)?;
    match taken.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(storage) => Ok(storage),
        None => bail!("the storage was not taken"),
    }
}

fn pool(device: &CudaDevice) -> Result<CUmemoryPool> {
    let ordinal = device.cuda_stream().context().ordinal();
    // SAFETY: the context keeps the driver and its device alive.
    unsafe { result::device::get_default_mem_pool(result::device::get(ordinal as i32).w()?).w() }
}
