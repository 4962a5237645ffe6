//! Writes generated tokens immediately: as UTF-8 text, raw bytes, or ids.

use std::io::{self, Write};

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text. Invalid UTF-8 and tokens that are not bytes become U+FFFD.
    Utf8,
    /// Raw bytes. Tokens that are not bytes are left out.
    Raw,
    /// Token ids in decimal, one per line.
    Ids,
}

/// A writer of tokens.
pub struct TokenStream<W: Write> {
    out: W,
    format: Format,
    /// The beginning of a character that is not complete.
    partial: Vec<u8>,
}

impl<W: Write> TokenStream<W> {
    /// Writes to `out` in this format.
    pub fn new(out: W, format: Format) -> Self {
        TokenStream { out, format, partial: vec![] }
    }

    /// Writes a token and flushes, so that it is visible immediately.
    pub fn write(&mut self, token: u32) -> io::Result<()> {
        match (self.format, u8::try_from(token)) {
            (Format::Ids, _) => writeln!(self.out, "{token}")?,
            (Format::Raw, Ok(byte)) => self.out.write_all(&[byte])?,
            (Format::Raw, Err(_)) => {}
            (Format::Utf8, Ok(byte)) => {
                self.partial.push(byte);
                self.write_text()?;
            }
            (Format::Utf8, Err(_)) => {
                self.finish_text()?;
                self.out.write_all("\u{FFFD}".as_bytes())?;
            }
        }
        self.out.flush()
    }

    /// Writes the rest of an incomplete character, and flushes.
    pub fn finish(mut self) -> io::Result<W> {
        self.finish_text()?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Writes all complete characters, replaces what can no longer become one, keeps what still can.
    fn write_text(&mut self) -> io::Result<()> {
        loop {
            match std::str::from_utf8(&self.partial) {
                Ok(text) => {
                    self.out.write_all(text.as_bytes())?;
                    self.partial.clear();
                    return Ok(());
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    self.out.write_all(&self.partial[..valid])?;
                    let Some(invalid) = error.error_len() else {
                        self.partial.drain(..valid);
                        return Ok(());
                    };
                    self.out.write_all("\u{FFFD}".as_bytes())?;
                    self.partial.drain(..valid + invalid);
                }
            }
        }
    }

    fn finish_text(&mut self) -> io::Result<()> {
        if !self.partial.is_empty() {
            self.partial.clear();
            self.out.write_all("\u{FFFD}".as_bytes())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(format: Format, tokens: &[u32]) -> Vec<u8> {
        let mut stream = TokenStream::new(vec![], format);
        tokens.iter().for_each(|t| stream.write(*t).unwrap());
        stream.finish().unwrap()
    }

    #[test]
    fn text_streams_like_a_lossy_decoding_of_the_whole() {
        let cases: [&[u8]; 6] = [
            "plain, é, €, 😀".as_bytes(),
            b"\xff\xfea",
            b"\xe2\x82",
            b"\xe2\x28\xa1",
            b"a\xf0\x9f\x98",
            b"\xc3\xc3\xa9",
        ];
        for bytes in cases {
            let tokens: Vec<u32> = bytes.iter().map(|b| *b as u32).collect();
            assert_eq!(written(Format::Utf8, &tokens), String::from_utf8_lossy(bytes).as_bytes(), "{bytes:x?}");
        }
    }

    #[test]
    fn a_character_appears_when_its_last_byte_does() {
        let mut stream = TokenStream::new(vec![], Format::Utf8);
        let seen: Vec<usize> =
            "é€".bytes().map(|b| stream.write(b as u32).map(|()| stream.out.len()).unwrap()).collect();
        assert_eq!(seen, [0, 2, 2, 2, 5]);
    }

    #[test]
    fn tokens_that_are_no_bytes() {
        assert_eq!(written(Format::Utf8, &[0xc3, 300, 65]), "\u{FFFD}\u{FFFD}A".as_bytes());
        assert_eq!(written(Format::Raw, &[0xc3, 300, 65]), [0xc3, 65]);
        assert_eq!(written(Format::Ids, &[0xc3, 300, 65]), b"195\n300\n65\n");
    }
}
