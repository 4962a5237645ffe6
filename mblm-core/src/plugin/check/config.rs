//! Configurations and parameter lists.

use mblm_base::random::noise;
use mblm_sdk::abi;
use serde_json::{Value, json};

use super::{Outcome, Subject};

/// The configuration is accepted; unknown fields and what is no configuration are refused; nothing crashes.
pub(super) fn hostile(subject: &Subject) -> Result<Outcome, String> {
    let config: Value = serde_json::from_str(&subject.config).map_err(|error| error.to_string())?;
    subject.check(subject.config.as_bytes(), 0).map_err(|failure| format!("{config} at width 0: {failure}"))?;
    let mut refused = no_configurations();
    let mut unknown = config.clone();
    unknown["no_such_field"] = json!(1);
    refused.push(unknown.to_string().into_bytes());
    for bytes in &refused {
        refuse(subject, bytes)?;
    }
    let mut tried = refused.len();
    for bytes in wrong_values(subject, &config).into_iter().chain(mutations(subject.config.as_bytes())) {
        survive(subject, &bytes)?;
        tried += 1;
    }
    Ok(Outcome::Passed(format!("{tried} wrong ones")))
}

/// What is no configuration at all.
fn no_configurations() -> Vec<Vec<u8>> {
    let texts =
        ["", " ", "null", "3", "[]", "\"x\"", "{", "}", "{\"", "{\"a\"", "{\"a\":", "{\"a\":1,", "{\"a\":1}}", "{,}"];
    let mut all: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    all.push(vec![b'['; 100_000]);
    all.push(b"{\"a\":".repeat(50_000));
    all.push(vec![0xFF; 64]);
    all.push(b"{\"\xC3\x28\": 1}".to_vec());
    all.push(vec![0; 16]);
    all.push(format!("{{\"{}\": 1}}", "x".repeat(1 << 20)).into_bytes());
    all
}

/// Every field that is known, with values that it may not have meant.
fn wrong_values(subject: &Subject, config: &Value) -> Vec<Vec<u8>> {
    let numbers = ["-1", "0", "1e308", "1e999", "-0.0", "18446744073709551615", "18446744073709551616", "0.5"];
    let others = ["true", "null", "\"\"", "\"sixteen\"", "[]", "{}", "[[1]]"];
    let mut known: Vec<&String> = config.as_object().into_iter().flat_map(|fields| fields.keys()).collect();
    known.extend(subject.block().schema["properties"].as_object().into_iter().flat_map(|fields| fields.keys()));
    known.sort();
    known.dedup();
    let mut all = vec![];
    for name in known {
        for value in numbers.iter().chain(&others) {
            let mut fields = config.as_object().cloned().unwrap_or_default();
            fields.remove(name);
            let mut text: String = fields.iter().map(|(name, value)| format!("{}: {value}, ", json!(name))).collect();
            text = format!("{{{text}{}: {value}}}", json!(name));
            all.push(text.into_bytes());
        }
    }
    all
}

/// Small accidents.
fn mutations(config: &[u8]) -> Vec<Vec<u8>> {
    let random = noise(600, 3);
    let number = |i: usize, below: usize| (((random[i] + 1.0) / 2.0) * below as f32) as usize % below.max(1);
    let mutate = |i: usize| {
        let mut bytes = config.to_vec();
        let at = number(3 * i, bytes.len());
        match number(3 * i + 1, 3) {
            0 => bytes[at] = number(3 * i + 2, 256) as u8,
            1 => bytes.truncate(at),
            _ => bytes.insert(at, number(3 * i + 2, 256) as u8),
        }
        bytes
    };
    (0..200).map(mutate).collect()
}

fn show(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], bytes.len()),
        None => text.into(),
    }
}

fn refuse(subject: &Subject, bytes: &[u8]) -> Result<(), String> {
    match subject.check(bytes, subject.dim) {
        Ok(()) => Err(format!("{} is accepted", show(bytes))),
        Err(failure) if failure.status != abi::INVALID => {
            Err(format!("{}: expected status {} (MBLM_INVALID), found {failure}", show(bytes), abi::INVALID))
        }
        Err(failure) if failure.message.is_empty() => Err(format!("{}: refused without a message", show(bytes))),
        Err(_) => Ok(()),
    }
}

/// It may be accepted or refused; the process must live, and what is accepted may still fail when it is built.
fn survive(subject: &Subject, bytes: &[u8]) -> Result<(), String> {
    match subject.check(bytes, subject.dim) {
        Err(failure) if failure.status == abi::PANICKED => Err(format!("{}: {failure}", show(bytes))),
        _ => Ok(()),
    }
}

/// Two instances, and one asked twice, list the same parameters.
pub(super) fn params(subject: &Subject) -> Result<Outcome, String> {
    let (one, two) = (subject.instance(subject.dim, 2)?, subject.instance(subject.dim, 2)?);
    if one.params() != two.params() {
        return Err("two instances of one configuration list different parameters".into());
    }
    for (index, param) in one.params().iter().enumerate() {
        let again = one.param(index as u64).map_err(|error| error.to_string())?;
        if again != *param {
            return Err(format!("parameter {index} was {param:?}, asked again it is {again:?}"));
        }
    }
    if one.param(one.params().len() as u64).is_ok() {
        return Err(format!("there are {} parameters, but one more is described", one.params().len()));
    }
    if one.params().is_empty() {
        return Ok(Outcome::Passed("it has no parameters, so it cannot learn".into()));
    }
    let numbers: usize = one.params().iter().map(|param| param.shape.iter().product::<usize>()).sum();
    Ok(Outcome::Passed(format!("{} parameters, {numbers} numbers in 2 layers", one.params().len())))
}
