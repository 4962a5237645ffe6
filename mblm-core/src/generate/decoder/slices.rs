//! The states of all stages over slices: fused ops, on the CPU.

use mblm_sdk::block::StageDecoder;
use mblm_sdk::error::Result;
use mblm_sdk::gemm::Update;
use mblm_sdk::ops::linear;
use mblm_sdk::simd;

use super::Stages;
use crate::model::{Hierarchy, Stage};

pub(super) struct Slices<'m> {
    hierarchy: &'m Hierarchy,
    batch: usize,
    states: Vec<State<'m>>,
}

struct State<'m> {
    decoder: Box<dyn StageDecoder + 'm>,
    /// What the stage above says of each token of the current sequence, `(B, P_n, D_n)`; empty at stage 1.
    above: Vec<f32>,
    /// The output at the newest position, `(B, D_n)`.
    output: Vec<f32>,
}

impl<'m> Slices<'m> {
    pub(super) fn new(hierarchy: &'m Hierarchy, batch: usize) -> Result<Self> {
        let state = |(n, stage): (usize, &'m Stage)| {
            Ok(State {
                decoder: stage.model.decoder(batch)?,
                above: vec![0.0; if n > 0 { batch * stage.seq_len * stage.dim } else { 0 }],
                output: vec![0.0; batch * stage.dim],
            })
        };
        let states = hierarchy.stages.iter().enumerate().map(state).collect::<Result<_>>()?;
        Ok(Slices { hierarchy, batch, states })
    }
}

impl Stages for Slices<'_> {
    fn begin(&mut self, n: usize) -> Result<()> {
        if let Some(next) = n.checked_sub(1).and_then(|above| self.hierarchy.stages[above].next.as_ref()) {
            let (above, below) = self.states.split_at_mut(n);
            next.rows(&above[n - 1].output, &mut below[0].above);
        }
        let Some(start) = &self.hierarchy.stages[n].input.start else { return Ok(()) };
        let (state, start) = (&mut self.states[n], start.values().repeat(self.batch));
        state.decoder.step(&start, &mut state.output)
    }

    fn reset(&mut self, n: usize) {
        self.states[n].decoder.reset();
    }

    fn feed(&mut self, n: usize, position: usize, ids: Vec<u32>) -> Result<()> {
        let (stage, state, batch) = (&self.hierarchy.stages[n], &mut self.states[n], self.batch);
        let dim = stage.dim;
        let count = ids.len() / (batch * self.hierarchy.patch_len(n));
        let mut tokens = vec![0.0; count * batch * dim];
        stage.embedding.rows(&ids, &mut tokens);
        for (i, row) in tokens.chunks_exact_mut(dim).enumerate() {
            let (position, b) = (position + i / batch, i % batch);
            stage.input.positions.enter(position, row);
            if !state.above.is_empty() {
                let at = (b * stage.seq_len + position) * dim;
                simd::add(&state.above[at..at + dim], row);
            }
        }
        let mut outputs = vec![0.0; tokens.len()];
        state.decoder.prefill(&tokens, &mut outputs, count)?;
        state.output.copy_from_slice(&outputs[(count - 1) * batch * dim..]);
        Ok(())
    }

    fn logits(&mut self, logits: &mut [f32]) -> Result<()> {
        let (weight, bias) = (&self.hierarchy.out_weight, self.hierarchy.out_bias.values());
        let hidden = &self.states[self.states.len() - 1].output;
        linear::step(hidden, &weight.values(), Some(&bias), weight.shape()[1], Update::Set, logits);
        Ok(())
    }

    fn output(&self, n: usize) -> Result<Vec<f32>> {
        Ok(self.states[n].output.clone())
    }

    fn repeat(&mut self, times: usize) -> bool {
        self.batch = times;
        self.states.iter_mut().all(|state| {
            state.above = state.above.repeat(times);
            state.output = state.output.repeat(times);
            state.decoder.repeat(times)
        })
    }
}
