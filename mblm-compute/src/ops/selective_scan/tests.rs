//! The definition against the recurrence, the scan against the definition, and its one-step form.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use mblm_base::random::noise;

use super::*;
use crate::error::Result;
use crate::layer::{Context, Dims, Layer, param_like};
use crate::mode::Mode;
use crate::param::{Init, Param, ParamStore};
use crate::rows::RowsMut;
use crate::testing::{assert_close, check_layer, perturb};

/// A scan whose inputs are packed into one row: x, dt, z, B, C. The output is `(y, 0)`.
struct Packed {
    channels: usize,
    d_state: usize,
    a_log: Arc<Param>,
    d: Arc<Param>,
    dt_bias: Arc<Param>,
}

impl Packed {
    fn new(channels: usize, d_state: usize) -> (ParamStore, Arc<Self>) {
        let mut store = ParamStore::new(0);
        let a_log = store.root().param("a_log", &[channels, d_state], Init::LogRange).unwrap();
        let d = store.root().param("d", &[channels], Init::Const(1.0)).unwrap();
        let dt_bias = store.root().param("dt_bias", &[channels], Init::Uniform(2.0)).unwrap();
        perturb(&store);
        (store, Arc::new(Packed { channels, d_state, a_log, d, dt_bias }))
    }
    fn dim(&self) -> usize {
        3 * self.channels + 2 * self.d_state
    }
    fn kernel(&self) -> SelectiveScan {
        SelectiveScan::new(&self.a_log.values(), &self.d.values(), &self.dt_bias.values())
    }
    /// x and dt, contiguous.
    fn split(&self, packed: &[f32]) -> [Vec<f32>; 2] {
        let (e, dim) = (self.channels, self.dim());
        [0, e].map(|at| packed.chunks_exact(dim).flat_map(|row| row[at..at + e].to_vec()).collect())
    }
    fn inputs<'a>(&self, packed: &'a [f32], [x, dt]: &'a [Vec<f32>; 2]) -> Inputs<'a> {
        let (e, n, dim) = (self.channels, self.d_state, self.dim());
        let columns = |range| Rows::columns(packed, dim, range);
        let (z, b, c) = (columns(2 * e..3 * e), columns(3 * e..3 * e + n), columns(3 * e + n..dim));
        Inputs { x, dt, b, c, z }
    }
}

impl Layer for Packed {
    type Tape = Buffer;
    fn composed(&self, packed: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (e, n) = (self.channels, self.d_state);
        let part = |at, len| packed.narrow(2, at, len);
        let (x, dt, z) = (part(0, e)?, part(e, e)?, part(2 * e, e)?);
        let (b, c) = (part(3 * e, n)?, part(3 * e + n, n)?);
        let [a_log, d, dt_bias] = [&self.a_log, &self.d, &self.dt_bias].map(|p| param_like(p, packed, mode));
        let y = selective_scan_composed([&x, &dt, &b, &c, &z], &a_log?, &d?, &dt_bias?)?;
        Ok(y.pad_with_zeros(2, 0, self.dim() - e)?)
    }
    fn forward(&self, packed: &[f32], context: Context, y: &mut [f32]) -> Buffer {
        let parts = self.split(packed);
        let mut out = vec![f32::NAN; context.dims.rows() * self.channels];
        let tape = self.kernel().forward(&self.inputs(packed, &parts), context.dims.seq, &mut out);
        y.fill(0.0);
        for (y, out) in y.chunks_exact_mut(self.dim()).zip(out.chunks_exact(self.channels)) {
            y[..self.channels].copy_from_slice(out);
        }
        tape
    }
    fn backward(&self, packed: &[f32], context: Context, tape: Buffer, dy: &[f32], dx: &mut [f32]) {
        let (e, n, dim, parts) = (self.channels, self.d_state, self.dim(), self.split(packed));
        let dy: Vec<f32> = dy.chunks_exact(dim).flat_map(|row| row[..e].to_vec()).collect();
        let (mut x, mut dt) = (vec![f32::NAN; dy.len()], vec![f32::NAN; dy.len()]);
        let (mut a_log, mut d, mut bias) = (self.a_log.grad_mut(), self.d.grad_mut(), self.dt_bias.grad_mut());
        let mut params = ParamGrads { a_log: &mut a_log, d: &mut d, dt_bias: &mut bias };
        let shared = Shared::new(dx);
        let columns = |range| RowsMut::columns(shared, dim, range);
        let (z, b, c) = (columns(2 * e..3 * e), columns(3 * e..3 * e + n), columns(3 * e + n..dim));
        let grads = Grads { x: &mut x, dt: &mut dt, b, c, z };
        self.kernel().backward(&self.inputs(packed, &parts), context.dims.seq, &tape, &dy, grads, &mut params);
        for (i, row) in dx.chunks_exact_mut(dim).enumerate() {
            row[..e].copy_from_slice(&x[i * e..(i + 1) * e]);
            row[e..2 * e].copy_from_slice(&dt[i * e..(i + 1) * e]);
        }
    }
}

#[test]
fn fused_equals_composed() {
    // Odd sizes, chunk borders, many short sequences, few channels and several groups per thread.
    for (batch, seq, channels, d_state) in
        [(2, 7, 5, 3), (1, 33, 16, 16), (3, 70, 40, 8), (64, 9, 20, 4), (5, 64, 33, 5)]
    {
        let (store, layer) = Packed::new(channels, d_state);
        check_layer(&layer, &store, Dims { batch, seq, dim: layer.dim() }, None, Mode::train(0));
    }
}

#[test]
fn steps_and_longer_pieces_give_forward() {
    let (batch, seq, channels, d_state) = (2, 75, 19, 3);
    let layer = Packed::new(channels, d_state).1;
    let (kernel, dim) = (layer.kernel(), layer.dim());
    let packed = noise(batch * seq * dim, 1);
    let mut want = vec![f32::NAN; batch * seq * channels];
    kernel.forward(&layer.inputs(&packed, &layer.split(&packed)), seq, &mut want);
    for pieces in [vec![1; seq], vec![1, 33, 2, 39]] {
        let (mut state, mut first) = (vec![0.0; batch * kernel.state_len()], 0);
        for len in pieces {
            let at = |v: &[f32], width: usize| -> Vec<f32> {
                (0..batch).flat_map(|b| v[(b * seq + first) * width..][..len * width].to_vec()).collect()
            };
            let (now, mut y) = (at(&packed, dim), vec![f32::NAN; batch * len * channels]);
            kernel.advance(&layer.inputs(&now, &layer.split(&now)), len, &mut state, &mut y);
            assert_close(&format!("{len} from {first} on"), &y, &at(&want, channels), 1e-6);
            first += len;
        }
    }
}

/// The definition's recurrence in a loop over positions.
fn position_by_position(inputs: [&Tensor; 5], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let [x, dt, b, c, z] = inputs;
    let (batch, seq, channels) = x.dims3()?;
    let a = a_log.exp()?.neg()?;
    let delta = softplus_composed(&dt.broadcast_add(dt_bias)?)?;
    let mut h = Tensor::zeros((batch, channels, a.dim(1)?), x.dtype(), x.device())?;
    let mut ys = Vec::with_capacity(seq);
    for t in 0..seq {
        let at = |v: &Tensor| v.narrow(1, t, 1)?.squeeze(1);
        let delta = at(&delta)?.unsqueeze(2)?;
        let input = delta.broadcast_mul(&at(x)?.unsqueeze(2)?)?.broadcast_mul(&at(b)?.unsqueeze(1)?)?;
        h = (delta.broadcast_mul(&a)?.exp()? * h)?.add(&input)?;
        ys.push(h.broadcast_mul(&at(c)?.unsqueeze(1)?)?.sum(2)?);
    }
    let y = (Tensor::stack(&ys, 1)? + x.broadcast_mul(d)?)?;
    Ok((y * z.silu()?)?)
}

const PARTS: [&str; 9] = ["y", "dx", "ddt", "dB", "dC", "dz", "da_log", "dD", "ddt_bias"];

/// The output and the gradients of all inputs, for step sizes around `e^log_step`.
fn run(
    dtype: DType,
    seq: usize,
    log_step: f64,
    f: impl Fn([&Tensor; 5], &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> [Vec<f64>; PARTS.len()] {
    let (batch, channels, d_state) = (2, 5, 3);
    let tensor = |shape: &[usize], seed: u64| {
        let values = noise(shape.iter().product(), seed);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    let var = |shape: &[usize], seed| Var::from_tensor(&tensor(shape, seed)).unwrap();
    let [x, z] = [1, 2].map(|seed| var(&[batch, seq, channels], seed));
    let dt = Var::from_tensor(&(tensor(&[batch, seq, channels], 3) + log_step).unwrap()).unwrap();
    let [b, c] = [4, 5].map(|seed| var(&[batch, seq, d_state], seed));
    let (a_log, d, dt_bias) = (var(&[channels, d_state], 6), var(&[channels], 7), var(&[channels], 8));
    let y = f([&x, &dt, &b, &c, &z], &a_log, &d, &dt_bias).unwrap();
    let grads = (&y * tensor(&[batch, seq, channels], 9)).unwrap().sum_all().unwrap().backward().unwrap();
    let flat = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let [x, dt, b, c, z, a_log, d, dt_bias] =
        [&x, &dt, &b, &c, &z, &a_log, &d, &dt_bias].map(|v| flat(grads.get(v).unwrap()));
    [flat(&y), x, dt, b, c, z, a_log, d, dt_bias]
}

#[test]
fn the_definition_equals_the_recurrence() {
    for seq in [1, 7, 64, 65, 200] {
        for log_step in [-9.0, -3.0, 0.0, 30.0] {
            let want = run(DType::F64, seq, log_step, position_by_position);
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
                let got = run(dtype, seq, log_step, selective_scan_composed);
                for (part, (got, want)) in PARTS.iter().zip(got.iter().zip(&want)) {
                    let largest = want.iter().fold(0.0f64, |max, v| max.max(v.abs()));
                    let off = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
                    let what = format!("{part}, {seq} positions, steps of e^{log_step}, {dtype:?}");
                    assert!(got.iter().all(|v| v.is_finite()), "{what}");
                    assert!(off <= tolerance * largest, "{what}: off by {off:.1e} of {largest:.1e}");
                }
            }
        }
    }
}

#[test]
fn channels_in_turn_have_the_gradients_of_all_at_once() {
    let (batch, seq, channels, d_state) = (2, 19, 5, 3);
    let tensor =
        |shape: [usize; 3], seed| Tensor::from_vec(noise(shape.iter().product(), seed), &shape, &Device::Cpu).unwrap();
    let inputs = tensor([batch, seq, 2 * channels], 1).abs().unwrap();
    let (maps, dy) = (tensor([batch, seq, 2 * d_state], 2), tensor([batch, seq, channels], 3));
    let a = tensor([1, channels, d_state], 4).squeeze(0).unwrap().abs().unwrap().neg().unwrap();
    let [all, turns] = [channels, 2].map(|count| composed::backward(&inputs, &maps, &a, &dy, count).unwrap());
    for (part, (got, want)) in ["u and δ", "B and C", "a"].iter().zip(turns.iter().zip(&all)) {
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_close(part, &flat(got), &flat(want), 1e-6);
    }
}
