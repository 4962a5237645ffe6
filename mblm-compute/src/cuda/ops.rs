//! Ops of which the forward and the backward pass are kernels. Each has the shapes and the result of its composition.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::launch::{Arg, Grid, launch, unwritten};
pub use super::selective_scan::{selective_scan, ssd};
use crate::backward::with_own_backward;
use crate::error::Result;
use crate::mode::Dropout;
use crate::ops::product::Products;
use crate::ops::rms_norm::Eps;

/// Blocks that each sum up a share of the rows.
const SLICES: usize = 128;

/// Attention weights that exist at the same time; those of a whole pass are kept for backward if they are not more.
const WEIGHTS: usize = 1 << 27;

/// Most queries of a block where only the past is seen: what a block does not see is not computed.
const CAUSAL_QUERIES: usize = 768;

pub(super) fn like(x: &Tensor) -> Result<Tensor> {
    Ok(unwritten(x.dims(), DType::F32, x.device())?)
}

/// The sums of the columns of `x`, `(…, D)`, over all rows.
pub fn column_sums(x: &Tensor) -> Result<Tensor> {
    let columns = x.dims().last().copied().unwrap_or(1);
    let rows = x.elem_count() / columns;
    let slices = rows.div_ceil(32).clamp(1, SLICES);
    let partial = unwritten(&[slices, columns], DType::F32, x.device())?;
    let grid = Grid { blocks: (columns.div_ceil(128), slices), threads: 128, shared: 0 };
    let args = [Arg::Tensor(x), Arg::Tensor(&partial), Arg::Long(rows), Arg::Int(columns)];
    launch(x.device(), "column_sums", grid, &args)?;
    if slices == 1 { Ok(partial.squeeze(0)?) } else { column_sums(&partial) }
}

/// See [`rms_norm_composed`](crate::ops::rms_norm::rms_norm_composed); after a token shift if `shift`.
///
/// # Shapes
/// - `x`: `(B, S, D)`, `gain`: `(D)`; returns `(B, S, D)`
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: Eps, shift: bool) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let (_, seq, dim) = x.dims3()?;
    let (rows, half) = (x.elem_count() / dim, if shift { dim.div_ceil(2) } else { dim });
    let (floor, inside) = match eps {
        Eps::Floor(floor) => (floor, 0.0),
        Eps::Inside(inside) => (0.0, inside),
    };
    let (y, inverse) = (like(x)?, unwritten(&[rows], DType::F32, x.device())?);
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(gain),
        Arg::Tensor(&y),
        Arg::Tensor(&inverse),
        Arg::Int(seq),
        Arg::Int(dim),
        Arg::Int(half),
        Arg::Float(floor),
        Arg::Float(inside),
    ];
    launch(x.device(), "rms_norm", Grid::rows(rows, dim), &args)?;
    with_own_backward(&[x, gain], y, move |inputs, dy| {
        let [x, gain] = inputs else { return Ok(vec![]) };
        let blocks = rows.clamp(1, 4 * SLICES);
        let (dx, partial) = (like(x)?, unwritten(&[blocks, dim], DType::F32, x.device())?);
        let args = [
            Arg::Tensor(x),
            Arg::Tensor(gain),
            Arg::Tensor(&inverse),
            Arg::Tensor(dy),
            Arg::Tensor(&dx),
            Arg::Tensor(&partial),
            Arg::Long(rows),
            Arg::Int(seq),
            Arg::Int(dim),
            Arg::Int(half),
        ];
        let grid = Grid { blocks: (blocks, 1), shared: dim * size_of::<f32>(), ..Grid::rows(rows, dim) };
        launch(x.device(), "rms_norm_backward", grid, &args)?;
        Ok(vec![dx, column_sums(&partial)?])
    })
}

/// See [`linear_composed`](crate::ops::linear::linear_composed).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let products = Products::of(x);
    let (outputs, inputs) = weight.dims2()?;
    let shape: Vec<usize> = x.dims()[..x.rank() - 1].iter().copied().chain([outputs]).collect();
    let flat = |x: &Tensor, width: usize| x.contiguous()?.reshape((x.elem_count() / width, width));
    let mut y = products.product_transposed(&flat(x, inputs)?.detach(), &weight.detach())?;
    if let Some(bias) = bias {
        y = bias_add(&y, bias, None)?;
    }
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    with_own_backward(&operands, y.reshape(shape)?, move |operands, dy| {
        let (x, dy) = (flat(operands[0], inputs)?, flat(dy, outputs)?);
        let dx = products.product(&dy, operands[1])?.reshape(operands[0].shape())?;
        let mut grads = vec![dx, products.product(&dy.t()?, &x)?];
        if operands.len() == 3 {
            grads.push(column_sums(&dy)?);
        }
        Ok(grads)
    })
}

/// `x` plus `row`, which is added to each of the rows that `x` has of its length.
///
/// # Shapes
/// - `x`: `(B, …)`, `row`: `(…)`; returns `(B, …)`
pub fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    let (x, row) = (&x.contiguous()?, &row.contiguous()?);
    let y = bias_add(x, row, None)?;
    with_own_backward(&[x, row], y, |inputs, dy| {
        let len = inputs[1].elem_count();
        let rows = dy.reshape((dy.elem_count() / len, len))?;
        Ok(vec![dy.clone(), column_sums(&rows)?.reshape(inputs[1].shape())?])
    })
}

/// See [`layer_norm_composed`](crate::ops::layer_norm::layer_norm_composed).
pub fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let dim = gain.elem_count();
    let rows = x.elem_count() / dim;
    let (y, stats) = (like(x)?, unwritten(&[rows, 2], DType::F32, x.device())?);
    let tensors = [x, gain, bias, &y, &stats].map(Arg::Tensor);
    let args: Vec<Arg> = tensors.into_iter().chain([Arg::Int(dim), Arg::Float(eps)]).collect();
    launch(x.device(), "layer_norm", Grid::rows(rows, dim), &args)?;
    with_own_backward(&[x, gain, bias], y, move |inputs, dy| {
        let blocks = rows.clamp(1, 4 * SLICES);
        let (dx, partial) = (like(dy)?, unwritten(&[blocks, 2 * dim], DType::F32, dy.device())?);
        let args = sized(&[inputs[0], inputs[1], &stats, dy, &dx, &partial], rows, &[dim]);
        let grid = Grid { blocks: (blocks, 1), ..Grid::rows(rows, dim) };
        launch(dy.device(), "layer_norm_backward", grid, &args)?;
        let sums = column_sums(&partial)?;
        Ok(vec![dx, sums.narrow(0, 0, dim)?.contiguous()?, sums.narrow(0, dim, dim)?.contiguous()?])
    })
}

/// Turns `logits` into their gradients, in place, and returns the losses; see
/// [`CrossEntropy`](crate::ops::cross_entropy::CrossEntropy).
///
/// # Shapes
/// - `logits`: `(R, V)`, nobody else holds them; `tokens`: `(R)`, `u32`; `weights`: `(R)`; returns `(R)`
pub fn cross_entropy(logits: &Tensor, tokens: &Tensor, weights: &Tensor) -> Result<Tensor> {
    const WARPS: usize = 8;
    let (rows, vocab) = logits.dims2()?;
    let losses = unwritten(&[rows], DType::F32, logits.device())?;
    let grid = Grid { blocks: (rows.div_ceil(WARPS).max(1), 1), threads: 32 * WARPS, shared: 0 };
    let args = sized(&[logits, tokens, weights, &losses], rows, &[vocab]);
    launch(logits.device(), "cross_entropy", grid, &args)?;
    Ok(losses)
}

/// `x + bias + rest`, without a backward.
fn bias_add(x: &Tensor, bias: &Tensor, rest: Option<&Tensor>) -> Result<Tensor> {
    let y = like(x)?;
    let rest = rest.map_or(Arg::Null, Arg::Tensor);
    let (len, dim) = (x.elem_count(), bias.elem_count());
    let args = [Arg::Tensor(x), Arg::Tensor(bias), rest, Arg::Tensor(&y), Arg::Long(len), Arg::Int(dim)];
    launch(x.device(), "bias_add", Grid::elements(len), &args)?;
    Ok(y)
}

/// Key, threshold and scale of a mask; none drops nothing.
fn mask_args(dropout: Option<Dropout>) -> [Arg<'static>; 3] {
    let (key, threshold, scale) = dropout.map_or((0, 0, 1.0), |dropout| dropout.parts());
    [Arg::Key(key), Arg::Word(threshold), Arg::Float(scale)]
}

/// The factors of a mask as a tensor.
pub fn dropout_factors(dropout: Dropout, shape: &[usize], device: &Device) -> Result<Tensor> {
    let y = unwritten(shape, DType::F32, device)?;
    let [key, threshold, scale] = mask_args(Some(dropout));
    let args = [Arg::Null, Arg::Tensor(&y), Arg::Long(y.elem_count()), key, threshold, scale];
    launch(device, "dropout", Grid::elements(y.elem_count()), &args)?;
    Ok(y)
}

/// `gelu(x + bias)` with dropout.
///
/// # Shapes
/// - `x`: `(…, D)`, `bias`: `(D)`; returns `(…, D)`
pub fn bias_gelu(x: &Tensor, bias: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let (len, dim) = (x.elem_count(), bias.elem_count());
    let y = like(x)?;
    let [key, threshold, scale] = mask_args(dropout);
    let sizes = [Arg::Long(len), Arg::Int(dim), key, threshold, scale];
    let args: Vec<Arg> = [Arg::Tensor(x), Arg::Tensor(bias), Arg::Tensor(&y)].into_iter().chain(sizes).collect();
    launch(x.device(), "bias_gelu", Grid::elements(len), &args)?;
    with_own_backward(&[x, bias], y, move |inputs, dy| {
        let dx = like(dy)?;
        let [key, threshold, scale] = mask_args(dropout);
        let tensors = [inputs[0], inputs[1], dy, &dx].map(Arg::Tensor);
        let sizes = [Arg::Long(len), Arg::Int(dim), key, threshold, scale];
        let args: Vec<Arg> = tensors.into_iter().chain(sizes).collect();
        launch(dy.device(), "bias_gelu_backward", Grid::elements(len), &args)?;
        let dbias = column_sums(&dx)?;
        Ok(vec![dx, dbias])
    })
}

/// Attention over rows of queries, and of keys and values.
#[derive(Clone)]
pub struct Attention {
    /// Heads.
    pub heads: usize,
    /// Whether a position sees itself and the past alone.
    pub causal: bool,
    /// `(B, S)`, `u8`, nonzero = attend.
    pub mask: Option<Tensor>,
    /// Dropout of the weights.
    pub dropout: Option<Dropout>,
    /// Cosines and sines, `(positions, d / 2)` each, if queries and keys are rotated.
    pub rotary: Option<[Tensor; 2]>,
}

/// Queries, keys and values by heads, `(B, H, S, d)` each.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Attention {
    /// # Shapes
    /// - `q`: `(B, S, H d)`, `kv`: `(B, S, 2 H d)`, keys first; returns `(B, S, H d)`
    pub fn forward(self, q: &Tensor, kv: &Tensor) -> Result<Tensor> {
        let (q, kv) = (&q.contiguous()?, &kv.contiguous()?);
        let products = Products::of(q);
        let heads = self.split(q, kv)?;
        let (batch, _, seq, _) = heads.q.dims4()?;
        let keeps = batch * self.heads * seq * seq <= WEIGHTS;
        let (mut kept, mut outputs) = (vec![], vec![]);
        for queries in self.blocks(batch, seq) {
            let weights = self.weights(&heads, &queries, products)?;
            outputs.push(products.product(&weights.1, &self.seen(&heads.v, &queries)?)?);
            kept.extend(keeps.then_some(weights));
        }
        let attended = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 2)? };
        let y = like(q)?;
        self.rows(&y, &attended, None, (q.dim(2)?, 0), true)?;
        with_own_backward(&[q, kv], y, move |inputs, dy| self.backward(inputs[0], inputs[1], &kept, dy, products))
    }

    /// Ranges of queries whose weights exist at once.
    fn blocks(&self, batch: usize, seq: usize) -> Vec<Range<usize>> {
        let most = (WEIGHTS / (batch * self.heads * seq).max(1)).clamp(1, seq.max(1));
        let most = if self.causal { most.min(CAUSAL_QUERIES) } else { most };
        let most = seq.div_ceil(seq.div_ceil(most).max(1)).max(1);
        (0..seq).step_by(most).map(|first| first..seq.min(first + most)).collect()
    }

    /// The keys or values that a range of queries sees.
    fn seen(&self, x: &Tensor, queries: &Range<usize>) -> Result<Tensor> {
        let keys = if self.causal { queries.end } else { x.dim(2)? };
        Ok(x.narrow(2, 0, keys)?)
    }

    fn split(&self, q: &Tensor, kv: &Tensor) -> Result<Heads> {
        let (batch, seq, inner) = q.dims3()?;
        let shape = [batch, self.heads, seq, inner / self.heads];
        let part = |rows: &Tensor, width: usize, first: usize, rotated: bool| -> Result<Tensor> {
            let heads = unwritten(&shape, DType::F32, q.device())?;
            self.rows(rows, &heads, self.rotary.as_ref().filter(|_| rotated), (width, first), false)?;
            Ok(heads)
        };
        Ok(Heads {
            q: part(q, inner, 0, true)?,
            k: part(kv, 2 * inner, 0, true)?,
            v: part(kv, 2 * inner, inner, false)?,
        })
    }

    /// Moves columns `first..` of rows of `width` to heads, or `back`.
    fn rows(
        &self,
        rows: &Tensor,
        heads: &Tensor,
        rotary: Option<&[Tensor; 2]>,
        (width, first): (usize, usize),
        back: bool,
    ) -> Result<()> {
        let (batch, count, seq, head_dim) = heads.dims4()?;
        let (cosines, sines) = match rotary {
            Some([cosines, sines]) => (Arg::Tensor(cosines), Arg::Tensor(sines)),
            None => (Arg::Null, Arg::Null),
        };
        let pairs = if rotary.is_some() { head_dim / 2 } else { head_dim };
        let len = batch * count * seq * pairs;
        let args = [
            Arg::Tensor(rows),
            Arg::Tensor(heads),
            cosines,
            sines,
            Arg::Long(len),
            Arg::Int(count),
            Arg::Int(seq),
            Arg::Int(head_dim),
            Arg::Int(width),
            Arg::Int(first),
            Arg::Int(back as usize),
        ];
        Ok(launch(rows.device(), "heads", Grid::elements(len), &args)?)
    }

    /// The weights of a range of queries, before and after dropout, `(B, H, queries, keys)`.
    fn weights(&self, heads: &Heads, queries: &Range<usize>, products: Products) -> Result<(Tensor, Tensor)> {
        let q = heads.q.narrow(2, queries.start, queries.len())?;
        let weights = products.product_transposed(&q, &self.seen(&heads.k, queries)?)?;
        let (batch, count, rows, keys) = weights.dims4()?;
        let mask = self.mask_of(keys)?;
        let args = [
            Arg::Tensor(&weights),
            mask.as_ref().map_or(Arg::Null, Arg::Tensor),
            Arg::Int(rows),
            Arg::Int(keys),
            Arg::Int(count),
            Arg::Int(queries.start),
            Arg::Int(self.causal as usize),
            Arg::Float(self.scale(&q)?),
        ];
        launch(q.device(), "softmax", Grid::rows(batch * count * rows, keys), &args)?;
        let dropped = match self.dropout {
            Some(_) => self.drop_out(&weights, queries, heads.k.dim(2)?)?,
            None => weights.clone(),
        };
        Ok((weights, dropped))
    }

    /// The mask of the first `keys` keys.
    fn mask_of(&self, keys: usize) -> Result<Option<Tensor>> {
        Ok(self.mask.as_ref().map(|mask| mask.narrow(1, 0, keys)?.contiguous()).transpose()?)
    }

    fn scale(&self, q: &Tensor) -> Result<f32> {
        Ok(1.0 / (q.dim(3)? as f32).sqrt())
    }

    /// Each weight has the number that it has among those of all queries and keys.
    fn drop_out(&self, weights: &Tensor, queries: &Range<usize>, seq: usize) -> Result<Tensor> {
        let (rows, keys) = (weights.dim(2)?, weights.dim(3)?);
        let y = like(weights)?;
        let sizes = [Arg::Long(y.elem_count()), Arg::Int(rows), Arg::Int(keys), Arg::Int(seq), Arg::Int(queries.start)];
        let tensors = [Arg::Tensor(weights), Arg::Tensor(&y)];
        let args: Vec<Arg> = tensors.into_iter().chain(sizes).chain(mask_args(self.dropout)).collect();
        launch(y.device(), "dropout_weights", Grid::elements(y.elem_count()), &args)?;
        Ok(y)
    }

    fn backward(
        &self,
        q: &Tensor,
        kv: &Tensor,
        kept: &[(Tensor, Tensor)],
        dy: &Tensor,
        products: Products,
    ) -> Result<Vec<Tensor>> {
        let heads = self.split(q, kv)?;
        let (batch, _, seq, _) = heads.q.dims4()?;
        let dattended = like(&heads.q)?;
        let inner = q.dim(2)?;
        self.rows(dy, &dattended, None, (inner, 0), false)?;
        let (mut dqs, mut dk, mut dv) = (vec![], None, None);
        for (i, queries) in self.blocks(batch, seq).into_iter().enumerate() {
            let (weights, dropped) = match kept.get(i) {
                Some(kept) => kept.clone(),
                None => self.weights(&heads, &queries, products)?,
            };
            let dout = dattended.narrow(2, queries.start, queries.len())?;
            let mut d = products.product_transposed(&dout, &self.seen(&heads.v, &queries)?)?;
            if self.dropout.is_some() {
                d = self.drop_out(&d, &queries, seq)?;
            }
            let (rows, keys) = (d.elem_count() / d.dim(3)?, d.dim(3)?);
            let mask = self.mask_of(keys)?;
            let args = [
                Arg::Tensor(&weights),
                Arg::Tensor(&d),
                mask.as_ref().map_or(Arg::Null, Arg::Tensor),
                Arg::Int(queries.len()),
                Arg::Int(keys),
                Arg::Int(self.heads),
                Arg::Float(self.scale(&heads.q)?),
            ];
            launch(d.device(), "softmax_backward", Grid::rows(rows, keys), &args)?;
            dqs.push(products.product(&d, &self.seen(&heads.k, &queries)?)?);
            let q = heads.q.narrow(2, queries.start, queries.len())?;
            dk = Some(added(dk, products.product(&d.transpose(2, 3)?, &q)?, seq)?);
            dv = Some(added(dv, products.product(&dropped.transpose(2, 3)?, &dout)?, seq)?);
        }
        let dq = if dqs.len() == 1 { dqs.remove(0) } else { Tensor::cat(&dqs, 2)? };
        let (drows, dkv) = (like(q)?, like(kv)?);
        self.rows(&drows, &dq, self.rotary.as_ref(), (inner, 0), true)?;
        if let (Some(dk), Some(dv)) = (dk, dv) {
            self.rows(&dkv, &dk.contiguous()?, self.rotary.as_ref(), (2 * inner, 0), true)?;
            self.rows(&dkv, &dv.contiguous()?, None, (2 * inner, inner), true)?;
        }
        Ok(vec![drows, dkv])
    }
}

/// `sum + part`, where a part is of the first keys and is filled up to `seq` with zeros.
fn added(sum: Option<Tensor>, part: Tensor, seq: usize) -> Result<Tensor> {
    let part = if part.dim(2)? == seq { part } else { part.pad_with_zeros(2, 0, seq - part.dim(2)?)? };
    Ok(match sum {
        Some(sum) => (sum + part)?,
        None => part,
    })
}

/// The scalars of a step of Adam.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// `1 - β₁`
    pub one_minus_beta1: f32,
    /// `β₂`
    pub beta2: f32,
    /// `1 - β₂`
    pub one_minus_beta2: f32,
    /// The root of the second moment's bias correction.
    pub root_bias2: f32,
    /// Keeps the division finite.
    pub eps: f32,
    /// The learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// What the parameter is multiplied by.
    pub decay: f32,
}

/// Changes a parameter and its moments in place. Nobody else may hold them.
pub fn adam(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, s: &Adam) -> Result<()> {
    let g = &g.contiguous()?;
    let args = [
        Arg::Tensor(p),
        Arg::Tensor(g),
        Arg::Tensor(m),
        Arg::Tensor(v),
        Arg::Long(p.elem_count()),
        Arg::Float(s.one_minus_beta1),
        Arg::Float(s.beta2),
        Arg::Float(s.one_minus_beta2),
        Arg::Float(s.root_bias2),
        Arg::Float(s.eps),
        Arg::Float(s.step_size),
        Arg::Float(s.decay),
    ];
    Ok(launch(p.device(), "adam", Grid::elements(p.elem_count()), &args)?)
}

/// The sum and the sum of squares of `x` in `f64`, `(parts, 2)`, to be added up.
pub fn sums(x: &Tensor) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let blocks = x.elem_count().div_ceil(4096).clamp(1, 64);
    let out = unwritten(&[blocks, 2], DType::F64, x.device())?;
    let grid = Grid { blocks: (blocks, 1), threads: 256, shared: 0 };
    launch(x.device(), "sums", grid, &[Arg::Tensor(x), Arg::Tensor(&out), Arg::Long(x.elem_count())])?;
    Ok(out)
}

/// Tensors, then how many elements or rows there are, then sizes.
fn sized<'a>(tensors: &[&'a Tensor], len: usize, sizes: &[usize]) -> Vec<Arg<'a>> {
    let tensors = tensors.iter().map(|tensor| Arg::Tensor(tensor));
    tensors.chain([Arg::Long(len)]).chain(sizes.iter().map(|size| Arg::Int(*size))).collect()
}

/// See [`conv1d_silu_composed`](crate::ops::conv1d::conv1d_silu_composed).
///
/// # Shapes
/// - `x`: `(B, S, width)`, of which columns `first..first + C` are read; `weight`: `(C, 1, K)`, `K` at most 8; `bias`: `(C)`
/// - returns `(B, S, C)`
pub fn conv1d_silu(x: &Tensor, first: usize, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let (batch, seq, width) = x.dims3()?;
    let (channels, _, taps) = weight.dims3()?;
    let len = batch * seq * channels;
    let sizes = [seq, channels, taps, width, first];
    let y = unwritten(&[batch, seq, channels], DType::F32, x.device())?;
    let args = sized(&[x, weight, bias, &y], len, &sizes);
    launch(x.device(), "conv1d_silu", Grid::elements(len), &args)?;
    with_own_backward(&[x, weight, bias], y, move |inputs, dy| {
        let (du, dx) = (like(dy)?, like(dy)?);
        let args = sized(&[inputs[0], inputs[1], inputs[2], dy, &du], len, &sizes);
        launch(dy.device(), "conv1d_silu_backward", Grid::elements(len), &args)?;
        let args = sized(&[inputs[1], &du, &dx], len, &sizes[..3]);
        launch(dy.device(), "conv1d_input_backward", Grid::elements(len), &args)?;
        let slices = (batch * seq).div_ceil(32).clamp(1, SLICES);
        let partial = unwritten(&[slices, channels * (taps + 1)], DType::F32, dy.device())?;
        let args = sized(&[inputs[0], &du, &partial], batch * seq, &sizes);
        let grid = Grid { blocks: (channels.div_ceil(128), slices), threads: 128, shared: 0 };
        launch(dy.device(), "conv1d_weight_backward", grid, &args)?;
        let sums = column_sums(&partial)?.reshape((channels, taps + 1))?;
        let dweight = sums.narrow(1, 0, taps)?.contiguous()?.reshape((channels, 1, taps))?;
        let dbias = sums.narrow(1, taps, 1)?.contiguous()?.flatten_all()?;
        // The other columns of the rows get no gradient from here.
        let dx = dx.pad_with_zeros(2, first, width - first - channels)?;
        Ok(vec![dx, dweight, dbias])
    })
}
