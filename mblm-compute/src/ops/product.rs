//! Matrix products of compositions, in the precision of [`gemm::autocast`](crate::gemm::autocast).

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::gemm::{self, Precision};

/// What the operands of products are rounded to. Operands are contiguous or transposed; results are of the type of the first.
#[derive(Clone, Copy)]
pub struct Products(Precision);

impl Products {
    /// The precision around this call for products with `x`. It is that of `f32` on a GPU alone: candle's products of
    /// bfloat16 are slow on a CPU, and `f64` is for checks.
    pub fn of(x: &Tensor) -> Self {
        match x.dtype() {
            DType::F32 if !x.device().is_cpu() => Products(gemm::requested()),
            _ => Products(Precision::F32),
        }
    }

    #[cfg(test)]
    pub fn in_bf16() -> Self {
        Products(Precision::Bf16)
    }

    /// `a b`
    pub fn product(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(self.rounded(a)?.matmul(&self.rounded(b)?)?.to_dtype(a.dtype())?)
    }

    /// `a bᵀ`
    pub fn product_transposed(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(self.rounded(a)?.matmul(&self.rounded(b)?.t()?)?.to_dtype(a.dtype())?)
    }

    fn rounded(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.0 {
            Precision::F32 => x.clone(),
            Precision::Bf16 => x.to_dtype(DType::BF16)?,
        })
    }
}
