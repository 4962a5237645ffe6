//! Stage blocks written with candle-nn: [`gru`] is the smallest that is useful, [`llama`] is a port of a module of
//! candle-transformers. Start from one of them.

pub mod gru;
pub mod llama;

mblm_sdk::export_plugin!();
