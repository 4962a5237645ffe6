//! Attention as matrix products around kernels for the heads, the softmax and the dropout of its weights.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::dropout::mask_args;
use super::launch::{Arg, Grid, launch, like, unwritten};
use crate::backward::with_own_backward;
use crate::error::Result;
use crate::mode::Dropout;
use crate::ops::product::Products;

/// Attention weights that exist at the same time; those of a whole pass are kept for backward if they are not more.
const WEIGHTS: usize = 1 << 27;

/// Most queries of a block where only the past is seen: what a block does not see is not computed.
const CAUSAL_QUERIES: usize = 768;

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
