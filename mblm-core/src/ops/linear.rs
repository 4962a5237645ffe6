//! The affine map `y = x Wᵀ + b` (PyTorch's `Linear`), in whole for training and row by row for decoding.

use candle_core::{D, Tensor};

use crate::error::Result;
use crate::gemm::{Mat, MatMut, Threads, matmul};
use crate::parallel::{MIN_PARALLEL, Shared, for_rows, reduce_rows};
use crate::simd::{self, vectorize};

/// The definition.
///
/// # Shapes
/// - `x`: `(…, I)`, `weight`: `(O, I)`, `bias`: `(O)`; returns `(…, O)`
pub fn linear_composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = outputs;
    let rows = x.elem_count() / inputs;
    let y = x.reshape((rows, inputs))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    debug_assert_eq!(x.dim(D::Minus1)?, inputs);
    Ok(y.reshape(shape)?)
}

/// Whether a product replaces what the output holds or adds to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Into {
    /// Overwrite.
    Set,
    /// Add.
    Add,
}

/// `y (=|+=) x Wᵀ`.
///
/// # Shapes
/// - `x`: `(R, I)`, `weight`: `(O, I)`, `y`: `(R, O)` where `R` follows from `inputs` and `x`
pub fn forward(x: &[f32], weight: &[f32], inputs: usize, into: Into, y: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, weight.len() / inputs);
    let (x, w) = (Mat::new(x, rows, inputs), Mat::new(weight, outputs, inputs));
    matmul(MatMut::new(y, rows, outputs), into == Into::Add, 1.0, x, w.t(), Threads::All);
}

/// The gradient of the input: `dx (=|+=) dy W`.
///
/// # Shapes
/// as in [`forward`]
pub fn backward_input(dy: &[f32], weight: &[f32], inputs: usize, into: Into, dx: &mut [f32]) {
    let (rows, outputs) = (dx.len() / inputs, weight.len() / inputs);
    let (dy, w) = (Mat::new(dy, rows, outputs), Mat::new(weight, outputs, inputs));
    matmul(MatMut::new(dx, rows, inputs), into == Into::Add, 1.0, dy, w, Threads::All);
}

/// The gradient of the weight: `dw += dyᵀ x`.
///
/// # Shapes
/// as in [`forward`]
pub fn backward_weight(dy: &[f32], x: &[f32], inputs: usize, dweight: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, dweight.len() / inputs);
    let (dy, x) = (Mat::new(dy, rows, outputs), Mat::new(x, rows, inputs));
    matmul(MatMut::new(dweight, outputs, inputs), true, 1.0, dy.t(), x, Threads::All);
}

/// The gradient of the bias: adds the rows of `dy` to `dbias`.
pub fn backward_bias(dy: &[f32], dbias: &mut [f32]) {
    let outputs = dbias.len();
    reduce_rows(dy.len() / outputs, outputs, dbias, |rows, sum| {
        vectorize(
            #[inline(always)]
            || {
                for row in dy[rows.start * outputs..rows.end * outputs].chunks_exact(outputs) {
                    simd::add(row, sum);
                }
            },
        );
    });
}

/// Adds `bias` to every row of `y`.
pub fn add_bias(bias: &[f32], y: &mut [f32]) {
    let outputs = bias.len();
    let rows = y.len() / outputs;
    let y = Shared::new(y);
    for_rows(rows, outputs, |rows| {
        // SAFETY: ranges of rows do not overlap.
        let y = unsafe { y.slice(rows.start * outputs..rows.end * outputs) };
        vectorize(
            #[inline(always)]
            || {
                for row in y.chunks_exact_mut(outputs) {
                    simd::add(bias, row);
                }
            },
        );
    });
}

/// Rows from which a decoding step is a matrix product rather than one matrix-vector product per row.
const GEMM_ROWS: usize = 8;

/// `y (=|+=) x Wᵀ + b` for the few rows of a decoding step. Reads the weights once, split over the threads when that
/// pays.
///
/// # Shapes
/// - `x`: `(B, I)`, `weight`: `(O, I)`, `bias`: `(O)`, `y`: `(B, O)`
pub fn step(x: &[f32], weight: &[f32], bias: Option<&[f32]>, inputs: usize, into: Into, y: &mut [f32]) {
    let (batch, outputs) = (x.len() / inputs, weight.len() / inputs);
    if batch >= GEMM_ROWS {
        forward(x, weight, inputs, into, y);
    } else {
        let y = Shared::new(y);
        // A thread is worth waking for about 64 K multiplications.
        for_rows(outputs, batch * inputs * MIN_PARALLEL / (64 * 1024), |range| {
            vectorize(
                #[inline(always)]
                || {
                    for (b, x) in x.chunks_exact(inputs).enumerate() {
                        // SAFETY: ranges of outputs do not overlap, nor do rows.
                        let y = unsafe { y.slice(b * outputs + range.start..b * outputs + range.end) };
                        matvec(x, &weight[range.start * inputs..range.end * inputs], into, y);
                    }
                },
            );
        });
    }
    if let Some(bias) = bias {
        y.chunks_exact_mut(outputs).for_each(|row| simd::add(bias, row));
    }
}

/// Four rows of the matrix at a time, so that `x` is loaded once for them and the sums do not wait for each other.
#[inline(always)]
fn matvec(x: &[f32], weight: &[f32], into: Into, y: &mut [f32]) {
    let inputs = x.len();
    let store = |y: &mut f32, value: f32| *y = if into == Into::Add { *y + value } else { value };
    let mut rows = weight.chunks_exact(4 * inputs);
    let mut outs = y.chunks_exact_mut(4);
    for (w, y) in rows.by_ref().zip(outs.by_ref()) {
        let (w0, w) = w.split_at(inputs);
        let (w1, w) = w.split_at(inputs);
        let (w2, w3) = w.split_at(inputs);
        let values = dot4(x, w0, w1, w2, w3);
        for (y, value) in y.iter_mut().zip(values) {
            store(y, value);
        }
    }
    for (w, y) in rows.remainder().chunks_exact(inputs).zip(outs.into_remainder()) {
        store(y, simd::dot(x, w));
    }
}

#[inline(always)]
fn dot4(x: &[f32], w0: &[f32], w1: &[f32], w2: &[f32], w3: &[f32]) -> [f32; 4] {
    const LANES: usize = 16;
    let mut sums = [[0.0f32; LANES]; 4];
    let whole = x.len() / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (sum, w) in sums.iter_mut().zip([w0, w1, w2, w3]) {
            for ((s, x), w) in sum.iter_mut().zip(&x[i..i + LANES]).zip(&w[i..i + LANES]) {
                *s = x.mul_add(*w, *s);
            }
        }
    }
    let mut out = [0.0; 4];
    for ((out, sum), w) in out.iter_mut().zip(&sums).zip([w0, w1, w2, w3]) {
        *out = simd::sum(sum) + x[whole..].iter().zip(&w[whole..]).map(|(x, w)| x * w).sum::<f32>();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, noise};

    #[test]
    fn a_step_is_a_row_of_forward() {
        for (batch, inputs, outputs) in [(1, 5, 3), (1, 64, 1030), (3, 37, 9), (9, 40, 41)] {
            let (x, w, b) = (noise(batch * inputs, 1), noise(inputs * outputs, 2), noise(outputs, 3));
            let mut want = vec![f32::NAN; batch * outputs];
            forward(&x, &w, inputs, Into::Set, &mut want);
            add_bias(&b, &mut want);
            let mut got = vec![f32::NAN; batch * outputs];
            step(&x, &w, Some(&b), inputs, Into::Set, &mut got);
            assert_close("step", &got, &want, 1e-5);
            step(&x, &w, Some(&b), inputs, Into::Add, &mut got);
            want.iter_mut().for_each(|v| *v *= 2.0);
            assert_close("step added", &got, &want, 1e-5);
        }
    }
}
