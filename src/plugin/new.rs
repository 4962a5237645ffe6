//! `mblm plugin new`: a plugin to begin with, which builds and passes `check` as it is.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mblm::plugin::abi;
use mblm::train::terminal::Output;

use crate::Usage;

const CARGO: &str = include_str!("template/Cargo.toml.txt");
const LIB: &str = include_str!("template/lib.rs.txt");
const README: &str = include_str!("template/README.md.txt");
/// The versions that this program was built with; cargo takes from it what the new crate needs.
const LOCK: &str = include_str!("../../Cargo.lock");
/// The block in C that this repository ships is the template of others.
const C_SOURCE: &str = include_str!("../../plugins/mingru/mingru.c");
const MAKEFILE: &str = include_str!("../../plugins/mingru/Makefile");

/// The crate that a plugin in Rust depends on, where this program was built.
const CORE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/mblm-core");

/// Arguments of `mblm plugin new`.
#[derive(clap::Args)]
pub struct Args {
    /// Its name, which is also the block type: lower case letters, digits, `_` and `-`
    name: String,
    /// In C instead of Rust
    #[arg(long)]
    c: bool,
    /// The folder to make [default: NAME]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The folder of the crate mblm-core [default: where this program was built]
    #[arg(long, value_name = "DIR", conflicts_with = "c")]
    core: Option<PathBuf>,
}

/// Runs `mblm plugin new`.
pub fn run(args: &Args) -> Result<()> {
    let name = &args.name;
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(is_name) {
        let expected = "expected lower case letters, digits, `_` and `-`, a letter first";
        return Err(Usage(format!("{name:?}: {expected}")).into());
    }
    let folder = args.dir.clone().unwrap_or_else(|| PathBuf::from(name));
    if folder.exists() {
        return Err(Usage(format!("{} exists; name another folder with --dir", folder.display())).into());
    }
    let snake = name.replace('-', "_");
    let library = if cfg!(target_os = "macos") { format!("lib{snake}.dylib") } else { format!("lib{snake}.so") };
    let (build, place) = if args.c { ("make", ".") } else { ("cargo build --release", "target/release") };
    let readme = README
        .replace("TYPE", name)
        .replace("BUILD", build)
        .replace("LIBRARY", &format!("{place}/{library}"))
        .replace("FOLDER", place);
    let mut files = vec![("README.md", readme)];
    if args.c {
        let source = C_SOURCE.replace("minGRU 1", "STATE v1").replace("mingru", name);
        // The library is called after the file, in which a dash is no harm.
        let makefile = MAKEFILE.replace("libmingru", &format!("lib{snake}")).replace("mingru.c", "block.c");
        files.push(("block.c", source));
        files.push(("mblm_plugin.h", abi::HEADER.into()));
        files.push(("Makefile", makefile.replace("../../mblm-core/include", ".")));
    } else {
        files.push(("Cargo.toml", CARGO.replace("NAME", name).replace("CORE", &core(args)?)));
        files.push(("src/lib.rs", LIB.replace("STRUCT", &camel(&snake)).replace("TYPE", name)));
        files.push(("Cargo.lock", LOCK.into()));
        files.push((".gitignore", "/target\n".into()));
    }
    files.iter().try_for_each(|(file, text)| write(&folder.join(file), text))?;
    writeln!(
        Output::new(),
        "wrote {}; next:\n  cd {} && {build}\n  mblm plugin check {place}/{library}",
        folder.display(),
        folder.display()
    )?;
    Ok(())
}

fn core(args: &Args) -> Result<String> {
    let folder = args.core.clone().unwrap_or_else(|| CORE.into());
    match folder.join("Cargo.toml").is_file() {
        true => Ok(folder.canonicalize()?.display().to_string()),
        false => Err(Usage(format!(
            "there is no crate mblm-core in {}; name its folder, in a copy of this project, with --core",
            folder.display()
        ))
        .into()),
    }
}

fn camel(snake: &str) -> String {
    let word = |word: &str| word[..1].to_uppercase() + &word[1..];
    snake.split('_').filter(|part| !part.is_empty()).map(word).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    std::fs::create_dir_all(path.parent().unwrap_or(path)).with_context(cannot)?;
    std::fs::write(path, text).with_context(cannot)
}
