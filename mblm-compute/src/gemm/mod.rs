//! Matrix products on slices, with SIMD (AVX-512 included) chosen at run time. Inside [`autocast`], the large ones are
//! computed in bfloat16.

pub(crate) mod arithmetic;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod blocked;
pub(crate) mod dispatch;
pub(crate) mod floats;
pub(crate) mod matrix;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(test)]
mod portable;
mod precision;
mod product;
pub(crate) mod tile;

pub use matrix::{Mat, MatMut, Update};
pub(crate) use precision::current;
pub use precision::{Precision, autocast, requested};
pub use product::matmul;
