//! One Transformer layer as one fused op: `a = x + attend(shift(x))`, `y = a + feed_forward(shift(a))`, where both
//! normalise their input first (MEGABYTE; Yu et al. 2023).

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::Result;
use mblm_sdk::block::Cost;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::gemm::{Mat, MatMut, Update, matmul};
use mblm_sdk::layer::{Context, Dims, Layer, param_like};
use mblm_sdk::mode::{Dropout, Mode, stream};
use mblm_sdk::ops::attention::Attention;
use mblm_sdk::ops::decoding::{KeysAndValues, ShiftedRow};
use mblm_sdk::ops::gelu;
use mblm_sdk::ops::linear;
use mblm_sdk::ops::on_device;
use mblm_sdk::ops::rms_norm::RmsNorm;
use mblm_sdk::ops::rotary::Rotary;
use mblm_sdk::parallel;
use mblm_sdk::parallel::Threads;
use mblm_sdk::param::{Init, Param, ParamScope};

use super::{EPS, TransformerConfig};

/// What a layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The past; with a token shift before each half.
    Decoder,
    /// The whole sequence.
    Encoder,
}

pub(super) struct TransformerLayer {
    kind: Kind,
    pub(super) dim: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    attn_dropout: f32,
    ff_dropout: f32,
    stream: u64,
    pub(super) rotary: Option<Arc<Rotary>>,
    pub(super) attn_gain: Arc<Param>,
    pub(super) to_q: Arc<Param>,
    pub(super) to_kv: Arc<Param>,
    pub(super) to_out: Arc<Param>,
    pub(super) ff_gain: Arc<Param>,
    pub(super) up: Arc<Param>,
    pub(super) up_bias: Arc<Param>,
    pub(super) down: Arc<Param>,
    pub(super) down_bias: Arc<Param>,
}

/// What backward needs and cannot cheaply recompute.
pub(super) struct Tape {
    /// `(B, S, 3 H d)`, queries and keys rotated.
    pub(super) qkv: Buffer,
    /// `(B, H, S)`
    lse: Buffer,
    /// Attention's output, `(B, S, H d)`.
    attended: Buffer,
    /// The stream between the two halves, `(B, S, D)`.
    pub(super) middle: Buffer,
    /// Before GELU, `(B, S, F)`.
    up: Buffer,
}

impl TransformerLayer {
    pub(super) fn new(
        config: &TransformerConfig,
        kind: Kind,
        dim: usize,
        rotary: Option<Arc<Rotary>>,
        params: &mut ParamScope,
    ) -> Result<Self> {
        let inner = config.attn_head_dims * config.attn_num_heads;
        let wide = dim * config.ff_multiplier;
        let stream = stream(params.prefix());
        let mut attn = params.sub(0);
        let attn_gain = attn.sub("norm").param("g", &[dim], Init::Const(1.0))?;
        let to_q = attn.sub("to_q").weight("weight", &[inner, dim], Init::linear(dim))?;
        let to_kv = attn.sub("to_kv").weight("weight", &[2 * inner, dim], Init::linear(dim))?;
        let to_out = attn.sub("to_out").weight("weight", &[dim, inner], Init::linear(inner))?;
        let mut ff = params.sub(1);
        Ok(TransformerLayer {
            kind,
            dim,
            heads: config.attn_num_heads,
            head_dim: config.attn_head_dims,
            attn_dropout: config.attn_dropout,
            ff_dropout: config.ff_dropout,
            stream,
            rotary,
            attn_gain,
            to_q,
            to_kv,
            to_out,
            ff_gain: ff.sub(0).param("g", &[dim], Init::Const(1.0))?,
            up: ff.sub(1).weight("weight", &[wide, dim], Init::linear(dim))?,
            up_bias: ff.sub(1).param("bias", &[wide], Init::linear(dim))?,
            down: ff.sub(4).weight("weight", &[dim, wide], Init::linear(wide))?,
            down_bias: ff.sub(4).param("bias", &[dim], Init::linear(wide))?,
        })
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(super) fn wide(&self) -> usize {
        self.up_bias.len()
    }

    /// Matrix products and attention; norms and activations are counted by the bytes they keep.
    pub(super) fn cost(&self, seq_len: usize) -> Cost {
        let (dim, inner, wide) = (self.dim as f64, self.inner() as f64, self.wide() as f64);
        let seen = if self.kind == Kind::Decoder { (seq_len as f64 + 1.0) / 2.0 } else { seq_len as f64 };
        Cost {
            flops: 2.0 * (4.0 * dim * inner + 2.0 * dim * wide) + 4.0 * seen * inner,
            activations: 4.0 * inner + 2.0 * dim + wide + self.heads as f64,
        }
    }

    fn norm<'a>(&self, gain: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm { gain, eps: EPS, shift: self.kind == Kind::Decoder }
    }

    fn attention<'a>(&self, context: Context<'a>) -> Attention<'a> {
        Attention {
            batch: context.dims.batch,
            seq: context.dims.seq,
            heads: self.heads,
            head_dim: self.head_dim,
            causal: self.kind == Kind::Decoder,
            mask: context.mask,
            dropout: context.mode.dropout(self.attn_dropout, self.stream),
        }
    }

    fn ff_dropout(&self, mode: Mode) -> Option<Dropout> {
        mode.dropout(self.ff_dropout, self.stream ^ 1)
    }

    /// The norm of the first or second half, after its token shift.
    fn normed(&self, gain: &Param, x: &[f32], context: Context) -> Buffer {
        let (gain, mut h) = (gain.values(), Buffer::take(x.len()));
        for (row, Context { dims, .. }) in context.groups() {
            let part = row * self.dim..row * self.dim + dims.len();
            self.norm(&gain).forward(&x[part.clone()], dims, &mut h[part]);
        }
        h
    }

    /// Adds the gradient of [`normed`](Self::normed)'s input to `dx`.
    fn normed_backward(&self, gain: &Param, x: &[f32], context: Context, dh: &[f32], dx: &mut [f32]) {
        let (values, mut grad) = (gain.values(), gain.grad_mut());
        for (row, Context { dims, .. }) in context.groups() {
            let part = row * self.dim..row * self.dim + dims.len();
            self.norm(&values).backward(&x[part.clone()], dims, &dh[part.clone()], &mut dx[part], &mut grad);
        }
    }

    /// `[q | k | v]` of the normalised rows `h`.
    fn project_qkv(&self, h: &[f32], context: Context, qkv: &mut [f32]) {
        let (rows, inner) = (context.dims.rows(), self.inner());
        for (weight, first, count) in [(&self.to_q, 0, inner), (&self.to_kv, inner, 2 * inner)] {
            let weight = weight.values();
            let out = MatMut::strided(&mut qkv[first..], rows, count, 3 * inner);
            let weight = Mat::new(&weight, count, self.dim);
            matmul(out, Update::Set, Mat::new(h, rows, self.dim), weight.t(), Threads::All);
        }
        self.rotate(qkv, context, false);
    }

    fn rotate(&self, qkv: &mut [f32], context: Context, backward: bool) {
        let Some(rotary) = &self.rotary else { return };
        let wide = 3 * self.inner();
        for (row, Context { dims, .. }) in context.groups() {
            // Queries and keys lie side by side: twice as many heads.
            let part = &mut qkv[row * wide..(row + dims.rows()) * wide];
            rotary.rotate(part, wide, 2 * self.heads, dims.seq, 0, backward);
        }
    }

    fn attend(&self, context: Context, tape: &mut Tape) {
        let (inner, heads) = (self.inner(), self.heads);
        for (row, context) in context.groups() {
            let end = row + context.dims.rows();
            let attended = &mut tape.attended[row * inner..end * inner];
            let qkv = &tape.qkv[row * 3 * inner..end * 3 * inner];
            self.attention(context).forward(qkv, attended, &mut tape.lse[row * heads..end * heads]);
        }
    }

    /// From the gradient of attention's output to that of queries, keys and values.
    fn attend_backward(&self, context: Context, tape: &Tape, dattended: &[f32], dqkv: &mut [f32]) {
        let (inner, heads) = (self.inner(), self.heads);
        for (row, context) in context.groups() {
            let end = row + context.dims.rows();
            let (narrow, wide) = (row * inner..end * inner, row * 3 * inner..end * 3 * inner);
            self.attention(context).backward(
                &tape.qkv[wide.clone()],
                &tape.attended[narrow.clone()],
                &tape.lse[row * heads..end * heads],
                &dattended[narrow],
                &mut dqkv[wide],
            );
        }
    }

    fn project_qkv_backward(&self, h: &[f32], dims: Dims, dqkv: &[f32], dh: &mut [f32]) {
        let (rows, inner) = (dims.rows(), self.inner());
        for (param, first, count) in [(&self.to_q, 0, inner), (&self.to_kv, inner, 2 * inner)] {
            let grad = Mat::strided(&dqkv[first..], rows, count, 3 * inner);
            let weight = param.values();
            let (out, update) = (MatMut::new(dh, rows, self.dim), if first > 0 { Update::Add } else { Update::Set });
            matmul(out, update, grad, Mat::new(&weight, count, self.dim), Threads::All);
            let mut dweight = param.grad_mut();
            let out = MatMut::new(&mut dweight, count, self.dim);
            matmul(out, Update::Add, grad.t(), Mat::new(h, rows, self.dim), Threads::All);
        }
    }

    /// Adds the feed-forward half's gradient to `d`, which holds that of the output and becomes that of `middle`.
    fn feed_forward_backward(&self, context: Context, tape: &Tape, dy: &[f32], d: &mut [f32]) {
        let dropout = self.ff_dropout(context.mode);
        let mut wide = Buffer::take(tape.up.len());
        gelu::forward(&tape.up, dropout, &mut wide);
        linear::backward_weight(dy, &wide, self.wide(), &mut self.down.grad_mut());
        linear::backward_bias(dy, &mut self.down_bias.grad_mut());
        linear::backward_input(dy, &self.down.values(), self.wide(), Update::Set, &mut wide);
        gelu::backward(&tape.up, dropout, &mut wide);
        let mut h = self.normed(&self.ff_gain, &tape.middle, context);
        linear::backward_weight(&wide, &h, self.dim, &mut self.up.grad_mut());
        linear::backward_bias(&wide, &mut self.up_bias.grad_mut());
        linear::backward_input(&wide, &self.up.values(), self.dim, Update::Set, &mut h);
        self.normed_backward(&self.ff_gain, &tape.middle, context, &h, d);
    }

    /// Adds the attention half's gradient to `d`, which holds that of `middle` and becomes that of the input.
    fn attention_backward(&self, x: &[f32], context: Context, tape: &Tape, d: &mut [f32]) {
        let dims = context.dims;
        let mut dattended = Buffer::take(tape.attended.len());
        linear::backward_weight(d, &tape.attended, self.inner(), &mut self.to_out.grad_mut());
        linear::backward_input(d, &self.to_out.values(), self.inner(), Update::Set, &mut dattended);
        let mut dqkv = Buffer::take(tape.qkv.len());
        self.attend_backward(context, tape, &dattended, &mut dqkv);
        self.rotate(&mut dqkv, context, true);
        let (h, mut dh) = (self.normed(&self.attn_gain, x, context), Buffer::take(dims.len()));
        self.project_qkv_backward(&h, dims, &dqkv, &mut dh);
        self.normed_backward(&self.attn_gain, x, context, &dh, d);
    }
}

/// What the next positions of a decoder layer need of those before.
#[derive(Default)]
pub(super) struct Past {
    /// What entered the two halves.
    before: [ShiftedRow; 2],
    cache: KeysAndValues,
}

impl TransformerLayer {
    /// The layer by tensors, where `norm` takes the number of a half, its input and its gain, and `attend` takes queries, and
    /// keys and values.
    fn compose(
        &self,
        x: &Tensor,
        mode: Mode,
        mut norm: impl FnMut(usize, &Tensor, &Tensor) -> Result<Tensor>,
        attend: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let p = |param: &Param| param_like(param, x, mode);
        let h = norm(0, x, &p(&self.attn_gain)?)?;
        let q = on_device::linear(&h, &p(&self.to_q)?, None)?;
        let kv = on_device::linear(&h, &p(&self.to_kv)?, None)?;
        let middle = (x + on_device::linear(&attend(&q, &kv)?, &p(&self.to_out)?, None)?)?;

        let h = norm(1, &middle, &p(&self.ff_gain)?)?;
        let wide = on_device::linear_gelu(&h, &p(&self.up)?, &p(&self.up_bias)?, self.ff_dropout(mode))?;
        Ok((middle + on_device::linear(&wide, &p(&self.down)?, Some(&p(&self.down_bias)?))?)?)
    }

    /// The next positions, `(B, S, D)`, of a decoder layer.
    pub(super) fn advance(&self, x: &Tensor, past: &mut Past) -> Result<Tensor> {
        let Past { before, cache } = past;
        let norm = |half: usize, x: &Tensor, gain: &Tensor| {
            on_device::rms_norm(&before[half].token_shift(x)?, gain, EPS, false)
        };
        let attend = |q: &Tensor, kv: &Tensor| cache.attend(q, kv, self.heads, self.rotary.as_deref());
        self.compose(x, Mode::Eval, norm, attend)
    }
}

impl Layer for TransformerLayer {
    type Tape = Tape;

    fn composed(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let causal = self.kind == Kind::Decoder;
        let (heads, dropout) = (self.heads, mode.dropout(self.attn_dropout, self.stream));
        let attention = on_device::Attention { heads, causal, mask, dropout, rotary: self.rotary.as_deref() };
        let norm = |_, x: &Tensor, gain: &Tensor| on_device::rms_norm(x, gain, EPS, causal);
        self.compose(x, mode, norm, |q, kv| attention.forward(q, kv))
    }

    fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) -> Tape {
        let dims = context.dims;
        let rows = dims.rows();
        let h = self.normed(&self.attn_gain, x, context);
        let mut tape = Tape {
            qkv: Buffer::take(rows * 3 * self.inner()),
            lse: Buffer::take(rows * self.heads),
            attended: Buffer::take(rows * self.inner()),
            middle: Buffer::take(dims.len()),
            up: Buffer::take(rows * self.wide()),
        };
        self.project_qkv(&h, context, &mut tape.qkv);
        self.attend(context, &mut tape);
        parallel::copy(x, &mut tape.middle);
        linear::forward(&tape.attended, &self.to_out.values(), self.inner(), Update::Add, &mut tape.middle);

        let h = self.normed(&self.ff_gain, &tape.middle, context);
        linear::forward(&h, &self.up.values(), self.dim, Update::Set, &mut tape.up);
        linear::add_bias(&self.up_bias.values(), &mut tape.up);
        let mut wide = Buffer::take(tape.up.len());
        gelu::forward(&tape.up, self.ff_dropout(context.mode), &mut wide);
        linear::residual(&tape.middle, &self.down_bias.values(), y);
        linear::forward(&wide, &self.down.values(), self.wide(), Update::Add, y);
        tape
    }

    fn backward(&self, x: &[f32], context: Context, tape: Tape, dy: &[f32], dx: &mut [f32]) {
        parallel::copy(dy, dx);
        self.feed_forward_backward(context, &tape, dy, dx);
        self.attention_backward(x, context, &tape, dx);
    }
}
