//! The recurrence of an LSTM and its backward, over whole sequences:
//! `i, f, o = σ(…)`, `g = tanh(…)`, `c_t = f c_{t-1} + i g`, `h_t = o tanh(c_t)`.
//!
//! Units are handled in blocks, one SIMD lane per unit, with all four gates of a unit at once, so that the threads meet
//! once per position at most. Few sequences are cut by units, and the threads go through time together; many sequences
//! are cut into groups, and each group goes through time by itself.

use std::ops::Range;

use mblm_sdk::buffer::Buffer;
use mblm_sdk::parallel::{MIN_PARALLEL, for_rows, row_ranges};
use mblm_sdk::simd::{exp, sigmoid, vectorize};

use crate::lockstep::lockstep;
use crate::panels::{LANES, Lanes, Panels, TILE, load, store};
use crate::table::{Order, Table};

/// i, f, g, o
pub(crate) const GATES: usize = 4;

/// Registers of a block of units in backward.
const BACKWARD_REGISTERS: usize = 2;

/// Sequences per thread from which on each thread reads all weights for its own sequences.
const SEQUENCES_PER_THREAD: usize = 16;

/// Sequences of a group that goes through time by itself: few, so that their rows stay in the cache from one position to
/// the next.
const GROUP: usize = 32;

/// The recurrence of a layer with `H` units.
#[derive(Clone, Copy)]
pub(crate) struct Recurrence<'a> {
    /// `(4 H, H)`
    pub(crate) weight: &'a [f32],
    /// `(4 H)`
    pub(crate) bias: &'a [f32],
    pub(crate) order: Order,
}

/// The state before the first position.
#[derive(Clone, Copy)]
pub(crate) struct State<'a> {
    /// `(batch, H)`
    pub(crate) h: &'a [f32],
    /// `(batch, H)`
    pub(crate) c: &'a [f32],
}

impl Recurrence<'_> {
    fn units(&self) -> usize {
        self.bias.len() / GATES
    }

    /// Runs whole sequences, from `initial` or zeros.
    ///
    /// # Shapes
    /// In rows that `order` describes:
    /// - `gates`: `(4 H)`, the input's share of the gates, which become the gates
    /// - `c`, `h`: `(H)`, overwritten
    pub(crate) fn forward(&self, initial: Option<State>, gates: &mut [f32], c: &mut [f32], h: &mut [f32]) {
        let (units, order) = (self.units(), self.order);
        let blocks = units.div_ceil(LANES);
        let row = |block, gate, lane| Some(block * LANES + lane).filter(|u| *u < units).map(|u| gate * units + u);
        let forward = Forward {
            units,
            weight: &Panels::of_transpose(self.weight, units, blocks, row),
            bias: self.bias,
            initial,
            gates: Table::new(gates, GATES * units, order),
            c: Table::new(c, units, order),
            h: Table::new(h, units, order),
        };
        run(&forward, order, blocks, GATES * LANES * units);
    }

    /// From the gradient of the outputs to those of the gates before their activations.
    ///
    /// # Shapes
    /// In rows that `order` describes:
    /// - `dh`, `c`: `(H)`
    /// - `gates`: `(4 H)`, as forward left them, which become their gradients
    /// - `before`: `(H)`, overwritten with the outputs of the position before, of which the first is 0
    pub(crate) fn backward(&self, dh: &[f32], c: &[f32], gates: &mut [f32], before: &mut [f32]) {
        let (units, order) = (self.units(), self.order);
        let mut dc = Buffer::take(order.batch * units);
        let backward = Backward {
            units,
            order,
            weight: &Panels::of(self.weight, units),
            dh,
            c,
            gates: Table::new(gates, GATES * units, order),
            before: Table::new(before, units, order),
            dc: Table::new(&mut dc, units, Order { seq: 1, ..order }),
        };
        let block = BACKWARD_REGISTERS * LANES;
        run(&backward, order, units.div_ceil(block), GATES * block * units);
    }
}

/// `tanh x`, absolute error below 2e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

/// Advances 16 units: what the gates get becomes the gates, `c` goes on, and the output is returned.
#[inline(always)]
pub(crate) fn advance(gates: &mut [Lanes; GATES], c: &mut Lanes) -> Lanes {
    let [i, f, g, o] = gates;
    let mut h = [0.0; LANES];
    for l in 0..LANES {
        i[l] = sigmoid(i[l]);
        f[l] = sigmoid(f[l]);
        g[l] = tanh(g[l]);
        o[l] = sigmoid(o[l]);
        c[l] = f[l].mul_add(c[l], i[l] * g[l]);
        h[l] = o[l] * tanh(c[l]);
    }
    h
}

/// One direction through time.
trait Direction: Sync {
    /// Runs a block of units of `B` sequences, from `first` on, at the `tick`-th position that it comes to.
    ///
    /// # Safety
    /// The position before has been run for all units of these sequences, and nobody else runs this cell.
    unsafe fn cell<const B: usize>(&self, tick: usize, block: usize, first: usize);
}

/// Runs all cells. `work` is the multiplications of one.
fn run(direction: &impl Direction, order: Order, blocks: usize, work: usize) {
    let Order { batch, seq, .. } = order;
    if batch >= SEQUENCES_PER_THREAD * row_ranges(batch, MIN_PARALLEL).len() {
        for_rows(batch, seq * blocks * work, |range| {
            vectorize(
                #[inline(always)]
                || {
                    for first in range.clone().step_by(GROUP) {
                        for tick in 0..seq {
                            // SAFETY: a sequence is in one range, whose positions are run one after another.
                            unsafe { sweep(direction, tick, 0..blocks, first..range.end.min(first + GROUP)) };
                        }
                    }
                },
            );
        });
    } else {
        // A thread has a microsecond's work in about 64 K multiplications.
        let parts = row_ranges(blocks, batch * work / GATES);
        lockstep(parts.len(), seq, |tick, part| {
            vectorize(
                #[inline(always)]
                // SAFETY: a block is in one part, and all parts of the last step are done.
                || unsafe { sweep(direction, tick, parts[part].clone(), 0..batch) },
            );
        });
    }
}

/// Runs blocks of units of some sequences at one position.
///
/// # Safety
/// As for [`Direction::cell`].
#[inline(always)]
unsafe fn sweep(direction: &impl Direction, tick: usize, blocks: Range<usize>, sequences: Range<usize>) {
    for i in blocks.clone() {
        // There and back: the weights that the last position read last are still in the cache.
        let block = if tick.is_multiple_of(2) { i } else { blocks.start + blocks.end - 1 - i };
        let mut first = sequences.start;
        // SAFETY: the caller's promise, here and below.
        unsafe {
            while first + TILE <= sequences.end {
                direction.cell::<TILE>(tick, block, first);
                first += TILE;
            }
            match sequences.end - first {
                3 => direction.cell::<3>(tick, block, first),
                2 => direction.cell::<2>(tick, block, first),
                1 => direction.cell::<1>(tick, block, first),
                _ => {}
            }
        }
    }
}

struct Forward<'a> {
    units: usize,
    /// A panel has the four gates of a block.
    weight: &'a Panels<GATES>,
    bias: &'a [f32],
    initial: Option<State<'a>>,
    gates: Table<'a>,
    c: Table<'a>,
    h: Table<'a>,
}

impl Direction for Forward<'_> {
    #[inline(always)]
    unsafe fn cell<const B: usize>(&self, t: usize, block: usize, first: usize) {
        let units = self.units;
        let mut sums = [[[0.0; LANES]; GATES]; B];
        if t > 0 || self.initial.is_some() {
            let mut rows: [&[f32]; B] = [&[]; B];
            for (b, row) in rows.iter_mut().enumerate() {
                *row = match self.initial {
                    Some(State { h, .. }) if t == 0 => &h[(first + b) * units..(first + b + 1) * units],
                    // SAFETY: the position before is complete.
                    _ => unsafe { self.h.read(first + b, t - 1, 0..units) },
                };
            }
            sums = self.weight.product(rows, block);
        }
        for (b, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.activate(t, block, first + b, sums) };
        }
    }
}

impl Forward<'_> {
    /// The rest of a cell, for one sequence, from the state's share of its gates.
    ///
    /// # Safety
    /// As for [`Direction::cell`].
    #[inline(always)]
    unsafe fn activate(&self, t: usize, block: usize, b: usize, sums: &mut [Lanes; GATES]) {
        let units = self.units;
        let at = block * LANES..units.min((block + 1) * LANES);
        let columns = |gate: usize| gate * units + at.start..gate * units + at.end;
        for (gate, sum) in sums.iter_mut().enumerate() {
            // SAFETY: these columns are this cell's alone.
            let input = load(unsafe { self.gates.read(b, t, columns(gate)) }, 0);
            let bias = load(&self.bias[columns(gate)], 0);
            for l in 0..LANES {
                sum[l] += input[l] + bias[l];
            }
        }
        let mut c = match self.initial {
            // SAFETY: the position before is complete.
            _ if t > 0 => load(unsafe { self.c.read(b, t - 1, at.clone()) }, 0),
            Some(State { c, .. }) => load(&c[b * units..(b + 1) * units], at.start),
            None => [0.0; LANES],
        };
        let h = advance(sums, &mut c);
        // SAFETY: these columns of this position are this cell's alone, here and below.
        unsafe {
            for (gate, value) in sums.iter().enumerate() {
                store(value, self.gates.write(b, t, columns(gate)));
            }
            store(&c, self.c.write(b, t, at.clone()));
            store(&h, self.h.write(b, t, at));
        }
    }
}

struct Backward<'a> {
    units: usize,
    order: Order,
    weight: &'a Panels<BACKWARD_REGISTERS>,
    dh: &'a [f32],
    c: &'a [f32],
    gates: Table<'a>,
    before: Table<'a>,
    /// What the later positions add to the gradient of `c`; nothing yet at the last position.
    dc: Table<'a>,
}

impl Direction for Backward<'_> {
    #[inline(always)]
    unsafe fn cell<const B: usize>(&self, tick: usize, block: usize, first: usize) {
        let t = self.order.seq - 1 - tick;
        let mut sums = [[[0.0; LANES]; BACKWARD_REGISTERS]; B];
        if tick > 0 {
            let mut rows: [&[f32]; B] = [&[]; B];
            for (b, row) in rows.iter_mut().enumerate() {
                // SAFETY: the position after is complete.
                *row = unsafe { self.gates.read(first + b, t + 1, 0..GATES * self.units) };
            }
            sums = self.weight.product(rows, block);
        }
        for (b, sums) in sums.iter().enumerate() {
            for (v, sums) in sums.iter().enumerate() {
                let start = (block * BACKWARD_REGISTERS + v) * LANES;
                if start < self.units {
                    // SAFETY: the caller's promise.
                    unsafe { self.differentiate(t, start..self.units.min(start + LANES), first + b, sums) };
                }
            }
        }
    }
}

impl Backward<'_> {
    /// Some units of a sequence at position `t`.
    #[inline(always)]
    fn row(&self, data: &[f32], b: usize, t: usize, at: &Range<usize>) -> Lanes {
        let start = self.order.row(b, t) * self.units;
        load(&data[start + at.start..start + at.end], 0)
    }

    #[inline(always)]
    fn columns(&self, gate: usize, at: &Range<usize>) -> Range<usize> {
        gate * self.units + at.start..gate * self.units + at.end
    }

    /// The rest of a cell, for up to 16 units of one sequence, from what the position after adds to their `dh`.
    ///
    /// # Safety
    /// As for [`Direction::cell`].
    #[inline(always)]
    unsafe fn differentiate(&self, t: usize, at: Range<usize>, b: usize, sums: &Lanes) {
        let last = self.order.seq - 1;
        let (dh, c) = (self.row(self.dh, b, t, &at), self.row(self.c, b, t, &at));
        let c_before = if t > 0 { self.row(self.c, b, t - 1, &at) } else { [0.0; LANES] };
        let mut gates = [[0.0; LANES]; GATES];
        for (gate, value) in gates.iter_mut().enumerate() {
            // SAFETY: these columns of this position are this cell's alone, here and below.
            *value = load(unsafe { self.gates.read(b, t, self.columns(gate, &at)) }, 0);
        }
        let [i, f, g, o] = gates;
        // SAFETY: as above.
        let carry = if t < last { load(unsafe { self.dc.read(b, 0, at.clone()) }, 0) } else { [0.0; LANES] };
        let (mut grads, mut h, mut dc) = ([[0.0; LANES]; GATES], [0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            let dh = dh[l] + sums[l];
            let squashed = tanh(c[l]);
            h[l] = o[l] * squashed;
            dc[l] = (dh * o[l]).mul_add(1.0 - squashed * squashed, carry[l]);
            grads[0][l] = dc[l] * g[l] * i[l] * (1.0 - i[l]);
            grads[1][l] = dc[l] * c_before[l] * f[l] * (1.0 - f[l]);
            grads[2][l] = dc[l] * i[l] * (1.0 - g[l] * g[l]);
            grads[3][l] = dh * squashed * o[l] * (1.0 - o[l]);
            dc[l] *= f[l];
        }
        // SAFETY: as above.
        unsafe {
            for (gate, grad) in grads.iter().enumerate() {
                store(grad, self.gates.write(b, t, self.columns(gate, &at)));
            }
            store(&dc, self.dc.write(b, 0, at.clone()));
            if t < last {
                store(&h, self.before.write(b, t + 1, at.clone()));
            }
            if t == 0 {
                self.before.write(b, 0, at).fill(0.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_within_its_stated_error() {
        for i in -200_000..=200_000 {
            let x = i as f32 * 1e-4;
            let want = (x as f64).tanh();
            assert!((tanh(x) as f64 - want).abs() <= 2e-7, "tanh({x}) = {}, want {want}", tanh(x));
        }
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }
}
