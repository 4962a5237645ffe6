//! The zip archive around a pickle and its storages. Entries are stored, not compressed.

use std::io::{Read, Seek, SeekFrom};

use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use crate::fault::Parsed;
use crate::view::{Dtype, Storage};

/// Torch needs about 200 bytes per tensor.
const MAX_PICKLE: u64 = 1 << 26;
const PICKLE: &str = "data.pkl";
/// How a zip archive begins.
const ZIP: &[u8] = b"PK\x03\x04";
/// How torch before 1.6 began its files: a pickle of protocol 2 with a number of ten bytes.
const LEGACY: &[u8] = &[0x80, 0x02, 0x8a, 0x0a];
/// The entry that TorchScript archives have beside the pickle.
const TORCH_SCRIPT: &str = "constants.pkl";

pub(crate) struct Archive<R> {
    zip: ZipArchive<R>,
    /// The folder that all entries are in.
    folder: String,
    /// What may still be read: entries together are no larger than the file.
    left: u64,
    /// Bytes of the file.
    pub len: u64,
    big_endian: bool,
}

impl<R: Read + Seek> Archive<R> {
    /// Opens the archive and finds the pickle's folder.
    pub(crate) fn open(mut reader: R) -> Parsed<Self> {
        let mut start = Vec::new();
        reader.rewind().map_err(|error| error.to_string())?;
        reader.by_ref().take(ZIP.len() as u64).read_to_end(&mut start).map_err(|error| error.to_string())?;
        match &start[..] {
            ZIP => {}
            LEGACY => {
                return Err("a file in the format of torch before 1.6, which is not read here: load it with a newer \
                     torch and save its tensors again, with torch.save(model.state_dict(), …)"
                    .into());
            }
            _ => return Err("expected a zip archive from the first byte on, as torch.save writes it".into()),
        }
        let len = reader.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
        // Between the directory and the end torch writes the records of zip64, needed or not. A search for the start of
        // the directory from its size and the end would be led astray by them; the offset in the file is right.
        let zip = ZipArchive::with_config(Config { archive_offset: ArchiveOffset::Known(0) }, reader)
            .map_err(|error| format!("expected a zip archive as torch.save writes it: {error}"))?;
        let is_pickle = |name: &str| name.split_once('/').is_some_and(|(_, name)| name == PICKLE);
        let names: Vec<_> = zip.file_names().flatten().filter(|name| is_pickle(name)).collect();
        let [name] = &names[..] else {
            return Err(format!("expected one entry FOLDER/{PICKLE}, found {}", names.len()));
        };
        let folder = name[..name.len() - PICKLE.len()].to_string();
        if zip.index_for_name(&format!("{folder}{TORCH_SCRIPT}")).is_some() {
            return Err("a TorchScript archive, which holds code: save its tensors alone, with \
                        torch.save(torch.jit.load(FILE).state_dict(), …)"
                .into());
        }
        let mut archive = Archive { zip, folder, left: len, len, big_endian: false };
        archive.big_endian = archive.reads_big_endian()?;
        Ok(archive)
    }

    fn reads_big_endian(&mut self) -> Parsed<bool> {
        const NAME: &str = "byteorder";
        if self.zip.index_for_name(&format!("{}{NAME}", self.folder)).is_none() {
            return Ok(false); // torch before 2.1 says nothing
        }
        match &self.entry(NAME, 16)?[..] {
            b"little" => Ok(false),
            b"big" => Ok(true),
            other => Err(format!("{NAME}: expected little or big, found {:?}", String::from_utf8_lossy(other))),
        }
    }

    /// The pickle.
    pub(crate) fn pickle(&mut self) -> Parsed<Vec<u8>> {
        self.entry(PICKLE, MAX_PICKLE)
    }

    /// The numbers of a storage of floats.
    pub(crate) fn storage(&mut self, storage: &Storage, dtype: Dtype) -> Parsed<Vec<f32>> {
        let size = dtype.size();
        let name = format!("data/{}", storage.key);
        let mut bytes = self.entry(&name, u64::MAX)?;
        if storage.len.checked_mul(size) != Some(bytes.len()) {
            let (found, len, class) = (bytes.len(), storage.len, storage.class);
            return Err(format!("{name:?}: found {found} bytes, expected {len} numbers of a {class}"));
        }
        if self.big_endian {
            bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        Ok(dtype.decode(&bytes))
    }

    /// The contents of an entry of at most `limit` bytes, checked against its sum.
    pub(crate) fn entry(&mut self, name: &str, limit: u64) -> Parsed<Vec<u8>> {
        let at = |what: String| format!("{name:?}: {what}");
        let mut entry = self.zip.by_name(&format!("{}{name}", self.folder)).map_err(|error| at(error.to_string()))?;
        let size = entry.size();
        if entry.compression() != CompressionMethod::Stored || entry.compressed_size() != size {
            return Err(at("compressed, expected as it is: save it again with torch.save".into()));
        }
        if size > self.left || size > limit {
            return Err(at(format!("{size} bytes, expected at most {}", self.left.min(limit))));
        }
        self.left -= size;
        let mut bytes = Vec::with_capacity(size as usize);
        entry.read_to_end(&mut bytes).map_err(|error| at(error.to_string()))?;
        match bytes.len() as u64 == size {
            true => Ok(bytes),
            false => Err(at(format!("found {} bytes, expected {size}: the file is damaged", bytes.len()))),
        }
    }
}
