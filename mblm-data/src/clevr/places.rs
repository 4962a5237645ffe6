//! Where the questions of a CLEVR questions file stand, without holding the file in memory.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read};

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Start and length of a question's object in the file, in bytes.
pub(super) type Place = (u64, u32);

/// Where the questions of a document stand. One question at a time is in memory.
pub(super) fn places(document: impl Read) -> serde_json::Result<Vec<Place>> {
    let taken = Cell::new(0);
    let mut parser = serde_json::Deserializer::from_reader(Counted { reader: document, taken: &taken });
    let places = parser.deserialize_map(Document { taken: &taken })?;
    parser.end().map(|()| places)
}

/// Counts the bytes that are taken from a reader.
struct Counted<'a, R> {
    reader: R,
    taken: &'a Cell<u64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(bytes)?;
        self.taken.set(self.taken.get() + count as u64);
        Ok(count)
    }
}

struct Document<'a> {
    taken: &'a Cell<u64>,
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = Vec<Place>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<Vec<Place>, M::Error> {
        let mut places = None;
        while let Some(field) = fields.next_key::<String>()? {
            match field.as_str() {
                "questions" => places = Some(fields.next_value_seed(List { taken: self.taken })?),
                _ => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        places.ok_or_else(|| M::Error::missing_field("questions"))
    }
}

struct List<'a> {
    taken: &'a Cell<u64>,
}

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = Vec<Place>;

    fn deserialize<D: Deserializer<'de>>(self, list: D) -> Result<Vec<Place>, D::Error> {
        list.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = Vec<Place>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut questions: S) -> Result<Vec<Place>, S::Error> {
        let mut places = Vec::new();
        while let Some(question) = questions.next_element::<Box<RawValue>>()? {
            // The parser looks no further than the brace that closes an object.
            let len = question.get().len() as u32;
            places.push((self.taken.get() - u64::from(len), len));
        }
        Ok(places)
    }
}
