//! The definition in candle ops: whole for short sequences, and in blocks of queries for long ones. Backward computes each
//! block's weights again (Chen et al. 2016), so that memory is linear in the length.

use std::ops::Range;

use candle_core::{D, Tensor};

use crate::backward::recomputed;
use crate::error::Result;
use crate::mode::Dropout;
use crate::ops::dropout::{dropout_composed, made_at};
use crate::ops::product::Products;
use crate::ops::tables::positions;

/// Up to this many positions all weights exist at once.
const WHOLE: usize = 1024;

/// Queries whose weights exist at once in longer sequences.
const QUERIES: usize = 512;

/// What is added to the scores of keys that are in the future, or masked. These are large negative numbers rather than -inf:
/// a row whose visible keys are all masked becomes uniform over these.
const FUTURE: f32 = -2e30;
const MASKED: f32 = -1e30;

/// Softmax over the last dimension; every operation has a backward.
pub fn softmax_composed(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let exp = shifted.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

/// The definition, with products in the precision of [`gemm::autocast`](crate::gemm::autocast) on a GPU.
///
/// # Shapes
/// - `q`, `k`, `v`: `(B, H, S, d)`; `mask`: `(B, S)`, nonzero = attend; returns `(B, H, S, d)`
pub fn attention_composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    causal: bool,
    mask: Option<&Tensor>,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let seq = q.dim(2)?;
    let (q, k, v) = (&q.contiguous()?, &k.contiguous()?, &v.contiguous()?);
    let definition = Definition { seq, causal, mask: mask.cloned(), dropout, products: Products::of(q) };
    match seq <= WHOLE {
        true => definition.attend([q, k, v], 0..seq),
        false => definition.in_blocks([q, k, v], QUERIES),
    }
}

/// The definition for the last positions alone: `q` are the queries of those, `k` and `v` belong to all positions so far. No
/// weights of more than [`QUERIES`] positions exist at once.
///
/// # Shapes
/// - `q`: `(B, H, S, d)`; `k`, `v`: `(B, H, T, d)`, rows and heads one after another; returns `(B, H, S, d)`
pub(crate) fn attention_of_last(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let ((_, _, seq, _), len) = (q.dims4()?, k.dim(2)?);
    // One query sees everything.
    let definition = Definition { seq: len, causal: seq > 1, mask: None, dropout: None, products: Products::of(q) };
    let block = |first: usize| {
        let count = QUERIES.min(seq - first);
        let end = len - seq + first + count;
        let inputs = [q.narrow(2, first, count)?, k.narrow(2, 0, end)?, v.narrow(2, 0, end)?];
        definition.attend(inputs.each_ref(), end - count..end)
    };
    let blocks = (0..seq).step_by(QUERIES).map(block).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&blocks, 2)?)
}

/// `(B, S, H d)` as `(B, H, S, d)`.
pub(crate) fn split_heads(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, seq, inner) = rows.dims3()?;
    Ok(rows.reshape((batch, seq, heads, inner / heads))?.transpose(1, 2)?.contiguous()?)
}

/// `(B, H, S, d)` as `(B, S, H d)`.
pub(crate) fn join_heads(heads: &Tensor) -> Result<Tensor> {
    let (batch, count, seq, head_dim) = heads.dims4()?;
    Ok(heads.transpose(1, 2)?.reshape((batch, seq, count * head_dim))?)
}

#[derive(Clone)]
struct Definition {
    /// Positions of the whole sequence.
    seq: usize,
    causal: bool,
    mask: Option<Tensor>,
    dropout: Option<Dropout>,
    products: Products,
}

impl Definition {
    /// Block by block, keeping no weights.
    fn in_blocks(&self, [q, k, v]: [&Tensor; 3], len: usize) -> Result<Tensor> {
        let seq = self.seq;
        let block = |first: usize| {
            let queries = first..seq.min(first + len);
            let keys = if self.causal { queries.end } else { seq };
            let inputs = [q.narrow(2, first, queries.len())?, k.narrow(2, 0, keys)?, v.narrow(2, 0, keys)?];
            let definition = self.clone();
            recomputed(
                &inputs.each_ref(),
                move |inputs| definition.attend([inputs[0], inputs[1], inputs[2]], queries.clone()),
                |_| Ok(()),
            )
        };
        let blocks = (0..seq).step_by(len).map(block).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&blocks, 2)?)
    }

    /// The outputs of `queries`, where `k` and `v` are those of all keys from 0 on that they see. Operands of products: rows
    /// are contiguous, and heads and sequences at equal distances.
    fn attend(&self, [q, k, v]: [&Tensor; 3], queries: Range<usize>) -> Result<Tensor> {
        let (_, _, keys, head_dim) = k.dims4()?;
        let mut scores = (self.products.product_transposed(q, k)? * (head_dim as f64).powf(-0.5))?;
        if let Some(mask) = &self.mask {
            let mask = mask.narrow(1, 0, keys)?.unsqueeze(1)?.unsqueeze(1)?.broadcast_as(scores.shape())?;
            let masked = Tensor::full(MASKED, (), q.device())?.to_dtype(q.dtype())?.broadcast_as(scores.shape())?;
            scores = mask.where_cond(&scores, &masked)?;
        }
        if self.causal {
            let at = positions(keys, q.device())?;
            let query = at.narrow(0, queries.start, queries.len())?.unsqueeze(1)?;
            let future = at.unsqueeze(0)?.broadcast_gt(&query)?.to_dtype(q.dtype())?;
            scores = scores.broadcast_add(&(future * FUTURE as f64)?)?;
        }
        let weights = self.drop_out(&softmax_composed(&scores)?, queries)?;
        self.products.product(&weights, v)
    }

    /// Weights have the numbers that they have among those of all queries and keys.
    fn drop_out(&self, weights: &Tensor, queries: Range<usize>) -> Result<Tensor> {
        let Some(dropout) = self.dropout else { return Ok(weights.clone()) };
        let (batch, heads, _, keys) = weights.dims4()?;
        if (queries.len(), keys) == (self.seq, self.seq) {
            return dropout_composed(weights, Some(dropout));
        }
        let rows = (0..batch * heads).flat_map(|head| queries.clone().map(move |i| (head * self.seq + i) * self.seq));
        let factors = rows.flat_map(|first| (first..first + keys).map(|i| dropout.factor(i)));
        let factors = made_at(weights.device(), weights.dims(), factors)?;
        Ok((weights * factors.to_dtype(weights.dtype())?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};
    use mblm_base::random::noise;

    use super::*;
    use crate::ops::attention::Attention;
    use crate::testing::assert_close;

    /// The outputs and the gradients of q, k and v.
    fn run(
        dtype: DType,
        [batch, heads, seq, dim]: [usize; 4],
        f: impl Fn([&Tensor; 3]) -> Result<Tensor>,
    ) -> [Vec<f32>; 4] {
        let tensor = |seed| {
            let values = noise(batch * heads * seq * dim, seed);
            Tensor::from_vec(values, (batch, heads, seq, dim), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let [q, k, v] = [1, 2, 3].map(|seed| Var::from_tensor(&tensor(seed)).unwrap());
        let y = f([&q, &k, &v]).unwrap();
        let grads = (&y * tensor(4)).unwrap().sum_all().unwrap().backward().unwrap();
        let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        [flat(&y), flat(grads.get(&q).unwrap()), flat(grads.get(&k).unwrap()), flat(grads.get(&v).unwrap())]
    }

    fn definition(batch: usize, seq: usize, causal: bool, products: Products) -> Definition {
        let mask: Vec<u8> = (0..batch * seq).map(|i| (i % 5 != 3) as u8).collect();
        let mask = Some(Tensor::from_vec(mask, (batch, seq), &Device::Cpu).unwrap());
        Definition { seq, causal, mask, dropout: Some(Dropout::new(0.3, 7, 0)), products }
    }

    #[test]
    fn blocks_give_the_same_as_the_whole() {
        for (sizes, len) in [([2, 3, 17, 4], 5), ([1, 2, 16, 3], 8), ([2, 1, 9, 2], 1)] {
            for causal in [true, false] {
                for (dtype, tolerance) in [(DType::F64, 1e-7), (DType::F32, 1e-5)] {
                    let products = Products::of(&Tensor::zeros((), dtype, &Device::Cpu).unwrap());
                    let definition = definition(sizes[0], sizes[2], causal, products);
                    let whole = run(dtype, sizes, |inputs| definition.attend(inputs, 0..sizes[2]));
                    let blocks = run(dtype, sizes, |inputs| definition.in_blocks(inputs, len));
                    for (part, (got, want)) in ["output", "dq", "dk", "dv"].iter().zip(blocks.iter().zip(&whole)) {
                        assert_close(&format!("{part} of {sizes:?} by {len}, {dtype:?}"), got, want, tolerance);
                    }
                }
            }
        }
    }

    /// Packs `(B, H, S, d)` tensors as columns of `(B, S, …)`.
    fn packed(parts: &[&Tensor]) -> Vec<f32> {
        let rows = |t: &&Tensor| t.transpose(1, 2).unwrap().flatten_from(2).unwrap();
        let packed = Tensor::cat(&parts.iter().map(rows).collect::<Vec<_>>(), 2).unwrap();
        packed.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn fused_equals_composed_whole_and_in_blocks() {
        for [batch, heads, seq, dim] in [[2, 3, 20, 4], [2, 2, 70, 5], [1, 1, WHOLE + 76, 3]] {
            for causal in [true, false] {
                // The first queries see masked keys alone where they see the past alone.
                let mask: Vec<u8> = (0..batch * seq).map(|i| (i % seq > 2 && i % 5 != 3) as u8).collect();
                let dropout = Some(Dropout::new(0.3, 7, 0));
                let tensor = |seed| {
                    let values = noise(batch * heads * seq * dim, seed);
                    Tensor::from_vec(values, (batch, heads, seq, dim), &Device::Cpu).unwrap()
                };
                let (qkv, dy) = (packed(&[&tensor(1), &tensor(2), &tensor(3)]), packed(&[&tensor(4)]));
                let fused = Attention { batch, seq, heads, head_dim: dim, causal, mask: Some(&mask), dropout };
                let (mut y, mut lse) = (vec![f32::NAN; dy.len()], vec![f32::NAN; batch * heads * seq]);
                let mut dqkv = vec![f32::NAN; qkv.len()];
                fused.forward(&qkv, &mut y, &mut lse);
                fused.backward(&qkv, &y, &lse, &dy, &mut dqkv);

                let [q, k, v] =
                    [1, 2, 3].map(|seed| Var::from_tensor(&tensor(seed).to_dtype(DType::F64).unwrap()).unwrap());
                let mask = Tensor::from_slice(&mask, (batch, seq), &Device::Cpu).unwrap();
                let composed = attention_composed(&q, &k, &v, causal, Some(&mask), dropout).unwrap();
                let loss = (&composed * tensor(4).to_dtype(DType::F64).unwrap()).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                let grads = [&q, &k, &v].map(|part| grads.get(part).unwrap());
                assert_close(&format!("output, {seq} positions, causal {causal}"), &y, &packed(&[&composed]), 2e-5);
                assert_close(&format!("gradients, {seq} positions, causal {causal}"), &dqkv, &packed(&grads), 2e-5);
            }
        }
    }

    #[test]
    fn bf16_is_close_to_f32() {
        let sizes = [2, 2, 33, 16];
        let products = Products::of(&Tensor::zeros((), DType::F32, &Device::Cpu).unwrap());
        let [f32, bf16] = [products, Products::in_bf16()].map(|products| {
            let definition = definition(sizes[0], sizes[2], true, products);
            run(DType::F32, sizes, |inputs| definition.in_blocks(inputs, 8))
        });
        assert!(f32[0] != bf16[0], "nothing was rounded");
        for (part, (got, want)) in ["output", "dq", "dk", "dv"].iter().zip(bf16.iter().zip(&f32)) {
            assert_close(part, got, want, 0.02);
        }
    }
}
