//! The weights of a checkpoint as one file for other programs.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use mblm_base::files;
use mblm_pth as pth;

use super::{Checkpoint, Tensors, WEIGHTS};
use crate::error::{AtPath, Error, Result};

/// Writes the parameters as safetensors, under the reference package's names.
///
/// # Errors
/// `out` exists, or cannot be written; the checkpoint is damaged.
pub fn export_safetensors(checkpoint: &Checkpoint, out: &Path) -> Result<()> {
    let bytes = checkpoint.read(WEIGHTS)?;
    write_new(out, |file| file.write_all(&bytes))
}

/// Writes tensors as the `.pth` file that the reference package loads; these must be all of its `state_dict`, buffers
/// included. A loss that is not known is infinite there: every other model is better.
///
/// # Errors
/// `out` exists, or cannot be written.
pub fn export_pth(weights: &Tensors, loss: Option<f64>, out: &Path) -> Result<()> {
    write_new(out, |file| pth::write(file, weights, loss.unwrap_or(f64::INFINITY)))
}

/// Writes a new file, whose name nothing may have.
fn write_new(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> Result<()> {
    match files::create(path, write) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Config(format!("{}: already exists; choose another file, or delete it first", path.display())))
        }
        written => written.at(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_overwritten_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.pth");
        let weights = Tensors::from([("w".to_string(), (vec![2], vec![1.0, 2.0]))]);
        export_pth(&weights, None, &path).unwrap();
        let error = export_pth(&Tensors::new(), None, &path).unwrap_err();
        assert!(error.is_configuration() && error.to_string().contains("w.pth: already exists"), "{error}");
        assert_eq!(pth::read(&path).unwrap(), pth::Saved { weights, loss: f64::INFINITY, ..Default::default() });
        let failing = folder.path().join("x.pth");
        write_new(&failing, |_| Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
