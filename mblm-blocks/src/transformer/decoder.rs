//! Incremental decoding of the Transformer: cached keys and values, and the one position that the token shift needs.

use mblm_core::Result;
use mblm_core::block::StageDecoder;
use mblm_core::layer::Dims;
use mblm_core::ops::linear::{self, Into};
use mblm_core::ops::{attention, gelu};

use super::layer::TransformerLayer;
use super::{EPS, TransformerModel};
use mblm_core::ops::rms_norm::RmsNorm;

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

impl LayerState {
    fn new(layer: &TransformerLayer, batch: usize) -> Self {
        let zeros = |width: usize| vec![0.0; batch * width];
        let (dim, inner) = (layer.dim, layer.inner());
        LayerState {
            keys: vec![vec![]; batch],
            values: vec![vec![]; batch],
            before: [zeros(dim), zeros(dim)],
            scratch: Scratch {
                shifted: zeros(dim),
                normed: zeros(dim),
                qkv: zeros(3 * inner),
                query: zeros(inner),
                attended: zeros(inner),
                up: zeros(layer.wide()),
                wide: zeros(layer.wide()),
            },
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
        linear::step(attended, &layer.to_out.values(), None, inner, Into::Add, x);

        self.norm(1, &layer.ff_gain.values(), x, dim);
        let Scratch { normed, up, wide, .. } = &mut self.scratch;
        linear::step(normed, &layer.up.values(), Some(&layer.up_bias.values()), dim, Into::Set, up);
        gelu::forward(up, None, wide);
        linear::step(wide, &layer.down.values(), Some(&layer.down_bias.values()), layer.wide(), Into::Add, x);
    }

    /// Computes the query and appends key and value to the cache.
    fn project(&mut self, layer: &TransformerLayer, position: usize, inner: usize) {
        let batch = self.scratch.query.len() / inner;
        let Scratch { normed, qkv, query, .. } = &mut self.scratch;
        let (q, kv) = qkv.split_at_mut(batch * inner);
        linear::step(normed, &layer.to_q.values(), None, layer.dim, Into::Set, q);
        linear::step(normed, &layer.to_kv.values(), None, layer.dim, Into::Set, kv);
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
}
