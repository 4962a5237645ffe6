//! Generation: an incremental [`Decoder`], a [`Sampler`], and a [`TokenStream`] for the output.

mod decoder;
mod sampling;
mod stream;

pub use decoder::Decoder;
use mblm_sdk::error::Result;
pub use sampling::{Sampler, Sampling};
pub use stream::{Format, TokenStream};

use crate::model::Mblm;

/// The conditions under which generation ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Until {
    /// The maximum number of new tokens. `None`: up to the context length `P_1 · … · P_N`.
    pub max_tokens: Option<usize>,
    /// A sequence ends after this token.
    pub stop_token: Option<u32>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It has the requested number of tokens.
    MaxTokens,
    /// It reached the stop token.
    StopToken,
    /// It fills the model's context.
    ContextLength,
    /// `receive` returned false.
    Receiver,
}

/// Continues `prompts`, which have the same length (possibly 0), until each sequence has ended. Calls `receive` with
/// the number of the sequence and every new token; it returns false to end.
///
/// # Errors
/// The prompts differ in length, have ids outside the vocabulary, or do not fit the context. A model without fixed
/// positions accepts longer prompts too, if `until` limits the number of tokens.
pub fn generate(
    model: &Mblm,
    prompts: &[Vec<u32>],
    samplers: &mut [Sampler],
    until: &Until,
    mut receive: impl FnMut(usize, u32) -> Result<bool>,
) -> Result<Vec<Ended>> {
    let len = prompts.first().map_or(0, |p| p.len());
    if prompts.iter().any(|p| p.len() != len) || samplers.len() != prompts.len() {
        let lens: Vec<usize> = prompts.iter().map(|p| p.len()).collect();
        return Err(mblm_sdk::Error::Input(format!(
            "the sequences of a batch grow together: expected prompts of equal length and one sampler each, found lengths \
             {lens:?} and {} samplers",
            samplers.len()
        )));
    }
    let is_one_prompt = prompts.windows(2).all(|pair| pair[0] == pair[1]);
    let mut decoder = Decoder::new(model, prompts.len())?;
    // Without fixed positions a sequence may grow past the context, but only if told how far.
    let context = decoder.limit().or(until.max_tokens.is_none().then(|| model.config().context_len()));
    if let (None, Some(context)) = (decoder.limit(), context.filter(|context| len > *context)) {
        return Err(crate::Error::Input(format!(
            "the prompt has {len} bytes, more than the context of {context}; this model can go on past its context, so \
             say for how many bytes (--max-bytes), or shorten the prompt"
        )));
    }
    match prompts.first() {
        Some(prompt) if is_one_prompt => decoder = Decoder::after(model, prompt, prompts.len())?,
        _ => decoder.prefill(&prompts.concat())?,
    }
    let mut ended = vec![None; prompts.len()];
    let vocab = model.config().num_tokens;
    let mut made = 0;
    loop {
        for (b, ended) in ended.iter_mut().enumerate().filter(|(_, ended)| ended.is_none()) {
            *ended = match () {
                () if until.max_tokens.is_some_and(|max| made >= max) => Some(Ended::MaxTokens),
                () if context.is_some_and(|context| decoder.len() >= context) => Some(Ended::ContextLength),
                () if decoder.is_full(b) => Some(Ended::ContextLength),
                () => None,
            };
        }
        if ended.iter().all(|e| e.is_some()) {
            return Ok(ended.into_iter().flatten().collect());
        }
        let mut tokens = vec![0; prompts.len()];
        for (b, logits) in decoder.logits().chunks_exact(vocab).enumerate() {
            // A sequence that has ended goes on unheard: the others need their batch.
            tokens[b] = samplers[b].sample(logits);
            if ended[b].is_none() {
                let go_on = receive(b, tokens[b])?;
                ended[b] = match () {
                    () if !go_on => Some(Ended::Receiver),
                    () if until.stop_token == Some(tokens[b]) => Some(Ended::StopToken),
                    () => None,
                };
            }
        }
        made += 1;
        if ended.iter().any(|e| e.is_none()) && context.is_none_or(|context| decoder.len() < context) {
            decoder.step_some(&tokens, |b| ended[b].is_none())?;
        }
    }
}
