//! Tensors as torch stores them: a window of a storage, with an offset and a stride per dimension.

use half::{bf16, f16};

use crate::fault::Parsed;

/// Torch's own limit for most of its operations.
pub(crate) const MAX_DIMS: usize = 64;

/// The types of numbers that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    F64,
    F16,
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub(crate) fn size(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// Little-endian bytes as f32.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Dtype::F32 => elements(bytes, f32::from_le_bytes),
            Dtype::F64 => elements(bytes, |bytes| f64::from_le_bytes(bytes) as f32),
            Dtype::F16 => elements(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::Bf16 => elements(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        }
    }
}

fn elements<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|&bytes| decode(bytes)).collect()
}

/// A storage: the file `data/KEY` of the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Storage<'a> {
    pub key: &'a str,
    /// Its type's name in torch, such as `FloatStorage`.
    pub class: &'a str,
    /// Elements.
    pub len: usize,
}

impl Storage<'_> {
    /// The type of its numbers, if they are floats that are read.
    pub(crate) fn dtype(&self) -> Option<Dtype> {
        match self.class {
            "FloatStorage" => Some(Dtype::F32),
            "DoubleStorage" => Some(Dtype::F64),
            "HalfStorage" => Some(Dtype::F16),
            "BFloat16Storage" => Some(Dtype::Bf16),
            _ => None,
        }
    }
}

/// A tensor, known to lie within its storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// The storage's index.
    pub storage: usize,
    pub shape: Vec<usize>,
    /// The product of the shape.
    pub elements: usize,
    strides: Vec<usize>,
    offset: usize,
    /// Whether the numbers in the storage have the opposite sign, as those of a tensor of `torch._neg_view`.
    pub negative: bool,
}

impl View {
    /// A view on the storage at index `storage`, which has `len` elements.
    ///
    /// # Errors
    /// It reaches beyond the storage.
    pub(crate) fn new(
        storage: usize,
        len: usize,
        offset: usize,
        shape: Vec<usize>,
        strides: Vec<usize>,
    ) -> Parsed<Self> {
        if shape.len() != strides.len() || shape.len() > MAX_DIMS {
            let (dims, strides) = (shape.len(), strides.len());
            return Err(format!(
                "expected as many strides as dimensions, at most {MAX_DIMS}, found {strides} for {dims}"
            ));
        }
        let product = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let steps = shape.iter().zip(&strides);
        let last = steps.map(|(&dim, &stride)| dim.saturating_sub(1).checked_mul(stride));
        let end = last.chain([Some(1)]).try_fold(offset, |sum, step| sum.checked_add(step?));
        match (product, end) {
            (Some(0), _) => Ok(View { storage, shape, elements: 0, strides, offset: 0, negative: false }),
            (Some(elements), Some(end)) if end <= len => {
                Ok(View { storage, shape, elements, strides, offset, negative: false })
            }
            _ => Err(format!(
                "a tensor of shape {shape:?} with strides {strides:?} from {offset} on reaches beyond its storage of \
                 {len} elements"
            )),
        }
    }

    /// The elements, the last dimension running fastest.
    pub(crate) fn gather(&self, storage: &[f32]) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.elements);
        if self.elements == 0 {
            return values;
        }
        let mut index = vec![0; self.shape.len()];
        let mut at = self.offset;
        loop {
            values.push(if self.negative { -storage[at] } else { storage[at] });
            // The next place: the last dimension that has one more moves on, those after it go back to their start.
            let mut dim = index.len();
            loop {
                let Some(inner) = dim.checked_sub(1) else { return values };
                dim = inner;
                if index[dim] + 1 < self.shape[dim] {
                    index[dim] += 1;
                    at += self.strides[dim];
                    break;
                }
                at -= index[dim] * self.strides[dim];
                index[dim] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_of_float_becomes_f32() {
        let number = -1.5f32;
        let bytes = [
            (Dtype::F32, number.to_le_bytes().to_vec()),
            (Dtype::F64, (number as f64).to_le_bytes().to_vec()),
            (Dtype::F16, f16::from_f32(number).to_le_bytes().to_vec()),
            (Dtype::Bf16, bf16::from_f32(number).to_le_bytes().to_vec()),
        ];
        for (dtype, one) in bytes {
            assert_eq!(dtype.size(), one.len());
            assert_eq!(dtype.decode(&one.repeat(3)), [number; 3], "{dtype:?}");
        }
    }

    #[test]
    fn strides_are_followed() {
        let storage: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let gather = |offset, shape: &[usize], strides: &[usize]| {
            View::new(0, 24, offset, shape.into(), strides.into()).unwrap().gather(&storage)
        };
        assert_eq!(gather(0, &[4, 6], &[6, 1]), storage);
        assert_eq!(gather(0, &[3, 2], &[1, 3]), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0], "transposed");
        assert_eq!(gather(4, &[2, 2, 2], &[12, 6, 1]), [4.0, 5.0, 10.0, 11.0, 16.0, 17.0, 22.0, 23.0], "a slice");
        assert_eq!(gather(7, &[], &[]), [7.0], "a scalar");
        assert_eq!(gather(7, &[2, 0], &[9, 9]), [0.0; 0]);
        assert_eq!(gather(3, &[1, 3], &[usize::MAX, 0]), [3.0; 3], "expanded");
    }

    #[test]
    fn what_reaches_beyond_the_storage_is_refused() {
        let big = usize::MAX;
        let cases: [(usize, &[usize], &[usize]); 6] = [
            (0, &[4, 7], &[7, 1]),
            (1, &[24], &[1]),
            (24, &[], &[]),
            (0, &[big, big], &[0, 0]),
            (0, &[2, 3], &[big, 1]),
            (big, &[2], &[big]),
        ];
        for (offset, shape, strides) in cases {
            let fault = View::new(0, 24, offset, shape.into(), strides.into()).unwrap_err();
            assert!(fault.contains("beyond its storage of 24 elements"), "{fault}");
        }
        assert!(View::new(0, 24, 0, vec![2], vec![]).unwrap_err().contains("found 0 for 1"));
        assert!(View::new(0, 24, 0, vec![1; 65], vec![1; 65]).unwrap_err().contains("at most 64"));
    }
}
