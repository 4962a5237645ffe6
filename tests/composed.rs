//! The reference cases in `tests/golden/`, training steps and generation included, with every op composed of candle's, which
//! is what a GPU runs: in f32 within the published tolerances, and in f64 within what the float32 of the references allows.
//! `MBLM_GOLDEN_DEVICE=cuda` runs them on a card, too.

mod reference;

use std::path::Path;

use candle_core::{DType, Device};
use mblm::device::{DeviceName, Place, composed};
use mblm::registry::BlockRegistry;
// Compiled in, since a plugin computes on the CPU with its fused ops.
use mblm_lstm as _;
use reference::hierarchies::{self, Block, SEEDS, hold, pass};
use reference::{Way, check_folder, report};

/// What the float32 of the references allows in f64: at most 6e-6 with the package's own blocks, and 1.05e-5 in one tensor of
/// the case with transformers' Mamba-2.
const GRADIENTS: f32 = 1.1e-5;

fn check(way: &Way) {
    let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    check_folder(golden, &BlockRegistry::builtin().unwrap(), way);
}

#[test]
fn composed_in_f32() {
    check(&Way { name: "composed", composed: true, ..Way::fused() });
}

#[test]
fn composed_in_f64() {
    let place = Place { device: Device::Cpu, dtype: DType::F64 };
    check(&Way { name: "f64", place, composed: false, outputs: 2e-6, gradients: GRADIENTS, training: 1e-5 });
}

/// The built-in blocks and the LSTM.
const BLOCKS: [Block; 4] = [hierarchies::transformer, hierarchies::mamba1, hierarchies::mamba2, hierarchies::lstm];

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
            check(&Way { name: "on the device", place: place.clone(), ..Way::fused() });
            (0..SEEDS).for_each(|seed| hold(&name, seed, &BLOCKS, |config| pass(config, place.clone())));
        }
        Err(_) => report("skipped: MBLM_GOLDEN_DEVICE names no device"),
    }
}
