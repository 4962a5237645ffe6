//! Decoding.

use mblm_sdk::abi;
use mblm_sdk::mode::Mode;
use mblm_sdk::testing::difference;

use super::rig::{Rig, input};
use super::{Outcome, Subject};
use crate::plugin::host::{ParamValues, State};

const TOLERANCE: f32 = 1e-4;

fn text(error: mblm_sdk::Error) -> String {
    error.to_string()
}

/// A state and what it needs to advance.
struct Decoding<'a> {
    rig: &'a Rig,
    values: Vec<Vec<f32>>,
    batch: usize,
}

impl Decoding<'_> {
    fn with<R>(&self, work: impl FnOnce(ParamValues) -> R) -> R {
        let slices: Vec<&[f32]> = self.values.iter().map(Vec::as_slice).collect();
        work(ParamValues { values: &slices, version: 1 })
    }

    fn state(&self) -> Result<State, String> {
        self.with(|params| self.rig.instance.state(params, self.batch)).map_err(text)
    }

    /// Advances over `x`, `(seq, batch, dim)`, by steps or at once.
    fn advance(&self, state: &mut State, x: &[f32], at_once: bool) -> Result<Vec<f32>, String> {
        let row = self.batch * self.rig.dim;
        let mut y = vec![f32::NAN; x.len()];
        let advanced = self.with(|params| match at_once {
            true => state.prefill(params, x, &mut y, x.len() / row),
            false => x.chunks_exact(row).zip(y.chunks_exact_mut(row)).try_for_each(|(x, y)| state.step(params, x, y)),
        });
        advanced.map(|()| y).map_err(text)
    }
}

/// `(batch, seq, dim)` as `(seq, batch, dim)`.
fn by_position(x: &[f32], batch: usize, seq: usize, dim: usize) -> Vec<f32> {
    (0..seq).flat_map(|t| (0..batch).flat_map(move |b| x[(b * seq + t) * dim..][..dim].to_vec())).collect()
}

/// Steps, prefill, and a mix of both give the outputs of forward; so they do again after a reset.
pub(super) fn steps(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    if !rig.instance.can(abi::STEP) {
        return Ok(Outcome::Skipped("it has no step; the host runs forward again".into()));
    }
    for (batch, seq) in [(1, 1), (2, 9), (5, 4)] {
        let dims = rig.dims(batch, seq);
        let x = input(dims, 15);
        let (y, _) = rig.forward(dims, &x, Mode::Eval)?;
        let (x, want) = (by_position(&x, batch, seq, rig.dim), by_position(&y, batch, seq, rig.dim));
        let decoding = Decoding { rig: &rig, values: rig.values(), batch };
        let mut state = decoding.state()?;
        for (what, prefix) in [("steps", 0), ("prefill", seq), ("prefill, then steps", seq / 2), ("steps again", 0)] {
            let (first, rest) = x.split_at(prefix * batch * rig.dim);
            let mut got = if first.is_empty() { vec![] } else { decoding.advance(&mut state, first, true)? };
            got.extend(decoding.advance(&mut state, rest, false)?);
            if let Some(difference) = difference(&got, &want, TOLERANCE) {
                return Err(format!(
                    "batch {batch}, {seq} positions, {what}: forward gives other outputs: {difference}"
                ));
            }
            state.reset().map_err(text)?;
        }
    }
    Ok(Outcome::Passed("steps, prefill, both, and after a reset".into()))
}

/// A clone and a loaded state go on as the original does; rubbish is refused.
pub(super) fn states(subject: &Subject) -> Result<Outcome, String> {
    let rig = subject.rig(2)?;
    if !rig.instance.can(abi::STEP) {
        return Ok(Outcome::Skipped("it has no states".into()));
    }
    let (batch, half) = (3, 4);
    let decoding = Decoding { rig: &rig, values: rig.values(), batch };
    let x = input(rig.dims(batch, 2 * half), 16);
    let (past, future) = x.split_at(half * batch * rig.dim);
    let mut state = decoding.state()?;
    decoding.advance(&mut state, past, false)?;
    let (cloned, saved) = (state.try_clone().map_err(text)?, state.save().map_err(text)?);
    if cloned.is_none() && saved.is_none() {
        return Ok(Outcome::Skipped("it has neither state_clone nor state_save".into()));
    }
    let want = decoding.advance(&mut state, future, false)?;
    let mut done = vec![];
    if let Some(mut copy) = cloned {
        if let Some(difference) = difference(&decoding.advance(&mut copy, future, false)?, &want, 1e-6) {
            return Err(format!("a clone continues differently: {difference}"));
        }
        done.push("cloned");
    }
    if let Some(bytes) = saved {
        let mut other = decoding.state()?;
        if other.load(&bytes).map_err(text)?.is_none() {
            return Err("it has state_save, but no state_load".into());
        }
        if let Some(difference) = difference(&decoding.advance(&mut other, future, false)?, &want, 1e-6) {
            return Err(format!("a saved and loaded state continues differently: {difference}"));
        }
        for (what, rubbish) in [("nothing", &[][..]), ("half a state", &bytes[..bytes.len() / 2]), ("zeros", &[0; 64])]
        {
            if other.load(rubbish).is_ok() {
                return Err(format!("state_load accepts {what}"));
            }
        }
        done.push("saved and loaded");
    }
    Ok(Outcome::Passed(done.join(", ")))
}
