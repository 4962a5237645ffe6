//! What the page shows of each variant: its stages, what it changes, what its seeds reached and what it writes.

use maud::{Markup, html};

use crate::report::Report;
use crate::report::charts::svg::colour;
use crate::report::format::{count, duration, si, with_unit};
use crate::report::run::Status;
use crate::report::table::{bpb, status};
use crate::report::variant::Variant;

/// Variants whose details are open at first.
const OPEN: usize = 2;

/// The section with all variants, best first.
pub(super) fn variants(report: &Report) -> Markup {
    html! {
        h2 { "Variants" }
        p.soft { "What each changes, what its seeds reached, and what it writes." }
        @for (i, variant) in report.all_variants().enumerate() {
            details.(colour(i)) open[i < OPEN] {
                summary {
                    span.swatch style="margin:0" {}
                    (variant.name)
                    span.soft { (bpb(variant)) }
                }
                div.inside {
                    div { (stages(variant)) (changes(variant, &report.base)) (seeds(variant)) }
                    div { (sample(variant)) }
                }
            }
        }
    }
}

fn stages(variant: &Variant) -> Markup {
    html! {
        @if let Some(cost) = &variant.cost {
            h3 { "Stages, from global to local" }
            table {
                tr { th { "block" } th { "width" } th { "layers" } th { "parameters" } th { "FLOP/byte" } }
                @for stage in &cost.stages {
                    tr {
                        td { (stage.block_type) }
                        td { (stage.hidden_dim) }
                        td { (stage.num_layers) }
                        td { (si(stage.part.parameters as f64)) }
                        td { (stage.part.flops_per_byte.map_or("unknown".into(), si)) }
                    }
                }
            }
        }
    }
}

fn changes(variant: &Variant, base: &str) -> Markup {
    html! {
        @if !variant.differences.is_empty() {
            h3 { "Differences from " (base) }
            pre { (variant.differences.join("\n")) }
        } @else if variant.name == base {
            h3 { "What the others are compared with" }
        } @else {
            h3 { "Configured as " (base) }
        }
        @if let Some(solved) = &variant.solved {
            h3 { "Solved for equal parameters" }
            pre { (solved) }
        }
    }
}

fn seeds(variant: &Variant) -> Markup {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "–".into());
    html! {
        h3 { "Runs" }
        table {
            tr { th { "seed" } th { "valid bpb" } th { "bytes" } th { "time" } th {} }
            @for run in &variant.runs {
                tr {
                    td { (or_dash(run.seed.map(|seed| seed.to_string()))) }
                    td { (or_dash(run.valid_bpb().map(|bpb| format!("{bpb:.4}")))) }
                    td { (or_dash(run.bytes().map(|bytes| with_unit(bytes, "B")))) }
                    td { (or_dash(run.seconds().map(duration))) }
                    td { @if run.status != Status::Finished { (status(run)) } }
                }
            }
        }
    }
}

fn sample(variant: &Variant) -> Markup {
    let missing = variant.runs.iter().find_map(|run| run.result.as_ref()?.measured.missing.as_deref());
    html! {
        @if let Some(generation) = variant.generation() {
            h3 {
                "A sample: the prompt in grey, then " (count(generation.bytes, "byte")) " at "
                (with_unit(generation.bytes_per_second, "B/s"))
            }
            pre { span.prompt { (generation.prompt) } (generation.text) }
        } @else if let Some(why) = missing {
            h3 { "No sample" }
            pre { (why) }
        }
    }
}
