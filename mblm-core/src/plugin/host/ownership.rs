//! Checks whether somebody else can change a file. A library that others can write would run their code with the user's
//! rights.

use std::path::Path;

/// Accepts a file that belongs to the user or to root, and that nobody else can write or replace.
///
/// The same applies to the file's folder, because whoever can write to it can replace the file. The folders above do
/// not matter: whatever is moved there must still belong to the user or to root.
///
/// # Errors
/// Somebody else can change it. The error says who, and how to fix that.
#[cfg(unix)]
pub fn check(file: &Path) -> Result<(), String> {
    check_one(file)?;
    file.parent().map_or(Ok(()), check_one)
}

/// Accepts everything: access lists of this system are not looked at.
#[cfg(not(unix))]
pub fn check(_: &Path) -> Result<(), String> {
    Ok(())
}

/// Checks a file or a folder by itself.
#[cfg(unix)]
pub(super) fn check_one(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let about = path.metadata().map_err(|error| format!("{}: {error}", path.display()))?;
    // SAFETY: these calls take nothing and cannot fail.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    match fault(about.mode(), (about.uid(), about.gid()), (user, group)) {
        None => Ok(()),
        Some(fault) => Err(format!("{} {}", path.display(), fault.replace("PATH", &path.display().to_string()))),
    }
}

#[cfg(not(unix))]
pub(super) fn check_one(_: &Path) -> Result<(), String> {
    Ok(())
}

/// What is wrong with a file of this mode and owner, for this user and group; `PATH` stands for the file.
#[cfg(unix)]
fn fault(mode: u32, (owner, owners_group): (u32, u32), (user, group): (u32, u32)) -> Option<String> {
    const STICKY: u32 = 0o1000;
    let shown = mode & 0o7777;
    if owner != user && owner != 0 {
        return Some(format!(
            "belongs to user {owner}, who can change it (you are user {user}); copy the library to your own folder"
        ));
    }
    if mode & 0o002 != 0 && mode & STICKY != 0 {
        return Some(format!(
            "is a folder that everybody can write to (mode {shown:o}); move the library to your own folder"
        ));
    }
    if mode & 0o002 != 0 || (mode & 0o020 != 0 && owners_group != group) {
        let who = if mode & 0o002 != 0 { "everybody".into() } else { format!("group {owners_group}") };
        return Some(format!("can be changed by {who} (mode {shown:o}); to fix this: chmod go-w PATH"));
    }
    None
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn others_may_read_but_not_write() {
        let (me, root, other) = (1000, 0, 1001);
        for (mode, owner) in [(0o100644, me), (0o100755, root), (0o100600, me), (0o40755, me)] {
            assert_eq!(fault(mode, (owner, owner), (me, me)), None, "{mode:o}");
        }
        assert_eq!(fault(0o100664, (me, me), (me, me)), None, "a group of one's own, as umask 002 gives it");
        let cases = [
            (0o100644, (other, me), "belongs to user 1001"),
            (0o100664, (me, other), "can be changed by group 1001 (mode 664)"),
            (0o100646, (me, me), "can be changed by everybody (mode 646)"),
            (0o40777, (root, root), "chmod go-w PATH"),
            (0o41777, (root, root), "is a folder that everybody can write to (mode 1777)"),
        ];
        for (mode, owner, want) in cases {
            let found = fault(mode, owner, (me, me)).unwrap_or_default();
            assert!(found.contains(want), "{mode:o}: {found}");
        }
        assert!(fault(0o100644, (other, other), (root, root)).is_some(), "root runs nobody's code either");
    }

    #[test]
    fn the_folder_counts_too() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.so");
        std::fs::write(&file, "").unwrap();
        let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        check(&file).unwrap();
        set(folder.path(), 0o777);
        let error = check(&file).unwrap_err();
        assert!(error.contains(&format!("chmod go-w {}", folder.path().display())), "{error}");
        set(folder.path(), 0o700);
        set(&file, 0o666);
        assert!(check(&file).unwrap_err().contains("a.so can be changed by everybody (mode 666)"));
    }
}
