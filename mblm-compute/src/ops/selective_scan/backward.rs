//! The backward pass of the selective scan.
//!
//! With `p_t = exp(δ_t a)`, `g_t` the gradient of `h_t` and `dy_t` that of `C_t · h_t + D x_t`:
//! `g_t = C_t dy_t + p_{t+1} g_{t+1}`; `dB_t = Σ g_t δ_t x_t` and `dC_t = Σ dy_t h_t` over the channels;
//! `dδ_t = Σ g_t (a p_t h_{t-1} + B_t x_t)`, `dx_t = δ_t Σ g_t B_t + D dy_t`, `da = Σ_t g_t δ_t p_t h_{t-1}`.

use super::*;
use crate::rows::RowsMut;
use crate::simd::sigmoid;

/// Where the gradients of the inputs are written.
pub struct Grads<'a> {
    /// `(B, S, E)`
    pub x: &'a mut [f32],
    /// `(B, S, E)`
    pub dt: &'a mut [f32],
    /// `(B * S, N)`
    pub b: RowsMut<'a>,
    /// `(B * S, N)`
    pub c: RowsMut<'a>,
    /// `(B * S, E)`
    pub z: RowsMut<'a>,
}

/// The gradients of the parameters, which are added to.
pub struct ParamGrads<'a> {
    /// `(E, N)`
    pub a_log: &'a mut [f32],
    /// `(E)`
    pub d: &'a mut [f32],
    /// `(E)`
    pub dt_bias: &'a mut [f32],
}

/// Everything a backward task reads, and the shared views of what it writes.
struct Pass<'a> {
    scan: &'a SelectiveScan,
    inputs: &'a Inputs<'a>,
    seq: usize,
    states: &'a [f32],
    dy: &'a [f32],
    dx: Shared<'a>,
    ddt: Shared<'a>,
    dz: RowsMut<'a>,
    /// `(group parts, B * S, 2 N)`: every task adds up the channels it has.
    dbc: Shared<'a>,
}

/// A task's own memory.
struct Scratch {
    /// The gradient of the state of each of the task's groups, `(G, N, 16)`.
    dh: Buffer,
    /// States and decays of the chunk, `(CHUNK, N, 16)` each.
    h: Buffer,
    p: Buffer,
    /// `dB` and `dC` of the chunk, lane by lane, `(CHUNK, 2 N, 16)`.
    dbc: Buffer,
    /// The chunk's positions of the group at hand, each with its output before the gate.
    positions: [(Position, Lanes); CHUNK],
}

impl SelectiveScan {
    /// Writes the gradients of the inputs and adds those of the parameters, from `dy` and what forward returned.
    pub fn backward(
        &self,
        inputs: &Inputs,
        seq: usize,
        states: &[f32],
        dy: &[f32],
        grads: Grads,
        params: &mut ParamGrads,
    ) {
        let rows = dy.len() / self.channels;
        let tasks = self.tasks(rows / seq, seq);
        let Tasks { by_sequence, by_group, .. } = tasks;
        let mut dbc = Buffer::take(by_group * rows * 2 * self.d_state);
        // Per part of the sequences, the gradients of a `(G, N, 16)`, of D and of the bias `(G, 16)`.
        let mut sums = Buffer::zeros(by_sequence * (self.a.len() + 2 * self.d.len()));
        let shared_sums = Shared::new(&mut sums);
        let pass = Pass {
            scan: self,
            inputs,
            seq,
            states,
            dy,
            dx: Shared::new(grads.x),
            ddt: Shared::new(grads.dt),
            dz: grads.z,
            dbc: Shared::new(&mut dbc),
        };
        tasks.run(|Task { sequences, groups, sequence_part, group_part }| {
            let per_group = (self.d_state + 2) * LANES;
            let start = sequence_part * self.groups() * per_group;
            // SAFETY: no other task has these groups of this part of the sequences.
            let sums = unsafe { shared_sums.slice(start + groups.start * per_group..start + groups.end * per_group) };
            let partial = group_part * rows;
            let mut scratch = pass.scratch(groups.len());
            vectorize(
                #[inline(always)]
                || {
                    for sequence in sequences {
                        pass.sequence(sequence, groups.clone(), partial, &mut scratch, sums);
                    }
                },
            );
        });
        self.collect_inputs(&dbc, rows, by_group, grads.b, grads.c);
        self.collect_params(&sums, params);
    }

    /// Adds up the parts of dB and dC.
    fn collect_inputs(&self, dbc: &[f32], rows: usize, parts: usize, db: RowsMut, dc: RowsMut) {
        let n = self.d_state;
        for_rows(rows, 2 * n * parts, |range| {
            for row in range {
                // SAFETY: ranges of rows do not overlap, and the two views are of different columns.
                let (db, dc) = unsafe { (db.row(row, 0..n), dc.row(row, 0..n)) };
                for part in 0..parts {
                    let (b, c) = dbc[(part * rows + row) * 2 * n..][..2 * n].split_at(n);
                    match part {
                        0 => {
                            db.copy_from_slice(b);
                            dc.copy_from_slice(c);
                        }
                        _ => {
                            simd::add(b, db);
                            simd::add(c, dc);
                        }
                    }
                }
            }
        });
    }

    /// Adds up the parts of the gradients of `a`, D and the bias, and takes `a = -exp(a_log)` back.
    fn collect_params(&self, sums: &[f32], params: &mut ParamGrads) {
        let n = self.d_state;
        let per_group = (n + 2) * LANES;
        for part in sums.chunks_exact(self.groups() * per_group) {
            for e in 0..self.channels {
                let (group, lane) = (e / LANES, e % LANES);
                let at = |i: usize| part[group * per_group + i * LANES + lane];
                for i in 0..n {
                    params.a_log[e * n + i] += at(i) * self.a(group)[i][lane];
                }
                params.d[e] += at(n);
                params.dt_bias[e] += at(n + 1);
            }
        }
    }
}

impl Pass<'_> {
    fn scratch(&self, groups: usize) -> Scratch {
        let state = self.scan.d_state * LANES;
        let chunk = CHUNK.min(self.seq);
        Scratch {
            dh: Buffer::take(groups * state),
            h: Buffer::take(chunk * state),
            p: Buffer::take(chunk * state),
            dbc: Buffer::take(chunk * 2 * state),
            positions: [Default::default(); CHUNK],
        }
    }

    /// One sequence, chunk by chunk from its end. `partial` is the task's first row in `dbc`.
    #[inline(always)]
    fn sequence(&self, sequence: usize, groups: Range<usize>, partial: usize, scratch: &mut Scratch, sums: &mut [f32]) {
        let (n, chunks) = (self.scan.d_state, self.seq.div_ceil(CHUNK));
        scratch.dh.fill(0.0);
        for chunk in (0..chunks).rev() {
            let rows = sequence * self.seq + chunk * CHUNK..sequence * self.seq + self.seq.min((chunk + 1) * CHUNK);
            scratch.dbc.fill(0.0);
            for (i, group) in groups.clone().enumerate() {
                let start = ((sequence * chunks + chunk) * self.scan.groups() + group) * n * LANES;
                self.replay(rows.clone(), group, &self.states[start..start + n * LANES], scratch);
                let dh = i * n * LANES..(i + 1) * n * LANES;
                let sums = &mut sums[i * (n + 2) * LANES..(i + 1) * (n + 2) * LANES];
                self.group(rows.clone(), group, dh, &self.states[start..start + n * LANES], scratch, sums);
            }
            for (row, lanes) in rows.zip(scratch.dbc.chunks_exact(2 * n * LANES)) {
                // SAFETY: no other task has this partial row.
                let dbc = unsafe { self.dbc.slice((partial + row) * 2 * n..(partial + row + 1) * 2 * n) };
                dbc.iter_mut().zip(lanes.chunks_exact(LANES)).for_each(|(sum, lanes)| *sum = simd::sum(lanes));
            }
        }
    }

    /// Runs a chunk forward again, keeping states, decays and outputs.
    #[inline(always)]
    fn replay(&self, rows: Range<usize>, group: usize, start: &[f32], scratch: &mut Scratch) {
        let (n, a, d) = (self.scan.d_state, self.scan.a(group), load(&self.scan.d, group));
        let (hs, ps) = (scratch.h.as_chunks_mut::<LANES>().0, scratch.p.as_chunks_mut::<LANES>().0);
        let mut before: &[Lanes] = start.as_chunks().0;
        let mut rest = hs;
        for ((row, ps), position) in rows.zip(ps.chunks_exact_mut(n)).zip(&mut scratch.positions) {
            let (hs, after) = rest.split_at_mut(n);
            rest = after;
            let at = self.scan.position(self.inputs, row, group);
            let (b, c) = (self.inputs.b.row(row), self.inputs.c.row(row));
            let (mut sum, mut input) = ([0.0; LANES], [0.0; LANES]);
            for l in 0..LANES {
                sum[l] = d[l] * at.x[l];
                input[l] = at.delta[l] * at.x[l];
            }
            for (((((h, p), a), before), b), c) in hs.iter_mut().zip(ps).zip(a).zip(before).zip(b).zip(c) {
                for l in 0..LANES {
                    p[l] = exp_decay(at.delta[l] * a[l]);
                    h[l] = p[l].mul_add(before[l], b * input[l]);
                    sum[l] = c.mul_add(h[l], sum[l]);
                }
            }
            *position = (at, sum);
            before = hs;
        }
    }

    /// One group over the rows of a chunk, last row first.
    #[inline(always)]
    fn group(
        &self,
        rows: Range<usize>,
        group: usize,
        dh: Range<usize>,
        start: &[f32],
        scratch: &mut Scratch,
        sums: &mut [f32],
    ) {
        let (scan, n) = (self.scan, self.scan.d_state);
        let columns = scan.columns(group);
        let dh = scratch.dh[dh].as_chunks_mut::<LANES>().0;
        let (hs, ps) = (scratch.h.as_chunks::<LANES>().0, scratch.p.as_chunks::<LANES>().0);
        let dbcs = scratch.dbc.as_chunks_mut::<LANES>().0;
        let (da, dd_dbias) = sums.as_chunks_mut::<LANES>().0.split_at_mut(n);
        let (dd, dbias) = dd_dbias.split_at_mut(1);
        let (dd, dbias) = (&mut dd[0], &mut dbias[0]);
        let d = load(&scan.d, group);
        for (t, row) in rows.enumerate().rev() {
            let (at, y) = &scratch.positions[t];
            let dout = load(&self.dy[row * scan.channels..(row + 1) * scan.channels], group);
            let (mut dy, mut dz) = ([0.0; LANES], [0.0; LANES]);
            let (mut dx, mut ddelta) = ([0.0; LANES], [0.0; LANES]);
            for l in 0..LANES {
                let s = sigmoid(at.z[l]);
                dy[l] = dout[l] * at.z[l] * s;
                dz[l] = dout[l] * y[l] * s * (1.0 + at.z[l] * (1.0 - s));
            }
            let before = if t == 0 { start.as_chunks().0 } else { &hs[(t - 1) * n..t * n] };
            let (h, p) = (&hs[t * n..(t + 1) * n], &ps[t * n..(t + 1) * n]);
            let (db, dc) = dbcs[t * 2 * n..(t + 1) * 2 * n].split_at_mut(n);
            let (b, c) = (self.inputs.b.row(row), self.inputs.c.row(row));
            let a = scan.a(group);
            for i in 0..n {
                state_grad(
                    at,
                    &dy,
                    [&h[i], &p[i], &before[i], &a[i]],
                    b[i],
                    c[i],
                    [&mut dh[i], &mut da[i]],
                    [&mut db[i], &mut dc[i], &mut dx, &mut ddelta],
                );
            }
            let mut draw = [0.0; LANES];
            for l in 0..LANES {
                ddelta[l] = at.x[l].mul_add(dx[l], ddelta[l]);
                dx[l] = at.delta[l].mul_add(dx[l], d[l] * dy[l]);
                draw[l] = ddelta[l] * sigmoid(at.raw[l]);
                dd[l] += dy[l] * at.x[l];
                dbias[l] += draw[l];
            }
            let place = row * scan.channels + columns.start..row * scan.channels + columns.end;
            // SAFETY: no other task has this group of this sequence.
            unsafe {
                store(&dx, self.dx.slice(place.clone()));
                store(&draw, self.ddt.slice(place));
                store(&dz, self.dz.row(row, columns.clone()));
            }
        }
    }
}

/// One of the N states at one position. `sums` gets `dB`, `dC`, `Σ g B` and `Σ g a p h_{t-1}`.
#[inline(always)]
fn state_grad(
    at: &Position,
    dy: &Lanes,
    [h, p, before, a]: [&Lanes; 4],
    b: f32,
    c: f32,
    [dh, da]: [&mut Lanes; 2],
    [db, dc, gb, gdecay]: [&mut Lanes; 4],
) {
    for l in 0..LANES {
        let g = c.mul_add(dy[l], dh[l]);
        dc[l] = dy[l].mul_add(h[l], dc[l]);
        db[l] = g.mul_add(at.delta[l] * at.x[l], db[l]);
        gb[l] = b.mul_add(g, gb[l]);
        let along = g * p[l];
        dh[l] = along;
        let decay = along * before[l];
        gdecay[l] = a[l].mul_add(decay, gdecay[l]);
        da[l] = at.delta[l].mul_add(decay, da[l]);
    }
}
