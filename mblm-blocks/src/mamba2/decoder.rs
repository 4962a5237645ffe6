//! The recurrent form: per layer the last inputs of the convolution and the state of every head.

use std::sync::Arc;

use mblm_sdk::Result;
use mblm_sdk::block::StageDecoder;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::Update;
use mblm_sdk::layer::{Context, Dims};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::conv1d::Conv1d;
use mblm_sdk::ops::linear;
use mblm_sdk::ops::norm_layer::RmsNormLayer;

use super::Sizes;
use super::layer::Mamba2Layer;
use crate::passes::prefill;

/// What a layer keeps from one position to the next.
struct LayerState<'a> {
    layer: &'a Mamba2Layer,
    conv: Conv1d,
    /// `(batch, K - 1, E + 2 N)`
    window: Buffer,
    /// `(batch, E, N)`
    state: Buffer,
}

/// Memory of a step.
struct Scratch {
    /// `(batch, D)`: the residual stream.
    x: Buffer,
    normed: Buffer,
    proj: Buffer,
    xbc: Buffer,
    y: Buffer,
    gated: Buffer,
}

pub(super) struct Decoder<'a> {
    layers: Vec<LayerState<'a>>,
    norm_f: &'a RmsNormLayer,
    sizes: Sizes,
    scratch: Scratch,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(layers: &'a [Arc<Mamba2Layer>], norm_f: &'a RmsNormLayer, sizes: Sizes, batch: usize) -> Self {
        let state = |layer: &'a Arc<Mamba2Layer>| {
            let conv = layer.conv();
            let window = Buffer::zeros(conv.window_len(batch));
            LayerState { layer, conv, window, state: Buffer::zeros(batch * sizes.inner() * sizes.d_state) }
        };
        Decoder { layers: layers.iter().map(state).collect(), norm_f, sizes, scratch: Scratch::new(sizes, batch) }
    }
}

impl Scratch {
    fn new(sizes: Sizes, batch: usize) -> Self {
        let take = |width: usize| Buffer::take(batch * width);
        Scratch {
            x: take(sizes.dim),
            normed: take(sizes.dim),
            proj: take(sizes.proj()),
            xbc: take(sizes.conv()),
            y: take(sizes.inner()),
            gated: take(sizes.inner()),
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
        self.scratch.x.copy_from_slice(x);
        self.layers.iter_mut().for_each(|layer| layer.step(self.sizes, &mut self.scratch));
        self.norm_f.step(&self.scratch.x, self.sizes.dim, y);
        Ok(())
    }

    fn prefill(&mut self, x: &[f32], y: &mut [f32], seq: usize) -> Result<()> {
        prefill(self, x, y, seq, self.sizes.dim, |decoder, dims, mut x| {
            decoder.layers.iter_mut().for_each(|layer| layer.pass(decoder.sizes, dims, &mut x));
            let mut normed = Buffer::take(x.len());
            decoder.norm_f.step(&x, dims.dim, &mut normed);
            normed
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
    /// Adds the mixer's output to the residual stream.
    fn step(&mut self, sizes: Sizes, scratch: &mut Scratch) {
        let Scratch { x, normed, proj, xbc, y, gated } = scratch;
        let dims = Dims { batch: x.len() / sizes.dim, seq: 1, dim: sizes.dim };
        self.layer.norm(&self.layer.norm.values()).forward(x, dims, normed);
        linear::step(normed, &self.layer.in_proj.values(), None, sizes.dim, Update::Set, proj);
        self.conv.step(sizes.conv_input(proj), &mut self.window, xbc);
        self.layer.with_ssd(|ssd| ssd.step(&sizes.inputs(proj, xbc), &mut self.state, y));
        self.layer.with_gate(|gate| gate.forward(y, sizes.gate(proj), gated));
        linear::step(gated, &self.layer.out_proj.values(), None, sizes.inner(), Update::Add, x);
    }

    /// Adds the mixer's output to the residual stream of the next positions, `(batch, seq, D)`.
    fn pass(&mut self, sizes: Sizes, dims: Dims, x: &mut [f32]) {
        let context = Context { dims, packed: &[], mask: None, mode: Mode::Eval };
        let take = |width: usize| Buffer::take(dims.rows() * width);
        let (mut proj, mut xbc, mut y) = (take(sizes.proj()), take(sizes.conv()), take(sizes.inner()));
        linear::forward(
            &self.layer.normed(x, context),
            &self.layer.in_proj.values(),
            sizes.dim,
            Update::Set,
            &mut proj,
        );
        self.conv.advance(sizes.conv_input(&proj), dims.seq, &mut self.window, &mut xbc);
        self.layer.with_ssd(|ssd| ssd.advance(&sizes.inputs(&proj, &xbc), dims.seq, &mut self.state, &mut y));
        let gated = self.layer.gated(&proj, &y);
        linear::forward(&gated, &self.layer.out_proj.values(), sizes.inner(), Update::Add, x);
    }
}
