//! Rows of columns inside a wider row-major buffer, so that kernels read and write the parts of a projection's output
//! in place.

use std::ops::Range;

use crate::gemm::matrix::Mat;
use crate::parallel::Shared;

/// The same range of columns of every row of a row-major buffer.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    first: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    /// Whole rows of `width` floats.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        Self::columns(data, width, 0..width)
    }

    /// `columns` of rows that are `stride` floats long.
    pub fn columns(data: &'a [f32], stride: usize, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= stride, "columns {columns:?} of {stride}");
        Rows { data, stride, first: columns.start, width: columns.len() }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.stride.max(1)
    }

    /// The number of columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride + self.first..][..self.width]
    }

    /// Some rows of some of the columns, as a matrix.
    pub fn mat(&self, rows: Range<usize>, columns: Range<usize>) -> Mat<'a> {
        assert!(columns.end <= self.width, "columns {columns:?} of {}", self.width);
        let start = (rows.start * self.stride + self.first + columns.start).min(self.data.len());
        Mat::strided(&self.data[start..], rows.len(), columns.len(), self.stride)
    }

    /// All rows as a matrix.
    pub fn all(&self) -> Mat<'a> {
        self.mat(0..self.rows(), 0..self.width)
    }
}

/// The mutable form of [`Rows`], which several threads write at once, each its own places.
#[derive(Clone, Copy)]
pub struct RowsMut<'a> {
    data: Shared<'a>,
    stride: usize,
    first: usize,
    width: usize,
}

impl<'a> RowsMut<'a> {
    /// Whole rows of `width` floats.
    pub fn new(data: &'a mut [f32], width: usize) -> Self {
        Self::columns(Shared::new(data), width, 0..width)
    }

    /// `columns` of rows that are `stride` floats long. Several views of one buffer may be alive.
    pub fn columns(data: Shared<'a>, stride: usize, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= stride, "columns {columns:?} of {stride}");
        RowsMut { data, stride, first: columns.start, width: columns.len() }
    }

    /// Some columns of one row.
    ///
    /// # Safety
    /// No other slice that overlaps may be alive, on any thread.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        assert!(columns.end <= self.width, "columns {columns:?} of {}", self.width);
        let start = row * self.stride + self.first;
        // SAFETY: the caller's promise.
        unsafe { self.data.slice(start + columns.start..start + columns.end) }
    }
}

/// Writes rows `(a, b)` of `width` floats to `y` as `(b, a)`.
pub fn swap(x: &[f32], a: usize, width: usize, y: &mut [f32]) {
    let b = x.len() / (a * width).max(1);
    for (i, x) in x.chunks_exact(width).enumerate() {
        y[(i % b * a + i / b) * width..][..width].copy_from_slice(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_row() {
        let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let rows = Rows::columns(&data, 4, 1..3);
        assert_eq!((rows.rows(), rows.row(2)), (3, &[9.0, 10.0][..]));
        let mut data = data.clone();
        let rows = RowsMut::columns(Shared::new(&mut data), 4, 1..3);
        // SAFETY: the only slice taken.
        unsafe { rows.row(1, 1..2) }.fill(-1.0);
        assert_eq!(data[4..8], [4.0, 5.0, -1.0, 7.0]);
    }

    #[test]
    #[should_panic(expected = "columns 1..3 of 2")]
    fn columns_outside_are_refused() {
        let mut data = vec![0.0; 8];
        // SAFETY: the only slice taken.
        unsafe { RowsMut::columns(Shared::new(&mut data), 4, 1..3).row(0, 1..3) };
    }
}
