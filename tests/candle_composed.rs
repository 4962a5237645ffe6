//! Blocks written with candle-nn, beside built-in ones, where nothing is fused: composed on the CPU, and on the card that
//! `MBLM_GOLDEN_DEVICE=cuda` names.

mod reference;

use mblm::device::{DeviceName, Place, composed};
// One file cannot hold two crates of plugins, so the LSTM is in composed.rs.
use mblm_candle_blocks as _;
use reference::hierarchies::{self, Block, SEEDS, hold, pass};
use reference::report;

const BLOCKS: [Block; 3] = [hierarchies::candle_gru, hierarchies::candle_llama, hierarchies::transformer];

#[test]
fn random_hierarchies_give_fused_what_they_give_composed() {
    for seed in 0..SEEDS {
        hold("fused", seed, &BLOCKS, |config| pass(config, Place::default()));
        hold("composed", seed, &BLOCKS, |config| composed(|| pass(config, Place::default())));
    }
}

#[test]
fn on_a_device() {
    match std::env::var("MBLM_GOLDEN_DEVICE") {
        Ok(name) => {
            let place: Place = name.parse::<DeviceName>().unwrap().open().unwrap().into();
            (0..SEEDS).for_each(|seed| hold(&name, seed, &BLOCKS, |config| pass(config, place.clone())));
        }
        Err(_) => report("skipped: MBLM_GOLDEN_DEVICE names no device"),
    }
}
