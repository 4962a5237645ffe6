//! Fused ops as nodes of candle's graph: one to three tensors in, one out, with a hand-written backward over slices.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Storage, Tensor};

use crate::device;
use crate::error::{Error, Result};
use crate::mode::Mode;
use crate::parallel;
use crate::transfer;

/// A differentiable function of `f32` CPU tensors. It may own parameters; backward adds their gradients to their
/// buffers.
pub trait Node: Send + Sync + 'static {
    /// What forward keeps for the backward pass.
    type Tape: Send + 'static;

    /// The shape of the output.
    fn shape(&self) -> Shape;

    /// Writes the output to `y`, which is zero before, and returns the tape.
    ///
    /// # Errors
    /// Those of what the node runs, such as a plugin. They end the pass.
    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<Self::Tape>;

    /// Writes the gradient of each input to `grads`, which are zero before, and adds those of the parameters to their
    /// buffers.
    ///
    /// # Errors
    /// As of [`forward`](Self::forward).
    fn backward(&self, inputs: &[&[f32]], tape: Self::Tape, dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()>;

    /// The same function in differentiable candle ops. It runs wherever the slices cannot: on other devices and in other
    /// types. A node without it runs on the CPU alone.
    ///
    /// # Errors
    /// There is no composition; or those of candle.
    fn composed(&self, inputs: &[&Tensor], _mode: Mode) -> Result<Tensor> {
        let name = std::any::type_name::<Self>();
        Err(Error::Block(format!(
            "{name} has no composition in candle ops, so it runs in f32 on the CPU alone; found {:?} on {}. Implement \
             `Node::composed`, or train with `--device cpu`",
            inputs[0].dtype(),
            device::name(inputs[0].device())
        )))
    }
}

/// `node(x)`: fused where [`device::fuses`] says so, and composed elsewhere.
pub fn apply1<N: Node>(node: N, x: &Tensor, mode: Mode) -> Result<Tensor> {
    if !device::fuses(x) {
        return node.composed(&[x], mode);
    }
    let x = x.contiguous()?;
    Ok(match mode {
        Mode::Train { .. } => x.apply_op1(Op { node, keep: true, tape: Mutex::new(None) })?,
        Mode::Eval => x.apply_op1_no_bwd(&Op { node, keep: false, tape: Mutex::new(None) })?,
    })
}

/// `node(x, z)`, as [`apply1`].
pub fn apply2<N: Node>(node: N, x: &Tensor, z: &Tensor, mode: Mode) -> Result<Tensor> {
    if !device::fuses(x) {
        return node.composed(&[x, z], mode);
    }
    let (x, z) = (x.contiguous()?, z.contiguous()?);
    Ok(match mode {
        Mode::Train { .. } => x.apply_op2(&z, Op { node, keep: true, tape: Mutex::new(None) })?,
        Mode::Eval => x.apply_op2_no_bwd(&z, &Op { node, keep: false, tape: Mutex::new(None) })?,
    })
}

/// `node(x, z, w)`, as [`apply1`].
pub fn apply3<N: Node>(node: N, x: &Tensor, z: &Tensor, w: &Tensor, mode: Mode) -> Result<Tensor> {
    if !device::fuses(x) {
        return node.composed(&[x, z, w], mode);
    }
    let (x, z, w) = (x.contiguous()?, z.contiguous()?, w.contiguous()?);
    Ok(match mode {
        Mode::Train { .. } => x.apply_op3(&z, &w, Op { node, keep: true, tape: Mutex::new(None) })?,
        Mode::Eval => x.apply_op3_no_bwd(&z, &w, &Op { node, keep: false, tape: Mutex::new(None) })?,
    })
}

struct Op<N: Node> {
    node: N,
    keep: bool,
    tape: Mutex<Option<N::Tape>>,
}

impl<N: Node> Op<N> {
    fn run(&self, inputs: &[&[f32]]) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = self.node.shape();
        let mut y = parallel::zeros(shape.elem_count());
        let tape = self.node.forward(inputs, &mut y)?;
        if self.keep {
            *self.tape.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(tape);
        }
        Ok((CpuStorage::F32(y), shape))
    }

    fn run_back(&self, inputs: &[&Tensor], dy: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        let tape = self.tape.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let Some(tape) = tape else { candle_core::bail!("{}: backward runs once per forward", self.label()) };
        let dy = dy.contiguous()?;
        let guards: Vec<_> = inputs.iter().map(|t| t.storage_and_layout()).collect();
        let slices = guards.iter().map(|(storage, layout)| on_cpu(storage, layout)).collect::<Result<Vec<_>, _>>()?;
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let mut grads: Vec<Vec<f32>> = slices.iter().map(|s| parallel::zeros(s.len())).collect();
        self.node.backward(&slices, tape, on_cpu(&dy_storage, dy_layout)?, &mut grads)?;
        grads.into_iter().zip(inputs).map(|(grad, t)| Tensor::from_vec(grad, t.shape(), &Device::Cpu)).collect()
    }

    fn label(&self) -> &'static str {
        std::any::type_name::<N>()
    }
}

impl<N: Node> CustomOp1 for Op<N> {
    fn name(&self) -> &'static str {
        self.label()
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[floats(s, l)?])
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(self.run_back(&[x], dy)?.pop())
    }
}

impl<N: Node> CustomOp2 for Op<N> {
    fn name(&self) -> &'static str {
        self.label()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[floats(s1, l1)?, floats(s2, l2)?])
    }
    fn bwd(
        &self,
        x: &Tensor,
        z: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.run_back(&[x, z], dy)?.into_iter();
        Ok((grads.next(), grads.next()))
    }
}

impl<N: Node> CustomOp3 for Op<N> {
    fn name(&self) -> &'static str {
        self.label()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[floats(s1, l1)?, floats(s2, l2)?, floats(s3, l3)?])
    }
    fn bwd(
        &self,
        x: &Tensor,
        z: &Tensor,
        w: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.run_back(&[x, z, w], dy)?.into_iter();
        Ok((grads.next(), grads.next(), grads.next()))
    }
}

fn on_cpu<'a>(storage: &'a Storage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match storage {
        Storage::Cpu(cpu) => floats(cpu, layout),
        _ => candle_core::bail!("expected a CPU tensor"),
    }
}

/// Lends the elements of a tensor: those of `f32` on the CPU as they lie, others as a copy.
pub fn with_floats<R>(x: &Tensor, work: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
    let x = match x.device().is_cpu() && x.dtype() == DType::F32 {
        true => x.detach(),
        false => transfer::to_host(&x.detach())?,
    };
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    Ok(work(on_cpu(&storage, layout)?))
}

/// The contiguous `f32` elements of a tensor's CPU storage.
pub fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("expected a contiguous tensor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::composed;

    /// `2 x`, on slices alone.
    struct Twice(Shape);

    impl Node for Twice {
        type Tape = ();

        fn shape(&self) -> Shape {
            self.0.clone()
        }

        fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
            y.iter_mut().zip(inputs[0]).for_each(|(y, x)| *y = 2.0 * x);
            Ok(())
        }

        fn backward(&self, _: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
            grads[0].iter_mut().zip(dy).for_each(|(dx, dy)| *dx = 2.0 * dy);
            Ok(())
        }
    }

    #[test]
    fn a_node_without_a_composition_is_refused_by_name_where_it_cannot_fuse() {
        let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let twice = |x: &Tensor| apply1(Twice(x.shape().clone()), x, Mode::Eval);
        assert_eq!(twice(&x).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 12.0);
        let wide = twice(&x.to_dtype(DType::F64).unwrap()).unwrap_err().to_string();
        let asked = composed(|| twice(&x)).unwrap_err().to_string();
        for (error, found) in [(wide, "found F64 on cpu"), (asked, "found F32 on cpu")] {
            assert!(error.contains("Twice has no composition") && error.contains(found), "{error}");
        }
    }
}
