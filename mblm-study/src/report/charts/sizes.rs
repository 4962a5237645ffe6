//! Loss against size for one variant of a scaling study: a curve per budget, with its lowest point.

use super::scale::{Scale, Unit};
use super::svg::{Format, Margins, Svg, colour, escape, fitting, path, spread_labels};
use crate::report::format::{flop, si};
use crate::report::scaling::Scaling;
use crate::report::variant::Spread;

const HEIGHT: f64 = 280.0;
/// Points of a curve that is drawn.
const STEPS: usize = 40;
/// The opacity of the smallest budget's curve; the largest is opaque.
const PALE: f64 = 0.4;

/// The panel of a variant. All panels of a study have the same axes. They are as wide as a phone in every format: a page
/// puts them side by side.
pub(crate) fn sizes(scaling: &Scaling, variant: usize, id: &str, format: Format) -> Svg {
    let name = &scaling.variants[variant].name;
    let margins = Margins { left: 44.0, right: 78.0, top: 30.0, bottom: 46.0 };
    let mut svg = Svg::new(&format!("Bits per byte of {name} against size"), Format::Narrow.width(), HEIGHT, margins);
    let points = || scaling.variants.iter().flat_map(|variant| &variant.points);
    let measured = || points().flat_map(|point| point.losses.values().copied());
    let x = Scale::around(points().map(|point| point.parameters), 0.06, true, Unit::Metric);
    let fitted = scaling.fits.iter().flat_map(|fit| fit.budgets.iter().flatten()).map(|best| best.loss);
    let y = Scale::around(measured().chain(fitted), 0.08, false, Unit::Plain);
    svg.axes((&x, "parameters"), (&y, &fitting(&format!("{name}: bits per byte"), 350.0)), Format::Narrow.ticks());
    let mut inside = String::new();
    let mut ends = Vec::new();
    for (b, budget) in scaling.budgets.iter().enumerate() {
        let panel = Panel { scaling, svg: &svg, x, y, variant, budget: b };
        let share = b as f64 / (scaling.budgets.len() - 1).max(1) as f64;
        let opacity = if scaling.budgets.len() > 1 { PALE + (1.0 - PALE) * share } else { 1.0 };
        let Some((group, end)) = panel.curve() else { continue };
        inside += &format!("<g class=\"{}\" opacity=\"{opacity:.2}\">{group}</g>", colour(scaling.colours[variant]));
        ends.push((end, flop(*budget)));
    }
    svg.clipped(&format!("{id}-{format:?}"), &inside);
    let places = spread_labels(&ends.iter().map(|(y, _)| *y).collect::<Vec<_>>(), svg.y(1.0), svg.y(0.0));
    for ((_, text), place) in ends.iter().zip(places) {
        let at = svg.x(1.0) + 6.0;
        svg.text(at, place + 4.0, "start", "tick", text);
    }
    svg
}

/// The part of a panel that one budget has.
struct Panel<'a> {
    scaling: &'a Scaling,
    svg: &'a Svg,
    x: Scale,
    y: Scale,
    variant: usize,
    budget: usize,
}

impl Panel<'_> {
    fn at(&self, parameters: f64, loss: f64) -> (f64, f64) {
        (self.svg.x(self.x.place(parameters)), self.svg.y(self.y.place(loss)))
    }

    /// The curve with its points, and the height of its right end. None without a loss.
    fn curve(&self) -> Option<(String, f64)> {
        let Panel { scaling, variant, budget, .. } = *self;
        let flops = scaling.budgets[budget];
        let of_budget = scaling.variants[variant].points.iter().filter(|point| point.is_of(flops));
        let spread = |point: &crate::statistics::scaling::Point| {
            Some((point.parameters, Spread::of(point.losses.values().copied())?))
        };
        let mut points: Vec<(f64, Spread)> = of_budget.filter_map(spread).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (first, last) = (points.first()?, points.last()?);
        let best = scaling.best(variant, budget)?;
        let mut group = String::new();
        let end = match best.parabola {
            Ok(parabola) => {
                let size = |i: usize| first.0 * (last.0 / first.0).powf(i as f64 / STEPS as f64);
                let curve = path((0..=STEPS).map(|i| self.at(size(i), parabola.at(size(i).ln()))));
                group += &format!("<path class=\"curve\" d=\"{curve}\"/>");
                parabola.at(last.0.ln())
            }
            Err(_) => {
                let line = path(points.iter().map(|(size, loss)| self.at(*size, loss.mean)));
                group += &format!("<path class=\"joint\" d=\"{line}\"/>");
                last.1.mean
            }
        };
        points.iter().for_each(|(size, loss)| group += &self.point(*size, loss));
        if best.parabola.is_ok() {
            let (cx, cy) = self.at(best.parameters, best.loss);
            let title = format!(
                "{}, {}: best at {} parameters, {:.3} bits per byte",
                scaling.variants[variant].name,
                flop(flops),
                si(best.parameters),
                best.loss
            );
            group += &diamond((cx, cy), 6.5, &title);
        }
        Some((group, self.at(last.0, end).1))
    }

    /// A measured point: the mean of its seeds, from the lowest to the highest.
    fn point(&self, size: f64, loss: &Spread) -> String {
        let ((cx, cy), (_, low), (_, high)) =
            (self.at(size, loss.mean), self.at(size, loss.min), self.at(size, loss.max));
        let title = escape(&format!(
            "{}, {}: {} bits per byte with {} parameters",
            self.scaling.variants[self.variant].name,
            flop(self.scaling.budgets[self.budget]),
            loss.text(3),
            si(size)
        ));
        format!(
            "<path class=\"range\" d=\"M{cx:.1} {low:.1}V{high:.1}\"/>\
             <circle class=\"seed\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\"><title>{title}</title></circle>"
        )
    }
}

/// The mark of a number that was fitted.
pub(super) fn diamond((x, y): (f64, f64), r: f64, title: &str) -> String {
    let title = escape(title);
    let top = y - r;
    format!("<path class=\"dot\" d=\"M{x:.1} {top:.1}l{r} {r}l-{r} {r}l-{r} -{r}z\"><title>{title}</title></path>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::scaling::tests::{NOISE, crossing, scaling};
    use crate::statistics::scaling::tests::points;

    #[test]
    fn every_budget_has_its_curve_points_and_optimum() {
        let text = sizes(&crossing(&NOISE), 0, "p", Format::Wide).inline("");
        assert_eq!((text.matches("class=\"curve\"").count(), text.matches("class=\"seed\"").count()), (3, 12));
        assert_eq!(text.matches("class=\"dot\"").count(), 3);
        assert!(text.contains("&lt;a&gt;, 100 TFLOP: best at 1 M parameters") && !text.contains("<a>"), "{text}");
        assert!(text.contains(">1 PFLOP</text>"));
    }

    #[test]
    fn without_an_optimum_points_are_joined() {
        let mut few = points(20.0, 0.06, &[0.0]);
        few.retain(|point| !point.is_of(1e15) || point.parameters < 2e6);
        let text = sizes(&scaling(&[("a", few)]), 0, "p", Format::Wide).inline("");
        assert_eq!((text.matches("class=\"curve\"").count(), text.matches("class=\"joint\"").count()), (2, 1));
        assert_eq!(text.matches("class=\"dot\"").count(), 2);
    }
}
