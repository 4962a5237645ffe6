//! An opened plugin. Every field of its table is checked before it is used.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use mblm_sdk::abi::{self, Block, Plugin, Text};
use mblm_sdk::block::PluginOrigin;

use super::calls::{Callee, HOST};
use super::file::LibraryFile;

/// Why this build cannot load any plugin.
pub const CANNOT_LOAD: Option<&str> = if cfg!(all(target_os = "linux", target_feature = "crt-static")) {
    Some(
        "this program is linked statically (a musl build) and has no dynamic loader, so it cannot load plugins; use a \
         build for x86_64-unknown-linux-gnu or the like, or compile the block in",
    )
} else {
    None
};

/// By the SHA-256 of their bytes.
static OPEN: Mutex<BTreeMap<String, Arc<Library>>> = Mutex::new(BTreeMap::new());

/// A plugin that was opened. Libraries are never unloaded.
pub struct Library {
    origin: PluginOrigin,
    table: &'static Plugin,
    blocks: Vec<LibraryBlock>,
}

/// A block of a plugin, with its texts checked.
pub struct LibraryBlock {
    /// Its name in configurations.
    pub block_type: &'static str,
    /// Its version.
    pub version: String,
    /// A one-line description.
    pub about: String,
    /// The JSON Schema of its fields.
    pub schema: serde_json::Value,
    pub(crate) table: &'static Block,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Library({} {})", self.origin.name, self.origin.path.display())
    }
}

impl Library {
    /// Reads and opens a library and prepares it for use.
    ///
    /// Run a [probe](super::probe) first: a library that crashes when it is opened takes the program with it.
    ///
    /// # Errors
    /// Why the file is no plugin that this program can use.
    pub fn open(path: &Path) -> Result<Arc<Self>, String> {
        Self::open_file(&LibraryFile::read(path)?)
    }

    /// As [`open`](Self::open), of a file that was read. The same bytes are opened once, wherever they lie.
    pub fn open_file(file: &LibraryFile) -> Result<Arc<Self>, String> {
        if let Some(reason) = CANNOT_LOAD {
            return Err(reason.into());
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = open.get(&file.sha256) {
            return Ok(library.clone());
        }
        let library = Arc::new(Self::load(file)?);
        open.insert(file.sha256.clone(), library.clone());
        Ok(library)
    }

    /// Whether a library with this SHA-256 is open.
    pub(super) fn is_open(sha256: &str) -> bool {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).contains_key(sha256)
    }

    /// The libraries that this process has opened.
    pub(super) fn opened() -> Vec<Arc<Self>> {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn load(file: &LibraryFile) -> Result<Self, String> {
        let mut table = Ok(std::ptr::null());
        let callee = Callee::new(file.path.display().to_string(), true);
        callee.call_void("opening", || table = entry(&file.loadable()));
        // SAFETY: an entry point returns null or a static table, whose first 16 bytes are the same in every version.
        let plugin = unsafe { check_table(table?) }?;
        let name = text(plugin.name, "its name")?;
        let version = text(plugin.version, "its version")?;
        let blocks = read_blocks(plugin)?;
        let init = plugin.init.ok_or("its table has no init")?;
        let origin = PluginOrigin { name, version, path: file.path.clone(), sha256: file.sha256.clone() };
        // SAFETY: called once, since a library is opened once, with a table that lives for ever.
        let done = Callee::new(describe(&origin), true).call("init", || unsafe { init(&*HOST) });
        done.map_err(|failure| format!("init failed: {failure}"))?;
        Ok(Library { origin, table: plugin, blocks })
    }

    /// What messages call it.
    pub(super) fn description(&self) -> String {
        describe(&self.origin)
    }

    /// Where it comes from.
    pub fn origin(&self) -> &PluginOrigin {
        &self.origin
    }

    pub(crate) fn table(&self) -> &'static Plugin {
        self.table
    }

    /// Its blocks.
    pub fn blocks(&self) -> &[LibraryBlock] {
        &self.blocks
    }

    /// The block called `block_type`.
    pub fn block(&self, block_type: &str) -> Option<&LibraryBlock> {
        self.blocks.iter().find(|block| block.block_type == block_type)
    }
}

fn describe(origin: &PluginOrigin) -> String {
    format!("plugin {} {} ({})", origin.name, origin.version, origin.path.display())
}

/// Opens the file and calls its one symbol.
fn entry(path: &Path) -> Result<*const Plugin, String> {
    // Everything is resolved now, so that a missing symbol shows here and not in the middle of a run; symbols stay local,
    // so that plugins do not see each other.
    #[cfg(unix)]
    let library = {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        // SAFETY: initialisers of the library run here. A plugin is trusted, and was probed.
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
    };
    #[cfg(not(unix))]
    // SAFETY: as above.
    let library = unsafe { libloading::Library::new(path) };
    // Never unloaded: threads and thread-locals of a plugin may outlive every use of it.
    let library = std::mem::ManuallyDrop::new(library.map_err(|error| cannot_open(path, &error))?);
    // SAFETY: the symbol's type is the contract's.
    let entry = unsafe { library.get::<abi::Entry>(abi::ENTRY.as_bytes()) };
    let entry = entry.map_err(|_| format!("not a plugin: it has no symbol {}", abi::ENTRY))?;
    // SAFETY: called as the contract says.
    Ok(unsafe { entry() })
}

/// The loader's own reason, without the path, which stands beside it anyway.
fn cannot_open(path: &Path, error: &libloading::Error) -> String {
    let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let reason = reason.replace(&path.display().to_string(), "");
    format!("cannot be opened: {}", reason.trim_start_matches([':', ' ']))
}

/// Checks the head of a plugin's table.
///
/// # Safety
/// `table` is null or points to 16 bytes, and to as many as its `struct_size` says if they begin as a plugin's.
pub(crate) unsafe fn check_table(table: *const Plugin) -> Result<&'static Plugin, String> {
    if table.is_null() {
        return Err(format!("{} returned null: the plugin cannot work here", abi::ENTRY));
    }
    // SAFETY: by the contract of this function; field by field, since the struct may be shorter than ours.
    let [magic, struct_size, major, minor] = unsafe { *(table as *const [u32; 4]) };
    if magic != abi::MAGIC {
        return Err(format!("its table begins with {magic:#010x}, expected {:#010x}", abi::MAGIC));
    }
    if major != abi::MAJOR {
        let newer = if major > abi::MAJOR { "a newer MBLM" } else { "a plugin built for this MBLM" };
        return Err(format!(
            "it speaks version {major}.{minor} of the plugin interface, this program {}.{}; expected the same first \
             number: use {newer}",
            abi::MAJOR,
            abi::MINOR
        ));
    }
    if minor > abi::MINOR {
        return Err(format!(
            "it needs version {major}.{minor} of the plugin interface or a later one, this program has {}.{}: use a newer \
             MBLM",
            abi::MAJOR,
            abi::MINOR
        ));
    }
    if struct_size < abi::size::<Plugin>() {
        let expected = abi::size::<Plugin>();
        return Err(format!("its table has {struct_size} bytes, expected at least {expected}"));
    }
    // SAFETY: static, and as long as ours at least.
    Ok(unsafe { &*table })
}

fn read_blocks(plugin: &Plugin) -> Result<Vec<LibraryBlock>, String> {
    if plugin.num_blocks == 0 || plugin.blocks.is_null() {
        return Err("it has no blocks; a plugin in Rust registers them with register_block!".into());
    }
    if plugin.num_blocks > 1024 {
        return Err(format!("it says that it has {} blocks", plugin.num_blocks));
    }
    // SAFETY: by the contract, that many pointers, which live for ever.
    let tables = unsafe { std::slice::from_raw_parts(plugin.blocks, plugin.num_blocks as usize) };
    let mut blocks = Vec::new();
    for (index, &table) in tables.iter().enumerate() {
        let block = read_block(table).map_err(|reason| format!("block {index}: {reason}"))?;
        if blocks.iter().any(|other: &LibraryBlock| other.block_type == block.block_type) {
            return Err(format!("it has two blocks named `{}`", block.block_type));
        }
        blocks.push(block);
    }
    Ok(blocks)
}

fn read_block(table: *const Block) -> Result<LibraryBlock, String> {
    if table.is_null() {
        return Err("its table is null".into());
    }
    // SAFETY: a block's table begins with its size.
    let size = unsafe { *(table as *const u32) };
    if size < abi::size::<Block>() {
        return Err(format!("its table has {size} bytes, expected at least {}", abi::size::<Block>()));
    }
    // SAFETY: static, and as long as ours at least.
    let table: &'static Block = unsafe { &*table };
    let block_type = text(table.block_type, "block_type")?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if block_type.is_empty() || !block_type.chars().all(is_name) {
        return Err(format!("block_type {block_type:?}: expected letters, digits, `_` and `-`"));
    }
    // Once per library, which lives for ever.
    let block_type: &'static str = Box::leak(block_type.into_boxed_str());
    let schema = text(table.schema, "schema")?;
    let schema: serde_json::Value = serde_json::from_str(&schema)
        .map_err(|error| format!("{block_type}: its schema is not valid JSON: {error}"))?;
    if !schema.is_object() {
        return Err(format!("{block_type}: its schema is {schema}, expected an object"));
    }
    check_functions(table).map_err(|what| format!("{block_type}: its table has no {what}"))?;
    let (version, about) = (text(table.version, "version")?, text(table.about, "about")?);
    Ok(LibraryBlock { block_type, version, about, schema, table })
}

/// The first function that is missing.
fn check_functions(block: &Block) -> Result<(), &'static str> {
    let needed = [
        (0, block.check.is_some(), "check"),
        (0, block.create.is_some(), "create"),
        (0, block.destroy.is_some(), "destroy"),
        (0, block.param.is_some(), "param"),
        (0, block.forward.is_some(), "forward"),
        (abi::BACKWARD, block.backward.is_some(), "backward, though its flags say MBLM_BACKWARD"),
        (abi::BACKWARD, block.tape_free.is_some(), "tape_free, though its flags say MBLM_BACKWARD"),
        (abi::STEP, block.state_create.is_some(), "state_create, though its flags say MBLM_STEP"),
        (abi::STEP, block.state_reset.is_some(), "state_reset, though its flags say MBLM_STEP"),
        (abi::STEP, block.state_free.is_some(), "state_free, though its flags say MBLM_STEP"),
        (abi::STEP, block.step.is_some(), "step, though its flags say MBLM_STEP"),
    ];
    match needed.iter().find(|(flag, present, _)| (block.flags & flag) == *flag && !present) {
        Some((_, _, what)) => Err(what),
        None => Ok(()),
    }
}

fn text(text: Text, what: &str) -> Result<String, String> {
    if text.len > 1 << 24 || (text.data.is_null() && text.len > 0) {
        return Err(format!("{what} is not a text: {} bytes at {:?}", text.len, text.data));
    }
    // SAFETY: by the contract, a static text.
    match std::str::from_utf8(unsafe { text.bytes() }) {
        Ok(text) => Ok(text.into()),
        Err(error) => Err(format!("{what} is not UTF-8: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Plugin {
        Plugin {
            magic: abi::MAGIC,
            struct_size: abi::size::<Plugin>(),
            major: abi::MAJOR,
            minor: abi::MINOR,
            name: Text::of("t"),
            version: Text::of("1"),
            num_blocks: 0,
            blocks: std::ptr::null(),
            init: None,
        }
    }

    fn verdict(change: impl FnOnce(&mut Plugin)) -> String {
        let table = Box::leak(Box::new(table()));
        change(table);
        // SAFETY: a whole table.
        unsafe { check_table(table) }.map_or_else(|error| error, |_| "accepted".into())
    }

    #[test]
    fn versions_and_sizes_are_compared_as_the_contract_says() {
        assert_eq!(verdict(|_| {}), "accepted");
        assert_eq!(verdict(|t| t.struct_size += 64), "accepted", "a later minor's table is longer");
        assert!(verdict(|t| t.struct_size -= 8).contains("expected at least"));
        assert!(verdict(|t| t.major += 1).contains("use a newer MBLM"));
        assert!(verdict(|t| t.major -= 1).contains("a plugin built for this MBLM"));
        assert!(verdict(|t| t.minor += 1).contains("needs version 1.2"));
        assert!(verdict(|t| t.magic = 0x7f45_4c46).contains("begins with 0x7f454c46"));
        // SAFETY: null is allowed.
        assert!(unsafe { check_table(std::ptr::null()) }.err().unwrap().contains("returned null"));
    }

    #[test]
    fn a_plugin_without_blocks_is_refused() {
        assert!(read_blocks(&table()).err().unwrap().contains("has no blocks"));
    }
}
