//! The selective scan of Mamba (Gu & Dao 2023, eq. 2 and §3.3) with the gate that follows it.
//!
//! Channels are handled in groups of 16, one per SIMD lane, each with its whole state. Forward keeps the state at the
//! start of every chunk of positions; backward runs each chunk again from there.

use std::ops::Range;

use super::tasks::{Task, Tasks};
use crate::buffer::Buffer;
use crate::parallel::{MIN_PARALLEL, Shared, for_rows};
use crate::rows::Rows;
use crate::simd::{self, exp_decay, silu, softplus, vectorize};

mod backward;
mod composed;
pub use backward::{Grads, ParamGrads};
pub use composed::{selective_scan_composed, selective_scan_from, softplus_composed};

/// Channels of a group: one AVX-512 register, two of AVX2.
const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Positions between two kept states.
pub const CHUNK: usize = 32;

/// The inputs of a scan over `(B, S)` positions.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `(B, S, E)`
    pub x: &'a [f32],
    /// `(B, S, E)`, before bias and softplus.
    pub dt: &'a [f32],
    /// `(B * S, N)`
    pub b: Rows<'a>,
    /// `(B * S, N)`
    pub c: Rows<'a>,
    /// The gate, `(B * S, E)`.
    pub z: Rows<'a>,
}

/// The parameters of a scan, laid out by groups of 16 channels; the last group is filled up with zeros.
pub struct SelectiveScan {
    /// `(G, N, 16)`: `-exp(a_log)`
    a: Buffer,
    /// `(G, 16)`
    d: Buffer,
    /// `(G, 16)`
    dt_bias: Buffer,
    channels: usize,
    d_state: usize,
}

/// A group's channels at one position.
#[inline(always)]
fn load(row: &[f32], group: usize) -> Lanes {
    let mut lanes = [0.0; LANES];
    match row[group * LANES..].first_chunk() {
        Some(whole) => *whole,
        None => {
            lanes.iter_mut().zip(&row[group * LANES..]).for_each(|(lane, x)| *lane = *x);
            lanes
        }
    }
}

#[inline(always)]
fn store(lanes: &Lanes, row: &mut [f32]) {
    match row.first_chunk_mut() {
        Some(whole) => *whole = *lanes,
        None => row.iter_mut().zip(lanes).for_each(|(x, lane)| *x = *lane),
    }
}

/// What one position contributes before the state is touched.
#[derive(Clone, Copy, Default)]
struct Position {
    /// `dt + dt_bias`
    raw: Lanes,
    /// The step size, `softplus(raw)`.
    delta: Lanes,
    x: Lanes,
    z: Lanes,
}

impl SelectiveScan {
    /// # Shapes
    /// - `a_log`: `(E, N)`, `d`, `dt_bias`: `(E)`
    pub fn new(a_log: &[f32], d: &[f32], dt_bias: &[f32]) -> Self {
        let (channels, d_state) = (d.len(), a_log.len() / d.len());
        let groups = channels.div_ceil(LANES);
        let mut a = Buffer::zeros(groups * d_state * LANES);
        for (e, row) in a_log.chunks_exact(d_state).enumerate() {
            let group = &mut a[e / LANES * d_state * LANES..];
            row.iter().enumerate().for_each(|(n, a_log)| group[n * LANES + e % LANES] = -a_log.exp());
        }
        let padded = |v: &[f32]| {
            let mut lanes = Buffer::zeros(groups * LANES);
            lanes[..channels].copy_from_slice(v);
            lanes
        };
        SelectiveScan { a, d: padded(d), dt_bias: padded(dt_bias), channels, d_state }
    }

    fn groups(&self) -> usize {
        self.channels.div_ceil(LANES)
    }

    /// The floats of one state, laid out `(G, N, 16)`.
    pub fn state_len(&self) -> usize {
        self.a.len()
    }

    /// The floats that forward keeps for backward: the state at the start of every chunk, `(B, chunks, G, N, 16)`.
    pub fn states_len(&self, batch: usize, seq: usize) -> usize {
        batch * seq.div_ceil(CHUNK) * self.state_len()
    }

    fn tasks(&self, batch: usize, seq: usize) -> Tasks {
        Tasks::new(batch, self.groups(), seq * self.d_state * LANES)
    }

    /// Where a group's channels lie in a row.
    #[inline(always)]
    fn columns(&self, group: usize) -> Range<usize> {
        group * LANES..((group + 1) * LANES).min(self.channels)
    }

    #[inline(always)]
    fn a(&self, group: usize) -> &[Lanes] {
        &self.a.as_chunks().0[group * self.d_state..(group + 1) * self.d_state]
    }

    #[inline(always)]
    fn position(&self, inputs: &Inputs, row: usize, group: usize) -> Position {
        let whole = row * self.channels..(row + 1) * self.channels;
        let mut raw = load(&inputs.dt[whole.clone()], group);
        let bias = load(&self.dt_bias, group);
        let mut delta = [0.0; LANES];
        for l in 0..LANES {
            raw[l] += bias[l];
            delta[l] = softplus(raw[l]);
        }
        Position { raw, delta, x: load(&inputs.x[whole], group), z: load(inputs.z.row(row), group) }
    }

    /// Advances a group's state by one position; returns `C · h + D x`, before the gate.
    #[inline(always)]
    fn update(&self, at: &Position, b: &[f32], c: &[f32], group: usize, h: &mut [Lanes]) -> Lanes {
        let d = load(&self.d, group);
        let (mut y, mut input) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            y[l] = d[l] * at.x[l];
            input[l] = at.delta[l] * at.x[l];
        }
        for (((h, a), b), c) in h.iter_mut().zip(self.a(group)).zip(b).zip(c) {
            for l in 0..LANES {
                h[l] = exp_decay(at.delta[l] * a[l]).mul_add(h[l], b * input[l]);
                y[l] = c.mul_add(h[l], y[l]);
            }
        }
        y
    }

    /// Runs a group over `rows`, from state `h`.
    ///
    /// # Safety
    /// No slice that overlaps the group's columns of `y` in these rows may be alive.
    #[inline(always)]
    unsafe fn run(&self, inputs: &Inputs, rows: Range<usize>, group: usize, h: &mut [Lanes], y: Shared) {
        let columns = self.columns(group);
        for row in rows {
            let at = self.position(inputs, row, group);
            let mut out = self.update(&at, inputs.b.row(row), inputs.c.row(row), group, h);
            out.iter_mut().zip(at.z).for_each(|(out, z)| *out *= silu(z));
            // SAFETY: the caller's promise.
            let y = unsafe { y.slice(row * self.channels + columns.start..row * self.channels + columns.end) };
            store(&out, y);
        }
    }

    /// Runs whole sequences from zero states. Returns the states that backward needs.
    ///
    /// # Shapes
    /// - `y`: `(B, S, E)`, overwritten
    pub fn forward(&self, inputs: &Inputs, seq: usize, y: &mut [f32]) -> Buffer {
        let batch = y.len() / self.channels / seq;
        let mut states = Buffer::take(self.states_len(batch, seq));
        let (shared, y) = (Shared::new(&mut states), Shared::new(y));
        self.tasks(batch, seq).run(|Task { sequences, groups, .. }| {
            vectorize(
                #[inline(always)]
                || {
                    for sequence in sequences {
                        // SAFETY: no two tasks share a group of a sequence.
                        unsafe { self.forward_sequence(inputs, sequence, seq, groups.clone(), shared, y) };
                    }
                },
            );
        });
        states
    }

    /// # Safety
    /// No slice of these groups of this sequence may be alive.
    #[inline(always)]
    unsafe fn forward_sequence(
        &self,
        inputs: &Inputs,
        sequence: usize,
        seq: usize,
        groups: Range<usize>,
        states: Shared,
        y: Shared,
    ) {
        let (chunks, len) = (seq.div_ceil(CHUNK), self.d_state * LANES);
        let state = |chunk: usize, group: usize| {
            let start = (sequence * chunks + chunk) * self.state_len() + group * len;
            // SAFETY: this chunk and group of this sequence is this call's alone, and taken once at a time.
            unsafe { states.slice(start..start + len) }
        };
        let mut h = Buffer::take(len);
        for chunk in 0..chunks {
            let rows = sequence * seq + chunk * CHUNK..sequence * seq + seq.min((chunk + 1) * CHUNK);
            for group in groups.clone() {
                let start = state(chunk, group);
                if chunk == 0 {
                    start.fill(0.0);
                }
                h.copy_from_slice(start);
                // SAFETY: the caller's promise.
                unsafe { self.run(inputs, rows.clone(), group, h.as_chunks_mut().0, y) };
                if chunk + 1 < chunks {
                    state(chunk + 1, group).copy_from_slice(&h);
                }
            }
        }
    }

    /// Advances by one position.
    ///
    /// # Shapes
    /// - `inputs`: of `B` rows; `state`: `(B, G, N, 16)`; `y`: `(B, E)`, overwritten
    pub fn step(&self, inputs: &Inputs, state: &mut [f32], y: &mut [f32]) {
        self.advance(inputs, 1, state, y);
    }

    /// Advances by `seq` positions.
    ///
    /// # Shapes
    /// - `inputs`: of `B S` rows; `state`: `(B, G, N, 16)`, zeros at first; `y`: `(B, S, E)`, overwritten
    pub fn advance(&self, inputs: &Inputs, seq: usize, state: &mut [f32], y: &mut [f32]) {
        let (batch, len) = (y.len() / self.channels / seq, self.d_state * LANES);
        let (state, y) = (Shared::new(state), Shared::new(y));
        // A thread is worth waking for about 64 K exponentials.
        for_rows(batch * self.groups(), seq * len * MIN_PARALLEL / (64 * 1024), |range| {
            vectorize(
                #[inline(always)]
                || {
                    // All groups of a chunk, before the rows of the next one take its place in the cache.
                    for first in (0..seq).step_by(CHUNK) {
                        for i in range.clone() {
                            let (b, group) = (i / self.groups(), i % self.groups());
                            let rows = b * seq + first..b * seq + seq.min(first + CHUNK);
                            // SAFETY: a group of a sequence is in one range only.
                            let h = unsafe { state.slice(i * len..(i + 1) * len) };
                            // SAFETY: as above.
                            unsafe { self.run(inputs, rows, group, h.as_chunks_mut().0, y) };
                        }
                    }
                },
            );
        });
    }
}

#[cfg(test)]
mod tests;
