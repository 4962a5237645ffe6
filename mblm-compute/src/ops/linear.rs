//! The affine map `y = x Wᵀ + b` (PyTorch's `Linear`), in whole for training and row by row for decoding.

use candle_core::{D, Tensor};
use pulp::{Simd, WithSimd};

use crate::buffer::Buffer;
use crate::error::Result;
use crate::gemm::floats::pack_floats;
use crate::gemm::{Mat, MatMut, Update, matmul};
use crate::ops::product::Products;
use crate::parallel::{MIN_PARALLEL, Shared, Threads, for_rows, reduce_rows};
use crate::simd::{self, Cache, vectorize};

/// The definition, with the product in the precision of [`gemm::autocast`](crate::gemm::autocast) on a GPU.
///
/// # Shapes
/// - `x`: `(…, I)`, `weight`: `(O, I)`, `bias`: `(O)`; returns `(…, O)`
pub fn linear_composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_in(Products::of(x), x, weight, bias)
}

fn linear_in(products: Products, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = outputs;
    let rows = x.elem_count() / inputs;
    let y = products.product_transposed(&x.reshape((rows, inputs))?, weight)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    debug_assert_eq!(x.dim(D::Minus1)?, inputs);
    Ok(y.reshape(shape)?)
}

/// `y (=|+=) x Wᵀ`. For few rows, as in decoding, it reads the weights once and packs nothing.
///
/// # Shapes
/// - `x`: `(R, I)`, `weight`: `(O, I)`, `y`: `(R, O)` where `R` follows from `inputs` and `x`
pub fn forward(x: &[f32], weight: &[f32], inputs: usize, update: Update, y: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, weight.len() / inputs);
    if rows >= GEMM_ROWS {
        let (x, w) = (Mat::new(x, rows, inputs), Mat::new(weight, outputs, inputs));
        return matmul(MatMut::new(y, rows, outputs), update, x, w.t(), Threads::All);
    }
    let y = Shared::new(y);
    // A thread is worth waking for about 64 K multiplications.
    for_rows(outputs, rows * inputs * MIN_PARALLEL / (64 * 1024), |range| {
        // SAFETY: ranges of outputs do not overlap.
        let y = unsafe { y.matrix(range.start, rows, range.len(), outputs) };
        simd::dispatch(FewRows { x, weight: &weight[range.start * inputs..range.end * inputs], inputs, update, y });
    });
}

/// The gradient of the input: `dx (=|+=) dy W`.
///
/// # Shapes
/// as in [`forward`]
pub fn backward_input(dy: &[f32], weight: &[f32], inputs: usize, update: Update, dx: &mut [f32]) {
    let (rows, outputs) = (dx.len() / inputs, weight.len() / inputs);
    let (dy, w) = (Mat::new(dy, rows, outputs), Mat::new(weight, outputs, inputs));
    matmul(MatMut::new(dx, rows, inputs), update, dy, w, Threads::All);
}

/// The gradient of the weight: `dw += dyᵀ x`.
///
/// # Shapes
/// as in [`forward`]
pub fn backward_weight(dy: &[f32], x: &[f32], inputs: usize, dweight: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, dweight.len() / inputs);
    let (dy, x) = (Mat::new(dy, rows, outputs), Mat::new(x, rows, inputs));
    matmul(MatMut::new(dweight, outputs, inputs), Update::Add, dy.t(), x, Threads::All);
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

/// `y = x + b` in every row: what a product is added to where a residual path joins.
pub fn residual(x: &[f32], bias: &[f32], y: &mut [f32]) {
    let outputs = bias.len();
    let rows = y.len() / outputs;
    let y = Shared::new(y);
    for_rows(rows, outputs, |rows| {
        let range = rows.start * outputs..rows.end * outputs;
        // SAFETY: ranges of rows do not overlap.
        let y = unsafe { y.slice(range.clone()) };
        vectorize(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(outputs).zip(x[range].chunks_exact(outputs)) {
                    for ((y, x), b) in y.iter_mut().zip(x).zip(bias) {
                        *y = x + b;
                    }
                }
            },
        );
    });
}

/// `y (=|+=) x Wᵀ + b`, for the rows of a decoding step.
///
/// # Shapes
/// - `x`: `(B, I)`, `weight`: `(O, I)`, `bias`: `(O)`, `y`: `(B, O)`
pub fn step(x: &[f32], weight: &[f32], bias: Option<&[f32]>, inputs: usize, update: Update, y: &mut [f32]) {
    forward(x, weight, inputs, update, y);
    if let Some(bias) = bias {
        y.chunks_exact_mut(bias.len()).for_each(|row| simd::add(bias, row));
    }
}

/// Rows from which [`forward`] is a matrix product like any other.
const GEMM_ROWS: usize = 64;

/// Some of the outputs of [`forward`].
struct FewRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    inputs: usize,
    update: Update,
    y: MatMut<'a>,
}

/// Rows of the weight that share a pass over `x`.
const OUTPUTS: usize = 4;

/// As [`OUTPUTS`], where rows of `x` lie side by side in a register. More would lie in too few sets of the first-level cache,
/// since rows are often powers of two apart.
const BESIDE: usize = 8;

impl WithSimd for FewRows<'_> {
    type Output = ();

    /// A group of rows of the weight stays in the first-level cache for all of `x`. For a single `x` the weight is read
    /// from front to back, which is what the processor fetches ahead best. Many `x` fill registers side by side.
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (rows, lanes) = (self.x.len() / self.inputs, S::F32_LANES);
        if rows == 1 {
            for (output, weight) in self.weight.chunks_exact(self.inputs).enumerate() {
                self.store(0, output, [[long_dot(simd, weight, self.x)]]);
            }
            return;
        }
        let rest = if rows % lanes >= lanes * 3 / 4 { 0 } else { rows % lanes };
        self.side_by_side(simd, rows - rest);
        if rest > 0 {
            self.one_by_one(simd, rows - rest);
        }
    }
}

impl FewRows<'_> {
    /// The first `rows`, in panels of a register.
    #[inline(always)]
    fn side_by_side<S: Simd>(&mut self, simd: S, rows: usize) {
        let (inputs, lanes) = (self.inputs, S::F32_LANES);
        let mut panels = Buffer::take(rows.next_multiple_of(lanes) * inputs);
        pack_floats::<S>(Mat::new(self.x, rows, inputs).t(), lanes, &mut panels);
        for (group, weight) in self.weight.chunks(BESIDE * inputs).enumerate() {
            for (panel, first) in panels.chunks_exact(lanes * inputs).zip((0..rows).step_by(lanes)) {
                let held = lanes.min(rows - first);
                if weight.len() == BESIDE * inputs {
                    let sums = sums::<S, BESIDE>(simd, weight, panel, inputs);
                    self.store_beside::<S, BESIDE>(first, held, group * BESIDE, sums);
                } else {
                    for (i, weight) in weight.chunks_exact(inputs).enumerate() {
                        let sums = sums::<S, 1>(simd, weight, panel, inputs);
                        self.store_beside::<S, 1>(first, held, group * BESIDE + i, sums);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn store_beside<S: Simd, const O: usize>(&mut self, first: usize, held: usize, output: usize, sums: [S::f32s; O]) {
        // SAFETY: a register is `F32_LANES` floats without padding.
        let sums = unsafe { std::slice::from_raw_parts(sums.as_ptr().cast::<f32>(), O * S::F32_LANES) };
        for b in 0..held {
            self.store(first + b, output, [std::array::from_fn::<_, O, _>(|o| sums[o * S::F32_LANES + b])]);
        }
    }

    /// The rows from `first` on.
    #[inline(always)]
    fn one_by_one<S: Simd>(&mut self, simd: S, first: usize) {
        for (group, weight) in self.weight.chunks(OUTPUTS * self.inputs).enumerate() {
            if weight.len() < OUTPUTS * self.inputs {
                for (i, row) in weight.chunks_exact(self.inputs).enumerate() {
                    self.all_of_x::<S, 1>(simd, first, group * OUTPUTS + i, row);
                }
            } else {
                self.all_of_x::<S, OUTPUTS>(simd, first, group * OUTPUTS, weight);
            }
        }
    }

    #[inline(always)]
    fn all_of_x<S: Simd, const O: usize>(&mut self, simd: S, first: usize, output: usize, weight: &[f32]) {
        // As many sums as registers hold.
        if S::F32_LANES == 16 {
            self.groups_of_x::<S, O, 4>(simd, first, output, weight);
        } else {
            self.groups_of_x::<S, O, 2>(simd, first, output, weight);
        }
    }

    #[inline(always)]
    fn groups_of_x<S: Simd, const O: usize, const B: usize>(
        &mut self,
        simd: S,
        first: usize,
        output: usize,
        weight: &[f32],
    ) {
        let groups = self.x[first * self.inputs..].chunks_exact(B * self.inputs);
        let rest = groups.remainder();
        for (group, x) in groups.enumerate() {
            self.store(first + group * B, output, dots::<S, O, B>(simd, weight, x, self.inputs));
        }
        let first = self.x.len() / self.inputs - rest.len() / self.inputs;
        for (i, x) in rest.chunks_exact(self.inputs).enumerate() {
            self.store(first + i, output, dots::<S, O, 1>(simd, weight, x, self.inputs));
        }
    }

    #[inline(always)]
    fn store<const O: usize, const B: usize>(&mut self, row: usize, output: usize, values: [[f32; O]; B]) {
        for (b, values) in values.iter().enumerate() {
            for (y, value) in self.y.row(row + b)[output..].iter_mut().zip(values) {
                *y = if self.update == Update::Add { *y + value } else { *value };
            }
        }
    }
}

/// `weight · x`, in four sums that do not wait for each other.
#[inline(always)]
fn long_dot<S: Simd>(simd: S, weight: &[f32], x: &[f32]) -> f32 {
    let (w, w_rest) = S::as_simd_f32s(weight);
    let (x, x_rest) = S::as_simd_f32s(x);
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (w4, w1) = w.as_chunks::<4>();
    let (x4, x1) = x.as_chunks::<4>();
    for (i, (w, x)) in w4.iter().zip(x4).enumerate() {
        // What is a page ahead, before which the processor's own prefetching stops.
        for line in (0..4 * S::F32_LANES).step_by(16) {
            simd::prefetch(weight, 1024 + 4 * S::F32_LANES * i + line, Cache::Second);
        }
        for (sum, (w, x)) in sums.iter_mut().zip(w.iter().zip(x)) {
            *sum = simd.mul_add_e_f32s(*w, *x, *sum);
        }
    }
    for (w, x) in w1.iter().zip(x1) {
        sums[0] = simd.mul_add_e_f32s(*w, *x, sums[0]);
    }
    let total = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    simd.reduce_sum_f32s(total) + w_rest.iter().zip(x_rest).map(|(w, x)| w * x).sum::<f32>()
}

/// The products of `O` rows of the weight with a panel of `x`, whose rows are the lanes.
#[inline(always)]
fn sums<S: Simd, const O: usize>(simd: S, weight: &[f32], panel: &[f32], inputs: usize) -> [S::f32s; O] {
    /// Floats of a cache line.
    const LINE: usize = 16;
    let mut sums = [simd.splat_f32s(0.0); O];
    let (panel, _) = S::as_simd_f32s(panel);
    assert!(weight.len() >= O * inputs && panel.len() >= inputs);
    for line in (0..inputs / LINE * LINE).step_by(LINE) {
        for o in 0..O {
            // The same place in the group after the next.
            simd::prefetch(weight, (2 * O + o) * inputs + line, Cache::Second);
        }
        for (k, x) in (line..).zip(&panel[line..line + LINE]) {
            // SAFETY: `k < inputs`.
            unsafe { add(simd, weight, inputs, k, *x, &mut sums) };
        }
    }
    let rest = inputs / LINE * LINE;
    for (k, x) in (rest..).zip(&panel[rest..inputs]) {
        // SAFETY: `k < inputs`.
        unsafe { add(simd, weight, inputs, k, *x, &mut sums) };
    }
    sums
}

/// Adds element `k` of each of `O` rows of the weight, times `x`.
///
/// # Safety
/// `weight` must have `O` rows of `inputs`, and `k` be one of these.
#[inline(always)]
unsafe fn add<S: Simd, const O: usize>(
    simd: S,
    weight: &[f32],
    inputs: usize,
    k: usize,
    x: S::f32s,
    sums: &mut [S::f32s; O],
) {
    for (o, sum) in sums.iter_mut().enumerate() {
        // SAFETY: within row `o`, by the caller.
        let weight = unsafe { *weight.get_unchecked(o * inputs + k) };
        *sum = simd.mul_add_e_f32s(simd.splat_f32s(weight), x, *sum);
    }
}

/// The products of `B` rows of `x` with `O` rows of the weight.
#[inline(always)]
fn dots<S: Simd, const O: usize, const B: usize>(simd: S, weight: &[f32], x: &[f32], inputs: usize) -> [[f32; O]; B] {
    let whole = inputs / S::F32_LANES;
    // The rows of the next group, or later elements where rows are long.
    let ahead = if inputs > 1024 { 512 } else { OUTPUTS * inputs };
    assert!(weight.len() >= O * inputs && x.len() >= B * inputs);
    let (zero, mut sums) = (simd.splat_f32s(0.0), [[simd.splat_f32s(0.0); O]; B]);
    for k in (0..whole * S::F32_LANES).step_by(S::F32_LANES) {
        let mut weights = [zero; O];
        for (o, to) in weights.iter_mut().enumerate() {
            simd::prefetch(weight, o * inputs + k + ahead, Cache::First);
            // SAFETY: a register from `k` on lies within a row, and the rows within the slice by the assertion.
            *to = unsafe { weight.as_ptr().add(o * inputs + k).cast::<S::f32s>().read_unaligned() };
        }
        for (b, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let x = unsafe { x.as_ptr().add(b * inputs + k).cast::<S::f32s>().read_unaligned() };
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = simd.mul_add_e_f32s(x, weight, *sum);
            }
        }
    }
    let mut values = [[0.0; O]; B];
    for (b, values) in values.iter_mut().enumerate() {
        for (o, value) in values.iter_mut().enumerate() {
            *value = simd.reduce_sum_f32s(sums[b][o]);
            for k in whole * S::F32_LANES..inputs {
                *value += x[b * inputs + k] * weight[o * inputs + k];
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};
    use mblm_base::random::noise;

    use super::*;
    use crate::testing::assert_close;

    #[test]
    fn few_rows_and_many_are_the_same_product() {
        for (rows, inputs, outputs) in [
            (1, 5, 3),
            (1, 64, 1030),
            (3, 37, 9),
            (9, 40, 41),
            (63, 33, 6),
            (17, 2000, 13),
            (16, 64, 257),
            (30, 40, 19),
        ] {
            let (x, w, b) = (noise(rows * inputs, 1), noise(inputs * outputs, 2), noise(outputs, 3));
            let mut want = vec![f32::NAN; rows * outputs];
            let (x_mat, w_mat) = (Mat::new(&x, rows, inputs), Mat::new(&w, outputs, inputs));
            matmul(MatMut::new(&mut want, rows, outputs), Update::Set, x_mat, w_mat.t(), Threads::One);
            add_bias(&b, &mut want);
            let mut got = vec![f32::NAN; rows * outputs];
            step(&x, &w, Some(&b), inputs, Update::Set, &mut got);
            assert_close("set", &got, &want, 1e-5);
            step(&x, &w, Some(&b), inputs, Update::Add, &mut got);
            want.iter_mut().for_each(|v| *v *= 2.0);
            assert_close("added", &got, &want, 1e-5);
        }
    }

    #[test]
    fn a_composition_in_bf16_is_close_to_f32_and_so_are_its_gradients() {
        let var = |shape: (usize, usize), seed| {
            let values = noise(shape.0 * shape.1, seed);
            Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let (x, weight, dy) = (var((9, 65), 1), var((33, 65), 2), var((9, 33), 3));
        let [f32, bf16] = [Products::of(&x), Products::in_bf16()].map(|products| {
            let y = linear_in(products, &x, &weight, None).unwrap();
            assert_eq!(y.dtype(), DType::F32);
            let grads = (&y * dy.detach()).unwrap().sum_all().unwrap().backward().unwrap();
            [&y, grads.get(&x).unwrap(), grads.get(&weight).unwrap()]
                .map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        });
        assert!(f32[0] != bf16[0], "nothing was rounded");
        for (part, (got, want)) in ["output", "input", "weight"].iter().zip(bf16.iter().zip(&f32)) {
            assert_close(part, got, want, 0.02);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same() {
        let (inputs, outputs) = (37, 9);
        for rows in [1, 2, 5, 7, 14, 16] {
            let (x, weight) = (noise(rows * inputs, 1), noise(inputs * outputs, 2));
            let mut want = vec![f32::NAN; rows * outputs];
            forward(&x, &weight, inputs, Update::Set, &mut want);
            let mut all = vec![f32::NAN; 3 * want.len()];
            let (parts, mut names) = (Shared::new(&mut all), vec![]);
            simd::for_every_arch(|name| {
                // SAFETY: each instruction set has a part of its own.
                let y = unsafe { parts.matrix(names.len() * rows * outputs, rows, outputs, outputs) };
                names.push(name);
                FewRows { x: &x, weight: &weight, inputs, update: Update::Set, y }
            });
            for (name, got) in names.iter().zip(all.chunks_exact(want.len())) {
                assert_close(name, got, &want, 1e-5);
            }
        }
    }
}
