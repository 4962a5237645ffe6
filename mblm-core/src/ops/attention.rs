//! Softmax attention over packed queries, keys and values (Vaswani et al. 2017, eq. 1), in tiles of query rows with a
//! causal skip; scores are recomputed in backward (Dao et al. 2022). Short sequences take plain loops, long ones GEMMs.

use candle_core::{D, Tensor};

use crate::block::Dropout;
use crate::buffer::Buffer;
use crate::error::Result;
use crate::gemm::{Mat, MatMut, Threads, matmul};
use crate::parallel::{Shared, for_rows};
use crate::simd::{self, vectorize};

/// Query rows of a tile.
const TILE: usize = 64;

/// Up to this many keys the products are plain loops.
const SHORT: usize = 24;

/// Softmax over the last dimension; every operation has a backward.
pub fn softmax_composed(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let exp = shifted.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

/// The definition.
///
/// # Shapes
/// - `q`, `k`, `v`: `(B, H, S, d)`; `mask`: `(B, S)`, nonzero = attend; returns `(B, H, S, d)`
pub fn attention_composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    causal: bool,
    mask: Option<&Tensor>,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let (_, _, seq, head_dim) = q.dims4()?;
    let scores = (q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)? * (head_dim as f64).powf(-0.5))?;
    // A large negative number rather than -inf: a row without any key to attend to becomes uniform, as in the package.
    let hidden = Tensor::new(-1e30f32, q.device())?.to_dtype(q.dtype())?.broadcast_as(scores.shape())?;
    let mut scores = scores;
    if let Some(mask) = mask {
        let mask = mask.unsqueeze(1)?.unsqueeze(1)?.broadcast_as(scores.shape())?;
        scores = mask.where_cond(&scores, &hidden)?;
    }
    if causal {
        let past: Vec<u8> = (0..seq * seq).map(|i| (i % seq <= i / seq) as u8).collect();
        let past = Tensor::from_vec(past, (seq, seq), q.device())?.broadcast_as(scores.shape())?;
        scores = past.where_cond(&scores, &hidden)?;
    }
    let weights = super::dropout::dropout_composed(&softmax_composed(&scores)?, dropout)?;
    Ok(weights.matmul(&v.contiguous()?)?)
}

/// The kernel's constants. Rows of `qkv` are `[q | k | v]`, each `heads * head_dim` wide.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
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
        (self.head_dim as f32).powf(-0.5)
    }

    fn head<'b>(&'b self, qkv: &'b [f32], index: usize) -> Head<'b> {
        let (b, h) = (index / self.heads, index % self.heads);
        let inner = self.inner();
        let rows = &qkv[b * self.seq * 3 * inner..(b + 1) * self.seq * 3 * inner];
        let part = |p: usize| &rows[p * inner + h * self.head_dim..];
        let mask = self.mask.map(|m| &m[b * self.seq..(b + 1) * self.seq]);
        Head { q: part(0), k: part(1), v: part(2), mask, index }
    }

    /// The query tiles of a sequence, each with the number of keys it can see.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (seq, causal) = (self.seq, self.causal);
        (0..seq).step_by(TILE).map(move |start| {
            let end = (start + TILE).min(seq);
            (start, end - start, if causal { end } else { seq })
        })
    }

    /// # Shapes
    /// - `qkv`: `(B, S, 3 H d)`; `out`: `(B, S, H d)`, overwritten; `lse`: `(B, H, S)`, overwritten with the logarithm
    ///   of each row's sum of exponentials (infinite where a row attends to nothing)
    pub fn forward(&self, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
        let (seq, inner) = (self.seq, self.inner());
        let (out, lse) = (Shared::new(out), Shared::new(lse));
        for_rows(self.batch * self.heads, seq * self.head_dim * 8, |heads| {
            let mut scores = Buffer::take(TILE.min(seq) * seq);
            for index in heads {
                let head = self.head(qkv, index);
                // SAFETY: every head has its own `lse` row.
                let lse = unsafe { lse.slice(index * seq..(index + 1) * seq) };
                let first = (index / self.heads) * seq * inner + (index % self.heads) * self.head_dim;
                vectorize(
                    #[inline(always)]
                    || {
                        for (start, rows, keys) in self.tiles() {
                            let scores = &mut scores[..rows * keys];
                            self.scores(&head, start, keys, scores);
                            self.softmax(&head, start, keys, scores, &mut lse[start..start + rows]);
                            // SAFETY: the columns of this head in rows of this sequence belong to this task alone.
                            let out = unsafe { out.matrix(first + start * inner, rows, self.head_dim, inner) };
                            product_nn(out, scores, keys, head.v, 3 * inner, self.head_dim);
                        }
                    },
                );
            }
        });
    }

    #[inline(always)]
    fn scores(&self, head: &Head, start: usize, keys: usize, scores: &mut [f32]) {
        let stride = 3 * self.inner();
        let q = &head.q[start * stride..];
        product_nt(scores, keys, self.scale(), q, stride, head.k, stride, self.head_dim);
    }

    /// Which keys row `i` may see.
    #[inline(always)]
    fn hide(&self, head: &Head, i: usize, row: &mut [f32]) {
        if self.causal {
            row[i + 1..].fill(f32::NEG_INFINITY);
        }
        if let Some(mask) = head.mask {
            for (s, m) in row.iter_mut().zip(mask) {
                *s = if *m == 0 { f32::NEG_INFINITY } else { *s };
            }
        }
    }

    #[inline(always)]
    fn softmax(&self, head: &Head, start: usize, keys: usize, scores: &mut [f32], lse: &mut [f32]) {
        for (r, (row, lse)) in scores.chunks_exact_mut(keys).zip(lse).enumerate() {
            self.hide(head, start + r, row);
            let max = row.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
            if max == f32::NEG_INFINITY {
                row.fill(1.0 / keys as f32);
                *lse = f32::INFINITY;
            } else {
                for s in row.iter_mut() {
                    *s = simd::exp(*s - max);
                }
                let sum = simd::sum(row);
                simd::scale(1.0 / sum, row);
                *lse = max + sum.ln();
            }
            self.drop_out(head, start + r, row);
        }
    }

    #[inline(always)]
    fn drop_out(&self, head: &Head, i: usize, row: &mut [f32]) {
        if let Some(dropout) = self.dropout {
            let first = (head.index * self.seq + i) * self.seq;
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
        let dqkv = Shared::new(dqkv);
        for_rows(self.batch * self.heads, self.seq * self.head_dim * 16, |heads| {
            let size = TILE.min(self.seq) * self.seq;
            let mut scratch = Scratch { p: Buffer::take(size), dp: Buffer::take(size) };
            for index in heads {
                vectorize(
                    #[inline(always)]
                    || self.backward_head(index, qkv, out, lse, dout, dqkv, &mut scratch),
                );
            }
        });
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn backward_head(
        &self,
        index: usize,
        qkv: &[f32],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        dqkv: Shared,
        scratch: &mut Scratch,
    ) {
        let (seq, inner, dim) = (self.seq, self.inner(), self.head_dim);
        let stride = 3 * inner;
        let head = self.head(qkv, index);
        let first = (index / self.heads) * seq * inner + (index % self.heads) * dim;
        let (out, dout) = (&out[first..], &dout[first..]);
        let grads = |part: usize| {
            let first = (index / self.heads) * seq * stride + part * inner + (index % self.heads) * dim;
            // SAFETY: the columns of this part and head in rows of this sequence belong to this view alone.
            unsafe { dqkv.matrix(first, seq, dim, stride) }
        };
        let (mut dq, mut dk, mut dv) = (grads(0), grads(1), grads(2));
        for row in 0..seq {
            dk.row(row).fill(0.0);
            dv.row(row).fill(0.0);
        }
        for (start, rows, keys) in self.tiles() {
            let (p, dp) = (&mut scratch.p[..rows * keys], &mut scratch.dp[..rows * keys]);
            let (out, dout) = (&out[start * inner..], &dout[start * inner..]);
            self.scores(&head, start, keys, p);
            product_nt(dp, keys, 1.0, dout, inner, head.v, stride, dim);
            for r in 0..rows {
                let (p, dp) = (&mut p[r * keys..][..keys], &mut dp[r * keys..][..keys]);
                let delta = simd::dot(&out[r * inner..][..dim], &dout[r * inner..][..dim]);
                self.backward_row(&head, start + r, lse[index * seq + start + r], delta, p, dp);
            }
            product_tn(dv.rows(0, keys), p, dout, inner, dim, rows);
            product_tn(dk.rows(0, keys), dp, &head.q[start * stride..], stride, dim, rows);
            product_nn(dq.rows(start, rows), dp, keys, head.k, stride, dim);
        }
    }

    /// Turns scores into dropped-out weights, and gradients of those into gradients of the scores.
    #[inline(always)]
    fn backward_row(&self, head: &Head, i: usize, lse: f32, delta: f32, p: &mut [f32], dp: &mut [f32]) {
        if lse == f32::INFINITY {
            p.fill(1.0 / p.len() as f32);
            dp.fill(0.0);
            return self.drop_out(head, i, p);
        }
        self.hide(head, i, p);
        self.drop_out(head, i, dp);
        let scale = self.scale();
        for (p, dp) in p.iter_mut().zip(dp.iter_mut()) {
            *p = simd::exp(*p - lse);
            *dp = *p * (*dp - delta) * scale;
        }
        self.drop_out(head, i, p);
    }
}

struct Scratch {
    p: Buffer,
    dp: Buffer,
}

/// `out (M x N) = scale * a bᵀ`; rows of `a` and `b` are `dim` long.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn product_nt(out: &mut [f32], n: usize, scale: f32, a: &[f32], a_step: usize, b: &[f32], b_step: usize, dim: usize) {
    let m = out.len() / n;
    if n > SHORT {
        let (a, b) = (Mat::strided(a, m, dim, a_step), Mat::strided(b, n, dim, b_step));
        return matmul(MatMut::new(out, m, n), false, scale, a, b.t(), Threads::One);
    }
    for (i, row) in out.chunks_exact_mut(n).enumerate() {
        let a = &a[i * a_step..][..dim];
        for (j, out) in row.iter_mut().enumerate() {
            *out = scale * simd::dot(a, &b[j * b_step..][..dim]);
        }
    }
}

/// `out (M x dim) = a b`; `a` is `M x N`.
#[inline(always)]
fn product_nn(mut out: MatMut, a: &[f32], n: usize, b: &[f32], b_step: usize, dim: usize) {
    if n > SHORT {
        let (a, b) = (Mat::new(a, a.len() / n, n), Mat::strided(b, n, dim, b_step));
        return matmul(out, false, 1.0, a, b, Threads::One);
    }
    for (i, a) in a.chunks_exact(n).enumerate() {
        let row = out.row(i);
        row.fill(0.0);
        for (j, a) in a.iter().enumerate() {
            simd::axpy(*a, &b[j * b_step..][..dim], row);
        }
    }
}

/// `out (N x dim) += aᵀ b`; `a` is `rows x N`.
#[inline(always)]
fn product_tn(mut out: MatMut, a: &[f32], b: &[f32], b_step: usize, dim: usize, rows: usize) {
    let n = a.len() / rows;
    if n > SHORT {
        let (a, b) = (Mat::new(a, rows, n), Mat::strided(b, rows, dim, b_step));
        return matmul(out, true, 1.0, a.t(), b, Threads::One);
    }
    for (i, a) in a.chunks_exact(n).enumerate() {
        let b = &b[i * b_step..][..dim];
        for (j, a) in a.iter().enumerate() {
            simd::axpy(*a, b, out.row(j));
        }
    }
}

/// Attention of one query per sequence over cached keys and values, for decoding.
///
/// # Shapes
/// - `q`, `out`: `(B, H d)`; `keys`, `values`: `(T, B, H d)`, the query's own position last
pub fn step(q: &[f32], keys: &[f32], values: &[f32], heads: usize, head_dim: usize, out: &mut [f32]) {
    let inner = heads * head_dim;
    let (row, batch) = (q.len(), q.len() / inner);
    let positions = keys.len() / row;
    let scale = (head_dim as f32).powf(-0.5);
    let out = Shared::new(out);
    for_rows(batch * heads, positions * head_dim / 2, |range| {
        let mut weights = Buffer::take(positions);
        for index in range {
            let at = index * head_dim; // heads of a row lie one after another, rows too
            // SAFETY: every head writes its own columns.
            let out = unsafe { out.slice(at..at + head_dim) };
            vectorize(
                #[inline(always)]
                || {
                    let q = &q[at..at + head_dim];
                    let mut max = f32::NEG_INFINITY;
                    for (t, weight) in weights.iter_mut().enumerate() {
                        *weight = scale * simd::dot(q, &keys[t * row + at..][..head_dim]);
                        max = max.max(*weight);
                    }
                    for w in weights.iter_mut() {
                        *w = simd::exp(*w - max);
                    }
                    let inverse = 1.0 / simd::sum(&weights);
                    out.fill(0.0);
                    for (t, weight) in weights.iter().enumerate() {
                        simd::axpy(weight * inverse, &values[t * row + at..][..head_dim], out);
                    }
                },
            );
        }
    });
}
