//! Pseudo-random numbers that are the same on every machine: for orders of data, initial weights, dropout, noise and
//! tests. They are kept by hand because a run's numbers must not change with the version of a crate.

/// 2⁶⁴ divided by the golden ratio: the step of SplitMix64's counter.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Spreads small numbers over all 64 bits.
pub fn spread(value: u64) -> u64 {
    value.wrapping_mul(GOLDEN)
}

/// Mixes the bits of a counter into a random looking number (SplitMix64, Steele et al. 2014).
pub fn mix(value: u64) -> u64 {
    finish(value.wrapping_add(GOLDEN))
}

/// The finaliser of SplitMix64, for numbers that are [spread](spread()) already.
pub fn finish(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// A random looking number for each index under a key, in few instructions that vectorize (after Wellons' lowbias32).
#[inline(always)]
pub fn at(index: u64, key: u64) -> u32 {
    let mixed = index.wrapping_add(key);
    let mut hash = (mixed as u32) ^ ((mixed >> 32) as u32).wrapping_mul(0x9E37_79B9);
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x7FEB_352D);
    hash = (hash ^ (hash >> 15) ^ (key >> 32) as u32).wrapping_mul(0x846C_A68B);
    hash ^ (hash >> 16)
}

/// The hash of a name (FNV-1a).
pub fn hash(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01B3))
}

/// A number from the standard normal distribution, made of two from the uniform one over `[0, 1)` (Box & Muller 1958).
pub fn normal(u: f64, v: f64) -> f64 {
    // 1 - u keeps the logarithm finite.
    (-2.0 * (1.0 - u).ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}

/// A stream of random looking numbers (xorshift64, Marsaglia 2003).
pub struct XorShift(u64);

impl XorShift {
    /// The stream of a seed other than 0.
    pub fn new(seed: u64) -> Self {
        XorShift(spread(seed))
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Reproducible noise, uniform in `[-1, 1]`.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut stream = XorShift::new(seed.wrapping_add(1));
    (0..len).map(|_| (stream.draw() >> 40) as f32 / (1u32 << 23) as f32 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_as_they_are() {
        assert_eq!([0, 1, u64::MAX].map(mix), [0xE220_A839_7B1D_CDAF, 0x910A_2DEC_8902_5CC1, 0xE4D9_7177_1B65_2C20]);
        assert_eq!(noise(3, 7), [0x3F4D_B77A, 0xBF28_E818, 0x3F66_464E].map(f32::from_bits));
        assert_eq!(["", "a"].map(hash), [0xCBF2_9CE4_8422_2325, 0xAF63_DC4C_8601_EC8C], "the vectors of FNV-1a");
    }
}
