//! The product that all larger ones are made of: a tile of sums that stay in registers.

use pulp::Simd;

use super::arithmetic::{Arithmetic, Floats, WIDE};
use super::matrix::{MatMut, Update};

/// The left operand of a tile: word `(i, k)` at `i * row + k * step`, `k` below `depth`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub step: usize,
    pub depth: usize,
}

/// `MR` rows of sums of two registers each.
#[derive(Clone, Copy)]
pub(crate) struct Tile<A, const MR: usize> {
    pub arithmetic: A,
}

impl<A: Arithmetic, const MR: usize> Tile<A, MR> {
    /// `out (=|+=) left * panel`.
    #[inline(always)]
    pub fn product(&self, left: Left, panel: &[f32], update: Update, out: MatMut) {
        assert!(out.rows == MR && out.cols == A::WIDTH, "a tile");
        // SAFETY: `out` has room for all sums.
        unsafe { self.store(self.sums(left, panel), update, out.ptr, out.row_stride) }
    }

    /// As [`Tile::product`], for as many rows and columns as `out` has.
    #[inline(always)]
    pub fn product_at_edge(&self, left: Left, panel: &[f32], update: Update, mut out: MatMut) {
        let mut whole = [0.0; WIDE * 32];
        assert!(MR <= WIDE && A::WIDTH <= 32);
        // SAFETY: by the assertion.
        unsafe { self.store(self.sums(left, panel), Update::Set, whole.as_mut_ptr(), A::WIDTH) };
        for (i, sums) in whole.chunks_exact(A::WIDTH).enumerate().take(out.rows) {
            for (out, sum) in out.row(i).iter_mut().zip(sums) {
                *out = if update == Update::Add { *out + sum } else { *sum };
            }
        }
    }

    #[inline(always)]
    fn sums(&self, left: Left, panel: &[f32]) -> [[Floats<A>; 2]; MR] {
        let (arithmetic, simd) = (self.arithmetic, self.arithmetic.simd());
        let Left { data, row, step, depth } = left;
        assert!(depth > 0 && (MR - 1) * row + (depth - 1) * step < data.len(), "left operand");
        assert!(depth * A::WIDTH <= panel.len(), "panel");
        let mut sums = [[simd.splat_f32s(0.0); 2]; MR];
        let panel = panel.as_ptr().cast::<[Floats<A>; 2]>();
        for k in 0..depth {
            // SAFETY: in bounds by the assertions; a register is `WIDTH / 2` floats without padding.
            let right = unsafe { panel.add(k).read_unaligned() };
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: in bounds by the assertions.
                let left = simd.splat_f32s(unsafe { *data.get_unchecked(i * row + k * step) });
                sums[0] = arithmetic.multiply_add(left, right[0], sums[0]);
                sums[1] = arithmetic.multiply_add(left, right[1], sums[1]);
            }
        }
        sums
    }

    /// # Safety
    /// `MR` rows of `WIDTH` floats, `stride` apart, must be the caller's from `out` on.
    #[inline(always)]
    unsafe fn store(&self, sums: [[Floats<A>; 2]; MR], update: Update, out: *mut f32, stride: usize) {
        let simd = self.arithmetic.simd();
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: by the caller.
            unsafe {
                let out = out.add(i * stride).cast::<[Floats<A>; 2]>();
                let mut sums = *sums;
                if update == Update::Add {
                    let before = out.read_unaligned();
                    sums = [simd.add_f32s(before[0], sums[0]), simd.add_f32s(before[1], sums[1])];
                }
                out.write_unaligned(sums);
            }
        }
    }
}
