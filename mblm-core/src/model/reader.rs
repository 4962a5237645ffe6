//! A document of any length, read piece by piece.

use candle_core::Tensor;
use mblm_sdk::block::{StageDecoder, by_slices};
use mblm_sdk::error::{Error, Result};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::cross_entropy::Target;
use mblm_sdk::transfer;

use super::input::Ids;
use super::{Mblm, Positions, Sequences};

/// Reads a document piece by piece and gives the loss of each byte, as one forward pass over the whole document would: the first
/// stage carries its state (a cache of keys and values, or the state of a recurrence) from one piece to the next. The stages
/// below have no sequences that are longer than a patch of the first stage.
pub struct Reader<'m> {
    model: &'m Mblm,
    first: Box<dyn StageDecoder + 'm>,
    /// Tokens that the first stage has read.
    tokens: usize,
    /// The first stage's output at its newest position, `(D_1)`.
    above: Vec<f32>,
    /// The local stage's output at the newest byte, which predicts the next one, `(1, D_N)`; none before the first byte.
    last: Option<Tensor>,
    /// Whether the last piece was no whole number of patches, so that nothing can follow.
    ended: bool,
}

impl<'m> Reader<'m> {
    /// At the start of a document.
    ///
    /// # Errors
    /// Patches follow the content.
    pub fn new(model: &'m Mblm) -> Result<Self> {
        if !model.config().is_fixed() {
            return Err(Error::Input(
                "documents are read piece by piece only with patches of full length (patching: fixed)".into(),
            ));
        }
        let (stage, place) = (&model.hierarchy().stages[0], model.params().place());
        let mut first = match place.fuses() {
            true => stage.model.decoder(1)?,
            false => by_slices(stage.model.tensor_decoder(1)?, 1, place.clone()),
        };
        let mut above = vec![0.0; stage.dim];
        if let Some(start) = &stage.input.start {
            first.step(&start.values(), &mut above)?;
        }
        Ok(Reader { model, first, tokens: 0, above, last: None, ended: false })
    }

    /// A piece must have a multiple of so many bytes, unless it is the last one.
    pub fn unit(&self) -> usize {
        self.model.hierarchy().patch_len(0)
    }

    /// The most bytes of a document. `None` if the first stage has no fixed positions and there is no limit.
    pub fn limit(&self) -> Option<usize> {
        let hierarchy = self.model.hierarchy();
        let is_limited = matches!(hierarchy.stages[0].input.positions, Positions::Fixed(_));
        is_limited.then(|| hierarchy.config.context_len())
    }

    /// The losses of the next bytes, in nats; NaN for the pad token.
    ///
    /// # Errors
    /// The document is longer than [`limit`](Self::limit), the piece before was no whole number of patches, an id lies outside
    /// the vocabulary, or a loss is not finite.
    pub fn losses(&mut self, bytes: &[u32]) -> Result<Vec<f32>> {
        if bytes.is_empty() {
            return Ok(vec![]);
        }
        let (unit, before) = (self.unit(), self.tokens * self.unit());
        if self.ended {
            return Err(Error::Input(format!("a piece that is not the last one must have a multiple of {unit} bytes")));
        }
        if let Some(limit) = self.limit().filter(|limit| before + bytes.len() > *limit) {
            let found = before + bytes.len();
            return Err(Error::Input(format!(
                "{found} bytes are more than the context of {limit} bytes, at which the fixed positions of stage 1 end"
            )));
        }
        self.ended = !bytes.len().is_multiple_of(unit);
        let config = self.model.config();
        let ids = Ids::of(&Sequences { ids: bytes, len: bytes.len(), loss_mask: None }, config, 1)?;
        let local = self.run(&ids)?;
        let at_bytes = self.model.per_byte(&ids, &local)?.squeeze(0)?;
        // Each byte is predicted at the one before it, and the first of all at the start.
        let before_first = match self.last.take() {
            Some(last) => last,
            None => local.flatten_to(1)?.narrow(0, 0, 1)?,
        };
        let rows = Tensor::cat(&[&before_first, &at_bytes.narrow(0, 0, bytes.len() - 1)?], 0)?;
        self.last = Some(at_bytes.narrow(0, bytes.len() - 1, 1)?.contiguous()?);
        let pad = config.pad_token_id as u32;
        let predicted = || bytes.iter().enumerate().filter(|(_, id)| **id != pad);
        let target = |(row, &token): (usize, &u32)| Target { row: row as u32, token, weight: 1.0 };
        let found = self.model.losses_at(&rows, &predicted().map(target).collect::<Vec<_>>())?;
        let mut losses = vec![f32::NAN; bytes.len()];
        for ((at, _), loss) in predicted().zip(found) {
            if !loss.is_finite() {
                return Err(Error::NotFinite(format!("the loss of byte {} is {loss}", before + at)));
            }
            losses[at] = loss;
        }
        Ok(losses)
    }

    /// The local stage's output for the next bytes, `(sequences, 1 + P_N, D_N)`.
    fn run(&mut self, ids: &Ids) -> Result<Tensor> {
        let (hierarchy, place) = (self.model.hierarchy(), self.model.params().place());
        let stage = &hierarchy.stages[0];
        let (dim, count) = (stage.dim, ids.layout.padded_len / self.unit());
        let mut tokens = vec![0.0; count * dim];
        stage.embedding.rows(&ids.values, &mut tokens);
        for (i, row) in tokens.chunks_exact_mut(dim).enumerate() {
            stage.input.positions.enter(self.tokens + i, row);
        }
        // In front, the output at the position before.
        let mut outputs = vec![0.0; (1 + count) * dim];
        outputs[..dim].copy_from_slice(&self.above);
        self.first.prefill(&tokens, &mut outputs[dim..], count)?;
        self.above.copy_from_slice(&outputs[count * dim..]);
        self.tokens += count;
        let mut above = transfer::to_tensor(&outputs, (1, 1 + count, dim), &place.device)?.to_dtype(place.dtype)?;
        for n in 1..hierarchy.stages.len() {
            above = hierarchy.run_stage(n, ids, Some(&above), None, Mode::Eval)?;
        }
        Ok(above)
    }
}
