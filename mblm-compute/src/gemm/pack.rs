//! Packing an operand with AVX-512 into panels of its columns, the lanes: of floats as they are, or of pairs of bfloat16.

use std::arch::x86_64::*;

use super::matrix::Mat;

/// Packs panels of `WIDTH` lanes of floats: a panel is, element after element, `WIDTH` floats. Missing lanes are zero.
///
/// # Safety
/// The processor must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn floats<const WIDTH: usize>(columns: Mat, packed: &mut [f32]) {
    // SAFETY: floats need AVX-512 F alone.
    unsafe { pack::<WIDTH, 1>(columns, packed) }
}

/// Packs panels of `WIDTH` lanes, two neighbours of a lane rounded to bfloat16 in a word: a panel is, pair after pair,
/// `WIDTH` words. What is missing becomes zero.
///
/// # Safety
/// The processor must have AVX-512 F, BW and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pairs<const WIDTH: usize>(columns: Mat, packed: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe { pack::<WIDTH, 2>(columns, packed) }
}

/// A word holds `PACK` elements.
#[inline(always)]
unsafe fn pack<const WIDTH: usize, const PACK: usize>(columns: Mat, packed: &mut [f32]) {
    let words = columns.rows.div_ceil(PACK);
    let needed = columns.cols.next_multiple_of(WIDTH) * words;
    assert!(needed <= packed.len(), "{needed} words do not fit in {}", packed.len());
    for (panel, start) in packed.chunks_exact_mut(WIDTH * words).zip((0..columns.cols).step_by(WIDTH)) {
        for group in (0..WIDTH).step_by(16) {
            let width = (WIDTH - group).min(16);
            let first = (start + group).min(columns.cols);
            let lanes = columns.part(0, columns.rows, first, (columns.cols - first).min(width));
            let group = Group { lanes, out: panel[group..].as_mut_ptr(), width };
            // SAFETY: the panel has `words` rows of `WIDTH` words.
            unsafe {
                match (columns.row_stride, columns.col_stride) {
                    (1, _) => group.transpose::<WIDTH, PACK>(),
                    (_, 1) => group.interleave::<WIDTH, PACK>(),
                    _ => unreachable!("a matrix has rows or columns of neighbours"),
                }
            }
        }
    }
}

/// Up to 16 lanes on their way to the words `out + word * WIDTH ..`, `width` of each row.
struct Group<'a> {
    lanes: Mat<'a>,
    out: *mut f32,
    width: usize,
}

impl Group<'_> {
    /// Lanes whose elements are neighbours.
    #[inline(always)]
    unsafe fn transpose<const WIDTH: usize, const PACK: usize>(&self) {
        let Mat { data, rows: depth, cols: count, col_stride, .. } = self.lanes;
        for k in (0..depth).step_by(16 * PACK) {
            let left = depth - k;
            // SAFETY: `words` keeps to the lane's elements, and the mask of the store to a row of the panel.
            unsafe {
                let mut rows = [_mm512_setzero_si512(); 16];
                for (i, row) in rows.iter_mut().enumerate().take(count) {
                    *row = words::<PACK>(data.as_ptr().add(i * col_stride + k), left);
                }
                for (i, row) in transpose16(rows).iter().enumerate().take(left.div_ceil(PACK)) {
                    let out = self.out.add((k / PACK + i) * WIDTH);
                    _mm512_mask_storeu_epi32(out.cast(), first_lanes(self.width), *row);
                }
            }
        }
    }

    /// Lanes that are neighbours.
    #[inline(always)]
    unsafe fn interleave<const WIDTH: usize, const PACK: usize>(&self) {
        let Mat { data, rows: depth, cols: count, row_stride, .. } = self.lanes;
        let (held, width) = (first_lanes(count), first_lanes(self.width));
        for word in 0..depth.div_ceil(PACK) {
            let row = data.as_ptr().wrapping_add(PACK * word * row_stride);
            // SAFETY: the masks keep to the lanes, and an odd last row is not read past.
            unsafe {
                let low = _mm512_maskz_loadu_ps(held, row);
                let words = if PACK == 1 {
                    _mm512_castps_si512(low)
                } else {
                    let held = if PACK * word + 1 < depth { held } else { 0 };
                    across(low, _mm512_maskz_loadu_ps(held, row.wrapping_add(row_stride)))
                };
                _mm512_mask_storeu_epi32(self.out.add(word * WIDTH).cast(), width, words);
            }
        }
    }
}

/// Up to 16 words of neighbours: the first `left` elements at `data`, then zeros.
#[inline(always)]
pub(super) unsafe fn words<const PACK: usize>(data: *const f32, left: usize) -> __m512i {
    // SAFETY: the masks keep to the `left` elements.
    unsafe {
        let low = _mm512_maskz_loadu_ps(first_lanes(left), data);
        if PACK == 1 {
            return _mm512_castps_si512(low);
        }
        let high = _mm512_maskz_loadu_ps(first_lanes(left.saturating_sub(16)), data.wrapping_add(16));
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// 16 words, each of an element of `low` and the same of `high`.
#[inline(always)]
pub(super) unsafe fn across(low: __m512, high: __m512) -> __m512i {
    const ORDER: [i16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + 16 * (i % 2)) as i16;
            i += 1;
        }
        order
    };
    // SAFETY: `ORDER` is 32 words of 16 bits; the instructions are there by the caller.
    unsafe {
        let words = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        _mm512_permutexvar_epi16(_mm512_loadu_epi16(ORDER.as_ptr()), words)
    }
}

pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// The transpose of 16 x 16 words.
#[inline(always)]
unsafe fn transpose16(rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: AVX-512 F, by the caller.
    unsafe {
        let mut a = [_mm512_setzero_si512(); 16];
        let mut b = a;
        for i in (0..16).step_by(2) {
            a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // b[4 i + j]: word j of every 128-bit lane, of the rows 4 i to 4 i + 3.
        for i in (0..16).step_by(4) {
            b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
            b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
            b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
            b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
        }
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[j], b[4 + j]);
            let high = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[j], b[4 + j]);
            let low2 = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + j], b[12 + j]);
            let high2 = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + j], b[12 + j]);
            a[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low, low2);
            a[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low, low2);
            a[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(high, high2);
            a[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(high, high2);
        }
        a
    }
}
