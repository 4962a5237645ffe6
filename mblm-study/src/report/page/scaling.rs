//! How losses move with size and budget: the curves that were fitted, what they say, and the numbers.

use maud::{Markup, html};

use super::Charts;
use crate::report::charts::svg::colour;
use crate::report::scaling::{COLUMNS, Scaling};
use crate::report::{Report, SCALING_DIFFERENCES, SCALING_LOSSES, sizes_id};

pub(super) fn section(report: &Report, charts: &Charts) -> Markup {
    html! {
        @if let Some(scaling) = &report.scaling {
            section {
                h2 { "Size and budget" }
                p.soft { (scaling.about()) }
                ul.findings { @for finding in scaling.findings() { li { (finding) } } }
                p.soft { (scaling.about_intervals()) }
                @for id in [SCALING_DIFFERENCES, SCALING_LOSSES] {
                    @if let Some(chart) = charts.get(id) {
                        figure.panel style="display:block" { (chart) }
                    }
                }
                p.soft { (scaling.about_marks()) }
                (legend(scaling))
                div.panels {
                    @for chart in (0..scaling.variants.len()).filter_map(|v| charts.get(&sizes_id(v))) {
                        figure.panel style="display:block" { (chart) }
                    }
                }
                p.soft {
                    "Each curve is a parabola in the logarithm of the size, fitted to the mean losses of one budget. \
                     Dashed lines only join points: no optimum was fitted. Bars range from the best seed to the worst."
                }
                (table(scaling))
            }
        }
    }
}

/// A button for each variant, which makes it stand out in these charts.
fn legend(scaling: &Scaling) -> Markup {
    html! {
        div.legend role="group" aria-label="Variants" {
            @for (i, variant) in scaling.variants.iter().enumerate() {
                button.chip.(colour(scaling.colours[i])) data-v={ "s" (i) } aria-pressed="false" {
                    span.swatch {} (variant.name)
                }
            }
        }
    }
}

fn table(scaling: &Scaling) -> Markup {
    html! {
        div.scroll {
            table.scaling {
                thead { tr { @for name in COLUMNS { th.name[name == "variant"] { (name) } } } }
                tbody {
                    @for [name, cells @ ..] in scaling.rows() {
                        tr { td.name { (name) } @for cell in cells { td { (cell) } } }
                    }
                }
            }
        }
    }
}
