//! The recurrent form: per layer the output and the cell state of the last position.

use std::sync::Arc;

use mblm_sdk::Result;
use mblm_sdk::block::StageDecoder;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::Update;
use mblm_sdk::ops::linear;
use mblm_sdk::simd::vectorize;

use crate::layer::LstmLayer;
use crate::panels::{LANES, load, store};
use crate::recurrence::{GATES, Recurrence, State, advance};
use crate::table::Order;

/// Positions that a prefill runs at once: what it holds for them stays small.
const CHUNK: usize = 256;

/// Positions from which on whole sequences are faster than steps, which need no rearranged weights.
const MIN_CHUNK: usize = 32;

/// What a layer keeps from one position to the next.
struct LayerState<'a> {
    layer: &'a LstmLayer,
    /// `(4 H)`
    bias: Buffer,
    /// `(batch, H)`
    h: Buffer,
    /// `(batch, H)`
    c: Buffer,
}

pub(crate) struct Decoder<'a> {
    layers: Vec<LayerState<'a>>,
    batch: usize,
    units: usize,
    /// Of a step, `(batch, 4 H)`.
    gates: Buffer,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(layers: &'a [Arc<LstmLayer>], units: usize, batch: usize) -> Self {
        let zeros = || Buffer::zeros(batch * units);
        let layers = layers.iter().map(|layer| LayerState { layer, bias: layer.bias(), h: zeros(), c: zeros() });
        Decoder { layers: layers.collect(), batch, units, gates: Buffer::take(batch * GATES * units) }
    }
}

impl StageDecoder for Decoder<'_> {
    fn reset(&mut self) {
        for layer in &mut self.layers {
            layer.h.fill(0.0);
            layer.c.fill(0.0);
        }
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let mut input = x;
        for layer in &mut self.layers {
            layer.step(self.units, input, &mut self.gates);
            input = &layer.h;
        }
        y.copy_from_slice(input);
        Ok(())
    }

    fn prefill(&mut self, x: &[f32], y: &mut [f32], _seq: usize) -> Result<()> {
        let row = self.batch * self.units;
        for (x, y) in x.chunks(CHUNK * row).zip(y.chunks_mut(CHUNK * row)) {
            if x.len() < MIN_CHUNK * row {
                for (x, y) in x.chunks_exact(row).zip(y.chunks_exact_mut(row)) {
                    self.step(x, y)?;
                }
                continue;
            }
            y.copy_from_slice(x);
            let order = Order { batch: self.batch, seq: x.len() / row, time_major: true };
            self.layers.iter_mut().for_each(|layer| layer.prefill(self.units, order, y));
        }
        Ok(())
    }

    fn repeat(&mut self, times: usize) -> bool {
        for layer in &mut self.layers {
            (layer.h, layer.c) = (layer.h.repeated(times), layer.c.repeated(times));
        }
        self.batch = times;
        self.gates = Buffer::take(times * GATES * self.units);
        true
    }
}

impl LayerState<'_> {
    /// Advances by one position; the output is `h`.
    fn step(&mut self, units: usize, x: &[f32], gates: &mut [f32]) {
        let LayerState { layer, bias, h, c } = self;
        linear::step(x, &layer.weight_ih.values(), Some(bias), units, Update::Set, gates);
        linear::step(h, &layer.weight_hh.values(), None, units, Update::Add, gates);
        let rows = gates.chunks_exact(GATES * units).zip(h.chunks_exact_mut(units)).zip(c.chunks_exact_mut(units));
        vectorize(
            #[inline(always)]
            || {
                for ((gates, h), c) in rows {
                    for first in (0..units).step_by(LANES) {
                        let gate = |i: usize| load(&gates[i * units..(i + 1) * units], first);
                        let mut cell = load(c, first);
                        let out = advance(&mut [gate(0), gate(1), gate(2), gate(3)], &mut cell);
                        store(&cell, &mut c[first..]);
                        store(&out, &mut h[first..]);
                    }
                }
            },
        );
    }

    /// Advances by `order.seq` positions, whose inputs in `x` become the outputs.
    fn prefill(&mut self, units: usize, order: Order, x: &mut [f32]) {
        let LayerState { layer, bias, h, c } = self;
        let (mut gates, mut cells) = (Buffer::take(GATES * x.len()), Buffer::take(x.len()));
        linear::forward(x, &layer.weight_ih.values(), units, Update::Set, &mut gates);
        let initial = Some(State { h, c });
        Recurrence { weight: &layer.weight_hh.values(), bias, order }.forward(initial, &mut gates, &mut cells, x);
        let last = x.len() - h.len();
        h.copy_from_slice(&x[last..]);
        c.copy_from_slice(&cells[last..]);
    }
}
