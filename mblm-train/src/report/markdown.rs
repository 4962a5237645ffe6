//! The report as Markdown, with the charts as files beside it.

use super::format::{count, si, with_unit};
use super::matrix::Matrix;
use super::table::{bpb, columns};
use super::variant::Variant;
use super::verdict::verdict;
use super::{Axis, Kind, Measure, Report, curve_id, trade_off_id};

/// `report.md`; `charts` are the names of those that were drawn.
pub(super) fn text(report: &Report, charts: &[&str]) -> String {
    let mut text = format!("# {}\n\n", report.title);
    if let Some(description) = &report.description {
        text += &format!("{}\n\n", description.trim());
    }
    text += &format!("{}.\n\n", report.facts.join(", "));
    if let Some((answer, surety)) = verdict(&report.variants) {
        text += &format!("**{answer}** {surety}\n\n");
    }
    text += &ranking(report);
    text += &failures(report);
    let mut image = |name: &str, what: &str| {
        if charts.contains(&name) {
            text += &format!("![{what}]({name}.svg)\n\n");
        }
    };
    image("ranking", "bits per byte of every variant");
    let matrix = Matrix::of(&report.variants).map(|matrix| matrix_table(&matrix)).unwrap_or_default();
    text += &matrix;
    let mut section = |heading: &str, names: Vec<(String, String)>| {
        let drawn: Vec<_> = names.into_iter().filter(|(name, _)| charts.contains(&&name[..])).collect();
        if !drawn.is_empty() {
            text += &format!("## {heading}\n\n");
            drawn.iter().for_each(|(name, what)| text += &format!("![{what}]({name}.svg)\n\n"));
        }
    };
    let curve =
        |axis: Axis| (curve_id(Kind::Valid, axis), format!("bits per byte in validation against {}", axis.name()));
    section("Learning curves", Axis::ALL.map(curve).to_vec());
    let quality = |measure: Measure| (trade_off_id(measure), format!("bits per byte against {}", measure.name()));
    section("Quality and cost", Measure::ALL.map(quality).to_vec());
    let gradients = charts.iter().filter(|name| name.starts_with("gradients-"));
    section("Gradient norms", gradients.map(|name| (name.to_string(), name.replace('-', " of "))).collect());
    text += "## Variants\n\n";
    report.variants.iter().for_each(|variant| text += &about(variant, &report.base));
    text.trim_end().to_string() + "\n"
}

/// Text in a cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn ranking(report: &Report) -> String {
    let columns = columns(report);
    let mut text = "| | variant | blocks | valid bpb |".to_string();
    columns.iter().for_each(|column| text += &format!(" {} |", column.name));
    text += "\n|---|---|---|--:|";
    columns.iter().for_each(|_| text += "--:|");
    text.push('\n');
    for (i, variant) in report.variants.iter().enumerate() {
        let place = variant.valid_bpb().map_or(String::new(), |_| (i + 1).to_string());
        let blocks = variant.blocks().unwrap_or_default();
        text += &format!("| {place} | {} | {} | {} |", cell(&variant.name), cell(&blocks), bpb(variant));
        columns.iter().for_each(|column| text += &format!(" {} |", (column.cell)(variant).unwrap_or_default()));
        text.push('\n');
    }
    text + "\n"
}

fn failures(report: &Report) -> String {
    let failed: Vec<_> = report.variants.iter().flat_map(Variant::failures).collect();
    if failed.is_empty() {
        return String::new();
    }
    let mut text = format!("{} failed:\n\n", count(failed.len(), "run"));
    failed.iter().for_each(|(run, why)| text += &format!("* `{}`: {}\n", run.name, why.trim().replace('\n', " ")));
    text + "\n"
}

fn matrix_table(matrix: &Matrix) -> String {
    let shown = |bpb: Option<f64>| bpb.map_or(String::new(), |bpb| format!("{bpb:.3}"));
    let mut text = "## By block: global (rows) and local (columns)\n\n| |".to_string();
    matrix.columns.iter().for_each(|name| text += &format!(" {name} |"));
    text += " mean |\n|---|";
    (0..=matrix.columns.len()).for_each(|_| text += "--:|");
    text.push('\n');
    for ((name, cells), mean) in matrix.rows.iter().zip(&matrix.cells).zip(matrix.row_means()) {
        text += &format!("| {name} |");
        cells.iter().for_each(|bpb| text += &format!(" {} |", shown(*bpb)));
        text += &format!(" {} |\n", shown(mean));
    }
    text += "| mean |";
    matrix.column_means().into_iter().for_each(|mean| text += &format!(" {} |", shown(mean)));
    text + " |\n\n"
}

fn about(variant: &Variant, base: &str) -> String {
    let mut text = format!("### {}\n\n", variant.name);
    if let Some(cost) = &variant.cost {
        let stage = |(n, stage): (usize, &crate::cost::Stage)| {
            let crate::cost::Stage { block_type, hidden_dim, num_layers, part, .. } = stage;
            let parameters = si(part.parameters as f64);
            format!(
                "stage {}: {block_type}, width {hidden_dim}, {}, {parameters} parameters",
                n + 1,
                count(*num_layers, "layer")
            )
        };
        cost.stages.iter().enumerate().map(stage).for_each(|line| text += &format!("* {line}\n"));
        text.push('\n');
    }
    match variant.differences.is_empty() {
        true if variant.name == base => text += "What the others are compared with.\n\n",
        true => text += &format!("Configured as {base}.\n\n"),
        false => {
            text += &format!("Differences from {base}:\n\n```text\n{}\n```\n\n", variant.differences.join("\n"));
        }
    }
    if let Some(solved) = &variant.solved {
        text += &format!("Solved for: {solved}.\n\n");
    }
    if let Some(generation) = variant.generation() {
        let rate = with_unit(generation.bytes_per_second, "B/s");
        let sample = format!("{}⟦{}⟧", generation.prompt, generation.text).replace("```", "` ` `");
        text += &format!("A sample ({rate}); what it wrote stands in ⟦ ⟧:\n\n```text\n{sample}\n```\n\n");
    }
    text
}
