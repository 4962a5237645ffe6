//! A plugin in C through training passes, evaluation and decoding in one process. `.ci/memory` runs this under valgrind,
//! which sees a read or a write outside of the buffers that cross the border.

mod compiled;

use mblm::ParamStore;
use mblm::layer::Dims;
use mblm::plugin::host::{Library, PluginSource};
use mblm::registry::BlockRegistry;
use mblm::testing::{check_causality, check_decoder, check_gradients};
use mblm::yaml::Document;

#[test]
fn passes_and_decoding_stay_within_their_buffers() {
    let folder = tempfile::tempdir().unwrap();
    let library = compiled::compile("plugins/mingru/mingru.c", folder.path(), "mingru", &["-g"]);
    let registry = BlockRegistry::empty().with_source(PluginSource(Library::open(&library).unwrap())).unwrap();
    let document = Document::parse("block: {block_type: mingru, expand: 2}", "test").unwrap();
    let block = registry.parse(&document, "block").unwrap();
    let mut store = ParamStore::new(0);
    let model = block.build(8, 2, &mut store.root()).unwrap();
    for (batch, seq) in [(1, 1), (3, 5)] {
        let dims = Dims { batch, seq, dim: 8 };
        check_gradients(&*model, &store, dims);
        check_decoder(&*model, dims, 1e-5);
    }
    check_causality(&*model, Dims { batch: 2, seq: 5, dim: 8 });
}
