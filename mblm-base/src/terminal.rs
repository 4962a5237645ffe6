//! Writing to standard error and standard output.
//!
//! A line on standard error is a courtesy: if it cannot be written (the disk that holds the log is full, the terminal was
//! closed, the reader of the pipe is gone), nothing fails. What a command writes to standard output is what it was called
//! for, so there an error is returned.
//!
//! On a terminal both show control characters instead of sending them, since text from a model, a file name or a plugin
//! could move the cursor, rename the window, or worse. Pipes and files get the bytes as they are.

use std::borrow::Cow;
use std::fmt::{Display, Write as _};
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the lines of this process begin, if it is one of several.
static NAME: OnceLock<String> = OnceLock::new();

static IS_HUSHED: AtomicBool = AtomicBool::new(false);

/// Has every line begin with `name`. Only the first call counts.
pub fn speak_as(name: String) {
    let _ = NAME.set(name); // it has one
}

/// Whether lines are dropped from now on, since another process writes the same ones.
pub fn hush(is_hushed: bool) {
    IS_HUSHED.store(is_hushed, Ordering::Relaxed);
}

/// Writes a line to standard error, and ignores that it cannot be written.
pub fn line(text: impl Display) {
    if IS_HUSHED.load(Ordering::Relaxed) {
        return;
    }
    let text = format_args!("{}{text}", NAME.get().map_or("", |name| name));
    write_line(io::stderr().lock(), io::stderr().is_terminal(), text);
}

fn write_line(mut to: impl Write, is_terminal: bool, text: impl Display) {
    let text = format!("{text}\n");
    let text = if is_terminal { visible(text.as_bytes()) } else { text.into() };
    let _ = to.write_all(text.as_bytes()); // nobody is there to be told
}

/// `text` as a terminal may show it: control characters but newline and tab, and bytes that are not UTF-8, become `\x1b`;
/// characters that change the direction of the text around them, `\u{202e}`.
pub fn visible<T: AsRef<[u8]> + ?Sized>(text: &T) -> Cow<'_, str> {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_control = |c: char| turns(c) || c.is_control() && !matches!(c, '\n' | '\t');
    match str::from_utf8(text.as_ref()) {
        Ok(text) if !text.contains(is_control) => return text.into(),
        _ => {}
    }
    let mut shown = String::new();
    let escape = |shown: &mut String, byte: u32| {
        // Writing to a string cannot fail.
        let _ = if byte < 0x100 { write!(shown, "\\x{byte:02x}") } else { write!(shown, "\\u{{{byte:x}}}") };
    };
    for chunk in text.as_ref().utf8_chunks() {
        for c in chunk.valid().chars() {
            match is_control(c) {
                true => escape(&mut shown, c.into()),
                false => shown.push(c),
            }
        }
        chunk.invalid().iter().for_each(|byte| escape(&mut shown, u32::from(*byte)));
    }
    shown.into()
}

/// Standard output of a command.
///
/// # Errors
/// They begin with `standard output: ` and keep their [kind](io::ErrorKind). Flush before the command ends, or the last
/// error is lost.
pub struct Output {
    to: io::Stdout,
    is_raw: bool,
}

impl Output {
    /// Standard output, which shows control characters if it is a terminal.
    pub fn new() -> Self {
        Output { to: io::stdout(), is_raw: !io::stdout().is_terminal() }
    }

    /// Standard output, which gets every byte as it is.
    pub fn raw() -> Self {
        Output { to: io::stdout(), is_raw: true }
    }
}

impl Default for Output {
    fn default() -> Self {
        Output::new()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self.is_raw {
            true => self.to.write(bytes),
            false => self.to.write_all(visible(bytes).as_bytes()).map(|()| bytes.len()),
        };
        written.map_err(of_output)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush().map_err(of_output)
    }
}

fn of_output(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("standard output: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown() {
        let cases: [(&[u8], &str); 8] = [
            ("evil\u{202e}txt".as_bytes(), r"evil\u{202e}txt"),
            (b"plain\ttext\n", "plain\ttext\n"),
            ("é€😀".as_bytes(), "é€😀"),
            (b"\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
            (b"a\rb\x00\x7f", r"a\x0db\x00\x7f"),
            ("\u{9b}31m".as_bytes(), r"\x9b31m"),
            (b"a\xff\xc3", r"a\xff\xc3"),
            (b"", ""),
        ];
        for (bytes, want) in cases {
            assert_eq!(visible(bytes), want, "{bytes:x?}");
        }
    }

    #[test]
    fn a_line_that_cannot_be_written_is_dropped() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        write_line(Full, true, "lost");
        let written = |is_terminal| {
            let mut line = Vec::new();
            write_line(&mut line, is_terminal, "a\x1b[0m");
            line
        };
        assert_eq!(written(true), b"a\\x1b[0m\n");
        assert_eq!(written(false), b"a\x1b[0m\n");
    }
}
