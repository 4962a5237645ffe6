//! Checks that all processes train the same model. Each process updates its own copy of the weights; only this compares
//! the copies.

use super::Trainer;
use crate::error::{Error, Result};
use crate::processes::{sum_of, sum_of_weights};

impl Trainer<'_> {
    /// Refuses to go on if a process has another configuration, other plugins or data, or other weights than the first.
    pub(crate) fn must_be_alike(&self) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        let state = &self.state;
        let place = (state.batches, state.step, state.next.epoch, state.next.batch, &state.version);
        self.processes.must_have_the_same("configuration", sum_of(&self.config_yaml))?;
        let plugins: Vec<&String> = state.plugins.iter().map(|plugin| &plugin.sha256).collect();
        self.processes.must_have_the_same("plugins", sum_of(&plugins))?;
        self.processes.must_have_the_same("data", sum_of(&state.data))?;
        self.processes.must_have_the_same("place in the run", sum_of(&place))?;
        self.processes.must_have_the_same("weights", sum_of_weights(self.model.params()))
    }

    /// Takes over the weights of the first process.
    pub(super) fn weights_of_the_first(&self) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        let mut taken = Ok(());
        for param in self.model.params().iter() {
            let mut bytes = match self.processes.is_first() {
                true => param.values().iter().flat_map(|x| x.to_le_bytes()).collect(),
                false => Vec::new(),
            };
            self.processes.broadcast(0, &mut bytes);
            if !self.processes.is_first() {
                let from = bytes.as_chunks::<4>().0;
                taken =
                    taken.and(param.update(|values| {
                        values.iter_mut().zip(from).for_each(|(x, from)| *x = f32::from_le_bytes(*from))
                    }));
            }
        }
        self.processes.agree(taken.map_err(Error::from))
    }
}
