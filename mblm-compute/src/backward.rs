//! Nodes of candle's graph over tensors of any device and type, whose backward is a function of tensors: for what is
//! computed again instead of kept, and for what a device has kernels of its own.

use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Shape, Storage, Tensor, Var,
};

use crate::error::{Error, Result};

/// `y` as a node of the graph over up to three `inputs`, on any device and in any type, with a backward of its own: it takes
/// the inputs and the gradient of `y`, and returns the gradient of each input. What `y` was computed from is forgotten, so
/// that what backward computes again takes no memory until then.
pub fn with_backward(
    inputs: &[&Tensor],
    y: &Tensor,
    backward: impl Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    if inputs.iter().all(|input| !input.track_op()) {
        return Ok(y.detach());
    }
    let y = y.detach();
    let is_whole = y.is_contiguous() && y.storage_and_layout().1.start_offset() == 0;
    let y = if is_whole { y } else { y.force_contiguous()? };
    node(inputs, Given::new(y, backward))
}

/// As [`with_backward`], for a `y` that nobody else holds: its memory becomes the node's, where the device allows it.
///
/// # Shapes
/// - `y` is contiguous and the whole of its storage
#[cfg(feature = "cuda")]
pub(crate) fn with_own_backward(
    inputs: &[&Tensor],
    y: Tensor,
    backward: impl Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    if inputs.iter().all(|input| !input.track_op()) {
        return Ok(y);
    }
    node(inputs, Given { is_own: true, ..Given::new(y.detach(), backward) })
}

fn node<F>(inputs: &[&Tensor], op: Given<F>) -> Result<Tensor>
where
    F: Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    Ok(match inputs {
        [x] => x.apply_op1(op)?,
        [x, z] => x.apply_op2(z, op)?,
        [x, z, w] => x.apply_op3(z, w, op)?,
        _ => return Err(Error::Input(format!("a node has one to three inputs, found {}", inputs.len()))),
    })
}

/// Runs `f` on `inputs` and keeps nothing of it but the output; backward runs it once more (Chen et al. 2016). `fold` takes
/// what else the second run gave gradients to, such as parameters.
pub fn recomputed(
    inputs: &[&Tensor],
    f: impl Fn(&[&Tensor]) -> Result<Tensor> + Send + Sync + 'static,
    fold: impl Fn(&GradStore) -> Result<()> + Send + Sync + 'static,
) -> Result<Tensor> {
    let detached: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    let y = f(&detached.iter().collect::<Vec<_>>())?;
    with_backward(inputs, &y, move |inputs, dy| {
        let inputs = inputs.iter().map(|input| Var::from_tensor(input)).collect::<candle_core::Result<Vec<_>>>()?;
        let y = f(&inputs.iter().map(|input| input.as_tensor()).collect::<Vec<_>>())?;
        let grads = backward_from(&y, dy.clone())?;
        fold(&grads)?;
        let grad = |input: &Var| match grads.get(input.as_tensor()) {
            Some(grad) => Ok(grad.clone()),
            None => input.zeros_like(),
        };
        Ok(inputs.iter().map(grad).collect::<candle_core::Result<Vec<_>>>()?)
    })
}

/// See [`with_backward`].
struct Given<F> {
    y: Tensor,
    /// Whether nobody else has the memory of `y`, so that it can be taken instead of copied.
    #[cfg(feature = "cuda")]
    is_own: bool,
    backward: F,
}

/// Backward from `y` when the gradient of the loss with respect to it is `dy`.
pub fn backward_from(y: &Tensor, dy: Tensor) -> candle_core::Result<GradStore> {
    let loss = Tensor::zeros((), y.dtype(), y.device())?;
    y.apply_op1(Given::new(loss, move |_: &[&Tensor], _: &Tensor| Ok(vec![dy.clone()])))?.backward()
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>>> Given<F> {
    fn new(y: Tensor, backward: F) -> Self {
        Given {
            y,
            #[cfg(feature = "cuda")]
            is_own: false,
            backward,
        }
    }

    fn back(&self, inputs: &[&Tensor], dy: &Tensor) -> candle_core::Result<std::vec::IntoIter<Tensor>> {
        Ok((self.backward)(inputs, &dy.contiguous()?)?.into_iter())
    }
}

/// A copy of the output, where `$variant` is the storage of the device.
macro_rules! copied {
    ($given:ident, $variant:ident) => {{
        let (storage, layout) = $given.y.storage_and_layout();
        match &*storage {
            Storage::$variant(y) => Ok((y.try_clone(layout)?, $given.y.shape().clone())),
            _ => candle_core::bail!("the output of a node lies on another device than its inputs"),
        }
    }};
}

/// The forward passes of a custom op that takes these many storages.
macro_rules! forwards {
    ($($input:ident),+) => {
        fn name(&self) -> &'static str {
            "given"
        }
        fn cpu_fwd(&self, $($input: &CpuStorage, _: &Layout),+) -> candle_core::Result<(CpuStorage, Shape)> {
            $(let _ = $input;)+
            copied!(self, Cpu)
        }
        fn cuda_fwd(&self, $($input: &CudaStorage, _: &Layout),+) -> candle_core::Result<(CudaStorage, Shape)> {
            $(let _ = $input;)+
            #[cfg(feature = "cuda")]
            if self.is_own {
                return Ok((crate::cuda::take(&self.y)?, self.y.shape().clone()));
            }
            copied!(self, Cuda)
        }
        fn metal_fwd(&self, $($input: &MetalStorage, _: &Layout),+) -> candle_core::Result<(MetalStorage, Shape)> {
            $(let _ = $input;)+
            copied!(self, Metal)
        }
    };
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync> CustomOp1 for Given<F> {
    forwards!(x);
    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(self.back(&[x], dy)?.next())
    }
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync> CustomOp2 for Given<F> {
    forwards!(x, z);
    fn bwd(
        &self,
        x: &Tensor,
        z: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.back(&[x, z], dy)?;
        Ok((grads.next(), grads.next()))
    }
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync> CustomOp3 for Given<F> {
    forwards!(x, z, w);
    fn bwd(
        &self,
        x: &Tensor,
        z: &Tensor,
        w: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.back(&[x, z, w], dy)?;
        Ok((grads.next(), grads.next(), grads.next()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::testing::noise;

    #[test]
    fn what_is_recomputed_has_the_gradients_of_one_pass() {
        for dtype in [DType::F32, DType::F64] {
            let var = |seed| {
                let values = Tensor::from_vec(noise(6, seed), (2, 3), &Device::Cpu).unwrap();
                Var::from_tensor(&values.to_dtype(dtype).unwrap()).unwrap()
            };
            let (x, z, w) = (var(1), var(2), var(3));
            let f = |inputs: &[&Tensor]| Ok(((inputs[0] * inputs[1])?.exp()? * inputs[2])?);
            let inputs = [x.as_tensor(), z.as_tensor(), w.as_tensor()];
            let whole = (f(&inputs).unwrap() * 2.0).unwrap().backward().unwrap();
            let again = (recomputed(&inputs, f, |_| Ok(())).unwrap() * 2.0).unwrap().backward().unwrap();
            for input in inputs {
                let flat = |grads: &GradStore| {
                    let grad = grads.get(input).unwrap().to_dtype(DType::F64).unwrap();
                    grad.flatten_all().unwrap().to_vec1::<f64>().unwrap()
                };
                assert_eq!(flat(&whole), flat(&again));
            }
        }
    }

    #[test]
    fn nothing_is_kept_where_no_gradient_is_asked_for() {
        let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let y = recomputed(&[&x], |inputs| Ok(inputs[0].exp()?), |_| Ok(())).unwrap();
        assert!(!y.track_op());
    }
}
