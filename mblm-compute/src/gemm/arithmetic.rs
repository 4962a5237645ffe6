//! What a register tile multiplies: floats, or pairs of bfloat16. A kernel written once over [`Arithmetic`] is compiled
//! for each, and for every instruction set.

use pulp::Simd;

use super::matrix::Mat;

/// The rows of a register tile where there are 32 registers of 16 floats.
pub(crate) const WIDE: usize = 12;
/// The rows of a register tile where there are 16 registers of 8 floats.
pub(crate) const NARROW: usize = 6;

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

/// A kernel over [`Arithmetic`]. It, and all it uses, must be `#[inline(always)]`, as [`crate::simd`] says.
pub(crate) trait WithArithmetic {
    fn run<A: Arithmetic>(self, arithmetic: A);
}
