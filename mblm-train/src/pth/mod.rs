//! Checkpoints of the reference package: `.pth` files, which `torch.save` makes of
//! `{"MODEL": state_dict, "LOSS": loss}`.
//!
//! Such a file is a zip archive: a pickle, `data.pkl`, that says which tensors there are, and a file per storage with
//! their numbers. A machine that knows nothing but tensors and dictionaries reads the pickle: whatever the file says,
//! nothing of it is run, and no more is allocated than a small multiple of its size.

mod archive;
mod machine;
mod names;
mod order;
mod pickle;
#[cfg(test)]
mod tests;
mod view;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

pub use self::write::write;

use self::archive::Archive;
use self::pickle::{Pickle, Value};
use self::view::View;
use crate::checkpoint::Tensors;
use crate::error::{AtPath, Error, Result};

/// The keys of the dictionary that the package saves.
const MODEL: &str = "MODEL";
const LOSS: &str = "LOSS";

/// Views on a storage may together have this many times its elements: tied weights share one, and nothing else should.
const SHARED: usize = 4;

/// What went wrong in a file, without the file's name.
type Fault = String;
type Parsed<T> = std::result::Result<T, Fault>;

/// What a `.pth` file holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// The tensors under the names of version 0.4.2, contiguous, as f32; those of version 0.4.0 and before are renamed.
    pub weights: Tensors,
    /// The validation loss; not finite if it is not known.
    pub loss: f64,
}

/// Reads a `.pth` file.
///
/// # Errors
/// The file cannot be read, is damaged, is not what the package saves, or asks for anything but tensors.
pub fn read(path: &Path) -> Result<Saved> {
    let file = File::open(path).at(path)?;
    parse(BufReader::new(file)).map_err(|fault| Error::checkpoint(path, fault))
}

fn parse(reader: impl Read + Seek) -> Parsed<Saved> {
    let mut archive = Archive::open(reader)?;
    let bytes = archive.pickle()?;
    let pickle = Pickle::parse(&bytes).map_err(|fault| format!("data.pkl: {fault}"))?;
    let saved = || format!("expected what the package saves, a dictionary with {MODEL} and {LOSS}");
    let root = pickle.entries(pickle.root).ok_or_else(|| format!("{}, found {}", saved(), pickle.root.kind()))?;
    let get = |key: &str| {
        let mut last_first = root.iter().rev();
        last_first.find_map(|(name, value)| (*name == Value::Text(key)).then_some(*value))
    };
    let (Some(model), Some(loss)) = (get(MODEL), get(LOSS)) else {
        return Err(format!("{}, found another one; save it with the package's save_model_state", saved()));
    };
    let loss = match loss {
        Value::Float(loss) => loss,
        Value::Int(loss) => loss as f64,
        other => return Err(format!("{LOSS}: expected a number, found {}", other.kind())),
    };
    Ok(Saved { weights: tensors(&mut archive, &pickle, model)?, loss })
}

/// The tensors of the state dictionary; each storage is read once and let go.
fn tensors(archive: &mut Archive<impl Read + Seek>, pickle: &Pickle, model: Value) -> Parsed<Tensors> {
    let entries = pickle
        .entries(model)
        .ok_or_else(|| format!("{MODEL}: expected a dictionary of tensors, found {}", model.kind()))?;
    let mut views: BTreeMap<usize, BTreeMap<String, &View>> = BTreeMap::new();
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for &(key, value) in entries {
        let Value::Text(name) = key else {
            return Err(format!("{MODEL}: expected names of tensors, found {}", key.kind()));
        };
        let Value::Tensor(id) = value else {
            return Err(format!("{MODEL}: {name:?}: expected a tensor, found {}", value.kind()));
        };
        let current = names::current(name);
        if let Some(other) = owners.insert(current.clone(), name) {
            return Err(format!(
                "{MODEL}: {other:?} and {name:?} are the same tensor, {current}; expected one of them"
            ));
        }
        let view = &pickle.views[id];
        views.entry(view.storage).or_default().insert(current, view);
    }
    let mut weights = Tensors::new();
    for (id, views) in views {
        let storage = &pickle.storages[id];
        let elements = views.values().try_fold(0usize, |sum, view| sum.checked_add(view.elements));
        if elements.is_none_or(|elements| elements / SHARED > storage.len) {
            return Err(format!(
                "storage {:?}: its {} tensors have more than {SHARED} times its {} elements",
                storage.key,
                views.len(),
                storage.len
            ));
        }
        let values = archive.storage(storage)?;
        weights.extend(views.into_iter().map(|(name, view)| (name, (view.shape.clone(), view.gather(&values)))));
    }
    Ok(weights)
}
