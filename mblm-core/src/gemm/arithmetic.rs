//! What a register tile multiplies: floats, or pairs of bfloat16. A kernel written once over [`Arithmetic`] is compiled
//! for each, and for every instruction set.

use pulp::{Simd, WithSimd};

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

    /// The right operand of products: panels of [`WIDTH`](Self::WIDTH) columns, each row of words after row of words.
    /// Missing columns are zero.
    fn pack(self, right: Mat, panels: &mut [f32]);

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

/// Packs the columns of `right` into panels of `REGISTERS` (1 or 2) registers; see [`Arithmetic::pack`].
#[inline(always)]
pub(crate) fn pack_floats<S: Simd, const REGISTERS: usize>(right: Mat, panels: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if S::F32_LANES == 16 {
        use super::pack::{Lanes, floats};
        let columns = Lanes::columns(&right, 0, right.rows);
        // SAFETY: on this architecture, AVX-512 alone has such registers.
        return unsafe { if REGISTERS == 1 { floats::<16>(columns, panels) } else { floats::<32>(columns, panels) } };
    }
    let width = REGISTERS * S::F32_LANES;
    for (panel, first) in panels.chunks_exact_mut(right.rows * width).zip((0..right.cols).step_by(width)) {
        let held = width.min(right.cols - first);
        for (r, to) in panel.chunks_exact_mut(width).enumerate() {
            for (c, to) in to[..held].iter_mut().enumerate() {
                *to = right.data[r * right.row_stride + (first + c) * right.col_stride];
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
    fn pack(self, right: Mat, panels: &mut [f32]) {
        pack_floats::<S, 2>(right, panels);
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
