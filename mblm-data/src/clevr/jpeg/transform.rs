//! The discrete cosine transform of a block (Loeffler, Ligtenberg & Moschytz 1989, in fixed point as the Independent
//! JPEG Group's `jfdctint`) and its quantisation (ITU-T T.81, K.1).

/// Bits after the point of a factor.
const BITS: u32 = 13;
/// Bits after the point between rows and columns.
const SPARE: u32 = 2;

/// The steps to which coefficients are rounded.
pub struct QuantTable {
    /// Row after row.
    steps: [i32; 64],
}

impl QuantTable {
    /// The standard table of luminance (0) or chrominance (1), scaled as the Independent JPEG Group's `quality` does.
    pub fn new(table: usize, quality: u8) -> Self {
        let quality = i32::from(quality).clamp(1, 100);
        let percent = if quality < 50 { 5000 / quality } else { 200 - 2 * quality };
        let standard = if table == 0 { LUMINANCE } else { CHROMINANCE };
        QuantTable { steps: standard.map(|step| ((step * percent + 50) / 100).clamp(1, 255)) }
    }

    /// The steps in zigzag order.
    pub fn steps(&self) -> [u8; 64] {
        ZIGZAG.map(|place| self.steps[place] as u8)
    }

    /// The quantised coefficients of a block's samples around 0, in zigzag order.
    pub fn coefficients(&self, mut block: [i32; 64]) -> [i32; 64] {
        for row in 0..8 {
            transform(&mut block, 8 * row, 1, |even| even << SPARE, BITS - SPARE);
        }
        for column in 0..8 {
            transform(&mut block, column, 8, |even| descale(even, SPARE), BITS + SPARE);
        }
        // The transform's coefficients are eight times those of the standard.
        ZIGZAG.map(|place| {
            let (value, step) = (block[place], 8 * self.steps[place]);
            value.signum() * ((value.abs() + step / 2) / step)
        })
    }
}

fn descale(value: i32, bits: u32) -> i32 {
    (value + (1 << (bits - 1))) >> bits
}

/// Transforms the eight values from `start` on, `stride` apart. `even` scales sums, and `bits` are dropped after
/// products with the factors: cosines of multiples of pi / 16, and their sums and differences.
fn transform(block: &mut [i32; 64], start: usize, stride: usize, even: impl Fn(i32) -> i32, bits: u32) {
    let at = |i: usize| start + i * stride;
    let sum = |i: usize| block[at(i)] + block[at(7 - i)];
    let difference = |i: usize| block[at(i)] - block[at(7 - i)];
    let (outer, inner) = (sum(0) + sum(3), sum(1) + sum(2));
    let (outer_difference, inner_difference) = (sum(0) - sum(3), sum(1) - sum(2));
    let turn = (inner_difference + outer_difference) * 4433;
    let [d0, d1, d2, d3] = std::array::from_fn(difference);
    let common = (d3 + d1 + d2 + d0) * 9633;
    let (ends, middles) = ((d3 + d0) * -7373, (d2 + d1) * -20995);
    let (odd, rest) = ((d3 + d1) * -16069 + common, (d2 + d0) * -3196 + common);
    let values = [
        even(outer + inner),
        descale(d0 * 12299 + ends + rest, bits),
        descale(turn + outer_difference * 6270, bits),
        descale(d1 * 25172 + middles + odd, bits),
        even(outer - inner),
        descale(d2 * 16819 + middles + rest, bits),
        descale(turn - inner_difference * 15137, bits),
        descale(d3 * 2446 + ends + odd, bits),
    ];
    values.into_iter().enumerate().for_each(|(i, value)| block[at(i)] = value);
}

/// The places of coefficients in the order of a block's diagonals.
#[rustfmt::skip]
const ZIGZAG: [usize; 64] = [
      0,   1,   8,  16,   9,   2,   3,  10,
     17,  24,  32,  25,  18,  11,   4,   5,
     12,  19,  26,  33,  40,  48,  41,  34,
     27,  20,  13,   6,   7,  14,  21,  28,
     35,  42,  49,  56,  57,  50,  43,  36,
     29,  22,  15,  23,  30,  37,  44,  51,
     58,  59,  52,  45,  38,  31,  39,  46,
     53,  60,  61,  54,  47,  55,  62,  63,
];

#[rustfmt::skip]
const LUMINANCE: [i32; 64] = [
     16,  11,  10,  16,  24,  40,  51,  61,
     12,  12,  14,  19,  26,  58,  60,  55,
     14,  13,  16,  24,  40,  57,  69,  56,
     14,  17,  22,  29,  51,  87,  80,  62,
     18,  22,  37,  56,  68, 109, 103,  77,
     24,  35,  55,  64,  81, 104, 113,  92,
     49,  64,  78,  87, 103, 121, 120, 101,
     72,  92,  95,  98, 112, 100, 103,  99,
];

#[rustfmt::skip]
const CHROMINANCE: [i32; 64] = [
     17,  18,  24,  47,  99,  99,  99,  99,
     18,  21,  26,  66,  99,  99,  99,  99,
     24,  26,  56,  99,  99,  99,  99,  99,
     47,  66,  99,  99,  99,  99,  99,  99,
     99,  99,  99,  99,  99,  99,  99,  99,
     99,  99,  99,  99,  99,  99,  99,  99,
     99,  99,  99,  99,  99,  99,  99,  99,
     99,  99,  99,  99,  99,  99,  99,  99,
];
