//! The selective scan: chunks of all sequences at once, with the states between them carried in between.

use candle_core::{DType, Device, Tensor};

use super::launch::{Arg, Grid, launch, like, unwritten};
use super::sums::column_sums;
use crate::backward::with_own_backward;
use crate::error::Result;

/// Positions of a chunk: `CHUNK` of `selective_scan.cu`.
const CHUNK: usize = 16;

/// Most threads of a block, each for one channel: `SCAN_THREADS` of `selective_scan.cu`.
const THREADS: usize = 128;

/// About as many blocks as fill a card. Each works on one chunk after another and sums up its gradients of the parameters.
const BLOCKS: usize = 2048;

/// See [`selective_scan_composed`](crate::ops::selective_scan::selective_scan_composed).
pub fn selective_scan(inputs: [&Tensor; 5], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let [x, dt, b, c, z] = inputs;
    scan([x, dt, z].as_slice(), b, c, a_log, d, dt_bias)
}

/// See [`ssd_composed`](crate::ops::ssd::ssd_composed): a selective scan in which the channels of a head share their
/// decays, step sizes and D.
pub fn ssd(inputs: [&Tensor; 4], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let [x, dt, b, c] = inputs;
    let (batch, seq, inner) = x.dims3()?;
    let (heads, states) = (d.elem_count(), b.dim(2)?);
    let width = inner / heads;
    let per_channel =
        |of_heads: &Tensor| of_heads.unsqueeze(1)?.broadcast_as((heads, width))?.contiguous()?.flatten_all();
    let dt = dt.contiguous()?.unsqueeze(3)?.broadcast_as((batch, seq, heads, width))?.contiguous()?;
    let dt = dt.reshape((batch, seq, inner))?;
    let a_log = a_log.reshape((heads, 1, 1))?.broadcast_as((heads, width, states))?.contiguous()?;
    let a_log = a_log.reshape((inner, states))?;
    scan([x, &dt].as_slice(), b, c, &a_log, &per_channel(d)?, &per_channel(dt_bias)?)
}

/// A scan over x and dt, and z if outputs are gated.
fn scan(parts: &[&Tensor], b: &Tensor, c: &Tensor, a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let scan = Scan::of(parts, a_log)?;
    let rows = Tensor::cat(parts, 2)?.contiguous()?;
    let maps = Tensor::cat(&[b, c], 2)?.contiguous()?;
    let params = Tensor::cat(&[a_log, &d.unsqueeze(1)?, &dt_bias.unsqueeze(1)?], 1)?.contiguous()?;
    let operands = [&rows, &maps, &params];
    let borders = scan.borders(operands)?;
    let y = scan.forward(operands, borders.as_ref())?;
    with_own_backward(&operands, y, move |operands, dy| {
        let [rows, maps, params] = operands else { return Ok(vec![]) };
        scan.backward([rows, maps, params], borders.as_ref(), dy)
    })
}

/// The sizes of a scan. Its operands are, contiguous:
/// - `rows`: `(B, S, parts E)`, x, dt and perhaps z
/// - `maps`: `(B, S, 2 N)`, B and C
/// - `params`: `(E, N + 2)`, a_log, D and the bias
struct Scan {
    batch: usize,
    seq: usize,
    channels: usize,
    states: usize,
    /// 3 with z, or 2.
    parts: usize,
    device: Device,
}

/// What forward keeps where sequences have several chunks.
struct Borders {
    /// The states before each chunk, `(B, chunks, N, E)`.
    starts: Tensor,
    /// The sums of δ over each chunk, `(B, chunks, E)`.
    steps: Tensor,
}

impl Scan {
    fn of(parts: &[&Tensor], a_log: &Tensor) -> Result<Self> {
        let (batch, seq, channels) = parts[0].dims3()?;
        let (_, states) = a_log.dims2()?;
        Ok(Scan { batch, seq, channels, states, parts: parts.len(), device: a_log.device().clone() })
    }

    /// Chunks of a sequence.
    fn chunks(&self) -> usize {
        self.seq.div_ceil(CHUNK)
    }

    /// Blocks of neighbouring channels, by blocks that share the chunks.
    fn grid(&self) -> Grid {
        let threads = self.channels.next_multiple_of(32).min(THREADS);
        let tiles = self.channels.div_ceil(threads);
        let parts = (self.batch * self.chunks()).clamp(1, (BLOCKS / tiles).max(1));
        Grid { blocks: (tiles, parts), threads, shared: 0 }
    }

    fn unwritten(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(unwritten(shape, DType::F32, &self.device)?)
    }

    /// Runs a kernel of chunks on `tensors`, null where there is none.
    fn run(&self, kernel: &'static str, tensors: &[Option<&Tensor>]) -> Result<()> {
        let sizes = [self.seq, self.channels, self.states, self.parts].map(Arg::Int);
        let sizes = [Arg::Long(self.batch * self.chunks())].into_iter().chain(sizes);
        let tensors = tensors.iter().map(|tensor| tensor.map_or(Arg::Null, Arg::Tensor));
        Ok(launch(&self.device, kernel, self.grid(), &tensors.chain(sizes).collect::<Vec<_>>())?)
    }

    /// Replaces what each chunk leaves behind by what it starts from, in place; `back`: in the order of backward.
    fn carry(&self, kept: &Tensor, steps: &Tensor, params: &Tensor, back: bool) -> Result<()> {
        let len = self.batch * self.states * self.channels;
        let sizes = [self.chunks(), self.channels, self.states, back as usize].map(Arg::Int);
        let tensors = [kept, steps, params].map(Arg::Tensor);
        let args: Vec<Arg> = tensors.into_iter().chain([Arg::Long(len)]).chain(sizes).collect();
        Ok(launch(&self.device, "scan_carry", Grid::elements(len), &args)?)
    }

    /// None for sequences of one chunk, which start from zero.
    fn borders(&self, [rows, maps, params]: [&Tensor; 3]) -> Result<Option<Borders>> {
        if self.chunks() <= 1 {
            return Ok(None);
        }
        let starts = self.unwritten(&[self.batch, self.chunks(), self.states, self.channels])?;
        let steps = self.unwritten(&[self.batch, self.chunks(), self.channels])?;
        self.run("scan", &[Some(rows), Some(maps), Some(params), None, None, Some(&starts), Some(&steps)])?;
        self.carry(&starts, &steps, params, false)?;
        Ok(Some(Borders { starts, steps }))
    }

    fn forward(&self, [rows, maps, params]: [&Tensor; 3], borders: Option<&Borders>) -> Result<Tensor> {
        let y = self.unwritten(&[self.batch, self.seq, self.channels])?;
        let starts = borders.map(|borders| &borders.starts);
        self.run("scan", &[Some(rows), Some(maps), Some(params), starts, Some(&y), None, None])?;
        Ok(y)
    }

    /// The gradients of the operands.
    fn backward(&self, operands: [&Tensor; 3], borders: Option<&Borders>, dy: &Tensor) -> Result<Vec<Tensor>> {
        let [rows, maps, params] = operands;
        let grads = borders.map(|borders| self.grads_of_ends(operands, borders, dy)).transpose()?;
        let (tiles, parts) = self.grid().blocks;
        let drows = like(rows)?;
        // Sums over the channels of a block, and over the chunks of a block.
        let dmaps = self.unwritten(&[tiles, maps.elem_count()])?;
        let dparams = self.unwritten(&[parts, params.elem_count()])?;
        let starts = borders.map(|borders| &borders.starts);
        let inputs = [Some(rows), Some(maps), Some(params), starts, grads.as_ref(), Some(dy)];
        let outputs = [Some(&drows), Some(&dmaps), Some(&dparams)];
        self.run("scan_backward", &[inputs.as_slice(), &outputs].concat())?;
        let (dmaps, dparams) = (column_sums(&dmaps)?, column_sums(&dparams)?);
        Ok(vec![drows, dmaps.reshape(maps.shape())?, dparams.reshape(params.shape())?])
    }

    /// The gradients of the states after each chunk, `(B, chunks, N, E)`.
    fn grads_of_ends(&self, [rows, maps, params]: [&Tensor; 3], borders: &Borders, dy: &Tensor) -> Result<Tensor> {
        let grads = like(&borders.starts)?;
        self.run("scan_retreat", &[Some(rows), Some(maps), Some(params), Some(dy), Some(&grads)])?;
        self.carry(&grads, &borders.steps, params, true)?;
        Ok(grads)
    }
}
