//! The definition against the recurrence, the fused form against the definition, and its one-step form.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use mblm_base::random::noise;

use super::*;
use crate::error::Result;
use crate::layer::{Context, Dims, Layer, param_like};
use crate::mode::Mode;
use crate::param::{Init, Param, ParamStore};
use crate::testing::{assert_close, check_layer, perturb};

/// Inputs packed into one row: x, B, C, dt. The output is `(y, 0)`.
struct Packed {
    inner: usize,
    heads: usize,
    d_state: usize,
    a_log: Arc<Param>,
    d: Arc<Param>,
    dt_bias: Arc<Param>,
}

impl Packed {
    fn new(heads: usize, headdim: usize, d_state: usize) -> (ParamStore, Arc<Self>) {
        let mut store = ParamStore::new(0);
        let a_log = store.root().param("a_log", &[heads], Init::LogUniform(0.5, 4.0)).unwrap();
        let d = store.root().param("d", &[heads], Init::Const(1.0)).unwrap();
        let dt_bias = store.root().param("dt_bias", &[heads], Init::InverseSoftplusDt).unwrap();
        perturb(&store);
        (store, Arc::new(Packed { inner: heads * headdim, heads, d_state, a_log, d, dt_bias }))
    }

    fn dim(&self) -> usize {
        self.inner + 2 * self.d_state + self.heads
    }

    /// The columns of x, B, C and dt.
    fn columns(&self) -> [Range<usize>; 4] {
        let (e, n) = (self.inner, self.d_state);
        [0..e, e..e + n, e + n..e + 2 * n, e + 2 * n..self.dim()]
    }

    fn inputs<'a>(&self, packed: &'a [f32]) -> Inputs<'a> {
        let [x, b, c, dt] = self.columns().map(|columns| Rows::columns(packed, self.dim(), columns));
        Inputs { x, dt, b, c }
    }

    fn run<R>(&self, work: impl FnOnce(Ssd) -> R) -> R {
        let (a_log, d, dt_bias) = (self.a_log.values(), self.d.values(), self.dt_bias.values());
        work(Ssd { a_log: &a_log, d: &d, dt_bias: &dt_bias })
    }

    fn narrow(&self, packed: &[f32]) -> Vec<f32> {
        packed.chunks_exact(self.dim()).flat_map(|row| row[..self.inner].to_vec()).collect()
    }
}

impl Layer for Packed {
    type Tape = Tape;

    fn composed(&self, packed: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let [x, b, c, dt] = self.columns().map(|columns| packed.narrow(2, columns.start, columns.len()));
        let [a_log, d, dt_bias] = [&self.a_log, &self.d, &self.dt_bias].map(|p| param_like(p, packed, mode));
        let y = ssd_composed([&x?, &dt?, &b?, &c?], &a_log?, &d?, &dt_bias?)?;
        Ok(y.pad_with_zeros(2, 0, self.dim() - self.inner)?)
    }

    fn forward(&self, packed: &[f32], context: Context, y: &mut [f32]) -> Self::Tape {
        let mut out = vec![f32::NAN; context.dims.rows() * self.inner];
        let tape = self.run(|ssd| ssd.forward(&self.inputs(packed), context.dims.seq, &mut out));
        y.fill(0.0);
        for (y, out) in y.chunks_exact_mut(self.dim()).zip(out.chunks_exact(self.inner)) {
            y[..self.inner].copy_from_slice(out);
        }
        tape
    }

    fn backward(&self, packed: &[f32], context: Context, tape: Tape, dy: &[f32], dx: &mut [f32]) {
        let shared = Shared::new(dx);
        let [x, b, c, dt] = self.columns().map(|columns| RowsMut::columns(shared, self.dim(), columns));
        let (mut a_log, mut d, mut bias) = (self.a_log.grad_mut(), self.d.grad_mut(), self.dt_bias.grad_mut());
        let mut params = ParamGrads { a_log: &mut a_log, d: &mut d, dt_bias: &mut bias };
        let (dy, grads) = (self.narrow(dy), Grads { x, dt, b, c });
        self.run(|ssd| {
            ssd.backward(&self.inputs(packed), context.dims.seq, &tape, &dy, grads, &mut params);
        });
    }
}

#[test]
fn fused_equals_composed() {
    // Odd sizes, chunk borders, many short sequences, one head.
    for (batch, seq, heads, headdim, d_state) in
        [(2, 7, 3, 5, 3), (1, 64, 2, 8, 4), (1, 65, 1, 3, 1), (3, 130, 4, 4, 8), (300, 9, 5, 7, 4), (1, 200, 9, 16, 16)]
    {
        let (store, layer) = Packed::new(heads, headdim, d_state);
        check_layer(&layer, &store, Dims { batch, seq, dim: layer.dim() }, None, Mode::train(0));
    }
}

#[test]
fn steps_and_longer_pieces_give_forward() {
    let (batch, seq, heads, headdim, d_state) = (2, 150, 3, 5, 4);
    let layer = Packed::new(heads, headdim, d_state).1;
    let (dim, inner) = (layer.dim(), layer.inner);
    let packed = noise(batch * seq * dim, 1);
    let mut want = vec![f32::NAN; batch * seq * inner];
    layer.run(|ssd| ssd.forward(&layer.inputs(&packed), seq, &mut want));
    for pieces in [vec![1; seq], vec![1, 1, 66, 64, 1, 17], vec![150]] {
        let (mut state, mut first) = (vec![0.0; batch * inner * d_state], 0);
        for len in pieces {
            let at = |v: &[f32], width: usize| -> Vec<f32> {
                (0..batch).flat_map(|b| v[(b * seq + first) * width..][..len * width].to_vec()).collect()
            };
            let (now, mut y) = (at(&packed, dim), vec![f32::NAN; batch * len * inner]);
            layer.run(|ssd| match len {
                1 => ssd.step(&layer.inputs(&now), &mut state, &mut y),
                _ => ssd.advance(&layer.inputs(&now), len, &mut state, &mut y),
            });
            assert_close(&format!("{len} from {first} on"), &y, &at(&want, inner), 1e-5);
            first += len;
        }
    }
}

/// One sequence and its parameters, and what they give: the output and the gradients of x, dt, B, C, `a_log`, D and the
/// bias for the loss `Σ y·dy`.
struct Sequence {
    heads: usize,
    headdim: usize,
    d_state: usize,
    x: Vec<f32>,
    dt: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    a_log: Vec<f32>,
    d: Vec<f32>,
    dt_bias: Vec<f32>,
    dy: Vec<f32>,
}

const PARTS: [&str; 8] = ["y", "dx", "ddt", "dB", "dC", "da_log", "dD", "ddt_bias"];
type Results = [Vec<f64>; PARTS.len()];

/// The definition's recurrence and its reverse, one position after another, in floats of type `$float`.
macro_rules! recurrence {
    ($name:ident, $float:ty) => {
        fn $name(s: &Sequence) -> Results {
            let (h, p, n) = (s.heads, s.headdim, s.d_state);
            let (inner, seq, state) = (h * p, s.dt.len() / h, h * p * n);
            let of = |v: &[f32]| v.iter().map(|v| *v as $float).collect::<Vec<$float>>();
            let [x, dt, b, c, a_log, d, bias, dy] =
                [&s.x, &s.dt, &s.b, &s.c, &s.a_log, &s.d, &s.dt_bias, &s.dy].map(|v| of(v));
            let raw = |t: usize, i: usize| dt[t * h + i] + bias[i];
            let delta = |t, i| raw(t, i).max(0.0) + (-raw(t, i).abs()).exp().ln_1p();
            let decay = |t, i| (-delta(t, i) * a_log[i].exp()).exp();
            let mut states = vec![0.0 as $float; (seq + 1) * state];
            let [mut y, mut dx] = [(); 2].map(|()| vec![0.0 as $float; seq * inner]);
            let [mut db, mut dc] = [(); 2].map(|()| vec![0.0 as $float; seq * n]);
            let mut ddt = vec![0.0 as $float; seq * h];
            let [mut da_log, mut dd, mut dbias] = [(); 3].map(|()| vec![0.0 as $float; h]);
            for t in 0..seq {
                for e in 0..inner {
                    let (i, input) = (e / p, delta(t, e / p) * x[t * inner + e]);
                    y[t * inner + e] = d[i] * x[t * inner + e];
                    for k in 0..n {
                        let here = e * n + k;
                        let next = decay(t, i) * states[t * state + here] + input * b[t * n + k];
                        states[(t + 1) * state + here] = next;
                        y[t * inner + e] += next * c[t * n + k];
                    }
                }
            }
            let mut dstate = vec![0.0 as $float; state];
            for t in (0..seq).rev() {
                for i in 0..h {
                    let (mut dlog, mut direct) = (0.0, 0.0);
                    for e in i * p..(i + 1) * p {
                        let (at, mut dinput) = (t * inner + e, 0.0);
                        for k in 0..n {
                            let here = e * n + k;
                            dc[t * n + k] += dy[at] * states[(t + 1) * state + here];
                            dstate[here] += dy[at] * c[t * n + k];
                            db[t * n + k] += dstate[here] * delta(t, i) * x[at];
                            dinput += dstate[here] * b[t * n + k];
                            dstate[here] *= decay(t, i);
                            dlog += dstate[here] * states[t * state + here];
                        }
                        direct += dinput * x[at];
                        dx[at] = dinput * delta(t, i) + d[i] * dy[at];
                        dd[i] += dy[at] * x[at];
                    }
                    let a = -a_log[i].exp();
                    ddt[t * h + i] = (a * dlog + direct) / (1.0 + (-raw(t, i)).exp());
                    da_log[i] += a * delta(t, i) * dlog;
                    dbias[i] += ddt[t * h + i];
                }
            }
            [y, dx, ddt, db, dc, da_log, dd, dbias].map(|part| part.into_iter().map(|v| v as f64).collect())
        }
    };
}
recurrence!(exact, f64);
recurrence!(plain, f32);

impl Sequence {
    /// Step sizes around `step`, or of all sizes up to it.
    fn new(seq: usize, step: f64, all_sizes: bool, seed: u64) -> Self {
        let (heads, headdim, d_state) = (3, 5, 4);
        let random = |len: usize, i: u64| noise(len, 10 * seed + i);
        let raw = |v: f32| {
            let size =
                if all_sizes { step * 10f64.powf(5.0 * (v as f64 - 1.0) / 2.0) } else { step * (1.0 + 0.5 * v as f64) };
            size.exp_m1().ln() as f32
        };
        Sequence {
            heads,
            headdim,
            d_state,
            x: random(seq * heads * headdim, 0),
            dt: random(seq * heads, 1).into_iter().map(raw).collect(),
            b: random(seq * d_state, 2),
            c: random(seq * d_state, 3),
            a_log: vec![0.0, 1.2, 2.7],
            d: random(heads, 4),
            dt_bias: random(heads, 5).into_iter().map(|v| 0.1 * v).collect(),
            dy: random(seq * heads * headdim, 6),
        }
    }

    fn chunked(&self) -> Results {
        let (inner, seq) = (self.heads * self.headdim, self.dt.len() / self.heads);
        let inputs = Inputs {
            x: Rows::new(&self.x, inner),
            dt: Rows::new(&self.dt, self.heads),
            b: Rows::new(&self.b, self.d_state),
            c: Rows::new(&self.c, self.d_state),
        };
        let ssd = Ssd { a_log: &self.a_log, d: &self.d, dt_bias: &self.dt_bias };
        let nan = |len: usize| vec![f32::NAN; len];
        let (mut y, mut dx, mut ddt) = (nan(seq * inner), nan(seq * inner), nan(seq * self.heads));
        let (mut db, mut dc) = (nan(seq * self.d_state), nan(seq * self.d_state));
        let [mut a_log, mut d, mut dt_bias] = [(); 3].map(|()| vec![0.0; self.heads]);
        let tape = ssd.forward(&inputs, seq, &mut y);
        let grads = Grads {
            x: RowsMut::new(&mut dx, inner),
            dt: RowsMut::new(&mut ddt, self.heads),
            b: RowsMut::new(&mut db, self.d_state),
            c: RowsMut::new(&mut dc, self.d_state),
        };
        let mut params = ParamGrads { a_log: &mut a_log, d: &mut d, dt_bias: &mut dt_bias };
        ssd.backward(&inputs, seq, &tape, &self.dy, grads, &mut params);
        [y, dx, ddt, db, dc, a_log, d, dt_bias].map(|part| part.into_iter().map(f64::from).collect())
    }
}

/// The largest difference, relative to the largest element of `want`.
fn error(got: &[f64], want: &[f64]) -> f64 {
    let largest = want.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max) / largest
}

/// Calls `check` for each part of the results with its name and the errors of the chunks and of the plain recurrence in f32.
fn for_errors(check: impl Fn(&str, f64, f64)) {
    // Shorter than a chunk, its borders, several chunks.
    for (i, seq) in [1, 2, 6, 63, 64, 65, 129, 300].into_iter().enumerate() {
        for step in [1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0] {
            for all_sizes in [false, true] {
                let sequence = Sequence::new(seq, step, all_sizes, i as u64);
                let (want, plain) = (exact(&sequence), plain(&sequence));
                for (part, ((got, plain), want)) in PARTS.iter().zip(sequence.chunked().iter().zip(&plain).zip(&want)) {
                    let what =
                        format!("{part}, {seq} positions, steps {} {step}", if all_sizes { "up to" } else { "of" });
                    // Without a position before it, a step size does not decay anything.
                    if want.iter().any(|v| *v != 0.0) {
                        check(&what, error(got, want), error(plain, want));
                    }
                }
            }
        }
    }
}

#[test]
fn outputs_and_gradients_are_those_of_float64_for_every_step_size() {
    for_errors(|what, found, _| assert!(found < 2e-5, "{what}: {found:.1e} of the largest"));
}

#[test]
fn chunks_are_as_accurate_as_the_recurrence() {
    for_errors(|what, found, plain| {
        assert!(found < 2.0 * plain + 1e-6, "{what}: {found:.1e} of the largest, one by one {plain:.1e}");
    });
}

/// The definition in `dtype`.
fn composed(s: &Sequence, dtype: DType) -> Results {
    let (seq, inner) = (s.dt.len() / s.heads, s.heads * s.headdim);
    let tensor =
        |v: &[f32], shape: &[usize]| Tensor::from_slice(v, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let var = |(v, shape): (&Vec<f32>, &[usize])| Var::from_tensor(&tensor(v, shape)).unwrap();
    let (x, dt) = (var((&s.x, &[1, seq, inner])), var((&s.dt, &[1, seq, s.heads])));
    let [b, c] = [&s.b, &s.c].map(|v| var((v, &[1, seq, s.d_state])));
    let [a_log, d, dt_bias] = [&s.a_log, &s.d, &s.dt_bias].map(|v| var((v, &[s.heads])));
    let y = ssd_composed([&x, &dt, &b, &c], &a_log, &d, &dt_bias).unwrap();
    let grads = (&y * tensor(&s.dy, &[1, seq, inner])).unwrap().sum_all().unwrap().backward().unwrap();
    let flat = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let [x, dt, b, c, a_log, d, dt_bias] = [&x, &dt, &b, &c, &a_log, &d, &dt_bias].map(|v| flat(grads.get(v).unwrap()));
    [flat(&y), x, dt, b, c, a_log, d, dt_bias]
}

#[test]
fn the_definition_equals_the_recurrence() {
    // In the last there are more chunks than positions in a chunk.
    for (i, seq) in [1, 7, 64, 65, 200, 64 * 65 + 3].into_iter().enumerate() {
        for step in [1e-4, 1e-2, 1.0, 30.0] {
            let sequence = Sequence::new(seq, step, true, i as u64);
            let want = exact(&sequence);
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
                for (part, (got, want)) in PARTS.iter().zip(composed(&sequence, dtype).iter().zip(&want)) {
                    let what = format!("{part}, {seq} positions, steps up to {step}, {dtype:?}");
                    assert!(got.iter().all(|v| v.is_finite()), "{what}");
                    if want.iter().any(|v| *v != 0.0) {
                        let found = error(got, want);
                        assert!(found < tolerance, "{what}: {found:.1e} of the largest");
                    }
                }
            }
        }
    }
}
