//! Images: read from PNG, cropped, resized and binned with the numbers of Pillow and NumPy, by which the reference
//! package does it.

use std::io::BufReader;
use std::path::Path;

use mblm_base::files;

use crate::error::{Error, Result};

/// The values of a channel.
const VALUES: usize = 256;

/// Bits after the point of a resampling weight.
const PRECISION: u32 = 22;

/// An image of red, green and blue bytes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Image {
    pub width: usize,
    pub height: usize,
    /// Row after row.
    pub pixels: Vec<[u8; 3]>,
}

/// Bytes of an image's file, at most.
const LARGEST: u64 = 1 << 28;

impl Image {
    /// Reads a PNG file of any kind; transparency is dropped.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |error: &dyn std::fmt::Display| {
            Error::Config(format!("io.dataset_dir: cannot read image {}: {error}; expected a PNG", path.display()))
        };
        let mut decoder =
            png::Decoder::new(BufReader::new(files::open(path, LARGEST).map_err(|error| wrong(&error))?.into_inner()));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().map_err(|error| wrong(&error))?;
        let size = reader.output_buffer_size().ok_or_else(|| wrong(&"it does not fit in memory"))?;
        let mut bytes = vec![0; size];
        let info = reader.next_frame(&mut bytes).map_err(|error| wrong(&error))?;
        let samples = info.color_type.samples();
        let green = if samples < 3 { 0 } else { 1 };
        let pixels = bytes[..info.buffer_size()].chunks_exact(samples).map(|p| [p[0], p[green], p[2 * green]]);
        Ok(Image { width: info.width as usize, height: info.height as usize, pixels: pixels.collect() })
    }

    /// Cuts the share `height` of the rows off above and below, and the share `width` of the columns at either side.
    pub fn crop(&self, height: f64, width: f64) -> Self {
        let (top, left) = ((self.height as f64 * height) as usize, (self.width as f64 * width) as usize);
        let rows = self.pixels.chunks_exact(self.width).skip(top).take(self.height - 2 * top);
        Image {
            width: self.width - 2 * left,
            height: self.height - 2 * top,
            pixels: rows.flat_map(|row| &row[left..self.width - left]).copied().collect(),
        }
    }

    /// Resamples with a Lanczos window of three lobes, wider where the image shrinks; columns first, rounded to bytes
    /// in between.
    pub fn resize(&self, height: usize, width: usize) -> Self {
        self.resize_columns(width).transpose().resize_columns(height).transpose()
    }

    fn resize_columns(&self, width: usize) -> Self {
        if width == self.width {
            return self.clone();
        }
        let weights: Vec<(usize, Vec<i32>)> = (0..width).map(|column| lanczos(column, self.width, width)).collect();
        let rows = self.pixels.chunks_exact(self.width);
        let pixels = rows.flat_map(|row| weights.iter().map(|(first, weights)| weighted(&row[*first..], weights)));
        Image { width, height: self.height, pixels: pixels.collect() }
    }

    fn transpose(&self) -> Self {
        let columns = (0..self.width).flat_map(|x| (0..self.height).map(move |y| self.pixels[y * self.width + x]));
        Image { width: self.height, height: self.width, pixels: columns.collect() }
    }

    /// Replaces each value by the middle of its bin, rounded down, of `bins` bins of equal width from 0 to 255; 255
    /// bins and more change nothing.
    pub fn bin_channels(&mut self, bins: usize) {
        if bins + 1 >= VALUES {
            return;
        }
        let border = |bin: usize| bin as f64 * ((VALUES - 1) as f64 / bins as f64);
        let middles: [u8; VALUES] = std::array::from_fn(|value| {
            let bin = (0..bins).rev().find(|&bin| border(bin) <= value as f64).unwrap_or(0);
            let next = if bin + 1 == bins { (VALUES - 1) as f64 } else { border(bin + 1) };
            (0.5 * border(bin) + 0.5 * next) as u8
        });
        self.map_channels(&middles);
    }

    /// Replaces the distinct values of the image, in their order, by consecutive ones from `start` on. Panics if these
    /// go past 255.
    pub fn shift_channels(&mut self, start: usize) {
        let mut occurs = [false; VALUES];
        self.pixels.as_flattened().iter().for_each(|&value| occurs[value as usize] = true);
        let distinct = occurs.iter().filter(|occurs| **occurs).count();
        assert!(start + distinct <= VALUES, "{distinct} values from {start} on");
        let mut next = start;
        let shifted = occurs.map(|occurs| {
            next += occurs as usize;
            next.saturating_sub(1) as u8
        });
        self.map_channels(&shifted);
    }

    fn map_channels(&mut self, to: &[u8; VALUES]) {
        self.pixels.as_flattened_mut().iter_mut().for_each(|value| *value = to[*value as usize]);
    }

    /// The values, channel after channel.
    pub fn planes(&self) -> impl Iterator<Item = u8> {
        (0..3).flat_map(|channel| self.pixels.iter().map(move |pixel| pixel[channel]))
    }
}

fn weighted(pixels: &[[u8; 3]], weights: &[i32]) -> [u8; 3] {
    let mut sums = [1 << (PRECISION - 1); 3];
    for (pixel, weight) in pixels.iter().zip(weights) {
        sums.iter_mut().zip(pixel).for_each(|(sum, &value)| *sum += value as i32 * weight);
    }
    sums.map(|sum| (sum >> PRECISION).clamp(0, 255) as u8)
}

/// The pixels of a line of `len` from which pixel `index` of a line of `new_len` is computed: the first, and the
/// weights from there on, in units of 2^-22.
fn lanczos(index: usize, len: usize, new_len: usize) -> (usize, Vec<i32>) {
    let scale = len as f64 / new_len as f64;
    let stretch = scale.max(1.0);
    let support = 3.0 * stretch;
    let center = (index as f64 + 0.5) * scale;
    let first = (center - support + 0.5).max(0.0) as usize;
    let end = ((center + support + 0.5) as usize).min(len);
    let inverse = 1.0 / stretch;
    let window = |pixel: usize| lanczos3((pixel as f64 - center + 0.5) * inverse);
    let weights: Vec<f64> = (first..end).map(window).collect();
    let sum: f64 = weights.iter().sum();
    let fixed = |weight: &f64| (weight / sum * f64::from(1 << PRECISION)).round() as i32;
    (first, weights.iter().map(fixed).collect())
}

/// Duchon, "Lanczos Filtering in One and Two Dimensions", 1979: `sinc(x) sinc(x / 3)`.
fn lanczos3(x: f64) -> f64 {
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Channels differ, so that a mix-up shows.
    fn image(width: usize, height: usize) -> Image {
        let pixel = |i: usize| [(7 * i) as u8, (i * i) as u8, (13 * i + i / 5) as u8];
        Image { width, height, pixels: (0..width * height).map(pixel).collect() }
    }

    #[test]
    fn a_crop_keeps_the_middle() {
        let cropped = image(5, 4).crop(0.25, 0.39);
        assert_eq!((cropped.width, cropped.height), (3, 2));
        assert_eq!(cropped.pixels.iter().map(|pixel| pixel[0] / 7).collect::<Vec<u8>>(), [6, 7, 8, 11, 12, 13]);
        assert_eq!(image(5, 4).crop(0.0, 0.1), image(5, 4));
    }

    #[test]
    fn channels_are_binned_to_the_middle() {
        let mut two = Image { width: 2, height: 1, pixels: vec![[0, 127, 128], [255, 1, 200]] };
        two.bin_channels(2);
        assert_eq!(two.pixels, [[63, 63, 191], [191, 63, 191]]);
        let mut all = image(20, 20);
        all.bin_channels(255);
        assert_eq!(all, image(20, 20));
        all.bin_channels(1);
        assert!(all.planes().all(|value| value == 127));
    }

    #[test]
    fn distinct_values_become_consecutive() {
        let mut image = Image { width: 2, height: 1, pixels: vec![[9, 250, 0], [9, 100, 250]] };
        image.shift_channels(140);
        assert_eq!(image.planes().collect::<Vec<u8>>(), [141, 141, 143, 142, 140, 143]);
        image.shift_channels(0);
        assert_eq!(image.planes().collect::<Vec<u8>>(), [1, 1, 3, 2, 0, 3]);
    }

    #[test]
    fn a_resized_constant_is_constant() {
        let constant = Image { width: 7, height: 5, pixels: vec![[0, 255, 77]; 35] };
        for (height, width) in [(3, 2), (11, 20), (5, 3), (1, 1)] {
            let resized = constant.resize(height, width);
            assert_eq!((resized.height, resized.width, resized.pixels.len()), (height, width, height * width));
            assert!(resized.pixels.iter().all(|pixel| *pixel == [0, 255, 77]));
        }
    }

    #[test]
    fn what_is_no_png_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Image::read(file.path()).unwrap_err();
        assert!(error.is_configuration() && error.to_string().contains("cannot read image"), "{error}");
        let error = Image::read(Path::new("/nowhere/x.png")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/x.png") && error.contains("No such file"), "{error}");
    }
}
