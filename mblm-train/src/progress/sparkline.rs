//! A curve in one line of text: `█▆▅▃▂▂▁▁`.

const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Points that are kept; when there are more, neighbours are merged.
const KEPT: usize = 256;

/// A series of any length in bounded memory: each point is the mean of equally many values, the last one of fewer.
#[derive(Debug)]
pub(super) struct Sparkline {
    /// Sum and number of the values of each point.
    points: Vec<(f64, u64)>,
    per_point: u64,
}

impl Sparkline {
    pub(super) fn new() -> Self {
        Sparkline { points: vec![], per_point: 1 }
    }

    pub(super) fn push(&mut self, value: f64) {
        match self.points.last_mut() {
            Some((sum, count)) if *count < self.per_point => {
                *sum += value;
                *count += 1;
            }
            _ => self.points.push((value, 1)),
        }
        if self.points.len() > KEPT {
            let merge = |pair: &[(f64, u64)]| pair.iter().fold((0.0, 0), |(sum, count), p| (sum + p.0, count + p.1));
            self.points = self.points.chunks(2).map(merge).collect();
            self.per_point *= 2;
        }
    }

    /// The whole series in at most `width` characters, from the lowest value to the highest.
    pub(super) fn draw(&self, width: usize) -> String {
        let width = width.min(self.points.len());
        let mean = |column: usize| {
            let (from, to) = (column * self.points.len() / width, (column + 1) * self.points.len() / width);
            let (sum, count) = self.points[from..to].iter().fold((0.0, 0), |(sum, count), p| (sum + p.0, count + p.1));
            sum / count as f64
        };
        let means: Vec<f64> = (0..width).map(mean).collect();
        let low = means.iter().copied().fold(f64::INFINITY, f64::min);
        let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let level = |value: &f64| LEVELS[((value - low) / (high - low).max(1e-9) * 7.0).round() as usize];
        means.iter().map(level).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(values: impl IntoIterator<Item = f64>, width: usize) -> String {
        let mut line = Sparkline::new();
        values.into_iter().for_each(|value| line.push(value));
        line.draw(width)
    }

    #[test]
    fn a_curve_is_drawn_from_its_lowest_to_its_highest() {
        assert_eq!(line([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 20), "█▇▆▅▄▃▂▁");
        assert_eq!(line([8.0, 8.0, 1.0, 1.0, 4.5, 4.5], 3), "█▁▅");
        assert_eq!(line([3.0, 3.0], 8), "▁▁");
        assert_eq!(line([], 8), "");
    }

    #[test]
    fn a_long_series_keeps_its_shape_in_little_memory() {
        let mut sparkline = Sparkline::new();
        (0..100_000).for_each(|i| sparkline.push(f64::from(100_000 - i)));
        assert!(sparkline.points.len() <= KEPT);
        assert_eq!(sparkline.points.iter().map(|point| point.1).sum::<u64>(), 100_000);
        assert_eq!(sparkline.draw(8), "█▇▆▅▄▃▂▁");
    }
}
