//! How bytes become the tokens of a stage. The local stage looks bytes up; a stage above looks all bytes of a patch up
//! in a table of its own and projects them: flatten, LayerNorm, Linear, LayerNorm.

use std::sync::Arc;

use candle_core::{Shape, Tensor};
use mblm_sdk::buffer::Buffer;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::gemm::Update;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1};
use mblm_sdk::ops::embedding::embedding_composed;
use mblm_sdk::ops::layer_norm;
use mblm_sdk::ops::{linear, on_device};
use mblm_sdk::parallel::{self, Shared, for_rows, reduce_rows};
use mblm_sdk::param::{Init, Param, ParamScope};
use mblm_sdk::simd;

use super::tokens::Tokens;

/// Floats of looked-up bytes that a projection works on at a time: enough rows for a fast product, and no more memory
/// than a long sequence can afford.
const CHUNK: usize = 1 << 22;

/// The token embedding of one stage.
#[derive(Clone)]
pub(crate) struct TokenEmbedding {
    /// `(V, D_N)`
    table: Arc<Param>,
    /// Bytes of a token.
    patch: usize,
    projection: Option<Projection>,
}

#[derive(Clone)]
struct Projection {
    norm_in: [Arc<Param>; 2],
    weight: Arc<Param>,
    bias: Arc<Param>,
    norm_out: [Arc<Param>; 2],
}

/// The sizes of a stage's embedding.
pub(crate) struct EmbeddingSizes {
    pub vocab: usize,
    pub pad: usize,
    /// Width of the local stage, which all tables share.
    pub local_dim: usize,
    /// Bytes of a token.
    pub patch: usize,
    /// Width of the stage.
    pub dim: usize,
    pub is_local: bool,
}

impl TokenEmbedding {
    pub(crate) fn new(sizes: &EmbeddingSizes, params: &mut ParamScope) -> Result<Self> {
        let table = params.sub("embedding").embedding(sizes.vocab, sizes.local_dim, Some(sizes.pad))?;
        let flat = sizes.patch.checked_mul(sizes.local_dim).ok_or_else(|| {
            let EmbeddingSizes { patch, local_dim, .. } = sizes;
            Error::Input(format!(
                "a patch of {patch} bytes, {local_dim} wide each, does not fit 64 bits; lower seq_lens"
            ))
        })?;
        let mut post = params.sub("_post");
        let projection = match sizes.is_local {
            true => None,
            false => {
                let norm = |width: usize, scope: &mut ParamScope| -> Result<_> {
                    let weight = scope.param("weight", &[width], Init::Const(1.0))?;
                    Ok([weight, scope.param("bias", &[width], Init::Const(0.0))?])
                };
                Some(Projection {
                    norm_in: norm(flat, &mut post.sub(1))?,
                    weight: post.sub(2).weight("weight", &[sizes.dim, flat], Init::linear(flat))?,
                    bias: post.sub(2).param("bias", &[sizes.dim], Init::linear(flat))?,
                    norm_out: norm(sizes.dim, &mut post.sub(3))?,
                })
            }
        };
        Ok(TokenEmbedding { table, patch: sizes.patch, projection })
    }

    /// Width of the tokens.
    pub(crate) fn dim(&self) -> usize {
        self.projection.as_ref().map_or(self.table.shape()[1], |p| p.bias.len())
    }

    /// The tokens of `ids`, `(ids / patch, D)`.
    pub(crate) fn forward(&self, ids: &Tokens, mode: Mode) -> Result<Tensor> {
        apply1(Embed { embedding: self.clone(), ids: ids.clone() }, &self.table.tensor(mode), mode)
    }

    /// The tokens of `ids` as rows of `out`, for decoding.
    pub(crate) fn rows(&self, ids: &[u32], out: &mut [f32]) {
        let mut projected = Buffer::take(if self.projection.is_some() { out.len() } else { 0 });
        self.run(&self.table.values(), ids, out, &mut projected);
    }

    /// `(V, D_N)`
    pub(crate) fn table(&self) -> &Arc<Param> {
        &self.table
    }

    fn look_up(&self, table: &[f32], ids: &[u32], out: &mut [f32]) {
        let width = self.table.shape()[1];
        let out = Shared::new(out);
        for_rows(ids.len(), width, |range| {
            // SAFETY: ranges of rows do not overlap.
            let out = unsafe { out.slice(range.start * width..range.end * width) };
            for (row, id) in out.chunks_exact_mut(width).zip(&ids[range]) {
                row.copy_from_slice(&table[*id as usize * width..][..width]);
            }
        });
    }

    /// Writes the tokens of `ids` to `y`; with a projection, also what it has before its second norm to `projected`.
    fn run(&self, table: &[f32], ids: &[u32], y: &mut [f32], projected: &mut [f32]) {
        let Some(p) = &self.projection else { return self.look_up(table, ids, y) };
        let inputs = p.norm_in[0].len();
        for (ids, out) in self.chunks(ids).zip(projected.chunks_mut(self.chunk_rows() * self.dim())) {
            let normed = self.normed(p, table, ids).0;
            linear::step(&normed, &p.weight.values(), Some(&p.bias.values()), inputs, Update::Set, out);
        }
        layer_norm::forward(projected, &p.norm_out[0].values(), &p.norm_out[1].values(), layer_norm::EPS, y);
    }

    /// The looked-up bytes after and before the first norm, `(ids, D_N)`.
    fn normed(&self, p: &Projection, table: &[f32], ids: &[u32]) -> (Buffer, Buffer) {
        let mut flat = Buffer::take(ids.len() * self.table.shape()[1]);
        self.look_up(table, ids, &mut flat);
        let mut normed = Buffer::take(flat.len());
        layer_norm::forward(&flat, &p.norm_in[0].values(), &p.norm_in[1].values(), layer_norm::EPS, &mut normed);
        (normed, flat)
    }

    /// Tokens whose bytes' vectors exist at the same time.
    fn chunk_rows(&self) -> usize {
        (CHUNK / (self.patch * self.table.shape()[1])).max(1)
    }

    fn chunks<'a>(&self, ids: &'a [u32]) -> impl Iterator<Item = &'a [u32]> + use<'a> {
        ids.chunks(self.chunk_rows() * self.patch)
    }
}

/// Ids are constants, so the graph's input is the table: an op without a differentiable input gets no backward.
struct Embed {
    embedding: TokenEmbedding,
    ids: Tokens,
}

impl Embed {
    /// Scatters the gradients of looked-up rows, `d`: `(ids, D_N)`, into the table's.
    fn scatter(&self, ids: &[u32], d: &[f32], table: &mut [f32]) {
        let width = self.embedding.table.shape()[1];
        reduce_rows(ids.len(), width, table, |range, table| {
            for i in range {
                simd::add(&d[i * width..][..width], &mut table[ids[i] as usize * width..][..width]);
            }
        });
    }
}

impl Node for Embed {
    /// `(R, D)`, what a projection has before its second norm. What comes before is computed again in backward: the
    /// vectors of all bytes would take as much memory as a whole stage.
    type Tape = Buffer;

    fn shape(&self) -> Shape {
        (self.ids.len() / self.embedding.patch, self.embedding.dim()).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<Buffer> {
        let mut projected = Buffer::take(if self.embedding.projection.is_some() { y.len() } else { 0 });
        self.embedding.run(inputs[0], &self.ids, y, &mut projected);
        Ok(projected)
    }

    fn backward(&self, inputs: &[&[f32]], projected: Buffer, dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let embedding = &self.embedding;
        let Some(p) = &embedding.projection else {
            self.scatter(&self.ids, dy, &mut grads[0]);
            return Ok(());
        };
        let mut d = Buffer::take(dy.len());
        parallel::copy(dy, &mut d);
        let [weight, bias] = &p.norm_out;
        let values = weight.values();
        layer_norm::backward(
            &projected,
            &values,
            layer_norm::EPS,
            &mut d,
            &mut weight.grad_mut(),
            &mut bias.grad_mut(),
        );
        linear::backward_bias(&d, &mut p.bias.grad_mut());
        let inputs_len = p.norm_in[0].len();
        let [weight, bias] = &p.norm_in;
        let values = weight.values();
        for (ids, d) in embedding.chunks(&self.ids).zip(d.chunks(embedding.chunk_rows() * embedding.dim())) {
            let (normed, flat) = embedding.normed(p, inputs[0], ids);
            linear::backward_weight(d, &normed, inputs_len, &mut p.weight.grad_mut());
            let mut dflat = normed;
            linear::backward_input(d, &p.weight.values(), inputs_len, Update::Set, &mut dflat);
            layer_norm::backward(
                &flat,
                &values,
                layer_norm::EPS,
                &mut dflat,
                &mut weight.grad_mut(),
                &mut bias.grad_mut(),
            );
            self.scatter(ids, &dflat, &mut grads[0]);
        }
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], mode: Mode) -> Result<Tensor> {
        let looked_up = embedding_composed(inputs[0], &self.ids.tensor(inputs[0].device())?)?;
        let Some(p) = &self.embedding.projection else { return Ok(looked_up) };
        let norm = |x: &Tensor, [weight, bias]: &[Arc<Param>; 2]| {
            on_device::layer_norm(x, &weight.tensor(mode), &bias.tensor(mode), layer_norm::EPS)
        };
        let flat = looked_up.reshape((self.ids.len() / self.embedding.patch, p.norm_in[0].len()))?;
        let projected =
            on_device::linear(&norm(&flat, &p.norm_in)?, &p.weight.tensor(mode), Some(&p.bias.tensor(mode)))?;
        norm(&projected, &p.norm_out)
    }
}
