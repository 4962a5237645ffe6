//! Generation as it happens: bytes of several sequences at once from one decoder, and a text that appears character by
//! character.
//!
//!     cargo run --release --example streaming

use anyhow::Result;
use candle_core::{Device, Tensor};
use mblm::Mode;
use mblm::blocks as _;
use mblm::config::MblmConfig;
use mblm::generate::{Decoder, Format, Sampler, Sampling, TokenStream, Until, generate};
use mblm::model::Mblm;
use mblm::registry::BlockRegistry;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;

const CONFIG: &str = "
num_tokens: 257
pad_token_id: 256
hidden_dims: [64, 32]
num_layers: [2, 1]
seq_lens: [24, 4]
block: {block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16}
";

const TEXT: &str = "für alle Fälle: zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ";

fn main() -> Result<()> {
    let document = Document::parse(CONFIG, "streaming.rs")?;
    let model = Mblm::new(&MblmConfig::from_document(&document, "", &BlockRegistry::builtin()?)?, 0)?;
    train(&model)?;

    // The short way: a prompt, and a function that receives each byte. A character of several bytes, such as ü, is
    // written when its last byte is there.
    let prompt: Vec<u32> = "für ".bytes().map(u32::from).collect();
    let mut stream = TokenStream::new(std::io::stdout(), Format::Utf8);
    prompt.iter().try_for_each(|token| stream.write(*token))?;
    let until = Until { max_tokens: Some(90), stop_token: Some(u32::from(b'.')) };
    generate(&model, &[prompt], &mut [Sampler::new(Sampling::greedy())?], &until, |_, token| {
        stream.write(token)?;
        Ok(true) // false would end it
    })?;
    stream.finish()?;
    println!();

    // The long way: the decoder itself, for two sequences of one length. Each step costs the same, however long they are.
    let prompts = ["zwölf B", "großen "];
    let mut decoder = Decoder::new(&model, prompts.len())?;
    decoder.prefill(&prompts.iter().flat_map(|prompt| prompt.bytes().map(u32::from)).collect::<Vec<_>>())?;
    let mut texts: Vec<Vec<u8>> = prompts.iter().map(|prompt| prompt.as_bytes().to_vec()).collect();
    let mut sampler = Sampler::new(Sampling { temperature: 0.2, seed: 1, ..Sampling::default() })?;
    for _ in 0..24 {
        let next: Vec<u32> = decoder.logits().chunks_exact(257).map(|logits| sampler.sample(logits)).collect();
        texts.iter_mut().zip(&next).for_each(|(text, &byte)| text.push(byte as u8));
        decoder.step(&next)?;
    }
    texts.iter().for_each(|text| println!("{}", String::from_utf8_lossy(text)));
    Ok(())
}

/// Learns the text by heart, from any place in it on.
fn train(model: &Mblm) -> Result<()> {
    let bytes: Vec<u32> = TEXT.bytes().cycle().take(400).map(u32::from).collect();
    let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
    for step in 0..250u64 {
        let rows = (0..4).flat_map(|row| bytes[(step as usize * 7 + row * 21) % 300..][..96].to_vec()).collect();
        let loss = model.loss(&Tensor::from_vec(rows, (4, 96), &Device::Cpu)?, None, Mode::train(step))?;
        model.params().zero_grad();
        model.params().backward(&loss)?;
        clip_grad_norm(model.params(), 1.0)?;
        optimizer.step(model.params(), 5e-3)?;
    }
    Ok(())
}
