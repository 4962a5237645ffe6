//! What the page shows of each variant: its stages, what it changes, what its seeds reached and what it writes.

use super::Report;
use super::charts::svg::colour;
use super::format::{count, duration, escape, si, with_unit};
use super::run::Status;
use super::table::{bpb, status};
use super::variant::Variant;

/// Variants whose details are open at first.
const OPEN: usize = 2;

/// The section with all variants, best first.
pub(super) fn variants(report: &Report) -> String {
    let mut html =
        "<h2>Variants</h2>\n<p class=\"soft\">What each changes, what its seeds reached, and what it writes.</p>\n"
            .to_string();
    for (i, variant) in report.all_variants().enumerate() {
        let open = if i < OPEN { " open" } else { "" };
        html += &format!(
            "<details class=\"{}\"{open}><summary><span class=\"swatch\" style=\"margin:0\"></span>{}<span class=\"soft\">{}</span>\
             </summary>\n<div class=\"inside\"><div>{}{}{}</div><div>{}</div></div></details>\n",
            colour(i),
            escape(&variant.name),
            bpb(variant),
            stages(variant),
            changes(variant, &report.base),
            seeds(variant),
            sample(variant)
        );
    }
    html
}

fn stages(variant: &Variant) -> String {
    let Some(cost) = &variant.cost else { return String::new() };
    let mut html = "<h3>Stages, from global to local</h3><table><tr><th>block</th><th>width</th><th>layers</th><th>parameters</th>\
                    <th>FLOP/byte</th></tr>"
        .to_string();
    for stage in &cost.stages {
        html += &format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&stage.block_type),
            stage.hidden_dim,
            stage.num_layers,
            si(stage.part.parameters as f64),
            stage.part.flops_per_byte.map_or("unknown".into(), si)
        );
    }
    html + "</table>"
}

fn changes(variant: &Variant, base: &str) -> String {
    let mut html = match variant.differences.is_empty() {
        true if variant.name == base => "<h3>What the others are compared with</h3>".into(),
        true => format!("<h3>Configured as {}</h3>", escape(base)),
        false => {
            let lines = escape(&variant.differences.join("\n"));
            format!("<h3>Differences from {}</h3><pre>{lines}</pre>", escape(base))
        }
    };
    if let Some(solved) = &variant.solved {
        html += &format!("<h3>Solved for equal parameters</h3><pre>{}</pre>", escape(solved));
    }
    html
}

fn seeds(variant: &Variant) -> String {
    let mut html =
        "<h3>Runs</h3><table><tr><th>seed</th><th>valid bpb</th><th>bytes</th><th>time</th><th></th></tr>".to_string();
    for run in &variant.runs {
        let seed = run.seed.map_or("–".into(), |seed| seed.to_string());
        let valid = run.valid_bpb().map_or("–".into(), |bpb| format!("{bpb:.4}"));
        let bytes = run.bytes().map_or("–".into(), |bytes| with_unit(bytes, "B"));
        let time = run.seconds().map_or("–".into(), duration);
        let mark = if run.status == Status::Finished { "" } else { status(run) };
        html += &format!("<tr><td>{seed}</td><td>{valid}</td><td>{bytes}</td><td>{time}</td><td>{mark}</td></tr>");
    }
    html + "</table>"
}

fn sample(variant: &Variant) -> String {
    let missing = variant.runs.iter().find_map(|run| run.result.as_ref()?.measured.missing.as_deref());
    match (variant.generation(), missing) {
        (Some(generation), _) => format!(
            "<h3>A sample: the prompt in grey, then {} at {}</h3><pre><span class=\"prompt\">{}</span>{}</pre>",
            count(generation.bytes, "byte"),
            with_unit(generation.bytes_per_second, "B/s"),
            escape(&generation.prompt),
            escape(&generation.text)
        ),
        (None, Some(why)) => format!("<h3>No sample</h3><pre>{}</pre>", escape(why)),
        (None, None) => String::new(),
    }
}
