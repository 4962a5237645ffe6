//! [`Arithmetic`] on floats, for every instruction set.

use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use super::arithmetic::WIDE;
use super::arithmetic::{Arithmetic, WithArithmetic};
use super::matrix::Mat;

/// The kernel in `f32`, on every instruction set.
pub(crate) struct InFloats<W>(pub W);

impl<W: WithArithmetic> WithSimd for InFloats<W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.run(F32(simd));
    }
}

/// [`Arithmetic::pack`] where words are floats.
#[inline(always)]
pub(crate) fn pack_floats<S: Simd>(columns: Mat, width: usize, panels: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if S::F32_LANES == 16 {
        use super::pack::floats;
        // SAFETY: on this architecture, AVX-512 alone has such registers.
        return unsafe {
            match width {
                WIDE => floats::<WIDE>(columns, panels),
                16 => floats::<16>(columns, panels),
                _ => floats::<32>(columns, panels),
            }
        };
    }
    for (panel, first) in panels.chunks_exact_mut(columns.rows * width).zip((0..columns.cols).step_by(width)) {
        let held = width.min(columns.cols - first);
        for (r, to) in panel.chunks_exact_mut(width).enumerate() {
            for (c, to) in to[..held].iter_mut().enumerate() {
                *to = columns.data[r * columns.row_stride + (first + c) * columns.col_stride];
            }
            to[held..].fill(0.0);
        }
    }
}

#[derive(Clone, Copy)]
struct F32<S>(S);

impl<S: Simd> Arithmetic for F32<S> {
    type Simd = S;
    const PACK: usize = 1;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn multiply_add(self, left: S::f32s, right: S::f32s, sum: S::f32s) -> S::f32s {
        self.0.mul_add_e_f32s(left, right, sum)
    }

    #[inline(always)]
    fn pack(self, columns: Mat, width: usize, panels: &mut [f32]) {
        pack_floats::<S>(columns, width, panels);
    }

    #[inline(always)]
    fn along(self, row: &[f32], words: &mut [f32]) {
        words.copy_from_slice(row);
    }

    #[inline(always)]
    fn across(self, rows: [&[f32]; 2], words: &mut [f32]) {
        words.copy_from_slice(rows[0]);
    }
}
