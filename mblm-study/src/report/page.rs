//! The report as one HTML page that needs nothing but itself: works from disk, light and dark, on a phone.

use mblm_train::cost::bytes as binary;

use super::charts::svg::{Format, STYLE, colour};
use super::format::{count, escape, si, with_unit};
use super::matrix::Matrix;
use super::run::Run;
use super::table::{Column, bpb, columns, places};
use super::variant::Variant;
use super::verdict::verdict;
use super::{Apart, Axis, Kind, Measure, Report, curve_id, details, gradient_id, trade_off_id};

const PAGE_STYLE: &str = include_str!("page.css");
/// Speeds and memory that differ by less than this share are a tie: two runs of one configuration do.
const SLACK: f64 = 0.02;
const SCRIPT: &str = include_str!("page.js");

/// `report.html`
pub(super) fn html(report: &Report) -> String {
    let charts = Charts::new(report);
    let title = escape(&report.title);
    let parts = [
        head(report),
        failures(report),
        ranking(report, &charts),
        matrix(report),
        learning_curves(report, &charts),
        trade_offs(&charts),
        gradients(report, &charts),
        apart(report),
        details::variants(report),
        footer(),
    ];
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}{PAGE_STYLE}{}</style>\n</head>\n<body>\n<main>\n{}</main>\n\
         <script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        switch_style(),
        parts.concat()
    )
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

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, chart)| &chart[..])
    }
}

fn head(report: &Report) -> String {
    let mut html = format!("<h1>{}</h1>\n", escape(&report.title));
    if let Some(description) = &report.description {
        html += &format!("<p class=\"about\">{}</p>\n", escape(description.trim()));
    }
    let facts: String = report.facts.iter().map(|fact| format!("<li>{}</li>", escape(fact))).collect();
    html += &format!("<ul class=\"facts\">{facts}</ul>\n");
    if let Some((answer, surety)) = verdict(&report.variants) {
        html += &format!(
            "<div class=\"verdict\"><p>{}</p><p class=\"soft\">{}</p></div>\n",
            escape(&answer),
            escape(&surety)
        );
    }
    html + &tiles(report)
}

/// The best in each respect.
fn tiles(report: &Report) -> String {
    type Of = fn(&Variant) -> Option<f64>;
    let finished: Vec<&Variant> = report.variants.iter().filter(|v| v.is_finished()).collect();
    if finished.len() < 2 {
        return String::new();
    }
    let tile = |what: &str, of: Of, (sign, slack): (f64, f64), shown: &dyn Fn(f64) -> String| -> String {
        let values = finished.iter().filter_map(|variant| Some((variant, of(variant)?)));
        let values: Vec<(&Variant, f64)> = values.map(|(variant, value)| (*variant, value)).collect();
        let Some(&(_, best)) = values.iter().min_by(|a, b| (sign * a.1).total_cmp(&(sign * b.1))) else {
            return String::new();
        };
        // What looks the same, or differs less than measurements do, has no first.
        let is_equal = |value: f64| shown(value) == shown(best) || (value - best).abs() < slack * best.abs();
        let first: Vec<&str> = values.iter().filter(|(_, value)| is_equal(*value)).map(|(v, _)| &v.name[..]).collect();
        let (what, who) = match &first[..] {
            [one] => (what.to_string(), one.to_string()),
            many => (format!("{what}: a tie"), many.join(", ")),
        };
        let (shown, who) = (shown(best), escape(&who));
        format!("<div><dt>{what}</dt><dd class=\"value\">{shown}</dd><dd class=\"who\">{who}</dd></div>\n")
    };
    let per_second = |rate: f64| with_unit(rate, "B/s");
    format!(
        "<dl class=\"tiles\">\n{}{}{}{}</dl>\n",
        tile("best", |v| Some(v.valid_bpb()?.mean), (1.0, 0.0), &|bpb| format!("{bpb:.3} bpb")),
        tile("fastest in training", Variant::train_rate, (-1.0, SLACK), &per_second),
        tile("fastest in generation", Variant::generation_rate, (-1.0, SLACK), &per_second),
        tile("least memory", Variant::peak_bytes, (1.0, SLACK), &|bytes| binary(bytes)),
    )
}

fn failures(report: &Report) -> String {
    let failed: Vec<(&Run, &str)> = report.all_variants().flat_map(Variant::failures).collect();
    if failed.is_empty() {
        return String::new();
    }
    let list =
        failed.iter().map(|(run, why)| format!("<p>{}</p><pre>{}</pre>\n", escape(&run.name), escape(why.trim())));
    format!(
        "<section class=\"failed\"><h2>{} failed</h2>\n{}</section>\n",
        count(failed.len(), "run"),
        list.collect::<String>()
    )
}

fn ranking(report: &Report, charts: &Charts) -> String {
    let columns = columns(report);
    let mut html =
        "<h2>Ranking</h2>\n<p class=\"soft\">Bits per byte on the validation data, lower is better".to_string();
    if report.all_variants().any(|variant| variant.valid_bpb().is_some_and(|bpb| bpb.count > 1)) {
        html += "; mean ± standard deviation over seeds";
    }
    html += ".</p>\n";
    html += &table(0, &report.variants, &columns);
    if let Some(chart) = charts.get("ranking") {
        html += &format!("<figure class=\"panel\" style=\"display:block\">{chart}</figure>\n");
    }
    html
}

/// The variants that are not ranked with the others, and why.
fn apart(report: &Report) -> String {
    let columns = columns(report);
    let (mut html, mut first) = (String::new(), report.variants.len());
    for Apart { why, variants } in &report.apart {
        let why: String = why.iter().map(|why| format!("<li>{}</li>", escape(why))).collect();
        html += &format!(
            "<section><h2>Not ranked with these</h2>\n<p class=\"soft\">What follows was measured on something else:</p>\n\
             <ul>{why}</ul>\n{}</section>\n",
            table(first, variants, &columns)
        );
        first += variants.len();
    }
    html
}

/// The ranking of a group, whose first variant has the number `first` on the page.
fn table(first: usize, variants: &[Variant], columns: &[&Column]) -> String {
    let mut html = "<div class=\"scroll\"><table class=\"ranking\">\n<thead><tr><th></th>\
             <th class=\"name\"><button>variant</button></th><th aria-sort=\"ascending\"><button>valid bpb</button></th>"
        .to_string();
    for column in columns {
        let first = if column.descends { " data-first=\"descending\"" } else { "" };
        html += &format!("<th{first}><button>{}</button></th>", column.name);
    }
    html += "</tr></thead>\n<tbody>\n";
    let best = variants.first().and_then(|variant| variant.valid_bpb()).map(|bpb| bpb.mean);
    for (i, (variant, place)) in variants.iter().zip(places(variants)).enumerate() {
        html += &row(first + i, place, variant, best, columns);
    }
    html + "</tbody></table></div>\n"
}

fn row(i: usize, place: Option<usize>, variant: &Variant, best: Option<f64>, columns: &[&Column]) -> String {
    let mean = variant.valid_bpb().map(|bpb| bpb.mean);
    let class = match place {
        None => "dim",
        Some(1) => "first",
        _ => "",
    };
    let place = place.map_or(String::new(), |place| place.to_string());
    let blocks = variant.blocks().filter(|blocks| *blocks != variant.name);
    let blocks = blocks.map_or(String::new(), |blocks| format!("<small>{}</small>", escape(&blocks)));
    let behind = match mean.zip(best) {
        Some((mean, best)) if mean > best => format!("<small>+{:.3}</small>", mean - best),
        _ => String::new(),
    };
    let mut html = format!(
        "<tr class=\"{class} {colour}\" data-v=\"{i}\"><td class=\"place\">{place}</td>\
         <td class=\"name\" data-sort=\"{name}\"><span class=\"swatch\"></span>{name}{blocks}</td>\
         <td class=\"bpb\" data-label=\"valid bpb\" data-sort=\"{key}\">{}{behind}</td>",
        bpb(variant),
        colour = colour(i),
        name = escape(&variant.name),
        key = mean.map_or(String::new(), |mean| mean.to_string()),
    );
    for column in columns {
        let stages = match column.name {
            "parameters" => by_stage(variant),
            _ => String::new(),
        };
        let (cell, none) = (column.cell)(variant).map_or(("–".into(), " class=\"none\""), |cell| (cell, ""));
        let key = (column.key)(variant).map_or(String::new(), |key| key.to_string());
        html += &format!("<td{none} data-label=\"{}\" data-sort=\"{key}\">{cell}{stages}</td>", column.name);
    }
    html + "</tr>\n"
}

/// The parameters of each stage, from global to local.
fn by_stage(variant: &Variant) -> String {
    let stages = variant.cost.iter().flat_map(|cost| &cost.stages);
    let parameters: Vec<String> = stages.map(|stage| si(stage.part.parameters as f64)).collect();
    if parameters.len() < 2 { String::new() } else { format!("<small>{}</small>", parameters.join(" / ")) }
}

fn matrix(report: &Report) -> String {
    let Some(matrix) = Matrix::of(&report.variants) else { return String::new() };
    let (low, high) = matrix.range();
    let cell = |bpb: &Option<f64>| match bpb {
        Some(bpb) => {
            let heat = if high > low { ((high - bpb) / (high - low)).max(0.0) } else { 1.0 };
            let best = if *bpb == low { " class=\"best\"" } else { "" };
            format!("<td{best} style=\"--heat:{heat:.2}\">{bpb:.3}</td>")
        }
        None => "<td style=\"--heat:0\">–</td>".into(),
    };
    let mean = |mean: &Option<f64>| {
        format!("<td class=\"mean\">{}</td>", mean.map_or("–".into(), |mean| format!("{mean:.3}")))
    };
    let mut html = "<h2>Global or local?</h2>\n<p class=\"soft\">Bits per byte by the block of the global stage (rows) and of \
                    the local stage (columns); the stronger the colour, the better.</p>\n<div class=\"scroll\"><table class=\"matrix\">\n\
                    <tr><th class=\"corner\">global ↓ local →</th>"
        .to_string();
    matrix.columns.iter().for_each(|name| html += &format!("<th scope=\"col\">{}</th>", escape(name)));
    html += "<th>mean</th></tr>\n";
    for ((name, cells), row_mean) in matrix.rows.iter().zip(&matrix.cells).zip(matrix.row_means()) {
        let cells: String = cells.iter().map(cell).collect();
        html += &format!("<tr><th scope=\"row\">{}</th>{cells}{}</tr>\n", escape(name), mean(&row_mean));
    }
    let means: String = matrix.column_means().iter().map(mean).collect();
    html + &format!("<tr><th scope=\"row\">mean</th>{means}<td class=\"mean\"></td></tr>\n</table></div>\n")
}

/// A group of buttons of which one is chosen; what it shows follows from the style.
fn switch(group: &str, choices: &[(&str, &str)]) -> String {
    let choice = |(i, (id, name)): (usize, &(&str, &str))| {
        let checked = if i == 0 { " checked" } else { "" };
        format!("<label><input type=\"radio\" name=\"{group}\" value=\"{id}\"{checked}>{}</label>", escape(name))
    };
    format!("<span class=\"switch\">{}</span>", choices.iter().enumerate().map(choice).collect::<String>())
}

/// Which panels are shown for what is chosen: a page without scripts switches too.
fn switch_style() -> String {
    let mut style = String::new();
    for kind in [Kind::Valid, Kind::Train] {
        for axis in Axis::ALL {
            style += &format!(
                ".curves:has([value={}]:checked):has([value={}]:checked) .p-{} {{ display: block; }}\n",
                kind.name(),
                axis.id(),
                curve_id(kind, axis)
            );
        }
    }
    for measure in Measure::ALL {
        style += &format!(
            ".costs:has([value={0}]:checked) .p-{1} {{ display: block; }}\n",
            measure.id(),
            trade_off_id(measure)
        );
    }
    style
}

/// A button for each variant, which makes it stand out in all charts.
fn legend(report: &Report) -> String {
    let chip = |(i, variant): (usize, &Variant)| {
        format!(
            "<button class=\"chip {}\" data-v=\"{i}\" aria-pressed=\"false\"><span class=\"swatch\"></span>{}</button>",
            colour(i),
            escape(&variant.name)
        )
    };
    let has_points = |(_, variant): &(usize, &Variant)| variant.runs.iter().any(|run| !run.points.is_empty());
    let chips: String = report.variants.iter().enumerate().filter(has_points).map(chip).collect();
    format!("<div class=\"legend\" role=\"group\" aria-label=\"Variants\">{chips}</div>\n")
}

fn learning_curves(report: &Report, charts: &Charts) -> String {
    let axes = Axis::ALL.map(|axis| (axis.id(), axis.name()));
    let mut html = format!(
        "<section class=\"curves\"><h2>Learning curves</h2>\n<p class=\"soft\">Point at a name or a curve to see it alone; click to \
         keep it.</p>\n<div class=\"switches\">{}{}</div>\n",
        switch("axis", &axes),
        switch("kind", &[("valid", "validation"), ("train", "training")]),
    );
    for kind in [Kind::Valid, Kind::Train] {
        for axis in Axis::ALL {
            let id = curve_id(kind, axis);
            let chart = charts.get(&id).unwrap_or("<p>There are no numbers for this chart.</p>");
            html += &format!("<figure class=\"panel p-{id}\">{chart}</figure>\n");
        }
    }
    html + &legend(report) + "</section>\n"
}

fn trade_offs(charts: &Charts) -> String {
    let drawn: Vec<Measure> = Measure::ALL.into_iter().filter(|m| charts.get(&trade_off_id(*m)).is_some()).collect();
    if drawn.is_empty() {
        return String::new();
    }
    let choices: Vec<(&str, &str)> = drawn.iter().map(|measure| (measure.id(), measure.name())).collect();
    let mut html = format!(
        "<section class=\"costs\"><h2>Quality and cost</h2>\n<p class=\"soft\">The dotted line is the Pareto front: nothing on it is \
         beaten in both respects.</p>\n<div class=\"switches\">{}</div>\n",
        switch("cost", &choices)
    );
    for measure in drawn {
        let id = trade_off_id(measure);
        html += &format!("<figure class=\"panel p-{id}\">{}</figure>\n", charts.get(&id).unwrap_or_default());
    }
    html + "</section>\n"
}

fn gradients(report: &Report, charts: &Charts) -> String {
    let stages: String = (0..report.num_stages())
        .filter_map(|stage| charts.get(&gradient_id(stage)))
        .map(|chart| format!("<figure class=\"panel\" style=\"display:block\">{chart}</figure>\n"))
        .collect();
    match stages.is_empty() {
        true => String::new(),
        false => format!("<h2>Gradient norms per stage</h2>\n{stages}{}", legend(report)),
    }
}

fn footer() -> String {
    "<footer>\n<p>Bits per byte are the mean loss per byte divided by ln 2, of each run's best validation; parameters and FLOPs are \
     counted as <code>mblm inspect</code> counts them, of a forward pass, from the global stage to the local one; a training step \
     counts as three forward passes. Training speed leaves out validations and checkpoints, time does not. Memory is the most that \
     a run's process held.</p>\n<p>Beside this page: <a href=\"report.md\">report.md</a>, <a href=\"results.csv\">results.csv</a>, \
     <a href=\"results.json\">results.json</a> and every chart as SVG.</p>\n</footer>\n"
        .into()
}

#[cfg(test)]
mod tests {
    use super::super::matrix::tests::cost;
    use super::super::run::{Generation, Measured, RunResult, Status};
    use super::super::variant::tests::{run, variant};
    use super::*;

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
            apart: vec![],
        }
    }

    #[test]
    fn nothing_from_outside_and_nothing_unescaped() {
        for n in [1, 2, 30] {
            let page = html(&report(n));
            for outside in ["http", "src=", "@import", "url(\""] {
                assert!(!page.contains(outside), "{outside}");
            }
            assert!(page.contains("A &amp; B") && page.contains("&lt;oops&gt;") && !page.contains("<b>0"));
            assert_eq!(page.matches("<script>").count(), 1, "a sample is no script");
            assert_eq!(page.matches("<tr class=").count(), n + 1);
            assert_eq!(page.matches("<details").count(), n + 1);
            let ids: Vec<&str> =
                page.split("<clipPath id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
            let mut unique = ids.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), ids.len(), "{ids:?}");
        }
    }

    #[test]
    fn what_is_equal_has_no_first() {
        let of = |name: &str, rate: f64, bpb: f64| {
            let mut run = run(1, Status::Finished, &[bpb]);
            run.points[0].rate = Some(rate);
            run.points[0].kind = Kind::Train;
            run.points.push(super::super::Point { kind: Kind::Valid, rate: None, ..run.points[0].clone() });
            variant(name, vec![run])
        };
        let mut report = report(1);
        report.variants = vec![of("a", 1000.0, 2.0), of("b", 1010.0, 2.0), of("c", 500.0, 3.0)];
        let page = html(&report);
        assert!(
            page.contains("<dt>fastest in training: a tie</dt>") && page.contains("<dt>best: a tie</dt>"),
            "{page}"
        );
        assert!(page.contains("<dd class=\"who\">a, b</dd>"));
        report.variants[0] = of("a", 2000.0, 1.0);
        let page = html(&report);
        assert!(page.contains("<dt>fastest in training</dt>") && page.contains("<dt>best</dt>"), "{page}");
    }

    #[test]
    fn what_was_measured_on_something_else_is_apart() {
        let mut report = report(2);
        let other = variant("other", vec![run(1, Status::Finished, &[1.0])]);
        report.apart.push(super::super::Apart { why: vec!["data: <x>, not y".into()], variants: vec![other] });
        let page = html(&report);
        assert!(page.contains("<li>data: &lt;x&gt;, not y</li>") && page.contains("2.000 bits per byte"), "{page}");
        assert_eq!(page.matches("<table class=\"ranking\">").count(), 2);
        assert_eq!(page.matches("<tr class=\"first").count(), 2, "each group has its first");
    }

    #[test]
    fn a_chart_without_numbers_says_so() {
        let page = html(&report(2));
        assert!(page.contains("p-curves-train-bytes\"><p>There are no numbers"), "nothing was logged in training");
        assert!(page.contains("+1.000</small>") && page.contains("class=\"dim c2\""));
    }
}
