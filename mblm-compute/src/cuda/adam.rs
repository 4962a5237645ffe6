//! A step of Adam, in place.

use candle_core::Tensor;

use super::launch::{Arg, Grid, launch};
use crate::error::Result;
use crate::ops::adam::Step;

/// Changes a parameter and its moments in place. Nobody else may hold them.
pub fn adam(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, s: &Step) -> Result<()> {
    let g = &g.contiguous()?;
    let args = [
        Arg::Tensor(p),
        Arg::Tensor(g),
        Arg::Tensor(m),
        Arg::Tensor(v),
        Arg::Long(p.elem_count()),
        Arg::Float(s.one_minus_beta1),
        Arg::Float(s.beta2),
        Arg::Float(s.one_minus_beta2),
        Arg::Float(s.root_bias2),
        Arg::Float(s.eps),
        Arg::Float(s.step_size),
        Arg::Float(s.decay),
    ];
    Ok(launch(p.device(), "adam", Grid::elements(p.elem_count()), &args)?)
}
