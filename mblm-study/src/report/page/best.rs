//! The best variant in each respect.

use maud::{Markup, html};
use mblm_train::cost::bytes as binary;

use crate::report::Report;
use crate::report::format::with_unit;
use crate::report::variant::Variant;

/// Speeds and memory that differ by less than this share are a tie: two runs of one configuration do.
const SLACK: f64 = 0.02;

/// One respect in which variants are compared.
struct Tile {
    name: &'static str,
    of: fn(&Variant) -> Option<f64>,
    is_more_better: bool,
    slack: f64,
    shown: fn(f64) -> String,
}

const TILES: [Tile; 4] = [
    Tile {
        name: "best",
        of: |variant| Some(variant.valid_bpb()?.mean),
        is_more_better: false,
        slack: 0.0,
        shown: |bpb| format!("{bpb:.3} bpb"),
    },
    Tile {
        name: "fastest in training",
        of: Variant::train_rate,
        is_more_better: true,
        slack: SLACK,
        shown: |rate| with_unit(rate, "B/s"),
    },
    Tile {
        name: "fastest in generation",
        of: Variant::generation_rate,
        is_more_better: true,
        slack: SLACK,
        shown: |rate| with_unit(rate, "B/s"),
    },
    Tile { name: "least memory", of: Variant::peak_bytes, is_more_better: false, slack: SLACK, shown: binary },
];

/// A tile for each respect that there are numbers for, if there are variants to compare.
pub(super) fn tiles(report: &Report) -> Markup {
    let finished: Vec<&Variant> = report.variants.iter().filter(|variant| variant.is_finished()).collect();
    html! {
        @if finished.len() > 1 {
            dl.tiles { @for tile in &TILES { (tile.html(&finished)) } }
        }
    }
}

impl Tile {
    fn html(&self, variants: &[&Variant]) -> Markup {
        let values: Vec<(&str, f64)> =
            variants.iter().filter_map(|variant| Some((&variant.name[..], (self.of)(variant)?))).collect();
        let sign = if self.is_more_better { -1.0 } else { 1.0 };
        let best = values.iter().map(|(_, value)| *value).min_by(|a, b| (sign * a).total_cmp(&(sign * b)));
        html! {
            @if let Some(best) = best {
                @let first = self.first(&values, best);
                div {
                    dt { (self.name) @if first.len() > 1 { ": a tie" } }
                    dd.value { ((self.shown)(best)) }
                    dd.who { (first.join(", ")) }
                }
            }
        }
    }

    /// The variants that share the first place: their values look the same, or differ less than measurements do.
    fn first<'a>(&self, values: &[(&'a str, f64)], best: f64) -> Vec<&'a str> {
        let shown = (self.shown)(best);
        let is_first = |value: f64| (self.shown)(value) == shown || (value - best).abs() < self.slack * best.abs();
        values.iter().filter(|(_, value)| is_first(*value)).map(|(name, _)| *name).collect()
    }
}
