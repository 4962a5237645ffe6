//! The operands of attention's products: panels on the right, rows of words on the left, and sums.

use crate::buffer::Buffer;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::tile::{Left, Tile};
use crate::gemm::{Mat, MatMut, Update};

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
        arithmetic.pack(right, width, &mut data);
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

    /// The tile of `MR` rows whose first element is in row `r` and column `c`.
    #[inline(always)]
    pub fn tile<const MR: usize>(&mut self, r: usize, c: usize) -> MatMut<'_> {
        MatMut::strided(&mut self.floats[r * self.stride + c..], MR, A::WIDTH, self.stride)
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
        let update = if set { Update::Set } else { Update::Add };
        for (i, panel) in right.panels().enumerate() {
            let out = &mut self.data[row * self.stride + i * right.width..];
            let out = MatMut::strided(out, MR, right.width, self.stride);
            tile.product(left, &panel[first / right.pack * right.width..], update, out);
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
