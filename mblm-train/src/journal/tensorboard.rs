//! TensorBoard's event files: TFRecords that each hold an `Event` message with the scalars of one step.
//!
//! A record is the length of its data (`u64`), the masked CRC-32C of those eight bytes, the data, and the masked
//! CRC-32C of the data, all little-endian (tensorflow/core/lib/io/record_writer.h). The messages are
//! tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto; the few fields that
//! scalars need are encoded by hand, because a protobuf crate would bring a code generator and all of TensorFlow's
//! definitions for about ten of them.
//!
//! Every file starts with the format's version and with a `SessionLog` that says `START` at the first step to come.
//! From the second of these in a folder on, TensorBoard forgets what it has read of that step and later ones, so that
//! the chart of a resumed run does not run back and forth.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mblm_base::{files, host};

use crate::error::{AtPath, Result};
use crate::journal::crc32c::crc32c;

const PREFIX: &str = "events.out.tfevents.";
const VERSION: &[u8] = b"brain.Event:2";

/// The event file that one session of a run writes.
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `folder`, which is made if it is missing (its parent is there); its scalars are of `first_step` or later.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        files::own_folder(folder).at(folder)?;
        let (path, file) = create_after_all(folder)?;
        let mut events = EventFile { path, file };
        events.write(&version_event(now()))?;
        events.write(&start_event(now(), first_step))?;
        Ok(events)
    }

    /// Adds the scalars of a step.
    pub fn add<'a>(&mut self, step: u64, scalars: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        self.write(&scalar_event(now(), step, scalars))
    }

    /// Writes an event with one call to the system, so that a crash of the program loses none.
    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event)).at(&self.path)
    }
}

/// A new file whose name, `events.out.tfevents.SECONDS.HOST`, sorts after all others, which is the order TensorBoard
/// reads them in: the seconds are the time, or one more than those of the newest file if the clock is not past them.
fn create_after_all(folder: &Path) -> Result<(PathBuf, File)> {
    let mut seconds = now() as u64;
    for entry in fs::read_dir(folder).at(folder)? {
        let name = entry.at(folder)?.file_name();
        let taken = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok());
        seconds = taken.map_or(seconds, |taken: u64| seconds.max(taken.saturating_add(1)));
    }
    let path = folder.join(format!("{PREFIX}{seconds:010}.{}", host::name()));
    let file = File::create_new(&path).at(&path)?;
    Ok((path, file))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u64).to_le_bytes();
    [&len[..], &masked_crc(&len), data, &masked_crc(data)].concat()
}

/// The checksum of `data`, turned and shifted so that a checksum of data that hold checksums stays a good one.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes()
}

/// `Event { wall_time, file_version }`
fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time).bytes(3, VERSION);
    event.0
}

/// `Event { wall_time, step, session_log: SessionLog { status: START } }`
fn start_event(wall_time: f64, step: u64) -> Vec<u8> {
    const START: u64 = 1;
    let (mut session, mut event) = (Message::default(), Message::default());
    session.int(1, START);
    event.double(1, wall_time).int(2, step).bytes(7, &session.0);
    event.0
}

/// `Event { wall_time, step, summary: Summary { value: [Value { tag, simple_value }, …] } }`
fn scalar_event<'a>(wall_time: f64, step: u64, scalars: impl IntoIterator<Item = (&'a str, f64)>) -> Vec<u8> {
    let (mut summary, mut event) = (Message::default(), Message::default());
    for (tag, scalar) in scalars {
        let mut value = Message::default();
        value.bytes(1, tag.as_bytes()).float(2, scalar as f32);
        summary.bytes(1, &value.0);
    }
    event.double(1, wall_time).int(2, step).bytes(5, &summary.0);
    event.0
}

/// A protobuf message in the making: fields, each with its number and wire type in front.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn int(&mut self, field: u64, value: u64) -> &mut Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, value: &[u8]) -> &mut Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn records_are_those_of_tensorboard() {
        // tensorboard 2.21: RecordWriter over event_pb2.Event(…).SerializeToString()
        assert_eq!(
            hex(&record(&version_event(1_700_000_000.25))),
            "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9"
        );
        assert_eq!(
            hex(&record(&start_event(1_700_000_000.25, 300))),
            "100000000000000095fbfe180900001040fc54d94110ac023a0208016b3b88f1"
        );
        let scalars = [("loss", 3.0 * std::f64::consts::LN_2), ("stage1/grad_norm", -0.125)];
        assert_eq!(
            hex(&record(&scalar_event(1_700_000_000.5, 70_000, scalars))),
            "3500000000000000d6c55de60900002040fc54d94110f0a2042a260a0b0a046c6f737315921505400a170a107374616765312f67\
             7261645f6e6f726d15000000bed5a90c5c"
        );
    }

    #[test]
    fn a_file_is_complete_after_every_event() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("train");
        let mut events = EventFile::create(&place, 0).unwrap();
        let len = |events: &EventFile| fs::metadata(&events.path).unwrap().len();
        let before = len(&events);
        events.add(1, [("loss", 1.0)]).unwrap();
        let one = scalar_event(now(), 1, [("loss", 1.0)]);
        assert_eq!(len(&events), before + record(&one).len() as u64);
    }

    #[test]
    fn a_later_file_sorts_after_all_others() {
        let folder = tempfile::tempdir().unwrap();
        let ahead = folder.path().join(format!("{PREFIX}9000000000.another-host.123"));
        fs::write(&ahead, "").unwrap();
        fs::write(folder.path().join("events.out.tfevents.not-a-number"), "").unwrap();
        fs::write(folder.path().join("notes.txt"), "").unwrap();
        let names: Vec<String> = (0..3)
            .map(|_| EventFile::create(folder.path(), 0).unwrap().path)
            .map(|path| path.file_name().unwrap().to_str().unwrap().into())
            .collect();
        for (name, seconds) in names.iter().zip(9_000_000_001u64..) {
            assert_eq!(*name, format!("{PREFIX}{seconds}.{}", host::name()));
        }
    }
}
