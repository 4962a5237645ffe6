//! What a pickle builds. Values are plain numbers that refer to flat tables, so that nothing recurses, and what is used
//! often is stored once.

use crate::fault::Parsed;
use crate::view::{Storage, View};

/// A Python object, or where it is in the tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Global(Global<'a>),
    Storage(usize),
    Tensor(usize),
    /// A tensor whose numbers are not read; says what torch has for it.
    Foreign(&'a str),
}

impl Value<'_> {
    /// For messages: what it is.
    pub(crate) fn kind(self) -> String {
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
            Value::Foreign(class) => format!("a tensor of torch's {class}"),
        }
    }
}

/// All that a file may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global<'a> {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// Another function, for tensors that are not read.
    Other(&'a str),
    Storage(&'a str),
    /// A type of numbers, a layout: an argument of a function.
    Constant(&'a str),
}

impl<'a> Global<'a> {
    pub(crate) fn find(module: &'a str, name: &'a str) -> Parsed<Self> {
        let is_constant = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Ok(Global::RebuildParameter),
            ("torch._utils", name) if name.starts_with("_rebuild_") => Ok(Global::Other(name)),
            ("torch.serialization", "_get_layout") | ("torch", "Size" | "device") => Ok(Global::Other(name)),
            ("torch" | "torch.storage", name) if name.ends_with("Storage") => Ok(Global::Storage(name)),
            ("torch", name) if is_constant(name) => Ok(Global::Constant(name)),
            _ => Err(format!(
                "the file asks for {} of {}; only dictionaries, tensors and parameters are read, and nothing is run; \
                 of a whole module save the tensors alone, with torch.save(model.state_dict(), …)",
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
pub(crate) struct Pickle<'a> {
    pub root: Value<'a>,
    /// Tuples and lists.
    pub sequences: Vec<Vec<Value<'a>>>,
    pub dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    pub storages: Vec<Storage<'a>>,
    pub views: Vec<View>,
    /// Values that reading it moved or looked at, for the test that this is in proportion to the pickle.
    #[cfg_attr(not(test), expect(dead_code))]
    pub touched: usize,
}

impl<'a> Pickle<'a> {
    /// The entries of a dictionary, as they were set: of equal keys the last counts.
    pub(crate) fn entries(&self, value: Value) -> Option<&[(Value<'a>, Value<'a>)]> {
        match value {
            Value::Dict(id) => Some(&self.dicts[id]),
            _ => None,
        }
    }
}
