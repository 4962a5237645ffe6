//! Plugins for tests: compiled from C on the spot, or the crate that was built with the tests.

#![allow(dead_code)] // not every test uses all

pub mod twins;

use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Compiles a C file of this repository to a library in `folder`, with arguments for the compiler.
pub fn compile(source: &str, folder: &Path, name: &str, args: &[&str]) -> PathBuf {
    let library = folder.join(format!("{name}.so"));
    let include = format!("-I{ROOT}/mblm-sdk/include");
    let output = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-fPIC", "-shared", &include, "-o"])
        .arg(&library)
        .args(args)
        .arg(format!("{ROOT}/{source}"))
        .arg("-lm")
        .output()
        .expect("a C compiler called cc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// The test's small block, with a fault.
pub fn broken(folder: &Path, fault: &str) -> PathBuf {
    compile("tests/plugins/broken.c", folder, fault, &[&format!("-DFAULT_{fault}")])
}

/// The test's small block, which runs these statements in a forward pass in the middle of training.
pub fn late(folder: &Path, name: &str, statements: &str) -> PathBuf {
    compile("tests/plugins/broken.c", folder, name, &["-pthread", &format!("-DFAULT_LATE={statements}")])
}

/// The LSTM's library, which cargo builds with the tests.
pub fn lstm() -> PathBuf {
    built("mblm_lstm")
}

/// The library of blocks written with candle-nn, which cargo builds with the tests.
pub fn candle() -> PathBuf {
    built("mblm_candle_blocks")
}

fn built(name: &str) -> PathBuf {
    let name = format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let deps = std::env::current_exe().expect("a test program").parent().expect("its folder").to_path_buf();
    let places = [deps.join(&name), deps.parent().expect("the target folder").join(&name)];
    let newest = places.into_iter().filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path))).max();
    newest.unwrap_or_else(|| panic!("no {name} in {}", deps.display())).1
}
