//! The recurrent form: per layer the last inputs of the convolution and the state of the scan.

use std::sync::Arc;

use mblm_sdk::Result;
use mblm_sdk::block::StageDecoder;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::Update;
use mblm_sdk::layer::{Context, Dims};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::conv1d::Conv1d;
use mblm_sdk::ops::linear;
use mblm_sdk::ops::selective_scan::SelectiveScan;

use super::Sizes;
use super::layer::MambaLayer;
use crate::passes::prefill;

/// What a layer keeps from one position to the next.
struct LayerState<'a> {
    layer: &'a MambaLayer,
    conv: Conv1d,
    scan: SelectiveScan,
    /// `(batch, K - 1, E)`
    window: Buffer,
    /// `(batch, G, N, 16)`
    state: Buffer,
}

/// Memory of a step.
struct Scratch {
    normed: Buffer,
    xz: Buffer,
    x: Buffer,
    dbc: Buffer,
    low: Buffer,
    dt: Buffer,
    y: Buffer,
}

pub(super) struct Decoder<'a> {
    layers: Vec<LayerState<'a>>,
    sizes: Sizes,
    scratch: Scratch,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(layers: &'a [Arc<MambaLayer>], sizes: Sizes, batch: usize) -> Self {
        let state = |layer: &'a Arc<MambaLayer>| {
            let (conv, scan) = (layer.conv(), layer.scan());
            let (window, state) = (Buffer::zeros(conv.window_len(batch)), Buffer::zeros(batch * scan.state_len()));
            LayerState { layer, conv, scan, window, state }
        };
        Decoder { layers: layers.iter().map(state).collect(), sizes, scratch: Scratch::new(sizes, batch) }
    }
}

impl Scratch {
    fn new(sizes: Sizes, batch: usize) -> Self {
        let take = |width: usize| Buffer::take(batch * width);
        Scratch {
            normed: take(sizes.dim),
            xz: take(2 * sizes.inner),
            x: take(sizes.inner),
            dbc: take(sizes.dbc()),
            low: take(sizes.dt_rank),
            dt: take(sizes.inner),
            y: take(sizes.inner),
        }
    }
}

impl StageDecoder for Decoder<'_> {
    fn reset(&mut self) {
        for layer in &mut self.layers {
            layer.window.fill(0.0);
            layer.state.fill(0.0);
        }
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
        y.copy_from_slice(x);
        self.layers.iter_mut().for_each(|layer| layer.step(self.sizes, &mut self.scratch, y));
        Ok(())
    }

    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        prefill(self, x, y, seq, self.sizes.dim, |decoder, dims, mut x| {
            decoder.layers.iter_mut().for_each(|layer| layer.pass(decoder.sizes, dims, &mut x));
            x
        })
    }

    fn repeat(&mut self, times: usize) -> bool {
        for layer in &mut self.layers {
            layer.window = layer.window.repeated(times);
            layer.state = layer.state.repeated(times);
        }
        self.scratch = Scratch::new(self.sizes, times);
        true
    }
}

impl LayerState<'_> {
    /// Adds the mixer's output to `x`, `(batch, D)`.
    fn step(&mut self, sizes: Sizes, scratch: &mut Scratch, x: &mut [f32]) {
        let Sizes { dim, inner, dt_rank, .. } = sizes;
        let Scratch { normed, xz, x: u, dbc, low, dt, y } = scratch;
        let dims = Dims { batch: x.len() / dim, seq: 1, dim };
        self.layer.norm(&self.layer.norm.values()).forward(x, dims, normed);
        linear::step(normed, &self.layer.in_proj.values(), None, dim, Update::Set, xz);
        self.conv.step(sizes.conv_input(xz), &mut self.window, u);
        linear::step(u, &self.layer.x_proj.values(), None, inner, Update::Set, dbc);
        for (low, dbc) in low.chunks_exact_mut(dt_rank).zip(dbc.chunks_exact(sizes.dbc())) {
            low.copy_from_slice(&dbc[..dt_rank]);
        }
        linear::step(low, &self.layer.dt_weight.values(), None, dt_rank, Update::Set, dt);
        self.scan.step(&sizes.inputs(xz, u, dt, dbc), &mut self.state, y);
        linear::step(y, &self.layer.out_proj.values(), None, inner, Update::Add, x);
    }

    /// Adds the mixer's output to the next positions `x`, `(batch, seq, D)`.
    fn pass(&mut self, sizes: Sizes, dims: Dims, x: &mut [f32]) {
        let Sizes { dim, inner, .. } = sizes;
        let context = Context { dims, packed: &[], mask: None, mode: Mode::Eval };
        let take = |width: usize| Buffer::take(dims.rows() * width);
        let (mut xz, mut u, mut gated) = (take(2 * inner), take(inner), take(inner));
        linear::forward(&self.layer.normed(x, context), &self.layer.in_proj.values(), dim, Update::Set, &mut xz);
        self.conv.advance(sizes.conv_input(&xz), dims.seq, &mut self.window, &mut u);
        let (dbc, dt) = self.layer.steps(&u);
        self.scan.advance(&sizes.inputs(&xz, &u, &dt, &dbc), dims.seq, &mut self.state, &mut gated);
        linear::forward(&gated, &self.layer.out_proj.values(), inner, Update::Add, x);
    }
}
