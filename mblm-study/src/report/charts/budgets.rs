//! A scaling study against the budget: the loss at the best size, and how far each variant lies above the first.

use super::lines::{End, LABEL_WIDTH, MAX_LABELS, label_ends};
use super::scale::{Scale, Unit};
use super::sizes::diamond;
use super::svg::{COLOURS, Format, Margins, Svg, colour, escape, fitting, path};
use crate::report::format::flop;
use crate::report::scaling::{Above, Crossing, Scaling};

/// Put before the numbers of variants, which are not those of the ranking.
const MARK: &str = "s";
/// Points of a curve that is drawn.
const STEPS: usize = 25;
/// Intervals of different variants under one budget are drawn side by side, so far apart.
const APART: f64 = 7.0;

/// The loss at the best size against the budget, with the power laws and their intervals.
pub(crate) fn losses(scaling: &Scaling, id: &str, format: Format) -> Svg {
    let chart = Chart::new(scaling, format);
    let budgets = scaling.between(STEPS);
    let all = || (0..scaling.variants.len()).flat_map(|v| (0..scaling.budgets.len()).map(move |b| (v, b)));
    let means = all().filter_map(|(v, b)| Some(scaling.best(v, b)?.loss));
    let ends = all().filter_map(|(v, b)| scaling.best_interval(v, b)).flat_map(|(low, high)| [low, high]);
    let y = Scale::around(means.chain(ends), 0.08, true, Unit::Plain);
    let mut svg =
        chart.frame("Bits per byte at the best size against the budget", &y, "bits per byte at the best size");
    let place = |budget: f64, loss: f64| (svg.x(chart.x.place(budget)), svg.y(y.place(loss)));
    let mut inside = String::new();
    for v in (0..scaling.variants.len()).rev() {
        let law: Vec<(f64, f64)> =
            budgets.iter().filter_map(|budget| Some(place(*budget, scaling.fits[v].loss_at(*budget)?))).collect();
        let band: Vec<(f64, (f64, f64))> =
            budgets.iter().filter_map(|budget| Some((*budget, scaling.law_interval(v, *budget)?))).collect();
        let mut group = String::new();
        if !band.is_empty() {
            let (low, high) =
                (band.iter().map(|(x, i)| place(*x, i.0)), band.iter().rev().map(|(x, i)| place(*x, i.1)));
            group += &format!("<path class=\"band\" d=\"{}Z\"/>", path(low.chain(high)));
        }
        group += &match law.is_empty() {
            false => {
                format!("<path class=\"curve\" d=\"{0}\"/><path class=\"hit\" d=\"{0}\"/>", path(law.iter().copied()))
            }
            true => chart.without_law(v, &place),
        };
        // Bars of several variants must not cover each other; on a line, there are none.
        let aside = if law.is_empty() { aside(v, scaling.variants.len()) } else { 0.0 };
        for (b, budget) in scaling.budgets.iter().enumerate() {
            let Some(best) = scaling.best(v, b) else { continue };
            let title = format!("{}: {:.3} bits per byte under {}", scaling.variants[v].name, best.loss, flop(*budget));
            let (x, y) = place(*budget, best.loss);
            group += &mark((x + aside, y), best.parabola.is_ok(), &title);
        }
        inside += &chart.group(v, &group);
    }
    svg.clipped(&format!("{id}-{format:?}"), &inside);
    chart.labels(&mut svg, 0, |v| {
        let last = *scaling.budgets.last()?;
        let loss =
            scaling.fits[v].loss_at(last).or(scaling.best(v, scaling.budgets.len() - 1).map(|best| best.loss))?;
        Some((chart.x.place(last), y.place(loss)))
    });
    svg
}

/// How far each variant lies above the first against the budget. None without a difference.
pub(crate) fn differences(scaling: &Scaling, id: &str, format: Format) -> Option<Svg> {
    let chart = Chart::new(scaling, format);
    let others = 1..scaling.variants.len();
    let above: Vec<(usize, usize, Above)> = others
        .clone()
        .flat_map(|v| (0..scaling.budgets.len()).map(move |b| (v, b)))
        .filter_map(|(v, b)| Some((v, b, scaling.above_first(v, b)?)))
        .collect();
    if above.is_empty() {
        return None;
    }
    let ends = above.iter().flat_map(|(_, _, above)| {
        let (low, high) = above.interval.unwrap_or((above.mean, above.mean));
        [low, high, above.mean]
    });
    let y = Scale::around(ends.chain([0.0]), 0.1, false, Unit::Plain);
    let first = &scaling.variants[0].name;
    let width = if format == Format::Wide { 700.0 } else { 350.0 };
    let y_name = fitting(&format!("bits per byte above {first}"), width);
    let mut svg = chart.frame(&format!("Difference to {first} against the budget"), &y, &y_name);
    let place = |budget: f64, loss: f64| (svg.x(chart.x.place(budget)), svg.y(y.place(loss)));
    let (left, right, zero) = (svg.x(0.0), svg.x(1.0), svg.y(y.place(0.0)));
    let mut inside = format!("<path class=\"axis\" d=\"M{left:.1} {zero:.1}H{right:.1}\"/>");
    for v in others.clone().rev() {
        let law = scaling.between(STEPS).into_iter().filter_map(|x| Some(place(x, scaling.law_above_first(v, x)?)));
        let law = path(law);
        let mut group = format!("<path class=\"curve\" d=\"{law}\"/><path class=\"hit\" d=\"{law}\"/>");
        for (_, b, above) in above.iter().filter(|(other, _, _)| *other == v) {
            group += &chart.above(v, *b, above, &place);
        }
        if let Some(Crossing { budget, is_inside: true }) = scaling.crossing(v) {
            let (x, y) = place(budget, 0.0);
            let title = escape(&format!("{} and {first} cross at {}", scaling.variants[v].name, flop(budget)));
            group += &format!(
                "<path class=\"cross\" d=\"M{:.1} {:.1}l12 12m0 -12l-12 12\"><title>{title}</title></path>",
                x - 6.0,
                y - 6.0
            );
        }
        inside += &chart.group(v, &group);
    }
    svg.clipped(&format!("{id}-{format:?}"), &inside);
    chart.labels(&mut svg, 1, |v| {
        let last = *scaling.budgets.last()?;
        let b = scaling.budgets.len() - 1;
        let above = scaling.law_above_first(v, last).or(scaling.above_first(v, b).map(|above| above.mean))?;
        Some((chart.x.place(last), y.place(above)))
    });
    Some(svg)
}

/// What both charts have in common.
struct Chart<'a> {
    scaling: &'a Scaling,
    format: Format,
    x: Scale,
}

impl<'a> Chart<'a> {
    fn new(scaling: &'a Scaling, format: Format) -> Self {
        Chart { scaling, format, x: Scale::around(scaling.budgets.iter().copied(), 0.06, true, Unit::Metric) }
    }

    fn frame(&self, title: &str, y: &Scale, y_name: &str) -> Svg {
        let (height, right) = match self.format {
            Format::Wide => (400.0, LABEL_WIDTH),
            Format::Narrow => (300.0, 12.0),
        };
        let margins = Margins { left: 58.0, right, top: 30.0, bottom: 48.0 };
        let mut svg = Svg::new(title, self.format.width(), height, margins);
        svg.axes((&self.x, "training FLOPs"), (y, y_name), self.format.ticks());
        svg
    }

    fn group(&self, variant: usize, elements: &str) -> String {
        let title = escape(&self.scaling.variants[variant].name);
        let colour = colour(self.scaling.colours[variant]);
        format!("<g class=\"s {colour}\" data-v=\"{MARK}{variant}\"><title>{title}</title>{elements}</g>\n")
    }

    /// What stands for a variant's power law and its band: lines from point to point, and the interval of each.
    fn without_law(&self, v: usize, place: &dyn Fn(f64, f64) -> (f64, f64)) -> String {
        let Scaling { variants, budgets, .. } = self.scaling;
        let aside = aside(v, variants.len());
        let at = |b: usize, loss: f64| {
            let (x, y) = place(budgets[b], loss);
            (x + aside, y)
        };
        let all = || 0..budgets.len();
        let line = path(all().filter_map(|b| Some(at(b, self.scaling.best(v, b)?.loss))));
        let bars = all().filter_map(|b| Some(bar(self.scaling.best_interval(v, b)?, &|loss| at(b, loss))));
        let bars: String = bars.collect();
        format!("<path class=\"joint\" d=\"{line}\"/><path class=\"hit\" d=\"{line}\"/>{bars}")
    }

    /// The difference of a variant under a budget, with its interval.
    fn above(&self, v: usize, b: usize, above: &Above, place: &dyn Fn(f64, f64) -> (f64, f64)) -> String {
        let Scaling { variants, budgets, .. } = self.scaling;
        let aside = aside(v - 1, variants.len() - 1);
        let at = |difference: f64| {
            let (x, y) = place(budgets[b], difference);
            (x + aside, y)
        };
        let mut elements = String::new();
        let mut title = format!("{}: {:+.3} bits per byte under {}", variants[v].name, above.mean, flop(budgets[b]));
        if let Some((low, high)) = above.interval {
            elements += &bar((low, high), &at);
            title += &format!(", 95% interval {low:+.3} to {high:+.3}");
        }
        let is_fitted = [0, v].iter().all(|&v| self.scaling.best(v, b).is_some_and(|best| best.parabola.is_ok()));
        elements + &mark(at(above.mean), is_fitted, &title)
    }

    /// Names beside the ends of the curves, from the variant `first` on.
    fn labels(&self, svg: &mut Svg, first: usize, at: impl Fn(usize) -> Option<(f64, f64)>) {
        if self.format == Format::Narrow {
            return;
        }
        let variants = &self.scaling.variants;
        let labelled = if variants.len() <= MAX_LABELS { variants.len() } else { COLOURS };
        let end = |rank: usize| {
            let colour = self.scaling.colours[rank];
            Some(End { rank, colour, name: &variants[rank].name, at: at(rank)? })
        };
        label_ends(svg, &(first..labelled).filter_map(end).collect::<Vec<_>>(), MARK);
    }
}

/// How far one of several bars of a budget lies beside it.
fn aside(bar: usize, bars: usize) -> f64 {
    (bar as f64 - (bars - 1) as f64 / 2.0) * APART.min(160.0 / bars as f64)
}

/// An interval, with both its ends.
fn bar((low, high): (f64, f64), at: &dyn Fn(f64) -> (f64, f64)) -> String {
    let ((x, from), (_, to)) = (at(low), at(high));
    format!("<path class=\"range\" d=\"M{x:.1} {from:.1}V{to:.1}m-4 0h8M{:.1} {from:.1}h8\"/>", x - 4.0)
}

/// A filled diamond for what was fitted, a hollow circle for what was measured.
fn mark((x, y): (f64, f64), is_fitted: bool, title: &str) -> String {
    match is_fitted {
        true => diamond((x, y), 5.5, title),
        false => format!(
            "<circle class=\"seed\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"><title>{}</title></circle>",
            escape(title)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::scaling::tests::{NOISE, crossing, scaling};
    use crate::statistics::scaling::tests::points;

    #[test]
    fn laws_have_bands_and_differences_have_intervals() {
        let scaling = crossing(&NOISE);
        let text = losses(&scaling, "l", Format::Wide).inline("");
        assert_eq!((text.matches("class=\"band\"").count(), text.matches("class=\"dot\"").count()), (2, 6));
        assert!(text.contains("&lt;b&gt;: 2.5") && !text.contains("<a>"), "{text}");
        let text = differences(&scaling, "d", Format::Wide).unwrap().inline("");
        assert_eq!((text.matches("class=\"range\"").count(), text.matches("class=\"cross\"").count()), (3, 1));
        assert!(text.contains("&lt;b&gt; and &lt;a&gt; cross at 337 TFLOP"), "{text}");
        assert!(text.contains("bits per byte above &lt;a&gt;"));
    }

    #[test]
    fn one_seed_has_neither() {
        let scaling = crossing(&NOISE[..1]);
        for svg in [losses(&scaling, "l", Format::Narrow), differences(&scaling, "d", Format::Narrow).unwrap()] {
            let text = svg.inline("");
            assert!(!text.contains("class=\"band\"") && !text.contains("class=\"range\""), "{text}");
        }
    }

    #[test]
    fn one_variant_has_no_difference_and_one_budget_no_law() {
        let mut points = points(20.0, 0.06, &NOISE);
        points.retain(|point| point.is_of(1e15));
        let scaling = scaling(&[("a", points)]);
        assert!(differences(&scaling, "d", Format::Wide).is_none());
        let text = losses(&scaling, "l", Format::Wide).inline("");
        assert!(!text.contains("NaN") && text.matches("class=\"dot\"").count() == 1, "{text}");
        assert_eq!(
            (text.matches("class=\"range\"").count(), text.matches("class=\"joint\"").count()),
            (1, 1),
            "{text}"
        );
    }
}
