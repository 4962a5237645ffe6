//! Puts the crates that a plugin in Rust needs into the program, for `mblm plugin new`, and has the program export its
//! `_exit`, so that a plugin's call of it is noticed; see `mblm_core::plugin::host::blame`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// The crates of the SDK. In a package from a registry they are not beside this file, and the registry has them.
const CRATES: [&str; 3] = ["mblm-base", "mblm-compute", "mblm-sdk"];

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    let target = |name: &str| env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo:rustc-link-arg-bin=mblm=-Wl,--export-dynamic-symbol=_exit");
    }
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let mut files = Vec::new();
    for name in CRATES.iter().filter(|name| here.join(name).is_dir()) {
        println!("cargo:rerun-if-changed={name}");
        list(&here.join(name), &mut files)?;
    }
    files.sort();
    let mut code = String::from("&[\n");
    for file in &files {
        let name = file.strip_prefix(&here).unwrap_or(file);
        // Writing to a string cannot fail.
        let _ = writeln!(code, "    ({name:?}, include_str!({file:?})),");
    }
    code.push_str("]\n");
    fs::write(PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("sdk.rs"), code)
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true if path.ends_with("target") => {}
            true => list(&path, files)?,
            // And no file that an editor leaves behind.
            false
                if path.extension().is_some_and(|name| ["rs", "toml", "md", "h"].iter().any(|kind| name == *kind)) =>
            {
                files.push(path);
            }
            false => {}
        }
    }
    Ok(())
}
