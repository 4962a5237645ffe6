//! Named f32 tensors as safetensors.

use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Deref;
use std::path::Path;

use mblm_pth::Tensors;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use crate::error::{Error, Result};

/// Where the data begin is a multiple of this.
const ALIGNMENT: usize = 8;
/// So many numbers are written at a time.
const CHUNK: usize = 1 << 16;

/// A tensor to write; `values` may be a borrow that must be held meanwhile.
pub(super) struct Named<'a, V> {
    pub shape: &'a [usize],
    pub values: V,
}

/// Writes tensors in the order of their names.
pub(super) fn write<V>(file: &mut dyn Write, mut tensors: Vec<(String, Named<'_, V>)>) -> io::Result<()>
where
    V: Deref<Target = [f32]>,
{
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut end = 0;
    let mut info = |tensor: &Named<'_, V>| {
        let start = end;
        end += tensor.values.len() * size_of::<f32>();
        TensorInfo { dtype: Dtype::F32, shape: tensor.shape.to_vec(), data_offsets: (start, end) }
    };
    let infos = tensors.iter().map(|(name, tensor)| (name.clone(), info(tensor))).collect();
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let header = serde_json::to_vec(&Metadata::new(Some(format), infos).map_err(io::Error::other)?)?;
    let padding = header.len().next_multiple_of(ALIGNMENT) - header.len();
    file.write_all(&((header.len() + padding) as u64).to_le_bytes())?;
    file.write_all(&header)?;
    file.write_all(&b" ".repeat(padding))?;
    let mut bytes = Vec::new();
    for values in tensors.iter().flat_map(|(_, tensor)| tensor.values.chunks(CHUNK)) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        file.write_all(&bytes)?;
    }
    Ok(())
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
        let values = [1.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::NAN, 3.4e38, 0.1];
        let many: Vec<f32> = (0..CHUNK + 7).map(|i| i as f32).collect();
        let mut bytes = Vec::new();
        let tensors = vec![
            ("b".into(), Named { shape: &[2, 3], values: &values[..] }),
            ("a".into(), Named { shape: &[CHUNK + 7], values: &many[..] }),
        ];
        write(&mut bytes, tensors).unwrap();
        let read = parse(Path::new("x"), &bytes).unwrap();
        let (shape, got) = &read["b"];
        assert_eq!((&shape[..], &read["a"]), (&[2, 3][..], &(vec![CHUNK + 7], many)));
        assert!(got.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn the_file_is_the_one_that_the_format_asks_for() {
        let mut bytes = Vec::new();
        write(&mut bytes, vec![("w".into(), Named { shape: &[1], values: &[1.5][..] })]).unwrap();
        let format = HashMap::from([("format".to_string(), "pt".to_string())]);
        let tensor = safetensors::tensor::TensorView::new(Dtype::F32, vec![1], &[0, 0, 0xc0, 0x3f]).unwrap();
        assert_eq!(bytes, safetensors::serialize([("w", tensor)], Some(format)).unwrap());
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
