//! Where a model computes. On the CPU in `f32` the fused ops run, over slices. Everywhere else, and on request on the CPU
//! too, the same functions run as compositions of candle's ops.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device, DeviceLocation, Tensor};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::gemm::Precision;

/// A device by name: `cpu`, `cuda` (the first card), `cuda:N`, `metal`, or `auto`, which is the first card that this
/// program can use, and the CPU without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA card, counted from 0.
    Cuda(usize),
    /// Apple's GPU.
    Metal,
    /// A card if there is one.
    Auto,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceName::Cpu),
            None if text == "cuda" => Ok(DeviceName::Cuda(0)),
            None if text == "metal" => Ok(DeviceName::Metal),
            None if text == "auto" => Ok(DeviceName::Auto),
            Some(("cuda", number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => number
                .parse()
                .map(DeviceName::Cuda)
                .map_err(|_| format!("expected the number of a card, found {number:?}")),
            _ => Err(format!("expected cpu, cuda, cuda:N (the N-th card from 0), metal or auto, found {text:?}")),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(0) => f.write_str("cuda"),
            DeviceName::Cuda(card) => write!(f, "cuda:{card}"),
            DeviceName::Metal => f.write_str("metal"),
            DeviceName::Auto => f.write_str("auto"),
        }
    }
}

impl Serialize for DeviceName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for DeviceName {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DeviceName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^(cpu|cuda(:[0-9]+)?|metal|auto)$"})
    }
}

impl DeviceName {
    /// Opens the device.
    ///
    /// # Errors
    /// This program was built without it, or this machine does not have it.
    pub fn open(self) -> Result<Device> {
        match self {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda(card) => cuda(card),
            DeviceName::Metal => metal(),
            DeviceName::Auto => Ok(cuda(0).or_else(|_| metal()).unwrap_or(Device::Cpu)),
        }
    }
}

fn cuda(card: usize) -> Result<Device> {
    if !cfg!(feature = "cuda") {
        return Err(without("cuda"));
    }
    let opened = Device::new_cuda(card);
    #[cfg(feature = "cuda")]
    let opened = opened.and_then(|device| crate::cuda::memory::prepare(&device).map(|()| device));
    opened.map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default();
        Error::Input(match reason.contains("ORDINAL") || reason.contains("ordinal") {
            true => format!("device cuda:{card}: this machine has no card of that number; `nvidia-smi -L` lists them"),
            false => format!(
                "device cuda:{card}: no NVIDIA card can be used here ({reason}); check that `nvidia-smi` works, or use \
                 `--device cpu`"
            ),
        })
    })
}

fn metal() -> Result<Device> {
    if !cfg!(feature = "metal") {
        return Err(without("metal"));
    }
    Device::new_metal(0).map_err(|error| {
        Error::Input(format!("device metal: Apple's GPU cannot be used here ({error}); use `--device cpu`"))
    })
}

fn without(feature: &str) -> Error {
    Error::Input(format!(
        "device {feature}: this program was built without it; build one that has it with \
         `cargo build --release --features {feature}` (docs/devices.md), or use `--device cpu`"
    ))
}

/// What messages call a device.
pub fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { .. } => "metal".into(),
    }
}

/// The most bytes that tensors had at the same time so far, where the device tells.
pub fn peak(_device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    return crate::cuda::memory::peak(_device);
    #[cfg(not(feature = "cuda"))]
    None
}

/// Whether products of bfloat16 run there.
pub fn has_bf16(device: &Device) -> bool {
    match device {
        Device::Cpu => Precision::Bf16.is_available(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device.cuda_stream().context().compute_capability().is_ok_and(|(major, _)| major >= 8),
        _ => true,
    }
}

/// Where a model's parameters lie, and of which type they are.
#[derive(Clone, Debug)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// `f32`, or `f64` on the CPU for checks.
    pub dtype: DType,
}

impl Default for Place {
    fn default() -> Self {
        Place { device: Device::Cpu, dtype: DType::F32 }
    }
}

impl From<Device> for Place {
    fn from(device: Device) -> Self {
        Place { device, dtype: DType::F32 }
    }
}

impl Place {
    /// Whether values are slices of `f32` that this process sees.
    pub fn is_host(&self) -> bool {
        self.device.is_cpu() && self.dtype == DType::F32
    }

    /// Whether fused ops run there, as [`fuses`] says of a tensor.
    pub fn fuses(&self) -> bool {
        self.is_host() && !COMPOSED.get()
    }
}

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` with compositions in place of fused ops, on this thread.
pub fn composed<R>(work: impl FnOnce() -> R) -> R {
    let _restore = Restore(COMPOSED.replace(true));
    work()
}

/// Runs `work` with fused ops, where there is no other way.
pub fn fused<R>(work: impl FnOnce() -> R) -> R {
    let _restore = Restore(COMPOSED.replace(false));
    work()
}

/// Ends the scope, also when it panics.
struct Restore(bool);

impl Drop for Restore {
    fn drop(&mut self) {
        COMPOSED.set(self.0);
    }
}

/// Whether fused ops take `x`: in `f32` on the CPU, outside of [`composed`].
pub fn fuses(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cpu() && !COMPOSED.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["cpu", "cuda", "cuda:3", "metal", "auto"] {
            assert_eq!(name.parse::<DeviceName>().unwrap().to_string(), name);
        }
        assert_eq!("cuda:0".parse(), Ok(DeviceName::Cuda(0)));
        for wrong in ["", "gpu", "cuda:-1", "cuda:+1", "cuda:x", "metal:1"] {
            let error = wrong.parse::<DeviceName>().unwrap_err();
            assert!(error.starts_with("expected cpu, cuda, cuda:N"), "{error}");
        }
        assert!("cuda:".parse::<DeviceName>().unwrap_err().starts_with("expected the number of a card"));
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_device_that_the_program_lacks_says_how_to_build_it() {
        let error = DeviceName::Cuda(0).open().unwrap_err().to_string();
        assert!(error.contains("cargo build --release --features cuda"), "{error}");
        assert!(DeviceName::Auto.open().unwrap().is_cpu() || cfg!(feature = "metal"));
    }
}
