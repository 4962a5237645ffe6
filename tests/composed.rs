//! The reference cases in `tests/golden/`, training steps and generation included, with every op composed of candle's, which
//! is what a GPU runs: in f32 within the published tolerances, and in f64 within what the float32 of the references allows.
//! `MBLM_GOLDEN_DEVICE=cuda` runs them on a card, too.

mod reference;

use std::path::Path;

use candle_core::{DType, Device};
use mblm::device::{DeviceName, Place};
use mblm::registry::BlockRegistry;
// Compiled in, since a plugin computes with its fused ops.
use mblm_lstm as _;
use reference::{Way, check_folder, report};

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
    check(&Way { name: "f64", place, composed: false, outputs: 2e-6, gradients: 1e-5, training: 1e-5 });
}

#[test]
fn on_a_device() {
    match std::env::var("MBLM_GOLDEN_DEVICE") {
        Ok(name) => {
            let place = name.parse::<DeviceName>().unwrap().open().unwrap().into();
            check(&Way { name: "on the device", place, ..Way::fused() });
        }
        Err(_) => report("skipped: MBLM_GOLDEN_DEVICE names no device"),
    }
}
