//! Rotary positions that rotate halves of a head: channel i with channel i + d/2 (Su et al. 2021, in the layout of
//! GPT-NeoX).

use std::sync::{Arc, Mutex};

use candle_core::{D, Device, Tensor};

use crate::error::Result;
use crate::ops::tables::Tables;
use crate::parallel::{Shared, for_rows};
use crate::simd::vectorize;

/// Cosines and sines by position, grown as longer sequences come.
pub struct Rotary {
    inverse_frequencies: Vec<f32>,
    table: Mutex<Arc<Table>>,
    /// Cosines and sines, `(2, positions, d)`, for compositions.
    on_devices: Tables,
    /// The same, `(2, positions, d / 2)`, for kernels.
    #[cfg(feature = "cuda")]
    halves: Tables,
}

/// `(positions, d / 2)` each.
struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotary {
    /// For heads of width `head_dim` (even), base 10,000.
    pub fn new(head_dim: usize) -> Self {
        let frequency = |i: usize| 1.0 / 10_000f32.powf((2 * i) as f32 / head_dim as f32);
        Rotary {
            inverse_frequencies: (0..head_dim / 2).map(frequency).collect(),
            table: Mutex::new(Arc::new(Table { cos: vec![], sin: vec![] })),
            on_devices: Tables::new(),
            #[cfg(feature = "cuda")]
            halves: Tables::new(),
        }
    }

    /// Radians per position of each pair of channels, `(d / 2)`.
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    fn table(&self, positions: usize) -> Arc<Table> {
        let half = self.inverse_frequencies.len();
        let mut table = self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if table.cos.len() < positions * half {
            let positions = positions.next_power_of_two();
            let angles = (0..positions).flat_map(|t| self.inverse_frequencies.iter().map(move |f| t as f32 * f));
            let (cos, sin) = angles.map(|a| ((a as f64).cos() as f32, (a as f64).sin() as f32)).unzip();
            *table = Arc::new(Table { cos, sin });
        }
        table.clone()
    }

    /// Cosines and sines of the first `seq` positions where `x` lies, `(positions, d / 2)` each.
    #[cfg(feature = "cuda")]
    pub(crate) fn half_tables(&self, seq: usize, x: &Tensor) -> Result<[Tensor; 2]> {
        let half = self.inverse_frequencies.len();
        let tables = self.halves.get(seq, x.dtype(), x.device(), |positions| {
            let table = self.table(positions);
            let part = |part: &[f32]| Tensor::from_slice(&part[..positions * half], (positions, half), &Device::Cpu);
            Ok(Tensor::stack(&[part(&table.cos)?, part(&table.sin)?], 0)?)
        })?;
        Ok([tables.get(0)?.contiguous()?, tables.get(1)?.contiguous()?])
    }

    /// The definition, for `x`: `(B, H, S, d)`, whose first row is at position `first`.
    pub fn composed(&self, x: &Tensor, first: usize) -> Result<Tensor> {
        let (_, _, seq, head_dim) = x.dims4()?;
        let half = head_dim / 2;
        let tables = self.on_devices.get(first + seq, x.dtype(), x.device(), |positions| {
            let table = self.table(positions);
            let twice = |part: &[f32]| {
                let part = Tensor::from_slice(&part[..positions * half], (positions, half), &Device::Cpu)?;
                Tensor::cat(&[&part, &part], 1)
            };
            Ok(Tensor::stack(&[twice(&table.cos)?, twice(&table.sin)?], 0)?)
        })?;
        let table = |which: usize| tables.get(which)?.narrow(0, first, seq);
        let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let rotated = Tensor::cat(&[&second.neg()?, &first], 3)?;
        Ok((x.broadcast_mul(&table(0)?)? + rotated.broadcast_mul(&table(1)?)?)?)
    }

    /// Rotates the heads at the start of every row, in place; `backward` rotates the other way.
    ///
    /// # Shapes
    /// - `rows`: `(B, S, width)`, of which the first `heads * d` columns are rotated; row i is at position
    ///   `start + i % seq`
    pub fn rotate(&self, rows: &mut [f32], width: usize, heads: usize, seq: usize, start: usize, backward: bool) {
        let half = self.inverse_frequencies.len();
        let table = self.table(start + seq);
        let sign = if backward { -1.0 } else { 1.0 };
        let count = rows.len() / width;
        let rows = Shared::new(rows);
        for_rows(count, heads * half * 2, |range| {
            // SAFETY: ranges of rows do not overlap.
            let rows = unsafe { rows.slice(range.start * width..range.end * width) };
            vectorize(
                #[inline(always)]
                || {
                    for (row, position) in rows.chunks_exact_mut(width).zip(range.map(|r| start + r % seq)) {
                        let cos = &table.cos[position * half..][..half];
                        let sin = &table.sin[position * half..][..half];
                        for head in row[..heads * 2 * half].chunks_exact_mut(2 * half) {
                            let (first, second) = head.split_at_mut(half);
                            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                                let (x, y) = (*a, *b);
                                *a = x * cos - y * sin * sign;
                                *b = y * cos + x * sin * sign;
                            }
                        }
                    }
                },
            );
        });
    }
}
