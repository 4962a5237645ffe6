//! Products in bfloat16 with sums in `f32`, on processors with AVX-512 BF16: twice the multiplications per instruction
//! of `f32`, half the memory of packed operands.
//!
//! Blocked as in Goto & van de Geijn 2008: a panel of `b` stays in the first-level cache, a block of `a` in the second,
//! and a tile of the output in registers. Operands are rounded to the nearest even bfloat16 while they are packed, two
//! neighbours along the summed dimension to a 32-bit word, as `vdpbf16ps` reads them.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::sync::OnceLock;

use pulp::f32x16;
use pulp::x86::V4;
use rayon::prelude::*;

use super::arithmetic::{Arithmetic, WithArithmetic};
use super::pack::{self, Lanes, first_lanes};
use super::{Mat, MatMut, Threads};
use crate::buffer::Buffer;
use crate::parallel::Shared;

/// Rows of a tile.
const MR: usize = 12;
/// Columns of a tile: two registers of 16.
const NR: usize = 32;
/// Pairs of the summed dimension in a block, at most: a panel of `b` has 32 KiB then.
const PAIRS: usize = 256;
/// Rows of `a` packed at a time, at most.
const BLOCK: usize = 240;

/// Whether this machine has the instructions.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    })
}

/// Runs a kernel over pairs of bfloat16.
pub(super) fn dispatch(work: impl WithArithmetic) {
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
    fn run(simd: V4, work: impl WithArithmetic) {
        work.run(Bf16(simd));
    }
    let simd = V4::try_new().filter(|_| available()).expect("bf16 products need AVX-512 BF16");
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
        // SAFETY: a `Bf16` is only made where the instruction is; both types are 64 bytes.
        unsafe { transmute(_mm512_dpbf16_ps(transmute(sum), transmute(left), transmute(right))) }
    }

    #[inline(always)]
    fn pack(self, right: Mat, panels: &mut [f32]) {
        // SAFETY: as above.
        unsafe { pack::pairs::<NR>(Lanes::columns(&right, 0, right.rows), panels) }
    }

    #[inline(always)]
    fn along(self, row: &[f32], words: &mut [f32]) {
        assert!(words.len() * 2 >= row.len());
        for (row, words) in row.chunks(32).zip(words.chunks_mut(16)) {
            let held = first_lanes(words.len());
            // SAFETY: as above; masks keep to the elements and words.
            unsafe { _mm512_mask_storeu_epi32(words.as_mut_ptr().cast(), held, pack::words::<2>(row.as_ptr(), row.len())) };
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

/// As [`super::matmul`], both operands rounded to bfloat16.
pub(super) fn matmul(out: MatMut, accumulate: bool, scale: f32, a: Mat, b: Mat, threads: Threads) {
    assert!(available(), "bf16 products need AVX-512 BF16");
    let pairs = a.cols.div_ceil(2).max(1);
    let pairs = pairs.div_ceil(pairs.div_ceil(PAIRS));
    let mut panels = Buffer::take(b.cols.next_multiple_of(NR) * pairs);
    let rows_of_block = block_rows(a.rows, threads);
    for first in (0..a.cols.max(1)).step_by(2 * pairs) {
        let depth = (a.cols - first).min(2 * pairs);
        let sum = Sum { accumulate: accumulate || first > 0, scale, pairs: depth.div_ceil(2) };
        let b = Lanes::columns(&b, first, depth);
        pack_all(b, &mut panels, threads);
        let a = Lanes::rows(&a, first, depth);
        let panels = &panels[..];
        let block = |start: usize| {
            let rows = rows_of_block.min(out.rows - start);
            let mut packed = Buffer::take(rows.next_multiple_of(MR) * sum.pairs);
            // SAFETY: the instructions are there by the assertion, and blocks are different rows of `out`.
            unsafe {
                pack::pairs::<MR>(a.part(start, rows), &mut packed);
                tiles(out.part(start, rows), sum, &packed, panels);
            }
        };
        let starts = 0..out.rows.div_ceil(rows_of_block);
        match threads {
            Threads::One => starts.for_each(|i| block(i * rows_of_block)),
            Threads::All => starts.into_par_iter().for_each(|i| block(i * rows_of_block)),
        }
    }
}

/// Equal blocks, as many as threads or a multiple.
fn block_rows(rows: usize, threads: Threads) -> usize {
    let threads = if threads == Threads::All { rayon::current_num_threads() } else { 1 };
    let blocks = rows.div_ceil(BLOCK).next_multiple_of(threads);
    rows.div_ceil(blocks).next_multiple_of(MR)
}

#[derive(Clone, Copy)]
struct Sum {
    accumulate: bool,
    scale: f32,
    pairs: usize,
}

/// Packs `b` on all threads.
fn pack_all(b: Lanes, panels: &mut [f32], threads: Threads) {
    let panel = NR * b.depth.div_ceil(2);
    let count = b.count.div_ceil(NR);
    // Pairs of panels, so that a thread has something to do.
    let chunk = if threads == Threads::All { count.div_ceil(4 * rayon::current_num_threads()) } else { count };
    let shared = Shared::new(panels);
    let pack_chunk = |i: usize| {
        let (start, end) = (i * chunk, ((i + 1) * chunk).min(count));
        // SAFETY: chunks do not overlap; the caller has checked the instructions.
        unsafe {
            let lanes = b.part(start * NR, (end - start) * NR);
            pack::pairs::<NR>(lanes, shared.slice(start * panel..end * panel));
        }
    };
    match threads {
        Threads::One => pack_chunk(0),
        Threads::All => (0..count.div_ceil(chunk)).into_par_iter().for_each(pack_chunk),
    }
}

/// All tiles of a block of rows.
///
/// # Safety
/// The processor must have AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tiles(mut out: MatMut, sum: Sum, a: &[f32], b: &[f32]) {
    let (rows, cols) = (out.rows, out.cols);
    for (b, col) in b.chunks_exact(NR * sum.pairs).zip((0..cols).step_by(NR)) {
        let held = [first_lanes(cols - col), first_lanes((cols - col).saturating_sub(16))];
        for (a, row) in a.chunks_exact(MR * sum.pairs).zip((0..rows).step_by(MR)) {
            let tile = tile(a, b, sum.pairs);
            let mut out = out.rows(row, MR.min(rows - row));
            // A constant number of rows keeps the sums in registers.
            if out.rows == MR {
                (0..MR).for_each(|i| store(tile[i], sum, &mut out.row(i)[col..], held));
            } else {
                (0..out.rows).for_each(|i| store(tile[i], sum, &mut out.row(i)[col..], held));
            }
        }
    }
}

/// Writes the sums of a row to the first `held` columns of each half.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(sums: [__m512; 2], sum: Sum, out: &mut [f32], held: [__mmask16; 2]) {
    for (half, (value, held)) in sums.into_iter().zip(held).enumerate() {
        // SAFETY: the mask keeps to the row.
        unsafe {
            let out = out.as_mut_ptr().wrapping_add(16 * half);
            let value = _mm512_mul_ps(value, _mm512_set1_ps(sum.scale));
            let before = _mm512_maskz_loadu_ps(if sum.accumulate { held } else { 0 }, out);
            _mm512_mask_storeu_ps(out, held, _mm512_add_ps(before, value));
        }
    }
}

/// `MR x NR` sums over all pairs of a panel of `a` and one of `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile(a: &[f32], b: &[f32], pairs: usize) -> [[__m512; 2]; MR] {
    let mut sums = [[_mm512_setzero_ps(); 2]; MR];
    assert!(a.len() >= pairs * MR && b.len() >= pairs * NR);
    let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
    for _ in 0..pairs {
        // SAFETY: in bounds by the assertion.
        unsafe {
            let right = [load(b), load(b.add(16))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = transmute::<__m512, __m512bh>(_mm512_set1_ps(*a.add(i)));
                sums[0] = _mm512_dpbf16_ps(sums[0], left, right[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], left, right[1]);
            }
            a = a.add(MR);
            b = b.add(NR);
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load(words: *const f32) -> __m512bh {
    // SAFETY: 16 readable words, by the caller.
    unsafe { transmute::<__m512, __m512bh>(_mm512_loadu_ps(words)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    /// The nearest bfloat16, ties to even.
    fn rounded(x: f32) -> f64 {
        let bits = x.to_bits();
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000) as f64
    }

    #[test]
    fn products_are_those_of_rounded_operands() {
        if !available() {
            return eprintln!("no AVX-512 BF16 here");
        }
        crate::buffer::poison_buffers();
        let sizes = [(1, 1, 1), (3, 5, 7), (12, 32, 384), (13, 33, 385), (500, 70, 65), (70, 500, 800), (2, 17, 1000)];
        for (m, n, k) in sizes {
            let (a, b) = (noise(m * k, 1), noise(n * k, 2));
            for layout in 0..4 {
                let (a_t, b_t) = (layout & 1 == 1, layout & 2 == 2);
                let left = if a_t { Mat::new(&a, k, m).t() } else { Mat::new(&a, m, k) };
                let right = if b_t { Mat::new(&b, n, k).t() } else { Mat::new(&b, k, n) };
                let at = |mat: &Mat, i: usize, j: usize| rounded(mat.data[i * mat.row_stride + j * mat.col_stride]);
                for threads in [Threads::One, Threads::All] {
                    // Rows of the output lie apart; what lies between must stay.
                    let (stride, accumulate) = (n + 3, layout == 3);
                    let mut out = vec![if accumulate { 1.0 } else { f32::NAN }; m * stride];
                    matmul(MatMut::strided(&mut out, m, n, stride), accumulate, 0.5, left, right, threads);
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|l| at(&left, i, l) * at(&right, l, j)).sum();
                            let size: f64 = (0..k).map(|l| (at(&left, i, l) * at(&right, l, j)).abs()).sum();
                            let (got, want) = (out[i * stride + j] as f64, accumulate as u8 as f64 + 0.5 * sum);
                            let tolerance = 1e-6 * (size + 1.0);
                            assert!(
                                (got - want).abs() <= tolerance,
                                "{m}x{n}x{k} {layout} ({i},{j}): {got}, want {want}"
                            );
                        }
                        assert!(out[i * stride + n..(i + 1) * stride].iter().all(|v| v.is_nan() || *v == 1.0));
                    }
                }
            }
        }
    }
}
