//! Linear maps, and what is added to their results or follows them.

use candle_core::Tensor;

use super::dropout::mask_args;
use super::launch::{Arg, Grid, launch, like, sized};
use super::sums::column_sums;
use crate::backward::with_own_backward;
use crate::error::Result;
use crate::mode::Dropout;
use crate::ops::product::Products;

/// See [`linear_composed`](crate::ops::linear::linear_composed).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let products = Products::of(x);
    let (outputs, inputs) = weight.dims2()?;
    let shape: Vec<usize> = x.dims()[..x.rank() - 1].iter().copied().chain([outputs]).collect();
    let flat = |x: &Tensor, width: usize| x.contiguous()?.reshape((x.elem_count() / width, width));
    let mut y = products.product_transposed(&flat(x, inputs)?.detach(), &weight.detach())?;
    if let Some(bias) = bias {
        y = bias_add(&y, bias)?;
    }
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    with_own_backward(&operands, y.reshape(shape)?, move |operands, dy| {
        let (x, dy) = (flat(operands[0], inputs)?, flat(dy, outputs)?);
        let dx = products.product(&dy, operands[1])?.reshape(operands[0].shape())?;
        let mut grads = vec![dx, products.product(&dy.t()?, &x)?];
        if operands.len() == 3 {
            grads.push(column_sums(&dy)?);
        }
        Ok(grads)
    })
}

/// `x` plus `row`, which is added to each of the rows that `x` has of its length.
///
/// # Shapes
/// - `x`: `(B, …)`, `row`: `(…)`; returns `(B, …)`
pub fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    let (x, row) = (&x.contiguous()?, &row.contiguous()?);
    let y = bias_add(x, row)?;
    with_own_backward(&[x, row], y, |inputs, dy| {
        let len = inputs[1].elem_count();
        let rows = dy.reshape((dy.elem_count() / len, len))?;
        Ok(vec![dy.clone(), column_sums(&rows)?.reshape(inputs[1].shape())?])
    })
}

/// `x + bias`, without a backward.
fn bias_add(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let y = like(x)?;
    let len = x.elem_count();
    launch(x.device(), "bias_add", Grid::elements(len), &sized(&[x, bias, &y], len, &[bias.elem_count()]))?;
    Ok(y)
}

/// `gelu(x + bias)` with dropout.
///
/// # Shapes
/// - `x`: `(…, D)`, `bias`: `(D)`; returns `(…, D)`
pub fn bias_gelu(x: &Tensor, bias: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let (len, dim) = (x.elem_count(), bias.elem_count());
    let y = like(x)?;
    let [key, threshold, scale] = mask_args(dropout);
    let sizes = [Arg::Long(len), Arg::Int(dim), key, threshold, scale];
    let args: Vec<Arg> = [Arg::Tensor(x), Arg::Tensor(bias), Arg::Tensor(&y)].into_iter().chain(sizes).collect();
    launch(x.device(), "bias_gelu", Grid::elements(len), &args)?;
    with_own_backward(&[x, bias], y, move |inputs, dy| {
        let dx = like(dy)?;
        let [key, threshold, scale] = mask_args(dropout);
        let tensors = [inputs[0], inputs[1], dy, &dx].map(Arg::Tensor);
        let sizes = [Arg::Long(len), Arg::Int(dim), key, threshold, scale];
        let args: Vec<Arg> = tensors.into_iter().chain(sizes).collect();
        launch(dy.device(), "bias_gelu_backward", Grid::elements(len), &args)?;
        let dbias = column_sums(&dx)?;
        Ok(vec![dx, dbias])
    })
}
