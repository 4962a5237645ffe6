//! Damage for tests: the bytes of a file as a fuzzer changes them, but the same in every run of the tests.

use crate::random::mix;

/// What parsers stumble over.
const TOKENS: [&[u8]; 24] = [
    b"1e308",
    b"-1e308",
    b"1e-308",
    b"1e999",
    b"NaN",
    b"inf",
    b"null",
    b"0",
    b"-1",
    b"18446744073709551615",
    b"-9223372036854775808",
    b"99999999999999999999999",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\"",
    b"{",
    b"[[[[[[[[",
    b",",
    b"\n",
    b"\r",
    b"=1+1",
    b"</script>",
    b"../../..",
];

/// A stream of damage.
pub struct Scrambler(u64);

impl Scrambler {
    /// The stream that `seed` decides.
    pub fn new(seed: u64) -> Self {
        Scrambler(seed)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (mix(self.0) % end as u64) as usize
    }

    /// `bytes` with one to three changes.
    pub fn damaged(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + self.below(3) {
            self.damage(&mut bytes);
        }
        bytes
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let len = self.below(40).min(bytes.len() - at);
        let token = TOKENS[self.below(TOKENS.len())];
        match self.below(6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..at + len)),
            2 => {
                let part = bytes[at..at + len].to_vec();
                drop(bytes.splice(at..at, part));
            }
            3 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            // Instead of a number, if one follows.
            4 => {
                let is_number = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'e');
                let start = (at..bytes.len()).find(|&i| is_number(&bytes[i])).unwrap_or(at);
                let len = bytes[start..].iter().take_while(|byte| is_number(byte)).count();
                drop(bytes.splice(start..start + len, token.iter().copied()));
            }
            _ => drop(bytes.splice(at..at, token.iter().copied())),
        }
    }
}
