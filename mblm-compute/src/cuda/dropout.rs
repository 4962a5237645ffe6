//! Dropout masks, computed where the elements are.

use candle_core::{DType, Device, Tensor};

use super::launch::{Arg, Grid, launch, unwritten};
use crate::error::Result;
use crate::mode::Dropout;

/// Key, threshold and scale of a mask; none drops nothing.
pub(super) fn mask_args(dropout: Option<Dropout>) -> [Arg<'static>; 3] {
    let (key, threshold, scale) = dropout.map_or((0, 0, 1.0), |dropout| dropout.parts());
    [Arg::Key(key), Arg::Word(threshold), Arg::Float(scale)]
}

/// The factors of a mask as a tensor.
pub fn dropout_factors(dropout: Dropout, shape: &[usize], device: &Device) -> Result<Tensor> {
    let y = unwritten(shape, DType::F32, device)?;
    let [key, threshold, scale] = mask_args(Some(dropout));
    let args = [Arg::Null, Arg::Tensor(&y), Arg::Long(y.elem_count()), key, threshold, scale];
    launch(device, "dropout", Grid::elements(y.elem_count()), &args)?;
    Ok(y)
}
