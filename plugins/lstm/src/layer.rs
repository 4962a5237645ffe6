//! One LSTM layer as one fused function with its backward: one product with the input for all positions, the recurrence
//! without a graph, and one product per gradient after it.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::Update;
use mblm_sdk::layer::{Context, Dims, Layer, param_like};
use mblm_sdk::mode::{Dropout, Mode, stream};
use mblm_sdk::ops::dropout::{self, dropout_composed};
use mblm_sdk::ops::linear::{self, linear_composed};
use mblm_sdk::simd;
use mblm_sdk::{Init, Param, ParamScope, Result};

use crate::recurrence::{GATES, Recurrence};
use crate::table::Order;

/// The parameters of a layer, with the gates in the order i, f, g, o.
pub(crate) struct LstmLayer {
    /// H, which is also the width of the input.
    units: usize,
    dropout: f32,
    stream: u64,
    /// `(4 H, H)`
    pub(crate) weight_ih: Arc<Param>,
    /// `(4 H, H)`
    pub(crate) weight_hh: Arc<Param>,
    /// `(4 H)`
    bias_ih: Arc<Param>,
    /// `(4 H)`
    bias_hh: Arc<Param>,
}

impl LstmLayer {
    /// The `index`-th layer of a stack.
    pub(crate) fn new(units: usize, index: usize, dropout: f32, params: &mut ParamScope) -> Result<Self> {
        let stream = stream(&format!("{}.l{index}", params.prefix()));
        let (name, init) = (|name: &str| format!("{name}_l{index}"), Init::linear(units));
        Ok(LstmLayer {
            units,
            dropout,
            stream,
            weight_ih: params.weight(&name("weight_ih"), &[GATES * units, units], init)?,
            weight_hh: params.weight(&name("weight_hh"), &[GATES * units, units], init)?,
            bias_ih: params.param(&name("bias_ih"), &[GATES * units], init)?,
            bias_hh: params.param(&name("bias_hh"), &[GATES * units], init)?,
        })
    }

    /// Both biases, `(4 H)`: only their sum matters.
    pub(crate) fn bias(&self) -> Buffer {
        let mut bias = Buffer::take(GATES * self.units);
        bias.copy_from_slice(&self.bias_ih.values());
        simd::add(&self.bias_hh.values(), &mut bias);
        bias
    }

    fn dropout(&self, mode: Mode) -> Option<Dropout> {
        mode.dropout(self.dropout, self.stream)
    }
}

fn order(dims: Dims) -> Order {
    Order { batch: dims.batch, seq: dims.seq, time_major: false }
}

/// What forward keeps, one row per position.
pub(crate) struct Tape {
    /// `(4 H)`, after their activations.
    gates: Buffer,
    /// `(H)`
    c: Buffer,
}

/// The output and the cell state after a position, `(B, H)` each; none before the first.
pub(crate) type Past = Option<[Tensor; 2]>;

impl LstmLayer {
    /// The layer by tensors, from the state that the positions before left, in place of which it leaves its own.
    fn compose(&self, x: &Tensor, mode: Mode, past: &mut Past) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        let get = |param: &Arc<Param>| param_like(param, x, mode);
        let bias = (get(&self.bias_ih)? + get(&self.bias_hh)?)?;
        let inputs = linear_composed(x, &get(&self.weight_ih)?, Some(&bias))?;
        let weight_hh = get(&self.weight_hh)?;
        let zeros = || Tensor::zeros((batch, self.units), x.dtype(), x.device());
        let [mut h, mut c] = match past.take() {
            Some(past) => past,
            None => [zeros()?, zeros()?],
        };
        let mut outputs = Vec::with_capacity(seq);
        for t in 0..seq {
            let gates = (inputs.narrow(1, t, 1)?.squeeze(1)? + linear_composed(&h, &weight_hh, None)?)?;
            let gate = |i: usize| gates.narrow(1, i * self.units, self.units);
            let sigmoid = |v: Tensor| ((v * 0.5)?.tanh()? * 0.5)? + 0.5;
            let (i, f, o) = (sigmoid(gate(0)?)?, sigmoid(gate(1)?)?, sigmoid(gate(3)?)?);
            c = ((f * c)? + (i * gate(2)?.tanh()?)?)?;
            h = (o * c.tanh()?)?;
            outputs.push(h.clone());
        }
        *past = Some([h, c]);
        dropout_composed(&Tensor::stack(&outputs, 1)?, self.dropout(mode))
    }

    /// The next positions, `(B, S, H)`.
    pub(crate) fn advance(&self, x: &Tensor, past: &mut Past) -> Result<Tensor> {
        self.compose(x, Mode::Eval, past)
    }
}

impl Layer for LstmLayer {
    type Tape = Tape;

    fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        self.compose(x, mode, &mut None)
    }

    fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) -> Tape {
        let dims = context.dims;
        let mut tape = Tape { gates: Buffer::take(GATES * dims.len()), c: Buffer::take(dims.len()) };
        linear::forward(x, &self.weight_ih.values(), self.units, Update::Set, &mut tape.gates);
        Recurrence { weight: &self.weight_hh.values(), bias: &self.bias(), order: order(dims) }.forward(
            None,
            &mut tape.gates,
            &mut tape.c,
            y,
        );
        if let Some(dropout) = self.dropout(context.mode) {
            dropout::apply(dropout, y);
        }
        tape
    }

    fn backward(&self, x: &[f32], context: Context, tape: Tape, dy: &[f32], dx: &mut [f32]) {
        let Tape { mut gates, c } = tape;
        let dropped = self.dropout(context.mode).map(|dropout| {
            let mut dh = Buffer::take(dy.len());
            dh.copy_from_slice(dy);
            dropout::apply(dropout, &mut dh);
            dh
        });
        let dh = dropped.as_deref().unwrap_or(dy);
        let mut before = Buffer::take(dy.len());
        Recurrence { weight: &self.weight_hh.values(), bias: &self.bias(), order: order(context.dims) }.backward(
            dh,
            &c,
            &mut gates,
            &mut before,
        );
        linear::backward_input(&gates, &self.weight_ih.values(), self.units, Update::Set, dx);
        linear::backward_weight(&gates, x, self.units, &mut self.weight_ih.grad_mut());
        linear::backward_weight(&gates, &before, self.units, &mut self.weight_hh.grad_mut());
        let mut dbias = Buffer::zeros(GATES * self.units);
        linear::backward_bias(&gates, &mut dbias);
        simd::add(&dbias, &mut self.bias_ih.grad_mut());
        simd::add(&dbias, &mut self.bias_hh.grad_mut());
    }
}

#[cfg(test)]
mod tests {
    use mblm_sdk::ParamStore;
    use mblm_sdk::testing::{check_layer, perturb};

    use super::*;

    #[test]
    fn fused_equals_composed() {
        // Cut by units (on one thread where they are few), then by sequences, in groups that are not full.
        let by_units = [(1, 2, 3), (2, 9, 17), (1, 130, 40), (7, 33, 96), (4, 12, 130), (15, 20, 64)];
        let by_sequences = [(100, 9, 20), (131, 9, 48), (70, 3, 33)];
        for (batch, seq, dim) in by_units.into_iter().chain(by_sequences) {
            for dropout in [0.0, 0.4] {
                let mut store = ParamStore::new(0);
                let layer = Arc::new(LstmLayer::new(dim, 0, dropout, &mut store.root()).unwrap());
                perturb(&store);
                check_layer(&layer, &store, Dims { batch, seq, dim }, None, Mode::train(5));
            }
        }
    }
}
