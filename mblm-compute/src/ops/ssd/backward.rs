//! The backward pass of the state space dual, chunk by chunk from the end of each sequence.
//!
//! With `G = dY Xᵀ`, `L_ij = e^{s_i - s_j}` for j <= i, S the state at the chunk's start and dS' the gradient of the one
//! at its end: `u_j = Σ_i (C_i·B_j) L_ij dy_i + e^{s_Q - s_j} B_j dS'` gives `dx_j = δ_j u_j + D dy_j` and the direct
//! part of `dδ_j`, `x_j·u_j`; `d(C Bᵀ) = Σ_heads G ∘ L δ`; `dS = e^{s_Q} dS' + Cᵀ (e^{s} dY)`.
//!
//! The gradient of the log decay `δ_t a` is the sum of `M_rs = dy_r·x_s (C_r·B_s) δ_s e^{s_r - s_s}` over all pairs of
//! positions s < t <= r, which the state at t connects. It is summed over these pairs alone: the shorter way, outputs minus
//! inputs from t on (`Σ_{r>=t} dy_r·y_r - δ_r x_r·u_r`), subtracts large numbers that have most pairs in common. Pairs
//! within a chunk are read off `G ∘ C Bᵀ ∘ L δ`; for those that a chunk border divides, each row of the earlier chunk
//! knows its sum over the later rows, each row of the later chunk over the earlier ones, and `e^{s_Q} dS'·S` is that of
//! the pairs with the whole chunk between them.

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
    /// One per head of the task.
    steps: Vec<StepGrads>,
}

/// What the gradients of a chunk's step sizes are made of, of one head.
#[derive(Clone)]
struct StepGrads {
    /// `x·u`, the part that does not go through decays.
    direct: [f32; CHUNK],
    /// For each t the sum of `M_rs` over the chunk's pairs s < t <= r.
    within: [f32; CHUNK],
    /// For each row the sum of `M_rs` over the s of earlier chunks.
    from_earlier: [f32; CHUNK],
    /// For each row the sum of `M_rs` over the r of later chunks.
    to_later: [f32; CHUNK],
    /// The sum of `M_rs` over the s of earlier and the r of later chunks.
    across: f32,
}

impl StepGrads {
    const ZERO: Self = StepGrads {
        direct: [0.0; CHUNK],
        within: [0.0; CHUNK],
        from_earlier: [0.0; CHUNK],
        to_later: [0.0; CHUNK],
        across: 0.0,
    };

    /// The gradients of the log decays of the first `q` rows, in the place of `within`.
    fn log_decays(&mut self, q: usize) -> &[f32] {
        let mut before = 0.0;
        for (grad, to_later) in self.within[..q].iter_mut().zip(&self.to_later) {
            *grad += before;
            before += to_later;
        }
        let mut behind = self.across;
        for (grad, from_earlier) in self.within[..q].iter_mut().zip(&self.from_earlier).rev() {
            behind += from_earlier;
            *grad += behind;
        }
        &self.within[..q]
    }
}

impl Ssd<'_> {
    /// Writes the gradients of the inputs and adds those of the parameters, from the output's gradient `dy` and the tape.
    pub fn backward(
        &self,
        inputs: &Inputs,
        seq: usize,
        tape: &Tape,
        dy: &[f32],
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
        let pass = Backward { ssd: *self, inputs, sizes, tape, dy, grads, dbc: dbc_shared, dcb: dcb_shared };
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
                matmul(MatMut::strided(both, q, n, 2 * n), Update::Add, square.t(), c, Threads::One);
                matmul(MatMut::strided(&mut both[n..], q, n, 2 * n), Update::Add, square, b, Threads::One);
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
        let steps = vec![StepGrads::ZERO; heads.len()];
        Scratch { decays, square, u: Buffer::take(q * width), wide: Buffer::take(q * width), narrow, dstate, steps }
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
        if has_next {
            let (q, width) = (rows.len(), sizes.columns(heads).len());
            let (b, dstate) = (self.inputs.b.mat(rows.clone(), 0..sizes.d_state), &scratch.dstate);
            let wide = MatMut::new(&mut scratch.wide[..q * width], q, width);
            matmul(wide, Update::Set, b, Mat::new(dstate, sizes.d_state, width), Threads::One);
        }
        vectorize(
            #[inline(always)]
            || self.rows(&rows, heads, has_next, scratch, sums),
        );
        let state = (chunk > 0).then(|| &self.tape.states[sizes.state(sequence, chunk, heads)]);
        self.through_states(&rows, heads, part, has_next, state, scratch);
        self.steps(&rows, heads, scratch, sums);
    }

    /// The products within the chunk: u without the state's part, the gradient of `C Bᵀ`, and the sums over its pairs.
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
            let steps = Steps::gather(&self.tape.delta, &self.tape.logs, sizes.heads, rows, head);
            vectorize(
                #[inline(always)]
                || {
                    steps.decays(decays);
                    square.iter_mut().zip(&*decays).zip(cb).for_each(|((w, decay), cb)| *w = decay * cb);
                },
            );
            let dy = Mat::strided(&self.dy[rows.start * inner + head * p..], q, p, inner);
            let u = MatMut::strided(&mut scratch.u[(head - heads.start) * p..], q, p, width);
            matmul(u, Update::Set, Mat::new(square, q, q).t(), dy, Threads::One);
            let x = self.inputs.x.mat(rows.clone(), head * p..(head + 1) * p);
            matmul(MatMut::new(square, q, q), Update::Set, dy, x.t(), Threads::One);
            let within = &mut scratch.steps[head - heads.start].within;
            vectorize(
                #[inline(always)]
                || {
                    // Of each column s, the sum over the rows r from the one at hand on.
                    let mut columns = [0.0; CHUNK];
                    for i in (0..q).rev() {
                        let row = i * q..(i + 1) * q;
                        let pairs = square[row.clone()].iter().zip(&decays[row.clone()]).zip(&cb[row.clone()]);
                        let pairs = pairs.zip(&steps.delta).zip(&mut dcb[row]).zip(&mut columns);
                        for (((((g, decay), cb), delta), dcb), column) in pairs {
                            let through = g * decay * delta;
                            *dcb += through;
                            *column = through.mul_add(*cb, *column);
                        }
                        within[i] = simd::sum(&columns[..i]);
                    }
                },
            );
        }
    }

    /// Row by row: dx, the gradient of D, and the parts of the step sizes' that go by u. `scratch.wide` holds `B dS'` if
    /// the chunk `has_next`.
    #[inline(always)]
    fn rows(&self, rows: &Range<usize>, heads: &Range<usize>, has_next: bool, scratch: &mut Scratch, sums: &mut [f32]) {
        let (sizes, p, all) = (self.sizes, self.sizes.headdim, self.sizes.heads);
        let (inner, width) = (sizes.inner(), sizes.columns(heads).len());
        for ((head, sums), steps) in heads.clone().zip(sums.chunks_exact_mut(3)).zip(&mut scratch.steps) {
            let (first, d, last) = ((head - heads.start) * p, self.ssd.d[head], (rows.end - 1) * all + head);
            let columns = head * p..(head + 1) * p;
            let mut dd = 0.0;
            for (i, row) in rows.clone().enumerate() {
                let delta = self.tape.delta[row * all + head];
                let here = i * width + first..i * width + first + p;
                let x = &self.inputs.x.row(row)[columns.clone()];
                let u = &mut scratch.u[here.clone()];
                steps.to_later[i] = 0.0;
                if has_next {
                    let (decay, later) = (self.tape.logs.between(row * all + head, last), &scratch.wide[here]);
                    steps.to_later[i] = delta * decay * simd::dot(x, later);
                    simd::axpy(decay, later, u);
                }
                steps.direct[i] = simd::dot(x, u);
                let dy = &self.dy[row * inner..][columns.clone()];
                dd += simd::dot(dy, x);
                // SAFETY: a head of a sequence is one task's.
                let dx = unsafe { self.grads.x.row(row, columns.clone()) };
                for ((dx, u), dy) in dx.iter_mut().zip(&*u).zip(dy) {
                    *dx = delta.mul_add(*u, d * dy);
                }
            }
            sums[1] += dd;
        }
    }

    /// The gradients of the step sizes, of `a_log` and of the bias, from all parts.
    fn steps(&self, rows: &Range<usize>, heads: &Range<usize>, scratch: &mut Scratch, sums: &mut [f32]) {
        let all = self.sizes.heads;
        for ((head, sums), steps) in heads.clone().zip(sums.chunks_exact_mut(3)).zip(&mut scratch.steps) {
            let a = -simd::exp(self.ssd.a_log[head]);
            let (mut da, mut dbias) = (0.0, 0.0);
            let direct = steps.direct;
            for ((row, log), direct) in rows.clone().zip(steps.log_decays(rows.len())).zip(direct) {
                let raw = self.inputs.dt.row(row)[head] + self.ssd.dt_bias[head];
                // SAFETY: a head of a sequence is one task's.
                let ddt = unsafe { self.grads.dt.row(row, head..head + 1) };
                ddt[0] = a.mul_add(*log, direct) * sigmoid(raw);
                da += self.tape.delta[row * all + head] * log;
                dbias += ddt[0];
            }
            sums[0] += a * da;
            sums[2] += dbias;
        }
    }

    /// dB and dC through the states at the chunk's end and start, the gradient of the latter, and the sums over the pairs
    /// that the start divides.
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
        let Scratch { wide, narrow, dstate, steps, .. } = scratch;
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
                |here, last| self.tape.logs.between(here, last) * self.tape.delta[here],
                |row| self.inputs.x.row(row),
            );
            matmul(
                MatMut::new(narrow, q, n),
                Update::Set,
                Mat::new(wide, q, width),
                Mat::new(dstate, n, width).t(),
                Threads::One,
            );
            dbc.chunks_exact_mut(2 * n).zip(narrow.chunks_exact(n)).for_each(|(dbc, db)| dbc[..n].copy_from_slice(db));
        }
        steps.iter_mut().for_each(|steps| (steps.from_earlier, steps.across) = ([0.0; CHUNK], 0.0));
        let Some(state) = state else { return };
        let inner = sizes.inner();
        self.weigh(
            rows,
            heads,
            wide,
            |here, _| self.tape.logs.since_start(here),
            |row| &self.dy[row * inner..(row + 1) * inner],
        );
        // Head by head: of dC that of a head is the gradient of its decays too.
        for (head, steps) in steps.iter_mut().enumerate() {
            let first = head * sizes.headdim;
            let dy = Mat::strided(&wide[first..], q, sizes.headdim, width);
            let state = Mat::strided(&state[first..], n, sizes.headdim, width);
            matmul(MatMut::new(narrow, q, n), Update::Set, dy, state.t(), Threads::One);
            vectorize(
                #[inline(always)]
                || {
                    for (i, row) in rows.clone().enumerate() {
                        let dc = &narrow[i * n..(i + 1) * n];
                        simd::add(dc, &mut dbc[i * 2 * n + n..(i + 1) * 2 * n]);
                        steps.from_earlier[i] = simd::dot(self.inputs.c.row(row), dc);
                    }
                },
            );
        }
        match has_next {
            true => self.decay(rows, heads, state, dstate, steps),
            false => dstate.fill(0.0),
        }
        let c = self.inputs.c.mat(rows.clone(), 0..n);
        matmul(MatMut::new(dstate, n, width), Update::Add, c.t(), Mat::new(wide, q, width), Threads::One);
    }

    /// Writes the columns of `heads` of `source`'s rows, times `weight(row, last row)` (both with the head), to `wide`.
    fn weigh<'s>(
        &self,
        rows: &Range<usize>,
        heads: &Range<usize>,
        wide: &mut [f32],
        weight: impl Fn(usize, usize) -> f32,
        source: impl Fn(usize) -> &'s [f32],
    ) {
        let (p, all, width) = (self.sizes.headdim, self.sizes.heads, self.sizes.columns(heads).len());
        vectorize(
            #[inline(always)]
            || {
                for (row, wide) in rows.clone().zip(wide.chunks_exact_mut(width)) {
                    for (head, wide) in heads.clone().zip(wide.chunks_exact_mut(p)) {
                        let weight = weight(row * all + head, (rows.end - 1) * all + head);
                        let source = &source(row)[head * p..(head + 1) * p];
                        wide.iter_mut().zip(source).for_each(|(w, x)| *w = weight * x);
                    }
                }
            },
        );
    }

    /// `dstate *= e^{s_Q}`, head by head, and its product with the state is what goes across the chunk.
    fn decay(
        &self,
        rows: &Range<usize>,
        heads: &Range<usize>,
        state: &[f32],
        dstate: &mut [f32],
        steps: &mut [StepGrads],
    ) {
        let (p, all, width) = (self.sizes.headdim, self.sizes.heads, self.sizes.columns(heads).len());
        vectorize(
            #[inline(always)]
            || {
                for (dstate, state) in dstate.chunks_exact_mut(width).zip(state.chunks_exact(width)) {
                    let both = dstate.chunks_exact_mut(p).zip(state.chunks_exact(p));
                    for ((head, steps), (dstate, state)) in heads.clone().zip(&mut *steps).zip(both) {
                        simd::scale(self.tape.logs.since_start((rows.end - 1) * all + head), dstate);
                        steps.across += simd::dot(dstate, state);
                    }
                }
            },
        );
    }
}
