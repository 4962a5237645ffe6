//! The smallest plugin: a block that gives back what it is given, with as many parameters as a transformer has.
//! `benches/plugin_border.rs` times with it what crossing the border costs.
//!
//!     cargo build --release -p mblm-core --example identity     # target/release/examples/libidentity.so

mod block;

mblm_core::export_plugin!();
