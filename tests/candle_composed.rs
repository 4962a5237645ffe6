//! Blocks written with candle-nn, beside a built-in one, where nothing is fused: composed on the CPU, and on a card with
//! `cargo test --release --features cuda --test candle_composed -- --ignored`.

mod reference;

// One program cannot hold two crates of plugins, so the LSTM is in composed.rs.
use mblm_candle_blocks as _;
use reference::device;
use reference::hierarchies::{self, Block};

const BLOCKS: [Block; 3] = [hierarchies::candle_gru, hierarchies::candle_llama, hierarchies::transformer];

#[test]
fn random_hierarchies_give_fused_what_they_give_composed() {
    hierarchies::fused_and_composed_agree(&BLOCKS);
}

#[test]
#[ignore = "needs a card"]
fn on_a_device() {
    hierarchies::agree_on(&device(), &BLOCKS);
}
