//! Blocks that are compiled separately from the program: the C contract ([`mblm_sdk::abi`]), the SDK for plugins in Rust
//! ([`mblm_sdk::plugin`]), the host that loads plugins ([`host`]), and the checks of the contract ([`check`]).
//!
//! A plugin is trusted code. It runs with the rights of the user who runs the program.

pub mod check;
pub mod host;
