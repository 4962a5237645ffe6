//! The reference cases in `tests/golden/` with the fused ops, and those of the folder that `MBLM_GOLDEN_DIR` names with
//! `--ignored`. Tolerances are those of `tests/golden/README.md`.

mod compiled;
mod reference;

use std::panic::catch_unwind;
use std::path::Path;

use mblm::plugin::host::{Library, PluginSource};
use mblm::registry::BlockRegistry;
use reference::{Way, check_folder};

/// Runs every case; the LSTM is a plugin, and comes through the loaded library.
fn check(folder: &Path) {
    let lstm = Library::open(&compiled::lstm()).unwrap();
    let registry = BlockRegistry::builtin().unwrap().with_source(PluginSource(lstm)).unwrap();
    check_folder(folder, &registry, &Way::fused());
}

#[test]
fn shipped_cases() {
    check(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")));
}

#[test]
#[ignore = "needs MBLM_GOLDEN_DIR"]
fn cases_of_mblm_golden_dir() {
    check(Path::new(&std::env::var_os("MBLM_GOLDEN_DIR").unwrap()));
}

#[test]
fn a_case_that_fails_does_not_hide_those_behind_it() {
    let (golden, folder) =
        (Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")), tempfile::tempdir().unwrap());
    for (from, to) in [("t_1d", "a"), ("mm_2d", "b"), ("t_1d", "c")] {
        // The parameters of one model under the configuration of another, twice, and a sound case between them.
        let config = if from == "t_1d" { "mt_2d" } else { from };
        std::fs::copy(golden.join(config).with_extension("yaml"), folder.path().join(to).with_extension("yaml"))
            .unwrap();
        let tensors = golden.join(from).with_extension("safetensors");
        std::fs::copy(tensors, folder.path().join(to).with_extension("safetensors")).unwrap();
    }
    let panic = catch_unwind(|| check(folder.path())).unwrap_err();
    let list = panic.downcast_ref::<String>().unwrap();
    assert!(list.contains("2 of the cases") && list.contains("\na: a: ") && list.contains("\nc: c: "), "{list}");
}
