//! The short causal convolution of Mamba (Gu & Dao 2023, §3.4): every channel on its own along time, then SiLU.

use candle_core::Tensor;

use crate::buffer::Buffer;
use crate::error::Result;
use crate::parallel::{for_rows, reduce_rows};
use crate::rows::{Rows, RowsMut};
use crate::simd::{self, silu, silu_grad, vectorize};

/// The definition: `y_t = silu(b + Σ_k w_k x_{t-(K-1)+k})`, zeros before the first position.
///
/// # Shapes
/// - `x`: `(B, S, C)`, `weight`: `(C, 1, K)`, `bias`: `(C)`; returns `(B, S, C)`
pub fn conv1d_silu_composed(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (_, seq, _) = x.dims3()?;
    let (_, _, taps) = weight.dims3()?;
    let padded = x.pad_with_zeros(1, taps - 1, 0)?;
    let mut y = x.zeros_like()?.broadcast_add(bias)?;
    for k in 0..taps {
        let tap = weight.narrow(2, k, 1)?.flatten_all()?;
        y = (y + padded.narrow(1, k, seq)?.broadcast_mul(&tap)?)?;
    }
    Ok(y.silu()?)
}

/// The weights of the convolution, one tap after another, which is how the kernels read them.
pub struct Conv1d {
    /// `(K, C)`
    taps: Buffer,
    /// `(C)`
    bias: Buffer,
}

impl Conv1d {
    /// # Shapes
    /// - `weight`: `(C, 1, K)`, `bias`: `(C)`
    pub fn new(weight: &[f32], bias: &[f32]) -> Self {
        let (channels, width) = (bias.len(), weight.len() / bias.len());
        let mut taps = Buffer::take(weight.len());
        for (c, row) in weight.chunks_exact(width).enumerate() {
            row.iter().enumerate().for_each(|(k, w)| taps[k * channels + c] = *w);
        }
        let mut own_bias = Buffer::take(channels);
        own_bias.copy_from_slice(bias);
        Conv1d { taps, bias: own_bias }
    }

    fn channels(&self) -> usize {
        self.bias.len()
    }

    /// The weights of the input `back` positions ago.
    #[inline(always)]
    fn tap(&self, back: usize) -> &[f32] {
        let end = self.taps.len() - back * self.channels();
        &self.taps[end - self.channels()..end]
    }

    /// How many inputs before the current one are seen.
    fn reach(&self) -> usize {
        self.taps.len() / self.channels() - 1
    }

    /// The sum before the activation, at row `row` of sequences of length `seq`.
    #[inline(always)]
    fn sum(&self, x: Rows, row: usize, seq: usize, y: &mut [f32]) {
        y.copy_from_slice(&self.bias);
        for back in 0..=self.reach().min(row % seq) {
            add_product(self.tap(back), x.row(row - back), y);
        }
    }

    /// # Shapes
    /// - `x`: `(B * S, C)`, `y`: `(B, S, C)`; `y` is overwritten
    pub fn forward(&self, x: Rows, seq: usize, y: &mut [f32]) {
        let channels = self.channels();
        let rows = y.len() / channels;
        let y = RowsMut::new(y, channels);
        for_rows(rows, channels, |rows| {
            vectorize(
                #[inline(always)]
                || {
                    for row in rows {
                        // SAFETY: ranges of rows do not overlap.
                        let y = unsafe { y.row(row, 0..channels) };
                        self.sum(x, row, seq, y);
                        y.iter_mut().for_each(|y| *y = silu(*y));
                    }
                },
            );
        });
    }

    /// Writes the gradient of the input to `dx` and adds those of weight and bias. `dy` is used up.
    ///
    /// # Shapes
    /// - `x`, `dx`: `(B * S, C)`, `dy`: `(B, S, C)`, `dweight`: `(C, 1, K)`, `dbias`: `(C)`
    pub fn backward(&self, x: Rows, seq: usize, dy: &mut [f32], dx: RowsMut, dweight: &mut [f32], dbias: &mut [f32]) {
        let (channels, width) = (self.channels(), self.reach() + 1);
        // Tap by tap from the current input back, then the bias.
        let mut sums = Buffer::zeros((width + 1) * channels);
        self.backward_sum(x, seq, dy, &mut sums);
        let (dtaps, dbias_sum) = sums.split_at(width * channels);
        simd::add(dbias_sum, dbias);
        for (back, dtap) in dtaps.chunks_exact(channels).enumerate() {
            dtap.iter().enumerate().for_each(|(c, d)| dweight[c * width + width - 1 - back] += d);
        }
        let dsum = Rows::new(dy, channels);
        for_rows(dsum.rows(), channels, |rows| {
            vectorize(
                #[inline(always)]
                || {
                    for row in rows {
                        // SAFETY: ranges of rows do not overlap.
                        let dx = unsafe { dx.row(row, 0..channels) };
                        dx.fill(0.0);
                        for back in 0..=self.reach().min(seq - 1 - row % seq) {
                            add_product(self.tap(back), dsum.row(row + back), dx);
                        }
                    }
                },
            );
        });
    }

    /// Turns `dy` into the gradient of the sum before the activation and adds those of the taps and the bias to `sums`.
    fn backward_sum(&self, x: Rows, seq: usize, dy: &mut [f32], sums: &mut [f32]) {
        let channels = self.channels();
        let rows = dy.len() / channels;
        let dy = RowsMut::new(dy, channels);
        reduce_rows(rows, channels, sums, |rows, sums| {
            let mut pre = Buffer::take(channels);
            vectorize(
                #[inline(always)]
                || {
                    for row in rows {
                        // SAFETY: ranges of rows do not overlap.
                        let dsum = unsafe { dy.row(row, 0..channels) };
                        self.sum(x, row, seq, &mut pre);
                        dsum.iter_mut().zip(pre.iter()).for_each(|(d, pre)| *d *= silu_grad(*pre));
                        let (dtaps, dbias) = sums.split_at_mut(sums.len() - channels);
                        simd::add(dsum, dbias);
                        let backs = 0..=self.reach().min(row % seq);
                        for (back, dtap) in backs.zip(dtaps.chunks_exact_mut(channels)) {
                            add_product(dsum, x.row(row - back), dtap);
                        }
                    }
                },
            );
        });
    }

    /// The number of floats of a decoder's window for `batch` sequences; it starts as zeros.
    pub fn window_len(&self, batch: usize) -> usize {
        batch * self.reach() * self.channels()
    }

    /// Advances by one position and moves `x` into the window.
    ///
    /// # Shapes
    /// - `x`: `(B, C)`, `window`: `(B, K - 1, C)`, oldest first; `y`: `(B, C)`, overwritten
    pub fn step(&self, x: Rows, window: &mut [f32], y: &mut [f32]) {
        let (channels, reach) = (self.channels(), self.reach());
        vectorize(
            #[inline(always)]
            || {
                for (b, y) in y.chunks_exact_mut(channels).enumerate() {
                    let window = &mut window[b * reach * channels..(b + 1) * reach * channels];
                    y.copy_from_slice(&self.bias);
                    add_product(self.tap(0), x.row(b), y);
                    for (i, past) in window.chunks_exact(channels).enumerate() {
                        add_product(self.tap(reach - i), past, y);
                    }
                    y.iter_mut().for_each(|y| *y = silu(*y));
                    if reach > 0 {
                        window.copy_within(channels.., 0);
                        window[(reach - 1) * channels..].copy_from_slice(x.row(b));
                    }
                }
            },
        );
    }

    /// Advances by `seq` positions, as [`step`](Self::step) does by one.
    ///
    /// # Shapes
    /// - `x`: `(B * S, C)`, `window`: `(B, K - 1, C)`, oldest first; `y`: `(B, S, C)`, overwritten
    pub fn advance(&self, x: Rows, seq: usize, window: &mut [f32], y: &mut [f32]) {
        let (channels, reach) = (self.channels(), self.reach());
        self.forward(x, seq, y);
        vectorize(
            #[inline(always)]
            || {
                for (b, window) in window.chunks_exact_mut((reach * channels).max(1)).enumerate() {
                    let first = b * seq;
                    // The first positions also see inputs before them, from the newest back.
                    for t in 0..reach.min(seq) {
                        let y = &mut y[(first + t) * channels..][..channels];
                        self.sum(x, first + t, seq, y);
                        for (past, back) in window.chunks_exact(channels).rev().zip(t + 1..=reach) {
                            add_product(self.tap(back), past, y);
                        }
                        y.iter_mut().for_each(|y| *y = silu(*y));
                    }
                    let new = reach.min(seq);
                    window.copy_within(new * channels.., 0);
                    for (past, t) in window.chunks_exact_mut(channels).skip(reach - new).zip(seq - new..) {
                        past.copy_from_slice(x.row(first + t));
                    }
                }
            },
        );
    }
}

/// `y += a ∘ x`.
#[inline(always)]
fn add_product(a: &[f32], x: &[f32], y: &mut [f32]) {
    for ((y, a), x) in y.iter_mut().zip(a).zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mblm_base::random::noise;

    use super::*;
    use crate::layer::{Context, Dims, Layer, param_like};
    use crate::mode::Mode;
    use crate::param::{Init, Param, ParamStore};
    use crate::testing::{assert_close, check_layer, perturb};

    struct Conv {
        weight: Arc<Param>,
        bias: Arc<Param>,
    }

    impl Conv {
        fn new(channels: usize, width: usize) -> (ParamStore, Arc<Self>) {
            let mut store = ParamStore::new(0);
            let weight = store.root().param("weight", &[channels, 1, width], Init::linear(width)).unwrap();
            let bias = store.root().param("bias", &[channels], Init::linear(width)).unwrap();
            perturb(&store);
            (store, Arc::new(Conv { weight, bias }))
        }
        fn kernel(&self) -> Conv1d {
            Conv1d::new(&self.weight.values(), &self.bias.values())
        }
    }

    impl Layer for Conv {
        type Tape = ();
        fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
            conv1d_silu_composed(x, &param_like(&self.weight, x, mode)?, &param_like(&self.bias, x, mode)?)
        }
        fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) {
            // Inside wider rows, as in the layers.
            let Dims { dim, seq, .. } = context.dims;
            let mut wide = vec![f32::NAN; x.len() * 2];
            wide.chunks_exact_mut(2 * dim).zip(x.chunks_exact(dim)).for_each(|(w, x)| w[dim..].copy_from_slice(x));
            self.kernel().forward(Rows::columns(&wide, 2 * dim, dim..2 * dim), seq, y);
        }
        fn backward(&self, x: &[f32], context: Context, (): (), dy: &[f32], dx: &mut [f32]) {
            let Dims { dim, seq, .. } = context.dims;
            let (mut dw, mut db) = (self.weight.grad_mut(), self.bias.grad_mut());
            let dx = RowsMut::new(dx, dim);
            self.kernel().backward(Rows::new(x, dim), seq, &mut dy.to_vec(), dx, &mut dw, &mut db);
        }
    }

    #[test]
    fn fused_equals_composed() {
        for (batch, seq, dim, width) in [(1, 5, 3, 4), (2, 9, 33, 4), (1, 1, 5, 1), (3, 2, 7, 2), (500, 9, 20, 4)] {
            let (store, layer) = Conv::new(dim, width);
            check_layer(&layer, &store, Dims { batch, seq, dim }, None, Mode::train(0));
        }
    }

    #[test]
    fn steps_and_longer_pieces_give_forward() {
        for (batch, dim, width) in [(1, 5, 4), (3, 18, 3), (2, 4, 1), (2, 3, 9)] {
            let (seq, conv) = (12, Conv::new(dim, width).1.kernel());
            let x = noise(batch * seq * dim, 1);
            let mut want = vec![f32::NAN; x.len()];
            conv.forward(Rows::new(&x, dim), seq, &mut want);
            for pieces in [vec![1; seq], vec![2, 1, 5, 4], vec![12], vec![3, 9]] {
                let (mut window, mut first) = (vec![0.0; conv.window_len(batch)], 0);
                for len in pieces {
                    let at = |v: &[f32]| -> Vec<f32> {
                        (0..batch).flat_map(|b| v[(b * seq + first) * dim..][..len * dim].to_vec()).collect()
                    };
                    let (now, mut y) = (at(&x), vec![f32::NAN; batch * len * dim]);
                    match len {
                        1 => conv.step(Rows::new(&now, dim), &mut window, &mut y),
                        _ => conv.advance(Rows::new(&now, dim), len, &mut window, &mut y),
                    }
                    assert_close(&format!("{len} from {first} on"), &y, &at(&want), 1e-6);
                    first += len;
                }
            }
        }
    }
}
