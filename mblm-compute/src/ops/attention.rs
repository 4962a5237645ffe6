//! Softmax attention over packed queries, keys and values (Vaswani et al. 2017, eq. 1), in tiles of query rows with a
//! causal skip; scores are recomputed in backward (Dao et al. 2022). Short sequences take plain loops; long ones take
//! products, in the precision of [`gemm::autocast`].

use crate::buffer::Buffer;
use crate::gemm::dispatch::dispatch;
use crate::gemm::{self, MatMut};
use crate::mode::Dropout;
use crate::parallel::{Shared, for_rows};
use crate::simd::{self, Cache, vectorize};

mod composed;
mod operands;
mod short;
mod tiled;

pub use composed::{attention_composed, softmax_composed};
pub(crate) use composed::{attention_of_last, join_heads, split_heads};

/// Up to this many keys the products are plain loops.
const SHORT: usize = 24;

/// How many positions ahead decoding asks for keys and values.
const AHEAD: usize = 12;

/// The kernel's constants. Rows of `qkv` are `[q | k | v]`, each `heads * head_dim` wide.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a position sees itself and the past alone.
    pub causal: bool,
    /// `(B, S)`, nonzero = attend.
    pub mask: Option<&'a [u8]>,
    /// Dropout of the attention weights.
    pub dropout: Option<Dropout>,
}

/// One head of one sequence.
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    mask: Option<&'a [u8]>,
    /// Number of this head among all of the batch, for dropout.
    index: usize,
}

impl Attention<'_> {
    fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn head<'b>(&'b self, qkv: &'b [f32], index: usize) -> Head<'b> {
        let (b, h) = (index / self.heads, index % self.heads);
        let inner = self.inner();
        let rows = &qkv[b * self.seq * 3 * inner..(b + 1) * self.seq * 3 * inner];
        let part = |p: usize| &rows[p * inner + h * self.head_dim..];
        let mask = self.mask.map(|m| &m[b * self.seq..(b + 1) * self.seq]);
        Head { q: part(0), k: part(1), v: part(2), mask, index }
    }

    /// Asks for a head one sequence after `index`, in rows of `width`: the heads of short sequences lie in pieces, which
    /// the processor's own prefetching does not find.
    #[inline(always)]
    fn ask_ahead(&self, data: &[f32], width: usize, index: usize) {
        let (next, h) = (index / self.heads + 1, index % self.heads);
        for row in next * self.seq..(next + 1) * self.seq {
            for part in (0..width).step_by(self.inner()) {
                prefetch(data, row * width + part + h * self.head_dim, self.head_dim, Cache::Second);
            }
        }
    }

    /// How many keys row `i` sees, but for the mask.
    #[inline(always)]
    fn visible(&self, i: usize) -> usize {
        if self.causal { i + 1 } else { self.seq }
    }

    /// # Shapes
    /// - `qkv`: `(B, S, 3 H d)`; `out`: `(B, S, H d)`, overwritten; `lse`: `(B, H, S)`, overwritten with the logarithm
    ///   of each row's sum of exponentials (infinite where a row attends to nothing)
    pub fn forward(&self, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
        let (seq, inner) = (self.seq, self.inner());
        let (out, lse, precision) = (Shared::new(out), Shared::new(lse), gemm::current());
        for_rows(self.batch * self.heads, seq * self.head_dim * 8, |heads| {
            for index in heads {
                let head = self.head(qkv, index);
                let first = (index / self.heads) * seq * inner + (index % self.heads) * self.head_dim;
                // SAFETY: every head has its own `lse` row, and its own columns of the rows of `out`.
                let (lse, out) = unsafe {
                    (lse.slice(index * seq..(index + 1) * seq), out.matrix(first, seq, self.head_dim, inner))
                };
                if seq > SHORT {
                    dispatch(precision, tiled::Forward { attention: self, head, out, lse });
                } else {
                    self.ask_ahead(qkv, 3 * inner, index);
                    vectorize(
                        #[inline(always)]
                        || self.forward_short(&head, out, lse),
                    );
                }
            }
        });
    }

    /// Turns the visible scores of row `i` into weights, with the dropout of training, but for a factor. Returns this and
    /// the logarithm of the sum of exponentials.
    #[inline(always)]
    fn softmax(&self, head: &Head, i: usize, row: &mut [f32]) -> (f32, f32) {
        hide(head.mask, row);
        let max = simd::max(row);
        let (sum, lse) = if max == f32::NEG_INFINITY {
            row.fill(1.0);
            (row.len() as f32, f32::INFINITY)
        } else {
            let sum = simd::exp_weights(row, max);
            (sum, max + sum.ln())
        };
        self.drop_out(head, i, 0, row);
        (1.0 / sum, lse)
    }

    /// Drops weights of row `i`, of the keys from `first` on.
    #[inline(always)]
    fn drop_out(&self, head: &Head, i: usize, first: usize, row: &mut [f32]) {
        if let Some(dropout) = self.dropout {
            let first = (head.index * self.seq + i) * self.seq + first;
            for (j, p) in row.iter_mut().enumerate() {
                *p *= dropout.factor(first + j);
            }
        }
    }

    /// Overwrites `dqkv` with the gradient of `qkv`.
    ///
    /// # Shapes
    /// - `out`, `dout`: `(B, S, H d)`; `qkv`, `dqkv`: `(B, S, 3 H d)`; `lse`: `(B, H, S)`
    pub fn backward(&self, qkv: &[f32], out: &[f32], lse: &[f32], dout: &[f32], dqkv: &mut [f32]) {
        let (seq, inner, dim) = (self.seq, self.inner(), self.head_dim);
        let (dqkv, precision) = (Shared::new(dqkv), gemm::current());
        for_rows(self.batch * self.heads, seq * dim * 16, |heads| {
            for index in heads {
                let (sequence, h) = (index / self.heads, index % self.heads);
                let grad = |part: usize| {
                    // SAFETY: the columns of this part and head in rows of this sequence belong to this view alone.
                    unsafe { dqkv.matrix((sequence * seq * 3 + part) * inner + h * dim, seq, dim, 3 * inner) }
                };
                let first = sequence * seq * inner + h * dim;
                let back = Backward {
                    attention: self,
                    head: self.head(qkv, index),
                    out: &out[first..],
                    dout: &dout[first..],
                    lse: &lse[index * seq..(index + 1) * seq],
                    dq: grad(0),
                    dk: grad(1),
                    dv: grad(2),
                };
                if seq > SHORT {
                    dispatch(precision, back);
                } else {
                    self.ask_ahead(qkv, 3 * inner, index);
                    self.ask_ahead(out, inner, index);
                    self.ask_ahead(dout, inner, index);
                    vectorize(
                        #[inline(always)]
                        || back.short(),
                    );
                }
            }
        });
    }
}

/// The backward pass of one head; rows of `out` and `dout` are `heads * head_dim` apart.
struct Backward<'a> {
    attention: &'a Attention<'a>,
    head: Head<'a>,
    out: &'a [f32],
    dout: &'a [f32],
    lse: &'a [f32],
    dq: MatMut<'a>,
    dk: MatMut<'a>,
    dv: MatMut<'a>,
}

impl Backward<'_> {
    /// `Σ out · dout` of row `i`: what the softmax's normalisation takes from every gradient.
    #[inline(always)]
    fn delta(&self, i: usize) -> f32 {
        let (inner, dim) = (self.attention.inner(), self.attention.head_dim);
        simd::dot(&self.out[i * inner..][..dim], &self.dout[i * inner..][..dim])
    }

    /// Turns visible scores of row `i`, of the keys from `first` on, into dropped-out weights, and gradients of those
    /// into gradients of the scores.
    #[inline(always)]
    fn softmax(&self, i: usize, first: usize, delta: f32, p: &mut [f32], dp: &mut [f32]) {
        let (attention, head, lse) = (self.attention, &self.head, self.lse[i]);
        if lse == f32::INFINITY {
            p.fill(1.0 / attention.visible(i) as f32);
            dp.fill(0.0);
            return attention.drop_out(head, i, first, p);
        }
        hide(head.mask.map(|mask| &mask[first..]), p);
        attention.drop_out(head, i, first, dp);
        for (p, dp) in p.iter_mut().zip(dp.iter_mut()) {
            *p = simd::exp_weight(*p - lse);
            *dp = *p * (*dp - delta);
        }
        attention.drop_out(head, i, first, p);
    }
}

/// No weight for the keys that the mask takes out.
#[inline(always)]
fn hide(mask: Option<&[u8]>, row: &mut [f32]) {
    if let Some(mask) = mask {
        for (s, m) in row.iter_mut().zip(mask) {
            *s = if *m == 0 { f32::NEG_INFINITY } else { *s };
        }
    }
}

/// Attention of one query per sequence over cached keys and values, for decoding.
///
/// # Shapes
/// - `q`, `out`: `(B, H d)`; `keys`, `values`: `B` of `(T, H d)`, the query's own position last
pub fn step(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], heads: usize, head_dim: usize, out: &mut [f32]) {
    let inner = heads * head_dim;
    let positions = keys[0].len() / inner;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let out = Shared::new(out);
    for_rows(keys.len() * heads, positions * head_dim / 2, |range| {
        let mut weights = Buffer::take(heads.min(range.len()) * positions);
        let mut first = range.start;
        while first < range.end {
            // The heads of one sequence together, since they lie side by side in its caches.
            let sequence = first / heads;
            let count = range.end.min((sequence + 1) * heads) - first;
            let at = first * head_dim..(first + count) * head_dim;
            // SAFETY: every head writes its own columns.
            let (q, out) = (&q[at.clone()], unsafe { out.slice(at) });
            let column = first % heads * head_dim;
            let (keys, values) = (&keys[sequence][column..], &values[sequence][column..]);
            let weights = &mut weights[..count * positions];
            vectorize(
                #[inline(always)]
                || {
                    for t in 0..positions {
                        prefetch(keys, (t + AHEAD) * inner, q.len(), Cache::First);
                        let rows = q.chunks_exact(head_dim).zip(keys[t * inner..].chunks_exact(head_dim));
                        for (h, (q, key)) in rows.enumerate() {
                            weights[h * positions + t] = scale * simd::dot(q, key);
                        }
                    }
                    for weights in weights.chunks_exact_mut(positions) {
                        let max = simd::max(weights);
                        let sum = simd::exp_weights(weights, max);
                        simd::scale(1.0 / sum, weights);
                    }
                    out.fill(0.0);
                    for t in 0..positions {
                        prefetch(values, (t + AHEAD) * inner, q.len(), Cache::First);
                        let rows = out.chunks_exact_mut(head_dim).zip(values[t * inner..].chunks_exact(head_dim));
                        for (h, (out, value)) in rows.enumerate() {
                            simd::axpy(weights[h * positions + t], value, out);
                        }
                    }
                },
            );
            first += count;
        }
    });
}

/// Asks for the `len` floats at `first`.
#[inline(always)]
fn prefetch(data: &[f32], first: usize, len: usize, cache: Cache) {
    for i in (0..len).step_by(16) {
        simd::prefetch(data, first + i, cache);
    }
}
