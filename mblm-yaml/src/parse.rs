//! From text to a value and the line of each field. Scalars follow YAML 1.2's core schema, with YAML 1.1's underscores
//! in numbers, which the reference configurations use.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use mblm_base::value::join;
use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_yaml::{Mapping, Value};

use crate::error::Place;

/// Mappings and lists in each other, at most: deeper ones would overflow the stack of whoever walks them.
const MAX_DEPTH: usize = 64;
/// Values in all, aliases resolved, at most. A text counts as one value per [`TEXT_OF_A_VALUE`] bytes.
const MAX_NODES: usize = 1_000_000;
const TEXT_OF_A_VALUE: usize = 64;
/// Bytes of the paths of all fields together, at most.
const MAX_PATHS: usize = 1 << 26;

/// A line and what is wrong there.
type Mistake = (usize, String);

/// Parses one document.
pub(crate) fn parse(text: &str) -> Result<(Value, BTreeMap<String, Place>), Mistake> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text); // a byte order mark
    check_characters(text)?;
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text) {
        let (event, span) =
            event.map_err(|error| (error.marker().line(), format!("not valid YAML: {}", error.info())))?;
        builder.add(event, span.start.line()).map_err(|message| (span.start.line(), message))?;
    }
    let mut places = Places::default();
    let value = match builder.root {
        Some(root) => root.into_value("", &mut places)?,
        None => Value::Null,
    };
    Ok((value, places.of))
}

/// Refuses control characters, which YAML does not allow: a parser would take NUL for the end of the text.
fn check_characters(text: &str) -> Result<(), Mistake> {
    let is_wrong = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}');
    match text.char_indices().find(|(_, c)| is_wrong(*c)) {
        Some((at, c)) => {
            let line = text[..at].matches('\n').count() + 1;
            Err((line, format!("not valid YAML: the control character U+{:04X}; write it as an escape", c as u32)))
        }
        None => Ok(()),
    }
}

/// Where each field was given.
#[derive(Default)]
struct Places {
    of: BTreeMap<String, Place>,
    /// Bytes of their paths.
    len: usize,
}

impl Places {
    fn insert(&mut self, path: &str, line: usize) -> Result<(), Mistake> {
        self.len += path.len();
        if self.len > MAX_PATHS {
            return Err((line, format!("the names of fields are too long: together they have over {MAX_PATHS} bytes")));
        }
        self.of.insert(path.into(), Place::Line(line));
        Ok(())
    }
}

#[derive(Clone)]
struct Node {
    content: Content,
    /// Of the key, for a field of a mapping.
    line: usize,
    /// This one and those in it, with the size of texts: see [`MAX_NODES`].
    num_nodes: usize,
}

#[derive(Clone)]
enum Content {
    Scalar { value: Value, text: String },
    List(Vec<Node>),
    Mapping(Vec<(String, Node)>),
}

impl Node {
    fn into_value(self, path: &str, places: &mut Places) -> Result<Value, Mistake> {
        if !path.is_empty() {
            places.insert(path, self.line)?;
        }
        Ok(match self.content {
            Content::Scalar { value, .. } => value,
            Content::List(items) => {
                let item = |(i, item): (usize, Node)| item.into_value(&join(path, &format!("[{i}]")), places);
                Value::Sequence(items.into_iter().enumerate().map(item).collect::<Result<_, _>>()?)
            }
            Content::Mapping(entries) => {
                let entry = |(key, node): (String, Node)| {
                    let value = node.into_value(&join(path, &key), places)?;
                    Ok((Value::String(key), value))
                };
                Value::Mapping(entries.into_iter().map(entry).collect::<Result<Mapping, _>>()?)
            }
        })
    }
}

/// A list or mapping whose end has not come yet.
struct Open {
    node: Node,
    anchor: usize,
    /// The field whose value comes next, and its line.
    key: Option<(String, usize)>,
    /// The lines of the fields so far.
    lines: HashMap<String, usize>,
    /// What merge keys (`<<`) bring; the mapping's own fields go first.
    merged: Vec<(String, Node)>,
}

#[derive(Default)]
struct Builder {
    root: Option<Node>,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
}

impl Builder {
    fn add(&mut self, event: Event, line: usize) -> Result<(), String> {
        let node = |content| Node { content, line, num_nodes: 1 };
        let collection = |tag: Option<&Tag>, name: &str| match tag {
            Some(tag) if !(tag.is_yaml_core_schema() && tag.suffix == name) => Err(no_meaning(tag)),
            _ => Ok(()),
        };
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let is_text = style != ScalarStyle::Plain;
                let value = scalar(&text, is_text, tag.as_deref())?;
                let num_nodes = 1 + text.len() / TEXT_OF_A_VALUE;
                let content = Content::Scalar { value, text: text.into_owned() };
                self.close(Node { content, line, num_nodes }, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                collection(tag.as_deref(), "seq")?;
                self.start(node(Content::List(vec![])), anchor)
            }
            Event::MappingStart(anchor, tag) => {
                collection(tag.as_deref(), "map")?;
                self.start(node(Content::Mapping(vec![])), anchor)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.end(open),
                None => Ok(()),
            },
            Event::Alias(anchor) => match self.anchors.get(&anchor).cloned() {
                Some(node) => self.close(node, 0),
                None => Err("not valid YAML: an alias inside the value that it names".into()),
            },
            Event::DocumentStart(_) if self.root.is_some() => {
                Err("expected one document, found another one after `---`".into())
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, node: Node, anchor: usize) -> Result<(), String> {
        if self.open.len() == MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} nested lists and mappings"));
        }
        self.open.push(Open { node, anchor, key: None, lines: HashMap::new(), merged: vec![] });
        Ok(())
    }

    fn end(&mut self, mut open: Open) -> Result<(), String> {
        if let Content::Mapping(entries) = &mut open.node.content {
            for (key, node) in open.merged {
                if let Entry::Vacant(new) = open.lines.entry(key.clone()) {
                    new.insert(node.line);
                    entries.push((key, node));
                }
            }
        }
        self.close(open.node, open.anchor)
    }

    /// Puts a complete node where it belongs.
    fn close(&mut self, node: Node, anchor: usize) -> Result<(), String> {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        parent.node.num_nodes += node.num_nodes;
        if parent.node.num_nodes > MAX_NODES {
            return Err(format!("more than {MAX_NODES} values"));
        }
        match (&mut parent.node.content, parent.key.take()) {
            (Content::List(items), _) => items.push(node),
            (Content::Mapping(_), None) => match node.content {
                Content::Scalar { text, .. } => parent.key = Some((text, node.line)),
                _ => return Err("a list or mapping cannot be the name of a field".into()),
            },
            (Content::Mapping(_), Some((key, _))) if key == "<<" => merge(node, &mut parent.merged)?,
            (Content::Mapping(entries), Some((key, line))) => {
                if let Some(first) = parent.lines.insert(key.clone(), line) {
                    return Err(format!("field `{key}` is given twice; first in line {first}"));
                }
                entries.push((key, Node { line, ..node }));
            }
            (Content::Scalar { .. }, _) => {}
        }
        Ok(())
    }
}

/// Adds the fields of a mapping, or of a list of mappings, to `merged`.
fn merge(node: Node, merged: &mut Vec<(String, Node)>) -> Result<(), String> {
    match node.content {
        Content::Mapping(entries) => merged.extend(entries),
        Content::List(items) => items.into_iter().try_for_each(|item| merge(item, merged))?,
        Content::Scalar { .. } => return Err("expected a mapping after `<<`".into()),
    }
    Ok(())
}

/// The value of a scalar; `is_text` for one in quotes or a block.
fn scalar(text: &str, is_text: bool, tag: Option<&Tag>) -> Result<Value, String> {
    match tag {
        None if is_text => Ok(Value::String(text.into())),
        None => Ok(plain(text)),
        Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => Ok(Value::String(text.into())),
        Some(tag) if tag.is_yaml_core_schema() && ["int", "float", "bool", "null"].contains(&&*tag.suffix) => {
            Ok(plain(text))
        }
        Some(tag) => Err(no_meaning(tag)),
    }
}

fn no_meaning(tag: &Tag) -> String {
    let tag = if tag.is_yaml_core_schema() { format!("!!{}", tag.suffix) } else { tag.to_string() };
    format!("the tag `{tag}` has no meaning here")
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => number(text).unwrap_or_else(|| Value::String(text.into())),
    }
}

/// A number, if the whole text is one. A power of ten such as `2e9` is an integer if it is a whole number.
fn number(text: &str) -> Option<Value> {
    let (negative, digits) = match text.strip_prefix(['-', '+']) {
        Some(digits) => (text.starts_with('-'), digits),
        None => (false, text),
    };
    match digits {
        ".inf" | ".Inf" | ".INF" => return Some(Value::from(if negative { f64::NEG_INFINITY } else { f64::INFINITY })),
        ".nan" | ".NaN" | ".NAN" => return Some(Value::from(f64::NAN)),
        _ => {}
    }
    let starts_as_number = digits.trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit());
    if !starts_as_number || digits.ends_with('_') || digits.contains("._") {
        return None;
    }
    let digits = digits.replace('_', "");
    let integer = |digits: &str, radix| {
        let magnitude = u64::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'))?;
        match negative {
            false => Some(Value::from(magnitude)),
            true => Some(Value::from(0i64.checked_sub_unsigned(magnitude)?)),
        }
    };
    let radix = digits.get(..2).and_then(|prefix| match prefix {
        "0x" => Some(16),
        "0o" => Some(8),
        "0b" => Some(2),
        _ => None,
    });
    if let Some(radix) = radix {
        return integer(&digits[2..], radix);
    }
    let has_leading_zero = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    if has_leading_zero || !digits.bytes().all(|b| b.is_ascii_digit() || b".eE+-".contains(&b)) {
        return None;
    }
    if let Some(integer) = integer(&digits, 10) {
        return Some(integer);
    }
    let magnitude: f64 = digits.parse().ok()?;
    let is_whole = !digits.contains('.') && magnitude.fract() == 0.0 && magnitude < 2f64.powi(53);
    match (is_whole, negative) {
        (true, false) => Some(Value::from(magnitude as u64)),
        (true, true) => Some(Value::from(-(magnitude as i64))),
        (false, false) => Some(Value::from(magnitude)),
        (false, true) => Some(Value::from(-magnitude)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        parse(text).unwrap().0
    }

    fn lines(text: &str) -> Vec<(String, usize)> {
        let line = |(path, place)| match place {
            Place::Line(line) => (path, line),
            Place::Set(_) | Place::Other(..) => unreachable!(),
        };
        parse(text).unwrap().1.into_iter().map(line).collect()
    }

    #[test]
    fn plain_scalars_resolve() {
        let text = Value::from;
        let cases = [
            ("200_000_000_000", Value::from(200_000_000_000u64)),
            ("1_048_576", Value::from(1_048_576)),
            ("-1_0", Value::from(-10)),
            ("+7", Value::from(7)),
            ("0x1F", Value::from(31)),
            ("0o17", Value::from(15)),
            ("0b101", Value::from(5)),
            ("18446744073709551615", Value::from(u64::MAX)),
            ("-9223372036854775808", Value::from(i64::MIN)),
            ("1e-3", Value::from(1e-3)),
            ("2e9", Value::from(2_000_000_000u64)),
            ("-1e3", Value::from(-1000)),
            ("1.0", Value::from(1.0)),
            (".5", Value::from(0.5)),
            ("3_000.25", Value::from(3000.25)),
            ("-.inf", Value::from(f64::NEG_INFINITY)),
            ("~", Value::Null),
            ("", Value::Null),
            ("True", Value::from(true)),
            ("yes", text("yes")),
            ("1.2.3", text("1.2.3")),
            ("2024-01-01", text("2024-01-01")),
            ("007", text("007")),
            ("_1", text("_1")),
            ("1_", text("1_")),
            ("1e", text("1e")),
            ("8k_30b", text("8k_30b")),
            ("e5", text("e5")),
            ("-", text("-")),
            ("0x", text("0x")),
            ("'5'", text("5")),
            ("\"1_0\"", text("1_0")),
            ("!!str 5", text("5")),
            ("!!int 5", Value::from(5)),
        ];
        for (yaml, want) in cases {
            let found = if yaml == "-" { plain(yaml) } else { value(yaml) };
            assert_eq!(found, want, "{yaml}");
        }
        assert!(value(".nan").as_f64().is_some_and(f64::is_nan));
    }

    #[test]
    fn agrees_with_serde_yaml_where_both_know_the_syntax() {
        let text = "a: {b: [1, two, 3.5], c: null}\nd:\n- - 1\n  - {x: y}\ne: >-\n  some\n  text\nf: /a < set this!\n";
        assert_eq!(value(text), serde_yaml::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn every_field_has_its_line() {
        let text = "# comment\na:\n  b: 1\n\n  c: [1,\n      2]\nd:\n  - x: 1\n    y: {z: 3}\n  -\n    x: 2\n";
        let want = [
            ("a", 2),
            ("a.b", 3),
            ("a.c", 5),
            ("a.c[0]", 5),
            ("a.c[1]", 6),
            ("d", 7),
            ("d[0]", 8),
            ("d[0].x", 8),
            ("d[0].y", 9),
            ("d[0].y.z", 9),
            ("d[1]", 11),
            ("d[1].x", 11),
        ];
        assert_eq!(lines(text), want.map(|(path, line)| (path.to_string(), line)));
    }

    #[test]
    fn aliases_and_merge_keys_resolve() {
        let text = "base: &base {a: 1, b: 2}\nsame: *base\nmore:\n  <<: *base\n  b: 3\n";
        assert_eq!(value(text), value("base: {a: 1, b: 2}\nsame: {a: 1, b: 2}\nmore: {b: 3, a: 1}"));
        assert!(lines(text).contains(&("more.a".into(), 1)) && lines(text).contains(&("more.b".into(), 5)));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_text() {
        assert_eq!(value("\u{feff}a: 1\n"), value("a: 1\n"));
        assert_eq!(value("\u{feff}"), Value::Null);
    }

    /// Twice the keys are twice the work: with comparisons of every pair this would be 10^10 of them.
    #[test]
    fn a_mapping_may_have_many_fields() {
        let fields: Vec<String> = (0..100_000).map(|i| format!("x{i}: 1")).collect();
        let (block, flow) = (fields.join("\n"), format!("{{{}}}", fields.join(", ")));
        for text in [block, flow, format!("a: &a {{{}}}\nb:\n  <<: *a\n", fields.join(", "))] {
            parse(&text).unwrap();
        }
    }

    #[test]
    fn mistakes_have_a_line() {
        let deep = "[".repeat(65);
        // A text of 1 MB, 100,000 times; paths of 10 kB, 100,000 times.
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), "*a,".repeat(100_000));
        let name = "x".repeat(1000);
        let paths = (0..10).map(|i| format!("{}{name}:\n", " ".repeat(i))).collect::<String>();
        let paths = format!("{paths}          [{}]\n", "1,".repeat(100_000));
        let mut bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n".to_string();
        for (last, next) in ["ab", "bc", "cd", "de", "ef", "fg"].map(|pair| pair.split_at(1)) {
            bomb.push_str(&format!("{next}: &{next} [{}]\n", vec![format!("*{last}"); 10].join(", ")));
        }
        let cases = [
            ("a: 1\nb: [1, 2\nc: 3\n", (3, "not valid YAML: ")),
            ("a: 1\n b: 2\n", (2, "not valid YAML: ")),
            ("a: 1\nb: 2\na: 3\n", (3, "field `a` is given twice; first in line 1")),
            ("a: 1\n\0b: 2\n", (2, "not valid YAML: the control character U+0000; ")),
            ("a: 1\nb: \x1b[2J\n", (2, "not valid YAML: the control character U+001B; ")),
            ("a:\n  b: !foo\n    c: 1\n", (3, "the tag `!foo` has no meaning here")),
            ("a: 1\nb: !!set {c}\n", (2, "the tag `!!set` has no meaning here")),
            ("a: !!binary aGk=\n", (1, "the tag ")),
            ("a: !foo [1]\n", (1, "the tag `!foo` has no meaning here")),
            (&long, (2, "more than 1000000 values")),
            (&paths, (11, "the names of fields are too long: ")),
            ("a: 1\n---\nb: 2\n", (2, "expected one document, found another one after `---`")),
            ("a: !!int 1\nb: !foo 1", (2, "the tag `!foo` has no meaning here")),
            ("[1]: 2", (1, "a list or mapping cannot be the name of a field")),
            ("a:\n  <<: 3\n", (2, "expected a mapping after `<<`")),
            (&deep, (1, "more than 64 nested lists and mappings")),
            (&bomb, (6, "more than 1000000 values")),
        ];
        for (text, (line, message)) in cases {
            let found = parse(text).map(|_| ()).unwrap_err();
            assert!(found.0 == line && found.1.starts_with(message), "{text}: {found:?}");
        }
    }

    /// Pieces of YAML in any order, and damaged texts: what is read is the same when it is written and read again.
    #[test]
    fn no_text_panics_and_what_is_read_is_what_is_written() {
        const PIECES: [&str; 40] = [
            "a",
            "b: ",
            "- ",
            "\n",
            "  ",
            "\n  ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            ": ",
            "&a ",
            "*a",
            "<<: ",
            "!!str ",
            "!foo ",
            "'",
            "\"",
            "|\n",
            ">-\n",
            "#",
            "---\n",
            "...\n",
            "? ",
            "%YAML 1.2\n",
            "1000",
            "2e9",
            ".nan",
            "-.inf",
            "0x1F",
            "~",
            "\t",
            "\u{feff}",
            "\0",
            "\\x41",
            "é",
            "params.x",
            "[0]",
            "\r\n",
        ];
        let mut random = mblm_base::random::XorShift::new(1);
        let mut below = move |limit: usize| (random.draw() % limit as u64) as usize;
        let whole =
            "io: {dir: /data, keep: 3}\nlist:\n- 1\n- {b: [1, 'two', 3.5]}\nbase: &base {a: 1}\nmore:\n  <<: *base\n";
        let mut read = 0;
        for round in 0..20_000 {
            let mut text = match round % 2 {
                0 => (0..below(24)).map(|_| PIECES[below(PIECES.len())]).collect(),
                _ => whole.to_string(),
            };
            for _ in 0..round % 2 * (1 + below(3)) {
                let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
                let (from, len) = (below(boundaries.len()), below(3));
                let to = boundaries.get(from + len).copied().unwrap_or(text.len());
                text.replace_range(boundaries[from]..to, PIECES[below(PIECES.len())]);
            }
            if let Ok((value, _)) = parse(&text) {
                let again = serde_yaml::to_string(&value).unwrap();
                assert_eq!(format!("{:?}", parse(&again).unwrap().0), format!("{value:?}"), "{text:?}");
                read += 1;
            }
        }
        assert!((2_000..18_000).contains(&read), "{read} of 20000 texts were read");
    }
}
