//! How the files of run folders, checkpoints and studies are read and written.
//!
//! Such a folder may come from somebody else. Nothing in it can make a reader hang or fill the memory: only regular files
//! are read, up to a size that the reader states. Nothing in it can redirect a writer: a file is replaced by a fresh one
//! whose name did not exist before, and a log is never opened through a symbolic link.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Take, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// The most bytes of a small file: a configuration, a state, a manifest, a result.
pub const SMALL: u64 = 16 << 20;
/// The most bytes of a log that grows with the run.
pub const LOG: u64 = 1 << 30;
/// The most bytes of one line of a log. A longer line is no record.
const LINE: u64 = 1 << 20;
/// How the names of fresh files begin, until they have their own.
pub const FRESH: &str = ".writing-";
const FILE: &str = "a regular file";
const FOLDER: &str = "a folder";

/// Opens a regular file of at most `most` bytes for reading. If it grows meanwhile, the rest is not read.
///
/// # Errors
/// The file is missing, is too large, or is a folder, a named pipe, a socket or a device. Opening never waits.
pub fn open(path: &Path, most: u64) -> io::Result<Take<File>> {
    check(&fs::metadata(path)?)?; // first, since opening a device can have effects
    let file = options(0).read(true).open(path)?;
    let found = file.metadata()?;
    check(&found)?;
    match found.len() {
        len if len > most => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{len} bytes; expected a file of at most {most} bytes"),
        )),
        _ => Ok(file.take(most)),
    }
}

/// Reads a regular file of at most `most` bytes.
///
/// # Errors
/// Those of [`open`].
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut file = open(path, most)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(file.get_ref().metadata()?.len().min(most) as usize)?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a regular file of at most `most` bytes as UTF-8.
///
/// # Errors
/// Those of [`open`]; the file is not UTF-8.
pub fn read_text(path: &Path, most: u64) -> io::Result<String> {
    String::from_utf8(read(path, most)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

/// The size of a regular file in bytes.
///
/// # Errors
/// The file is missing, or is not a regular file.
pub fn size(path: &Path) -> io::Result<u64> {
    let found = fs::metadata(path)?;
    check(&found).map(|()| found.len())
}

/// The lines of a log that [`open`] opened, without their ends. A last line without an end was cut short by a crash; it is
/// left out, and so is a line that is too long to be a record.
pub fn lines(log: impl Read) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    let mut log = BufReader::new(log);
    std::iter::from_fn(move || next_line(&mut log).transpose())
}

fn next_line(log: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut line = Vec::new();
        let len = log.take(LINE).read_until(b'\n', &mut line)?;
        match line.pop() {
            Some(b'\n') => return Ok(Some(line)),
            Some(_) if len as u64 == LINE => drop(log.skip_until(b'\n')?),
            _ => return Ok(None),
        }
    }
}

/// Replaces the file `path`, or makes it: a reader, also one after a power cut, sees the old file or the new one. Returns
/// the new file, open for more bytes at its end.
///
/// A link in its place is replaced, and what it points to stays.
pub fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> io::Result<File> {
    let folder = folder_of(path);
    let file = fresh(folder, write)?.persist(path).map_err(|error| error.error)?;
    sync_folder(folder)?;
    Ok(file)
}

/// [`replace`] with a text.
pub fn replace_text(path: &Path, text: &str) -> io::Result<()> {
    replace(path, |file| file.write_all(text.as_bytes())).map(drop)
}

/// Makes the file `path`, complete or not at all.
///
/// # Errors
/// [`AlreadyExists`](io::ErrorKind::AlreadyExists) if something has this name.
pub fn create(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> io::Result<()> {
    let folder = folder_of(path);
    if fs::symlink_metadata(path).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into()); // before anything large is written
    }
    fresh(folder, write)?.persist_noclobber(path).map_err(|error| error.error)?;
    sync_folder(folder)
}

/// A new file in `folder` under a name of its own, written and synced. It is deleted if it is dropped.
fn fresh(folder: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(FRESH);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less what the user's umask takes away
    let mut file = builder.tempfile_in(folder)?;
    let mut buffer = BufWriter::new(file.as_file_mut());
    write(&mut buffer)?;
    buffer.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    Ok(file)
}

/// Opens a log to add to its end, and to read it; makes it if it is missing.
///
/// # Errors
/// It is not a regular file. A symbolic link is none: what it points to is not written to.
pub fn append(path: &Path) -> io::Result<File> {
    #[cfg(unix)]
    const NO_LINK: i32 = libc::O_NOFOLLOW;
    #[cfg(not(unix))]
    const NO_LINK: i32 = 0;
    let opened = options(NO_LINK).create(true).append(true).read(true).open(path);
    let file = opened.map_err(|error| {
        let found = fs::symlink_metadata(path);
        found.ok().and_then(|found| check(&found).err()).unwrap_or(error)
    })?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// Deletes the fresh files that a killed process left in `folder`. Only whoever alone writes there may call it.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(FRESH.as_bytes()) && !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes the folder `path` if it is missing.
///
/// # Errors
/// Something else has this name: a file, or a symbolic link, since whoever writes and deletes in the folder would do so
/// where that points.
pub fn own_folder(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            match kind(fs::symlink_metadata(path)?.file_type()) {
                FOLDER => Ok(()),
                other => {
                    Err(io::Error::new(io::ErrorKind::NotADirectory, format!("this is {other}; expected a folder")))
                }
            }
        }
        made => made,
    }
}

/// Whether `path` still is the name of `file`.
pub fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |found: Metadata| (found.dev(), found.ino());
        let (file, found) = (file.metadata().map(id), fs::symlink_metadata(path).map(id));
        file.is_ok_and(|file| found.is_ok_and(|found| file == found))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// Makes what was created or renamed in `folder` survive a power cut.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// The folder that `path` is in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Options with which opening never waits, for the other end of a pipe for example.
fn options(flags: i32) -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags | libc::O_NONBLOCK);
    let _ = flags;
    options
}

/// An error that says what it is if it is not a regular file.
fn check(found: &Metadata) -> io::Result<()> {
    match kind(found.file_type()) {
        FILE => Ok(()),
        other => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("this is {other}; expected a regular file"))),
    }
}

/// What something is, in words.
fn kind(found: fs::FileType) -> &'static str {
    match found {
        found if found.is_file() => FILE,
        found if found.is_dir() => FOLDER,
        found if found.is_symlink() => "a symbolic link",
        _ => special(found),
    }
}

#[cfg(unix)]
fn special(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        kind if kind.is_fifo() => "a named pipe",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

#[cfg(not(unix))]
fn special(_: fs::FileType) -> &'static str {
    "a special file"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_of_a_sane_length_are_records() {
        let long = "x".repeat(LINE as usize + 5);
        let text = format!("one\n\n{long}\ntwo\r\n{}\nthr", &long[..LINE as usize - 1]);
        let found: Vec<usize> = lines(text.as_bytes()).map(|line| line.unwrap().len()).collect();
        assert_eq!(found, [3, 0, 4, LINE as usize - 1]);
    }

    #[test]
    fn a_file_is_replaced_or_created_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let write = |path: &Path, text: &str| replace(path, |file| file.write_all(text.as_bytes()));
        write(&path, "one").unwrap();
        let mut file = write(&path, "two").unwrap();
        file.write_all(b" and more").unwrap();
        replace(&path, |file| file.write_all(b"three").and(Err(io::ErrorKind::StorageFull.into()))).unwrap_err();
        assert_eq!(read_text(&path, SMALL).unwrap(), "two and more");
        let other = folder.path().join("b");
        create(&other, |_| Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        create(&other, |file| file.write_all(b"new")).unwrap();
        let error = create(&other, |_| unreachable!("nothing is written")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        fs::write(folder.path().join(".writing-left"), "by a killed process").unwrap();
        fs::create_dir(folder.path().join(".writing-batch-1")).unwrap();
        remove_leftovers(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_file_that_is_too_large_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = read(&path, 1000).unwrap_err().to_string();
        assert_eq!(error, "1099511627776 bytes; expected a file of at most 1000 bytes");
        assert_eq!(size(&path).unwrap(), 1 << 40);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_not_a_regular_file_is_named_and_never_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert!(std::process::Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        std::os::unix::fs::symlink(path("fifo"), path("link")).unwrap();
        let cases = [
            (path("fifo"), "a named pipe"),
            (path("link"), "a named pipe"),
            (path("socket"), "a socket"),
            (folder.path().into(), "a folder"),
            ("/dev/zero".into(), "a device"),
        ];
        for (path, what) in cases {
            let want = format!("this is {what}; expected a regular file");
            assert_eq!(read(&path, SMALL).unwrap_err().to_string(), want);
            assert_eq!(size(&path).unwrap_err().to_string(), want);
            let appended = append(&path).unwrap_err().to_string();
            assert!(appended.ends_with("; expected a regular file") || path.is_dir(), "{appended}");
        }
        assert_eq!(append(&path("link")).unwrap_err().to_string(), "this is a symbolic link; expected a regular file");
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_through_a_link() {
        use std::os::unix::fs::symlink;
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let victim = elsewhere.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let (link, dangling) = (folder.path().join("link"), folder.path().join("dangling"));
        symlink(&victim, &link).unwrap();
        symlink(elsewhere.path().join("new"), &dangling).unwrap();
        append(&link).unwrap_err();
        append(&dangling).unwrap_err();
        create(&dangling, |file| file.write_all(b"new")).unwrap_err();
        replace(&link, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(fs::read_to_string(&link).unwrap(), "new");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn files_have_the_permissions_that_the_umask_gives() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        fs::write(folder.path().join("plain"), "").unwrap();
        replace(&folder.path().join("replaced"), |_| Ok(())).unwrap();
        create(&folder.path().join("created"), |_| Ok(())).unwrap();
        append(&folder.path().join("appended")).unwrap();
        for name in ["replaced", "created", "appended"] {
            assert_eq!(mode(name), mode("plain"), "{name}");
        }
    }
}
