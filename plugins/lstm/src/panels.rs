//! A weight matrix rearranged for the small products of a recurrence: in panels of a few SIMD registers' columns, each
//! read from end to end, once for four rows of the other factor.

use mblm_sdk::buffer::Buffer;
use mblm_sdk::parallel::{Shared, for_rows};
use mblm_sdk::simd::{has_wide_registers, vectorize};

/// Columns of a register: one of AVX-512, two of AVX2.
pub(crate) const LANES: usize = 16;
pub(crate) type Lanes = [f32; LANES];

/// Rows of the other factor that a panel is read for at once: with four registers' columns, 16 sums.
pub(crate) const TILE: usize = 4;

/// The floats of a cache line: panels start on one, for a load across two lines costs two.
const ALIGNMENT: usize = 64;

/// `(panels, depth, V, 16)`
pub(crate) struct Panels<const V: usize> {
    data: Buffer,
    /// Where the first panel starts.
    offset: usize,
    depth: usize,
}

impl<const V: usize> Panels<V> {
    /// For the product `x Wᵀ`, `W`: `(rows, depth)`. Lane `lane` of register `v` of a panel gets the product with row
    /// `row(panel, v, lane)` of `W`, or 0 where that is none.
    pub(crate) fn of_transpose(
        weight: &[f32],
        depth: usize,
        panels: usize,
        row: impl Fn(usize, usize, usize) -> Option<usize> + Sync,
    ) -> Self {
        Self::new(panels, depth, |panel, out| {
            for v in 0..V {
                for lane in 0..LANES {
                    match row(panel, v, lane) {
                        Some(row) => {
                            let row = &weight[row * depth..(row + 1) * depth];
                            out.iter_mut().zip(row).for_each(|(out, w)| out[v][lane] = *w);
                        }
                        None => out.iter_mut().for_each(|out| out[v][lane] = 0.0),
                    }
                }
            }
        })
    }

    /// For the product `x W`, `W`: `(depth, columns)`. The columns that fill up the last panel are 0.
    pub(crate) fn of(weight: &[f32], columns: usize) -> Self {
        let depth = weight.len() / columns;
        Self::new(columns.div_ceil(V * LANES), depth, |panel, out| {
            for (out, row) in out.iter_mut().zip(weight.chunks_exact(columns)) {
                for (v, out) in out.iter_mut().enumerate() {
                    *out = load(row, (panel * V + v) * LANES);
                }
            }
        })
    }

    fn new(panels: usize, depth: usize, fill: impl Fn(usize, &mut [[Lanes; V]]) + Sync) -> Self {
        let len = depth * V * LANES;
        let mut data = Buffer::take(panels * len + ALIGNMENT / size_of::<f32>());
        let offset = data.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT / size_of::<f32>());
        let shared = Shared::new(&mut data[offset..]);
        for_rows(panels, len, |range| {
            vectorize(
                #[inline(always)]
                || {
                    for panel in range {
                        // SAFETY: a panel is in one range.
                        let out = unsafe { shared.slice(panel * len..(panel + 1) * len) };
                        fill(panel, out.as_chunks_mut().0.as_chunks_mut().0);
                    }
                },
            );
        });
        Panels { data, offset, depth }
    }

    #[inline(always)]
    fn panel(&self, panel: usize) -> &[[Lanes; V]] {
        let len = self.depth * V * LANES;
        let start = self.offset + panel * len;
        self.data[start..start + len].as_chunks().0.as_chunks().0
    }

    /// The panel's columns of the product, for `B` rows of `depth` floats.
    #[inline(always)]
    pub(crate) fn product<const B: usize>(&self, rows: [&[f32]; B], panel: usize) -> [[Lanes; V]; B] {
        let panel = self.panel(panel);
        for row in rows {
            assert_eq!(row.len(), panel.len(), "depth");
        }
        let mut sums = [[[0.0; LANES]; V]; B];
        if has_wide_registers() {
            accumulate(rows, panel, 0, &mut sums);
        } else {
            // As many sums as other registers hold, or the compiler keeps them in memory.
            for v in 0..V {
                let mut part = [[[0.0; LANES]; 1]; B];
                accumulate(rows, panel, v, &mut part);
                sums.iter_mut().zip(part).for_each(|(sum, [part])| sum[v] = part);
            }
        }
        sums
    }
}

/// `N` registers' columns of the product, from `first` on.
#[inline(always)]
fn accumulate<const B: usize, const N: usize, const V: usize>(
    rows: [&[f32]; B],
    panel: &[[Lanes; V]],
    first: usize,
    out: &mut [[Lanes; N]; B],
) {
    let mut sums = [[[0.0; LANES]; N]; B];
    for (k, weights) in panel.iter().enumerate() {
        for b in 0..B {
            let x = rows[b][k];
            for v in 0..N {
                for l in 0..LANES {
                    sums[b][v][l] = x.mul_add(weights[first + v][l], sums[b][v][l]);
                }
            }
        }
    }
    *out = sums;
}

/// The 16 floats from `first` on; zeros where there are none.
#[inline(always)]
pub(crate) fn load(row: &[f32], first: usize) -> Lanes {
    let row = &row[first.min(row.len())..];
    match row.first_chunk() {
        Some(whole) => *whole,
        None => {
            let mut lanes = [0.0; LANES];
            lanes.iter_mut().zip(row).for_each(|(lane, x)| *lane = *x);
            lanes
        }
    }
}

/// Writes as many lanes as `row` has room for.
#[inline(always)]
pub(crate) fn store(lanes: &Lanes, row: &mut [f32]) {
    match row.first_chunk_mut() {
        Some(whole) => *whole = *lanes,
        None => row.iter_mut().zip(lanes).for_each(|(x, lane)| *x = *lane),
    }
}

#[cfg(test)]
mod tests {
    use mblm_sdk::buffer::poison_buffers;
    use mblm_sdk::testing::noise;

    use super::*;

    #[test]
    fn products_are_those_of_the_matrix() {
        poison_buffers();
        let (rows, columns) = (70, 37);
        let (weight, x) = (noise(rows * columns, 1), noise(2 * rows, 2));
        let near = |got: f32, want: f32| assert!((got - want).abs() < 1e-5, "got {got}, want {want}");

        let plain = Panels::<2>::of(&weight, columns);
        let sums: Vec<_> = (0..2).map(|panel| plain.product([&x[..rows], &x[rows..]], panel)).collect();
        for (b, x) in x.chunks_exact(rows).enumerate() {
            for column in 0..64 {
                let got = sums[column / 32][b][column % 32 / 16][column % 16];
                let of = |k: usize| if column < columns { x[k] * weight[k * columns + column] } else { 0.0 };
                near(got, (0..rows).map(of).sum());
            }
        }

        let reversed = |panel, v, lane| (rows - 1usize).checked_sub(panel * 32 + v * 16 + lane);
        let transposed = Panels::<2>::of_transpose(&weight, columns, 3, reversed);
        for column in 0..96 {
            let got = transposed.product([&x[..columns]], column / 32)[0][column % 32 / 16][column % 16];
            let of = |row: usize| (0..columns).map(|k| x[k] * weight[row * columns + k]).sum();
            near(got, (rows - 1).checked_sub(column).map_or(0.0, of));
        }
    }
}
