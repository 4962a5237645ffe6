//! Byte ids that all stages and parts share.

use std::ops::{Deref, Range};
use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};
use mblm_sdk::error::Result;
use mblm_sdk::transfer;

/// Ids in this process's memory. They are copied to the model's device when somebody reads them there for the first time,
/// once for all stages and parts.
#[derive(Clone)]
pub(crate) struct Tokens {
    all: Arc<(Vec<u32>, OnceLock<Tensor>)>,
    /// Of all of them.
    range: Range<usize>,
}

impl Tokens {
    pub(crate) fn new(ids: Vec<u32>) -> Self {
        Tokens { range: 0..ids.len(), all: Arc::new((ids, OnceLock::new())) }
    }

    /// Those in a range of these.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        let first = self.range.start;
        Tokens { all: self.all.clone(), range: first + range.start..first + range.end }
    }

    /// A tensor on the model's device, `(ids)`.
    pub(crate) fn tensor(&self, device: &Device) -> Result<Tensor> {
        let (ids, tensor) = &*self.all;
        let all = match tensor.get() {
            Some(all) => all,
            None => {
                let all = transfer::to_tensor(ids, ids.len(), device)?;
                tensor.get_or_init(|| all)
            }
        };
        Ok(all.narrow(0, self.range.start, self.range.len())?)
    }
}

impl Deref for Tokens {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.all.0[self.range.clone()]
    }
}
