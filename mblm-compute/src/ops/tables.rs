//! Constant tensors, made on the host once for each device, type and length: compositions copy nothing in.

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::transfer;

/// The tables that one maker has made, with their lengths.
#[derive(Default)]
pub struct Tables(Mutex<Vec<(usize, Tensor)>>);

impl Tables {
    /// Without a table.
    pub const fn new() -> Self {
        Tables(Mutex::new(vec![]))
    }

    /// The table for at least `len` positions on `device`, which `make` makes for a length that is a power of two.
    ///
    /// # Errors
    /// Those of `make` and of the copy to the device.
    pub fn get(
        &self,
        len: usize,
        dtype: DType,
        device: &Device,
        make: impl FnOnce(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let len = len.next_power_of_two();
        let mut tables = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fits =
            |(of, table): &&(usize, Tensor)| *of == len && table.dtype() == dtype && table.device().same_device(device);
        if let Some((_, table)) = tables.iter().find(fits) {
            return Ok(table.clone());
        }
        let table = transfer::to_device(&make(len)?.to_dtype(dtype)?, device)?;
        tables.push((len, table.clone()));
        Ok(table)
    }
}

/// `0, 1, …, len - 1` in `f32`, which is exact up to 2^24.
pub fn positions(len: usize, device: &Device) -> Result<Tensor> {
    static POSITIONS: Tables = Tables::new();
    let table = POSITIONS.get(len, DType::F32, device, |len| Ok(Tensor::arange(0.0, len as f32, &Device::Cpu)?))?;
    Ok(table.narrow(0, 0, len)?)
}
