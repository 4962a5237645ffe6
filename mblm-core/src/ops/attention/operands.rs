//! The operands of attention's products: panels on the right, rows of words on the left, sums of register tiles.

use pulp::Simd;

use crate::buffer::Buffer;
use crate::gemm::arithmetic::{Arithmetic, Floats};
use crate::gemm::{Mat, MatMut};
use crate::ops::linear::Into;

/// Added to the length of a row, so that rows lie in different sets of the cache.
const GAP: usize = 16;

/// The right operand of a product; see [`Arithmetic::pack`].
pub(super) struct Panels {
    data: Buffer,
    width: usize,
    /// Rows of words of a panel.
    rows: usize,
    /// Elements in a word.
    pack: usize,
}

impl Panels {
    #[inline(always)]
    pub fn pack<A: Arithmetic>(arithmetic: A, right: Mat) -> Self {
        let (rows, columns) = right.shape();
        let (rows, width) = (rows.div_ceil(A::PACK), A::WIDTH);
        let mut data = Buffer::take(rows * columns.next_multiple_of(width));
        arithmetic.pack(right, &mut data);
        Panels { data, width, rows, pack: A::PACK }
    }

    #[inline(always)]
    fn panels(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.rows * self.width)
    }

    /// The panels that have one of the columns below `limit`, with their first column.
    #[inline(always)]
    pub fn starts(&self, limit: usize) -> impl Iterator<Item = (usize, &[f32])> {
        (0..limit).step_by(self.width).zip(self.panels())
    }
}

/// Rows of floats, and the left operands made of them.
pub(super) struct Rows<A> {
    arithmetic: A,
    floats: Buffer,
    stride: usize,
    /// Words of neighbours in a row, where a word is not a float.
    along: Buffer,
    /// Words of neighbours in a column, where a word is not a float.
    across: Buffer,
}

impl<A: Arithmetic> Rows<A> {
    #[inline(always)]
    pub fn take(arithmetic: A, rows: usize, cols: usize) -> Self {
        let stride = cols.next_multiple_of(A::WIDTH) + GAP;
        let floats = Buffer::take(rows * stride);
        Rows { arithmetic, floats, stride, along: Buffer::default(), across: Buffer::default() }
    }

    #[inline(always)]
    pub fn row(&mut self, r: usize) -> &mut [f32] {
        &mut self.floats[r * self.stride..][..self.stride]
    }

    /// What lies from row `r` and column `c` on, and how far rows are apart.
    #[inline(always)]
    pub fn part(&mut self, r: usize, c: usize) -> (&mut [f32], usize) {
        (&mut self.floats[r * self.stride + c..], self.stride)
    }

    #[inline(always)]
    pub fn floats(&self, rows: usize, cols: usize) -> Mat<'_> {
        Mat::strided(&self.floats, rows, cols, self.stride)
    }

    /// Prepares the first `cols` of row `r` for [`Rows::along`].
    #[inline(always)]
    pub fn pack_along(&mut self, r: usize, cols: usize) {
        if A::PACK == 1 {
            return;
        }
        if self.along.is_empty() {
            self.along = Buffer::take(self.floats.len() / A::PACK);
        }
        let words = &mut self.along[r * self.stride / A::PACK..][..cols.div_ceil(A::PACK)];
        self.arithmetic.along(&self.floats[r * self.stride..][..cols], words);
    }

    /// Prepares the first `cols` of the first `rows` for [`Rows::across`].
    #[inline(always)]
    pub fn pack_across(&mut self, rows: usize, cols: usize) {
        if A::PACK == 1 {
            return;
        }
        if self.across.is_empty() {
            self.across = Buffer::take(self.floats.len() / A::PACK);
        }
        if !rows.is_multiple_of(A::PACK) {
            self.row(rows)[..cols].fill(0.0);
        }
        for (word, r) in (0..rows).step_by(A::PACK).enumerate() {
            let row = |r: usize| &self.floats[r * self.stride..][..cols];
            self.arithmetic.across([row(r), row(r + 1)], &mut self.across[word * self.stride..][..cols]);
        }
    }

    /// A left operand whose rows start at row `r` and whose summed dimension is the `depth` columns from `c` on.
    #[inline(always)]
    pub fn along(&self, r: usize, c: usize, depth: usize) -> Left<'_> {
        let data = if A::PACK == 1 { &self.floats } else { &self.along };
        let row = self.stride / A::PACK;
        Left { data: &data[r * row + c / A::PACK..], row, step: 1, depth: depth.div_ceil(A::PACK) }
    }

    /// A left operand whose rows are the columns from `c` on and whose summed dimension is the rows `first..last`.
    #[inline(always)]
    pub fn across(&self, first: usize, last: usize, c: usize) -> Left<'_> {
        let data = if A::PACK == 1 { &self.floats } else { &self.across };
        let start = first / A::PACK * self.stride + c;
        Left { data: &data[start..], row: 1, step: self.stride, depth: (last - first).div_ceil(A::PACK) }
    }
}

/// The left operand of a register tile: word `(i, k)` at `i * row + k * step`, `k` below `depth`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    data: &'a [f32],
    row: usize,
    step: usize,
    depth: usize,
}

/// Rows of sums, as wide as the panels of the right operand.
pub(super) struct Sums {
    data: Buffer,
    stride: usize,
}

impl Sums {
    #[inline(always)]
    pub fn take(rows: usize, right: &Panels) -> Self {
        let stride = right.panels().count() * right.width;
        Sums { data: Buffer::take(rows * stride), stride }
    }

    #[inline(always)]
    pub fn zeros(rows: usize, right: &Panels) -> Self {
        let mut sums = Self::take(rows, right);
        sums.data.fill(0.0);
        sums
    }

    /// Sets (or adds to) `MR` rows from `row` on: `left` times the panels' rows from `first` on.
    #[inline(always)]
    pub fn add<A: Arithmetic, const MR: usize>(
        &mut self,
        tile: &Tile<A, MR>,
        row: usize,
        left: Left,
        right: &Panels,
        first: usize,
        set: bool,
    ) {
        let into = if set { Into::Set } else { Into::Add };
        for (i, panel) in right.panels().enumerate() {
            let out = &mut self.data[row * self.stride + i * right.width..];
            tile.product(left, &panel[first / right.pack * right.width..], into, out, self.stride);
        }
    }

    /// Writes the first `rows`, each times its factor, to the rows of `out` from `start` on.
    #[inline(always)]
    pub fn write(&self, start: usize, rows: usize, factor: impl Fn(usize) -> f32, out: &mut MatMut) {
        for (r, sums) in self.data.chunks_exact(self.stride).enumerate().take(rows) {
            let factor = factor(r);
            for (out, sum) in out.row(start + r).iter_mut().zip(sums) {
                *out = factor * sum;
            }
        }
    }
}

/// `MR` rows of sums of two registers each.
#[derive(Clone, Copy)]
pub(super) struct Tile<A, const MR: usize> {
    pub arithmetic: A,
}

impl<A: Arithmetic, const MR: usize> Tile<A, MR> {
    /// `out (=|+=) left * panel`, the rows of `out` being `stride` apart.
    #[inline(always)]
    pub fn product(&self, left: Left, panel: &[f32], into: Into, out: &mut [f32], stride: usize) {
        let (arithmetic, simd) = (self.arithmetic, self.arithmetic.simd());
        let Left { data, row, step, depth } = left;
        assert!(depth > 0 && (MR - 1) * row + (depth - 1) * step < data.len(), "left operand");
        assert!(depth * A::WIDTH <= panel.len() && (MR - 1) * stride + A::WIDTH <= out.len(), "panel, sums");
        let mut sums = [[simd.splat_f32s(0.0); 2]; MR];
        // SAFETY: in bounds by the assertions; a register is `WIDTH / 2` floats without padding.
        unsafe {
            let panel = panel.as_ptr().cast::<[Floats<A>; 2]>();
            for k in 0..depth {
                let right = panel.add(k).read_unaligned();
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left = simd.splat_f32s(*data.get_unchecked(i * row + k * step));
                    sums[0] = arithmetic.multiply_add(left, right[0], sums[0]);
                    sums[1] = arithmetic.multiply_add(left, right[1], sums[1]);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let out = out.as_mut_ptr().add(i * stride).cast::<[Floats<A>; 2]>();
                let mut sums = *sums;
                if into == Into::Add {
                    let before = out.read_unaligned();
                    sums = [simd.add_f32s(before[0], sums[0]), simd.add_f32s(before[1], sums[1])];
                }
                out.write_unaligned(sums);
            }
        }
    }
}
