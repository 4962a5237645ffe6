//! Gradients.

use mblm_base::random::noise;
use mblm_sdk::layer::Dims;
use mblm_sdk::testing::{WITHOUT_GRADIENT, difference};

use super::rig::{Gradients, MODE, Rig, input};
use super::{Outcome, Subject};

const NO_BACKWARD: &str = "it has no backward pass";

/// How far a finite difference may be from the gradient, relative to the gradient's norm.
const TOLERANCE: f64 = 0.02;

/// Steps of the finite differences, relative to the values: a small one suffers from rounding, a large one from
/// curvature, so one of them must fit.
const STEPS: [f32; 4] = [3e-2, 1e-2, 3e-3, 1e-3];

/// Random directions per tensor.
const DIRECTIONS: u64 = 3;

/// Finite differences along random directions of the input and of every parameter.
pub(super) fn finite(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    if !rig.can_train() {
        return Ok(Outcome::Skipped(NO_BACKWARD.into()));
    }
    let dims = rig.dims(2, 6);
    let (x, dy) = (input(dims, 7), input(dims, 8));
    let found = rig.train(dims, &x, &dy)?;
    let is_zero = |grad: &[f32]| grad.iter().all(|value| *value == 0.0);
    let dead = found.dparams.iter().enumerate().filter(|(_, grad)| is_zero(grad)).map(|(index, _)| rig.name(index));
    let dead: Vec<&str> = is_zero(&found.dx).then_some("the input").into_iter().chain(dead).collect();
    if !dead.is_empty() {
        let get = if dead.len() == 1 { "gets" } else { "get" };
        return Err(format!("{} {get} no gradient\n{WITHOUT_GRADIENT}", dead.join(", ")));
    }
    let probe = Probe { rig: &rig, dims, x: &x, dy: &dy };
    probe.hold("the input", &found.dx, &x, |moved, version| probe.loss(moved, &rig.values(), version))?;
    let values = rig.values();
    for (index, grad) in found.dparams.iter().enumerate() {
        let loss = |moved: &[f32], version| {
            let mut values = values.clone();
            values[index] = moved.to_vec();
            probe.loss(&x, &values, version)
        };
        probe.hold(rig.name(index), grad, &values[index], loss)?;
    }
    Ok(Outcome::Passed(format!("the input and {} parameters", values.len())))
}

struct Probe<'a> {
    rig: &'a Rig,
    dims: Dims,
    x: &'a [f32],
    dy: &'a [f32],
}

impl Probe<'_> {
    /// `Σ y dy`
    fn loss(&self, x: &[f32], values: &[Vec<f32>], version: u64) -> Result<f64, String> {
        debug_assert_eq!(x.len(), self.x.len());
        let (y, _tape) = self.rig.forward_with(values, version, self.dims, x, MODE)?;
        Ok(y.iter().zip(self.dy).map(|(y, dy)| *y as f64 * *dy as f64).sum())
    }

    /// Holds the gradient of one tensor against differences of the loss.
    fn hold(
        &self,
        what: &str,
        grad: &[f32],
        at: &[f32],
        loss: impl Fn(&[f32], u64) -> Result<f64, String>,
    ) -> Result<(), String> {
        if let Some(i) = grad.iter().position(|value| !value.is_finite()) {
            return Err(format!("the gradient of {what} is {} at element {i}", grad[i]));
        }
        let norm = grad.iter().map(|value| (*value as f64).powi(2)).sum::<f64>().sqrt();
        // Other values need another version, and no two passes may share one.
        static VERSION: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(2);
        let version = || VERSION.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        for seed in 0..DIRECTIONS {
            let direction: Vec<f32> = noise(at.len(), 40 + seed).iter().map(|value| value.signum()).collect();
            let want: f64 = grad.iter().zip(&direction).map(|(g, d)| *g as f64 * *d as f64).sum();
            let mut nearest = f64::INFINITY;
            for step in STEPS {
                let moved = |sign: f32| at.iter().zip(&direction).map(|(v, d)| v + sign * step * d).collect::<Vec<_>>();
                let (up, down) = (loss(&moved(1.0), version())?, loss(&moved(-1.0), version())?);
                let found = (up - down) / (2.0 * step as f64);
                if (found - want).abs() < (nearest - want).abs() {
                    nearest = found;
                }
            }
            if (nearest - want).abs() > TOLERANCE * norm {
                return Err(format!(
                    "{what}: along a random direction the loss changes by {nearest:.5}, backward says {want:.5} (the \
                     gradient's norm is {norm:.5})\nlook for a mistake in a backward pass, for dropout without a seed, or for an \
                     operation that cuts a part of the gradient; candle_nn's LayerNorm, RmsNorm, softmax_last_dim, rope and \
                     Dropout have counterparts in mblm_sdk::nn"
                ));
            }
        }
        Ok(())
    }
}

/// What the buffers of the parameters' gradients held stays in the sum.
pub(super) fn accumulation(subject: &Subject) -> Result<Outcome, String> {
    const BASE: f32 = 3.0;
    let rig = subject.rig(2)?;
    if !rig.can_train() {
        return Ok(Outcome::Skipped(NO_BACKWARD.into()));
    }
    let dims = rig.dims(2, 5);
    let (x, dy) = (input(dims, 9), input(dims, 10));
    let clean = rig.train(dims, &x, &dy)?;
    let (_, tape) = rig.forward(dims, &x, MODE)?;
    let (dx, dparams) = rig.backward(dims, tape.ok_or("forward left no tape")?, &x, &dy, BASE)?;
    for (index, (got, want)) in dparams.iter().zip(&clean.dparams).enumerate() {
        let want: Vec<f32> = want.iter().map(|value| value + BASE).collect();
        if let Some(difference) = difference(got, &want, 1e-5) {
            let name = rig.name(index);
            return Err(format!(
                "{name}: the buffer contained {BASE} before, and the gradient is not added to it: {difference}"
            ));
        }
    }
    match difference(&dx, &clean.dx, 1e-5) {
        Some(difference) => Err(format!("the gradient of x depends on the previous contents of dparams: {difference}")),
        None => Ok(Outcome::Passed(format!("{} parameters", dparams.len()))),
    }
}

/// Two forward passes before the first backward pass, in either order.
pub(super) fn tapes(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    if !rig.can_train() {
        return Ok(Outcome::Skipped(NO_BACKWARD.into()));
    }
    let (one, two) = (rig.dims(2, 5), rig.dims(3, 4));
    let inputs = [(one, input(one, 11), input(one, 12)), (two, input(two, 13), input(two, 14))];
    let alone: Vec<Gradients> =
        inputs.iter().map(|(dims, x, dy)| rig.train(*dims, x, dy)).collect::<Result<_, String>>()?;
    for order in [[0, 1], [1, 0]] {
        let mut tapes = vec![];
        for (dims, x, _) in &inputs {
            tapes.push(rig.forward(*dims, x, MODE)?.1);
        }
        // A tape that is dropped without backward must do no harm.
        drop(rig.forward(one, &inputs[0].1, MODE)?);
        for which in order {
            let (dims, x, dy) = &inputs[which];
            let tape = tapes[which].take().ok_or("forward left no tape")?;
            let (dx, dparams) = rig.backward(*dims, tape, x, dy, 0.0)?;
            let pairs = std::iter::once((&dx, &alone[which].dx)).chain(dparams.iter().zip(&alone[which].dparams));
            for (index, (got, want)) in pairs.enumerate() {
                if let Some(difference) = difference(got, want, 1e-5) {
                    let what = index.checked_sub(1).map_or("x", |index| rig.name(index));
                    return Err(format!(
                        "two tapes, backward of number {} {}: the gradient of {what}: {difference}",
                        which + 1,
                        if order[0] == which { "first" } else { "last" }
                    ));
                }
            }
        }
    }
    Ok(Outcome::Passed("both orders".into()))
}
