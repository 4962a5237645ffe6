//! The numbers of a scaling study: as a table for the page and for Markdown, and as the part `scaling` of `results.json`.

use serde_json::{Value, json};

use super::words::plain;
use super::{Above, Scaling};
use crate::report::format::{flop, si};

/// The names of the table's columns.
pub(in crate::report) const COLUMNS: [&str; 5] = ["variant", "budget", "best size", "bits per byte", "above the first"];

impl Scaling {
    /// A row per variant and budget.
    pub(in crate::report) fn rows(&self) -> Vec<[String; COLUMNS.len()]> {
        let mut rows = Vec::new();
        for (v, variant) in self.variants.iter().enumerate() {
            for (b, budget) in self.budgets.iter().enumerate() {
                let Some(best) = self.best(v, b) else { continue };
                let measured = if best.parabola.is_ok() { "" } else { " (measured)" };
                let above = if v == 0 { None } else { self.above_first(v, b) };
                rows.push([
                    variant.name.clone(),
                    flop(*budget),
                    format!("{}{measured}", si(best.parameters)),
                    format!("{:.3}{}", best.loss, self.best_interval(v, b).map_or(String::new(), range)),
                    above.map_or(String::new(), above_text),
                ]);
            }
        }
        rows
    }

    /// The part `scaling` of `results.json`.
    pub(in crate::report) fn json(&self) -> Value {
        let budget = |v: usize, b: usize| {
            let best = self.best(v, b);
            let above = if v == 0 { None } else { self.above_first(v, b) };
            json!({
                "flops": self.budgets[b],
                "best_parameters": best.map(|best| best.parameters),
                "bpb": best.map(|best| best.loss),
                "bpb_low": self.best_interval(v, b).map(|(low, _)| low),
                "bpb_high": self.best_interval(v, b).map(|(_, high)| high),
                "is_fitted": best.is_some_and(|best| best.parabola.is_ok()),
                "why_not_fitted": best.and_then(|best| best.parabola.err()).map(|why| why.to_string()),
                "above_first": above.map(|above| above.mean),
                "above_first_low": above.and_then(|above| above.interval).map(|(low, _)| low),
                "above_first_high": above.and_then(|above| above.interval).map(|(_, high)| high),
            })
        };
        let variant = |v: usize| {
            let variant = &self.variants[v];
            let law = self.fits[v].law.ok();
            let crossing = if v == 0 { None } else { self.crossing(v) };
            json!({
                "name": variant.name,
                "points": variant.points.iter().map(|point| json!({
                    "parameters": point.parameters, "flops": point.flops, "bpb_by_seed": point.losses,
                })).collect::<Vec<_>>(),
                "budgets": (0..self.budgets.len()).map(|b| budget(v, b)).collect::<Vec<_>>(),
                "power_law": law.map(|law| json!({
                    "log_scale": law.log_scale, "exponent": law.exponent, "worst_log_residual": law.worst,
                })),
                "why_no_power_law": self.fits[v].law.err().map(|why| why.to_string()),
                "crosses_first_at": crossing.map(|crossing| crossing.budget),
                "crossing_is_measured": crossing.map(|crossing| crossing.is_inside),
            })
        };
        json!({
            "about_intervals": self.about_intervals(),
            "findings": self.findings().iter().map(|finding| plain(finding)).collect::<Vec<_>>(),
            "variants": (0..self.variants.len()).map(variant).collect::<Vec<_>>(),
        })
    }
}

fn range((low, high): (f64, f64)) -> String {
    format!(" [{low:.3}, {high:.3}]")
}

fn above_text(above: Above) -> String {
    let Above { mean, interval } = above;
    let signed = |number: f64| format!("{number:+.3}").replace('-', "−");
    match interval {
        Some((low, high)) => format!("{} [{}, {}]", signed(mean), signed(low), signed(high)),
        None => format!("{} (not tested)", signed(mean)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOISE, crossing};

    #[test]
    fn rows_and_json_have_the_intervals() {
        let scaling = crossing(&NOISE);
        let rows = scaling.rows();
        assert_eq!(rows.len(), 6);
        assert_eq!(rows[0][..3], ["<a>", "100 TFLOP", "1 M"]);
        assert!(rows[3][4].starts_with("−0.0") && rows[3][4].contains(" [−0.0"), "{rows:#?}");
        assert_eq!(rows[0][4], "");
        let json = scaling.json();
        assert_eq!(json["variants"][1]["budgets"][0]["is_fitted"], true);
        assert_eq!(json["variants"][1]["crossing_is_measured"], true);
        assert!(json["variants"][0]["points"][0]["bpb_by_seed"]["1"].is_f64());
        assert!(crossing(&NOISE[..1]).rows()[3][4].ends_with("(not tested)"));
    }
}
