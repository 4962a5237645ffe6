//! One layer, `x + mixer(norm(x))`, as one fused function with its backward.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::{Mat, MatMut, Update, matmul};
use mblm_sdk::layer::{Context, Layer, param_like};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::conv1d::Conv1d;
use mblm_sdk::ops::decoding::Window;
use mblm_sdk::ops::linear;
use mblm_sdk::ops::on_device;
use mblm_sdk::ops::rms_norm::{Eps, RmsNorm};
use mblm_sdk::ops::selective_scan::{Grads, Inputs, ParamGrads, SelectiveScan, selective_scan_from};
use mblm_sdk::parallel::{self, Shared, Threads};
use mblm_sdk::rows::{Rows, RowsMut};
use mblm_sdk::{Init, Param, ParamScope, Result};

use super::Sizes;

const EPS: Eps = Eps::Inside(1e-5);

/// The parameters of a layer.
pub(super) struct MambaLayer {
    pub(super) sizes: Sizes,
    /// `(D)`
    pub(super) norm: Arc<Param>,
    /// `(2 E, D)`: the scan's input and the gate.
    pub(super) in_proj: Arc<Param>,
    /// `(E, 1, K)`
    conv_weight: Arc<Param>,
    /// `(E)`
    conv_bias: Arc<Param>,
    /// `(R + 2 N, E)`: step size, B and C.
    pub(super) x_proj: Arc<Param>,
    /// `(E, R)`
    pub(super) dt_weight: Arc<Param>,
    /// `(E)`
    dt_bias: Arc<Param>,
    /// `(E, N)`
    a_log: Arc<Param>,
    /// `(E)`
    d: Arc<Param>,
    /// `(D, E)`
    pub(super) out_proj: Arc<Param>,
}

impl MambaLayer {
    pub(super) fn new(sizes: Sizes, params: &mut ParamScope) -> Result<Self> {
        let Sizes { dim, inner, d_state, d_conv, dt_rank } = sizes;
        let norm = params.sub("norm").param("weight", &[dim], Init::Const(1.0))?;
        let mut params = params.sub("mixer");
        let dt_init = Init::Uniform((dt_rank as f32).powf(-0.5));
        Ok(MambaLayer {
            sizes,
            norm,
            in_proj: params.sub("in_proj").weight("weight", &[2 * inner, dim], Init::linear(dim))?,
            conv_weight: params.sub("conv1d").weight("weight", &[inner, 1, d_conv], Init::linear(d_conv))?,
            conv_bias: params.sub("conv1d").param("bias", &[inner], Init::linear(d_conv))?,
            x_proj: params.sub("x_proj").weight("weight", &[sizes.dbc(), inner], Init::linear(inner))?,
            dt_weight: params.sub("dt_proj").weight("weight", &[inner, dt_rank], dt_init)?,
            dt_bias: params.sub("dt_proj").param("bias", &[inner], Init::InverseSoftplusDt)?,
            a_log: params.param("A_log", &[inner, d_state], Init::LogRange)?,
            d: params.param("D", &[inner], Init::Const(1.0))?,
            out_proj: params.sub("out_proj").weight("weight", &[dim, inner], Init::linear(inner))?,
        })
    }

    pub(super) fn norm<'a>(&self, gain: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm { gain, eps: EPS, shift: false }
    }

    pub(super) fn conv(&self) -> Conv1d {
        Conv1d::new(&self.conv_weight.values(), &self.conv_bias.values())
    }

    pub(super) fn scan(&self) -> SelectiveScan {
        SelectiveScan::new(&self.a_log.values(), &self.d.values(), &self.dt_bias.values())
    }

    /// The layer's norm of the whole input.
    pub(super) fn normed(&self, x: &[f32], context: Context) -> Buffer {
        let mut normed = Buffer::take(x.len());
        self.norm(&self.norm.values()).forward(x, context.dims, &mut normed);
        normed
    }
}

impl Sizes {
    /// The scan's inputs from the buffers they lie in.
    pub(super) fn inputs<'a>(&self, xz: &'a [f32], x: &'a [f32], dt: &'a [f32], dbc: &'a [f32]) -> Inputs<'a> {
        let (b, c) = (self.dt_rank..self.dt_rank + self.d_state, self.dt_rank + self.d_state..self.dbc());
        Inputs {
            x,
            dt,
            b: Rows::columns(dbc, self.dbc(), b),
            c: Rows::columns(dbc, self.dbc(), c),
            z: Rows::columns(xz, 2 * self.inner, self.inner..2 * self.inner),
        }
    }

    /// The convolution's input.
    pub(super) fn conv_input<'a>(&self, xz: &'a [f32]) -> Rows<'a> {
        Rows::columns(xz, 2 * self.inner, 0..self.inner)
    }
}

/// What forward keeps, `R = B S` rows each.
pub(super) struct Tape {
    /// `(R, 2 E)`
    xz: Buffer,
    /// `(R, E)`: after the convolution.
    x: Buffer,
    /// `(R, dt_rank + 2 N)`
    dbc: Buffer,
    /// `(R, E)`: step sizes before bias and softplus.
    dt: Buffer,
    /// `(R, E)`: after the gate.
    y: Buffer,
    /// The scan's states at chunk starts, of each group of sequences.
    states: Vec<Buffer>,
}

/// What the next positions need of those before.
#[derive(Default)]
pub(super) struct Past {
    window: Window,
    state: Option<Tensor>,
}

impl MambaLayer {
    /// The layer by tensors; after `past`, if these are the next positions of a sequence that is decoded.
    fn compose(&self, x: &Tensor, mode: Mode, mut past: Option<&mut Past>) -> Result<Tensor> {
        let Sizes { inner, d_state, dt_rank, .. } = self.sizes;
        let get = |param: &Arc<Param>| param_like(param, x, mode);
        let normed = on_device::rms_norm(x, &get(&self.norm)?, EPS, false)?;
        let xz = on_device::linear(&normed, &get(&self.in_proj)?, None)?;
        let z = xz.narrow(2, inner, inner)?;
        let (conv_weight, conv_bias) = (get(&self.conv_weight)?, get(&self.conv_bias)?);
        let u = match &mut past {
            Some(past) => past.window.conv1d_silu(&xz, 0, &conv_weight, &conv_bias)?,
            None => on_device::conv1d_silu(&xz, 0, &conv_weight, &conv_bias)?,
        };
        let dbc = on_device::linear(&u, &get(&self.x_proj)?, None)?;
        let (b, c) = (dbc.narrow(2, dt_rank, d_state)?, dbc.narrow(2, dt_rank + d_state, d_state)?);
        let dt = on_device::linear(&dbc.narrow(2, 0, dt_rank)?, &get(&self.dt_weight)?, None)?;
        let inputs = [&u, &dt, &b, &c, &z];
        let (a_log, d, dt_bias) = (get(&self.a_log)?, get(&self.d)?, get(&self.dt_bias)?);
        let y = match past {
            Some(past) => selective_scan_from(&mut past.state, inputs, &a_log, &d, &dt_bias)?,
            None => on_device::selective_scan(inputs, &a_log, &d, &dt_bias)?,
        };
        Ok((x + on_device::linear(&y, &get(&self.out_proj)?, None)?)?)
    }

    /// The next positions, `(B, S, D)`.
    pub(super) fn advance(&self, x: &Tensor, past: &mut Past) -> Result<Tensor> {
        self.compose(x, Mode::Eval, Some(past))
    }
}

impl Layer for MambaLayer {
    type Tape = Tape;

    fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        self.compose(x, mode, None)
    }

    fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) -> Tape {
        let sizes @ Sizes { dim, inner, .. } = self.sizes;
        let rows = context.dims.rows();
        let mut xz = Buffer::take(rows * 2 * inner);
        linear::forward(&self.normed(x, context), &self.in_proj.values(), dim, Update::Set, &mut xz);
        let mut u = Buffer::take(rows * inner);
        for (row, Context { dims, .. }) in context.groups() {
            let of = |width: usize| row * width..(row + dims.rows()) * width;
            self.conv().forward(sizes.conv_input(&xz[of(2 * inner)]), dims.seq, &mut u[of(inner)]);
        }
        let (dbc, dt) = self.steps(&u);
        let mut gated = Buffer::take(rows * inner);
        let scan = |(row, Context { dims, .. }): (usize, Context)| {
            let of = |width: usize| row * width..(row + dims.rows()) * width;
            let (xz, dbc) = (&xz[of(2 * inner)], &dbc[of(sizes.dbc())]);
            let inputs = sizes.inputs(xz, &u[of(inner)], &dt[of(inner)], dbc);
            self.scan().forward(&inputs, dims.seq, &mut gated[of(inner)])
        };
        let states = context.groups().map(scan).collect();
        parallel::copy(x, y);
        linear::forward(&gated, &self.out_proj.values(), inner, Update::Add, y);
        Tape { xz, x: u, dbc, dt, y: gated, states }
    }

    fn backward(&self, x: &[f32], context: Context, tape: Tape, dy: &[f32], dx: &mut [f32]) {
        let Sizes { dim, inner, .. } = self.sizes;
        let rows = context.dims.rows();
        let mut dgated = Buffer::take(rows * inner);
        linear::backward_input(dy, &self.out_proj.values(), inner, Update::Set, &mut dgated);
        linear::backward_weight(dy, &tape.y, inner, &mut self.out_proj.grad_mut());

        let mut dxz = Buffer::take(rows * 2 * inner);
        let mut du = Buffer::take(rows * inner);
        self.backward_scan(&tape, context, &dgated, &mut dxz, &mut du);
        let (mut dweight, mut dbias) = (self.conv_weight.grad_mut(), self.conv_bias.grad_mut());
        for (row, Context { dims, .. }) in context.groups() {
            let of = |width: usize| row * width..(row + dims.rows()) * width;
            let input = self.sizes.conv_input(&tape.xz[of(2 * inner)]);
            let dinput = RowsMut::columns(Shared::new(&mut dxz[of(2 * inner)]), 2 * inner, 0..inner);
            self.conv().backward(input, dims.seq, &mut du[of(inner)], dinput, &mut dweight, &mut dbias);
        }

        let normed = self.normed(x, context);
        linear::backward_weight(&dxz, &normed, dim, &mut self.in_proj.grad_mut());
        let mut dnormed = normed;
        linear::backward_input(&dxz, &self.in_proj.values(), dim, Update::Set, &mut dnormed);
        parallel::copy(dy, dx);
        self.norm(&self.norm.values()).backward(x, context.dims, &dnormed, dx, &mut self.norm.grad_mut());
    }
}

impl MambaLayer {
    /// From the convolution's output: the low-rank steps with B and C, and the step sizes before bias and softplus.
    pub(super) fn steps(&self, u: &[f32]) -> (Buffer, Buffer) {
        let Sizes { inner, dt_rank, .. } = self.sizes;
        let rows = u.len() / inner;
        let (mut dbc, mut dt) = (Buffer::take(rows * self.sizes.dbc()), Buffer::take(rows * inner));
        linear::forward(u, &self.x_proj.values(), inner, Update::Set, &mut dbc);
        let weight = self.dt_weight.values();
        let low = Rows::columns(&dbc, self.sizes.dbc(), 0..dt_rank).all();
        let wide = Mat::new(&weight, inner, dt_rank).t();
        matmul(MatMut::new(&mut dt, rows, inner), Update::Set, low, wide, Threads::All);
        (dbc, dt)
    }

    /// From the gradient of the scan's gated output to those of its inputs: the gate's half of `dxz`, and `du`.
    fn backward_scan(&self, tape: &Tape, context: Context, dgated: &[f32], dxz: &mut [f32], du: &mut [f32]) {
        let sizes @ Sizes { inner, d_state, dt_rank, .. } = self.sizes;
        let rows = du.len() / inner;
        let mut ddt = Buffer::take(rows * inner);
        let mut ddbc = Buffer::take(rows * sizes.dbc());
        let (mut a_log, mut d, mut dt_bias) = (self.a_log.grad_mut(), self.d.grad_mut(), self.dt_bias.grad_mut());
        let mut params = ParamGrads { a_log: &mut a_log, d: &mut d, dt_bias: &mut dt_bias };
        for ((row, Context { dims, .. }), states) in context.groups().zip(&tape.states) {
            let of = |width: usize| row * width..(row + dims.rows()) * width;
            let (narrow, wide, low) = (of(inner), of(2 * inner), of(sizes.dbc()));
            let shared = Shared::new(&mut ddbc[low.clone()]);
            let grads = Grads {
                x: &mut du[narrow.clone()],
                dt: &mut ddt[narrow.clone()],
                b: RowsMut::columns(shared, sizes.dbc(), dt_rank..dt_rank + d_state),
                c: RowsMut::columns(shared, sizes.dbc(), dt_rank + d_state..sizes.dbc()),
                z: RowsMut::columns(Shared::new(&mut dxz[wide.clone()]), 2 * inner, inner..2 * inner),
            };
            let (x, dt) = (&tape.x[narrow.clone()], &tape.dt[narrow.clone()]);
            let inputs = sizes.inputs(&tape.xz[wide], x, dt, &tape.dbc[low]);
            self.scan().backward(&inputs, dims.seq, states, &dgated[narrow], grads, &mut params);
        }

        let low = Rows::columns(&tape.dbc, sizes.dbc(), 0..dt_rank).all();
        let ddt = Mat::new(&ddt, rows, inner);
        let mut dweight = self.dt_weight.grad_mut();
        matmul(MatMut::new(&mut dweight, inner, dt_rank), Update::Add, ddt.t(), low, Threads::All);
        let weight = self.dt_weight.values();
        let dlow = MatMut::strided(&mut ddbc, rows, dt_rank, sizes.dbc());
        matmul(dlow, Update::Set, ddt, Mat::new(&weight, inner, dt_rank), Threads::All);

        linear::backward_weight(&ddbc, &tape.x, inner, &mut self.x_proj.grad_mut());
        linear::backward_input(&ddbc, &self.x_proj.values(), inner, Update::Add, du);
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
        for (batch, seq, dim, d_state, expand) in
            [(1, 2, 3, 1, 1), (2, 9, 17, 5, 2), (1, 130, 8, 4, 3), (100, 9, 10, 3, 2), (2, 33, 32, 16, 2)]
        {
            let mut store = ParamStore::new(0);
            let dt_rank = usize::div_ceil(dim, 16);
            let sizes = Sizes { dim, inner: expand * dim, d_state, d_conv: 4, dt_rank };
            let layer = Arc::new(MambaLayer::new(sizes, &mut store.root()).unwrap());
            perturb(&store);
            check_layer(&layer, &store, Dims { batch, seq, dim }, None, Mode::train(0));
        }
    }
}
