//! Reading a file: its dictionary, and the tensors in it.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use mblm_base::files;

use crate::Tensors;
use crate::archive::Archive;
use crate::fault::{Error, Fault, Parsed};
use crate::machine;
use crate::names::{self, LOSS, MODEL};
use crate::pickle::{Pickle, Value};
use crate::view::View;

/// Tensors may have more elements than are stored: tied weights share them, and an expanded tensor repeats them. As f32,
/// they may take this many times the bytes of the file, and this many bytes more.
const SHARED: u128 = 8;
const REPEATED: u128 = 1 << 30;

/// What a `.pth` file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saved {
    /// The tensors of floats under the names of version 0.4.2, contiguous, as f32; those of version 0.4.0 and before are
    /// renamed. The prefixes that `DataParallel` and `torch.compile` put before every name are gone.
    pub weights: Tensors,
    /// The other tensors, which no model has as a parameter, and what each is and should be: `is sparse; save it with
    /// .to_dense()`.
    pub others: BTreeMap<String, String>,
    /// The validation loss; not finite if it is not known.
    pub loss: f64,
}

/// Reads a `.pth` file.
///
/// # Errors
/// The file cannot be read, is damaged, is not what the package saves, or asks for anything but tensors.
pub fn read(path: &Path) -> Result<Saved, Error> {
    let at = |fault| Error { path: path.into(), fault };
    let file = files::open(path, u64::MAX).map_err(|error| at(error.to_string()))?.into_inner();
    parse(BufReader::new(file)).map_err(at)
}

fn parse(reader: impl Read + Seek) -> Parsed<Saved> {
    let mut archive = Archive::open(reader)?;
    let bytes = archive.pickle()?;
    let pickle = machine::run(&bytes).map_err(|fault| format!("data.pkl: {fault}"))?;
    let (model, loss) = state_dict(&pickle)?;
    let (weights, others) = tensors(&mut archive, &pickle, model)?;
    let loss = number(&mut archive, &pickle, loss).map_err(|fault| format!("{LOSS}: {fault}"))?;
    Ok(Saved { weights, others, loss })
}

/// The entries of a dictionary.
type Entries<'a> = [(Value<'a>, Value<'a>)];

/// The dictionary of tensors, and the loss beside it, `None` if there is none.
fn state_dict<'a, 'p>(pickle: &'p Pickle<'a>) -> Parsed<(&'p Entries<'a>, Value<'a>)> {
    const EXPECTED: &str = "expected a state_dict, or what the package saves, a dictionary with MODEL and LOSS";
    let save = "save it with torch.save(model.state_dict(), …) or the package's save_model_state";
    let root =
        pickle.entries(pickle.root).ok_or_else(|| format!("{EXPECTED}, found {}; {save}", pickle.root.kind()))?;
    let get = |key: &str| {
        let mut last_first = root.iter().rev();
        last_first.find_map(|(name, value)| (*name == Value::Text(key)).then_some(*value))
    };
    let Some(model) = get(MODEL) else {
        let is_tensor = |value: &Value| matches!(value, Value::Tensor(_) | Value::Foreign(_));
        if root.iter().any(|(_, value)| is_tensor(value)) {
            return Ok((root, Value::None));
        }
        let keys: Vec<_> = root.iter().take(8).map(|(key, _)| key.kind()).collect();
        return Err(format!("{EXPECTED}, found a dictionary with {}; {save}", list(&keys)));
    };
    let entries = pickle
        .entries(model)
        .ok_or_else(|| format!("{MODEL}: expected a dictionary of tensors, found {}", model.kind()))?;
    Ok((entries, get(LOSS).unwrap_or(Value::None)))
}

/// A number, Python's or numpy's or a tensor of one; not a number for `None`.
fn number(archive: &mut Archive<impl Read + Seek>, pickle: &Pickle, value: Value) -> Parsed<f64> {
    match value {
        Value::None => Ok(f64::NAN),
        Value::Float(number) => Ok(number),
        Value::Int(number) => Ok(number as f64),
        Value::Tensor(id) if pickle.views[id].elements == 1 => {
            let view = &pickle.views[id];
            let storage = &pickle.storages[view.storage];
            let dtype = storage.dtype().ok_or_else(|| format!("a {}", storage.class))?;
            let numbers = view.gather(&archive.storage(storage, dtype)?);
            numbers.first().map(|number| f64::from(*number)).ok_or_else(|| "expected a number".into())
        }
        other => {
            let found = match other {
                Value::Tensor(id) => format!("a tensor of {} elements", pickle.views[id].elements),
                other => other.kind(),
            };
            Err(format!("expected a number, found {found}; save it as one, with loss.item()"))
        }
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing in it".into() } else { items.join(", ") }
}

/// The tensors of the state dictionary, and the names and types of those that are not of floats. Each storage is read
/// once and let go.
fn tensors(
    archive: &mut Archive<impl Read + Seek>,
    pickle: &Pickle,
    entries: &Entries,
) -> Parsed<(Tensors, BTreeMap<String, String>)> {
    let mut views: BTreeMap<usize, BTreeMap<String, &View>> = BTreeMap::new();
    let mut others = BTreeMap::new();
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    let keys = entries.iter().map(|(key, _)| match key {
        Value::Text(name) => Ok(*name),
        key => Err(format!("expected names of tensors, found {}", key.kind())),
    });
    let keys = keys.collect::<Parsed<Vec<_>>>()?;
    let prefix = names::common_prefix(&keys);
    for (name, (_, value)) in keys.into_iter().zip(entries) {
        let current = names::current(&name[prefix..]);
        if let Some(other) = owners.insert(current.clone(), name) {
            return Err(format!("{other:?} and {name:?} are the same tensor, {current}; expected one of them"));
        }
        match value {
            Value::Tensor(id) => {
                let view = &pickle.views[*id];
                views.entry(view.storage).or_default().insert(current, view);
            }
            Value::Foreign(foreign) => drop(others.insert(current, foreign.advice())),
            value => return Err(format!("{name:?}: expected a tensor, found {}", value.kind())),
        }
    }
    let mut weights = Tensors::new();
    let bytes: u128 = views.values().flat_map(BTreeMap::values).map(|view| 4 * view.elements as u128).sum();
    let (file, most) = (archive.len, SHARED * u128::from(archive.len) + REPEATED);
    if bytes > most {
        return Err(format!(
            "its tensors take {bytes} bytes as f32, expected at most {most} for a file of {file} bytes; expanded tensors \
             repeat what is stored; save them with .contiguous()"
        ));
    }
    for (id, views) in views {
        let storage = &pickle.storages[id];
        let named = |fault: Fault| format!("{}: {fault}", views.keys().next().map_or("", String::as_str));
        let dtype = storage.dtype().ok_or_else(|| named(format!("a {}", storage.class)))?;
        let values = archive.storage(storage, dtype).map_err(named)?;
        weights.extend(views.into_iter().map(|(name, view)| (name, (view.shape.clone(), view.gather(&values)))));
    }
    Ok((weights, others))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
