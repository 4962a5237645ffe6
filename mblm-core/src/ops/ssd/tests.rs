//! The chunked form against the definition, and its one-step form.

use std::sync::Arc;

use super::*;
use crate::block::Mode;
use crate::layer::{Context, Dims, Layer, param_like};
use crate::param::{Init, Param, ParamStore};
use crate::testing::{assert_close, check_layer, noise, perturb};

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
    type Tape = (Tape, Vec<f32>);

    fn composed(&self, packed: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let [x, b, c, dt] = self.columns().map(|columns| packed.narrow(2, columns.start, columns.len()));
        let [a_log, d, dt_bias] = [&self.a_log, &self.d, &self.dt_bias].map(|p| param_like(p, packed, mode));
        let y = ssd_composed([&x?, &dt?, &b?, &c?], &a_log?, &d?, &dt_bias?)?;
        Ok(y.pad_with_zeros(2, 0, self.dim() - self.inner)?)
    }

    fn forward(&self, packed: &[f32], context: Context, y: &mut [f32]) -> Self::Tape {
        let mut out = vec![f32::NAN; context.dims.rows() * self.inner];
        let tape = self.run(|ssd| ssd.forward(&self.inputs(packed), context.dims.seq, &mut out));
        let mut full = out.clone();
        self.run(|ssd| ssd.add_skip(self.inputs(packed).x, &mut full));
        y.fill(0.0);
        for (y, out) in y.chunks_exact_mut(self.dim()).zip(full.chunks_exact(self.inner)) {
            y[..self.inner].copy_from_slice(out);
        }
        (tape, out)
    }

    fn backward(&self, packed: &[f32], context: Context, (tape, y): Self::Tape, dy: &[f32], dx: &mut [f32]) {
        let shared = Shared::new(dx);
        let [x, b, c, dt] = self.columns().map(|columns| RowsMut::columns(shared, self.dim(), columns));
        let (mut a_log, mut d, mut bias) = (self.a_log.grad_mut(), self.d.grad_mut(), self.dt_bias.grad_mut());
        let mut params = ParamGrads { a_log: &mut a_log, d: &mut d, dt_bias: &mut bias };
        let (dy, grads) = (self.narrow(dy), Grads { x, dt, b, c });
        self.run(|ssd| {
            ssd.backward(&self.inputs(packed), context.dims.seq, &tape, [&y, &dy], grads, &mut params);
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
fn steps_give_forward() {
    let (batch, seq, heads, headdim, d_state) = (2, 67, 3, 5, 4);
    let layer = Packed::new(heads, headdim, d_state).1;
    let (dim, inner) = (layer.dim(), layer.inner);
    let packed = noise(batch * seq * dim, 1);
    let mut want = vec![f32::NAN; batch * seq * inner];
    layer.run(|ssd| {
        ssd.forward(&layer.inputs(&packed), seq, &mut want);
        ssd.add_skip(layer.inputs(&packed).x, &mut want);
    });
    let mut state = vec![0.0; batch * inner * d_state];
    for t in 0..seq {
        let at = |v: &[f32], width: usize| -> Vec<f32> {
            (0..batch).flat_map(|b| v[(b * seq + t) * width..][..width].to_vec()).collect()
        };
        let mut y = vec![f32::NAN; batch * inner];
        layer.run(|ssd| ssd.step(&layer.inputs(&at(&packed, dim)), &mut state, &mut y));
        assert_close("step", &y, &at(&want, inner), 5e-6);
    }
}
