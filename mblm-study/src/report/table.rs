//! The numbers as tables: for the terminal, as `results.csv` with a line per run, and as `results.json`.

use mblm_train::cost::bytes as binary;
use mblm_train::error::{AtPath, Result};
use mblm_train::journal::metrics::Kind;
use serde::Serialize;

use super::Report;
use super::format::{duration, inert, si, with_unit};
use super::run::{Run, Status};
use super::standing::Standings;
use super::variant::{Spread, Variant};

/// A line of `results.csv`.
#[derive(Serialize)]
struct Row<'a> {
    /// Runs of different groups were measured on something else; ranks are within a group.
    group: usize,
    rank: usize,
    variant: &'a str,
    run: &'a str,
    seed: Option<u64>,
    status: &'static str,
    blocks: Option<String>,
    valid_bpb: Option<f64>,
    test_bpb: Option<f64>,
    bytes: Option<f64>,
    seconds: Option<f64>,
    train_bytes_per_second: Option<f64>,
    generation_bytes_per_second: Option<f64>,
    peak_memory_bytes: Option<f64>,
    parameters: Option<f64>,
    /// From global to local, separated by `/`.
    parameters_by_stage: Option<String>,
    flops_per_byte: Option<f64>,
    /// The machines it was on, separated by `/`.
    hosts: Option<String>,
    error: Option<&'a str>,
}

impl<'a> Row<'a> {
    fn new((group, rank): (usize, usize), variant: &'a Variant, run: &'a Run) -> Self {
        let by_stage = variant.cost.as_ref().map(|cost| {
            cost.stages.iter().map(|stage| stage.part.parameters.to_string()).collect::<Vec<_>>().join("/")
        });
        Row {
            group,
            rank,
            variant: &variant.name,
            run: &run.name,
            seed: run.seed,
            status: status(run),
            blocks: variant.blocks(),
            valid_bpb: run.valid_bpb(),
            test_bpb: run.test_bpb(),
            bytes: run.bytes(),
            seconds: run.seconds(),
            train_bytes_per_second: run.train_rate(),
            generation_bytes_per_second: run.generation().map(|generation| generation.bytes_per_second),
            peak_memory_bytes: run.peak_bytes(),
            parameters: variant.parameters(),
            parameters_by_stage: by_stage,
            flops_per_byte: variant.flops_per_byte(),
            hosts: run.result.as_ref().map(|result| result.hosts.join("/")),
            error: match &run.status {
                Status::Failed(why) => Some(why),
                _ => None,
            },
        }
    }
}

pub(super) fn status(run: &Run) -> &'static str {
    match run.status {
        Status::Finished => "finished",
        Status::Unfinished => "unfinished",
        Status::Failed(_) => "failed",
    }
}

/// All runs with their variants and ranks, counted from 1.
fn rows(report: &Report) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for (group, (_, variants)) in (1..).zip(report.groups()) {
        for (rank, variant) in (1..).zip(variants) {
            rows.extend(variant.runs.iter().map(|run| Row::new((group, rank), variant, run)));
        }
    }
    rows
}

/// `results.csv`, in which no cell is a formula.
pub(super) fn csv(report: &Report) -> Result<String> {
    let place = std::path::Path::new("results.csv");
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows(report) {
        writer.serialize(row).map_err(std::io::Error::from).at(place)?;
    }
    if rows(report).is_empty() {
        return Ok(header());
    }
    let rows = writer.into_inner().map_err(|error| error.into_error()).at(place)?;
    let mut safe = csv::Writer::from_writer(Vec::new());
    for row in csv::ReaderBuilder::new().has_headers(false).from_reader(&rows[..]).records() {
        let row = row.map_err(std::io::Error::from).at(place)?;
        safe.write_record(row.iter().map(|cell| inert(cell).into_owned())).map_err(std::io::Error::from).at(place)?;
    }
    let bytes = safe.into_inner().map_err(|error| error.into_error()).at(place)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first line of `results.csv`, for a study of which no run is known yet.
fn header() -> String {
    let run = Run::absent("", 0, Status::Unfinished);
    let variant = Variant { name: String::new(), runs: vec![], cost: None, differences: vec![], solved: None };
    let mut writer = csv::Writer::from_writer(Vec::new());
    let row = writer.serialize(Row::new((0, 0), &variant, &run)).map(|()| writer.into_inner().unwrap_or_default());
    let text = String::from_utf8_lossy(&row.unwrap_or_default()).into_owned();
    text.lines().next().map_or(String::new(), |line| format!("{line}\n"))
}

/// `results.json`: the variants, best first, and their runs with the validations over time.
pub(super) fn json(report: &Report) -> Result<String> {
    let spread = |spread: Option<Spread>| {
        spread.map(|s| serde_json::json!({"mean": s.mean, "deviation": s.deviation, "min": s.min, "max": s.max, "seeds": s.count}))
    };
    let variant = |group: usize, standings: &Standings, (rank, variant): (usize, &Variant)| {
        let run = |run: &Run| {
            let validations: Vec<_> = run
                .of_kind(Kind::Valid)
                .map(|p| serde_json::json!({"bytes": p.bytes, "seconds": p.seconds, "bpb": p.bpb}))
                .collect();
            serde_json::json!({
                "summary": Row::new((group, rank + 1), variant, run),
                "folder": run.folder.as_ref().map(|folder| folder.to_string_lossy()),
                "validations": validations,
                "generation": run.generation(),
            })
        };
        serde_json::json!({
            "rank": rank + 1,
            "name": variant.name,
            "blocks": variant.blocks(),
            "standing": standings.json(rank),
            "valid_bpb": spread(variant.valid_bpb()),
            "test_bpb": spread(variant.test_bpb()),
            "train_bytes_per_second": variant.train_rate(),
            "generation_bytes_per_second": variant.generation_rate(),
            "peak_memory_bytes": variant.peak_bytes(),
            "seconds": variant.seconds(),
            "bytes": variant.bytes(),
            "cost": variant.cost,
            "differences": variant.differences,
            "solved": variant.solved,
            "runs": variant.runs.iter().map(run).collect::<Vec<_>>(),
        })
    };
    let group = |n: usize, variants: &[Variant]| {
        let standings = Standings::of(variants, report.looks);
        variants.iter().enumerate().map(|ranked| variant(n, &standings, ranked)).collect::<Vec<_>>()
    };
    let json = serde_json::json!({
        "title": report.title,
        "description": report.description,
        "facts": report.facts,
        "variants": group(1, &report.variants),
        "looks": report.looks.max(1),
        "apart": report.apart.iter().zip(2..).map(|(apart, n)| serde_json::json!({
            "why": apart.why,
            "variants": group(n, &apart.variants),
        })).collect::<Vec<_>>(),
        "tuning": report.tuning,
        "scaling": report.scaling.as_ref().map(|scaling| scaling.json()),
    });
    serde_json::to_string_pretty(&json).map_err(std::io::Error::from).at(std::path::Path::new("results.json"))
}

/// A column of the ranking: its name, and a variant's cell.
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) cell: fn(&Variant) -> Option<String>,
    /// What it is sorted by.
    pub(super) key: fn(&Variant) -> Option<f64>,
    /// Whether the largest comes first.
    pub(super) descends: bool,
}

/// The columns after name and bits per byte.
pub(super) const COLUMNS: [Column; 7] = [
    Column {
        name: "test bpb",
        cell: |v| Some(v.test_bpb()?.text(3)),
        key: |v| Some(v.test_bpb()?.mean),
        descends: false,
    },
    Column { name: "parameters", cell: |v| v.parameters().map(si), key: Variant::parameters, descends: false },
    Column { name: "FLOP/byte", cell: |v| v.flops_per_byte().map(si), key: Variant::flops_per_byte, descends: false },
    Column {
        name: "training",
        cell: |v| v.train_rate().map(|rate| with_unit(rate, "B/s")),
        key: Variant::train_rate,
        descends: true,
    },
    Column {
        name: "generation",
        cell: |v| v.generation_rate().map(|rate| with_unit(rate, "B/s")),
        key: Variant::generation_rate,
        descends: true,
    },
    Column { name: "memory", cell: |v| v.peak_bytes().map(binary), key: Variant::peak_bytes, descends: false },
    Column { name: "time", cell: |v| v.seconds().map(duration), key: Variant::seconds, descends: false },
];

/// The columns that some variant has a number for.
pub(super) fn columns(report: &Report) -> Vec<&'static Column> {
    COLUMNS.iter().filter(|column| report.all_variants().any(|variant| (column.key)(variant).is_some())).collect()
}

/// Bits per byte, or why there are none.
pub(super) fn bpb(variant: &Variant) -> String {
    match variant.valid_bpb() {
        Some(bpb) if variant.is_finished() => bpb.text(3),
        Some(bpb) => format!("{:.3} so far", bpb.mean),
        None if variant.failures().next().is_some() => "failed".into(),
        None => "not run".into(),
    }
}

/// The place of each ranked variant, counted from 1; equals share one.
pub(super) fn places(variants: &[Variant]) -> Vec<Option<usize>> {
    let means: Vec<_> =
        variants.iter().map(|variant| Some((variant.is_finished(), variant.valid_bpb()?.mean))).collect();
    means
        .iter()
        .map(|mean| mean.and_then(|mean| means.iter().position(|other| *other == Some(mean))).map(|i| i + 1))
        .collect()
}

/// The ranking for a terminal.
pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    for (why, variants) in report.groups() {
        if !why.is_empty() {
            text +=
                &format!("\nnot ranked with these, since they were measured on something else ({}):\n", why.join("; "));
        }
        text += &group_text(&columns(report), variants, &Standings::of(variants, report.looks));
    }
    for (run, why) in report.all_variants().flat_map(Variant::failures) {
        text += &format!("\n{} failed: {why}", run.name);
    }
    if let Some((answer, surety)) = super::verdict::verdict(&report.variants, report.looks) {
        text += &format!("\n{answer}\n{surety}");
    }
    text.trim_end().to_string() + "\n"
}

/// Groups and differences are shown if anything was tested.
fn group_text(columns: &[&Column], variants: &[Variant], standings: &Standings) -> String {
    let is_tested = standings.is_tested();
    let mut header = vec!["".to_string(), "variant".into(), "valid bpb".into()];
    header.extend(["group", "above the best (95%)"].into_iter().filter(|_| is_tested).map(String::from));
    header.extend(columns.iter().map(|column| column.name.to_string()));
    let mut rows = vec![header];
    let number = |number: Option<usize>| number.map_or("-".into(), |number| number.to_string());
    for (i, (variant, place)) in variants.iter().zip(places(variants)).enumerate() {
        let mut row = vec![number(place), variant.name.clone(), bpb(variant)];
        let standing = [number(standings.group(i)), standings.difference(i).unwrap_or("-".into())];
        row.extend(standing.into_iter().filter(|_| is_tested));
        row.extend(columns.iter().map(|column| (column.cell)(variant).unwrap_or("-".into())));
        rows.push(row);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            1 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::variant::tests::{run, variant};
    use super::*;

    fn report() -> Report {
        let failed = run(2, Status::Failed("the loss, \"NaN\"".into()), &[]);
        Report {
            title: "t".into(),
            description: None,
            facts: vec![],
            base: "base".into(),
            variants: vec![
                variant("good", vec![run(1, Status::Finished, &[0.1 + 0.2]), run(2, Status::Finished, &[0.5])]),
                variant("lost", vec![failed]),
            ],
            ..Report::default()
        }
    }

    #[test]
    fn csv_has_a_line_per_run_and_every_digit() {
        let text = csv(&report()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("group,rank,variant,run,seed,status,blocks,valid_bpb,test_bpb,bytes,seconds,"),
            "{text}"
        );
        assert_eq!(lines[1], "1,1,good,v-seed1,1,finished,,0.30000000000000004,,100.0,1.0,,,,,,,,");
        assert_eq!(lines[3], "1,2,lost,v-seed2,2,failed,,,,,,,,,,,,,\"the loss, \"\"NaN\"\"\"");
    }

    #[test]
    fn a_csv_without_runs_has_its_header() {
        let mut report = report();
        let header = csv(&report).unwrap().lines().next().unwrap().to_string();
        report.variants.clear();
        assert_eq!(csv(&report).unwrap(), header + "\n");
    }

    #[test]
    fn csv_has_no_formulas() {
        let mut report = report();
        report.variants[0].name = "=HYPERLINK(\"http://x\")".into();
        report.variants[0].runs[0].name = "@x".into();
        report.variants[1].runs[0].status = Status::Failed("-1+cmd|' /C calc'!A0".into());
        let text = csv(&report).unwrap();
        for cell in ["1,\"'=HYPERLINK(\"\"http://x\"\")\",'@x,", ",'-1+cmd|' /C calc'!A0"] {
            assert!(text.contains(cell), "{text}");
        }
    }

    #[test]
    fn json_has_means_and_runs() {
        let json: serde_json::Value = serde_json::from_str(&json(&report()).unwrap()).unwrap();
        let good = &json["variants"][0];
        assert_eq!((good["valid_bpb"]["mean"].as_f64(), good["valid_bpb"]["seeds"].as_u64()), (Some(0.4), Some(2)));
        assert_eq!(good["runs"][0]["validations"][0]["bpb"].as_f64(), Some(0.1 + 0.2));
        assert_eq!(json["variants"][1]["runs"][0]["summary"]["error"], "the loss, \"NaN\"");
    }

    #[test]
    fn what_was_measured_on_something_else_has_a_ranking_of_its_own() {
        let mut report = report();
        let other = variant("other", vec![run(1, Status::Finished, &[0.1])]);
        report.apart.push(super::super::Apart { why: vec!["data: x, not y".into()], variants: vec![other] });
        let text = text(&report);
        assert!(text.contains("1  good") && text.contains("something else (data: x, not y):\n"), "{text}");
        assert!(text.contains("1  other") && text.contains("good reaches 0.400"), "{text}");
        assert!(csv(&report).unwrap().contains("\n2,1,other,"));
    }

    #[test]
    fn equals_share_a_place() {
        let of = |bpb: f64| variant("v", vec![run(1, Status::Finished, &[bpb])]);
        let variants = [of(1.0), of(1.0), of(2.0), variant("lost", vec![])];
        assert_eq!(places(&variants), [Some(1), Some(1), Some(3), None]);
    }

    #[test]
    fn groups_are_shown_where_something_was_tested() {
        let of = |name: &str, bpbs: [f64; 3]| {
            variant(name, bpbs.iter().zip(1..).map(|(bpb, seed)| run(seed, Status::Finished, &[*bpb])).collect())
        };
        let variants = vec![of("a", [2.0, 2.1, 2.2]), of("b", [2.01, 2.08, 2.25]), of("c", [2.5, 2.61, 2.69])];
        let text = text(&Report { variants, ..Report::default() });
        let groups: Vec<_> = text.lines().take(4).map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(groups[0][..5], ["variant", "valid", "bpb", "group", "above"]);
        assert_eq!([groups[1][5], groups[2][5], groups[3][5]], ["1", "1", "2"], "{text}");
        assert!(groups[3][6].starts_with("+0.5"), "{text}");
    }

    #[test]
    fn the_terminals_table_leaves_out_what_nobody_has() {
        let want = "   variant      valid bpb   time\n1  good     0.400 ± 0.141  1.0 s\n-  lost            failed      -\n\n\
                    v-seed2 failed: the loss, \"NaN\"\ngood reaches 0.400 ± 0.141 bits per byte (mean of 2 seeds).\n\
                    There is nothing to compare it with yet.\n";
        assert_eq!(text(&report()), want);
    }
}
