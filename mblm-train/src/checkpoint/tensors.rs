//! Named f32 tensors as safetensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, View, serialize_to_file};

use crate::error::{Error, Result};

/// Tensors by name, each with its shape, as [`ParamStore::load`](mblm_core::ParamStore::load) takes them.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A tensor to write; `values` may be a borrow that must be held meanwhile.
pub(super) struct Named<'a, V> {
    pub shape: &'a [usize],
    pub values: V,
}

impl<V: Deref<Target = [f32]>> View for Named<'_, V> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
    fn data_len(&self) -> usize {
        self.values.len() * size_of::<f32>()
    }
}

/// Writes tensors to a new file.
pub(super) fn write<V: Deref<Target = [f32]>>(path: &Path, tensors: Vec<(String, Named<'_, V>)>) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(error) => Error::Io { path: path.into(), error },
        other => Error::checkpoint(path, other.to_string()),
    })
}

/// Parses the contents of the file `path`.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Tensors> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| Error::checkpoint(path, format!("not a safetensors file: {error}")))?;
    file.iter()
        .map(|(name, tensor)| match tensor.dtype() {
            Dtype::F32 => {
                let (values, _) = tensor.data().as_chunks::<4>();
                let values = values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
                Ok((name.to_string(), (tensor.shape().to_vec(), values)))
            }
            other => Err(Error::checkpoint(path, format!("tensor {name} is {other:?}, expected F32"))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_survive_bit_for_bit() {
        let path = tempfile::tempdir().unwrap().keep().join("x.safetensors");
        let values = [1.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::NAN, 3.4e38, 0.1];
        write(&path, vec![("a".into(), Named { shape: &[2, 3], values: &values[..] })]).unwrap();
        let read = parse(&path, &std::fs::read(&path).unwrap()).unwrap();
        let (shape, got) = &read["a"];
        assert_eq!(shape, &[2, 3]);
        assert!(got.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()));
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn what_is_not_f32_is_named() {
        let path = Path::new("w.safetensors");
        let half = safetensors::tensor::TensorView::new(Dtype::F16, vec![1], &[0, 0]).unwrap();
        let bytes = safetensors::serialize([("h", half)], None).unwrap();
        assert_eq!(parse(path, &bytes).unwrap_err().to_string(), "w.safetensors: tensor h is F16, expected F32");
        assert!(parse(path, b"nonsense").unwrap_err().to_string().contains("not a safetensors file"));
    }
}
