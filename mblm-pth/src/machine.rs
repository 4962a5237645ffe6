//! The machine that reads what `torch.save` writes, without running anything.
//!
//! A pickle is a program for a stack machine that builds Python objects and may call any function that it names. The
//! machine here knows only the instructions that torch writes for dictionaries of tensors and numbers, and only the
//! functions of [`Global`], none of which is called: they say how their arguments are to be read.
//!
//! An instruction touches the values that it takes from the stack, each of which an instruction of its own put there,
//! and at most [`MAX_DIMS`] more. So a file costs steps and memory in proportion to its size.

use std::collections::HashMap;

use crate::fault::Parsed;
use crate::pickle::{Foreign, Global, NumpyType, Pickle, Value};
use crate::view::{MAX_DIMS, Storage, View};

/// Values that may be put on the stack in all, and remembered; a tensor takes about 35.
const MAX_VALUES: usize = 1 << 20;
/// Collections that may be open at once; torch opens 5.
const MAX_DEPTH: usize = 64;
/// The newest protocol there is; torch uses 2.
const MAX_PROTOCOL: u64 = 5;

/// Reads a pickle.
///
/// # Errors
/// It holds something else than torch writes for tensors; names the byte at which.
pub(crate) fn run(bytes: &[u8]) -> Parsed<Pickle<'_>> {
    Machine::new(bytes).run()
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at which collections begin.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    storage_ids: HashMap<&'a str, usize>,
    pushed: usize,
    /// Values that instructions moved or looked at.
    touched: usize,
    built: Pickle<'a>,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let built = Pickle {
            root: Value::None,
            sequences: vec![],
            dicts: vec![],
            storages: vec![],
            views: vec![],
            numpy_types: vec![],
            touched: 0,
        };
        let (memo, storage_ids) = (HashMap::new(), HashMap::new());
        Machine { bytes, at: 0, stack: vec![], marks: vec![], memo, storage_ids, pushed: 0, touched: 0, built }
    }

    /// Interprets all instructions.
    ///
    /// # Errors
    /// Names the byte of the instruction that is at fault.
    fn run(mut self) -> Parsed<Pickle<'a>> {
        loop {
            let at = self.at;
            match self.step() {
                Ok(Some(root)) => return Ok(Pickle { root, touched: self.touched, ..self.built }),
                Ok(None) => {}
                Err(fault) => return Err(format!("byte {at}: {fault}")),
            }
        }
    }

    /// Interprets one instruction; the last one returns the object.
    fn step(&mut self) -> Parsed<Option<Value<'a>>> {
        let [opcode] = self.take()?;
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => self.protocol()?,
            0x95 => drop(self.take::<8>()?), // the length of a frame
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' | b'M' => {
                let number = self.unsigned(if opcode == b'K' { 1 } else { 2 })?;
                self.push(Value::Int(number as i64))?;
            }
            b'J' => {
                let number = i32::from_le_bytes(self.take()?);
                self.push(Value::Int(number.into()))?;
            }
            0x8a => self.long()?,
            b'G' => {
                let number = f64::from_be_bytes(self.take()?);
                self.push(Value::Float(number))?;
            }
            0x8c => self.text(1)?,
            b'X' => self.text(4)?,
            0x8d => self.text(8)?,
            b'C' => self.push_bytes(1)?,
            b'B' => self.push_bytes(4)?,
            0x8e => self.push_bytes(8)?,
            b'(' => self.mark()?,
            b')' => self.push_tuple(vec![])?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items)?;
            }
            0x85..=0x87 => self.short_tuple((opcode - 0x84).into())?,
            b']' => self.push_list()?,
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b'}' => self.push_dict()?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(Global::find(module, name)?))?;
            }
            0x93 => self.stack_global()?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            other => return Err(refused(other)),
        }
        Ok(None)
    }

    /// The next `N` bytes.
    fn take<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let bytes = self.slice(N as u64)?;
        bytes.try_into().map_err(|_| format!("expected {N} bytes"))
    }

    fn slice(&mut self, len: u64) -> Parsed<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let bytes = usize::try_from(len).ok().and_then(|len| rest.get(..len));
        let bytes = bytes.ok_or_else(|| format!("{len} bytes should follow, found {}: it is cut short", rest.len()))?;
        self.at += bytes.len();
        Ok(bytes)
    }

    /// A number of `len` bytes, at most 8.
    fn unsigned(&mut self, len: usize) -> Parsed<u64> {
        let bytes = self.slice(len as u64)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| (number << 8) | u64::from(byte)))
    }

    /// A number that tells its own length, in two's complement.
    fn long(&mut self) -> Parsed<()> {
        let len = self.unsigned(1)? as usize;
        if len > 8 {
            return Err(format!("an integer of {len} bytes, expected at most 8"));
        }
        let unused = 64 - 8 * len as u32;
        let number = self.unsigned(len)?;
        self.push(Value::Int(number.checked_shl(unused).map_or(0, |bits| bits as i64 >> unused)))
    }

    /// Text whose length is told in `len` bytes.
    fn text(&mut self, len: usize) -> Parsed<()> {
        let len = self.unsigned(len)?;
        let text = std::str::from_utf8(self.slice(len)?).map_err(|error| format!("text that is not UTF-8: {error}"))?;
        self.push(Value::Text(text))
    }

    /// Bytes whose number is told in `len` bytes.
    fn push_bytes(&mut self, len: usize) -> Parsed<()> {
        let len = self.unsigned(len)?;
        let bytes = self.slice(len)?;
        self.push(Value::Bytes(bytes))
    }

    fn line(&mut self) -> Parsed<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or("a name without an end")?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|error| format!("a name that is not UTF-8: {error}"))
    }

    fn protocol(&mut self) -> Parsed<()> {
        match self.unsigned(1)? {
            0..=MAX_PROTOCOL => Ok(()),
            other => Err(format!("pickle protocol {other}, expected at most {MAX_PROTOCOL}")),
        }
    }

    fn push(&mut self, value: Value<'a>) -> Parsed<()> {
        self.pushed += 1;
        self.touched += 1;
        if self.pushed > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Parsed<Value<'a>> {
        self.top()?;
        self.stack.pop().ok_or_else(empty)
    }

    /// The topmost value of the collection that is open.
    fn top(&self) -> Parsed<Value<'a>> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        self.stack[bottom..].last().copied().ok_or_else(empty)
    }

    fn mark(&mut self) -> Parsed<()> {
        if self.marks.len() == MAX_DEPTH {
            return Err(format!("collections nested deeper than {MAX_DEPTH}"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_to_mark(&mut self) -> Parsed<Vec<Value<'a>>> {
        let bottom = self.marks.pop().ok_or("the end of a collection that did not begin")?;
        self.touched += self.stack.len() - bottom;
        Ok(self.stack.drain(bottom..).collect())
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) -> Parsed<()> {
        self.built.sequences.push(items);
        self.push(Value::Tuple(self.built.sequences.len() - 1))
    }

    fn short_tuple(&mut self, len: usize) -> Parsed<()> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Parsed<Vec<_>>>()?;
        items.reverse();
        self.push_tuple(items)
    }

    fn push_list(&mut self) -> Parsed<()> {
        self.built.sequences.push(vec![]);
        self.push(Value::List(self.built.sequences.len() - 1))
    }

    fn push_dict(&mut self) -> Parsed<()> {
        self.built.dicts.push(vec![]);
        self.push(Value::Dict(self.built.dicts.len() - 1))
    }

    fn append(&mut self, items: Vec<Value<'a>>) -> Parsed<()> {
        let Value::List(id) = self.top()? else {
            return Err(format!("expected a list to append to, found {}", self.top()?.kind()));
        };
        self.built.sequences[id].extend(items);
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Value<'a>>) -> Parsed<()> {
        let Value::Dict(id) = self.top()? else {
            return Err(format!("expected a dictionary to put entries in, found {}", self.top()?.kind()));
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".into());
        }
        self.built.dicts[id].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn put(&mut self, len: usize) -> Parsed<()> {
        let place = self.unsigned(len)?;
        self.remember(place)
    }

    fn remember(&mut self, place: u64) -> Parsed<()> {
        let value = self.top()?;
        if self.memo.len() == MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values to remember"));
        }
        self.memo.insert(place, value);
        Ok(())
    }

    fn get(&mut self, len: usize) -> Parsed<()> {
        let place = self.unsigned(len)?;
        let value = self.memo.get(&place).copied();
        self.push(value.ok_or_else(|| format!("value {place} is fetched, but was never remembered"))?)
    }

    fn stack_global(&mut self) -> Parsed<()> {
        match (self.pop()?, self.pop()?) {
            (Value::Text(name), Value::Text(module)) => self.push(Value::Global(Global::find(module, name)?)),
            (name, module) => Err(format!("expected two names, found {} and {}", module.kind(), name.kind())),
        }
    }

    /// The first `N` values of a tuple, `None` beyond its end, and how many it has. A tuple that is fetched again and
    /// again may be long, so it is not copied.
    fn pop_tuple<const N: usize>(&mut self) -> Parsed<([Value<'a>; N], usize)> {
        let Value::Tuple(id) = self.top()? else {
            return Err(format!("expected a tuple, found {}", self.top()?.kind()));
        };
        self.pop()?;
        self.touched += N;
        let items = &self.built.sequences[id];
        Ok((std::array::from_fn(|i| items.get(i).copied().unwrap_or(Value::None)), items.len()))
    }

    /// `("storage", type, key, device, elements)` stands for a file of the archive.
    fn storage(&mut self) -> Parsed<()> {
        let (id, count) = self.pop_tuple()?;
        let ([Value::Text("storage"), Value::Global(Global::Storage(class)), Value::Text(key), _, Value::Int(len)], 5) =
            (id, count)
        else {
            let found = kinds(&id, count);
            return Err(format!("expected (\"storage\", type, key, device, elements), found ({found})"));
        };
        let len = usize::try_from(len).map_err(|_| format!("a storage of {len} elements"))?;
        let storage = Storage { key, class, len };
        let storages = &mut self.built.storages;
        let id = *self.storage_ids.entry(key).or_insert_with(|| {
            storages.push(storage);
            storages.len() - 1
        });
        if storages[id] != storage {
            return Err(format!("expected {:?} as before, found {storage:?}", storages[id]));
        }
        self.push(Value::Storage(id))
    }

    /// Reads the arguments of a function as what the function would make of them.
    fn reduce(&mut self) -> Parsed<()> {
        let (arguments, count) = self.pop_tuple::<7>()?;
        let function = self.pop()?;
        match (function, arguments) {
            (Value::Global(Global::OrderedDict), _) if count == 0 => self.push_dict(),
            (Value::Global(Global::RebuildParameter), [tensor @ (Value::Tensor(_) | Value::Foreign(_)), ..]) => {
                self.push(tensor)
            }
            (Value::Global(Global::Other(foreign)), _) => self.push(Value::Foreign(foreign)),
            (Value::Global(Global::RebuildUntyped), [_, _, _, _, _, _, Value::Global(Global::Constant(dtype))]) => {
                self.push(Value::Foreign(Foreign::Dtype(dtype)))
            }
            (Value::Global(Global::Encode), [Value::Text(text), Value::Text("latin1"), ..]) => {
                self.push(Value::Latin1(text))
            }
            (Value::Global(Global::NumpyType), [Value::Text(code), ..]) => {
                self.built.numpy_types.push(NumpyType { code, big_endian: false });
                self.push(Value::NumpyType(self.built.numpy_types.len() - 1))
            }
            (Value::Global(Global::NumpyScalar), [Value::NumpyType(id), number, ..]) => self.numpy_scalar(id, number),
            (
                Value::Global(Global::RebuildTensor),
                [Value::Storage(id), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), _, _, metadata],
            ) => self.tensor(id, offset, shape, strides, metadata),
            (function, arguments) => {
                Err(format!("{} cannot be applied to ({})", function.kind(), kinds(&arguments, count)))
            }
        }
    }

    /// What `_rebuild_tensor_v2` makes of its arguments.
    fn tensor(&mut self, storage: usize, offset: i64, shape: usize, strides: usize, metadata: Value<'a>) -> Parsed<()> {
        let Storage { class, len, .. } = self.built.storages[storage];
        if self.built.storages[storage].dtype().is_none() {
            return self.push(Value::Foreign(Foreign::Storage(class)));
        }
        let (offset, shape, strides) = (size(&Value::Int(offset))?, self.sizes(shape)?, self.sizes(strides)?);
        let mut view = View::new(storage, len, offset, shape, strides)?;
        view.negative = self.is_negative(metadata)?;
        self.built.views.push(view);
        self.push(Value::Tensor(self.built.views.len() - 1))
    }

    fn numpy_scalar(&mut self, numpy_type: usize, number: Value<'a>) -> Parsed<()> {
        const LONGEST: usize = 8;
        // One byte more shows that it is too long.
        let bytes: Vec<u8> = match number {
            Value::Bytes(bytes) => bytes.iter().copied().take(LONGEST + 1).collect(),
            Value::Latin1(text) => text.chars().map_while(|c| u8::try_from(c).ok()).take(LONGEST + 1).collect(),
            other => return Err(format!("expected the bytes of a number, found {}", other.kind())),
        };
        self.push(match self.built.numpy_types[numpy_type].decode(bytes) {
            Some(number) => Value::Float(number),
            None => Value::Foreign(Foreign::Other("numpy.scalar")),
        })
    }

    fn sizes(&mut self, tuple: usize) -> Parsed<Vec<usize>> {
        let sizes = &self.built.sequences[tuple];
        if sizes.len() > MAX_DIMS {
            return Err(format!("a tensor of {} dimensions, expected at most {MAX_DIMS}", sizes.len()));
        }
        self.touched += sizes.len();
        sizes.iter().map(size).collect()
    }

    /// What is to be done with the numbers of a storage: `{"neg": True}` for those that stand with the opposite sign.
    fn is_negative(&self, metadata: Value<'a>) -> Parsed<bool> {
        let entries = match (metadata, self.built.entries(metadata)) {
            (_, Some(entries)) => entries,
            (Value::None, None) => return Ok(false),
            (other, None) => return Err(format!("expected metadata of a tensor, found {}", other.kind())),
        };
        match entries {
            [] => Ok(false),
            [(Value::Text("neg"), Value::Bool(negative))] => Ok(*negative),
            [(Value::Text("conj"), Value::Bool(false))] => Ok(false),
            [(Value::Text("neg"), Value::Bool(_)), (key, value), ..] | [(key, value), ..] => Err(format!(
                "a tensor with the metadata {}: {}, which is not known here; save a copy of it (tensor.clone())",
                key.kind(),
                value.kind()
            )),
        }
    }

    /// Attributes of a dictionary, such as the versions of modules, say nothing about the tensors in it. Those of a type of
    /// numpy begin with a version and the order of bytes.
    fn build(&mut self) -> Parsed<()> {
        let attributes = self.pop()?;
        match self.top()? {
            Value::Dict(_) | Value::Foreign(_) => Ok(()),
            Value::NumpyType(id) => {
                let order = match attributes {
                    Value::Tuple(tuple) => self.built.sequences[tuple].get(1),
                    _ => None,
                };
                self.built.numpy_types[id].big_endian = order == Some(&Value::Text(">"));
                Ok(())
            }
            other => Err(format!("expected a dictionary to give attributes to, found {}", other.kind())),
        }
    }
}

/// For messages: the first values of a tuple.
fn kinds(values: &[Value], count: usize) -> String {
    let more = if count > values.len() { ", …" } else { "" };
    values.iter().take(count).map(|value| value.kind()).collect::<Vec<_>>().join(", ") + more
}

fn empty() -> String {
    "takes a value where there is none".into()
}

fn size(value: &Value) -> Parsed<usize> {
    match value {
        Value::Int(number) => usize::try_from(*number).map_err(|_| format!("expected a size, found {number}")),
        other => Err(format!("expected a size, found {}", other.kind())),
    }
}

/// Why an instruction is not followed.
fn refused(opcode: u8) -> String {
    let name = match opcode {
        b'i' => " (INST, which makes an object of any class)",
        b'o' => " (OBJ, which makes an object of any class)",
        0x81 => " (NEWOBJ, which makes an object of any class)",
        0x92 => " (NEWOBJ_EX, which makes an object of any class)",
        0x82..=0x84 => " (EXT, a registered function)",
        b'P' => " (PERSID)",
        b'0' => " (POP)",
        b'1' => " (POP_MARK)",
        b'2' => " (DUP)",
        0x8f..=0x91 => " (SET)",
        b'I' | b'L' | b'F' | b'S' | b'V' => " (a value as text, of pickle protocol 0)",
        0x8b => " (LONG4)",
        _ => "",
    };
    format!("instruction 0x{opcode:02x}{name} is none that torch writes for tensors")
}
