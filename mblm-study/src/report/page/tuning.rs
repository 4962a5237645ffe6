//! What tuning found, a section per field: how sensitive each variant is, and where its best value lies.

use maud::{Markup, html};

use super::Charts;
use crate::report::charts::svg::colour;
use crate::report::tuning::Tuned;
use crate::report::{Report, tuning_id};

pub(super) fn sections(report: &Report, charts: &Charts) -> Markup {
    html! {
        @for (n, tuned) in report.tuning.iter().enumerate() {
            section {
                h2 { "Tuning of " code { (tuned.field) } }
                p.soft { (tuned.about()) " The ring marks the value that the variant is scored with." }
                @if let Some(chart) = charts.get(&tuning_id(n)) {
                    figure.panel style="display:block" { (chart) }
                }
                (table(tuned))
                p.soft {
                    "The cost columns say how many bits per byte half and twice the best value cost, interpolated between \
                     tries on a logarithmic axis. At the edge means that the best value may lie further out."
                }
            }
        }
    }
}

fn table(tuned: &Tuned) -> Markup {
    html! {
        div.scroll {
            table.tuning {
                thead {
                    tr {
                        th.name { "variant" }
                        th { "best value" } th { "valid bpb" } th { "cost of half" } th { "cost of twice" } th { "tries" }
                    }
                }
                tbody {
                    @for (i, variant) in tuned.variants.iter().enumerate() {
                        @let [name, cells @ ..] = variant.cells();
                        tr.(colour(i)) data-v={ (tuned.mark()) (i) } {
                            td.name { span.swatch {} (name) }
                            @for cell in cells { td { (cell) } }
                        }
                    }
                }
            }
        }
    }
}
