//! Hierarchies of blocks by chance, to hold one way of computing against another.

use candle_core::{DType, Device};
use mblm::Mode;
use mblm::base::random::mix;
use mblm::config::MblmConfig;
use mblm::device::{Place, composed};
use mblm::model::{Mblm, Sequences};
use mblm::registry::BlockRegistry;
use mblm::testing::{assert_close, noise, perturb};
use mblm::yaml::Document;

/// The YAML of a block with these positions.
pub type Block = fn(positions: &str) -> String;

pub fn transformer(positions: &str) -> String {
    format!(
        "{{block_type: transformer, attn_head_dims: 6, attn_num_heads: 2, attn_use_rot_embs: true, attn_dropout: 0.2, ff_dropout: \
         0.1, pos_emb_type: {positions}}}"
    )
}

pub fn mamba1(positions: &str) -> String {
    format!("{{block_type: mamba1, d_state: 5, d_conv: 4, expand: 2, pos_emb_type: {positions}}}")
}

pub fn mamba2(positions: &str) -> String {
    format!(
        "{{block_type: mamba2, d_state: 6, d_conv: 4, expand: 2, headdim: 4, dropout: 0.1, pos_emb_type: {positions}}}"
    )
}

pub fn lstm(positions: &str) -> String {
    format!("{{block_type: lstm, dropout: 0.1, pos_emb_type: {positions}}}")
}

pub fn candle_gru(positions: &str) -> String {
    format!("{{block_type: candle_gru, dropout: 0.1, pos_emb_type: {positions}}}")
}

pub fn candle_llama(_: &str) -> String {
    "{block_type: candle_llama, num_heads: 2, intermediate_size: 6, dropout: 0.1}".into()
}

/// Hierarchies that are tried.
const SEEDS: u64 = 32;

/// A hierarchy of one to three stages with blocks, positions, dropout and chunks by chance.
fn random_hierarchy(seed: u64, blocks: &[Block]) -> MblmConfig {
    let mut state = seed;
    let mut pick = |count: usize| {
        state = mix(state);
        (state % count as u64) as usize
    };
    let stages = 1 + pick(3);
    let numbers = |values: Vec<usize>| format!("{values:?}");
    let chunks = match (stages, pick(2)) {
        (1, _) | (_, 0) => "null".into(),
        _ => numbers((1..stages).map(|_| 1 + pick(3)).collect()),
    };
    let yaml = format!(
        "num_tokens: 257\npad_token_id: 256\nhidden_dims: {}\nnum_layers: {}\nseq_lens: {}\ntrain_checkpoint_chunks: \
         {chunks}\nblock: [{}]\n",
        numbers((0..stages).map(|_| 8 + 4 * pick(3)).collect()),
        numbers((0..stages).map(|_| 1 + pick(2)).collect()),
        numbers((0..stages).map(|_| 2 + pick(6)).collect()),
        (0..stages)
            .map(|_| blocks[pick(blocks.len())](["null", "fixed", "rope"][pick(3)]))
            .collect::<Vec<_>>()
            .join(", "),
    );
    let document = Document::parse(&yaml, "random.yaml").unwrap();
    MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap())
        .unwrap_or_else(|e| panic!("{e}\n{yaml}"))
}

/// Loss and gradients of a batch whose last patch is not full, by parameter.
fn pass(config: &MblmConfig, place: Place) -> (f32, Vec<(String, Vec<f32>)>) {
    let model = Mblm::at(config, 3, place).unwrap();
    perturb(model.params());
    let len = config.context_len() - config.context_len() / 5;
    let ids: Vec<u32> = noise(2 * len, 5).iter().map(|v| ((v + 1.0) * 127.0) as u32).collect();
    let mask: Vec<f32> = (0..2 * len).map(|i| (i % 3) as f32).collect();
    let sequences = Sequences { ids: &ids, len, loss_mask: Some(&mask) };
    let (loss, _) = model.counted_loss(&sequences, Mode::train(11)).unwrap();
    model.params().backward(&loss).unwrap();
    let grads = model.params().iter().map(|param| (param.name().to_string(), param.grad().to_vec())).collect();
    (loss.to_dtype(DType::F32).unwrap().to_scalar().unwrap(), grads)
}

/// Holds fused ops and compositions on the CPU against f64.
pub fn fused_and_composed_agree(blocks: &[Block]) {
    for seed in 0..SEEDS {
        let want = Want::of(seed, blocks);
        want.holds("fused", pass(&want.config, Place::default()));
        want.holds("composed", composed(|| pass(&want.config, Place::default())));
    }
}

/// Holds a device against f64 on the CPU.
pub fn agree_on(place: &Place, blocks: &[Block]) {
    for seed in 0..SEEDS {
        let want = Want::of(seed, blocks);
        want.holds("on the device", pass(&want.config, place.clone()));
    }
}

/// What a random hierarchy gives in f64.
struct Want {
    seed: u64,
    config: MblmConfig,
    loss: f32,
    grads: Vec<(String, Vec<f32>)>,
}

impl Want {
    fn of(seed: u64, blocks: &[Block]) -> Self {
        let config = random_hierarchy(seed, blocks);
        let (loss, grads) = pass(&config, Place { device: Device::Cpu, dtype: DType::F64 });
        Want { seed, config, loss, grads }
    }

    fn holds(&self, way: &str, (loss, grads): (f32, Vec<(String, Vec<f32>)>)) {
        let (seed, want) = (self.seed, self.loss);
        assert!((loss - want).abs() <= 2e-5 * want.abs(), "{seed}, {way}: loss {loss}, expected {want}");
        for ((name, got), (_, want)) in grads.iter().zip(&self.grads) {
            assert_close(&format!("{seed}, {way}: {name}"), got, want, 1e-4);
        }
    }
}
