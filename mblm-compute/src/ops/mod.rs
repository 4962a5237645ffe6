//! Kernels over slices that fused layers are made of. Each file starts with its definition in plain candle ops.

pub mod adam;
pub mod attention;
pub mod conv1d;
pub mod cross_entropy;
pub mod decoding;
pub mod dropout;
pub mod embedding;
pub mod gated_rms_norm;
pub mod gelu;
pub mod layer_norm;
pub mod linear;
pub mod newton_schulz;
pub mod norm_layer;
pub mod on_device;
pub(crate) mod product;
pub mod rms_norm;
pub mod rotary;
pub mod selective_scan;
pub mod ssd;
pub mod tables;
mod tasks;
