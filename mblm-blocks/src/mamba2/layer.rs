//! One layer, `x + mixer(norm(x))`, as one fused function with its backward.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::Update;
use mblm_sdk::layer::{Context, Layer, param_like};
use mblm_sdk::mode::{Mode, stream};
use mblm_sdk::ops::conv1d::Conv1d;
use mblm_sdk::ops::decoding::Window;
use mblm_sdk::ops::dropout::{self, dropout_composed};
use mblm_sdk::ops::gated_rms_norm::GatedRmsNorm;
use mblm_sdk::ops::linear;
use mblm_sdk::ops::on_device;
use mblm_sdk::ops::rms_norm::{Eps, RmsNorm};
use mblm_sdk::ops::ssd::{self, Grads, Inputs, ParamGrads, Ssd, ssd_from};
use mblm_sdk::parallel::{self, Shared};
use mblm_sdk::rows::{Rows, RowsMut};
use mblm_sdk::simd;
use mblm_sdk::{Init, Param, ParamScope, Result};

use super::Sizes;

const EPS: f32 = 1e-5;
pub(super) const NORM_EPS: Eps = Eps::Inside(EPS);

/// The parameters of a layer.
pub(super) struct Mamba2Layer {
    sizes: Sizes,
    /// Of the mixer's output, and its random stream.
    dropout: (f32, u64),
    /// `(D)`
    pub(super) norm: Arc<Param>,
    /// `(2 E + 2 N + H, D)`: the gate, x, B, C and step sizes.
    pub(super) in_proj: Arc<Param>,
    /// `(E + 2 N, 1, K)`
    conv_weight: Arc<Param>,
    /// `(E + 2 N)`
    conv_bias: Arc<Param>,
    /// `(H)`
    dt_bias: Arc<Param>,
    /// `(H)`
    a_log: Arc<Param>,
    /// `(H)`
    d: Arc<Param>,
    /// `(E)`
    gate_norm: Arc<Param>,
    /// `(D, E)`
    pub(super) out_proj: Arc<Param>,
}

impl Mamba2Layer {
    /// `out_gain` scales the initial output projection, so that the residual stream does not grow with depth.
    pub(super) fn new(sizes: Sizes, out_gain: f32, dropout: f32, params: &mut ParamScope) -> Result<Self> {
        let Sizes { dim, heads, d_conv, .. } = sizes;
        let (inner, conv) = (sizes.inner(), sizes.conv());
        let dropout = (dropout, stream(params.prefix()));
        let norm = params.sub("norm").param("weight", &[dim], Init::Const(1.0))?;
        let mut params = params.sub("mixer");
        let out_start = Init::linear(inner).times(out_gain);
        Ok(Mamba2Layer {
            sizes,
            dropout,
            norm,
            in_proj: params.sub("in_proj").weight("weight", &[sizes.proj(), dim], Init::linear(dim))?,
            conv_weight: params.sub("conv1d").weight("weight", &[conv, 1, d_conv], Init::linear(d_conv))?,
            conv_bias: params.sub("conv1d").param("bias", &[conv], Init::linear(d_conv))?,
            dt_bias: params.param("dt_bias", &[heads], Init::InverseSoftplusDt)?,
            a_log: params.param("A_log", &[heads], Init::LogUniform(1.0, 16.0))?,
            d: params.param("D", &[heads], Init::Const(1.0))?,
            gate_norm: params.sub("norm").param("weight", &[inner], Init::Const(1.0))?,
            out_proj: params.sub("out_proj").weight("weight", &[dim, inner], out_start)?,
        })
    }

    pub(super) fn norm<'a>(&self, gain: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm { gain, eps: NORM_EPS, shift: false }
    }

    pub(super) fn conv(&self) -> Conv1d {
        Conv1d::new(&self.conv_weight.values(), &self.conv_bias.values())
    }

    /// Lends the state space's parameters to `work`.
    pub(super) fn with_ssd<R>(&self, work: impl FnOnce(Ssd) -> R) -> R {
        let (a_log, d, dt_bias) = (self.a_log.values(), self.d.values(), self.dt_bias.values());
        work(Ssd { a_log: &a_log, d: &d, dt_bias: &dt_bias })
    }

    /// Lends the gated norm to `work`.
    pub(super) fn with_gate<R>(&self, work: impl FnOnce(GatedRmsNorm) -> R) -> R {
        work(GatedRmsNorm { gain: &self.gate_norm.values(), eps: EPS })
    }

    /// The layer's norm of the whole input.
    pub(super) fn normed(&self, x: &[f32], context: Context) -> Buffer {
        let mut normed = Buffer::take(x.len());
        self.norm(&self.norm.values()).forward(x, context.dims, &mut normed);
        normed
    }

    /// The gated norm of `y`.
    pub(super) fn gated(&self, proj: &[f32], y: &[f32]) -> Buffer {
        let mut gated = Buffer::take(y.len());
        self.with_gate(|gate| gate.forward(y, self.sizes.gate(proj), &mut gated));
        gated
    }
}

impl Sizes {
    /// The state space's inputs from the projection and the convolution's output.
    pub(super) fn inputs<'a>(&self, proj: &'a [f32], xbc: &'a [f32]) -> Inputs<'a> {
        let (inner, n) = (self.inner(), self.d_state);
        let columns = |range| Rows::columns(xbc, self.conv(), range);
        Inputs {
            x: columns(0..inner),
            dt: Rows::columns(proj, self.proj(), inner + self.conv()..self.proj()),
            b: columns(inner..inner + n),
            c: columns(inner + n..inner + 2 * n),
        }
    }

    /// The gate.
    pub(super) fn gate<'a>(&self, proj: &'a [f32]) -> Rows<'a> {
        Rows::columns(proj, self.proj(), 0..self.inner())
    }

    /// The convolution's input.
    pub(super) fn conv_input<'a>(&self, proj: &'a [f32]) -> Rows<'a> {
        Rows::columns(proj, self.proj(), self.inner()..self.inner() + self.conv())
    }
}

/// What forward keeps, `R = B S` rows each.
pub(super) struct Tape {
    /// `(R, 2 E + 2 N + H)`
    proj: Buffer,
    /// `(R, E + 2 N)`: after the convolution.
    xbc: Buffer,
    /// `(R, E)`
    y: Buffer,
    /// Of each group of sequences.
    ssd: Vec<ssd::Tape>,
}

/// What the next positions need of those before.
#[derive(Default)]
pub(super) struct Past {
    window: Window,
    state: Option<Tensor>,
}

impl Mamba2Layer {
    /// The layer by tensors; after `past`, if these are the next positions of a sequence that is decoded.
    fn compose(&self, x: &Tensor, mode: Mode, mut past: Option<&mut Past>) -> Result<Tensor> {
        let (inner, conv, n) = (self.sizes.inner(), self.sizes.conv(), self.sizes.d_state);
        let get = |param: &Arc<Param>| param_like(param, x, mode);
        let normed = on_device::rms_norm(x, &get(&self.norm)?, NORM_EPS, false)?;
        let proj = on_device::linear(&normed, &get(&self.in_proj)?, None)?;
        let (conv_weight, conv_bias) = (get(&self.conv_weight)?, get(&self.conv_bias)?);
        let xbc = match &mut past {
            Some(past) => past.window.conv1d_silu(&proj, inner, &conv_weight, &conv_bias)?,
            None => on_device::conv1d_silu(&proj, inner, &conv_weight, &conv_bias)?,
        };
        let (b, c) = (xbc.narrow(2, inner, n)?, xbc.narrow(2, inner + n, n)?);
        let dt = proj.narrow(2, inner + conv, self.sizes.heads)?;
        let u = xbc.narrow(2, 0, inner)?;
        let inputs = [&u, &dt, &b, &c];
        let (a_log, d, dt_bias) = (get(&self.a_log)?, get(&self.d)?, get(&self.dt_bias)?);
        let y = match past {
            Some(past) => ssd_from(&mut past.state, inputs, &a_log, &d, &dt_bias)?,
            None => on_device::ssd(inputs, &a_log, &d, &dt_bias)?,
        };
        let gated = on_device::gated_rms_norm(&y, &proj.narrow(2, 0, inner)?, &get(&self.gate_norm)?, EPS)?;
        let mixed = on_device::linear(&gated, &get(&self.out_proj)?, None)?;
        Ok((x + dropout_composed(&mixed, mode.dropout(self.dropout.0, self.dropout.1))?)?)
    }

    /// The next positions, `(B, S, D)`.
    pub(super) fn advance(&self, x: &Tensor, past: &mut Past) -> Result<Tensor> {
        self.compose(x, Mode::Eval, Some(past))
    }
}

impl Layer for Mamba2Layer {
    type Tape = Tape;

    fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        self.compose(x, mode, None)
    }

    fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) -> Tape {
        let sizes = self.sizes;
        let (rows, inner) = (context.dims.rows(), sizes.inner());
        let mut proj = Buffer::take(rows * sizes.proj());
        linear::forward(&self.normed(x, context), &self.in_proj.values(), sizes.dim, Update::Set, &mut proj);
        let mut xbc = Buffer::take(rows * sizes.conv());
        let mut scanned = Buffer::take(rows * inner);
        let scan = |(row, Context { dims, .. }): (usize, Context)| {
            let of = |width: usize| row * width..(row + dims.rows()) * width;
            let (proj, xbc, y) = (&proj[of(sizes.proj())], &mut xbc[of(sizes.conv())], &mut scanned[of(inner)]);
            self.conv().forward(sizes.conv_input(proj), dims.seq, xbc);
            self.with_ssd(|ssd| ssd.forward(&sizes.inputs(proj, xbc), dims.seq, y))
        };
        let ssd = context.groups().map(scan).collect();
        let gated = self.gated(&proj, &scanned);
        match context.mode.dropout(self.dropout.0, self.dropout.1) {
            Some(dropout) => {
                linear::forward(&gated, &self.out_proj.values(), inner, Update::Set, y);
                dropout::apply(dropout, y);
                simd::add(x, y);
            }
            None => {
                parallel::copy(x, y);
                linear::forward(&gated, &self.out_proj.values(), inner, Update::Add, y);
            }
        }
        Tape { proj, xbc, y: scanned, ssd }
    }

    fn backward(&self, x: &[f32], context: Context, tape: Tape, dy: &[f32], dx: &mut [f32]) {
        parallel::copy(dy, dx);
        if let Some(dropout) = context.mode.dropout(self.dropout.0, self.dropout.1) {
            dropout::apply(dropout, dx);
        }
        // dx holds the gradient of the mixer's output for now.
        let dproj = self.backward_mixer(&tape, context, dx);
        let normed = self.normed(x, context);
        linear::backward_weight(&dproj, &normed, self.sizes.dim, &mut self.in_proj.grad_mut());
        let mut dnormed = normed;
        linear::backward_input(&dproj, &self.in_proj.values(), self.sizes.dim, Update::Set, &mut dnormed);
        parallel::copy(dy, dx);
        self.norm(&self.norm.values()).backward(x, context.dims, &dnormed, dx, &mut self.norm.grad_mut());
    }
}

impl Mamba2Layer {
    /// From the gradient of the mixer's output to that of the input projection's.
    fn backward_mixer(&self, tape: &Tape, context: Context, dmixed: &[f32]) -> Buffer {
        let sizes @ Sizes { d_state: n, .. } = self.sizes;
        let rows = context.dims.rows();
        let (inner, conv, width) = (sizes.inner(), sizes.conv(), sizes.proj());
        let gated = self.gated(&tape.proj, &tape.y);
        linear::backward_weight(dmixed, &gated, inner, &mut self.out_proj.grad_mut());
        let mut dscanned = gated;
        linear::backward_input(dmixed, &self.out_proj.values(), inner, Update::Set, &mut dscanned);

        let (mut dproj, mut dxbc) = (Buffer::take(rows * width), Buffer::take(rows * conv));
        let dz = RowsMut::columns(Shared::new(&mut dproj), width, 0..inner);
        let mut dgain = self.gate_norm.grad_mut();
        self.with_gate(|gate| gate.backward(&tape.y, sizes.gate(&tape.proj), &mut dscanned, dz, &mut dgain));

        let (mut a_log, mut d, mut dt_bias) = (self.a_log.grad_mut(), self.d.grad_mut(), self.dt_bias.grad_mut());
        let mut params = ParamGrads { a_log: &mut a_log, d: &mut d, dt_bias: &mut dt_bias };
        let (mut dweight, mut dbias) = (self.conv_weight.grad_mut(), self.conv_bias.grad_mut());
        for ((row, Context { dims, .. }), ssd_tape) in context.groups().zip(&tape.ssd) {
            let of = |width: usize| row * width..(row + dims.rows()) * width;
            let (proj, xbc) = (&tape.proj[of(width)], &tape.xbc[of(conv)]);
            let (dproj, dxbc) = (&mut dproj[of(width)], &mut dxbc[of(conv)]);
            let dproj = Shared::new(dproj);
            let dxbc_shared = Shared::new(dxbc);
            let columns = |range| RowsMut::columns(dxbc_shared, conv, range);
            let grads = Grads {
                x: columns(0..inner),
                dt: RowsMut::columns(dproj, width, inner + conv..width),
                b: columns(inner..inner + n),
                c: columns(inner + n..conv),
            };
            let inputs = sizes.inputs(proj, xbc);
            self.with_ssd(|ssd| ssd.backward(&inputs, dims.seq, ssd_tape, &dscanned[of(inner)], grads, &mut params));
            let dconv = RowsMut::columns(dproj, width, inner..inner + conv);
            self.conv().backward(sizes.conv_input(proj), dims.seq, dxbc, dconv, &mut dweight, &mut dbias);
        }
        dproj
    }
}

#[cfg(test)]
mod tests {
    use mblm_sdk::ParamStore;
    use mblm_sdk::layer::Dims;
    use mblm_sdk::testing::{check_layer, perturb};

    use super::*;

    #[test]
    fn fused_equals_composed() {
        // Not one head alone: the gated norm takes its scale out, and all that is left of D's gradient is rounding.
        for (batch, seq, dim, heads, headdim, d_state, dropout) in [
            (1, 3, 3, 3, 2, 1, 0.0),
            (2, 9, 17, 2, 17, 5, 0.4),
            (1, 130, 8, 6, 4, 4, 0.0),
            (100, 9, 10, 4, 5, 3, 0.0),
            (2, 65, 32, 4, 16, 16, 0.2),
        ] {
            let mut store = ParamStore::new(0);
            let sizes = Sizes { dim, heads, headdim, d_state, d_conv: 4 };
            let layer = Arc::new(Mamba2Layer::new(sizes, 0.7, dropout, &mut store.root()).unwrap());
            perturb(&store);
            check_layer(&layer, &store, Dims { batch, seq, dim }, None, Mode::train(0));
        }
    }
}
