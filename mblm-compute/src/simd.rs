//! SIMD picked at run time, and the vectorisable elementary functions that kernels share.
//!
//! [`vectorize`] compiles its closure once per instruction set (AVX-512, AVX2, baseline) and runs the best one the
//! machine has; plain loops over slices inside it vectorise. The closure itself and all functions used inside must be
//! `#[inline(always)]`, and hot loops must be `for` loops (a `for_each` closure may stay out of line): what is not inlined
//! is compiled for the baseline, tens of times slower.

use std::sync::OnceLock;

/// Runs `work` compiled for the best instruction set of this machine.
#[inline(always)]
pub fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    dispatch(work)
}

/// [`vectorize`] for work that names the registers it uses.
#[inline(always)]
pub(crate) fn dispatch<W: pulp::WithSimd>(work: W) -> W::Output {
    static ARCH: OnceLock<pulp::Arch> = OnceLock::new();
    ARCH.get_or_init(pulp::Arch::new).dispatch(work)
}

/// The instruction set that kernels use here. Another one rounds sums in another order.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    return match (has_wide_registers(), std::arch::is_x86_feature_detected!("avx2")) {
        (true, _) => "AVX-512",
        (false, true) => "AVX2",
        (false, false) => "SSE2",
    };
    #[cfg(target_arch = "aarch64")]
    return "NEON";
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    "baseline"
}

/// Whether the registers are those of AVX-512: 32 of 16 floats, which hold four times the sums that others hold.
#[inline(always)]
pub fn has_wide_registers() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `e^x`, relative error below 2e-7; 0 below -87.3 (where `f32` becomes subnormal), finite up to 88.7.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer
    let clamped = x.clamp(-87.3, 88.7);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that n * ln 2 is subtracted exactly.
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    // Taylor's series to the seventh power: |r| <= ln(2)/2 leaves 6e-9.
    let p = 1.0 / 5040.0;
    let p = r.mul_add(p, 1.0 / 720.0);
    let p = r.mul_add(p, 1.0 / 120.0);
    let p = r.mul_add(p, 1.0 / 24.0);
    let p = r.mul_add(p, 1.0 / 6.0);
    let p = r.mul_add(p, 0.5);
    let p = r.mul_add(p, 1.0);
    let p = r.mul_add(p, 1.0);
    // 2^n by its exponent bits, in two halves since 2^128 alone would overflow.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let scale = |k: i32| f32::from_bits(((k + 127) << 23) as u32);
    let value = p * scale(half) * scale(n - half);
    if x < -87.3 { 0.0 } else { value }
}

/// `e^x` for `x <= 0`, in half the instructions of [`exp`]: relative error below 3e-7 down to -16, 1e-6 below; not less
/// than `e^-87`.
#[inline(always)]
pub fn exp_decay(x: f32) -> f32 {
    let (p, n) = exp_parts(x.max(-87.0));
    // 2^n is added to the exponent; the clamp keeps the sum a normal number.
    f32::from_bits(p.to_bits().wrapping_add(n))
}

/// `e^x` for `x <= 0` (or a rounding above), as the weights of a softmax: the error of [`exp_decay`], but 0 below -87 and
/// NaN of NaN.
#[inline(always)]
pub fn exp_weight(x: f32) -> f32 {
    // Not `max`, which would make NaN a number.
    let (p, n) = exp_parts(if x < -87.0 { -87.0 } else { x });
    if x < -87.0 { 0.0 } else { p * f32::from_bits(1.0f32.to_bits().wrapping_add(n)) }
}

/// `e^x` as `p 2^n`: `p`, and `n` where the exponent's bits are.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, u32) {
    const ROUND: f32 = 12_582_912.0; // as in `exp`
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let r = (shifted - ROUND).mul_add(-std::f32::consts::LN_2, x);
    let p = 1.0 / 720.0;
    let p = r.mul_add(p, 1.0 / 120.0);
    let p = r.mul_add(p, 1.0 / 24.0);
    let p = r.mul_add(p, 1.0 / 6.0);
    let p = r.mul_add(p, 0.5);
    let p = r.mul_add(p, 1.0);
    let p = r.mul_add(p, 1.0);
    (p, shifted.to_bits() << 23)
}

/// The logistic function `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// The derivative of [`silu`].
#[inline(always)]
pub fn silu_grad(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// `ln(1 + e^x)` without overflow.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    // ln(1 + u) = 2 atanh(u / (2 + u)), u = e^-|x| in (0, 1]: the odd series to z^13 leaves 5e-9.
    let u = exp(-x.abs());
    let z = u / (2.0 + u);
    let zz = z * z;
    let p = 1.0 / 13.0;
    let p = zz.mul_add(p, 1.0 / 11.0);
    let p = zz.mul_add(p, 1.0 / 9.0);
    let p = zz.mul_add(p, 1.0 / 7.0);
    let p = zz.mul_add(p, 1.0 / 5.0);
    let p = zz.mul_add(p, 1.0 / 3.0);
    let p = zz.mul_add(p, 1.0);
    x.max(0.0) + 2.0 * z * p
}

/// The standard normal distribution function and its density at `x`: what GELU is made of.
///
/// The error function is Abramowitz & Stegun 7.1.26, absolute error below 1.5e-7.
#[inline(always)]
pub fn normal_cdf_pdf(x: f32) -> (f32, f32) {
    let gauss = exp(-0.5 * x * x);
    let t = 1.0 / (x.abs() * (0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2) + 1.0);
    let p = 1.061_405_4;
    let p = t.mul_add(p, -1.453_152);
    let p = t.mul_add(p, 1.421_413_7);
    let p = t.mul_add(p, -0.284_496_74);
    let p = t.mul_add(p, 0.254_829_6);
    let upper_tail = 0.5 * p * t * gauss;
    let cdf = if x < 0.0 { upper_tail } else { 1.0 - upper_tail };
    (cdf, gauss * 0.398_942_3)
}

/// Where [`prefetch`] brings a cache line.
#[derive(Clone, Copy)]
pub enum Cache {
    /// What is needed next.
    First,
    /// What is needed later.
    Second,
}

/// Asks for the cache line of `data[i]`, which may lie past the end: the processor's own prefetching starts late on short
/// rows.
#[inline(always)]
pub fn prefetch(data: &[f32], i: usize, cache: Cache) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        let line = data.as_ptr().wrapping_add(i).cast();
        // SAFETY: a hint; it reads nothing and faults nowhere.
        unsafe {
            match cache {
                Cache::First => _mm_prefetch::<_MM_HINT_T0>(line),
                Cache::Second => _mm_prefetch::<_MM_HINT_T1>(line),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, i, cache);
}

/// Runs kernels that `make` builds with the registers of every instruction set that this machine has, not its best alone.
#[cfg(test)]
pub(crate) fn for_every_arch<W: pulp::WithSimd>(mut make: impl FnMut(&'static str) -> W) {
    make("scalar").with_simd(pulp::Scalar::new());
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = pulp::x86::V3::try_new() {
        let work = make("AVX2");
        avx2.vectorize(
            #[inline(always)]
            || work.with_simd(avx2),
        );
    }
    dispatch(make("best"));
}

const LANES: usize = 16;

/// `Σ a_i b_i`, summed in 16 lanes: fast, and more accurate than one running sum.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for l in 0..LANES {
            lanes[l] = x[l].mul_add(y[l], lanes[l]);
        }
    }
    sum_lanes(lanes) + a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum::<f32>()
}

/// `Σ a_i`, summed in 16 lanes.
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for x in chunks {
        for l in 0..LANES {
            lanes[l] += x[l];
        }
    }
    sum_lanes(lanes) + rest.iter().sum::<f32>()
}

#[inline(always)]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ a_i` and `Σ a_i²` in `f64`, summed in 8 lanes.
#[inline(always)]
pub fn sum_and_squares(a: &[f32]) -> (f64, f64) {
    const LANES: usize = 8;
    let (mut sum, mut square) = ([0.0f64; LANES], [0.0f64; LANES]);
    let (groups, rest) = a.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            let x = group[lane] as f64;
            sum[lane] += x;
            square[lane] += x * x;
        }
    }
    for &x in rest {
        sum[0] += x as f64;
        square[0] += x as f64 * x as f64;
    }
    (sum.iter().sum(), square.iter().sum())
}

/// Turns every `s` of the row into `e^(s - max)` and returns their sum.
#[inline(always)]
pub fn exp_weights(row: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for x in chunks {
        for l in 0..LANES {
            x[l] = exp_weight(x[l] - max);
            lanes[l] += x[l];
        }
    }
    let mut sum = sum_lanes(lanes);
    for x in rest {
        *x = exp_weight(*x - max);
        sum += *x;
    }
    sum
}

/// The largest element that is a number; -∞ if there is none.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    // Not `f32::max`, which takes three instructions.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for x in chunks {
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], x[l]);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, x| larger(m, *x))
}

/// `y += a x`.
#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// `y += x`.
#[inline(always)]
pub fn add(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `y *= a`.
#[inline(always)]
pub fn scale(a: f32, y: &mut [f32]) {
    for y in y.iter_mut() {
        *y *= a;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(low: f32, high: f32) -> impl Iterator<Item = f32> {
        (0..=20_000).map(move |i| low + (high - low) * i as f32 / 20_000.0)
    }

    #[test]
    fn exp_is_within_its_stated_error() {
        for x in grid(-87.0, 88.7) {
            let (got, want) = (exp(x) as f64, (x as f64).exp());
            assert!(((got - want) / want).abs() < 2e-7, "exp({x}) = {got}, want {want}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp_decay_is_within_its_stated_error() {
        for x in grid(-87.0, 0.0) {
            let (got, want) = (exp_decay(x) as f64, (x as f64).exp());
            let tolerance = if x > -16.0 { 3e-7 } else { 1e-6 };
            assert!(((got - want) / want).abs() < tolerance, "exp_decay({x}) = {got}, want {want}");
        }
        assert_eq!((exp_decay(0.0), exp_decay(-1e9)), (1.0, exp_decay(-87.0)));
    }

    #[test]
    fn exp_weight_is_exp_decay_but_zero_far_below_and_nan_of_nan() {
        for x in grid(-86.9, 1e-5) {
            let (got, want) = (exp_weight(x) as f64, (x as f64).exp());
            let tolerance = if x > -16.0 { 3e-7 } else { 1e-6 };
            assert!(((got - want) / want).abs() < tolerance, "exp_weight({x}) = {got}, want {want}");
        }
        assert_eq!((exp_weight(0.0), exp_weight(-87.1), exp_weight(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp_weight(f32::NAN).is_nan());
        let mut row: Vec<f32> = (0..37).map(|i| (i as f32).ln()).collect();
        assert!((exp_weights(&mut row, 2f32.ln()) - 333.0).abs() < 1e-3 && (row[36] - 18.0).abs() < 1e-4);
    }

    #[test]
    fn softplus_and_silu_follow_f64() {
        for x in grid(-80.0, 80.0) {
            let wide = x as f64;
            let want = wide.max(0.0) + (-wide.abs()).exp().ln_1p();
            assert!((softplus(x) as f64 - want).abs() <= 3e-7 * want.max(1e-30), "softplus({x})");
            let sigmoid = 1.0 / (1.0 + (-wide).exp());
            assert!((silu(x) as f64 - wide * sigmoid).abs() < 4e-7 * wide.abs().max(1.0), "silu({x})");
            let grad = sigmoid * (1.0 + wide * (1.0 - sigmoid));
            // 1 - sigmoid(x) loses its last bits to cancellation, times x.
            assert!((silu_grad(x) as f64 - grad).abs() < 2e-6, "silu_grad({x})");
        }
    }

    #[test]
    fn normal_cdf_is_the_integral_of_its_density() {
        let (mut cdf, step) = (0.0f64, 1e-4f64);
        let mut x = -9.0f64;
        while x < 9.0 {
            let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let (got_cdf, got_pdf) = normal_cdf_pdf(x as f32);
            assert!((got_cdf as f64 - cdf).abs() < 4e-7, "cdf({x}) = {got_cdf}, want {cdf}");
            assert!((got_pdf as f64 - density(x)).abs() < 1e-6, "pdf({x})");
            cdf += step / 6.0 * (density(x) + 4.0 * density(x + step / 2.0) + density(x + step));
            x += step;
        }
    }

    #[test]
    fn dot_and_sum_count_the_tail() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let squares: f32 = (0..37).map(|i| (i * i) as f32).sum();
        assert_eq!(vectorize(|| dot(&a, &a)), squares);
        assert_eq!(sum(&a), 666.0);
        assert_eq!((max(&a), max(&a[..5]), max(&[])), (36.0, 4.0, f32::NEG_INFINITY));
    }
}
