//! The backward pass of the state space dual, chunk by chunk from the end of each sequence.
//!
//! With `G = dY Xᵀ`, `L_ij = e^{s_i - s_j}` for j <= i, S the state at the chunk's start and dS' the gradient of the one
//! at its end: `u_j = Σ_i (C_i·B_j) L_ij dy_i + e^{s_Q - s_j} B_j dS'` gives `dx_j = δ_j u_j + D dy_j` and the direct
//! part of `dδ_j`, `x_j·u_j`; `d(C Bᵀ) = Σ_heads G ∘ L δ`; `dS = e^{s_Q} dS' + Cᵀ (e^{s} dY)`.
//!
//! The gradient of `s_i` needs no further product: what it scales up is `dy_i·y_i` (without D x), what it scales down is
//! `δ_i x_i·u_i`, and `s_Q` scales the whole state at the chunk's end.

use super::*;
use crate::simd::sigmoid;

/// Where the gradients of the inputs are written.
#[derive(Clone, Copy)]
pub struct Grads<'a> {
    /// `(B * S, H P)`
    pub x: RowsMut<'a>,
    /// `(B * S, H)`
    pub dt: RowsMut<'a>,
    /// `(B * S, N)`
    pub b: RowsMut<'a>,
    /// `(B * S, N)`
    pub c: RowsMut<'a>,
}

/// The gradients of the parameters, `(H)` each, which are added to.
pub struct ParamGrads<'a> {
    /// Of `a_log`.
    pub a_log: &'a mut [f32],
    /// Of D.
    pub d: &'a mut [f32],
    /// Of the bias.
    pub dt_bias: &'a mut [f32],
}

/// Everything a backward task reads, and the shared views of what it writes.
struct Backward<'a> {
    ssd: Ssd<'a>,
    inputs: &'a Inputs<'a>,
    sizes: Sizes,
    tape: &'a Tape,
    y: &'a [f32],
    dy: &'a [f32],
    grads: Grads<'a>,
    /// `(parts of the heads, B * S, 2 N)`: the part of dB and dC that goes through states.
    dbc: Shared<'a>,
    /// `(parts of the heads, …)`: gradients of `C Bᵀ`, laid out as in the tape.
    dcb: Shared<'a>,
}

/// A task's own memory.
struct Scratch {
    /// `(Q, Q)`: decays.
    decays: Buffer,
    /// `(Q, Q)`
    square: Buffer,
    /// `(Q, columns)`: u.
    u: Buffer,
    /// `(Q, columns)`
    wide: Buffer,
    /// `(Q, N)`
    narrow: Buffer,
    /// `(N, columns)`: the gradient of the state at the end of the chunk at hand.
    dstate: Buffer,
}

impl Ssd<'_> {
    /// Writes the gradients of the inputs and adds those of the parameters, from forward's output `y`, the gradient
    /// `dy` of `y + D x`, and the tape.
    pub fn backward(
        &self,
        inputs: &Inputs,
        seq: usize,
        tape: &Tape,
        [y, dy]: [&[f32]; 2],
        grads: Grads,
        params: &mut ParamGrads,
    ) {
        let sizes = self.sizes(inputs, seq);
        let (rows, parts, per_part) = (inputs.x.rows(), tape.tasks.by_group, 3 * sizes.heads);
        let mut dbc = Buffer::take(parts * rows * 2 * sizes.d_state);
        let mut dcb = Buffer::zeros(parts * sizes.cb_len());
        let mut sums = Buffer::zeros(tape.tasks.by_sequence * per_part);
        let shared_sums = Shared::new(&mut sums);
        let (dbc_shared, dcb_shared) = (Shared::new(&mut dbc), Shared::new(&mut dcb));
        let pass = Backward { ssd: *self, inputs, sizes, tape, y, dy, grads, dbc: dbc_shared, dcb: dcb_shared };
        tape.tasks.run(|Task { sequences, groups: heads, sequence_part, group_part }| {
            let at = |i: usize| sequence_part * per_part + 3 * i;
            // SAFETY: no other task has these heads of this part of the sequences.
            let sums = unsafe { shared_sums.slice(at(heads.start)..at(heads.end)) };
            let mut scratch = pass.scratch(&heads);
            for sequence in sequences {
                for chunk in (0..sizes.chunks()).rev() {
                    pass.chunk(sequence, chunk, &heads, group_part, &mut scratch, sums);
                }
            }
        });
        Self::collect_inputs(inputs, sizes, parts, &dbc, &dcb, grads);
        for part in sums.chunks_exact(per_part) {
            for (head, sums) in part.chunks_exact(3).enumerate() {
                params.a_log[head] += sums[0];
                params.d[head] += sums[1];
                params.dt_bias[head] += sums[2];
            }
        }
    }

    /// Adds up the parts of dB and dC, and takes `C Bᵀ` back: `dB += dCBᵀ C`, `dC += dCB B`.
    fn collect_inputs(inputs: &Inputs, sizes: Sizes, parts: usize, dbc: &[f32], dcb: &[f32], grads: Grads) {
        let (n, all_rows) = (sizes.d_state, inputs.x.rows());
        for_rows(sizes.batch * sizes.chunks(), CHUNK.min(sizes.seq) * n, |range| {
            let longest = CHUNK.min(sizes.seq);
            let (mut square, mut both) = (Buffer::take(longest * longest), Buffer::take(longest * 2 * n));
            for i in range {
                let rows = sizes.rows(i / sizes.chunks(), i % sizes.chunks());
                let q = rows.len();
                let (square, both) = (&mut square[..q * q], &mut both[..q * 2 * n]);
                both.copy_from_slice(&dbc[rows.start * 2 * n..rows.end * 2 * n]);
                square.copy_from_slice(&dcb[sizes.cb(&rows)]);
                for part in 1..parts {
                    simd::add(&dbc[(part * all_rows + rows.start) * 2 * n..][..q * 2 * n], both);
                    simd::add(&dcb[part * sizes.cb_len()..][sizes.cb(&rows)], square);
                }
                let square = Mat::new(square, q, q);
                let (b, c) = (inputs.b.mat(rows.clone(), 0..n), inputs.c.mat(rows.clone(), 0..n));
                matmul(MatMut::strided(both, q, n, 2 * n), Into::Add, square.t(), c, Threads::One);
                matmul(MatMut::strided(&mut both[n..], q, n, 2 * n), Into::Add, square, b, Threads::One);
                for (row, both) in rows.zip(both.chunks_exact(2 * n)) {
                    // SAFETY: every chunk has rows of its own, and the two views are of different columns.
                    let (db, dc) = unsafe { (grads.b.row(row, 0..n), grads.c.row(row, 0..n)) };
                    db.copy_from_slice(&both[..n]);
                    dc.copy_from_slice(&both[n..]);
                }
            }
        });
    }
}

impl Backward<'_> {
    fn scratch(&self, heads: &Range<usize>) -> Scratch {
        let (q, width, n) = (CHUNK.min(self.sizes.seq), self.sizes.columns(heads).len(), self.sizes.d_state);
        let dstate = Buffer::take(if self.sizes.chunks() > 1 { n * width } else { 0 });
        let (decays, square, narrow) = (Buffer::take(q * q), Buffer::take(q * q), Buffer::take(q * n));
        Scratch { decays, square, u: Buffer::take(q * width), wide: Buffer::take(q * width), narrow, dstate }
    }

    /// One chunk of a sequence, for some heads. `sums`: per head the gradients of a_log, D and the bias.
    fn chunk(
        &self,
        sequence: usize,
        chunk: usize,
        heads: &Range<usize>,
        part: usize,
        scratch: &mut Scratch,
        sums: &mut [f32],
    ) {
        let (sizes, has_next) = (self.sizes, chunk + 1 < self.sizes.chunks());
        let rows = sizes.rows(sequence, chunk);
        self.within(&rows, heads, part, scratch);
        let next = has_next.then(|| &self.tape.states[sizes.state(sequence, chunk + 1, heads)]);
        if has_next {
            let (q, width) = (rows.len(), sizes.columns(heads).len());
            let (b, dstate) = (self.inputs.b.mat(rows.clone(), 0..sizes.d_state), &scratch.dstate);
            let wide = MatMut::new(&mut scratch.wide[..q * width], q, width);
            matmul(wide, Into::Set, b, Mat::new(dstate, sizes.d_state, width), Threads::One);
        }
        vectorize(
            #[inline(always)]
            || self.rows(&rows, heads, next, scratch, sums),
        );
        let state = (chunk > 0).then(|| &self.tape.states[sizes.state(sequence, chunk, heads)]);
        self.through_states(&rows, heads, part, has_next, state, scratch);
    }

    /// The products within the chunk: u without the state's part, and the gradient of `C Bᵀ`.
    fn within(&self, rows: &Range<usize>, heads: &Range<usize>, part: usize, scratch: &mut Scratch) {
        let (sizes, q, p) = (self.sizes, rows.len(), self.sizes.headdim);
        let (inner, width) = (sizes.inner(), sizes.columns(heads).len());
        let cb = &self.tape.cb[sizes.cb(rows)];
        let place = sizes.cb(rows);
        let start = part * sizes.cb_len();
        // SAFETY: no other task has this part of this chunk.
        let dcb = unsafe { self.dcb.slice(start + place.start..start + place.end) };
        let (decays, square) = (&mut scratch.decays[..q * q], &mut scratch.square[..q * q]);
        for head in heads.clone() {
            let steps = Steps::gather(&self.tape.delta, &self.tape.sums, sizes.heads, rows, head);
            vectorize(
                #[inline(always)]
                || {
                    steps.decays(decays);
                    square.iter_mut().zip(&*decays).zip(cb).for_each(|((w, decay), cb)| *w = decay * cb);
                },
            );
            let dy = Mat::strided(&self.dy[rows.start * inner + head * p..], q, p, inner);
            let u = MatMut::strided(&mut scratch.u[(head - heads.start) * p..], q, p, width);
            matmul(u, Into::Set, Mat::new(square, q, q).t(), dy, Threads::One);
            let x = self.inputs.x.mat(rows.clone(), head * p..(head + 1) * p);
            matmul(MatMut::new(square, q, q), Into::Set, dy, x.t(), Threads::One);
            vectorize(
                #[inline(always)]
                || {
                    let pairs = square.chunks_exact(q).zip(decays.chunks_exact(q));
                    for (dcb, (g, decays)) in dcb.chunks_exact_mut(q).zip(pairs) {
                        for (((dcb, g), decay), delta) in dcb.iter_mut().zip(g).zip(decays).zip(&steps.delta) {
                            *dcb = (g * decay).mul_add(*delta, *dcb);
                        }
                    }
                },
            );
        }
    }

    /// Row by row, from the last: dx, the gradients of the step sizes and of the parameters. `scratch.wide` holds
    /// `B dS'` if there is a `next` state.
    #[inline(always)]
    fn rows(
        &self,
        rows: &Range<usize>,
        heads: &Range<usize>,
        next: Option<&[f32]>,
        scratch: &mut Scratch,
        sums: &mut [f32],
    ) {
        let (sizes, p, all) = (self.sizes, self.sizes.headdim, self.sizes.heads);
        let (inner, width) = (sizes.inner(), sizes.columns(heads).len());
        for (head, sums) in heads.clone().zip(sums.chunks_exact_mut(3)) {
            let first = (head - heads.start) * p;
            let (a, d) = (-simd::exp(self.ssd.a_log[head]), self.ssd.d[head]);
            let last = self.tape.sums[(rows.end - 1) * all + head];
            let mut da = next.map_or(0.0, |next| {
                let pairs = next.chunks_exact(width).zip(scratch.dstate.chunks_exact(width));
                pairs.map(|(s, ds)| simd::dot(&s[first..first + p], &ds[first..first + p])).sum()
            });
            for (i, row) in rows.clone().enumerate().rev() {
                let (delta, s) = (self.tape.delta[row * all + head], self.tape.sums[row * all + head]);
                let here = i * width + first..i * width + first + p;
                let u = &mut scratch.u[here.clone()];
                if next.is_some() {
                    simd::axpy(exp_decay(last - s), &scratch.wide[here], u);
                }
                let columns = head * p..(head + 1) * p;
                let x = &self.inputs.x.row(row)[columns.clone()];
                let dy = &self.dy[row * inner..][columns.clone()];
                let direct = simd::dot(x, u);
                let dd = simd::dot(dy, x);
                da += simd::dot(dy, &self.y[row * inner..][columns.clone()]) - delta * direct;
                // SAFETY: a head of a sequence is one task's.
                let (dx, ddt) = unsafe { (self.grads.x.row(row, columns), self.grads.dt.row(row, head..head + 1)) };
                for ((dx, u), dy) in dx.iter_mut().zip(&*u).zip(dy) {
                    *dx = delta.mul_add(*u, d * dy);
                }
                let raw = self.inputs.dt.row(row)[head] + self.ssd.dt_bias[head];
                ddt[0] = a.mul_add(da, direct) * sigmoid(raw);
                sums[0] += a * delta * da;
                sums[1] += dd;
                sums[2] += ddt[0];
            }
        }
    }

    /// dB and dC through the states at the chunk's end and start, and the gradient of the latter.
    fn through_states(
        &self,
        rows: &Range<usize>,
        heads: &Range<usize>,
        part: usize,
        has_next: bool,
        state: Option<&[f32]>,
        scratch: &mut Scratch,
    ) {
        let (sizes, q, n) = (self.sizes, rows.len(), self.sizes.d_state);
        let width = sizes.columns(heads).len();
        let Scratch { wide, narrow, dstate, .. } = scratch;
        let (wide, narrow) = (&mut wide[..q * width], &mut narrow[..q * n]);
        let start = (part * self.inputs.x.rows() + rows.start) * 2 * n;
        // SAFETY: no other task has this part of these rows.
        let dbc = unsafe { self.dbc.slice(start..start + q * 2 * n) };
        dbc.fill(0.0);
        if has_next {
            self.weigh(
                rows,
                heads,
                wide,
                |row, head, last| exp_decay(last - self.tape.sums[row + head]) * self.tape.delta[row + head],
                |row| self.inputs.x.row(row),
            );
            matmul(
                MatMut::new(narrow, q, n),
                Into::Set,
                Mat::new(wide, q, width),
                Mat::new(dstate, n, width).t(),
                Threads::One,
            );
            dbc.chunks_exact_mut(2 * n).zip(narrow.chunks_exact(n)).for_each(|(dbc, db)| dbc[..n].copy_from_slice(db));
        }
        let Some(state) = state else { return };
        let inner = sizes.inner();
        self.weigh(
            rows,
            heads,
            wide,
            |row, head, _| exp_decay(self.tape.sums[row + head]),
            |row| &self.dy[row * inner..(row + 1) * inner],
        );
        matmul(
            MatMut::new(narrow, q, n),
            Into::Set,
            Mat::new(wide, q, width),
            Mat::new(state, n, width).t(),
            Threads::One,
        );
        dbc.chunks_exact_mut(2 * n).zip(narrow.chunks_exact(n)).for_each(|(dbc, dc)| dbc[n..].copy_from_slice(dc));
        match has_next {
            true => self.decay(rows, heads, dstate),
            false => dstate.fill(0.0),
        }
        let c = self.inputs.c.mat(rows.clone(), 0..n);
        matmul(MatMut::new(dstate, n, width), Into::Add, c.t(), Mat::new(wide, q, width), Threads::One);
    }

    /// Writes the columns of `heads` of `source`'s rows, times `weight(row * H, head, s_Q)`, to `wide`.
    fn weigh<'s>(
        &self,
        rows: &Range<usize>,
        heads: &Range<usize>,
        wide: &mut [f32],
        weight: impl Fn(usize, usize, f32) -> f32,
        source: impl Fn(usize) -> &'s [f32],
    ) {
        let (p, all, width) = (self.sizes.headdim, self.sizes.heads, self.sizes.columns(heads).len());
        vectorize(
            #[inline(always)]
            || {
                for (row, wide) in rows.clone().zip(wide.chunks_exact_mut(width)) {
                    for (head, wide) in heads.clone().zip(wide.chunks_exact_mut(p)) {
                        let weight = weight(row * all, head, self.tape.sums[(rows.end - 1) * all + head]);
                        let source = &source(row)[head * p..(head + 1) * p];
                        wide.iter_mut().zip(source).for_each(|(w, x)| *w = weight * x);
                    }
                }
            },
        );
    }

    /// `dstate *= e^{s_Q}`, head by head.
    fn decay(&self, rows: &Range<usize>, heads: &Range<usize>, dstate: &mut [f32]) {
        let (p, all, width) = (self.sizes.headdim, self.sizes.heads, self.sizes.columns(heads).len());
        vectorize(
            #[inline(always)]
            || {
                for dstate in dstate.chunks_exact_mut(width) {
                    for (head, dstate) in heads.clone().zip(dstate.chunks_exact_mut(p)) {
                        simd::scale(exp_decay(self.tape.sums[(rows.end - 1) * all + head]), dstate);
                    }
                }
            },
        );
    }
}
