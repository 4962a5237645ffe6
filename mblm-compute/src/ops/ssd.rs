//! The state space dual of Mamba-2 (Dao & Gu 2024, §6 and listing 1) with one group of B and C, as matrix products
//! over chunks of positions.
//!
//! With `δ = softplus(dt + dt_bias)`, `a = -exp(a_log)` per head and `s_i = Σ_{k≤i} δ_k a` within a chunk:
//! `y_i = Σ_{j≤i} (C_i·B_j) e^{s_i - s_j} δ_j x_j + e^{s_i} C_i S + D x_i`, where S is the state at the chunk's start,
//! which becomes `e^{s_Q} S + Σ_j e^{s_Q - s_j} δ_j B_j x_jᵀ` at its end.

use std::ops::Range;

use super::tasks::{Task, Tasks};
use crate::buffer::Buffer;
use crate::gemm::{Mat, MatMut, Update, matmul};
use crate::parallel::{MIN_PARALLEL, Shared, Threads, for_rows};
use crate::rows::{Rows, RowsMut};
use crate::simd::{self, exp_decay, softplus, vectorize};

mod backward;
mod composed;
pub use backward::{Grads, ParamGrads};
pub use composed::{ssd_composed, ssd_from};

/// Positions of a chunk, Q.
pub const CHUNK: usize = 64;

/// The inputs over `(B, S)` positions.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `(B * S, H P)`
    pub x: Rows<'a>,
    /// `(B * S, H)`, before bias and softplus.
    pub dt: Rows<'a>,
    /// `(B * S, N)`
    pub b: Rows<'a>,
    /// `(B * S, N)`
    pub c: Rows<'a>,
}

/// The parameters, one number per head each.
#[derive(Clone, Copy)]
pub struct Ssd<'a> {
    /// `(H)`
    pub a_log: &'a [f32],
    /// `(H)`
    pub d: &'a [f32],
    /// `(H)`
    pub dt_bias: &'a [f32],
}

/// What forward keeps for the backward pass.
pub struct Tape {
    /// `(B S, H)`: step sizes.
    delta: Buffer,
    logs: LogDecays,
    /// `C Bᵀ` of every chunk; a chunk whose first row is r starts at `r * CHUNK`.
    cb: Buffer,
    /// The state at the start of every chunk, `(B, chunks, parts of the heads, N, columns of the part)`.
    states: Buffer,
    /// The parts of the heads that forward ran, and backward must run too.
    tasks: Tasks,
}

/// `s_i`, the sums of `δ a` from the chunk's start, `(B S, H)`. Each is kept in two parts: among large sums the difference
/// of two neighbours has few bits left in `f32`.
struct LogDecays {
    high: Buffer,
    low: Buffer,
}

impl LogDecays {
    /// `e^{s_i}`, where `i` counts rows and heads.
    #[inline(always)]
    fn since_start(&self, i: usize) -> f32 {
        exp_decay(self.high[i])
    }

    /// `e^{s_i - s_j}`, where both count rows and heads and `j` is not behind `i`.
    #[inline(always)]
    fn between(&self, j: usize, i: usize) -> f32 {
        decay([self.high[i], self.low[i]], [self.high[j], self.low[j]])
    }
}

/// `e^{s_i - s_j}` from the two parts of each.
#[inline(always)]
fn decay(s_i: [f32; 2], s_j: [f32; 2]) -> f32 {
    exp_decay((s_i[0] - s_j[0]) + (s_i[1] - s_j[1]))
}

/// The sizes that follow from inputs and parameters.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    seq: usize,
    heads: usize,
    headdim: usize,
    d_state: usize,
    /// Whether sequences begin with a state, and leave one at their end.
    carries: bool,
}

impl Sizes {
    fn inner(&self) -> usize {
        self.heads * self.headdim
    }

    fn chunks(&self) -> usize {
        self.seq.div_ceil(CHUNK)
    }

    /// The states of a sequence: at the start of each chunk, and at the end if it is carried on.
    fn states(&self) -> usize {
        self.chunks() + usize::from(self.carries)
    }

    /// The rows of a chunk, counted over all sequences.
    fn rows(&self, sequence: usize, chunk: usize) -> Range<usize> {
        sequence * self.seq + chunk * CHUNK..sequence * self.seq + self.seq.min((chunk + 1) * CHUNK)
    }

    /// The columns of some heads.
    fn columns(&self, heads: &Range<usize>) -> Range<usize> {
        heads.start * self.headdim..heads.end * self.headdim
    }

    /// Where the state `(N, columns)` of a part of the heads at a chunk's start lies; that behind the last chunk, if it is
    /// carried on.
    fn state(&self, sequence: usize, chunk: usize, heads: &Range<usize>) -> Range<usize> {
        let (index, columns) = (sequence * self.states() + chunk, self.columns(heads));
        let start = index * self.d_state * self.inner();
        start + columns.start * self.d_state..start + columns.end * self.d_state
    }

    /// Floats of `C Bᵀ` over all chunks.
    fn cb_len(&self) -> usize {
        self.batch * self.seq * CHUNK.min(self.seq)
    }

    /// Where the `q x q` matrix `C Bᵀ` of a chunk lies.
    fn cb(&self, rows: &Range<usize>) -> Range<usize> {
        let start = rows.start * CHUNK.min(self.seq);
        start..start + rows.len() * rows.len()
    }
}

impl Ssd<'_> {
    fn sizes(&self, inputs: &Inputs, seq: usize) -> Sizes {
        let heads = self.d.len();
        let (batch, headdim) = (inputs.x.rows() / seq, inputs.x.width() / heads);
        Sizes { batch, seq, heads, headdim, d_state: inputs.b.width(), carries: false }
    }

    /// Step sizes, and their sums times `a` from the start of each chunk.
    fn steps(&self, inputs: &Inputs, sizes: Sizes) -> (Buffer, LogDecays) {
        let Sizes { seq, heads, .. } = sizes;
        let rows = inputs.dt.rows();
        let [mut delta, mut high, mut low] = [(); 3].map(|()| Buffer::take(rows * heads));
        vectorize(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let starts = (row % seq) % CHUNK == 0;
                    let dts = inputs.dt.row(row).iter().zip(self.dt_bias).zip(self.a_log);
                    for (i, ((dt, bias), a_log)) in (row * heads..).zip(dts) {
                        delta[i] = softplus(dt + bias);
                        let before = if starts { 0.0 } else { high[i - heads] as f64 + low[i - heads] as f64 };
                        let sum = before - delta[i] as f64 * simd::exp(*a_log) as f64;
                        high[i] = sum as f32;
                        low[i] = (sum - high[i] as f64) as f32;
                    }
                }
            },
        );
        (delta, LogDecays { high, low })
    }

    /// `C Bᵀ` of every chunk, which all heads share.
    fn products(inputs: &Inputs, sizes: Sizes) -> Buffer {
        let mut cb = Buffer::take(sizes.cb_len());
        let shared = Shared::new(&mut cb);
        for_rows(sizes.batch * sizes.chunks(), CHUNK.min(sizes.seq) * sizes.d_state, |range| {
            for i in range {
                let rows = sizes.rows(i / sizes.chunks(), i % sizes.chunks());
                // SAFETY: every chunk has a place of its own.
                let cb = unsafe { shared.slice(sizes.cb(&rows)) };
                let (q, n) = (rows.len(), sizes.d_state);
                let (b, c) = (inputs.b.mat(rows.clone(), 0..n), inputs.c.mat(rows, 0..n));
                matmul(MatMut::new(cb, q, q), Update::Set, c, b.t(), Threads::One);
            }
        });
        cb
    }

    /// Runs whole sequences from zero states.
    ///
    /// # Shapes
    /// - `y`: `(B, S, H P)`, overwritten
    pub fn forward(&self, inputs: &Inputs, seq: usize, y: &mut [f32]) -> Tape {
        self.run(inputs, self.sizes(inputs, seq), None, y)
    }

    /// Advances by `seq` positions, as [`step`](Self::step) does by one.
    ///
    /// # Shapes
    /// - `inputs`: of `B S` rows; `state`: `(B, H P, N)`, zeros at first; `y`: `(B, S, H P)`, overwritten
    pub fn advance(&self, inputs: &Inputs, seq: usize, state: &mut [f32], y: &mut [f32]) {
        let sizes = Sizes { carries: true, ..self.sizes(inputs, seq) };
        self.run(inputs, sizes, Some(Shared::new(state)), y);
    }

    /// Runs sequences from zero states, or from those in `carried`, which become those at the ends.
    fn run(&self, inputs: &Inputs, sizes: Sizes, carried: Option<Shared>, y: &mut [f32]) -> Tape {
        let seq = sizes.seq;
        let (delta, logs) = self.steps(inputs, sizes);
        let cb = Self::products(inputs, sizes);
        // A sequence of one chunk starts from zeros, and its last state is nobody's start.
        let kept = if sizes.states() > 1 { sizes.batch * sizes.states() * sizes.d_state * sizes.inner() } else { 0 };
        let mut states = Buffer::take(kept);
        let pass = Forward {
            inputs,
            sizes,
            d: self.d,
            delta: &delta,
            logs: &logs,
            cb: &cb,
            states: Shared::new(&mut states),
            y: RowsMut::new(y, sizes.inner()),
        };
        let tasks = Tasks::new(sizes.batch, sizes.heads, seq * sizes.headdim * 16);
        tasks.run(|Task { sequences, groups: heads, .. }| {
            let wide = CHUNK.min(seq) * sizes.columns(&heads).len();
            let (weights, wide, out) = (Buffer::take(CHUNK * CHUNK), Buffer::take(wide), Buffer::take(wide));
            let mut scratch = Scratch { weights, wide, out };
            for sequence in sequences {
                if let Some(carried) = carried {
                    pass.carry(sequence, &heads, 0, carried, |state, carried| *state = *carried);
                }
                for chunk in 0..sizes.chunks() {
                    pass.chunk(sequence, chunk, &heads, &mut scratch);
                }
                if let Some(carried) = carried {
                    pass.carry(sequence, &heads, sizes.chunks(), carried, |state, carried| *carried = *state);
                }
            }
        });
        Tape { delta, logs, cb, states, tasks }
    }

    /// Advances by one position.
    ///
    /// # Shapes
    /// - `inputs`: of `B` rows; `state`: `(B, H P, N)`, zeros at first; `y`: `(B, H P)`, overwritten
    pub fn step(&self, inputs: &Inputs, state: &mut [f32], y: &mut [f32]) {
        let Sizes { batch, heads, headdim, d_state, .. } = self.sizes(inputs, 1);
        let (state, y) = (Shared::new(state), Shared::new(y));
        let per_head = headdim * d_state;
        // A thread is worth waking for about 64 K states.
        for_rows(batch * heads, (per_head * MIN_PARALLEL).div_ceil(64 * 1024), |range| {
            vectorize(
                #[inline(always)]
                || {
                    for i in range {
                        let (row, head) = (i / heads, i % heads);
                        // SAFETY: a head of a sequence is in one range only.
                        let h = unsafe { state.slice(i * per_head..(i + 1) * per_head) };
                        // SAFETY: as above.
                        let y = unsafe { y.slice(i * headdim..(i + 1) * headdim) };
                        let delta = softplus(inputs.dt.row(row)[head] + self.dt_bias[head]);
                        let decay = exp_decay(-delta * simd::exp(self.a_log[head]));
                        let x = &inputs.x.row(row)[head * headdim..(head + 1) * headdim];
                        let (b, c) = (inputs.b.row(row), inputs.c.row(row));
                        for ((h, x), y) in h.chunks_exact_mut(d_state).zip(x).zip(y) {
                            let input = delta * x;
                            h.iter_mut().zip(b).for_each(|(h, b)| *h = decay.mul_add(*h, input * b));
                            *y = simd::dot(h, c) + self.d[head] * x;
                        }
                    }
                },
            );
        });
    }
}

/// Everything a forward task reads, and the shared views of what it writes.
struct Forward<'a> {
    inputs: &'a Inputs<'a>,
    sizes: Sizes,
    d: &'a [f32],
    delta: &'a [f32],
    logs: &'a LogDecays,
    cb: &'a [f32],
    states: Shared<'a>,
    y: RowsMut<'a>,
}

/// A task's own memory.
struct Scratch {
    /// `(Q, Q)`
    weights: Buffer,
    /// `(Q, columns)`
    wide: Buffer,
    /// `(Q, columns)`
    out: Buffer,
}

impl Forward<'_> {
    /// Copies between the state `(N, columns)` of some heads at a chunk's start and that in `carried`, `(B, H P, N)`.
    fn carry(
        &self,
        sequence: usize,
        heads: &Range<usize>,
        chunk: usize,
        carried: Shared,
        copy: impl Fn(&mut f32, &mut f32),
    ) {
        let (n, columns) = (self.sizes.d_state, self.sizes.columns(heads));
        let first = (sequence * self.sizes.inner() + columns.start) * n;
        // SAFETY: the states of these heads of this sequence are this task's alone, and taken once at a time.
        let (state, carried) = unsafe {
            (
                self.states.slice(self.sizes.state(sequence, chunk, heads)),
                carried.slice(first..first + columns.len() * n),
            )
        };
        for (column, carried) in carried.chunks_exact_mut(n).enumerate() {
            let state = state[column..].iter_mut().step_by(columns.len());
            state.zip(carried).for_each(|(state, carried)| copy(state, carried));
        }
    }

    /// One chunk of a sequence, for some heads.
    fn chunk(&self, sequence: usize, chunk: usize, heads: &Range<usize>, scratch: &mut Scratch) {
        let sizes = self.sizes;
        let (rows, columns) = (sizes.rows(sequence, chunk), sizes.columns(heads));
        let (q, n, width) = (rows.len(), sizes.d_state, columns.len());
        let Scratch { weights, wide, out } = scratch;
        let (weights, wide, out) = (&mut weights[..q * q], &mut wide[..q * width], &mut out[..q * width]);
        for head in heads.clone() {
            let steps = Steps::gather(self.delta, self.logs, sizes.heads, &rows, head);
            vectorize(
                #[inline(always)]
                || steps.weights(&self.cb[sizes.cb(&rows)], weights),
            );
            let x = self.inputs.x.mat(rows.clone(), sizes.columns(&(head..head + 1)));
            let out = &mut out[(head - heads.start) * sizes.headdim..];
            let out = MatMut::strided(out, q, sizes.headdim, width);
            matmul(out, Update::Set, Mat::new(weights, q, q), x, Threads::One);
        }
        let state = |chunk: usize| {
            // SAFETY: the state of these heads of this sequence is this task's alone, and taken once at a time.
            unsafe { self.states.slice(sizes.state(sequence, chunk, heads)) }
        };
        let starts_at_zero = chunk == 0 && !sizes.carries;
        if !starts_at_zero {
            let c = self.inputs.c.mat(rows.clone(), 0..n);
            matmul(MatMut::new(wide, q, width), Update::Set, c, Mat::new(state(chunk), n, width), Threads::One);
        }
        vectorize(
            #[inline(always)]
            || self.finish(&rows, heads, (!starts_at_zero).then_some(&*wide), out),
        );
        if chunk + 1 < sizes.states() {
            let next = state(chunk + 1);
            match starts_at_zero {
                true => next.fill(0.0),
                false => next.copy_from_slice(state(chunk)),
            }
            vectorize(
                #[inline(always)]
                || self.weigh_inputs(&rows, heads, next, wide),
            );
            let b = self.inputs.b.mat(rows, 0..n);
            matmul(MatMut::new(next, n, width), Update::Add, b.t(), Mat::new(wide, q, width), Threads::One);
        }
    }

    /// Writes `out + e^{s_i} (C S) + D x` to the output.
    #[inline(always)]
    fn finish(&self, rows: &Range<usize>, heads: &Range<usize>, from_state: Option<&[f32]>, out: &[f32]) {
        let (p, width) = (self.sizes.headdim, self.sizes.columns(heads).len());
        for (i, row) in rows.clone().enumerate() {
            for head in heads.clone() {
                let here = i * width + (head - heads.start) * p..i * width + (head - heads.start + 1) * p;
                // SAFETY: a head of a sequence is one task's.
                let y = unsafe { self.y.row(row, head * p..(head + 1) * p) };
                y.copy_from_slice(&out[here.clone()]);
                if let Some(from_state) = from_state {
                    simd::axpy(self.logs.since_start(row * self.sizes.heads + head), &from_state[here], y);
                }
                simd::axpy(self.d[head], &self.inputs.x.row(row)[head * p..(head + 1) * p], y);
            }
        }
    }

    /// Decays `state` over the chunk and writes `e^{s_Q - s_j} δ_j x_j` to `wide`.
    #[inline(always)]
    fn weigh_inputs(&self, rows: &Range<usize>, heads: &Range<usize>, state: &mut [f32], wide: &mut [f32]) {
        let (p, width, all) = (self.sizes.headdim, self.sizes.columns(heads).len(), self.sizes.heads);
        let last = (rows.end - 1) * all;
        for state in state.chunks_exact_mut(width) {
            for (head, state) in heads.clone().zip(state.chunks_exact_mut(p)) {
                simd::scale(self.logs.since_start(last + head), state);
            }
        }
        for (row, wide) in rows.clone().zip(wide.chunks_exact_mut(width)) {
            for (head, wide) in heads.clone().zip(wide.chunks_exact_mut(p)) {
                let here = row * all + head;
                let weight = self.logs.between(here, last + head) * self.delta[here];
                let x = &self.inputs.x.row(row)[head * p..(head + 1) * p];
                wide.iter_mut().zip(x).for_each(|(w, x)| *w = weight * x);
            }
        }
    }
}

/// Step sizes and log decays over a chunk, of one head.
struct Steps {
    len: usize,
    delta: [f32; CHUNK],
    high: [f32; CHUNK],
    low: [f32; CHUNK],
}

impl Steps {
    fn gather(delta: &[f32], logs: &LogDecays, heads: usize, rows: &Range<usize>, head: usize) -> Self {
        let mut steps = Steps { len: rows.len(), delta: [0.0; CHUNK], high: [0.0; CHUNK], low: [0.0; CHUNK] };
        for (i, row) in rows.clone().enumerate() {
            let here = row * heads + head;
            (steps.delta[i], steps.high[i], steps.low[i]) = (delta[here], logs.high[here], logs.low[here]);
        }
        steps
    }

    /// `(C_i·B_j) e^{s_i - s_j} δ_j` for j <= i, else 0.
    #[inline(always)]
    fn weights(&self, cb: &[f32], weights: &mut [f32]) {
        let q = self.len;
        for (i, (weights, cb)) in weights.chunks_exact_mut(q).zip(cb.chunks_exact(q)).enumerate() {
            self.decays_of(i, weights);
            for ((w, cb), delta) in weights[..=i].iter_mut().zip(cb).zip(&self.delta) {
                *w *= cb * delta;
            }
        }
    }

    /// `e^{s_i - s_j}` for j <= i, else 0.
    #[inline(always)]
    fn decays(&self, decays: &mut [f32]) {
        for (i, decays) in decays.chunks_exact_mut(self.len).enumerate() {
            self.decays_of(i, decays);
        }
    }

    /// A row of [`decays`](Self::decays).
    #[inline(always)]
    fn decays_of(&self, i: usize, decays: &mut [f32]) {
        let (seen, unseen) = decays.split_at_mut(i + 1);
        for ((d, high), low) in seen.iter_mut().zip(&self.high).zip(&self.low) {
            *d = decay([self.high[i], self.low[i]], [*high, *low]);
        }
        unseen.fill(0.0);
    }
}

#[cfg(test)]
mod tests;
