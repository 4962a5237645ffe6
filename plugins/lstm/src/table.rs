//! Rows of floats, one per position of every sequence, that the threads of a recurrence write piece by piece and read
//! in full at the step after.

use std::marker::PhantomData;
use std::ops::Range;

/// How the positions of a batch of sequences follow one another in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    /// `(seq, batch, …)` rather than `(batch, seq, …)`.
    pub(crate) time_major: bool,
}

impl Order {
    /// The row of position `t` of sequence `b`.
    #[inline(always)]
    pub(crate) fn row(self, b: usize, t: usize) -> usize {
        assert!(b < self.batch && t < self.seq, "sequence {b}, position {t} of {self:?}");
        if self.time_major { t * self.batch + b } else { b * self.seq + t }
    }
}

/// See the module.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    ptr: *mut f32,
    width: usize,
    order: Order,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only ways to the data are `read` and `write`, whose callers promise that no two threads touch the same
// floats at once unless both read.
unsafe impl Send for Table<'_> {}
// SAFETY: as above.
unsafe impl Sync for Table<'_> {}

impl<'a> Table<'a> {
    /// `data` as rows of `width` floats.
    pub(crate) fn new(data: &'a mut [f32], width: usize, order: Order) -> Self {
        assert_eq!(data.len(), order.batch * order.seq * width, "{order:?}, width {width}");
        Table { ptr: data.as_mut_ptr(), width, order, _borrow: PhantomData }
    }

    #[inline(always)]
    fn start(&self, b: usize, t: usize, columns: &Range<usize>) -> usize {
        let fits = columns.start <= columns.end && columns.end <= self.width;
        assert!(fits, "columns {columns:?} of {}", self.width);
        self.order.row(b, t) * self.width + columns.start
    }

    /// The columns of a position's row.
    ///
    /// # Safety
    /// While the slice lives, nobody writes to these floats.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, b: usize, t: usize, columns: Range<usize>) -> &'a [f32] {
        let start = self.start(b, t, &columns);
        // SAFETY: in bounds by the assertions, not written to by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.add(start), columns.len()) }
    }

    /// The columns of a position's row, to be changed.
    ///
    /// # Safety
    /// While the slice lives, nobody else reads these floats or writes to them.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn write(&self, b: usize, t: usize, columns: Range<usize>) -> &'a mut [f32] {
        let start = self.start(b, t, &columns);
        // SAFETY: in bounds by the assertions, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), columns.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_lies_where_its_order_says() {
        let mut data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        for (time_major, t, want) in [(false, 2, [21.0, 22.0]), (false, 1, [17.0, 18.0]), (true, 1, [13.0, 14.0])] {
            let table = Table::new(&mut data, 4, Order { batch: 2, seq: 3, time_major });
            // SAFETY: the only slice taken.
            assert_eq!(unsafe { table.read(1, t, 1..3) }, want);
        }
    }

    #[test]
    #[should_panic(expected = "columns 3..5 of 4")]
    fn columns_outside_are_refused() {
        let mut data = [0.0; 24];
        // SAFETY: the only slice taken.
        unsafe { Table::new(&mut data, 4, Order { batch: 2, seq: 3, time_major: false }).write(0, 0, 3..5) };
    }

    #[test]
    #[should_panic(expected = "position 3")]
    fn positions_outside_are_refused() {
        let mut data = [0.0; 24];
        // SAFETY: the only slice taken.
        unsafe { Table::new(&mut data, 4, Order { batch: 2, seq: 3, time_major: true }).read(0, 3, 0..1) };
    }
}
