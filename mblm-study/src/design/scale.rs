//! The sizes and budgets of a scaling study.
//!
//! ```yaml
//! scale:
//!   sizes: [0.3M, 1M, 3M, 10M]          # parameters
//!   budgets: [3T, 10T, 30T]             # floating point operations of training
//!   solve: [hidden_dims, num_layers]    # what changes with the size; default: hidden_dims
//! ```

use mblm_yaml::{ConfigError, Document, describe};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

const PATH: &str = "scale";
/// More sizes or budgets than this are a mistake.
const MOST: usize = 32;
const LARGEST: f64 = 1e30;
const UNITS: [(char, f64); 5] = [('k', 1e3), ('M', 1e6), ('G', 1e9), ('T', 1e12), ('P', 1e15)];

/// Section `scale` of a study: every variant is trained in each size for each budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// Parameters, ascending.
    pub sizes: Vec<u64>,
    /// Floating point operations of training, ascending.
    pub budgets: Vec<f64>,
    /// Whether the number of layers grows too, as the width does.
    pub deepens: bool,
}

impl Scale {
    /// Reads section `scale`, if there is one.
    pub(super) fn from_document(document: &Document) -> Result<Option<Self>, ConfigError> {
        if document.get(PATH).is_none_or(Value::is_null) {
            return Ok(None);
        }
        document.check_fields(PATH, &["sizes", "budgets", "solve"])?;
        let sizes = numbers(document, "scale.sizes", "parameters, such as 0.3M")?;
        let budgets = numbers(document, "scale.budgets", "floating point operations, such as 30T")?;
        let sizes = sizes.into_iter().map(|size| size.round() as u64).collect();
        Ok(Some(Scale { sizes, budgets, deepens: deepens(document)? }))
    }
}

fn deepens(document: &Document) -> Result<bool, ConfigError> {
    const SOLVE: &str = "scale.solve";
    let names: Vec<String> = match document.get(SOLVE) {
        None | Some(Value::Null) => return Ok(false),
        Some(Value::String(name)) => vec![name.clone()],
        Some(_) => document.section(SOLVE)?,
    };
    match names.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["hidden_dims"] => Ok(false),
        ["hidden_dims", "num_layers"] | ["num_layers", "hidden_dims"] => Ok(true),
        _ => Err(document
            .error(SOLVE, format!("expected hidden_dims, or [hidden_dims, num_layers], found [{}]", names.join(", ")))),
    }
}

/// A list of positive numbers, ascending.
fn numbers(document: &Document, path: &str, of: &str) -> Result<Vec<f64>, ConfigError> {
    let list = match document.require(path)? {
        Value::Sequence(list) if (1..=MOST).contains(&list.len()) => list,
        other => {
            let message = format!("expected a list of 1 to {MOST} numbers of {of}, found {}", describe(other));
            return Err(document.error(path, message));
        }
    };
    let mut numbers: Vec<f64> = Vec::new();
    for (i, value) in list.iter().enumerate() {
        let place = format!("{path}[{i}]");
        let Some(number) = number(value).filter(|number| (1.0..=LARGEST).contains(number)) else {
            let message = format!("expected a positive number of {of}, found {}", describe(value));
            return Err(document.error(&place, message));
        };
        if numbers.contains(&number) {
            return Err(document.error(&place, format!("{} is given twice", compact(number))));
        }
        numbers.push(number);
    }
    numbers.sort_by(f64::total_cmp);
    Ok(numbers)
}

/// A number, or one with a unit: `0.3M`.
fn number(value: &Value) -> Option<f64> {
    let Value::String(text) = value else { return value.as_f64() };
    let text = text.trim();
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(*unit));
    let (digits, unit) = unit.map_or((text, 1.0), |(name, unit)| (&text[..text.len() - name.len_utf8()], *unit));
    // 0.3 times a million is 300,000, and not a little less.
    digits.trim().replace('_', "").parse::<f64>().ok().map(|number| (number * unit * 1e3).round() / 1e3)
}

/// A number as names have it: `300k`, `30T`.
pub(crate) fn compact(number: f64) -> String {
    let unit = UNITS.iter().rev().find(|(_, unit)| number >= *unit);
    unit.map_or(format!("{number}"), |(name, unit)| format!("{}{name}", number / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Scale>, String> {
        Scale::from_document(&Document::parse(text, "s.yaml").unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_and_budgets_are_read_in_order() {
        let scale = read("scale: {sizes: [1M, 0.3M, 2_500], budgets: [3e13, 1T], solve: [hidden_dims, num_layers]}");
        let want = Scale { sizes: vec![2500, 300_000, 1_000_000], budgets: vec![1e12, 3e13], deepens: true };
        assert_eq!(scale.unwrap(), Some(want));
        assert!(!read("scale: {sizes: [1M], budgets: [1T]}").unwrap().unwrap().deepens);
        assert_eq!(read("x: 1").unwrap(), None);
        let names = [300_000.0, 1e6, 2500.0, 3e13, 12.0, 1.5e12].map(compact);
        assert_eq!(names, ["300k", "1M", "2.5k", "30T", "12", "1.5T"]);
    }

    #[test]
    fn mistakes_say_what_was_expected() {
        for (text, want) in [
            ("scale: {sizes: [1M]}", "scale: missing field `budgets`"),
            ("scale: {sizes: 3, budgets: [1T]}", "scale.sizes: expected a list of 1 to 32 numbers of parameters"),
            (
                "scale: {sizes: [1M, huge], budgets: [1T]}",
                "scale.sizes[1]: expected a positive number of parameters, such as 0.3M, found \"huge\"",
            ),
            ("scale: {sizes: [60kk], budgets: [1T]}", "scale.sizes[0]: expected a positive number"),
            ("scale: {sizes: [1M], budgets: [1e300]}", "scale.budgets[0]: expected a positive number"),
            ("scale: {sizes: [1M, 1e6], budgets: [1T]}", "scale.sizes[1]: 1M is given twice"),
            ("scale: {sizes: [-1], budgets: [1T]}", "scale.sizes[0]: expected a positive number"),
            (
                "scale: {sizes: [1M], budgets: [1T], solve: depth}",
                "scale.solve: expected hidden_dims, or [hidden_dims, num_layers], found [depth]",
            ),
            ("scale: {size: [1M]}", "scale.size: unknown field; did you mean `sizes`?"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.contains(want), "{found}\n{want}");
        }
    }
}
