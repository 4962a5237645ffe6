//! What forward (and backward) write.

use mblm_sdk::abi;
use mblm_sdk::mode::Mode;
use mblm_sdk::testing::{OTHER_OUTPUT_AGAIN, OTHER_OUTPUT_IN_TRAINING, OTHER_OUTPUT_REBUILT, difference};

use super::rig::{Guarded, MODE, input};
use super::{Outcome, Subject};
use crate::plugin::host::{ParamValues, Pass};

/// One forward pass.
pub(super) fn forward(subject: &Subject) -> Result<(), String> {
    let rig = subject.rig(1)?;
    let dims = rig.dims(1, 4);
    rig.forward(dims, &input(dims, 1), Mode::Eval).map(drop)
}

/// Outputs are written whole, inputs are left alone, and nothing around the buffers changes.
pub(super) fn buffers(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    let dims = rig.dims(3, 5);
    let mode = if rig.can_train() { MODE } else { Mode::Eval };
    let pass = Pass { dims, mask: None, mode };
    let (x, dy) = (input(dims, 1), input(dims, 2));
    let values = rig.values();
    let mut guarded: Vec<Guarded> = values.iter().map(|value| Guarded::new(value)).collect();
    let nan = vec![f32::NAN; dims.len()];
    let [mut xs, mut ys, mut dys, mut dxs] = [&x, &nan, &dy, &nan].map(|contents| Guarded::new(contents));
    let mut grads: Vec<Guarded> = values.iter().map(|value| Guarded::new(&vec![0.0; value.len()])).collect();
    {
        let slices: Vec<&[f32]> = guarded.iter_mut().map(|value| &*value.inner()).collect();
        let params = ParamValues { values: &slices, version: 1 };
        let text = |error: mblm_sdk::Error| error.to_string();
        let tape = rig.instance.forward(params, &pass, xs.inner(), ys.inner(), mode != Mode::Eval).map_err(text)?;
        if let Some(mut tape) = tape {
            let mut dparams: Vec<&mut [f32]> = grads.iter_mut().map(|grad| grad.inner()).collect();
            let (x, dy, dx) = (xs.inner(), dys.inner(), dxs.inner());
            rig.instance.backward(params, &pass, &mut tape, x, dy, dx, &mut dparams).map_err(text)?;
        } else {
            dxs.inner().fill(0.0);
        }
    }
    for (what, buffer, before) in [("x", &mut xs, &x), ("dy", &mut dys, &dy)] {
        buffer.check(what)?;
        if buffer.inner() != before.as_slice() {
            return Err(format!("{what} is an input, but was written to"));
        }
    }
    for (what, buffer) in [("y", &mut ys), ("dx", &mut dxs)] {
        buffer.check(what)?;
        if let Some(at) = buffer.inner().iter().position(|value| !value.is_finite()) {
            let value = buffer.inner()[at];
            return Err(format!("{what} was filled with NaN before, and element {at} is {value}: not written"));
        }
    }
    for (index, (value, grad)) in guarded.iter_mut().zip(&mut grads).enumerate() {
        let name = rig.name(index);
        value.check(&format!("the values of {name}"))?;
        grad.check(&format!("the gradient of {name}"))?;
        if value.inner() != values[index].as_slice() {
            return Err(format!("the values of {name} are an input, but were written to"));
        }
    }
    Ok(Outcome::Passed(format!("{} buffers with guards", 4 + 2 * values.len())))
}

/// Small and odd sizes give finite outputs, and no sequence depends on its neighbours in the batch.
pub(super) fn sizes(subject: &Subject) -> Result<Outcome, String> {
    let mut tried = 0;
    let widths = [subject.dim, 7, 9, 33];
    let mut accepted = widths.into_iter().filter(|&dim| subject.check(subject.config.as_bytes(), dim).is_ok());
    for (dim, layers) in accepted.by_ref().take(3).zip([1, 3, 2]) {
        let rig = subject.rig_of(dim, layers)?;
        for (batch, seq) in [(1, 1), (1, 2), (2, 1), (3, 7), (5, 3), (1, 67), (17, 9)] {
            let what = format!("batch {batch}, length {seq}, width {dim}, {layers} layer(s)");
            let dims = rig.dims(batch, seq);
            let x = input(dims, 3);
            let (y, _) = rig.forward(dims, &x, Mode::Eval).map_err(|error| format!("{what}: {error}"))?;
            if let Some(at) = y.iter().position(|value| !value.is_finite()) {
                return Err(format!("{what}: output {at} is {}", y[at]));
            }
            let last = (batch - 1) * seq * dim;
            let (alone, _) = rig.forward(rig.dims(1, seq), &x[last..], Mode::Eval)?;
            if let Some(difference) = difference(&y[last..], &alone, 1e-4) {
                return Err(format!(
                    "{what}: the last sequence gives a different result when it runs alone: {difference}"
                ));
            }
            tried += 1;
        }
    }
    Ok(Outcome::Passed(format!("{tried} shapes")))
}

/// Changing an input changes no output before it.
pub(super) fn causality(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    if !rig.instance.is_causal() {
        return Ok(Outcome::Skipped("it says that it is not causal".into()));
    }
    let dims = rig.dims(2, 9);
    let x = input(dims, 4);
    let (before, _) = rig.forward(dims, &x, Mode::Eval)?;
    for t in 0..dims.seq {
        let mut changed = x.clone();
        for sequence in changed.chunks_exact_mut(dims.seq * dims.dim) {
            sequence[t * dims.dim..(t + 1) * dims.dim].iter_mut().for_each(|value| *value += 1.0);
        }
        let (after, _) = rig.forward(dims, &changed, Mode::Eval)?;
        for (after, before) in after.chunks_exact(dims.seq * dims.dim).zip(before.chunks_exact(dims.seq * dims.dim)) {
            if let Some(difference) = difference(&after[..t * dims.dim], &before[..t * dims.dim], 1e-5) {
                return Err(format!("a change at position {t} changes an earlier output: {difference}"));
            }
        }
    }
    Ok(Outcome::Passed(format!("{} positions", dims.seq)))
}

/// Outputs follow from the parameters and the input alone: not from earlier calls, earlier values, or hidden weights.
pub(super) fn reproducible(subject: &Subject) -> Result<Outcome, String> {
    let (one, other) = (subject.rig(2)?, subject.rig(2)?);
    let (dims, between) = (one.dims(2, 9), one.dims(1, 4));
    let (x, values) = (input(dims, 21), one.values());
    let (want, _) = one.forward_with(&values, 1, dims, &x, Mode::Eval)?;
    one.forward_with(&values, 1, between, &input(between, 22), Mode::Eval)?;
    let (again, _) = one.forward_with(&values, 1, dims, &x, Mode::Eval)?;
    // Another instance, which has seen other values.
    let moved: Vec<Vec<f32>> = values.iter().map(|values| values.iter().map(|value| value + 0.5).collect()).collect();
    other.forward_with(&moved, 2, dims, &x, Mode::Eval)?;
    let (rebuilt, _) = other.forward_with(&values, 3, dims, &x, Mode::Eval)?;
    let train = || one.forward_with(&values, 1, dims, &x, MODE);
    let trained = if one.can_train() { Some((train()?.0, train()?.0)) } else { None };
    // Who does not promise the same bits keeps to the same numbers.
    let tolerance = if one.instance.can(abi::DETERMINISTIC) { 0.0 } else { 1e-4 };
    let pairs = [(OTHER_OUTPUT_AGAIN, &again, &want), (OTHER_OUTPUT_REBUILT, &rebuilt, &want)];
    let training = trained.iter().map(|(again, want)| (OTHER_OUTPUT_IN_TRAINING, again, want));
    for (fault, got, want) in pairs.into_iter().chain(training) {
        if let Some(difference) = difference(got, want, tolerance) {
            return Err(format!("{fault}: {difference}"));
        }
    }
    Ok(Outcome::Passed("after other calls, and in another instance".into()))
}

/// The same inputs give the same bits, in another instance too.
pub(super) fn deterministic(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    if !rig.instance.can(abi::DETERMINISTIC) {
        return Ok(Outcome::Skipped("it does not say that it is".into()));
    }
    let dims = rig.dims(4, 33);
    let (x, dy) = (input(dims, 5), input(dims, 6));
    if !rig.can_train() {
        let [one, two] = [rig.forward(dims, &x, Mode::Eval)?, rig.forward(dims, &x, Mode::Eval)?];
        return match one.0 == two.0 {
            true => Ok(Outcome::Passed("forward, twice".into())),
            false => Err("forward gives different bits the second time".into()),
        };
    }
    let first = rig.train(dims, &x, &dy)?;
    for round in 0..3 {
        let again = if round < 2 { rig.train(dims, &x, &dy)? } else { subject.rig(2)?.train(dims, &x, &dy)? };
        if again != first {
            let what = match () {
                () if again.y != first.y => "the output".to_string(),
                () if again.dx != first.dx => "the gradient of x".to_string(),
                () => {
                    let index = again.dparams.iter().zip(&first.dparams).position(|(a, b)| a != b).unwrap_or_default();
                    format!("the gradient of {}", rig.name(index))
                }
            };
            return Err(format!("{what} has different bits in round {}", round + 2));
        }
    }
    Ok(Outcome::Passed("forward and backward, 4 times".into()))
}
