//! Baseline JPEG (ITU-T T.81), byte for byte as libjpeg-turbo writes it by default, through which the reference package
//! does: the slow integer transform, the standard Huffman tables, and either red, green and blue, or luminance with
//! chrominance of half the resolution.
//!
//! It is written by hand because models are trained on the bytes of the file: they must equal libjpeg-turbo's, and encoders
//! in Rust do not promise that.

mod huffman;
mod transform;

use self::huffman::{BitWriter, HuffmanTable};
use self::transform::QuantTable;
use super::image::Image;

/// Rows and columns of a block.
const SIDE: usize = 8;

/// One component of the image, in whole blocks.
struct Component {
    id: u8,
    /// Blocks of this component in each direction of an MCU.
    sampling: usize,
    /// 0 for the tables of luminance, 1 for those of chrominance.
    table: usize,
    blocks_in_row: usize,
    blocks_in_column: usize,
    /// Row after row; what lies outside the image repeats its edge.
    samples: Vec<u8>,
}

/// Compresses an image with a quality from 0 to 100; `rgb` stores red, green and blue, else luminance and chrominance.
/// `None` if it is empty, or larger than the 65535 pixels in each direction that the format has room for.
pub(super) fn encode(image: &Image, quality: u8, rgb: bool) -> Option<Vec<u8>> {
    let (width, height) = (u16::try_from(image.width).ok()?, u16::try_from(image.height).ok()?);
    if width == 0 || height == 0 {
        return None;
    }
    let components = if rgb { rgb_components(image) } else { ycc_components(image) };
    let num_tables = if rgb { 1 } else { 2 };
    let quants: Vec<QuantTable> = (0..num_tables).map(|table| QuantTable::new(table, quality)).collect();
    let huffman: Vec<[HuffmanTable; 2]> = (0..num_tables).map(HuffmanTable::standard).collect();

    let mut out = vec![0xff, 0xd8];
    if rgb {
        segment(&mut out, 0xee, b"Adobe\x00\x64\x00\x00\x00\x00\x00");
    } else {
        segment(&mut out, 0xe0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00");
    }
    for (table, quant) in quants.iter().enumerate() {
        segment(&mut out, 0xdb, &[&[table as u8], quant.steps().as_slice()].concat());
    }
    let [h, w] = [height.to_be_bytes(), width.to_be_bytes()];
    let mut frame = vec![8, h[0], h[1], w[0], w[1], 3];
    let mut scan = vec![3];
    for component in &components {
        let (sampling, table) = (component.sampling as u8, component.table as u8);
        frame.extend([component.id, sampling << 4 | sampling, table]);
        scan.extend([component.id, table << 4 | table]);
    }
    segment(&mut out, 0xc0, &frame);
    for (table, kinds) in huffman.iter().enumerate() {
        for (class, kind) in kinds.iter().enumerate() {
            let place = [(class << 4 | table) as u8];
            segment(&mut out, 0xc4, &[&place, kind.counts.as_slice(), kind.symbols].concat());
        }
    }
    scan.extend([0, 63, 0]);
    segment(&mut out, 0xda, &scan);
    write_blocks(&mut out, &components, &quants, &huffman);
    out.extend([0xff, 0xd9]);
    Some(out)
}

fn segment(out: &mut Vec<u8>, marker: u8, content: &[u8]) {
    out.extend([0xff, marker]);
    out.extend((content.len() as u16 + 2).to_be_bytes());
    out.extend(content);
}

fn rgb_components(image: &Image) -> Vec<Component> {
    let planes = (0..3).map(|channel| image.pixels.iter().map(|pixel| pixel[channel]).collect::<Vec<u8>>());
    b"RGB".iter().zip(planes).map(|(&id, plane)| Component::full(id, 1, image, &plane)).collect()
}

fn ycc_components(image: &Image) -> Vec<Component> {
    let ycc: Vec<[u8; 3]> = image.pixels.iter().map(ycc).collect();
    let plane = |channel: usize| ycc.iter().map(|pixel| pixel[channel]).collect::<Vec<u8>>();
    vec![
        Component::full(1, 2, image, &plane(0)),
        Component::halved(2, image, &plane(1)),
        Component::halved(3, image, &plane(2)),
    ]
}

/// Luminance and chrominance (JFIF 1.02), in units of 2^-16, which sum to 2^16 or to zero.
fn ycc([r, g, b]: &[u8; 3]) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    const MIDDLE: i32 = (128 << 16) + HALF - 1;
    let [r, g, b] = [*r as i32, *g as i32, *b as i32];
    let y = 19595 * r + 38470 * g + 7471 * b + HALF;
    let cb = -11058 * r - 21710 * g + 32768 * b + MIDDLE;
    let cr = 32768 * r - 27439 * g - 5329 * b + MIDDLE;
    [y, cb, cr].map(|value| (value >> 16) as u8)
}

impl Component {
    /// A component of the image's resolution.
    fn full(id: u8, sampling: usize, image: &Image, plane: &[u8]) -> Self {
        let (width, height) = (image.width, image.height);
        let sample = |x: usize, y: usize| plane[y.min(height - 1) * width + x.min(width - 1)];
        Self::new(id, sampling, 0, [width.div_ceil(SIDE), height.div_ceil(SIDE)], sample)
    }

    /// A component of half the image's resolution: means of four, rounded down and up in turns.
    fn halved(id: u8, image: &Image, plane: &[u8]) -> Self {
        let (width, height) = (image.width, image.height);
        let at = |x: usize, y: usize| plane[y.min(height - 1) * width + x.min(width - 1)] as usize;
        let mean = |x: usize, y: usize| {
            let (left, top) = (2 * x, 2 * y.min(height.div_ceil(2) - 1));
            let sum = at(left, top) + at(left + 1, top) + at(left, top + 1) + at(left + 1, top + 1);
            ((sum + 1 + x % 2) / 4) as u8
        };
        Self::new(id, 1, 1, [width.div_ceil(2 * SIDE), height.div_ceil(2 * SIDE)], mean)
    }

    fn new(id: u8, sampling: usize, table: usize, blocks: [usize; 2], sample: impl Fn(usize, usize) -> u8) -> Self {
        let [blocks_in_row, blocks_in_column] = blocks;
        let sample = &sample;
        let row = |y| (0..blocks_in_row * SIDE).map(move |x| sample(x, y));
        let samples = (0..blocks_in_column * SIDE).flat_map(row).collect();
        Component { id, sampling, table, blocks_in_row, blocks_in_column, samples }
    }

    /// The samples of a block around 0, or `None` beyond the last one.
    fn block(&self, column: usize, row: usize) -> Option<[i32; SIDE * SIDE]> {
        if column >= self.blocks_in_row || row >= self.blocks_in_column {
            return None;
        }
        let stride = self.blocks_in_row * SIDE;
        let start = row * SIDE * stride + column * SIDE;
        Some(std::array::from_fn(|i| self.samples[start + i / SIDE * stride + i % SIDE] as i32 - 128))
    }
}

/// The scan: MCU after MCU, of each all blocks of a component after the other. A block that only fills the last MCU
/// repeats the mean of the one before and costs two codes.
fn write_blocks(out: &mut Vec<u8>, components: &[Component], quants: &[QuantTable], huffman: &[[HuffmanTable; 2]]) {
    let first = &components[0];
    let columns = first.blocks_in_row.div_ceil(first.sampling);
    let rows = first.blocks_in_column.div_ceil(first.sampling);
    let mut bits = BitWriter::new(out);
    let mut means = vec![0; components.len()];
    for mcu in 0..rows * columns {
        for (component, mean) in components.iter().zip(&mut means) {
            let sampling = component.sampling;
            for place in 0..sampling * sampling {
                let column = mcu % columns * sampling + place % sampling;
                let row = mcu / columns * sampling + place / sampling;
                let block = match component.block(column, row) {
                    Some(samples) => quants[component.table].coefficients(samples),
                    None => std::array::from_fn(|i| if i == 0 { *mean } else { 0 }),
                };
                bits.block(&block, *mean, &huffman[component.table]);
                *mean = block[0];
            }
        }
    }
    bits.finish();
}
