//! Named tensors.

use std::collections::BTreeMap;

/// Tensors by name, each with its shape and its elements in row-major order.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;
