//! The orthogonalization in Muon (Jordan et al. 2024): five rounds of a quintic Newton-Schulz iteration. They keep a matrix's
//! singular vectors. They bring singular values of more than a hundredth of its norm near 1, between 0.68 and 1.14.
//!
//! A round is `X <- a X + (b A + c A²) X` with `A = X Xᵀ`, from `X = G / ‖G‖`. It works on the smaller side: where `G` has
//! more rows than columns, everything is transposed.

use candle_core::Tensor;

use crate::buffer::Buffer;
use crate::error::Result;
use crate::gemm::{Mat, MatMut, Update, matmul};
use crate::ops::product::Products;
use crate::parallel::{MIN_PARALLEL, Threads};
use crate::simd::{self, vectorize};

/// `a`, `b` and `c` of a round.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
const ROUNDS: usize = 5;
const _: () = assert!(ROUNDS % 2 == 1);
/// The least that a matrix is divided by.
const EPS: f64 = 1e-7;
/// Rows of a symmetric product at a time: enough for a fast product, few enough to leave out much of the upper half.
const BLOCK: usize = 128;
/// Side of the squares in which a matrix is mirrored.
const SQUARE: usize = 16;

/// The definition, with products in the precision of [`gemm::autocast`](crate::gemm::autocast) on a GPU.
///
/// # Shapes
/// - `g`: `(R, C)`; returns `(R, C)`
pub fn newton_schulz_composed(g: &Tensor) -> Result<Tensor> {
    let (rows, cols) = g.dims2()?;
    let [a, b, c] = COEFFICIENTS;
    let products = Products::of(g);
    let norm = g.sqr()?.sum_all()?.sqrt()?.maximum(EPS)?;
    let x = g.broadcast_div(&norm)?;
    let mut x = if rows > cols { x.t()?.contiguous()? } else { x };
    for _ in 0..ROUNDS {
        let gram = products.product_transposed(&x, &x)?;
        let update = ((&gram * b)? + (products.product(&gram, &gram)? * c)?)?;
        x = ((&x * a)? + products.product(&update, &x)?)?;
    }
    Ok(if rows > cols { x.t()?.contiguous()? } else { x })
}

/// As [`newton_schulz_composed`], in place. Products are those of the whole pool, so they take the precision of
/// [`gemm::autocast`](crate::gemm::autocast), and several matrices may be in work at once. The same bits on any number of
/// threads.
///
/// # Shapes
/// - `g`: `(rows, cols)`
pub fn newton_schulz(g: &mut [f32], rows: usize, cols: usize) {
    assert_eq!(g.len(), rows * cols, "a {rows} x {cols} matrix");
    let squares = |chunk| vectorize(|| simd::sum_and_squares(chunk).1);
    // Chunks that no thread count changes.
    let norm = g.chunks(MIN_PARALLEL).map(squares).sum::<f64>().sqrt();
    let side = rows.min(cols);
    let (mut gram, mut update, mut other) =
        (Buffer::take(side * side), Buffer::take(side * side), Buffer::take(rows * cols));
    other.copy_from_slice(g);
    vectorize(|| simd::scale((1.0 / norm.max(EPS)) as f32, &mut other));
    // An odd number of rounds ends in `g`.
    let (mut x, mut next) = (&mut *other, g);
    for _ in 0..ROUNDS {
        // Nothing is transposed: where there are more rows, `x` is Xᵀ.
        let mat = Mat::new(x, rows, cols);
        let short = if rows > cols { mat.t() } else { mat };
        symmetric(short, &mut gram);
        mirror(&mut gram, side);
        symmetric(Mat::new(&gram, side, side), &mut update);
        combine(&gram, &mut update, side);
        mirror(&mut update, side);
        let (update, out) = (Mat::new(&update, side, side), MatMut::new(next, rows, cols));
        let (left, right) = if rows > cols { (mat, update) } else { (update, mat) };
        matmul(out, Update::Set, left, right, Threads::All);
        std::mem::swap(&mut x, &mut next);
    }
}

/// Floating point operations of [`newton_schulz`], those that symmetry saves included.
pub fn flops(rows: usize, cols: usize) -> f64 {
    let (short, long) = (rows.min(cols) as f64, rows.max(cols) as f64);
    ROUNDS as f64 * 2.0 * short * short * (2.0 * long + short)
}

/// `out = a aᵀ` on and below the diagonal; what lies above is not all written.
fn symmetric(a: Mat, out: &mut [f32]) {
    let (side, depth) = a.shape();
    for first in (0..side).step_by(BLOCK) {
        let rows = BLOCK.min(side - first);
        let out = MatMut::strided(&mut out[first * side..], rows, first + rows, side);
        let (left, right) = (a.part(first, rows, 0, depth), a.part(0, first + rows, 0, depth));
        matmul(out, Update::Set, left, right.t(), Threads::All);
    }
}

/// `update = a I + b gram + c update`, on and below the diagonal.
fn combine(gram: &[f32], update: &mut [f32], side: usize) {
    let [a, b, c] = COEFFICIENTS.map(|x| x as f32);
    vectorize(
        #[inline(always)]
        || {
            for (i, (update, gram)) in update.chunks_exact_mut(side).zip(gram.chunks_exact(side)).enumerate() {
                for (update, gram) in update[..=i].iter_mut().zip(gram) {
                    *update = b * gram + c * *update;
                }
                update[i] += a;
            }
        },
    );
}

/// Copies what lies below the diagonal to above it.
fn mirror(matrix: &mut [f32], side: usize) {
    for i in (0..side).step_by(SQUARE) {
        for j in (0..=i).step_by(SQUARE) {
            for row in i..(i + SQUARE).min(side) {
                for col in j..(j + SQUARE).min(row) {
                    matrix[col * side + row] = matrix[row * side + col];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use mblm_base::random::noise;

    use super::*;
    use crate::gemm::{Precision, autocast};
    use crate::testing::assert_close;

    const SHAPES: [(usize, usize); 8] =
        [(1, 1), (1, 9), (7, 1), (24, 24), (40, 17), (17, 40), (300, 140), (BLOCK + 1, 2 * BLOCK + 5)];

    fn fused(g: &[f32], (rows, cols): (usize, usize)) -> Vec<f32> {
        let mut x = g.to_vec();
        newton_schulz(&mut x, rows, cols);
        x
    }

    fn composed(g: &[f32], shape: (usize, usize), dtype: DType) -> Vec<f32> {
        let g = Tensor::from_slice(g, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let x = newton_schulz_composed(&g).unwrap().to_dtype(DType::F32).unwrap();
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn slices_and_tensors_are_orthogonalized_alike() {
        crate::buffer::poison_buffers();
        for shape in SHAPES {
            let g = noise(shape.0 * shape.1, 3);
            let want = composed(&g, shape, DType::F64);
            // The rounds multiply what is small, rounding too, by up to 500.
            assert_close("slices", &fused(&g, shape), &want, 1e-4);
            assert_close("tensors of f32", &composed(&g, shape, DType::F32), &want, 1e-4);
            // Rounding the operands takes the result about 2% off.
            let bf16 = autocast(Precision::Bf16, || fused(&g, shape));
            let (off, size) = bf16
                .iter()
                .zip(&want)
                .fold((0.0, 0.0), |(off, size), (a, b)| (off + f64::from(a - b).powi(2), size + f64::from(*b).powi(2)));
            assert!((off / size).sqrt() < 0.03, "{shape:?} in bf16 is off by {}", (off / size).sqrt());
        }
    }

    #[test]
    fn singular_values_come_near_one() {
        // Orthogonal columns of lengths 1, 2 and 3: the singular values, and the vectors are known.
        let g = [1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0];
        let x = fused(&g, (4, 3));
        for (i, value) in x.iter().enumerate() {
            let on_diagonal = i % 4 == 0 && i < 9;
            assert!(if on_diagonal { (0.68..1.14).contains(value) } else { *value == 0.0 }, "{x:?}");
        }
        assert_eq!(fused(&[0.0; 6], (2, 3)), [0.0; 6], "nothing is divided by zero");
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let shape = (2 * BLOCK + 70, 3 * BLOCK);
        let g = noise(shape.0 * shape.1, 3);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| fused(&g, shape))
        };
        let one = with(1);
        assert!([2, 3, 5].iter().all(|&threads| with(threads) == one));
    }
}
