//! Charts of lines: what changes in training (learning curves, gradient norms), and bits by place in the patch.

use mblm_train::journal::metrics::Kind;

use super::scale::{Scale, Unit, ceiling};
use super::svg::{COLOURS, Format, Margins, Svg, colour, escape, fitting, path, spread_labels, thinned};
use crate::report::format::{duration, with_unit};
use crate::report::variant::{Axis, CurvePoint, Variant};

/// Points of a curve, at most; on a phone; and where a curve only feels the pointer.
const MAX_POINTS: usize = 120;
const MAX_NARROW_POINTS: usize = 60;
const MAX_HIT_POINTS: usize = 16;
/// Dots of a chart, at most: beyond, curves go without.
const MAX_DOTS: usize = 600;
/// Curves with labels beside them, at most: beyond, the best alone have one.
pub(super) const MAX_LABELS: usize = 14;
/// Training losses are averaged over this share of a curve on either side.
const SMOOTHING: f64 = 0.02;
/// Curves are shown from here on; what lies before is high and says little.
const SHOWN_FROM: f64 = 0.2;
pub(super) const LABEL_WIDTH: f64 = 212.0;

impl Axis {
    pub(crate) const ALL: [Axis; 3] = [Axis::Bytes, Axis::Flops, Axis::Seconds];

    /// Its part in names of files.
    pub(crate) fn id(self) -> &'static str {
        match self {
            Axis::Bytes => "bytes",
            Axis::Flops => "flops",
            Axis::Seconds => "seconds",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Axis::Bytes => "training bytes",
            Axis::Flops => "training FLOPs",
            Axis::Seconds => "time since the start",
        }
    }

    fn unit(self) -> Unit {
        match self {
            Axis::Seconds => Unit::Time,
            _ => Unit::Metric,
        }
    }

    fn text(self, value: f64) -> String {
        match self {
            Axis::Bytes => with_unit(value, "B"),
            Axis::Flops => with_unit(value, "FLOP"),
            Axis::Seconds => duration(value),
        }
    }
}

/// A curve to draw.
struct Series<'a> {
    rank: usize,
    variant: &'a Variant,
    points: Vec<CurvePoint>,
}

/// Learning curves. None if no variant has points.
pub(crate) fn curves(variants: &[Variant], kind: Kind, axis: Axis, format: Format) -> Option<Svg> {
    let series = all_series(variants, kind == Kind::Train, |variant| variant.curve(kind, axis));
    let what = if kind == Kind::Train { "training (smoothed)" } else { "validation" };
    let title = format!("Bits per byte in {what} against {}", axis.name());
    let chart = LineChart {
        id: format!("curves-{}-{}", kind.name(), axis.id()),
        title: &title,
        x_name: axis.name(),
        y_name: &format!("bits per byte in {what}"),
        x_unit: axis.unit(),
        x_from: 0.0,
        is_log: false,
        is_steep: true,
        text: &|point| format!("{:.3} bits per byte after {}", point.mean, axis.text(point.x)),
    };
    (!series.is_empty()).then(|| chart.draw(&series, format))
}

/// Gradient norms of a stage, from 0. None if no variant has them.
pub(crate) fn gradients(variants: &[Variant], stage: usize, format: Format) -> Option<Svg> {
    let series = all_series(variants, true, |variant| variant.gradients(stage));
    let title = format!("Gradient norm of stage {} against training bytes", stage + 1);
    let chart = LineChart {
        id: format!("gradients-{stage}"),
        title: &title,
        x_name: Axis::Bytes.name(),
        y_name: &format!("gradient norm of stage {} (smoothed)", stage + 1),
        x_unit: Unit::Metric,
        x_from: 0.0,
        is_log: true,
        is_steep: false,
        text: &|point| format!("gradient norm {:.3} after {}", point.mean, Axis::Bytes.text(point.x)),
    };
    (!series.is_empty()).then(|| chart.draw(&series, format))
}

/// Bits by the byte's place in the innermost patch. None if no variant has patches of several bytes.
pub(crate) fn places(variants: &[Variant], format: Format) -> Option<Svg> {
    let series = all_series(variants, false, Variant::place_bits);
    let chart = LineChart {
        id: "places".into(),
        title: "Bits by the byte's position in the innermost patch",
        x_name: "byte of the patch",
        y_name: "mean bits of a byte",
        x_unit: Unit::Whole,
        x_from: 1.0,
        is_log: false,
        is_steep: false,
        text: &|point| format!("{:.3} bits for byte {} of a patch", point.mean, point.x),
    };
    series.iter().any(|series| series.points.len() > 1).then(|| chart.draw(&series, format))
}

/// Worst first, so that the best lie on top.
fn all_series(variants: &[Variant], is_smooth: bool, of: impl Fn(&Variant) -> Vec<CurvePoint>) -> Vec<Series<'_>> {
    let series = variants.iter().enumerate().map(|(rank, variant)| {
        let points = of(variant);
        let kept = thinned(&(0..points.len()).collect::<Vec<_>>(), MAX_POINTS);
        // Only what is drawn is smoothed: the work grows with the points, not with their square.
        let point = |i| if is_smooth { smooth(&points, i) } else { points[i] };
        Series { rank, variant, points: kept.into_iter().map(point).collect() }
    });
    let mut series: Vec<Series> = series.filter(|series| !series.points.is_empty()).collect();
    series.reverse();
    series
}

/// Point `i`, as the mean of its neighbours.
fn smooth(points: &[CurvePoint], i: usize) -> CurvePoint {
    let reach = (points.len() as f64 * SMOOTHING).ceil() as usize;
    // As many on both sides, so that the ends are not drawn towards the middle.
    let reach = reach.min(i).min(points.len() - 1 - i);
    let near = &points[i - reach..=i + reach];
    let of = |value: fn(&CurvePoint) -> f64| near.iter().map(value).sum::<f64>() / near.len() as f64;
    CurvePoint { x: points[i].x, mean: of(|p| p.mean), min: of(|p| p.min), max: of(|p| p.max) }
}

/// A chart of lines over a common axis.
struct LineChart<'a> {
    id: String,
    title: &'a str,
    x_name: &'a str,
    y_name: &'a str,
    x_unit: Unit,
    /// Where the axis along begins.
    x_from: f64,
    is_log: bool,
    /// Whether the curves begin with a steep part that is not shown.
    is_steep: bool,
    /// A point in words.
    text: &'a dyn Fn(&CurvePoint) -> String,
}

impl LineChart<'_> {
    fn draw(&self, series: &[Series], format: Format) -> Svg {
        let (height, right) = match format {
            Format::Wide => (440.0, LABEL_WIDTH),
            Format::Narrow => (300.0, 12.0),
        };
        let margins = Margins { left: 52.0, right, top: 30.0, bottom: 48.0 };
        let mut svg = Svg::new(self.title, format.width(), height, margins);
        let last = series.iter().filter_map(|s| s.points.last()).map(|point| point.x).fold(0.0, f64::max);
        let x = Scale::linear(self.x_from, last, self.x_unit);
        let y = self.heights(series, last);
        let ticks = if self.x_unit == Unit::Whole { Format::Wide.ticks() } else { format.ticks() };
        svg.axes((&x, self.x_name), (&y, self.y_name), ticks);
        let dots: usize = series.iter().map(|series| series.points.len()).sum();
        let has_dots = format == Format::Wide && !self.is_log && dots <= MAX_DOTS;
        let drawn = |one| self.series(&svg, one, (&x, &y), format, has_dots && is_labelled(series, one));
        let inside: String = series.iter().map(drawn).collect();
        svg.clipped(&format!("{}-{format:?}", self.id), &inside);
        if format == Format::Wide {
            let end = |one: &&Series| one.points.last().map(|point| (x.place(point.x), y.place(point.mean)));
            let labelled = series.iter().filter(|one| is_labelled(series, one));
            let ends = labelled.filter_map(|one| {
                Some(End { rank: one.rank, colour: one.rank, name: &one.variant.name, at: end(&one)? })
            });
            label_ends(&mut svg, &ends.collect::<Vec<_>>(), "");
        }
        svg
    }

    /// From the lowest value to the highest, of what comes after the first steep part; a curve that lies far above the
    /// others leaves the frame.
    fn heights(&self, series: &[Series], last: f64) -> Scale {
        let shown = |series: &Series| -> Vec<f64> {
            let late = series.points.iter().filter(|point| !self.is_steep || point.x >= SHOWN_FROM * last);
            late.chain(series.points.last()).flat_map(|point| [point.min, point.max]).collect()
        };
        let most = ceiling(series.iter().map(|series| shown(series).into_iter().fold(f64::MIN, f64::max)));
        let unit = if self.is_log { Unit::Metric } else { Unit::Plain };
        let values = series.iter().flat_map(shown).filter(|value| *value <= most || self.is_log);
        Scale::around(values, 0.06, self.is_log, unit)
    }

    fn series(&self, svg: &Svg, series: &Series, (x, y): (&Scale, &Scale), format: Format, has_dots: bool) -> String {
        let at = |px: f64, py: f64| (svg.x(x.place(px)), svg.y(y.place(py)));
        let most = if format == Format::Wide { MAX_POINTS } else { MAX_NARROW_POINTS };
        // Those without a colour are many and thin.
        let most = if series.rank < COLOURS { most } else { most / 3 };
        let points = &thinned(&series.points, most);
        let line = path(points.iter().map(|p| at(p.x, p.mean)));
        let name = &series.variant.name;
        let ended = points.last().map_or(String::new(), |point| (self.text)(point));
        let mut group = format!(
            "<g class=\"s {}\" data-v=\"{}\"><title>{}</title>",
            colour(series.rank),
            series.rank,
            escape(&format!("{name}: {ended}"))
        );
        // Without a colour of its own, a band would be lost among the others.
        if series.variant.counted().len() > 1 && series.rank < COLOURS {
            let around = points.iter().map(|p| at(p.x, p.max)).chain(points.iter().rev().map(|p| at(p.x, p.min)));
            group += &format!("<path class=\"band\" d=\"{}Z\"/>", path(around));
        }
        let hit = path(thinned(points, MAX_HIT_POINTS).iter().map(|p| at(p.x, p.mean)));
        group += &format!("<path class=\"curve\" d=\"{line}\"/><path class=\"hit\" d=\"{hit}\"/>");
        if has_dots {
            for point in points {
                let (cx, cy) = at(point.x, point.mean);
                let title = escape(&format!("{name}: {}", (self.text)(point)));
                group += &format!(
                    "<circle class=\"dot\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\"><title>{title}</title></circle>"
                );
            }
        }
        if let (Some(last), true) = (points.last(), series.variant.counted().is_empty()) {
            let (cx, cy) = at(last.x, last.mean);
            group += &format!("<path class=\"curve\" d=\"M{:.1} {:.1}l10 10m0 -10l-10 10\"/>", cx - 5.0, cy - 5.0);
        }
        group + "</g>\n"
    }
}

/// Whether a curve has a label beside it.
fn is_labelled(all: &[Series], one: &Series) -> bool {
    all.len() <= MAX_LABELS || one.rank < COLOURS
}

/// The end of a curve, beside which a name is written.
pub(super) struct End<'a> {
    pub(super) rank: usize,
    /// The number of its colour.
    pub(super) colour: usize,
    pub(super) name: &'a str,
    /// Its place, as a share of the axis along and of that up; above 1 it is outside of the frame.
    pub(super) at: (f64, f64),
}

/// Names beside the ends of curves. `mark` is put before the rank where curves are not those of the ranked variants.
pub(super) fn label_ends(svg: &mut Svg, ends: &[End], mark: &str) {
    let places: Vec<(f64, f64)> = ends.iter().map(|end| (svg.x(end.at.0), svg.y(end.at.1.clamp(0.0, 1.0)))).collect();
    let wanted: Vec<f64> = places.iter().map(|place| place.1).collect();
    let spread = spread_labels(&wanted, svg.y(1.0), svg.y(0.0));
    let label = svg.x(1.0) + 16.0;
    for ((End { rank, colour: number, name, at }, (x, y)), place) in ends.iter().zip(places).zip(spread) {
        svg.add(&format!("<g class=\"s {}\" data-v=\"{mark}{rank}\">", colour(*number)));
        svg.add(&format!("<path class=\"lead\" d=\"M{:.1} {y:.1}L{:.1} {place:.1}\"/>", x + 5.0, label - 3.0));
        let name = fitting(name, LABEL_WIDTH - 44.0);
        svg.text(label, place + 4.0, "start", "label", &if at.1 > 1.0 { format!("{name} ↑") } else { name });
        svg.add("</g>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::charts::tests::variants;

    #[test]
    fn every_variant_has_its_curve_and_the_best_a_colour() {
        for (n, labels) in [(1, 1), (14, 14), (30, 8)] {
            let text = curves(&variants(n), Kind::Valid, Axis::Bytes, Format::Wide).unwrap().inline("");
            assert_eq!(text.matches("class=\"curve\"").count(), n);
            assert_eq!(text.matches("class=\"label\"").count(), labels);
            assert_eq!(text.matches("<g class=\"s c").count(), 2 * n.min(8), "a curve and a label each");
            assert!(text.contains("v&lt;0&gt;: 2.000 bits per byte after 1.00 kB") && !text.contains("v<"), "escaped");
        }
        assert!(curves(&variants(3), Kind::Valid, Axis::Flops, Format::Wide).is_none(), "no cost is known");
        assert!(curves(&variants(3), Kind::Train, Axis::Bytes, Format::Narrow).is_none());
        assert!(gradients(&variants(3), 0, Format::Wide).is_none());
    }

    #[test]
    fn the_steep_beginning_is_cut_off() {
        let text = curves(&variants(2), Kind::Valid, Axis::Bytes, Format::Wide).unwrap().inline("");
        assert!(text.contains(">2.15</text>") && !text.contains(">4</text>"), "{text}");
        assert!(
            curves(&variants(2), Kind::Valid, Axis::Seconds, Format::Wide).unwrap().inline("").contains("time since")
        );
    }

    #[test]
    fn smoothing_keeps_length_and_ends() {
        let points: Vec<CurvePoint> =
            (0..100).map(|i| CurvePoint { x: f64::from(i), mean: f64::from(i % 2), min: 0.0, max: 1.0 }).collect();
        assert_eq!((smooth(&points, 0), smooth(&points, 99)), (points[0], points[99]));
        assert!((smooth(&points, 50).mean - 0.5).abs() < 0.11, "{:?}", smooth(&points, 50));
        let variants = [crate::report::variant::tests::variant("v", vec![])];
        let long: Vec<CurvePoint> = points.iter().copied().cycle().take(100_000).collect();
        let asked = std::cell::Cell::new(0);
        let series = all_series(&variants, true, |_| {
            asked.set(asked.get() + 1);
            long.clone()
        });
        assert_eq!((series[0].points.len(), asked.get()), (MAX_POINTS, 1));
    }
}
