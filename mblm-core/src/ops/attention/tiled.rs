//! Attention over many keys: tiles of query rows against panels of keys, each operand packed once per head, sums of a
//! register tile in registers. What no row of a register tile can see is not computed.

use pulp::{Simd, WithSimd};

use super::{Attention, Backward, Head};
use crate::buffer::Buffer;
use crate::gemm::MatMut;
use crate::ops::linear::Into;

/// Query rows of a tile.
const ROWS: usize = 96;
/// Keys of a block in backward: `ROWS x KEYS` weights and their gradients stay in the second-level cache.
const KEYS: usize = 288;
/// Added to the length of a row of scores, so that rows lie in different sets of the cache.
const GAP: usize = 16;

/// The rows of a register tile: what 32 registers of 16 floats hold, or 16 of 8. `ROWS` and `KEYS` are multiples.
const WIDE: usize = 12;
const NARROW: usize = 6;

/// The columns of a register tile, and the width of a panel.
const fn width<S: Simd>() -> usize {
    2 * S::F32_LANES
}

pub(super) struct Forward<'a> {
    pub attention: &'a Attention<'a>,
    pub head: Head<'a>,
    pub out: MatMut<'a>,
    pub lse: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::F32_LANES == 16 { self.run::<S, WIDE>(simd) } else { self.run::<S, NARROW>(simd) }
    }
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::F32_LANES == 16 { self.run::<S, WIDE>(simd) } else { self.run::<S, NARROW>(simd) }
    }
}

impl Attention<'_> {
    /// The query tiles: first row, rows, and how many keys the last row sees.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<'_> {
        (0..self.seq).step_by(ROWS).map(move |start| {
            let rows = ROWS.min(self.seq - start);
            (start, rows, self.visible(start + rows - 1))
        })
    }

    /// How many keys some row of the register tile that starts at row `i` sees.
    #[inline(always)]
    fn seen_by<const MR: usize>(&self, i: usize) -> usize {
        self.visible(i + MR - 1).min(self.seq)
    }
}

impl Forward<'_> {
    #[inline(always)]
    fn run<S: Simd, const MR: usize>(mut self, simd: S) {
        let (attention, stride) = (self.attention, 3 * self.attention.inner());
        let (dim, seq) = (attention.head_dim, attention.seq);
        let tile = Tile::<S, MR> { simd };
        let keys = Panels::of_columns::<S>(self.head.k, stride, seq, dim);
        let values = Panels::of_rows::<S>(self.head.v, stride, seq, dim);
        let row = seq.next_multiple_of(width::<S>()) + GAP;
        let (mut scores, mut q) = (Buffer::take(ROWS * row), Buffer::take(ROWS * dim));
        let mut sums = Sums::take(ROWS, &values);
        for (start, rows, limit) in attention.tiles() {
            copy(self.head.q, stride, start, rows, &mut q);
            for (first, panel) in keys.starts(limit) {
                for group in groups::<MR>(rows, start, first, attention.causal) {
                    let q = Left { data: &q[group * dim..], row: dim, step: 1, depth: dim };
                    tile.product(attention.scale(), q, panel, Into::Set, &mut scores[group * row + first..], row);
                }
            }
            for r in 0..rows {
                let (seen, hidden) = scores[r * row..][..limit].split_at_mut(attention.visible(start + r));
                self.lse[start + r] = attention.softmax(&self.head, start + r, seen);
                hidden.fill(0.0);
            }
            for first in (0..limit).step_by(KEYS) {
                for group in groups::<MR>(rows, start, first, attention.causal) {
                    let depth = attention.seen_by::<MR>(start + group).min(first + KEYS) - first;
                    let weights = Left { data: &scores[group * row + first..], row, step: 1, depth };
                    sums.add(&tile, group, weights, &values, first, first == 0);
                }
            }
            sums.write(start, rows, &mut self.out);
        }
    }
}

impl Backward<'_> {
    #[inline(always)]
    fn run<S: Simd, const MR: usize>(mut self, simd: S) {
        let (attention, stride) = (self.attention, 3 * self.attention.inner());
        let (dim, seq) = (attention.head_dim, attention.seq);
        let tile = Tile::<S, MR> { simd };
        let keys = Panels::of_columns::<S>(self.head.k, stride, seq, dim);
        let values = Panels::of_columns::<S>(self.head.v, stride, seq, dim);
        let keys_again = Panels::of_rows::<S>(self.head.k, stride, seq, dim);
        let (mut dk, mut dv) = (Sums::take(seq + MR, &keys_again), Sums::take(seq + MR, &keys_again));
        dk.data.fill(0.0);
        dv.data.fill(0.0);
        let mut dq = Sums::take(ROWS, &keys_again);
        let row = KEYS + GAP;
        let (mut p, mut dp) = (Buffer::take(ROWS * row), Buffer::take(ROWS * row));
        let (mut q, mut dout) = (Buffer::take(ROWS * dim), Buffer::take(ROWS * dim));
        let mut deltas = [0.0; ROWS];
        for (start, rows, limit) in attention.tiles() {
            copy(self.head.q, stride, start, rows, &mut q);
            copy(self.dout, attention.inner(), start, rows, &mut dout);
            let q_panels = Panels::of_rows::<S>(&q, dim, rows, dim);
            let dout_panels = Panels::of_rows::<S>(&dout, dim, rows, dim);
            for (r, delta) in deltas.iter_mut().enumerate().take(rows) {
                *delta = self.delta(start + r);
            }
            for first in (0..limit).step_by(KEYS) {
                let last = limit.min(first + KEYS);
                let panels = keys.starts(last).zip(values.starts(last)).skip(first / width::<S>());
                for ((panel_start, key_panel), (_, value_panel)) in panels {
                    for group in groups::<MR>(rows, start, panel_start, attention.causal) {
                        let left = |rows| Left { data: rows, row: dim, step: 1, depth: dim };
                        let (q, dout) = (left(&q[group * dim..]), left(&dout[group * dim..]));
                        let out = group * row + panel_start - first;
                        tile.product(attention.scale(), q, key_panel, Into::Set, &mut p[out..], row);
                        tile.product(1.0, dout, value_panel, Into::Set, &mut dp[out..], row);
                    }
                }
                for r in 0..rows {
                    let seen = attention.visible(start + r).clamp(first, last) - first;
                    let (p, hidden) = p[r * row..][..KEYS].split_at_mut(seen);
                    hidden.fill(0.0);
                    let (dp, hidden) = dp[r * row..][..KEYS].split_at_mut(seen);
                    hidden.fill(0.0);
                    self.softmax(start + r, first, deltas[r], p, dp);
                }
                for key in (first..last).step_by(MR) {
                    // Rows before the first that sees one of these keys have no weight for them.
                    let skip = if attention.causal { key.saturating_sub(start) } else { 0 };
                    let at = skip * row + key - first;
                    let left = |data| Left { data, row: 1, step: row, depth: rows - skip };
                    dv.add(&tile, key, left(&p[at..]), &dout_panels, skip, false);
                    dk.add(&tile, key, left(&dp[at..]), &q_panels, skip, false);
                }
                for group in groups::<MR>(rows, start, first, attention.causal) {
                    let depth = attention.seen_by::<MR>(start + group).min(last) - first;
                    let grads = Left { data: &dp[group * row..], row, step: 1, depth };
                    dq.add(&tile, group, grads, &keys_again, first, first == 0);
                }
            }
            dq.write(start, rows, &mut self.dq);
        }
        dk.write(0, seq, &mut self.dk);
        dv.write(0, seq, &mut self.dv);
    }
}

/// The register tiles of a query tile, by their first row in it, that see the key `first`.
#[inline(always)]
fn groups<const MR: usize>(rows: usize, start: usize, first: usize, causal: bool) -> impl Iterator<Item = usize> {
    let hidden = if causal { (first + 1).saturating_sub(start + MR).next_multiple_of(MR) } else { 0 };
    (hidden..rows).step_by(MR)
}

/// Copies the `rows` from `start` on, `stride` apart, one after another.
#[inline(always)]
fn copy(from: &[f32], stride: usize, start: usize, rows: usize, to: &mut [f32]) {
    let dim = to.len() / ROWS;
    for (r, to) in to.chunks_exact_mut(dim).enumerate().take(rows) {
        to.copy_from_slice(&from[(start + r) * stride..][..dim]);
    }
}

/// The right operand of a product: panels of [`width`] columns, each row after row. Missing columns are zero.
struct Panels {
    data: Buffer,
    width: usize,
    /// Rows of a panel.
    rows: usize,
}

impl Panels {
    /// `rows x dim`, as it is.
    #[inline(always)]
    fn of_rows<S: Simd>(from: &[f32], stride: usize, rows: usize, dim: usize) -> Self {
        let width = width::<S>();
        let mut data = Buffer::take(rows * dim.next_multiple_of(width));
        for (panel, first) in data.chunks_exact_mut(rows * width).zip((0..dim).step_by(width)) {
            let held = width.min(dim - first);
            for (r, to) in panel.chunks_exact_mut(width).enumerate() {
                to[..held].copy_from_slice(&from[r * stride + first..][..held]);
                to[held..].fill(0.0);
            }
        }
        Panels { data, width, rows }
    }

    /// The transpose of `columns x dim`.
    #[inline(always)]
    fn of_columns<S: Simd>(from: &[f32], stride: usize, columns: usize, dim: usize) -> Self {
        let width = width::<S>();
        let mut data = Buffer::take(columns.next_multiple_of(width) * dim);
        for (panel, first) in data.chunks_exact_mut(dim * width).zip((0..columns).step_by(width)) {
            let held = width.min(columns - first);
            if held < width {
                panel.fill(0.0);
            }
            for c in 0..held {
                let from = &from[(first + c) * stride..][..dim];
                for (to, from) in panel.chunks_exact_mut(width).zip(from) {
                    to[c] = *from;
                }
            }
        }
        Panels { data, width, rows: dim }
    }

    #[inline(always)]
    fn panels(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.rows * self.width)
    }

    /// The panels that have one of the columns below `limit`, with their first column.
    #[inline(always)]
    fn starts(&self, limit: usize) -> impl Iterator<Item = (usize, &[f32])> {
        (0..limit).step_by(self.width).zip(self.panels())
    }
}

/// Rows of sums, as wide as the panels of the right operand.
struct Sums {
    data: Buffer,
    stride: usize,
}

impl Sums {
    #[inline(always)]
    fn take(rows: usize, right: &Panels) -> Self {
        let stride = right.panels().count() * right.width;
        Sums { data: Buffer::take(rows * stride), stride }
    }

    /// Sets (or adds to) `MR` rows from `row` on: `left` times the panels' rows from `first` on.
    #[inline(always)]
    fn add<S: Simd, const MR: usize>(
        &mut self,
        tile: &Tile<S, MR>,
        row: usize,
        left: Left,
        right: &Panels,
        first: usize,
        set: bool,
    ) {
        let into = if set { Into::Set } else { Into::Add };
        for (i, panel) in right.panels().enumerate() {
            let out = &mut self.data[row * self.stride + i * right.width..];
            tile.product(1.0, left, &panel[first * right.width..], into, out, self.stride);
        }
    }

    /// Copies the first `rows` to the rows of `out` from `start` on.
    #[inline(always)]
    fn write(&self, start: usize, rows: usize, out: &mut MatMut) {
        for (r, sums) in self.data.chunks_exact(self.stride).enumerate().take(rows) {
            let out = out.row(start + r);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}

/// The left operand of a register tile: element `(i, k)` at `i * row + k * step`, `k` below `depth`.
#[derive(Clone, Copy)]
struct Left<'a> {
    data: &'a [f32],
    row: usize,
    step: usize,
    depth: usize,
}

/// `MR` rows of sums of two registers each.
#[derive(Clone, Copy)]
struct Tile<S, const MR: usize> {
    simd: S,
}

impl<S: Simd, const MR: usize> Tile<S, MR> {
    /// `out (=|+=) scale * left * panel`, the rows of `out` being `stride` apart.
    #[inline(always)]
    fn product(&self, scale: f32, left: Left, panel: &[f32], into: Into, out: &mut [f32], stride: usize) {
        let simd = self.simd;
        let Left { data, row, step, depth } = left;
        assert!(depth > 0 && (MR - 1) * row + (depth - 1) * step < data.len(), "left operand");
        assert!(depth * width::<S>() <= panel.len() && (MR - 1) * stride + width::<S>() <= out.len(), "panel, sums");
        let mut sums = [[simd.splat_f32s(0.0); 2]; MR];
        // SAFETY: in bounds by the assertions; an `f32s` is `F32_LANES` floats without padding.
        unsafe {
            let panel = panel.as_ptr().cast::<[S::f32s; 2]>();
            for k in 0..depth {
                let right = panel.add(k).read_unaligned();
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left = simd.splat_f32s(*data.get_unchecked(i * row + k * step));
                    sums[0] = simd.mul_add_e_f32s(left, right[0], sums[0]);
                    sums[1] = simd.mul_add_e_f32s(left, right[1], sums[1]);
                }
            }
            let scale = simd.splat_f32s(scale);
            for (i, sums) in sums.iter().enumerate() {
                let out = out.as_mut_ptr().add(i * stride).cast::<[S::f32s; 2]>();
                let sums = sums.map(|sum| simd.mul_f32s(scale, sum));
                let sums = if into == Into::Add {
                    let before = out.read_unaligned();
                    [simd.add_f32s(before[0], sums[0]), simd.add_f32s(before[1], sums[1])]
                } else {
                    sums
                };
                out.write_unaligned(sums);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::Shared;
    use crate::simd::for_every_arch;
    use crate::testing::{assert_close, noise};

    /// The outputs of one kernel on every instruction set, each in a part of its own.
    const ARCHS: usize = 3;

    #[test]
    fn every_instruction_set_gives_the_same() {
        crate::buffer::poison_buffers();
        for (seq, head_dim, causal) in [(33, 40, true), (300, 64, true), (101, 7, false)] {
            let attention = Attention { batch: 1, seq, heads: 1, head_dim, causal, mask: None, dropout: None };
            let (qkv, dout) = (noise(seq * 3 * head_dim, 1), noise(seq * head_dim, 2));
            let (mut out, mut lse) = (vec![f32::NAN; ARCHS * seq * head_dim], vec![f32::NAN; ARCHS * seq]);
            let (out_parts, lse_parts) = (Shared::new(&mut out), Shared::new(&mut lse));
            let mut names = vec![];
            for_every_arch(|name| {
                let at = names.len();
                names.push(name);
                let head = attention.head(&qkv, 0);
                // SAFETY: each instruction set has a part of its own.
                let out = unsafe { out_parts.matrix(at * seq * head_dim, seq, head_dim, head_dim) };
                // SAFETY: as above.
                let lse = unsafe { lse_parts.slice(at * seq..(at + 1) * seq) };
                Forward { attention: &attention, head, out, lse }
            });
            let part = |all: &[f32], i: usize, len: usize| all[i * len..(i + 1) * len].to_vec();
            let best = names.len() - 1;
            let (want, want_lse) = (part(&out, best, seq * head_dim), part(&lse, best, seq));
            let mut grads = vec![f32::NAN; ARCHS * seq * 3 * head_dim];
            let (grad_parts, mut at) = (Shared::new(&mut grads), 0);
            for_every_arch(|_| {
                // SAFETY: each instruction set has rows of its own, and the three are different columns of these.
                let grad =
                    |p: usize| unsafe { grad_parts.matrix((at * seq * 3 + p) * head_dim, seq, head_dim, 3 * head_dim) };
                let (dq, dk, dv) = (grad(0), grad(1), grad(2));
                at += 1;
                let head = attention.head(&qkv, 0);
                Backward { attention: &attention, head, out: &want, dout: &dout, lse: &want_lse, dq, dk, dv }
            });
            for (i, name) in names.iter().enumerate() {
                assert_close(&format!("{name}, outputs"), &part(&out, i, want.len()), &want, 1e-5);
                let len = seq * 3 * head_dim;
                assert_close(&format!("{name}, gradients"), &part(&grads, i, len), &part(&grads, best, len), 1e-5);
            }
        }
    }
}
