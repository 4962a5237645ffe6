//! Blocks that are compiled apart from the program: the C contract ([`abi`]), what a plugin in Rust is made with
//! ([`sdk`]), what the program loads plugins with ([`host`]), and what holds them against the contract ([`check`]).
//!
//! A plugin is trusted code: it runs with the rights of whoever runs the program.

pub mod check;
pub mod host;
