//! A `.pth` file. Seeds: `tests/pth/` and `tests/golden/*.pth`.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let _ = mblm_pth::read(file.path());
});
