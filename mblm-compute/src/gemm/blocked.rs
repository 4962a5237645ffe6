//! A whole product, blocked as in Goto & van de Geijn 2008: a panel of `b` next to the registers, a block of `a` in the
//! second-level cache, a tile of the output in registers. Operands are rounded, where they are, while they are packed.

use rayon::prelude::*;

use super::arithmetic::{Arithmetic, NARROW, WIDE, WithArithmetic};
use super::dispatch::dispatch;
use super::matrix::{Mat, MatMut, Update};
use super::precision::Precision;
use super::tile::{Left, Tile};
use crate::buffer::Buffer;
use crate::parallel::{Shared, Threads};

/// Words of the summed dimension in a block, at most.
const WORDS: usize = 512;
/// Rows of `a` packed at a time, at most.
const BLOCK: usize = 120;
/// Rows of `a` no further apart than this many floats fall update enough sets of the first-level cache.
const NEAR: usize = 512;
/// Added to the length of a row of words, for the same reason.
const GAP: usize = 16;
/// The width of the panels of `b`: that of the widest tile, and a multiple of others.
const PANEL: usize = 32;

/// As [`super::matmul`], in `precision`.
pub(super) fn matmul(precision: Precision, out: MatMut, update: Update, a: Mat, b: Mat, threads: Threads) {
    let pack = if precision == Precision::Bf16 { 2 } else { 1 };
    let words = a.cols.div_ceil(pack);
    let words = words.div_ceil(words.div_ceil(WORDS));
    let mut panels = Buffer::take(b.cols.next_multiple_of(PANEL) * words);
    let rows = block_rows(a.rows, threads);
    for first in (0..a.cols).step_by(pack * words) {
        let depth = (a.cols - first).min(pack * words);
        let (a, b) = (a.part(0, a.rows, first, depth), b.part(first, depth, 0, b.cols));
        let update = if first > 0 { Update::Add } else { update };
        pack_all(precision, b, &mut panels, depth.div_ceil(pack), threads);
        let (out, panels) = (&out, &panels[..]);
        each(a.rows.div_ceil(rows), threads, |i| {
            let (start, rows) = (i * rows, rows.min(a.rows - i * rows));
            // SAFETY: blocks are different rows of `out`.
            let out = unsafe { out.part(start, rows) };
            dispatch(precision, Block { out, update, a: a.part(start, rows, 0, depth), panels });
        });
    }
}

fn each(count: usize, threads: Threads, work: impl Fn(usize) + Sync) {
    match threads {
        Threads::One => (0..count).for_each(&work),
        Threads::All => (0..count).into_par_iter().for_each(&work),
    }
}

/// Equal blocks, as many as threads or a multiple.
fn block_rows(rows: usize, threads: Threads) -> usize {
    let threads = if threads == Threads::All { rayon::current_num_threads() } else { 1 };
    let blocks = rows.div_ceil(BLOCK).next_multiple_of(threads);
    rows.div_ceil(blocks).next_multiple_of(WIDE)
}

fn pack_all(precision: Precision, b: Mat, panels: &mut [f32], words: usize, threads: Threads) {
    let count = b.cols.div_ceil(PANEL);
    // Several panels, so that a thread has something to do.
    let chunk = if threads == Threads::All { count.div_ceil(4 * rayon::current_num_threads()) } else { count };
    let panels = Shared::new(panels);
    each(count.div_ceil(chunk), threads, |i| {
        let (start, end) = (i * chunk, ((i + 1) * chunk).min(count));
        // SAFETY: chunks do not overlap.
        let panels = unsafe { panels.slice(start * PANEL * words..end * PANEL * words) };
        let columns = (end * PANEL).min(b.cols) - start * PANEL;
        dispatch(precision, Pack { columns: b.part(0, b.rows, start * PANEL, columns), panels });
    });
}

struct Pack<'a> {
    columns: Mat<'a>,
    panels: &'a mut [f32],
}

impl WithArithmetic for Pack<'_> {
    #[inline(always)]
    fn run<A: Arithmetic>(self, arithmetic: A) {
        arithmetic.pack(self.columns, A::WIDTH, self.panels);
    }
}

/// The product of some rows of `a` with all panels of `b`.
struct Block<'a> {
    out: MatMut<'a>,
    update: Update,
    a: Mat<'a>,
    panels: &'a [f32],
}

impl WithArithmetic for Block<'_> {
    #[inline(always)]
    fn run<A: Arithmetic>(self, arithmetic: A) {
        if A::WIDTH == 32 { self.tiles::<A, WIDE>(arithmetic) } else { self.tiles::<A, NARROW>(arithmetic) }
    }
}

impl Block<'_> {
    #[inline(always)]
    fn tiles<A: Arithmetic, const MR: usize>(mut self, arithmetic: A) {
        let (rows, cols, depth) = (self.out.rows, self.out.cols, self.a.cols.div_ceil(A::PACK));
        let (a, in_rows) = (self.a, self.a.col_stride == 1);
        // Rows of floats are read where they lie.
        let lying = if A::PACK == 1 && in_rows && a.row_stride <= NEAR { rows / MR * MR } else { 0 };
        let rest = a.part(lying, rows - lying, 0, a.cols);
        let (row_len, step) = if in_rows { (depth + GAP, 1) } else { (depth, MR) };
        let mut packed = Buffer::take(rest.rows.next_multiple_of(MR) * row_len);
        if in_rows {
            for (i, words) in packed.chunks_exact_mut(row_len).enumerate().take(rest.rows) {
                arithmetic.along(&rest.data[i * a.row_stride..][..a.cols], &mut words[..depth]);
            }
        } else {
            arithmetic.pack(rest.t(), MR, &mut packed);
        }
        let left = |row: usize| match row.checked_sub(lying) {
            None => Left { data: &a.data[row * a.row_stride..], row: a.row_stride, step: 1, depth },
            Some(row) => Left { data: &packed[row * row_len..], row: if in_rows { row_len } else { 1 }, step, depth },
        };
        let tile = Tile::<A, MR> { arithmetic };
        for (panel, col) in self.panels.chunks_exact(A::WIDTH * depth).zip((0..cols).step_by(A::WIDTH)) {
            for row in (0..rows).step_by(MR) {
                let out = self.out.block(row, MR.min(rows - row), col, A::WIDTH.min(cols - col));
                if out.rows == MR && out.cols == A::WIDTH {
                    tile.product(left(row), panel, self.update, out);
                } else {
                    tile.product_at_edge(left(row), panel, self.update, out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mblm_base::random::noise;

    use super::*;

    /// The nearest bfloat16, ties to even.
    fn rounded(x: f32) -> f64 {
        let bits = x.to_bits();
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000) as f64
    }

    #[test]
    fn products_are_those_of_rounded_operands() {
        products(Precision::F32, |x| x as f64);
        products(Precision::Bf16, rounded);
    }

    fn products(precision: Precision, rounded: fn(f32) -> f64) {
        crate::buffer::poison_buffers();
        let sizes = [(1, 1, 1), (3, 5, 7), (12, 32, 384), (13, 33, 385), (500, 70, 65), (70, 500, 800), (2, 17, 1000)];
        for (m, n, k) in sizes {
            let (a, b) = (noise(m * k, 1), noise(n * k, 2));
            for layout in 0..4 {
                let (a_t, b_t) = (layout & 1 == 1, layout & 2 == 2);
                let left = if a_t { Mat::new(&a, k, m).t() } else { Mat::new(&a, m, k) };
                let right = if b_t { Mat::new(&b, n, k).t() } else { Mat::new(&b, k, n) };
                let at = |mat: &Mat, i: usize, j: usize| rounded(mat.data[i * mat.row_stride + j * mat.col_stride]);
                for threads in [Threads::One, Threads::All] {
                    // Rows of the output lie apart; what lies between must stay.
                    let (stride, accumulate) = (n + 3, layout == 3);
                    let mut out = vec![if accumulate { 1.0 } else { f32::NAN }; m * stride];
                    let update = if accumulate { Update::Add } else { Update::Set };
                    let out_mat = MatMut::strided(&mut out, m, n, stride);
                    matmul(precision, out_mat, update, left, right, threads);
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|l| at(&left, i, l) * at(&right, l, j)).sum();
                            let size: f64 = (0..k).map(|l| (at(&left, i, l) * at(&right, l, j)).abs()).sum();
                            let (got, want) = (out[i * stride + j] as f64, accumulate as u8 as f64 + sum);
                            let tolerance = 1e-6 * (size + 1.0);
                            assert!(
                                (got - want).abs() <= tolerance,
                                "{m}x{n}x{k} {layout} ({i},{j}): {got}, want {want}"
                            );
                        }
                        assert!(out[i * stride + n..(i + 1) * stride].iter().all(|v| v.is_nan() || *v == 1.0));
                    }
                }
            }
        }
    }
}
