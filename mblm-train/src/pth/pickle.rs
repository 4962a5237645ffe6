//! What a pickle builds. Values are plain numbers that refer to flat tables, so that nothing recurses, and what is used
//! often is stored once.

use super::Parsed;
use super::machine::Machine;
use super::view::{Dtype, Storage, View};

/// A Python object, or where it is in the tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

impl Value<'_> {
    /// For messages: what it is.
    pub(super) fn kind(self) -> String {
        match self {
            Value::None => "None".into(),
            Value::Bool(value) => format!("the truth value {value}"),
            Value::Int(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Text(text) => format!("the text {}", shown(text)),
            Value::Tuple(_) => "a tuple".into(),
            Value::List(_) => "a list".into(),
            Value::Dict(_) => "a dictionary".into(),
            Value::Global(global) => format!("the name {global:?}"),
            Value::Storage(_) => "a storage".into(),
            Value::Tensor(_) => "a tensor".into(),
        }
    }
}

/// All that a file may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    pub(super) fn find(module: &str, name: &str) -> Parsed<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", "FloatStorage") => Ok(Global::Storage(Dtype::F32)),
            ("torch", "DoubleStorage") => Ok(Global::Storage(Dtype::F64)),
            ("torch", "HalfStorage") => Ok(Global::Storage(Dtype::F16)),
            ("torch", "BFloat16Storage") => Ok(Global::Storage(Dtype::Bf16)),
            ("torch", name) if name.ends_with("Storage") => {
                let expected = "Float, Double, Half or BFloat16";
                Err(format!("a tensor of torch {}: expected one of {expected}", shown(name)))
            }
            _ => Err(format!(
                "the file asks for {} of {}; only dictionaries, tensors and parameters are read, and nothing is run",
                shown(name),
                shown(module)
            )),
        }
    }
}

/// Text of the file as it may be shown: short, in quotes, without control characters.
fn shown(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The object that a pickle builds, with the tables that its values refer to.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub root: Value<'a>,
    /// Tuples and lists.
    pub sequences: Vec<Vec<Value<'a>>>,
    pub dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    pub storages: Vec<Storage<'a>>,
    pub views: Vec<View>,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle.
    ///
    /// # Errors
    /// It holds something else than torch writes for tensors; names the byte at which.
    pub(super) fn parse(bytes: &'a [u8]) -> Parsed<Self> {
        Machine::new(bytes).run()
    }

    /// The entries of a dictionary, as they were set: of equal keys the last counts.
    pub(super) fn entries(&self, value: Value) -> Option<&[(Value<'a>, Value<'a>)]> {
        match value {
            Value::Dict(id) => Some(&self.dicts[id]),
            _ => None,
        }
    }
}
