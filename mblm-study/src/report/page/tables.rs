//! The page's tables: the ranking of each group of variants, and bits per byte by global and local block.

use maud::{Markup, html};

use super::Charts;
use crate::report::charts::svg::colour;
use crate::report::format::si;
use crate::report::matrix::Matrix;
use crate::report::standing::Standings;
use crate::report::table::{Column, bpb, columns, places};
use crate::report::variant::Variant;
use crate::report::verdict::how;
use crate::report::{Apart, Report};

pub(super) fn ranking(report: &Report, charts: &Charts) -> Markup {
    let has_seeds = report.all_variants().any(|variant| variant.valid_bpb().is_some_and(|bpb| bpb.count > 1));
    let standings = Standings::of(&report.variants, report.looks);
    html! {
        h2 { "Ranking" }
        p.soft {
            "Bits per byte on the validation data, lower is better"
            @if has_seeds { "; mean ± standard deviation over seeds" }
            "."
            @if standings.is_tested() {
                " Below it is the mean difference from the best over shared seeds, with its 95% interval. Variants of \
                 group 1 are not distinguishable from the best (" (how(&standings)) "). Those of group 2 are not \
                 distinguishable from the best of the rest, and so on."
            }
        }
        (table(0, &report.variants, &columns(report), &standings))
        @if let Some(chart) = charts.get("ranking") {
            figure.panel style="display:block" { (chart) }
            @if standings.is_tested() {
                p.soft {
                    "Dots are means, rings are single seeds. Bars are 95% t intervals of the difference from the best, \
                     whose mean is the dashed line. They are not adjusted for the number of comparisons."
                }
            }
        }
    }
}

/// The variants that are not ranked with the others, and why.
pub(super) fn apart(report: &Report) -> Markup {
    let columns = columns(report);
    let mut first = report.variants.len();
    let firsts = report.apart.iter().map(|group| {
        first += group.variants.len();
        first - group.variants.len()
    });
    html! {
        @for (Apart { why, variants }, first) in report.apart.iter().zip(firsts) {
            section {
                h2 { "Not ranked with these" }
                p.soft { "What follows was measured on something else:" }
                ul { @for why in why { li { (why) } } }
                (table(first, variants, &columns, &Standings::of(variants, report.looks)))
            }
        }
    }
}

/// The ranking of a group, whose first variant has the number `first` on the page.
fn table(first: usize, variants: &[Variant], columns: &[&Column], standings: &Standings) -> Markup {
    html! {
        div.scroll {
            table.ranking {
                thead {
                    tr {
                        th {}
                        @if standings.is_tested() { th { button { "group" } } }
                        th.name { button { "variant" } }
                        th aria-sort="ascending" { button { "valid bpb" } }
                        @for column in columns {
                            th data-first=[column.descends.then_some("descending")] { button { (column.name) } }
                        }
                    }
                }
                tbody {
                    @for (rank, (variant, place)) in variants.iter().zip(places(variants)).enumerate() {
                        (row((first, rank), place, variant, standings, columns))
                    }
                }
            }
        }
    }
}

fn row(
    (first, rank): (usize, usize),
    place: Option<usize>,
    variant: &Variant,
    standings: &Standings,
    columns: &[&Column],
) -> Markup {
    let i = first + rank;
    let mean = variant.valid_bpb().map(|bpb| bpb.mean);
    let group = standings.group(rank);
    let class = match place {
        None => "dim",
        Some(1) => "first",
        _ => "",
    };
    html! {
        tr class={ (class) " " (colour(i)) } data-v=(i) {
            td.place { @if let Some(place) = place { (place) } }
            @if standings.is_tested() {
                td.group data-label="group" data-sort=[group] {
                    @match group { Some(group) => (group), None => "–" }
                }
            }
            td.name data-sort=(variant.name) {
                span.swatch {}
                (variant.name)
                @if let Some(blocks) = variant.blocks().filter(|blocks| *blocks != variant.name) {
                    small { (blocks) }
                }
            }
            td.bpb data-label="valid bpb" data-sort=[mean] {
                (bpb(variant))
                @if let Some(difference) = standings.difference(rank) { small { (difference) } }
            }
            @for column in columns {
                @let cell = (column.cell)(variant);
                td class=[cell.is_none().then_some("none")] data-label=(column.name) data-sort=[(column.key)(variant)] {
                    (cell.as_deref().unwrap_or("–"))
                    @if column.name == "parameters" { (by_stage(variant)) }
                }
            }
        }
    }
}

/// The parameters of each stage, from global to local.
fn by_stage(variant: &Variant) -> Markup {
    let stages = variant.cost.iter().flat_map(|cost| &cost.stages);
    let parameters: Vec<String> = stages.map(|stage| si(stage.part.parameters as f64)).collect();
    html! {
        @if parameters.len() > 1 { small { (parameters.join(" / ")) } }
    }
}

pub(super) fn matrix(report: &Report) -> Markup {
    let Some(matrix) = Matrix::of(&report.variants) else { return Markup::default() };
    let range = matrix.range();
    html! {
        h2 { "Global or local?" }
        p.soft {
            "Bits per byte by the block of the global stage (rows) and of the local stage (columns); the stronger the \
             colour, the better."
        }
        div.scroll {
            table.matrix {
                tr {
                    th.corner { "global ↓ local →" }
                    @for name in &matrix.columns { th scope="col" { (name) } }
                    th { "mean" }
                }
                @for ((name, cells), mean) in matrix.rows.iter().zip(&matrix.cells).zip(matrix.row_means()) {
                    tr {
                        th scope="row" { (name) }
                        @for bpb in cells { (cell(*bpb, range)) }
                        td.mean { (number(mean)) }
                    }
                }
                tr {
                    th scope="row" { "mean" }
                    @for mean in matrix.column_means() { td.mean { (number(mean)) } }
                    td.mean {}
                }
            }
        }
    }
}

/// A cell of the matrix, coloured by its place between the lowest and the highest bits per byte.
fn cell(bpb: Option<f64>, (low, high): (f64, f64)) -> Markup {
    let heat = match bpb {
        Some(bpb) if high > low => format!("{:.2}", ((high - bpb) / (high - low)).max(0.0)),
        Some(_) => "1.00".into(),
        None => "0".into(),
    };
    html! {
        td class=[(bpb == Some(low)).then_some("best")] style={ "--heat:" (heat) } { (number(bpb)) }
    }
}

fn number(bpb: Option<f64>) -> String {
    bpb.map_or("–".into(), |bpb| format!("{bpb:.3}"))
}
