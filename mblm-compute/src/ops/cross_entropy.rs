//! The output layer and cross-entropy as one op, chunk by chunk, so that the logits of all positions never exist at
//! once. Gradients are computed on the way forward, while a chunk's softmax is at hand.

use std::sync::Arc;

use candle_core::{D, DType, Shape, Tensor};

use crate::backward::with_backward;
use crate::buffer::Buffer;
use crate::error::Result;
use crate::gemm::{Mat, MatMut, Update, matmul};
use crate::mode::Mode;
use crate::node::Node;
use crate::ops::linear::{self, linear_composed};
use crate::ops::on_device;
use crate::ops::product::Products;
use crate::ops::tables::positions;
use crate::parallel::{Shared, Threads, row_ranges};
use crate::param::Param;
use crate::simd::{self, vectorize};
use crate::transfer;

/// Rows whose logits exist at the same time.
const CHUNK: usize = 1024;

/// The same for a composition, which is for devices with more memory and dearer calls.
const COMPOSED_CHUNK: usize = 16384;

/// A position that is predicted: which row of the hidden states predicts which token, and with what weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the hidden states.
    pub row: u32,
    /// The token that should come out.
    pub token: u32,
    /// Weight of its loss.
    pub weight: f32,
}

/// The definition: `Σ weight · -ln softmax(h Wᵀ + b)[token] / number of targets`.
///
/// # Shapes
/// - `hidden`: `(R, D)`, `weight`: `(V, D)`, `bias`: `(V)`; returns a scalar
pub fn cross_entropy_composed(hidden: &Tensor, weight: &Tensor, bias: &Tensor, targets: &[Target]) -> Result<Tensor> {
    let device = hidden.device();
    let rows: Vec<u32> = targets.iter().map(|t| t.row).collect();
    let tokens: Vec<u32> = targets.iter().map(|t| t.token).collect();
    let weights: Vec<f32> = targets.iter().map(|t| t.weight).collect();
    let hidden = hidden.index_select(&transfer::to_tensor(&rows, rows.len(), device)?, 0)?;
    let logits = linear_composed(&hidden, weight, Some(bias))?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum(D::Minus1)?.log()?;
    let chosen = transfer::to_tensor(&tokens, (tokens.len(), 1), device)?;
    let chosen = shifted.gather(&chosen, 1)?.squeeze(1)?;
    let weights = transfer::to_tensor(&weights, weights.len(), device)?.to_dtype(hidden.dtype())?;
    let losses = ((log_sum - chosen)? * weights)?;
    Ok((losses.sum_all()? / targets.len() as f64)?)
}

/// The fused op on hidden states `(R, D)` (any leading shape).
pub struct CrossEntropy {
    /// `(V, D)`
    pub weight: Arc<Param>,
    /// `(V)`
    pub bias: Arc<Param>,
    /// At least one.
    pub targets: Vec<Target>,
    /// Whether backward follows.
    pub training: bool,
}

/// Gradients for a loss gradient of 1.
#[derive(Default)]
pub struct Tape {
    /// Of the gathered hidden states, `(targets, D)`.
    hidden: Buffer,
    weight: Buffer,
    bias: Buffer,
}

impl CrossEntropy {
    fn dim(&self) -> usize {
        self.weight.shape()[1]
    }

    /// Turns the logits of `targets` into gradients and returns the sum of their losses.
    fn softmax(&self, targets: &[Target], logits: &mut [f32]) -> f64 {
        let vocab = self.bias.len();
        let scale = 1.0 / self.targets.len() as f32;
        let ranges = row_ranges(targets.len(), vocab);
        let mut sums = vec![0.0f64; ranges.len()];
        let logits = Shared::new(logits);
        rayon::scope(|scope| {
            for (range, sum) in ranges.into_iter().zip(&mut sums) {
                scope.spawn(move |_| {
                    // SAFETY: ranges of rows do not overlap.
                    let logits = unsafe { logits.slice(range.start * vocab..range.end * vocab) };
                    vectorize(
                        #[inline(always)]
                        || {
                            for (row, target) in logits.chunks_exact_mut(vocab).zip(&targets[range]) {
                                let token = target.token as usize;
                                let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                                let chosen = row[token] - max;
                                for v in row.iter_mut() {
                                    *v = simd::exp(*v - max);
                                }
                                let total = simd::sum(row);
                                *sum += (target.weight * (total.ln() - chosen)) as f64;
                                simd::scale(target.weight * scale / total, row);
                                row[token] -= target.weight * scale;
                            }
                        },
                    );
                });
            }
        });
        sums.iter().sum()
    }
}

impl Node for CrossEntropy {
    type Tape = Tape;

    fn shape(&self) -> Shape {
        Shape::from(())
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<Tape> {
        let (dim, vocab) = (self.dim(), self.bias.len());
        let weight = self.weight.values();
        let mut tape = Tape::default();
        if self.training {
            tape.hidden = Buffer::take(self.targets.len() * dim);
            tape.weight = Buffer::zeros(vocab * dim);
            tape.bias = Buffer::zeros(vocab);
        }
        let mut gathered = Buffer::take(CHUNK.min(self.targets.len()) * dim);
        let mut logits = Buffer::take(CHUNK.min(self.targets.len()) * vocab);
        let mut loss = 0.0;
        for (i, targets) in self.targets.chunks(CHUNK).enumerate() {
            let (rows, logits) = (&mut gathered[..targets.len() * dim], &mut logits[..targets.len() * vocab]);
            for (row, target) in rows.chunks_exact_mut(dim).zip(targets) {
                row.copy_from_slice(&inputs[0][target.row as usize * dim..][..dim]);
            }
            linear::forward(rows, &weight, dim, Update::Set, logits);
            linear::add_bias(&self.bias.values(), logits);
            loss += self.softmax(targets, logits);
            if self.training {
                linear::backward_weight(logits, rows, dim, &mut tape.weight);
                linear::backward_bias(logits, &mut tape.bias);
                let out = &mut tape.hidden[i * CHUNK * dim..][..targets.len() * dim];
                let grad = Mat::new(logits, targets.len(), vocab);
                let out = MatMut::new(out, targets.len(), dim);
                matmul(out, Update::Set, grad, Mat::new(&weight, vocab, dim), Threads::All);
            }
        }
        y[0] = (loss / self.targets.len() as f64) as f32;
        Ok(tape)
    }

    fn backward(&self, _: &[&[f32]], tape: Tape, dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let dim = self.dim();
        let (mut dweight, mut dbias) = (self.weight.grad_mut(), self.bias.grad_mut());
        vectorize(
            #[inline(always)]
            || {
                for (target, grad) in self.targets.iter().zip(tape.hidden.chunks_exact(dim)) {
                    simd::axpy(dy[0], grad, &mut grads[0][target.row as usize * dim..][..dim]);
                }
                simd::axpy(dy[0], &tape.weight, &mut dweight);
                simd::axpy(dy[0], &tape.bias, &mut dbias);
            },
        );
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], mode: Mode) -> Result<Tensor> {
        let (weight, bias) = (self.weight.tensor(mode), self.bias.tensor(mode));
        let hidden = inputs[0].reshape(((), self.dim()))?;
        let rows = Rows::new(&self.targets, &hidden)?;
        let (loss, grads) = rows.run([&hidden, &weight, &bias], self.training)?;
        with_backward(&[&hidden, &weight, &bias], &loss, move |_, dy| {
            Ok(grads.iter().map(|grad| grad.broadcast_mul(dy)).collect::<candle_core::Result<_>>()?)
        })
    }
}

/// The weighted loss of each row of logits, and its gradient.
///
/// # Shapes
/// - `logits`: `(R, V)`, `tokens`, `weights`: `(R)`; returns `(R)` and `(R, V)`
fn softmax_loss(logits: Tensor, tokens: &Tensor, weights: &Tensor) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if crate::cuda::available(&logits) {
        let losses = crate::cuda::cross_entropy(&logits, tokens, weights)?;
        return Ok((losses, logits));
    }
    let (chosen, weights) = (tokens.unsqueeze(1)?, weights.unsqueeze(1)?);
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let powers = shifted.exp()?;
    let totals = powers.sum_keepdim(D::Minus1)?;
    let losses = (totals.log()? - shifted.gather(&chosen, 1)?)?.mul(&weights)?.squeeze(1)?;
    let all = positions(logits.dim(1)?, logits.device())?.to_dtype(DType::U32)?.unsqueeze(0)?;
    let one_hot = chosen.broadcast_eq(&all)?.to_dtype(logits.dtype())?;
    Ok((losses, (powers.broadcast_div(&totals)? - one_hot)?.broadcast_mul(&weights)?))
}

/// The rows of a composed cross-entropy: all of the hidden states where most are predicted from, those that do not count
/// with weight 0, since gathering is slow on a GPU; and those of the targets otherwise.
struct Rows {
    /// Which rows of the hidden states; all without.
    gathered: Option<Tensor>,
    /// `(rows)`
    tokens: Tensor,
    /// `(rows)`, already divided by the number of targets.
    weights: Tensor,
}

impl Rows {
    fn new(targets: &[Target], hidden: &Tensor) -> Result<Self> {
        let (rows, device) = (hidden.dim(0)?, hidden.device());
        let share = |target: &Target| target.weight / targets.len() as f32;
        let is_dense = targets.len() * 2 > rows;
        let (tokens, weights) = match is_dense {
            true => {
                let (mut tokens, mut weights) = (vec![0; rows], vec![0.0; rows]);
                for target in targets {
                    (tokens[target.row as usize], weights[target.row as usize]) = (target.token, share(target));
                }
                (tokens, weights)
            }
            false => targets.iter().map(|target| (target.token, share(target))).unzip(),
        };
        let gathered = match is_dense {
            true => None,
            false => {
                let rows: Vec<u32> = targets.iter().map(|target| target.row).collect();
                Some(transfer::to_tensor(&rows, rows.len(), device)?)
            }
        };
        let weights = transfer::to_tensor(&weights, weights.len(), device)?.to_dtype(hidden.dtype())?;
        Ok(Rows { gathered, tokens: transfer::to_tensor(&tokens, tokens.len(), device)?, weights })
    }

    /// The loss of `[hidden, weight, bias]`, and their gradients in training.
    fn run(&self, inputs: [&Tensor; 3], training: bool) -> Result<(Tensor, Vec<Tensor>)> {
        let [hidden, weight, bias] = inputs.map(Tensor::detach);
        let dim = weight.dim(1)?;
        let rows = match &self.gathered {
            Some(gathered) => hidden.index_select(gathered, 0)?,
            None => hidden.contiguous()?,
        };
        let products = Products::of(&hidden);
        let mut loss = Tensor::zeros((), hidden.dtype(), hidden.device())?;
        let (mut dweight, mut dbias, mut drows) = (weight.zeros_like()?, bias.zeros_like()?, vec![]);
        for first in (0..rows.dim(0)?).step_by(COMPOSED_CHUNK) {
            let count = COMPOSED_CHUNK.min(rows.dim(0)? - first);
            let part = rows.narrow(0, first, count)?;
            let logits = on_device::linear(&part, &weight, Some(&bias))?;
            let targets = [&self.tokens, &self.weights].map(|of| of.narrow(0, first, count));
            let [tokens, weights] = targets;
            let (losses, d) = softmax_loss(logits, &tokens?, &weights?)?;
            loss = (loss + losses.sum_all()?)?;
            if training {
                dweight = (dweight + products.product(&d.t()?, &part)?)?;
                dbias = (dbias + on_device::column_sums(&d)?)?;
                drows.push(products.product(&d, &weight)?);
            }
        }
        if !training {
            return Ok((loss, vec![]));
        }
        let drows = Tensor::cat(&drows, 0)?;
        let dhidden = match &self.gathered {
            Some(gathered) => {
                Tensor::zeros((hidden.dim(0)?, dim), hidden.dtype(), hidden.device())?.index_add(gathered, &drows, 0)?
            }
            None => drows,
        };
        Ok((loss, vec![dhidden, dweight, dbias]))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use mblm_base::random::noise;

    use super::*;
    use crate::layer::param_like;
    use crate::node::apply1;
    use crate::param::{Init, ParamStore};
    use crate::testing::assert_close;

    #[test]
    fn fused_and_composed_equal_the_definition() {
        crate::buffer::poison_buffers();
        let (dim, vocab) = (5, 37);
        // Most rows are predicted from, or few.
        for (rows, every) in [(1, 1), (7, 3), (2500, 3), (40_000, 3), (2500, 1)] {
            let mut store = ParamStore::new(1);
            let weight = store.root().param("weight", &[vocab, dim], Init::Normal).unwrap();
            let bias = store.root().param("bias", &[vocab], Init::Normal).unwrap();
            let targets: Vec<Target> = (0..rows as u32)
                .filter(|r| (r % 3 != 1) == (every == 3))
                .map(|row| Target { row, token: row * 7 % vocab as u32, weight: 0.5 + (row % 2) as f32 })
                .collect();
            let targets = if targets.is_empty() { vec![Target { row: 0, token: 1, weight: 1.0 }] } else { targets };
            let run = |dtype: DType, composed: bool| {
                store.zero_grad();
                let x = Tensor::from_vec(noise(rows * dim, 2), (rows, dim), &Device::Cpu).unwrap();
                let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
                let mode = Mode::train(0);
                let op = || {
                    let (weight, bias, targets) = (weight.clone(), bias.clone(), targets.clone());
                    apply1(CrossEntropy { weight, bias, targets, training: true }, &x, mode).unwrap()
                };
                let loss = match (dtype, composed) {
                    (DType::F32, false) => op(),
                    (DType::F32, true) => crate::device::composed(op),
                    _ => {
                        let param = |p| param_like(p, &x, mode).unwrap();
                        cross_entropy_composed(&x, &param(&weight), &param(&bias), &targets).unwrap()
                    }
                };
                // A gradient other than 1 comes in.
                let grads = store.backward(&(&loss * 3.0).unwrap()).unwrap();
                let flat =
                    |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                [flat(&loss), flat(grads.get(&x).unwrap()), weight.grad().to_vec(), bias.grad().to_vec()]
            };
            let want = run(DType::F64, false);
            for (name, got) in [("fused", run(DType::F32, false)), ("composed", run(DType::F32, true))] {
                for (part, (got, want)) in ["loss", "hidden", "weight", "bias"].iter().zip(got.iter().zip(&want)) {
                    assert_close(&format!("{name}, {rows} rows, {part}"), got, want, 1e-5);
                }
            }
        }
    }
}
