//! Splitting work over the thread pool in a fixed way: the same thread count gives the same bits.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::gemm::matrix::{MatMut, check};

/// Who computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Threads {
    /// The calling thread: for use inside a parallel loop.
    One,
    /// The whole pool.
    All,
}

/// Below this many floats a kernel is faster on one thread.
pub const MIN_PARALLEL: usize = 16 * 1024;

/// Cuts `0..rows` into one contiguous range per thread (fewer if `rows * row_len` is small).
pub fn row_ranges(rows: usize, row_len: usize) -> Vec<Range<usize>> {
    let parts = if rows * row_len < MIN_PARALLEL { 1 } else { rayon::current_num_threads().min(rows) };
    let parts = parts.max(1);
    (0..parts).map(|i| rows * i / parts..rows * (i + 1) / parts).collect()
}

/// Runs `work` on each range of rows.
pub fn for_rows(rows: usize, row_len: usize, work: impl Fn(Range<usize>) + Sync) {
    let ranges = row_ranges(rows, row_len);
    match ranges.len() {
        1 => work(0..rows),
        _ => ranges.into_par_iter().for_each(&work),
    }
}

/// Runs `work` on each range of rows with a zeroed accumulator of `len` floats of its own, then adds these, in order,
/// to `sum`. For gradients of parameters that every row contributes to.
pub fn reduce_rows(rows: usize, row_len: usize, sum: &mut [f32], work: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let ranges = row_ranges(rows, row_len);
    if ranges.len() == 1 {
        return work(0..rows, sum);
    }
    let partials: Vec<Buffer> = ranges
        .into_par_iter()
        .map(|range| {
            let mut partial = Buffer::zeros(sum.len());
            work(range, &mut partial);
            partial
        })
        .collect();
    for partial in &partials {
        sum.iter_mut().zip(partial.iter()).for_each(|(s, p)| *s += p);
    }
}

/// `to = from`.
pub fn copy(from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    let to = Shared::new(to);
    for_rows(from.len(), 1, |range| {
        // SAFETY: ranges do not overlap.
        unsafe { to.slice(range.clone()) }.copy_from_slice(&from[range]);
    });
}

/// Sets all of `data` to zero.
pub fn clear(data: &mut [f32]) {
    let (len, shared) = (data.len(), Shared::new(data));
    // SAFETY: ranges do not overlap.
    for_rows(len, 1, |range| unsafe { shared.slice(range) }.fill(0.0));
}

/// `len` zeros.
pub fn zeros(len: usize) -> Vec<f32> {
    let mut data = Vec::with_capacity(len);
    let parts = data.spare_capacity_mut()[..len].par_chunks_mut(MIN_PARALLEL);
    parts.for_each(|part| part.fill(MaybeUninit::new(0.0)));
    // SAFETY: all of them are written.
    unsafe { data.set_len(len) };
    data
}

/// A mutable slice that several threads write at once, each its own places.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the only way to the data is `slice`, whose callers promise that no two live slices overlap.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Wraps `data`, which stays mutably borrowed for `'a`.
    pub fn new(data: &'a mut [f32]) -> Self {
        Shared { ptr: data.as_mut_ptr(), len: data.len(), _borrow: std::marker::PhantomData }
    }

    /// The part `range` of the slice. Panics if it lies outside.
    ///
    /// # Safety
    /// No other slice that overlaps `range` may be alive, on any thread.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// The `rows x cols` floats from `first` on, rows `row_stride` apart. Panics if they do not fit.
    ///
    /// # Safety
    /// No other slice or matrix that has an element in common may be alive, on any thread.
    pub unsafe fn matrix(&self, first: usize, rows: usize, cols: usize, row_stride: usize) -> MatMut<'a> {
        check(self.len.saturating_sub(first), rows, cols, row_stride);
        // SAFETY: in bounds by the check, unaliased by the caller's promise.
        unsafe { MatMut::from_ptr(self.ptr.add(first), rows, cols, row_stride) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_every_row_once() {
        for rows in [1, 2, 3, 17, 1000] {
            let seen: Vec<usize> = row_ranges(rows, 1 << 20).into_iter().flatten().collect();
            assert_eq!(seen, (0..rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn reduce_adds_every_row_to_what_is_there() {
        let mut sum = vec![1.0; 2];
        reduce_rows(1000, 1 << 10, &mut sum, |range, acc| {
            for row in range {
                acc[0] += 1.0;
                acc[1] += row as f32;
            }
        });
        assert_eq!(sum, [1001.0, 499_501.0]);
    }

    #[test]
    fn copies_and_zeros_are_whole() {
        for len in [0, 5, 3 * MIN_PARALLEL + 1] {
            let from: Vec<f32> = (1..=len).map(|i| i as f32).collect();
            let mut to = zeros(len);
            assert!(to.len() == len && to.iter().all(|v| v.to_bits() == 0));
            copy(&from, &mut to);
            assert_eq!(from, to);
            clear(&mut to);
            assert_eq!(to, zeros(len));
        }
    }

    #[test]
    #[should_panic(expected = "of 4")]
    fn a_shared_slice_outside_is_refused() {
        let mut data = vec![0.0; 4];
        // SAFETY: the only slice taken.
        unsafe { Shared::new(&mut data).slice(2..5) };
    }
}
