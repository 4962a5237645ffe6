//! Copies between this process's memory and tensors. Whatever a model copies to its device and back passes through here, so
//! that a test can say which copies a step makes. They are counted on every device, also on the CPU.

use std::cell::RefCell;

use candle_core::{DType, Device, Shape, Tensor, WithDType};

use crate::error::Result;

/// A copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Whether it went to the tensor; otherwise it came from there.
    pub to_tensor: bool,
    /// The type of the elements in this process's memory.
    pub dtype: DType,
    /// How many they are.
    pub elements: usize,
}

thread_local! {
    /// The copies of this thread, while somebody wants to know.
    static SEEN: RefCell<Option<Vec<Transfer>>> = const { RefCell::new(None) };
}

fn note(to_tensor: bool, dtype: DType, elements: usize) {
    SEEN.with_borrow_mut(|seen| {
        if let Some(seen) = seen {
            seen.push(Transfer { to_tensor, dtype, elements });
        }
    });
}

/// Runs `work` and returns the copies that it made on this thread.
pub fn seen_in<R>(work: impl FnOnce() -> R) -> (R, Vec<Transfer>) {
    let outer = SEEN.replace(Some(vec![]));
    let done = work();
    (done, SEEN.replace(outer).unwrap_or_default())
}

/// Copies values to a tensor on `device`.
///
/// # Errors
/// The device has no memory for it, or the shape has another number of elements.
pub fn to_tensor<T: WithDType>(values: &[T], shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    note(true, T::DTYPE, values.len());
    Ok(Tensor::from_slice(values, shape.into(), device)?)
}

/// Moves a tensor of this process's memory to `device`.
///
/// # Errors
/// The device has no memory for it.
pub fn to_device(x: &Tensor, device: &Device) -> Result<Tensor> {
    note(true, x.dtype(), x.elem_count());
    Ok(x.to_device(device)?)
}

/// Moves a tensor of `f32` to this process's memory.
///
/// # Errors
/// The device fails.
pub fn to_host(x: &Tensor) -> Result<Tensor> {
    note(false, DType::F32, x.elem_count());
    Ok(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

/// Copies a scalar, converted to `T` where it lies.
///
/// # Errors
/// The device fails, or `x` has more than one element.
pub fn to_scalar<T: WithDType>(x: &Tensor) -> Result<T> {
    note(false, T::DTYPE, 1);
    Ok(x.to_dtype(T::DTYPE)?.to_scalar()?)
}

/// Copies the elements of a tensor, converted to `T` where they lie.
///
/// # Errors
/// The device fails.
pub fn to_vec<T: WithDType>(x: &Tensor) -> Result<Vec<T>> {
    note(false, T::DTYPE, x.elem_count());
    Ok(x.to_dtype(T::DTYPE)?.flatten_all()?.to_vec1()?)
}
