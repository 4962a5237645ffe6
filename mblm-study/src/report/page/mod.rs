//! The report as one HTML page that works from disk without other files, in light and dark mode, and on a phone.
//!
//! `html!` escapes every text that is put into the page. Only style, script and charts are marked as [`PreEscaped`];
//! the charts escape their own texts.

mod best;
mod details;
mod numbers;
mod panels;
mod passage;
mod scaling;
mod tables;
mod tuning;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Report;
use super::charts::svg::{Format, STYLE};
use super::format::{count, visible};
use super::run::Run;
use super::variant::Variant;
use super::verdict::verdict;

const PAGE_STYLE: &str = include_str!("page.css");
const SCRIPT: &str = concat!(include_str!("page.js"), include_str!("passage.js"));

/// `report.html`; `csv` is the text of `results.csv`.
pub(super) fn html(report: &Report, csv: &str) -> String {
    let charts = Charts::new(report);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (report.title) }
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) (PreEscaped(PAGE_STYLE)) (PreEscaped(panels::style())) }
            }
            body {
                main {
                    (head(report))
                    (failures(report))
                    (tables::ranking(report, &charts))
                    (tables::matrix(report))
                    (tuning::sections(report, &charts))
                    (scaling::section(report, &charts))
                    (panels::learning_curves(report, &charts))
                    (panels::trade_offs(&charts))
                    (passage::section(report, &charts))
                    (panels::gradients(report, &charts))
                    (tables::apart(report))
                    (details::variants(report))
                    (numbers::section(csv))
                    (footer())
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
        "\n"
    };
    // A sample may hold any byte. The page as a whole is cleaned, so that no text can be forgotten.
    visible(&page.into_string())
}

/// The charts in both formats, as elements.
struct Charts(Vec<(String, String)>);

impl Charts {
    fn new(report: &Report) -> Self {
        let format = |format, class: &str| {
            report.charts(format).into_iter().map(|(name, svg)| (name, svg.inline(class))).collect::<Vec<_>>()
        };
        let narrow = format(Format::Narrow, "narrow");
        let both = format(Format::Wide, "wide").into_iter().zip(narrow);
        Charts(both.map(|((name, wide), (_, narrow))| (name, wide + &narrow)).collect())
    }

    fn get(&self, name: &str) -> Option<PreEscaped<&str>> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, chart)| PreEscaped(&chart[..]))
    }
}

fn head(report: &Report) -> Markup {
    html! {
        h1 { (report.title) }
        @if let Some(description) = &report.description {
            p.about { (description.trim()) }
        }
        ul.facts {
            @for fact in &report.facts { li { (fact) } }
        }
        @if let Some((answer, surety)) = verdict(&report.variants, report.looks) {
            div.verdict { p { (answer) } p.soft { (surety) } }
        }
        (best::tiles(report))
    }
}

fn failures(report: &Report) -> Markup {
    let failed: Vec<(&Run, &str)> = report.all_variants().flat_map(Variant::failures).collect();
    html! {
        @if !failed.is_empty() {
            section.failed {
                h2 { (count(failed.len(), "run")) " failed" }
                @for (run, why) in failed { p { (run.name) } pre { (why.trim()) } }
            }
        }
    }
}

fn footer() -> Markup {
    html! {
        footer {
            p {
                "Bits per byte are the mean loss per byte divided by ln 2, of each run's best validation; parameters and \
                 FLOPs are counted as " code { "mblm inspect" } " counts them, of a forward pass, from the global stage to \
                 the local one; a training step counts as three forward passes. Training speed leaves out validations and \
                 checkpoints, time does not. Memory is the most that a run's process held."
            }
            p {
                "Beside this page: " a href="report.md" { "report.md" } ", " a href="results.csv" { "results.csv" } ", "
                a href="results.json" { "results.json" } " and every chart as SVG."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::matrix::tests::cost;
    use crate::report::table;
    use crate::report::variant::tests::{run, variant};
    use crate::report::{
        Apart, Generation, Kind, Measured, Point, RunResult, Scaling, ScalingData, ScalingVariant, Status, Try, Tuned,
        TunedVariant,
    };
    use crate::statistics::scaling::tests::points;

    fn page_of(report: &Report) -> String {
        html(report, &table::csv(report).unwrap())
    }

    fn report(n: usize) -> Report {
        let mut variants: Vec<Variant> = (0..n)
            .map(|i| variant(&format!("<b>{i}"), vec![run(1, Status::Finished, &[8.0, 2.0 + i as f64])]))
            .collect();
        variants.iter_mut().for_each(|variant| variant.cost = Some(cost(&["a", "b"])));
        let generation =
            Generation { prompt: "</pre>".into(), text: "<script>".into(), bytes: 8, bytes_per_second: 5.0 };
        let measured = Measured { generation: Some(generation), ..Measured::default() };
        variants[0].runs[0].result = Some(RunResult { measured, ..RunResult::default() });
        variants.push(variant("lost", vec![run(1, Status::Failed("<oops>".into()), &[])]));
        Report {
            title: "A & B".into(),
            description: None,
            facts: vec!["1 < 2".into()],
            base: "base".into(),
            variants,
            ..Report::default()
        }
    }

    #[test]
    fn nothing_from_outside_and_nothing_unescaped() {
        for n in [1, 2, 30] {
            let page = page_of(&report(n));
            for outside in ["http", "src=", "@import", "url(\""] {
                assert!(!page.contains(outside), "{outside}");
            }
            assert!(page.contains("A &amp; B") && page.contains("&lt;oops&gt;") && !page.contains("<b>0"));
            assert_eq!(page.matches("<script>").count(), 1, "a sample is no script");
            assert_eq!(page.matches("<tr class=").count(), n + 1);
            assert_eq!(page.matches("<details").count(), n + 2, "of each variant, and all numbers");
            let ids: Vec<&str> =
                page.split("<clipPath id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
            let mut unique = ids.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), ids.len(), "{ids:?}");
        }
    }

    #[test]
    fn no_text_from_outside_leaves_its_place() {
        const HOSTILE: &str = "\" onload=\"x\"><img src=x>\u{1b}[31m";
        let mut report = report(3);
        let hostile = || HOSTILE.to_string();
        (report.title, report.base) = (hostile(), hostile());
        (report.description, report.facts) = (Some(hostile()), vec![hostile()]);
        for (i, variant) in report.variants.iter_mut().enumerate() {
            variant.name = format!("{HOSTILE}{i}");
            variant.cost = Some(cost(&[&format!("{HOSTILE}{}", i / 2), &format!("{HOSTILE}{}", i % 2)]));
            (variant.differences, variant.solved) = (vec![hostile()], Some(hostile()));
            variant.runs[0].name = hostile();
        }
        report.variants[1].differences.clear();
        let sample = Generation { prompt: hostile(), text: hostile(), bytes: 8, bytes_per_second: 5.0 };
        let sampled = Measured { generation: Some(sample), ..Measured::default() };
        let missing = Measured { missing: Some(hostile()), ..Measured::default() };
        for (variant, measured) in report.variants.iter_mut().zip([sampled, missing]) {
            variant.runs[0].result = Some(RunResult { measured, ..RunResult::default() });
        }
        report.variants[3].runs[0].status = Status::Failed(hostile());
        report.apart.push(Apart { why: vec![hostile()], variants: report.variants.clone() });
        let tries = [Some(2.0), None].map(|bpb| Try { value: 1.0 + bpb.unwrap_or(0.0), bpb }).to_vec();
        let variants = vec![TunedVariant::new(hostile(), tries)];
        report.tuning.push(Tuned { field: hostile(), variants, ..Tuned::default() });
        let points = points(20.0, 0.06, &[0.0, 0.01, 0.02]);
        let variants = [0, 1].map(|_| ScalingVariant { name: hostile(), points: points.clone() }).to_vec();
        report.scaling = Scaling::of(ScalingData { variants });
        let charts = report.charts(Format::Wide).into_iter().map(|(_, svg)| svg.file());
        for text in charts.chain([page_of(&report)]) {
            assert!(text.contains("&quot; onload=&quot;x&quot;&gt;&lt;img src=x&gt;\u{FFFD}[31m"));
            assert!(!text.contains("<img") && !text.contains("\" onload"));
            assert!(!text.contains(|c: char| c.is_control() && c != '\n'));
        }
        assert!(page_of(&report).contains("Global or local?"), "the matrix is among them");
    }

    #[test]
    fn what_is_equal_has_no_first() {
        let of = |name: &str, rate: f64, bpb: f64| {
            let mut run = run(1, Status::Finished, &[bpb]);
            run.points[0].rate = Some(rate);
            run.points[0].kind = Kind::Train;
            run.points.push(Point { kind: Kind::Valid, rate: None, ..run.points[0].clone() });
            variant(name, vec![run])
        };
        let mut report = report(1);
        report.variants = vec![of("a", 1000.0, 2.0), of("b", 1010.0, 2.0), of("c", 500.0, 3.0)];
        let page = page_of(&report);
        assert!(
            page.contains("<dt>fastest in training: a tie</dt>") && page.contains("<dt>best: a tie</dt>"),
            "{page}"
        );
        assert!(page.contains("<dd class=\"who\">a, b</dd>"));
        report.variants[0] = of("a", 2000.0, 1.0);
        let page = page_of(&report);
        assert!(page.contains("<dt>fastest in training</dt>") && page.contains("<dt>best</dt>"), "{page}");
    }

    #[test]
    fn what_was_measured_on_something_else_is_apart() {
        let mut report = report(2);
        let other = variant("other", vec![run(1, Status::Finished, &[1.0])]);
        report.apart.push(Apart { why: vec!["data: <x>, not y".into()], variants: vec![other] });
        let page = page_of(&report);
        assert!(page.contains("<li>data: &lt;x&gt;, not y</li>") && page.contains("2.000 bits per byte"), "{page}");
        assert_eq!(page.matches("<table class=\"ranking\">").count(), 2);
        assert_eq!(page.matches("<tr class=\"first").count(), 2, "each group has its first");
    }

    #[test]
    fn a_chart_without_numbers_says_so() {
        let page = page_of(&report(2));
        assert!(page.contains("p-curves-train-bytes\"><p>There are no numbers"), "nothing was logged in training");
        assert!(page.contains("+1.000</small>") && page.contains("class=\"dim c2\""));
    }
}
