//! The report as Markdown, with the charts as files beside it.

use super::format::{count, fenced, markdown, si, with_unit};
use super::matrix::Matrix;
use super::scaling;
use super::standing::Standings;
use super::table::{bpb, columns, places};
use super::variant::Variant;
use super::verdict::verdict;
use super::{Axis, Kind, Measure, PLACES, Report, curve_id, trade_off_id, tuning_id};

/// `report.md`; `charts` are the names of those that were drawn.
pub(super) fn text(report: &Report, charts: &[&str]) -> String {
    let mut text = format!("# {}\n\n", markdown(&report.title));
    if let Some(description) = &report.description {
        text += &format!("{}\n\n", markdown(description));
    }
    text += &format!("{}.\n\n", markdown(&report.facts.join(", ")));
    if let Some((answer, surety)) = verdict(&report.variants, report.looks) {
        text += &format!("**{}** {}\n\n", markdown(&answer), markdown(&surety));
    }
    for (why, variants) in report.groups() {
        if !why.is_empty() {
            text += &format!(
                "Not ranked with these, since they were measured on something else ({}):\n\n",
                markdown(&why.join("; "))
            );
        }
        text += &ranking(report, variants);
    }
    text += &failures(report);
    let mut image = |name: &str, what: &str| {
        if charts.contains(&name) {
            text += &format!("![{what}]({name}.svg)\n\n");
        }
    };
    image("ranking", "bits per byte of every variant");
    let matrix = Matrix::of(&report.variants).map(|matrix| matrix_table(&matrix)).unwrap_or_default();
    text += &matrix;
    text += &tuning(report, charts);
    text += &size_and_budget(report, charts);
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
    section(
        "Bits by position in the patch",
        vec![(PLACES.into(), "mean bits by the byte's position in the innermost patch".into())],
    );
    let gradients = charts.iter().filter(|name| name.starts_with("gradients-"));
    section("Gradient norms", gradients.map(|name| (name.to_string(), name.replace('-', " of "))).collect());
    text += "## Variants\n\n";
    report.all_variants().for_each(|variant| text += &about(variant, &report.base));
    text.trim_end().to_string() + "\n"
}

fn ranking(report: &Report, variants: &[Variant]) -> String {
    let (columns, standings) = (columns(report), Standings::of(variants, report.looks));
    let mut text = "| | group | variant | blocks | valid bpb | above the best (95% interval) |".to_string();
    columns.iter().for_each(|column| text += &format!(" {} |", column.name));
    text += "\n|---|---|---|---|--:|--:|";
    columns.iter().for_each(|_| text += "--:|");
    text.push('\n');
    let number = |number: Option<usize>| number.map_or(String::new(), |number| number.to_string());
    for (i, (variant, place)) in variants.iter().zip(places(variants)).enumerate() {
        let (name, blocks) = (markdown(&variant.name), markdown(&variant.blocks().unwrap_or_default()));
        let (place, group) = (number(place), number(standings.group(i)));
        let difference = standings.difference(i).unwrap_or_default();
        text += &format!("| {place} | {group} | {name} | {blocks} | {} | {difference} |", bpb(variant));
        columns.iter().for_each(|column| text += &format!(" {} |", (column.cell)(variant).unwrap_or_default()));
        text.push('\n');
    }
    text + "\n"
}

fn failures(report: &Report) -> String {
    let failed: Vec<_> = report.all_variants().flat_map(Variant::failures).collect();
    if failed.is_empty() {
        return String::new();
    }
    let mut text = format!("{} failed:\n\n", count(failed.len(), "run"));
    failed.iter().for_each(|(run, why)| text += &format!("* {}: {}\n", markdown(&run.name), markdown(why)));
    text + "\n"
}

fn matrix_table(matrix: &Matrix) -> String {
    let shown = |bpb: Option<f64>| bpb.map_or(String::new(), |bpb| format!("{bpb:.3}"));
    let mut text = "## By block: global (rows) and local (columns)\n\n| |".to_string();
    matrix.columns.iter().for_each(|name| text += &format!(" {} |", markdown(name)));
    text += " mean |\n|---|";
    (0..=matrix.columns.len()).for_each(|_| text += "--:|");
    text.push('\n');
    for ((name, cells), mean) in matrix.rows.iter().zip(&matrix.cells).zip(matrix.row_means()) {
        text += &format!("| {} |", markdown(name));
        cells.iter().for_each(|bpb| text += &format!(" {} |", shown(*bpb)));
        text += &format!(" {} |\n", shown(mean));
    }
    text += "| mean |";
    matrix.column_means().into_iter().for_each(|mean| text += &format!(" {} |", shown(mean)));
    text + " |\n\n"
}

fn tuning(report: &Report, charts: &[&str]) -> String {
    let mut text = String::new();
    for (n, tuned) in report.tuning.iter().enumerate() {
        let field = markdown(&tuned.field);
        text += &format!("## Tuning of {field}\n\n{}\n\n", markdown(&tuned.about()));
        if charts.contains(&&tuning_id(n)[..]) {
            text += &format!("![bits per byte against {field}]({}.svg)\n\n", tuning_id(n));
        }
        text += &format!("| variant | best {field} | valid bpb | cost of half | cost of twice | tries |\n");
        text += "|---|--:|--:|--:|--:|--:|\n";
        for variant in &tuned.variants {
            let [name, best, bpb, half, twice, tries] = variant.cells();
            text += &format!("| {} | {best} | {bpb} | {half} | {twice} | {tries} |\n", markdown(&name));
        }
        text.push('\n');
    }
    text
}

fn size_and_budget(report: &Report, charts: &[&str]) -> String {
    let Some(scaling) = &report.scaling else { return String::new() };
    let mut text = format!("## Size and budget\n\n{}\n\n", markdown(&scaling.about()));
    scaling.findings().iter().for_each(|finding| text += &format!("* {}\n", markdown(finding)));
    text += &format!("\n{}\n\n", markdown(&scaling.about_intervals()));
    for name in charts.iter().filter(|name| name.starts_with("scaling-")) {
        text += &format!("![{}]({name}.svg)\n\n", name.replace('-', " "));
    }
    text += &format!("| {} |\n|---|--:|--:|--:|--:|\n", scaling::COLUMNS.join(" | "));
    for [name, cells @ ..] in scaling.rows() {
        let cells = cells.map(|cell| cell.replace('[', "\\[").replace(']', "\\]"));
        text += &format!("| {} | {} |\n", markdown(&name), cells.join(" | "));
    }
    text + "\n"
}

fn about(variant: &Variant, base: &str) -> String {
    let mut text = format!("### {}\n\n", markdown(&variant.name));
    let (is_base, base) = (variant.name == base, markdown(base));
    if let Some(cost) = &variant.cost {
        let stage = |(n, stage): (usize, &mblm_train::cost::Stage)| {
            let mblm_train::cost::Stage { block_type, hidden_dim, num_layers, part, .. } = stage;
            let parameters = si(part.parameters as f64);
            format!(
                "stage {}: {}, width {hidden_dim}, {}, {parameters} parameters",
                n + 1,
                markdown(block_type),
                count(*num_layers, "layer")
            )
        };
        cost.stages.iter().enumerate().map(stage).for_each(|line| text += &format!("* {line}\n"));
        text.push('\n');
    }
    match variant.differences.is_empty() {
        true if is_base => text += "What the others are compared with.\n\n",
        true => text += &format!("Configured as {base}.\n\n"),
        false => {
            text += &format!("Differences from {base}:\n\n{}", fenced(&variant.differences.join("\n")));
        }
    }
    if let Some(solved) = &variant.solved {
        text += &format!("Solved for: {}.\n\n", markdown(solved));
    }
    if let Some(generation) = variant.generation() {
        let rate = with_unit(generation.bytes_per_second, "B/s");
        let sample = fenced(&format!("{}⟦{}⟧", generation.prompt, generation.text));
        text += &format!("A sample ({rate}); what it wrote stands in ⟦ ⟧:\n\n{sample}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::run::{Generation, Measured, RunResult, Status};
    use super::super::variant::tests::{run, variant};
    use super::*;

    #[test]
    fn names_and_samples_are_text_alone() {
        let evil = "|a|<script>[x](http://y)\n# b";
        let generation =
            Generation { prompt: "```".into(), text: "</pre>\u{1b}".into(), bytes: 8, bytes_per_second: 5.0 };
        let measured = Measured { generation: Some(generation), ..Measured::default() };
        let mut good = run(1, Status::Finished, &[2.0]);
        good.result = Some(RunResult { measured, ..RunResult::default() });
        let mut variants =
            vec![variant(evil, vec![good]), variant("b", vec![run(1, Status::Failed(evil.into()), &[])])];
        variants[1].differences = vec!["```\n<b>".into()];
        let report = Report {
            title: evil.into(),
            description: Some("1. a\n<b>".into()),
            facts: vec![],
            base: evil.into(),
            variants,
            ..Report::default()
        };
        let text = text(&report, &[]);
        assert!(text.contains("\\|a\\|\\<script\\>\\[x\\](http\\://y) # b"), "{text}");
        let outside: String = text.split("````").step_by(2).collect();
        for raw in ["|a|", "<script>", "<b>", "[x]", "http:", "\u{1b}", "\n# b", "\n1. "] {
            assert!(!outside.contains(raw), "{raw}: {text}");
        }
    }
}
