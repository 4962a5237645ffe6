//! Pairs of bfloat16 with sums in `f32`, on processors with AVX-512 BF16: twice the multiplications per instruction of
//! `f32`, half the memory of packed operands. Operands are rounded to the nearest even, two neighbours along the summed
//! dimension to a 32-bit word, as `vdpbf16ps` reads them.

use std::arch::x86_64::*;
use std::mem::transmute;

use pulp::f32x16;
use pulp::x86::V4;

use super::arithmetic::{Arithmetic, WIDE, WithArithmetic};
use super::matrix::Mat;
use super::pack::{self, first_lanes};

/// Whether this machine has the instructions.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512bf16") && V4::is_available()
}

/// Runs a kernel over pairs of bfloat16.
pub(super) fn dispatch(work: impl WithArithmetic) {
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
    fn run(simd: V4, work: impl WithArithmetic) {
        work.run(Bf16(simd));
    }
    let simd = available().then(V4::try_new).flatten().expect("bf16 products need AVX-512 BF16");
    // SAFETY: the instructions are there: `V4` is all but the last, `available` that one.
    unsafe { run(simd, work) }
}

/// Two bfloat16 in a word.
#[derive(Clone, Copy)]
struct Bf16(V4);

impl Arithmetic for Bf16 {
    type Simd = V4;
    const PACK: usize = 2;

    #[inline(always)]
    fn simd(self) -> V4 {
        self.0
    }

    #[inline(always)]
    fn multiply_add(self, left: f32x16, right: f32x16, sum: f32x16) -> f32x16 {
        // SAFETY: a `Bf16` is only made where the instruction is; all types are 64 bytes.
        unsafe {
            let [left, right] = transmute::<[f32x16; 2], [__m512bh; 2]>([left, right]);
            let sum = _mm512_dpbf16_ps(transmute::<f32x16, __m512>(sum), left, right);
            transmute::<__m512, f32x16>(sum)
        }
    }

    #[inline(always)]
    fn pack(self, columns: Mat, width: usize, panels: &mut [f32]) {
        // SAFETY: as above.
        unsafe { if width == WIDE { pack::pairs::<WIDE>(columns, panels) } else { pack::pairs::<32>(columns, panels) } }
    }

    #[inline(always)]
    fn along(self, row: &[f32], words: &mut [f32]) {
        assert!(words.len() * 2 >= row.len());
        for (row, words) in row.chunks(32).zip(words.chunks_mut(16)) {
            let held = first_lanes(words.len());
            // SAFETY: as above; masks keep to the elements and words.
            unsafe {
                _mm512_mask_storeu_epi32(words.as_mut_ptr().cast(), held, pack::words::<2>(row.as_ptr(), row.len()))
            };
        }
    }

    #[inline(always)]
    fn across(self, rows: [&[f32]; 2], words: &mut [f32]) {
        assert!(rows.iter().all(|row| row.len() == words.len()));
        for ((low, high), words) in rows[0].chunks(16).zip(rows[1].chunks(16)).zip(words.chunks_mut(16)) {
            let held = first_lanes(words.len());
            // SAFETY: as above.
            unsafe {
                let (low, high) =
                    (_mm512_maskz_loadu_ps(held, low.as_ptr()), _mm512_maskz_loadu_ps(held, high.as_ptr()));
                _mm512_mask_storeu_epi32(words.as_mut_ptr().cast(), held, pack::across(low, high));
            }
        }
    }
}
