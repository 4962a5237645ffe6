//! Checkpoints of the reference package: `.pth` files, which `torch.save` makes of
//! `{"MODEL": state_dict, "LOSS": loss}`, or of a `state_dict` alone.
//!
//! Such a file is a zip archive: a pickle, `data.pkl`, that says which tensors there are, and a file per storage with
//! their numbers. A machine that knows nothing but tensors and dictionaries reads the pickle: whatever the file says,
//! nothing of it is run, and no more is allocated than a small multiple of its size and a gigabyte.
//!
//! The reader is written by hand because candle's has no such limits and cannot write.

#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod archive;
mod fault;
mod machine;
mod names;
mod order;
mod pickle;
mod read;
mod tensors;
mod view;
mod write;

pub use fault::Error;
pub use names::block_types;
pub use read::{Saved, read};
pub use tensors::Tensors;
pub use write::write;
