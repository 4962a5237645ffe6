//! Pairs of bfloat16 without AVX-512 BF16, one lane at a time: too slow for use, but it runs the kernels over pairs on every
//! machine, for tests.

use pulp::Scalar;

use super::arithmetic::{Arithmetic, WithArithmetic};
use super::matrix::Mat;

/// Runs a kernel over pairs of bfloat16.
pub(super) fn dispatch(work: impl WithArithmetic) {
    work.run(Pairs(Scalar::new()));
}

#[derive(Clone, Copy)]
struct Pairs(Scalar);

/// The bits of the nearest bfloat16, ties to even.
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    (bits + 0x7fff + (bits >> 16 & 1)) >> 16
}

/// A word: the first neighbour in its low half.
fn word(first: f32, second: f32) -> f32 {
    f32::from_bits(rounded(second) << 16 | rounded(first))
}

fn halves(word: f32) -> [f32; 2] {
    [f32::from_bits(word.to_bits() << 16), f32::from_bits(word.to_bits() & 0xffff_0000)]
}

impl Arithmetic for Pairs {
    type Simd = Scalar;
    const PACK: usize = 2;

    fn simd(self) -> Scalar {
        self.0
    }

    fn multiply_add(self, left: f32, right: f32, sum: f32) -> f32 {
        let ([a, b], [c, d]) = (halves(left), halves(right));
        sum + a * c + b * d
    }

    fn pack(self, columns: Mat, width: usize, panels: &mut [f32]) {
        let at = |row: usize, column: usize| match row < columns.rows && column < columns.cols {
            true => columns.data[row * columns.row_stride + column * columns.col_stride],
            false => 0.0,
        };
        let words = columns.rows.div_ceil(2);
        for (panel, first) in panels.chunks_exact_mut(words * width).zip((0..columns.cols).step_by(width)) {
            for (i, packed) in panel.iter_mut().enumerate() {
                let (row, column) = (2 * (i / width), first + i % width);
                *packed = word(at(row, column), at(row + 1, column));
            }
        }
    }

    fn along(self, row: &[f32], words: &mut [f32]) {
        for (pair, packed) in row.chunks(2).zip(words) {
            *packed = word(pair[0], pair.get(1).copied().unwrap_or(0.0));
        }
    }

    fn across(self, rows: [&[f32]; 2], words: &mut [f32]) {
        for ((first, second), packed) in rows[0].iter().zip(rows[1]).zip(words) {
            *packed = word(*first, *second);
        }
    }
}
