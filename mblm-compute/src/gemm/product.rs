//! The product of two matrices. The `gemm` crate computes it in `f32`, unless `blocked.rs` is faster.

use super::blocked;
use super::matrix::{Mat, MatMut, Update};
use super::precision::{Precision, current};
use crate::parallel::Threads;
use crate::simd;

/// `out (=|+=) a b`. Products of the whole pool take the precision of [`autocast`](super::autocast), those of one thread `f32`.
///
/// `blocked.rs` is ahead of `gemm` where registers are wide and `b` has to be transposed, as in every forward pass.
pub fn matmul(out: MatMut, update: Update, a: Mat, b: Mat, threads: Threads) {
    assert_eq!((out.rows, a.cols, out.cols), (a.rows, b.rows, b.cols), "matmul: shapes disagree");
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    let small = out.rows * out.cols * a.cols < 64 * 64 * 64;
    let wide = threads == Threads::All && !small;
    let precision = if threads == Threads::All { current() } else { Precision::F32 };
    if a.cols > 0 && (precision == Precision::Bf16 || wide && b.row_stride == 1 && simd::has_wide_registers()) {
        return blocked::matmul(precision, out, update, a, b, if small { Threads::One } else { threads });
    }
    let parallelism = if wide { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: `Mat` and `MatMut` checked at construction that their last element lies within their slice, the three
    // slices are borrowed for the call, and `out` is borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.ptr,
            1,
            out.row_stride as isize,
            update == Update::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_transposed_accumulated_product() {
        // a is 2x3 inside rows of 4, b is 2x3 transposed.
        let a = [1., 2., 3., 9., 4., 5., 6., 9.];
        let b = [1., 0., 2., 0., 1., 1.];
        let mut out = vec![f32::NAN; 6];
        out[0..2].fill(1.0);
        out[3..5].fill(1.0);
        let (a, b) = (Mat::strided(&a, 2, 3, 4), Mat::new(&b, 2, 3).t());
        matmul(MatMut::strided(&mut out, 2, 2, 3), Update::Add, a, b, Threads::One);
        assert_eq!((&out[..2], &out[3..5]), (&[8., 6.][..], &[17., 12.][..]));
        assert!(out[2].is_nan() && out[5].is_nan());
    }
}
