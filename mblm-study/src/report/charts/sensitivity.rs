//! Loss against a field that was tuned: how sensitive each variant is, and where its best value lies.

use super::lines::{End, LABEL_WIDTH, MAX_LABELS, label_ends};
use super::scale::{Scale, Unit, ceiling};
use super::svg::{COLOURS, Format, Margins, Svg, colour, escape, path};
use crate::report::tuning::{Tuned, TunedVariant, value_text};

/// Crosses of one value that are drawn below each other.
const MAX_CROSSES: usize = 12;

/// The chart of a field. None if no try of it ended with a loss.
pub(crate) fn sensitivity(tuned: &Tuned, id: &str, format: Format) -> Option<Svg> {
    let tries = || tuned.variants.iter().flat_map(|variant| &variant.tries);
    let losses: Vec<f64> = tries().filter_map(|tried| tried.bpb).collect();
    if losses.is_empty() {
        return None;
    }
    let (height, right) = match format {
        Format::Wide => (400.0, LABEL_WIDTH),
        Format::Narrow => (320.0, 12.0),
    };
    let margins = Margins { left: 52.0, right, top: 34.0, bottom: 62.0 };
    let title = format!("Bits per byte against {}", tuned.field);
    let mut svg = Svg::new(&title, format.width(), height, margins);
    let values = || tries().map(|tried| tried.value);
    // A value of 0 has no place on a logarithmic axis.
    let x = Scale::around(values(), 0.06, values().all(|value| value > 0.0), Unit::Metric);
    let most = ceiling(losses.iter().copied());
    let has_outside = tries().any(|tried| tried.bpb.is_none_or(|bpb| bpb > most));
    let room = if has_outside { 0.18 } else { 0.08 };
    let y = Scale::around(losses.into_iter().filter(|bpb| *bpb <= most), room, false, Unit::Plain);
    svg.axes((&x, &tuned.field), (&y, "bits per byte in validation"), format.ticks());
    let mut chart = Drawing { x, y, most, mark: tuned.mark(), crosses: vec![] };
    // Worst first, so that the best lie on top.
    let inside: String =
        tuned.variants.iter().enumerate().rev().map(|(i, variant)| chart.series(&svg, i, variant)).collect();
    svg.clipped(&format!("{id}-{format:?}"), &inside);
    legend(&mut svg, tries().any(|tried| tried.bpb.is_none()));
    if format == Format::Wide {
        let end = |variant: &TunedVariant| {
            let (value, bpb) = variant.finite().last().copied()?;
            Some((chart.x.place(value), chart.y.place(bpb)))
        };
        let labelled = if tuned.variants.len() <= MAX_LABELS { MAX_LABELS } else { COLOURS };
        let ends = tuned.variants.iter().enumerate().take(labelled);
        let ends: Vec<End> = ends
            .filter_map(|(rank, variant)| Some(End { rank, colour: rank, name: &variant.name, at: end(variant)? }))
            .collect();
        label_ends(&mut svg, &ends, tuned.mark());
    }
    Some(svg)
}

struct Drawing<'a> {
    x: Scale,
    y: Scale,
    /// What lies above leaves the frame.
    most: f64,
    mark: &'a str,
    /// How many crosses each place along has.
    crosses: Vec<(f64, usize)>,
}

impl Drawing<'_> {
    fn series(&mut self, svg: &Svg, rank: usize, variant: &TunedVariant) -> String {
        let name = &variant.name;
        let (colour, mark, title) = (colour(rank), self.mark, escape(name));
        let mut group = format!("<g class=\"s {colour}\" data-v=\"{mark}{rank}\"><title>{title}</title>");
        let at = |(value, bpb): (f64, f64)| (svg.x(self.x.place(value)), svg.y(self.y.place(bpb)));
        let line = path(variant.finite().into_iter().map(at));
        group += &format!("<path class=\"curve\" d=\"{line}\"/><path class=\"hit\" d=\"{line}\"/>");
        for (value, bpb) in variant.finite() {
            let is_chosen = variant.chosen == Some(value);
            let chosen = if is_chosen { ", chosen" } else { "" };
            let title = escape(&format!("{name}: {bpb:.3} bits per byte with {}{chosen}", value_text(value)));
            let (cx, cy) = at((value, bpb));
            group += &match bpb > self.most {
                true => format!("<path class=\"dot\" d=\"M{:.1} {:.1}h12l-6 -9z\">", cx - 6.0, svg.y(1.0) + 12.0),
                false => format!("<circle class=\"dot\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\">"),
            };
            group += &format!("<title>{title}</title>{}", if bpb > self.most { "</path>" } else { "</circle>" });
            if is_chosen {
                group += &format!("<circle class=\"chosen\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"7.5\"/>");
            }
        }
        for value in variant.failed() {
            let cx = svg.x(self.x.place(value));
            let cy = svg.y(1.0) + 8.0 + 12.0 * (self.crosses_at(cx) % MAX_CROSSES) as f64;
            let title = escape(&format!("{name}: failed with {}", value_text(value)));
            group += &format!("{}<title>{title}</title></path>", cross(cx, cy));
        }
        group + "</g>\n"
    }

    /// How many crosses there are at a place along already; one more is counted.
    fn crosses_at(&mut self, x: f64) -> usize {
        match self.crosses.iter_mut().find(|(other, _)| (other - x).abs() < 4.0) {
            Some((_, count)) => {
                *count += 1;
                *count - 1
            }
            None => {
                self.crosses.push((x, 1));
                0
            }
        }
    }
}

/// A cross, as an element that is not closed.
fn cross(x: f64, y: f64) -> String {
    format!("<path class=\"cross\" d=\"M{:.1} {:.1}l8 8m0 -8l-8 8\">", x - 4.0, y - 4.0)
}

/// What the marks mean, below the axis.
fn legend(svg: &mut Svg, has_failures: bool) {
    let (left, y) = (svg.margins.left, svg.height - 8.0);
    svg.add(&format!("<circle class=\"chosen\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"7.5\"/>", left + 6.0, y - 4.0));
    svg.text(left + 20.0, y, "start", "tick", "chosen");
    if has_failures {
        svg.add(&format!("{}</path>", cross(left + 88.0, y - 4.0)));
        svg.text(left + 98.0, y, "start", "tick", "failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tuning::tests::tuned;

    fn part(variants: Vec<TunedVariant>) -> Tuned {
        Tuned { field: "train.<rate>".into(), seeds: vec![1000], share: 1.0, is_ranked: true, variants }
    }

    #[test]
    fn every_try_has_a_mark() {
        let variants = vec![
            tuned("v<0>", &[(0.001, Some(2.5)), (0.002, Some(2.2)), (0.004, Some(2.4)), (0.008, None)]),
            tuned("v<1>", &[(0.001, Some(2.6)), (0.002, Some(2.4)), (0.004, Some(99.0)), (0.008, None)]),
        ];
        for format in [Format::Wide, Format::Narrow] {
            let text = sensitivity(&part(variants.clone()), "tuning-1", format).unwrap().inline("");
            assert_eq!(text.matches("class=\"curve\"").count(), 2);
            assert_eq!(text.matches("<circle class=\"dot\"").count(), 5);
            assert_eq!(text.matches("<path class=\"dot\"").count(), 1, "what lies far above is an arrow");
            assert_eq!(text.matches("class=\"cross\"").count(), 2 + 1, "one is the legend's");
            assert_eq!(text.matches("class=\"chosen\"").count(), 2 + 1);
            assert!(text.contains("v&lt;1&gt;: failed with 0.008") && !text.contains("v<"), "{text}");
            assert!(text.contains(">0.002</text>"), "{text}");
        }
    }

    #[test]
    fn what_has_no_logarithm_is_drawn_too() {
        let text = sensitivity(&part(vec![tuned("a", &[(0.0, Some(2.5)), (0.1, Some(2.2))])]), "t", Format::Wide);
        let text = text.unwrap().inline("");
        assert!(!text.contains("NaN") && !text.contains("failed"), "{text}");
        assert!(sensitivity(&part(vec![tuned("a", &[(0.1, None)])]), "t", Format::Wide).is_none());
    }
}
