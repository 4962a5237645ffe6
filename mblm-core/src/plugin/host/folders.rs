//! A user's own folders. A variable that holds a relative path is ignored, as the XDG specification asks for: it would
//! mean another folder in every current directory.

use std::path::PathBuf;

/// The folder of the plugins for all of a user's projects.
pub fn plugins() -> Option<PathBuf> {
    folder("XDG_DATA_HOME", ".local/share").map(|folder| folder.join("plugins"))
}

/// The folder of the program's settings.
pub fn settings() -> Option<PathBuf> {
    folder("XDG_CONFIG_HOME", ".config")
}

/// The program's folder below the one that `variable` names, or else below `in_home`.
fn folder(variable: &str, in_home: &str) -> Option<PathBuf> {
    let absolute = |variable: &str| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let parent = match std::env::consts::OS {
        "windows" => absolute("APPDATA"),
        "macos" => absolute("HOME").map(|home| home.join("Library/Application Support")),
        _ => absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(in_home))),
    };
    parent.map(|parent| parent.join("mblm"))
}
