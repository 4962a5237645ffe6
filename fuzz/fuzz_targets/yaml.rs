//! A configuration, and an override of it. Seeds: `configs/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mblm_yaml::Document;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (text, assignment) = text.split_once('\u{1}').unwrap_or((text, "a=1"));
    if let Ok(mut document) = Document::parse(text, "fuzz.yaml") {
        let _ = document.set(assignment);
        let _ = document.check_fields("", &["params", "train", "io"]);
    }
});
