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
    /// What is not read.
    Foreign(Foreign<'a>),
    Bytes(&'a [u8]),
    /// Bytes as text, each a character: how pickles before protocol 3 hold them.
    Latin1(&'a str),
    NumpyType(usize),
}

/// A tensor or an array whose numbers are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign<'a> {
    /// Of a storage that does not hold floats.
    Storage(&'a str),
    /// Of a type of numbers without a storage of its own.
    Dtype(&'a str),
    Sparse,
    Quantized,
    Nested,
    Meta,
    /// What another function makes.
    Other(&'a str),
}

impl Foreign<'_> {
    /// For messages: what it is.
    fn what(self) -> String {
        match self {
            Foreign::Storage(class) => format!("holds no floats (torch's {class})"),
            Foreign::Dtype(dtype) => format!("is of torch's {dtype}"),
            Foreign::Sparse => "is sparse".into(),
            Foreign::Quantized => "is quantized".into(),
            Foreign::Nested => "is nested".into(),
            Foreign::Meta => "has no numbers (device meta)".into(),
            Foreign::Other(name) => format!("is of a kind that is not read ({name})"),
        }
    }

    /// What it is, and what to do if a model has it as a parameter.
    pub(crate) fn advice(self) -> String {
        let advice = match self {
            Foreign::Storage(_) | Foreign::Dtype(_) => "save it with .float()",
            Foreign::Sparse => "save it with .to_dense()",
            Foreign::Quantized => "save it with .dequantize()",
            Foreign::Nested => "save it with .to_padded_tensor(0.0)",
            Foreign::Meta => "load the model's weights before you save them",
            Foreign::Other(_) => "save a plain copy, with .detach().clone()",
        };
        format!("{}; {advice}", self.what())
    }
}

/// A `numpy.dtype`: its code, such as `f8`, and whether the most significant byte comes first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NumpyType<'a> {
    pub code: &'a str,
    pub big_endian: bool,
}

impl NumpyType<'_> {
    /// The number in `bytes`, in little-endian order, if it is one.
    pub(crate) fn decode(&self, mut bytes: Vec<u8>) -> Option<f64> {
        if self.big_endian {
            bytes.reverse();
        }
        let number = |unsigned: bool| {
            let sign = if unsigned || bytes.last().is_none_or(|byte| *byte < 0x80) { 0 } else { 0xff };
            let wide = std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(sign));
            i128::from_le_bytes(wide) as f64
        };
        match (self.code, bytes.len()) {
            ("f8", 8) => Some(f64::from_le_bytes(bytes.try_into().ok()?)),
            ("f4", 4) => Some(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            ("f2", 2) => Some(half::f16::from_le_bytes(bytes.try_into().ok()?).into()),
            ("i1", 1) | ("i2", 2) | ("i4", 4) | ("i8", 8) => Some(number(false)),
            ("u1", 1) | ("u2", 2) | ("u4", 4) | ("u8", 8) => Some(number(true)),
            _ => None,
        }
    }
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
            Value::Foreign(foreign) => format!("a tensor that {}", foreign.what()),
            Value::Bytes(_) | Value::Latin1(_) => "bytes".into(),
            Value::NumpyType(_) => "a type of numpy".into(),
        }
    }
}

/// All that a file may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global<'a> {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// Another function, for what is not read.
    Other(Foreign<'a>),
    /// `_rebuild_tensor_v3`, for types of numbers without a storage of their own.
    RebuildUntyped,
    /// `_codecs.encode`
    Encode,
    /// `numpy.dtype`
    NumpyType,
    /// `numpy.core.multiarray.scalar`
    NumpyScalar,
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
            ("torch._utils", "_rebuild_tensor_v3") => Ok(Global::RebuildUntyped),
            ("torch._utils", "_rebuild_sparse_tensor" | "_rebuild_sparse_csr_tensor") => {
                Ok(Global::Other(Foreign::Sparse))
            }
            ("torch._utils", "_rebuild_qtensor") => Ok(Global::Other(Foreign::Quantized)),
            ("torch._utils", "_rebuild_nested_tensor") => Ok(Global::Other(Foreign::Nested)),
            ("torch._utils", "_rebuild_meta_tensor_no_storage") => Ok(Global::Other(Foreign::Meta)),
            ("torch._utils", name) if name.starts_with("_rebuild_") => Ok(Global::Other(Foreign::Other(name))),
            ("torch.serialization", "_get_layout") | ("torch", "Size" | "device") => {
                Ok(Global::Other(Foreign::Other(name)))
            }
            // A trainer's numbers may be numpy's. Version 2 renamed the module.
            ("_codecs", "encode") => Ok(Global::Encode),
            ("numpy", "dtype") => Ok(Global::NumpyType),
            ("numpy", "ndarray") => Ok(Global::Constant(name)),
            ("numpy._core.multiarray" | "numpy.core.multiarray", "scalar") => Ok(Global::NumpyScalar),
            ("numpy._core.multiarray" | "numpy.core.multiarray", "_reconstruct") => {
                Ok(Global::Other(Foreign::Other(name)))
            }
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
    pub numpy_types: Vec<NumpyType<'a>>,
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
