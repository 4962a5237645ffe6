//! Incremental decoding of the Transformer: cached keys and values, and the one position that the token shift needs.

use mblm_sdk::Result;
use mblm_sdk::block::StageDecoder;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::Update;
use mblm_sdk::layer::{Context, Dims, Layer};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::linear;
use mblm_sdk::ops::rms_norm::RmsNorm;
use mblm_sdk::ops::{attention, gelu};

use super::layer::{Tape, TransformerLayer};
use super::{EPS, TransformerModel};
use crate::passes::prefill;

pub(super) struct TransformerDecoder<'m> {
    model: &'m TransformerModel,
    batch: usize,
    position: usize,
    layers: Vec<LayerState>,
}

struct LayerState {
    /// Of each sequence, `(T, H d)`, rotated.
    keys: Vec<Vec<f32>>,
    /// Of each sequence, `(T, H d)`.
    values: Vec<Vec<f32>>,
    /// What entered the two halves at the position before, `(B, D)` each.
    before: [Vec<f32>; 2],
    scratch: Scratch,
}

/// Reused between steps.
struct Scratch {
    shifted: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    query: Vec<f32>,
    attended: Vec<f32>,
    up: Vec<f32>,
    wide: Vec<f32>,
}

impl<'m> TransformerDecoder<'m> {
    pub(super) fn new(model: &'m TransformerModel, batch: usize) -> Self {
        let layers = model.layers.iter().map(|layer| LayerState::new(layer, batch)).collect();
        TransformerDecoder { model, batch, position: 0, layers }
    }
}

impl Scratch {
    fn new(layer: &TransformerLayer, batch: usize) -> Self {
        let zeros = |width: usize| vec![0.0; batch * width];
        let (dim, inner) = (layer.dim, layer.inner());
        Scratch {
            shifted: zeros(dim),
            normed: zeros(dim),
            qkv: zeros(3 * inner),
            query: zeros(inner),
            attended: zeros(inner),
            up: zeros(layer.wide()),
            wide: zeros(layer.wide()),
        }
    }
}

impl LayerState {
    fn new(layer: &TransformerLayer, batch: usize) -> Self {
        let (dim, zeros) = (layer.dim, |width: usize| vec![0.0; batch * width]);
        LayerState {
            keys: vec![vec![]; batch],
            values: vec![vec![]; batch],
            before: [zeros(dim), zeros(dim)],
            scratch: Scratch::new(layer, batch),
        }
    }

    /// Normalises the shifted rows of `x` for half `which`, and remembers `x`.
    fn norm(&mut self, which: usize, gain: &[f32], x: &[f32], dim: usize) {
        let half = dim.div_ceil(2);
        let rows = x.chunks_exact(dim).zip(self.before[which].chunks_exact(dim));
        for (shifted, (x, before)) in self.scratch.shifted.chunks_exact_mut(dim).zip(rows) {
            shifted[..half].copy_from_slice(&x[..half]);
            shifted[half..].copy_from_slice(&before[half..]);
        }
        self.before[which].copy_from_slice(x);
        let dims = Dims { batch: x.len() / dim, seq: 1, dim };
        RmsNorm { gain, eps: EPS, shift: false }.forward(&self.scratch.shifted, dims, &mut self.scratch.normed);
    }

    /// One position through a layer, in place.
    fn step(&mut self, layer: &TransformerLayer, position: usize, x: &mut [f32]) {
        let (dim, inner) = (layer.dim, layer.inner());
        self.norm(0, &layer.attn_gain.values(), x, dim);
        self.project(layer, position, inner);
        let Scratch { query, attended, .. } = &mut self.scratch;
        attention::step(query, &self.keys, &self.values, layer.heads, layer.head_dim, attended);
        linear::step(attended, &layer.to_out.values(), None, inner, Update::Add, x);

        self.norm(1, &layer.ff_gain.values(), x, dim);
        let Scratch { normed, up, wide, .. } = &mut self.scratch;
        linear::step(normed, &layer.up.values(), Some(&layer.up_bias.values()), dim, Update::Set, up);
        gelu::forward(up, None, wide);
        linear::step(wide, &layer.down.values(), Some(&layer.down_bias.values()), layer.wide(), Update::Add, x);
    }

    /// Computes the query and appends key and value to the cache.
    fn project(&mut self, layer: &TransformerLayer, position: usize, inner: usize) {
        let batch = self.scratch.query.len() / inner;
        let Scratch { normed, qkv, query, .. } = &mut self.scratch;
        let (q, kv) = qkv.split_at_mut(batch * inner);
        linear::step(normed, &layer.to_q.values(), None, layer.dim, Update::Set, q);
        linear::step(normed, &layer.to_kv.values(), None, layer.dim, Update::Set, kv);
        if let Some(rotary) = &layer.rotary {
            rotary.rotate(q, inner, layer.heads, 1, position, false);
            rotary.rotate(kv, 2 * inner, layer.heads, 1, position, false);
        }
        query.copy_from_slice(q);
        for ((row, keys), values) in kv.chunks_exact(2 * inner).zip(&mut self.keys).zip(&mut self.values) {
            keys.extend_from_slice(&row[..inner]);
            values.extend_from_slice(&row[inner..]);
        }
    }
}

impl LayerState {
    /// The next positions `x`, `(batch, seq, D)`, through a layer, in place: products over all of them, and attention of one
    /// after the other to the cache.
    fn pass(&mut self, layer: &TransformerLayer, position: usize, dims: Dims, x: &mut [f32]) {
        let (inner, rows) = (layer.inner(), dims.rows());
        let [mut q, mut attended] = [(); 2].map(|()| Buffer::take(rows * inner));
        let mut kv = Buffer::take(rows * 2 * inner);
        let h = self.norm_of_all(0, &layer.attn_gain.values(), x, dims);
        linear::forward(&h, &layer.to_q.values(), dims.dim, Update::Set, &mut q);
        linear::forward(&h, &layer.to_kv.values(), dims.dim, Update::Set, &mut kv);
        if let Some(rotary) = &layer.rotary {
            rotary.rotate(&mut q, inner, layer.heads, dims.seq, position, false);
            rotary.rotate(&mut kv, 2 * inner, layer.heads, dims.seq, position, false);
        }
        for t in 0..dims.seq {
            let Scratch { query, attended: now, .. } = &mut self.scratch;
            for (b, query) in query.chunks_exact_mut(inner).enumerate() {
                let row = b * dims.seq + t;
                query.copy_from_slice(&q[row * inner..][..inner]);
                let (key, value) = kv[row * 2 * inner..][..2 * inner].split_at(inner);
                self.keys[b].extend_from_slice(key);
                self.values[b].extend_from_slice(value);
            }
            attention::step(query, &self.keys, &self.values, layer.heads, layer.head_dim, now);
            for (b, now) in now.chunks_exact(inner).enumerate() {
                attended[(b * dims.seq + t) * inner..][..inner].copy_from_slice(now);
            }
        }
        linear::forward(&attended, &layer.to_out.values(), inner, Update::Add, x);

        let h = self.norm_of_all(1, &layer.ff_gain.values(), x, dims);
        let [mut up, mut wide] = [(); 2].map(|()| Buffer::take(rows * layer.wide()));
        linear::forward(&h, &layer.up.values(), dims.dim, Update::Set, &mut up);
        linear::add_bias(&layer.up_bias.values(), &mut up);
        gelu::forward(&up, None, &mut wide);
        linear::forward(&wide, &layer.down.values(), layer.wide(), Update::Add, x);
        linear::add_bias(&layer.down_bias.values(), x);
    }

    /// [`norm`](Self::norm) of the next positions, `(batch, seq, D)`.
    fn norm_of_all(&mut self, which: usize, gain: &[f32], x: &[f32], dims: Dims) -> Buffer {
        let Dims { seq, dim, .. } = dims;
        let mut normed = Buffer::take(x.len());
        let [mut rows, mut out] = [(); 2].map(|()| Buffer::take((seq + 1) * dim));
        let sequences = x.chunks_exact(seq * dim).zip(normed.chunks_exact_mut(seq * dim));
        for ((x, normed), before) in sequences.zip(self.before[which].chunks_exact_mut(dim)) {
            rows[..dim].copy_from_slice(before);
            rows[dim..].copy_from_slice(x);
            RmsNorm { gain, eps: EPS, shift: true }.forward(&rows, Dims { batch: 1, seq: seq + 1, dim }, &mut out);
            normed.copy_from_slice(&out[dim..]);
            before.copy_from_slice(&rows[seq * dim..]);
        }
        normed
    }

    /// Takes over what a pass over the first positions of all sequences computed.
    fn keep(&mut self, layer: &TransformerLayer, x: &[f32], tape: &Tape, dims: Dims) {
        let (dim, inner) = (layer.dim, layer.inner());
        for (b, qkv) in tape.qkv.chunks_exact(dims.seq * 3 * inner).enumerate() {
            let part = |p: usize| qkv.chunks_exact(3 * inner).flat_map(move |row| &row[p * inner..(p + 1) * inner]);
            self.keys[b] = part(1).copied().collect();
            self.values[b] = part(2).copied().collect();
            let last = (b + 1) * dims.seq * dim - dim;
            for (before, rows) in self.before.iter_mut().zip([x, &tape.middle]) {
                before[b * dim..][..dim].copy_from_slice(&rows[last..last + dim]);
            }
        }
    }
}

impl StageDecoder for TransformerDecoder<'_> {
    fn reset(&mut self) {
        self.position = 0;
        for layer in &mut self.layers {
            layer.keys.iter_mut().chain(&mut layer.values).for_each(Vec::clear);
            layer.before.iter_mut().for_each(|before| before.fill(0.0));
        }
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        debug_assert_eq!(x.len(), self.batch * self.model.dim);
        let mut hidden = x.to_vec();
        for (state, layer) in self.layers.iter_mut().zip(&self.model.layers) {
            state.step(layer, self.position, &mut hidden);
        }
        self.position += 1;
        self.model.norm.step(&hidden, self.model.dim, y);
        Ok(())
    }

    /// One pass of the layers over all positions, where at most the first (the start token) was stepped through: that
    /// one's input is still at hand, and it is passed again.
    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        let (batch, dim, first) = (self.batch, self.model.dim, self.position);
        if first > 1 || seq < 2 {
            return prefill(self, x, y, seq, dim, |decoder, dims, mut x| {
                for (state, layer) in decoder.layers.iter_mut().zip(&decoder.model.layers) {
                    state.pass(layer, decoder.position, dims, &mut x);
                }
                decoder.position += dims.seq;
                let mut normed = Buffer::take(x.len());
                decoder.model.norm.step(&x, dim, &mut normed);
                normed
            });
        }
        let dims = Dims { batch, seq: first + seq, dim };
        let mut hidden = Buffer::take(dims.len());
        for (b, rows) in hidden.chunks_exact_mut(dims.seq * dim).enumerate() {
            let start = self.layers.iter().take(first).map(|layer| &layer.before[0][b * dim..]);
            let steps = x.chunks_exact(dim).skip(b).step_by(batch);
            for (row, x) in rows.chunks_exact_mut(dim).zip(start.chain(steps)) {
                row.copy_from_slice(&x[..dim]);
            }
        }
        let context = Context { dims, packed: &[], mask: None, mode: Mode::Eval };
        for (state, layer) in self.layers.iter_mut().zip(&self.model.layers) {
            let mut next = Buffer::take(dims.len());
            let tape = layer.forward(&hidden, context, &mut next);
            state.keep(layer, &hidden, &tape, dims);
            hidden = next;
        }
        for (i, y) in y.chunks_exact_mut(dim).enumerate() {
            let row = i % batch * dims.seq + first + i / batch;
            self.model.norm.step(&hidden[row * dim..][..dim], dim, y);
        }
        self.position += seq;
        Ok(())
    }

    fn repeat(&mut self, times: usize) -> bool {
        for (state, layer) in self.layers.iter_mut().zip(&self.model.layers) {
            for cache in [&mut state.keys, &mut state.values] {
                *cache = vec![cache[0].clone(); times];
            }
            state.before.iter_mut().for_each(|before| *before = before.repeat(times));
            state.scratch = Scratch::new(layer, times);
        }
        self.batch = times;
        true
    }
}
