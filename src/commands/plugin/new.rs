//! `mblm plugin new`: a plugin to begin with, which builds and passes `check` as it is.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mblm::abi;
use mblm::base::terminal::Output;
use mblm::registry::BlockRegistry;

use crate::exit::Usage;

const CARGO: &str = include_str!("template/Cargo.toml.txt");
const LIB: &str = include_str!("template/lib.rs.txt");
const README: &str = include_str!("template/README.md.txt");
/// The versions that this program was built with; cargo takes from it what the new crate needs.
const LOCK: &str = include_str!("../../../Cargo.lock");
/// The block in C that this repository ships is the template of others.
const C_SOURCE: &str = include_str!("../../../plugins/mingru/mingru.c");
const MAKEFILE: &str = include_str!("../../../plugins/mingru/Makefile");

/// The crates that a plugin in Rust depends on: paths and contents. None in a program from a registry, which has them.
const SDK: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/sdk.rs"));
/// What these crates inherit.
const WORKSPACE: &str = include_str!("../../../Cargo.toml");

/// The longest name, as for crates.
const LONGEST: usize = 64;

/// Keywords of Rust, also those kept for later, and the crates that come with it.
const KEYWORDS: [&str; 58] = [
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc_macro",
    "pub",
    "ref",
    "return",
    "self",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "where",
    "while",
    "yield",
    "union",
    "safe",
];

/// Arguments of `mblm plugin new`.
#[derive(clap::Args)]
pub struct Args {
    /// The name of the plugin and its block type: lower case letters, digits, `_` and `-`
    name: String,
    /// Write it in C instead of Rust
    #[arg(long)]
    c: bool,
    /// The folder to create [default: NAME]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Build against the crate mblm-sdk in this folder of a checkout, instead of a copy in `vendor/`
    #[arg(long, value_name = "DIR", conflicts_with = "c")]
    core: Option<PathBuf>,
}

/// Runs `mblm plugin new`.
pub fn run(args: &Args) -> Result<()> {
    let name = &args.name;
    if let Err(reason) = check_name(name, args.c, &BlockRegistry::builtin()?) {
        return Err(Usage(format!("{name:?}: {reason}")).into());
    }
    let folder = args.dir.clone().unwrap_or_else(|| PathBuf::from(name));
    if folder.exists() {
        return Err(Usage(format!("{} already exists; choose another folder with --dir", folder.display())).into());
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
        files.push(("Makefile", makefile.replace("../../mblm-sdk/include", ".")));
    } else {
        let patch = match &args.core {
            Some(sdk) => patch(&checkout(sdk)?)?,
            None if SDK.is_empty() => String::new(),
            None => patch(Path::new("vendor"))?,
        };
        let version = env!("CARGO_PKG_VERSION");
        let manifest = CARGO.replace("NAME", name).replace("VERSION", version).replace("PATCH", &patch);
        files.push(("Cargo.toml", manifest));
        if args.core.is_none() && !SDK.is_empty() {
            files.push(("vendor/Cargo.toml", vendored_workspace()));
            files.extend(SDK.iter().map(|(path, text)| (*path, text.to_string())));
        }
        files.push(("src/lib.rs", LIB.replace("TYPE", name)));
        files.push(("Cargo.lock", LOCK.into()));
        files.push((".gitignore", "/target\n".into()));
    }
    files.iter().try_for_each(|(file, text)| {
        let is_vendored = file.starts_with("mblm-");
        write(&if is_vendored { folder.join("vendor").join(file) } else { folder.join(file) }, text)
    })?;
    writeln!(
        Output::new(),
        "wrote {}; next:\n  cd {} && {build}\n  mblm plugin check {place}/{library}",
        folder.display(),
        folder.display()
    )?;
    Ok(())
}

/// Whether a plugin can be called `name`. The name stands in strings and file names alone, so that most are possible.
///
/// # Errors
/// What is wrong with it, and what to do.
fn check_name(name: &str, c: bool, builtin: &BlockRegistry) -> Result<(), String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(is_name) || name.len() > LONGEST {
        return Err(format!("expected at most {LONGEST} lower case letters, digits, `_` and `-`, a letter first"));
    }
    let snake = name.replace('-', "_");
    let locked = LOCK.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    let taken = if let Some(block) = builtin.get(name) {
        format!("`{}` is a built-in block type", block.name)
    } else if !matches!(serde_yaml::from_str(name), Ok(serde_yaml::Value::String(_))) {
        "YAML does not read it as a string".into()
    } else if !c && KEYWORDS.contains(&snake.as_str()) {
        "it is a reserved word in Rust".into()
    } else if !c && locked.map(|crate_name| crate_name.replace('-', "_")).any(|crate_name| crate_name == snake) {
        "a crate that plugins depend on has this name".into()
    } else {
        return Ok(());
    };
    Err(format!("{taken}; choose another name, such as my-{name}"))
}

/// The folder of a checkout that has the crate mblm-sdk in `folder`, or beside it.
fn checkout(folder: &Path) -> Result<PathBuf> {
    let root = folder.canonicalize().ok().and_then(|folder| folder.parent().map(Path::to_path_buf));
    root.filter(|root| root.join("mblm-sdk/Cargo.toml").is_file()).ok_or_else(|| {
        let message = "no crate mblm-sdk; pass its folder, in a checkout of this project, with --core";
        Usage(format!("{}: {message}", folder.display())).into()
    })
}

/// Has cargo take the SDK from `folder`, for as long as no registry has this version.
fn patch(folder: &Path) -> Result<String> {
    let mut patch = String::from("\n[patch.crates-io]\n");
    for name in ["mblm-base", "mblm-compute", "mblm-sdk"] {
        let path = serde_json::to_string(&folder.join(name))?;
        patch += &format!("{name} = {{ path = {path} }}\n");
    }
    Ok(patch)
}

/// The manifest of the folder of vendored crates: versions, licence and dependencies, as in this project's own.
fn vendored_workspace() -> String {
    let inherited = WORKSPACE.split("[workspace.package]").nth(1).and_then(|rest| rest.split("\n[package]").next());
    format!("[workspace]\nmembers = [\"mblm-*\"]\n\n[workspace.package]{}", inherited.unwrap_or_default())
}

fn write(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    std::fs::create_dir_all(path.parent().unwrap_or(path)).with_context(cannot)?;
    std::fs::write(path, text).with_context(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rust without what may hold any text: strings and comments.
    fn code(source: &str) -> String {
        let line = |line: &str| {
            line.split("//").next().unwrap_or_default().split('"').step_by(2).collect::<Vec<_>>().join("\"")
        };
        source.lines().map(|text| line(text) + "\n").collect()
    }

    #[test]
    fn no_name_changes_the_code() {
        let letters = || (b'a'..=b'z').map(char::from);
        let others = || letters().chain("0123456789-_".chars());
        let short = letters().flat_map(|a| others().map(move |b| format!("{a}{b}"))).chain(letters().map(String::from));
        // Names that the template imports, those of the prelude, of derives, and of its own items.
        let words = "tensor device result mode param params init option vec box arc string some none ok err self layer model \
                     block stage-block stage-model pos-emb json-schema serialize deserialize debug default clone send sync \
                     fn drop f32 u8 tests test super crate a--b a- a_ x1 struct type name core";
        for name in short.chain(words.split_whitespace().map(String::from)) {
            assert_eq!(code(&LIB.replace("TYPE", &name)), code(LIB), "{name}");
        }
        assert!(code(LIB).contains("impl StageBlock for Block") && LIB.contains("name = \"TYPE\""));
    }

    #[test]
    fn names_that_cannot_work_are_refused_with_one_that_can() {
        let builtin = BlockRegistry::builtin().unwrap();
        let verdict = |name: &str, c: bool| check_name(name, c, &builtin);
        for name in
            ["self", "type", "box", "test", "serde", "candle-core", "candle_core", "transformer", "mamba", "null"]
        {
            let reason = verdict(name, false).unwrap_err();
            let instead = reason.rsplit_once("such as ").unwrap().1;
            assert_eq!((instead, verdict(instead, false)), (format!("my-{name}").as_str(), Ok(())), "{reason}");
        }
        for name in ["tensor", "result", "option", "vec", "arc", "mode", "a--b", "x1", "on", "y"] {
            assert_eq!(verdict(name, false), Ok(()), "{name}");
        }
        for name in ["self", "serde"] {
            assert_eq!(verdict(name, true), Ok(()), "{name} in C");
        }
        for name in ["transformer", "null"] {
            assert!(verdict(name, true).is_err(), "{name} in C");
        }
        for name in ["", "1a", "-a", "Aa", "a b", "a/b", "ä", &"a".repeat(65)] {
            assert!(verdict(name, false).unwrap_err().starts_with("expected at most 64"), "{name}");
        }
    }
}
