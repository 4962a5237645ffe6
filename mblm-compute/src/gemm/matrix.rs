//! Views of slices as matrices, with bounds that are checked once.

use std::marker::PhantomData;

/// Whether a product replaces what the output holds or adds to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Update {
    /// Overwrite.
    Set,
    /// Add.
    Add,
}

/// A read-only matrix view of a slice.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// A mutable row-major matrix view. Between its rows may lie elements that are not its own.
pub struct MatMut<'a> {
    pub(super) ptr: *mut f32,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

impl<'a> Mat<'a> {
    /// `rows x cols`, rows one after another.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols`, rows `row_stride` apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The `rows x cols` elements from row `row` and column `col` on.
    pub(crate) fn part(self, row: usize, rows: usize, col: usize, cols: usize) -> Self {
        assert!(row + rows <= self.rows && col + cols <= self.cols, "a part outside of the matrix");
        // A part without elements may start at the end.
        let start = (row * self.row_stride + col * self.col_stride).min(self.data.len());
        Mat { data: &self.data[start..], rows, cols, ..self }
    }

    /// The transpose; nothing is moved.
    pub fn t(self) -> Self {
        Mat { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

// SAFETY: as `&mut [f32]`, which it is but for the gaps between rows.
unsafe impl Send for MatMut<'_> {}
// SAFETY: a shared view gives no access but by `part`, whose callers promise that parts do not overlap.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// `rows x cols`, rows one after another.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols`, rows `row_stride` apart.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        // SAFETY: in bounds by the check, and the slice is borrowed mutably.
        unsafe { Self::from_ptr(data.as_mut_ptr(), rows, cols, row_stride) }
    }

    /// A view of `rows x cols` floats at `ptr`, rows `row_stride` apart.
    ///
    /// # Safety
    /// For `'a`, the rows must be valid for writes, and nothing else may touch them.
    pub(crate) unsafe fn from_ptr(ptr: *mut f32, rows: usize, cols: usize, row_stride: usize) -> Self {
        MatMut { ptr, rows, cols, row_stride, _borrow: PhantomData }
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row is in bounds and belongs to this view, which is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// The rows `start..start + rows` as a view of their own.
    pub fn rows(&mut self, start: usize, rows: usize) -> MatMut<'_> {
        // SAFETY: the view is borrowed mutably, so that there is no other part.
        unsafe { self.part(start, rows) }
    }

    /// The `rows x cols` elements from row `row` and column `col` on.
    #[inline(always)]
    pub(crate) fn block(&mut self, row: usize, rows: usize, col: usize, cols: usize) -> MatMut<'_> {
        assert!(row + rows <= self.rows && col + cols <= self.cols, "a block outside of the matrix");
        // SAFETY: in bounds by the assertion, and this view is borrowed mutably.
        unsafe { MatMut::from_ptr(self.ptr.add(row * self.row_stride + col), rows, cols, self.row_stride) }
    }

    /// As [`MatMut::rows`], for threads that each take their own.
    ///
    /// # Safety
    /// No other part with one of these rows may be alive, on any thread.
    pub(super) unsafe fn part(&self, start: usize, rows: usize) -> MatMut<'_> {
        assert!(start + rows <= self.rows, "rows {start}..{} of {}", start + rows, self.rows);
        // SAFETY: these rows belong to this view; unaliased by the caller's promise.
        unsafe { MatMut::from_ptr(self.ptr.add(start * self.row_stride), rows, self.cols, self.row_stride) }
    }
}

pub(crate) fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(needed <= len, "a {rows} x {cols} matrix with row stride {row_stride} does not fit in {len} floats");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_past_the_slice_is_refused() {
        Mat::strided(&[0.0; 6], 2, 3, 4);
    }
}
