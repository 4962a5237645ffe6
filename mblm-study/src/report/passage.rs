//! The passage that variants were scored on, byte by byte, as far as they have it in common.

use super::variant::Variant;

/// The most bits that are shown of a byte.
const MOST_BITS: f32 = 99.0;

/// Variants that were scored on the same bytes.
pub(super) struct Common<'a> {
    pub(super) bytes: &'a [u8],
    /// Names with the bits of each byte in hundredths, best variant first.
    pub(super) variants: Vec<(&'a str, Vec<u16>)>,
    /// Names of variants that were scored on other bytes.
    pub(super) others: Vec<&'a str>,
}

impl<'a> Common<'a> {
    /// None if fewer than two variants have something to compare.
    pub(super) fn of(variants: &'a [Variant]) -> Option<Self> {
        let scored: Vec<_> = variants.iter().filter_map(|v| Some((&v.name[..], v.passage()?))).collect();
        // A damaged file may have more of the one than of the other.
        let len = |(_, passage): &(_, &crate::passage::Passage)| passage.bytes.len().min(passage.bits.len());
        let len = scored.iter().map(len).min()?;
        let bytes = &scored.first()?.1.bytes[..len];
        let (same, other): (Vec<_>, Vec<_>) = scored.into_iter().partition(|(_, p)| p.bytes[..len] == *bytes);
        let hundredths = |bits: &f32| (bits.clamp(0.0, MOST_BITS) * 100.0).round() as u16;
        let variants: Vec<_> =
            same.into_iter().map(|(name, p)| (name, p.bits[..len].iter().map(hundredths).collect())).collect();
        let others = other.into_iter().map(|(name, _)| name).collect();
        (variants.len() > 1 && len > 0).then_some(Common { bytes, variants, others })
    }

    /// Mean bits per byte of a variant.
    pub(super) fn mean(&self, variant: usize) -> f64 {
        let sum: u32 = self.variants[variant].1.iter().map(|bits| u32::from(*bits)).sum();
        f64::from(sum) / 100.0 / self.bytes.len() as f64
    }
}

/// How a byte is shown: its text, its name, and whether the text is the character itself.
#[derive(Debug, PartialEq)]
pub(super) struct Sign {
    pub(super) text: String,
    pub(super) name: String,
    pub(super) is_text: bool,
}

/// A sign for each byte. The first byte of a character shows it; bytes that are not UTF-8 are shown in hexadecimal.
pub(super) fn signs(bytes: &[u8]) -> Vec<Sign> {
    let mut signs = Vec::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        chunk.valid().chars().for_each(|c| of_char(c, &mut signs));
        signs.extend(chunk.invalid().iter().map(|byte| Sign {
            text: format!("{byte:02X}"),
            name: format!("0x{byte:02x}, not UTF-8"),
            is_text: false,
        }));
    }
    signs
}

fn of_char(c: char, signs: &mut Vec<Sign>) {
    let (text, name, is_text) = match c {
        ' ' => (" ".into(), "space".into(), true),
        '\n' => ("↵".into(), "line end".into(), false),
        '\t' => ("⇥".into(), "tab".into(), false),
        // Pictures of control characters.
        '\0'..' ' => (char::from_u32(0x2400 + c as u32).unwrap_or('␦').into(), code(c), false),
        '\x7f' => ("␡".into(), code(c), false),
        c if is_invisible(c) => (code(c), code(c), false),
        c => (c.to_string(), c.to_string(), true),
    };
    let len = c.len_utf8();
    let name = |i: usize| if len > 1 { format!("{name}, byte {} of {len}", i + 1) } else { name.clone() };
    signs.push(Sign { text, name: name(0), is_text });
    signs.extend((1..len).map(|i| Sign { text: "‧".into(), name: name(i), is_text: false }));
}

fn code(c: char) -> String {
    format!("U+{:04X}", c as u32)
}

/// Characters without a shape of their own: controls, spaces of no width, and what changes the direction of text.
fn is_invisible(c: char) -> bool {
    let formats = ['\u{ad}', '\u{61c}', '\u{180e}', '\u{feff}'];
    let ranges = ['\u{200b}'..='\u{200f}', '\u{2028}'..='\u{202e}', '\u{2060}'..='\u{206f}', '\u{e0000}'..='\u{e007f}'];
    c.is_control() || formats.contains(&c) || ranges.iter().any(|range| range.contains(&c))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::run::Status::Finished;
    use super::super::run::{Measured, RunResult};
    use super::super::variant::tests::{run, variant};
    use super::*;
    use crate::passage::Passage;

    /// A variant that spends `bits` on each byte of `bytes`.
    pub(crate) fn scored(name: &str, bytes: &[u8], bits: f32) -> Variant {
        let passage = Some(Passage { bytes: bytes.into(), bits: vec![bits; bytes.len()] });
        let measured = Measured { passage, place_bits: vec![f64::from(bits); 4], ..Measured::default() };
        let mut run = run(1, Finished, &[f64::from(bits)]);
        run.result = Some(RunResult { measured, ..RunResult::default() });
        variant(name, vec![run])
    }

    #[test]
    fn only_the_same_bytes_are_compared() {
        let mut variants = [
            scored("a", b"one two", 1.0),
            scored("b", b"one", 2.555),
            variant("unfinished", vec![]),
            scored("c", b"two one", f32::INFINITY),
        ];
        let common = Common::of(&variants).unwrap();
        assert_eq!((common.bytes, &common.others[..]), (&b"one"[..], &["c"][..]));
        assert_eq!(common.variants, [("a", vec![100; 3]), ("b", vec![256; 3])]);
        assert_eq!(common.mean(0), 1.0);
        assert!(Common::of(&variants[..1]).is_none() && Common::of(&[]).is_none());
        variants[3] = scored("c", b"on", f32::INFINITY);
        assert_eq!(Common::of(&variants).unwrap().variants[2], ("c", vec![9900; 2]));
    }

    #[test]
    fn every_byte_has_a_sign() {
        let bytes = b"a \n\x00\x7f\xff\xc3\xa9\xe2\x80\xae<";
        let signs = signs(bytes);
        assert_eq!(signs.len(), bytes.len());
        let texts: Vec<&str> = signs.iter().map(|sign| &sign.text[..]).collect();
        assert_eq!(texts, ["a", " ", "↵", "␀", "␡", "FF", "é", "‧", "U+202E", "‧", "‧", "<"]);
        let names = [1, 3, 5, 7].map(|i| &signs[i].name[..]);
        assert_eq!(names, ["space", "U+0000", "0xff, not UTF-8", "é, byte 2 of 2"]);
    }
}
