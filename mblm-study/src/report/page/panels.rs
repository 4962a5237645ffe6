//! The page's charts, the buttons that choose which of them is shown, and the legend.

use std::fmt::Write;

use maud::{Markup, html};

use super::Charts;
use crate::report::charts::svg::colour;
use crate::report::{Axis, Kind, Measure, Report, curve_id, gradient_id, trade_off_id};

const KINDS: [Kind; 2] = [Kind::Valid, Kind::Train];

/// Which panels are shown for what is chosen. It is a style, so that a page without scripts switches too.
pub(super) fn style() -> String {
    let mut style = String::new();
    for (kind, axis) in curves() {
        let (id, kind, axis) = (curve_id(kind, axis), kind.name(), axis.id());
        // Writing to a string cannot fail.
        let _ = writeln!(
            style,
            ".curves:has([value={kind}]:checked):has([value={axis}]:checked) .p-{id} {{ display: block; }}"
        );
    }
    for measure in Measure::ALL {
        let (id, measure) = (trade_off_id(measure), measure.id());
        let _ = writeln!(style, ".costs:has([value={measure}]:checked) .p-{id} {{ display: block; }}");
    }
    style
}

fn curves() -> impl Iterator<Item = (Kind, Axis)> {
    KINDS.into_iter().flat_map(|kind| Axis::ALL.map(|axis| (kind, axis)))
}

/// A group of buttons of which one is chosen.
fn switch(group: &str, choices: &[(&str, &str)]) -> Markup {
    html! {
        span.switch {
            @for (i, (id, name)) in choices.iter().enumerate() {
                label { input type="radio" name=(group) value=(id) checked[i == 0]; (name) }
            }
        }
    }
}

/// A button for each variant, which makes it stand out in all charts.
pub(super) fn legend(report: &Report) -> Markup {
    let drawn = report.variants.iter().enumerate().filter(|(_, v)| v.runs.iter().any(|run| !run.points.is_empty()));
    html! {
        div.legend role="group" aria-label="Variants" {
            @for (i, variant) in drawn {
                button.chip.(colour(i)) data-v=(i) aria-pressed="false" { span.swatch {} (variant.name) }
            }
        }
    }
}

pub(super) fn learning_curves(report: &Report, charts: &Charts) -> Markup {
    html! {
        section.curves {
            h2 { "Learning curves" }
            p.soft { "Point at a name or a curve to see it alone; click to keep it." }
            div.switches {
                (switch("axis", &Axis::ALL.map(|axis| (axis.id(), axis.name()))))
                (switch("kind", &[("valid", "validation"), ("train", "training")]))
            }
            @for id in curves().map(|(kind, axis)| curve_id(kind, axis)) {
                figure.panel.{ "p-" (id) } {
                    @match charts.get(&id) {
                        Some(chart) => (chart),
                        None => p { "There are no numbers for this chart." },
                    }
                }
            }
            (legend(report))
        }
    }
}

pub(super) fn trade_offs(charts: &Charts) -> Markup {
    let drawn = Measure::ALL.into_iter().filter_map(|m| Some((m, charts.get(&trade_off_id(m))?)));
    let drawn: Vec<_> = drawn.collect();
    let choices: Vec<(&str, &str)> = drawn.iter().map(|(measure, _)| (measure.id(), measure.name())).collect();
    html! {
        @if !drawn.is_empty() {
            section.costs {
                h2 { "Quality and cost" }
                p.soft { "The dotted line is the Pareto front: nothing on it is beaten in both respects." }
                div.switches { (switch("cost", &choices)) }
                @for (measure, chart) in drawn {
                    figure.panel.{ "p-" (trade_off_id(measure)) } { (chart) }
                }
            }
        }
    }
}

pub(super) fn gradients(report: &Report, charts: &Charts) -> Markup {
    let stages: Vec<_> = (0..report.num_stages()).filter_map(|stage| charts.get(&gradient_id(stage))).collect();
    html! {
        @if !stages.is_empty() {
            h2 { "Gradient norms per stage" }
            @for chart in stages { figure.panel style="display:block" { (chart) } }
            (legend(report))
        }
    }
}
