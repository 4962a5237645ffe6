//! Attention over many keys: tiles of query rows against panels of keys, each operand packed once per head, sums of a
//! register tile in registers. What no row of a register tile can see is not computed.

use super::operands::{Panels, Rows, Sums};
use super::{Attention, Backward, Head};
use crate::gemm::arithmetic::{Arithmetic, NARROW, WIDE, WithArithmetic};
use crate::gemm::tile::Tile;
use crate::gemm::{Mat, MatMut, Update};

/// Query rows of a tile. `ROWS` and `KEYS` are multiples of a register tile's rows.
const ROWS: usize = 96;
/// Keys of a block in backward: `ROWS x KEYS` weights and their gradients stay in the second-level cache.
const KEYS: usize = 288;

pub(super) struct Forward<'a> {
    pub attention: &'a Attention<'a>,
    pub head: Head<'a>,
    pub out: MatMut<'a>,
    pub lse: &'a mut [f32],
}

impl WithArithmetic for Forward<'_> {
    #[inline(always)]
    fn run<A: Arithmetic>(self, arithmetic: A) {
        if A::WIDTH == 32 { self.tiles::<A, WIDE>(arithmetic) } else { self.tiles::<A, NARROW>(arithmetic) }
    }
}

impl WithArithmetic for Backward<'_> {
    #[inline(always)]
    fn run<A: Arithmetic>(self, arithmetic: A) {
        if A::WIDTH == 32 { self.tiles::<A, WIDE>(arithmetic) } else { self.tiles::<A, NARROW>(arithmetic) }
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

    /// The rows from `start` on of `from`, which are `stride` apart, times `factor`.
    #[inline(always)]
    fn copy<A: Arithmetic>(&self, from: &[f32], stride: usize, start: usize, factor: f32, to: &mut Rows<A>) {
        for r in 0..ROWS.min(self.seq - start) {
            for (to, from) in to.row(r).iter_mut().zip(&from[(start + r) * stride..][..self.head_dim]) {
                *to = factor * from;
            }
            to.pack_along(r, self.head_dim);
        }
    }
}

impl Forward<'_> {
    #[inline(always)]
    fn tiles<A: Arithmetic, const MR: usize>(mut self, arithmetic: A) {
        let (attention, stride) = (self.attention, 3 * self.attention.inner());
        let (dim, seq) = (attention.head_dim, attention.seq);
        let tile = Tile::<A, MR> { arithmetic };
        let keys = Panels::pack(arithmetic, Mat::strided(self.head.k, seq, dim, stride).t());
        let values = Panels::pack(arithmetic, Mat::strided(self.head.v, seq, dim, stride));
        let mut q = Rows::take(arithmetic, ROWS, dim);
        let mut scores = Rows::take(arithmetic, ROWS, seq);
        let (mut sums, mut factors) = (Sums::take(ROWS, &values), [0.0; ROWS]);
        for (start, rows, limit) in attention.tiles() {
            attention.copy(self.head.q, stride, start, attention.scale(), &mut q);
            for (first, panel) in keys.starts(limit) {
                for group in groups::<MR>(rows, start, first, attention.causal) {
                    tile.product(q.along(group, 0, dim), panel, Update::Set, scores.tile::<MR>(group, first));
                }
            }
            for (r, factor) in factors.iter_mut().enumerate().take(rows) {
                let (seen, hidden) = scores.row(r)[..limit].split_at_mut(attention.visible(start + r));
                (*factor, self.lse[start + r]) = attention.softmax(&self.head, start + r, seen);
                hidden.fill(0.0);
                scores.pack_along(r, limit);
            }
            for first in (0..limit).step_by(KEYS) {
                for group in groups::<MR>(rows, start, first, attention.causal) {
                    let depth = attention.seen_by::<MR>(start + group).min(first + KEYS) - first;
                    sums.add(&tile, group, scores.along(group, first, depth), &values, first, first == 0);
                }
            }
            sums.write(start, rows, |r| factors[r], &mut self.out);
        }
    }
}

impl Backward<'_> {
    #[inline(always)]
    fn tiles<A: Arithmetic, const MR: usize>(mut self, arithmetic: A) {
        let (attention, stride) = (self.attention, 3 * self.attention.inner());
        let (dim, seq) = (attention.head_dim, attention.seq);
        let tile = Tile::<A, MR> { arithmetic };
        let head = |part| Mat::strided(part, seq, dim, stride);
        let keys = Panels::pack(arithmetic, head(self.head.k).t());
        let values = Panels::pack(arithmetic, head(self.head.v).t());
        let keys_again = Panels::pack(arithmetic, head(self.head.k));
        let (mut dk, mut dv) = (Sums::zeros(seq + MR, &keys_again), Sums::zeros(seq + MR, &keys_again));
        let mut dq = Sums::take(ROWS, &keys_again);
        let (mut p, mut dp) = (Rows::take(arithmetic, ROWS, KEYS), Rows::take(arithmetic, ROWS, KEYS));
        let (mut q, mut dout) = (Rows::take(arithmetic, ROWS, dim), Rows::take(arithmetic, ROWS, dim));
        let mut deltas = [0.0; ROWS];
        for (start, rows, limit) in attention.tiles() {
            attention.copy(self.head.q, stride, start, attention.scale(), &mut q);
            attention.copy(self.dout, attention.inner(), start, 1.0, &mut dout);
            let q_panels = Panels::pack(arithmetic, q.floats(rows, dim));
            let dout_panels = Panels::pack(arithmetic, dout.floats(rows, dim));
            for (r, delta) in deltas.iter_mut().enumerate().take(rows) {
                *delta = self.delta(start + r);
            }
            for first in (0..limit).step_by(KEYS) {
                let last = limit.min(first + KEYS);
                let panels = keys.starts(last).zip(values.starts(last)).skip(first / A::WIDTH);
                for ((panel_start, key_panel), (_, value_panel)) in panels {
                    for group in groups::<MR>(rows, start, panel_start, attention.causal) {
                        let column = panel_start - first;
                        tile.product(q.along(group, 0, dim), key_panel, Update::Set, p.tile::<MR>(group, column));
                        let dout = dout.along(group, 0, dim);
                        tile.product(dout, value_panel, Update::Set, dp.tile::<MR>(group, column));
                    }
                }
                for (r, delta) in deltas.iter().enumerate().take(rows) {
                    let seen = attention.visible(start + r).clamp(first, last) - first;
                    let (p, hidden) = p.row(r)[..KEYS].split_at_mut(seen);
                    hidden.fill(0.0);
                    let (seen_dp, hidden) = dp.row(r)[..KEYS].split_at_mut(seen);
                    hidden.fill(0.0);
                    self.softmax(start + r, first, *delta, p, seen_dp);
                    dp.pack_along(r, last - first);
                }
                let columns = (last - first).next_multiple_of(MR);
                p.pack_across(rows, columns);
                dp.pack_across(rows, columns);
                for key in (first..last).step_by(MR) {
                    // Rows before the first that sees one of these keys have no weight for them.
                    let skip = if attention.causal { key.saturating_sub(start) / A::PACK * A::PACK } else { 0 };
                    dv.add(&tile, key, p.across(skip, rows, key - first), &dout_panels, skip, false);
                    dk.add(&tile, key, dp.across(skip, rows, key - first), &q_panels, skip, false);
                }
                for group in groups::<MR>(rows, start, first, attention.causal) {
                    let depth = attention.seen_by::<MR>(start + group).min(last) - first;
                    dq.add(&tile, group, dp.along(group, 0, depth), &keys_again, first, first == 0);
                }
            }
            dq.write(start, rows, |_| attention.scale(), &mut self.dq);
        }
        dk.write(0, seq, |_| 1.0, &mut self.dk);
        dv.write(0, seq, |_| 1.0, &mut self.dv);
    }
}

/// The register tiles of a query tile, by their first row in it, that see the key `first`.
#[inline(always)]
fn groups<const MR: usize>(rows: usize, start: usize, first: usize, causal: bool) -> impl Iterator<Item = usize> {
    let hidden = if causal { (first + 1).saturating_sub(start + MR).next_multiple_of(MR) } else { 0 };
    (hidden..rows).step_by(MR)
}

#[cfg(test)]
mod tests {
    use mblm_base::random::noise;

    use super::*;
    use crate::gemm::floats::InFloats;
    use crate::gemm::{Precision, autocast};
    use crate::mode::Dropout;
    use crate::parallel::Shared;
    use crate::simd::for_every_arch;
    use crate::testing::assert_close;

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
                InFloats(Forward { attention: &attention, head, out, lse })
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
                InFloats(Backward { attention: &attention, head, out: &want, dout: &dout, lse: &want_lse, dq, dk, dv })
            });
            for (i, name) in names.iter().enumerate() {
                assert_close(&format!("{name}, outputs"), &part(&out, i, want.len()), &want, 1e-5);
                let len = seq * 3 * head_dim;
                assert_close(&format!("{name}, gradients"), &part(&grads, i, len), &part(&grads, best, len), 1e-5);
            }
        }
    }

    /// Queries are large, so that a row attends to few keys and each of these counts.
    #[test]
    fn bf16_is_close_to_f32() {
        crate::buffer::poison_buffers();
        for (seq, head_dim, causal) in [(25, 64, true), (97, 7, false), (101, 40, true), (389, 16, true)] {
            let (batch, heads) = (2, 3);
            let inner = heads * head_dim;
            let mut mask = vec![1; batch * seq];
            mask[seq / 2..seq / 2 + 3].fill(0);
            let dropout = Some(Dropout::new(0.2, 7, 0));
            let attention = Attention { batch, seq, heads, head_dim, causal, mask: Some(&mask), dropout };
            let mut qkv = noise(batch * seq * 3 * inner, 1);
            qkv.chunks_exact_mut(3 * inner).for_each(|row| row[..inner].iter_mut().for_each(|q| *q *= 8.0));
            let dout = noise(batch * seq * inner, 2);
            let both = [Precision::F32, Precision::Bf16].map(|precision| {
                let (mut out, mut lse) = (vec![f32::NAN; dout.len()], vec![f32::NAN; batch * heads * seq]);
                let mut dqkv = vec![f32::NAN; qkv.len()];
                autocast(precision, || {
                    attention.forward(&qkv, &mut out, &mut lse);
                    attention.backward(&qkv, &out, &lse, &dout, &mut dqkv);
                });
                (out, dqkv)
            });
            assert!(both[0].0 != both[1].0, "nothing was rounded");
            assert_close("outputs", &both[1].0, &both[0].0, 0.02);
            assert_close("gradients", &both[1].1, &both[0].1, 0.02);
        }
    }
}
