//! Axes: from values to places, and round numbers to mark.

use crate::report::format::{duration, si};

/// The largest number that an axis has a place for, and the smallest that is not 0: what a run's files say beyond that
/// is no measurement, and sums, squares and ratios of what lies within are finite.
pub(crate) const LARGEST: f64 = 1e30;
/// The least distance of an axis' ends, as a share of the larger one: marks between them have different digits.
const LEAST_SPAN: f64 = 1e-9;
/// Places end so far outside of the frame, in frames.
const FAR_OUTSIDE: f64 = 100.0;

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale {
    low: f64,
    high: f64,
    is_log: bool,
    unit: Unit,
}

/// What is measured, for the marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Decimals as the distance of the marks needs.
    Plain,
    /// Whole numbers.
    Whole,
    /// Metric prefixes.
    Metric,
    /// Seconds, minutes, hours.
    Time,
}

impl Scale {
    /// Equal distances for equal differences.
    pub(crate) fn linear(low: f64, high: f64, unit: Unit) -> Self {
        let (low, high) = (bounded(low), bounded(high));
        let size = low.abs().max(high.abs()).max(1e-3);
        let half = (size * 0.05).max(0.5);
        let (low, high) = if high - low >= size * LEAST_SPAN { (low, high) } else { (low - half, low + half) };
        Scale { low, high, is_log: false, unit }
    }

    /// Equal distances for equal ratios; both ends above 0.
    pub(crate) fn log(low: f64, high: f64, unit: Unit) -> Self {
        let (low, high) = (bounded(low).max(1.0 / LARGEST), bounded(high));
        let (low, high) = if high > low * 1.0001 { (low, high) } else { (low / 1.5, low * 1.5) };
        Scale { low, high, is_log: true, unit }
    }

    /// A scale that holds all values, with a margin on both sides as a share of the whole.
    pub(crate) fn around(values: impl Iterator<Item = f64>, margin: f64, is_log: bool, unit: Unit) -> Self {
        let (low, high) = values.filter(|v| v.is_finite()).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return if is_log { Scale::log(0.1, 10.0, unit) } else { Scale::linear(0.0, 1.0, unit) };
        }
        match is_log {
            true => {
                let room = (high / low).max(1.2).powf(margin);
                Scale::log(low / room, high * room, unit)
            }
            false => {
                // Around one value alone: a twentieth of it.
                let room = if high > low { (high - low) * margin } else { (low.abs() / 20.0).max(1e-9) };
                Scale::linear(low - room, high + room, unit)
            }
        }
    }

    /// The place of a value: 0 at the low end, 1 at the high one.
    pub(crate) fn place(&self, value: f64) -> f64 {
        let value = bounded(value);
        let place = match self.is_log {
            true => (value.max(1.0 / LARGEST) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        place.clamp(-FAR_OUTSIDE, FAR_OUTSIDE)
    }

    /// About `wanted` round values within the scale, with their text.
    pub(crate) fn ticks(&self, wanted: usize) -> Vec<(f64, String)> {
        let wanted = wanted.max(2);
        let is_wide = self.is_log && self.high / self.low >= 10.0;
        let values = match (self.is_log, self.unit) {
            (true, _) if is_wide => log_ticks(self.low, self.high, wanted),
            (false, Unit::Time) => steps(self.low, self.high, time_step((self.high - self.low) / wanted as f64)),
            (false, Unit::Whole) => {
                steps(self.low, self.high, round_step((self.high - self.low) / wanted as f64).max(1.0))
            }
            _ => steps(self.low, self.high, round_step((self.high - self.low) / wanted as f64)),
        };
        let step = values.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::MAX, f64::min);
        values.into_iter().map(|value| (value, self.text(value, step))).collect()
    }

    fn text(&self, value: f64, step: f64) -> String {
        match self.unit {
            Unit::Metric => metric(value, step),
            Unit::Time if value == 0.0 => "0".into(),
            Unit::Time if value >= 1.0 => duration(value).replace(".0 s", " s"),
            Unit::Time | Unit::Plain | Unit::Whole => {
                format!("{value:.*}", (-step.log10().floor()).clamp(0.0, 9.0) as usize)
            }
        }
    }
}

fn bounded(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { value.clamp(-LARGEST, LARGEST) }
}

/// The highest of `values` that is no outlier: one that lies so far above the lower two thirds that these would be pressed
/// together if all were shown.
pub(crate) fn ceiling(values: impl Iterator<Item = f64>) -> f64 {
    const FAR: f64 = 2.5;
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let (Some(low), Some(two_thirds)) = (values.first(), values.get(values.len().saturating_sub(1) * 2 / 3)) else {
        return f64::MAX;
    };
    let limit = two_thirds + FAR * (two_thirds - low);
    match values.len() {
        0..3 => f64::MAX,
        _ => values.iter().copied().rfind(|value| *value <= limit).unwrap_or(f64::MAX),
    }
}

/// A value with a metric prefix and as many digits as tell it from one that is `step` away.
fn metric(value: f64, step: f64) -> String {
    if value < 1000.0 || step <= 0.0 {
        return si(value);
    }
    let prefixes = ["k", "M", "G", "T", "P", "E"];
    let power = ((value.log10() + 1e-9) / 3.0).floor().clamp(1.0, prefixes.len() as f64);
    let unit = 1000f64.powf(power);
    let decimals = (-(step / unit).log10().floor()).clamp(0.0, 9.0) as usize;
    let digits = format!("{:.decimals$}", value / unit);
    let digits = if decimals > 0 { digits.trim_end_matches('0').trim_end_matches('.') } else { &digits };
    format!("{digits} {}", prefixes[power as usize - 1])
}

/// 1, 2 or 5 times a power of ten: the next that is at least `at_least`.
fn round_step(at_least: f64) -> f64 {
    let power = 10f64.powf(at_least.log10().floor());
    let multiple = [1.0, 2.0, 5.0].into_iter().find(|m| m * power >= at_least * 0.999);
    multiple.unwrap_or(10.0) * power
}

fn time_step(at_least: f64) -> f64 {
    const ROUND: [f64; 16] =
        [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 21_600.0];
    match at_least {
        short if short < 1.0 => round_step(short),
        // Twelve hours, a day, and so on.
        long if long > 21_600.0 => 43_200.0 * round_step(long / 43_200.0).max(1.0),
        _ => ROUND.into_iter().find(|&step| step >= at_least).unwrap_or(21_600.0),
    }
}

/// The multiples of `step` within bounds.
fn steps(low: f64, high: f64, step: f64) -> Vec<f64> {
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Powers of ten, and 2 and 5 times these where there is room.
fn log_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let decades = (high / low).log10();
    let multiples: &[f64] = match wanted as f64 / decades {
        room if room >= 2.5 => &[1.0, 2.0, 5.0],
        room if room >= 1.5 => &[1.0, 3.0],
        _ => &[1.0],
    };
    let every = ((decades / wanted as f64).ceil() as i32).max(1);
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let powers = (first..=last).filter(|power| power.rem_euclid(every) == 0);
    let values = powers.flat_map(|power| multiples.iter().map(move |m| m * 10f64.powi(power)));
    values.filter(|v| (low * 0.999..=high * 1.001).contains(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(scale: Scale, wanted: usize) -> Vec<String> {
        scale.ticks(wanted).into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn marks_are_round() {
        assert_eq!(texts(Scale::linear(0.0, 2e6, Unit::Metric), 4), ["0", "500 k", "1 M", "1.5 M", "2 M"]);
        assert_eq!(texts(Scale::linear(190_200.0, 191_300.0, Unit::Metric), 3), ["190.5 k", "191 k"]);
        assert_eq!(texts(Scale::linear(1.93, 2.31, Unit::Plain), 4), ["2.0", "2.1", "2.2", "2.3"]);
        assert_eq!(texts(Scale::linear(1.0, 4.0, Unit::Whole), 6), ["1", "2", "3", "4"]);
        assert_eq!(texts(Scale::linear(0.0, 100.0, Unit::Time), 4), ["0", "30 s", "1 min", "1 min 30 s"]);
        assert_eq!(texts(Scale::linear(0.0, 7200.0, Unit::Time), 4), ["0", "30 min", "1 h", "1 h 30 min", "2 h"]);
        assert_eq!(texts(Scale::linear(0.0, 2.0, Unit::Time), 4), ["0", "0.5", "1 s", "1.5 s", "2 s"]);
        assert_eq!(texts(Scale::log(900.0, 40_000.0, Unit::Metric), 6), ["1 k", "2 k", "5 k", "10 k", "20 k"]);
        assert_eq!(texts(Scale::log(1e-3, 1e5, Unit::Metric), 4).len(), 4, "every second power of ten");
        assert_eq!(texts(Scale::log(100.0, 180.0, Unit::Metric), 4), ["100", "120", "140", "160", "180"]);
    }

    #[test]
    fn outliers_are_left_out() {
        assert_eq!(ceiling([1.36, 1.41, 1.37, 1.38, 1.75, 1.39].into_iter()), 1.41);
        assert_eq!(ceiling([1.0, 2.0, 3.0, 4.0, f64::NAN].into_iter()), 4.0);
        assert_eq!(ceiling([1.0, 9.0].into_iter()), f64::MAX, "of two none is an outlier");
        assert_eq!(ceiling([2.0, 2.0, 2.0, 8.0].into_iter()), 2.0);
    }

    #[test]
    fn no_number_makes_an_axis_without_end() {
        let tiny = f64::MIN_POSITIVE;
        let extremes = [0.0, 1e-300, tiny, -1.0, 1.0, 1e15, 1e15 + 0.125, 1e30, 1e308, -1e308, f64::INFINITY, f64::NAN];
        for (low, high) in extremes.iter().flat_map(|low| extremes.map(|high| (*low, high))) {
            for unit in [Unit::Plain, Unit::Whole, Unit::Metric, Unit::Time] {
                let around = |is_log| Scale::around([low, high].into_iter(), 0.1, is_log, unit);
                for scale in [Scale::linear(low, high, unit), Scale::log(low, high, unit), around(false), around(true)]
                {
                    let span = (scale.high - scale.low) / scale.low.abs().max(scale.high.abs());
                    assert!(span >= LEAST_SPAN / 2.0 && scale.high.is_finite(), "{low} to {high}: {scale:?}");
                    let ticks = scale.ticks(6);
                    assert!(ticks.len() <= 30, "{low} to {high}: {} marks", ticks.len());
                    assert!(ticks.windows(2).all(|pair| pair[0].0 < pair[1].0), "{low} to {high}: {ticks:?}");
                    let places = [low, high].map(|value| scale.place(value));
                    assert!(places.iter().all(|place| place.is_finite()), "{low} to {high}: {places:?}");
                }
            }
        }
    }

    #[test]
    fn places_lie_between_the_ends() {
        let log = Scale::log(10.0, 1000.0, Unit::Metric);
        assert!((log.place(100.0) - 0.5).abs() < 1e-12 && log.place(10.0) == 0.0);
        assert_eq!(Scale::linear(2.0, 4.0, Unit::Plain).place(3.5), 0.75);
        for is_log in [false, true] {
            for values in [vec![3.0], vec![3.0, 3.0], vec![], vec![f64::NAN, 5.0], vec![1.0, 9.0]] {
                let scale = Scale::around(values.iter().copied(), 0.1, is_log, Unit::Plain);
                let places: Vec<f64> = values.iter().filter(|v| v.is_finite()).map(|v| scale.place(*v)).collect();
                assert!(places.iter().all(|p| (0.0..=1.0).contains(p)), "{values:?}: {places:?}");
                assert!(scale.ticks(4).iter().all(|(tick, _)| tick.is_finite()), "{values:?}");
            }
        }
    }
}
