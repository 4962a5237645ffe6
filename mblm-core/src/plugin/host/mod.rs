//! The program's side: finding plugins, opening them, and running their blocks like built-in ones.

mod block;
mod calls;
mod instance;
mod library;
mod model;
pub mod probe;
mod search;

pub use block::PluginSource;
pub use calls::Failure;
pub(crate) use calls::call;
pub use instance::{Instance, ParamSpec, ParamValues, Pass, State, Tape};
pub(crate) use library::check_table;
pub use library::{Library, LibraryBlock};
pub use search::{Found, PATH_VARIABLE, SearchPath, Skipped, load};
