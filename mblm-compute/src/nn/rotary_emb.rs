//! Rotary positions (Su et al. 2021): [`candle_nn::rotary_emb`] with gradients.

use candle_core::{D, Result, Tensor, bail};

/// Rotates halves of each head, channel i with channel i + d/2.
///
/// # Shapes
/// - `xs`: `(B, H, S, d)`; returns the same
/// - `cos`, `sin`: `(T, d / 2)`, or `(B, T, d / 2)` with positions of its own for each sequence; `T` is at least `S`
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, _, seq, _) = xs.dims4()?;
    let [cos, sin] = [table(xs, seq, cos)?.unsqueeze(1)?, table(xs, seq, sin)?.unsqueeze(1)?];
    halves(xs, &cos, &sin)
}

/// Rotates neighbours, channel 2i with channel 2i + 1. The shapes are those of [`rope`].
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (batch, heads, seq, dim) = xs.dims4()?;
    let [cos, sin] = [table(xs, seq, cos)?.unsqueeze(1)?, table(xs, seq, sin)?.unsqueeze(1)?];
    let pairs = xs.reshape((batch, heads, seq, dim / 2, 2))?;
    let [a, b] = [pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?];
    let (a, b) = rotate(&a, &b, &cos, &sin)?;
    Tensor::stack(&[a, b], 4)?.reshape((batch, heads, seq, dim))
}

/// As [`rope`], with heads after positions.
///
/// # Shapes
/// - `xs`: `(B, S, H, d)`; returns the same
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, seq, _, _) = xs.dims4()?;
    let [cos, sin] = [table(xs, seq, cos)?.unsqueeze(2)?, table(xs, seq, sin)?.unsqueeze(2)?];
    halves(xs, &cos, &sin)
}

fn halves(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = xs.dim(D::Minus1)? / 2;
    let (a, b) = rotate(&xs.narrow(3, 0, half)?, &xs.narrow(3, half, half)?, cos, sin)?;
    Tensor::cat(&[a, b], 3)
}

fn rotate(a: &Tensor, b: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    Ok((first, (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?))
}

/// The cosines or sines of the first `seq` positions: `(B or 1, S, d / 2)`.
fn table(xs: &Tensor, seq: usize, angles: &Tensor) -> Result<Tensor> {
    let (batch, dim) = (xs.dim(0)?, xs.dim(3)?);
    let angles = if angles.rank() == 2 { angles.unsqueeze(0)? } else { angles.clone() };
    let (rows, positions, half) = angles.dims3()?;
    if dim != 2 * half || positions < seq || (rows != 1 && rows != batch) {
        bail!(
            "rope: cosines and sines of {:?} do not fit {:?}: expected at least {seq} positions of width {}",
            angles.dims(),
            xs.dims(),
            dim / 2
        )
    }
    angles.narrow(1, 0, seq)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::testing::{assert_close, noise};

    type Rope = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

    fn floats(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn outputs_are_those_of_candle_and_the_gradient_is_the_rotation_back() {
        let tensor =
            |shape: &[usize], seed| Tensor::from_vec(noise(shape.iter().product(), seed), shape, &Device::Cpu).unwrap();
        let angles = |shape: &[usize]| (tensor(shape, 2) * 3.0).unwrap();
        let cases: [(&str, Rope, Rope); 3] = [
            ("rope", rope, candle_nn::rotary_emb::rope),
            ("rope_i", rope_i, candle_nn::rotary_emb::rope_i),
            ("rope_thd", rope_thd, candle_nn::rotary_emb::rope_thd),
        ];
        // Heads and positions of one number, so that both orders fit.
        let x = Var::from_tensor(&tensor(&[2, 5, 5, 6], 1)).unwrap();
        let dy = tensor(&[2, 5, 5, 6], 4);
        for (name, ours, candle) in cases {
            for shape in [&[5, 3][..], &[2, 5, 3]] {
                let (cos, sin) = (angles(shape).cos().unwrap(), angles(shape).sin().unwrap());
                let y = ours(&x, &cos, &sin).unwrap();
                assert_close(name, &floats(&y), &floats(&candle(&x, &cos, &sin).unwrap()), 1e-6);
                let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
                let back = ours(&dy, &cos, &sin.neg().unwrap()).unwrap();
                assert_close(name, &floats(grads.get(&x).unwrap()), &floats(&back), 1e-6);
            }
            let cos = tensor(&[4, 3], 2);
            let error = ours(&x, &cos, &cos).unwrap_err().to_string();
            assert!(error.contains("expected at least 5 positions of width 3"), "{error}");
        }
    }
}
