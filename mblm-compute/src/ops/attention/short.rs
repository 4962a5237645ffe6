//! Attention over few keys: plain loops, which the compiler turns into SIMD.

use super::{Attention, Backward, Head, SHORT};
use crate::gemm::MatMut;
use crate::simd;

impl Attention<'_> {
    #[inline(always)]
    pub(super) fn forward_short(&self, head: &Head, mut out: MatMut, lse: &mut [f32]) {
        let stride = 3 * self.inner();
        let mut weights = [0.0; SHORT];
        for (i, lse) in lse.iter_mut().enumerate() {
            let weights = &mut weights[..self.visible(i)];
            dots(self.scale(), &head.q[i * stride..][..self.head_dim], head.k, stride, weights);
            let factor;
            (factor, *lse) = self.softmax(head, i, weights);
            let out = out.row(i);
            out.fill(0.0);
            for (j, weight) in weights.iter().enumerate() {
                simd::axpy(factor * weight, &head.v[j * stride..][..self.head_dim], out);
            }
        }
    }
}

impl Backward<'_> {
    #[inline(always)]
    pub(super) fn short(mut self) {
        let (inner, dim) = (self.attention.inner(), self.attention.head_dim);
        let stride = 3 * inner;
        let (mut weights, mut grads) = ([0.0; SHORT], [0.0; SHORT]);
        for row in 0..self.attention.seq {
            self.dk.row(row).fill(0.0);
            self.dv.row(row).fill(0.0);
        }
        for i in 0..self.attention.seq {
            let visible = self.attention.visible(i);
            let (p, dp) = (&mut weights[..visible], &mut grads[..visible]);
            let (q, dout) = (&self.head.q[i * stride..][..dim], &self.dout[i * inner..][..dim]);
            let scale = self.attention.scale();
            dots(scale, q, self.head.k, stride, p);
            dots(1.0, dout, self.head.v, stride, dp);
            self.softmax(i, 0, self.delta(i), p, dp);
            let dq = self.dq.row(i);
            dq.fill(0.0);
            for (j, (p, dp)) in p.iter().zip(dp.iter()).enumerate() {
                simd::axpy(*p, dout, self.dv.row(j));
                simd::axpy(scale * dp, q, self.dk.row(j));
                simd::axpy(scale * dp, &self.head.k[j * stride..][..dim], dq);
            }
        }
    }
}

/// `out[j] = scale * a · b[j]`, where the rows of `b` are `stride` apart.
#[inline(always)]
fn dots(scale: f32, a: &[f32], b: &[f32], stride: usize, out: &mut [f32]) {
    for (j, out) in out.iter_mut().enumerate() {
        *out = scale * simd::dot(a, &b[j * stride..][..a.len()]);
    }
}
