//! What a register tile multiplies: floats, or pairs of bfloat16. A kernel written once over [`Arithmetic`] is compiled
//! for each, and for every instruction set.

use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use super::tile::WIDE;
use super::{Mat, Precision};
use crate::simd;

/// Operands are words, which hold `PACK` neighbours along the summed dimension; sums are `f32`.
pub(crate) trait Arithmetic: Copy {
    type Simd: Simd;

    /// Elements in a word.
    const PACK: usize;

    /// Columns of a register tile, and the width of a panel.
    const WIDTH: usize = 2 * <Self::Simd as Simd>::F32_LANES;

    fn simd(self) -> Self::Simd;

    /// `sum + left * right`, lane by lane.
    fn multiply_add(self, left: Floats<Self>, right: Floats<Self>, sum: Floats<Self>) -> Floats<Self>;

    /// Packs columns into panels of `width`: a panel is row of words after row of words, missing columns are zero. The
    /// right operand of a tile is a panel of [`WIDTH`](Self::WIDTH).
    fn pack(self, columns: Mat, width: usize, panels: &mut [f32]);

    /// The words of neighbours in a row.
    fn along(self, row: &[f32], words: &mut [f32]);

    /// The words of neighbours in two rows.
    fn across(self, rows: [&[f32]; 2], words: &mut [f32]);
}

/// A register.
pub(crate) type Floats<A> = <<A as Arithmetic>::Simd as Simd>::f32s;

/// A kernel over [`Arithmetic`]. It, and all it uses, must be `#[inline(always)]`, as [`simd`] says.
pub(crate) trait WithArithmetic {
    fn run<A: Arithmetic>(self, arithmetic: A);
}

/// Runs `work` in `precision` with the best instructions of this machine.
pub(crate) fn dispatch(precision: Precision, work: impl WithArithmetic) {
    match precision {
        Precision::F32 => simd::dispatch(InFloats(work)),
        #[cfg(target_arch = "x86_64")]
        Precision::Bf16 => super::bf16::dispatch(work),
        #[cfg(not(target_arch = "x86_64"))]
        Precision::Bf16 => unreachable!("`autocast` refuses what this machine does not have"),
    }
}

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
