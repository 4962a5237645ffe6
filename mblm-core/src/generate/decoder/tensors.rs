//! The states of all stages over tensors, on the device of the model. For each byte, ids go in, and logits come out; caches,
//! states and what stages say of each other stay.

use candle_core::Tensor;
use mblm_sdk::block::TensorDecoder;
use mblm_sdk::error::Result;
use mblm_sdk::mode::Mode;
use mblm_sdk::transfer;

use super::Stages;
use crate::model::{Hierarchy, Parents, Stage, Tokens, start_rows};

pub(super) struct Tensors<'m> {
    hierarchy: &'m Hierarchy,
    batch: usize,
    states: Vec<State<'m>>,
}

struct State<'m> {
    decoder: Box<dyn TensorDecoder + 'm>,
    /// What the stage above says of each token of the current sequence, `(B, P_n, D_n)`; none at stage 1.
    above: Option<Tensor>,
    /// The output at the newest position, `(B, 1, D_n)`.
    output: Tensor,
}

impl State<'_> {
    /// Feeds the next positions, `(B, S, D_n)`.
    fn advance(&mut self, x: &Tensor) -> Result<()> {
        let outputs = self.decoder.advance(x)?;
        self.output = outputs.narrow(1, x.dim(1)? - 1, 1)?.contiguous()?;
        Ok(())
    }
}

impl<'m> Tensors<'m> {
    pub(super) fn new(hierarchy: &'m Hierarchy, batch: usize) -> Result<Self> {
        let place = hierarchy.params.place();
        let state = |stage: &'m Stage| {
            let output = Tensor::zeros((batch, 1, stage.dim), place.dtype, &place.device)?;
            Ok(State { decoder: stage.model.tensor_decoder(batch)?, above: None, output })
        };
        let states = hierarchy.stages.iter().map(state).collect::<Result<_>>()?;
        Ok(Tensors { hierarchy, batch, states })
    }
}

impl Stages for Tensors<'_> {
    fn begin(&mut self, n: usize) -> Result<()> {
        if let Some(next) = n.checked_sub(1).and_then(|above| self.hierarchy.stages[above].next.as_ref()) {
            self.states[n].above = Some(next.forward(
                &self.states[n - 1].output,
                &Parents::First(1),
                self.hierarchy.stages[n].seq_len,
                Mode::Eval,
            )?);
        }
        match &self.hierarchy.stages[n].input.start {
            Some(start) => self.states[n].advance(&start_rows(start, self.batch, Mode::Eval)?),
            None => Ok(()),
        }
    }

    fn reset(&mut self, n: usize) {
        self.states[n].decoder.reset();
    }

    fn feed(&mut self, n: usize, position: usize, ids: Vec<u32>) -> Result<()> {
        let (stage, state) = (&self.hierarchy.stages[n], &mut self.states[n]);
        let count = ids.len() / (self.batch * self.hierarchy.patch_len(n));
        let tokens = stage.embedding.forward(&Tokens::new(ids), Mode::Eval)?;
        let tokens = tokens.reshape((count, self.batch, stage.dim))?.transpose(0, 1)?.contiguous()?;
        let mut x = stage.input.positions.composed(&tokens, position, Mode::Eval)?;
        if let Some(above) = &state.above {
            x = (x + above.narrow(1, position, count)?)?;
        }
        state.advance(&x)
    }

    fn logits(&mut self, logits: &mut [f32]) -> Result<()> {
        let hidden = &self.states[self.states.len() - 1].output;
        let found = self.hierarchy.logits(hidden, Mode::Eval)?;
        logits.copy_from_slice(&transfer::to_vec::<f32>(&found)?);
        Ok(())
    }

    fn output(&self, n: usize) -> Result<Vec<f32>> {
        transfer::to_vec(&self.states[n].output)
    }
}
