//! The reference cases in `tests/golden/`, training steps and generation included, with every op composed of candle's, which
//! is what a GPU runs: in f32 within the published tolerances, and in f64 within what the float32 of the references allows.
//! On a machine with a card: `cargo test --release --features cuda --test composed -- --ignored` (`MBLM_GOLDEN_DEVICE` names
//! another device than `cuda`).

mod reference;

use std::path::Path;

use candle_core::{DType, Device};
use mblm::device::Place;
use mblm::registry::BlockRegistry;
// Compiled in, since a plugin computes on the CPU with its fused ops.
use mblm_lstm as _;
use reference::hierarchies::{self, Block};
use reference::{Way, check_folder, device};

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
    check(&Way {
        name: "f64",
        place,
        outputs: 2e-6,
        gradients: 1e-5,
        rounded: &ROUNDED,
        training: 1e-5,
        ..Way::fused()
    });
}

/// Gradients of a case whose float32 is further off than those of all others: `tests/golden/float64.py` prints by how much.
const ROUNDED: [(&str, &str, f32); 1] = [("mm_m2_3d", "stage_models.0.layers.0.mixer.conv1d.bias", 1.0455e-5)];

/// The built-in blocks and the LSTM.
const BLOCKS: [Block; 4] = [hierarchies::transformer, hierarchies::mamba1, hierarchies::mamba2, hierarchies::lstm];

#[test]
fn random_hierarchies_give_fused_what_they_give_composed() {
    hierarchies::fused_and_composed_agree(&BLOCKS);
}

#[test]
#[ignore = "needs a card"]
fn on_a_device() {
    check(&Way { name: "on the device", place: device(), ..Way::fused() });
    hierarchies::agree_on(&device(), &BLOCKS);
}
