//! `report.tex`: the ranking as a table for a paper.

use mblm_train::cost::bytes as binary;

use super::Report;
use super::format::{si, with_unit};
use super::standing::Standings;
use super::table::bpb;
use super::variant::{Spread, Variant};

type Cell<'a> = Box<dyn Fn(usize, &Variant) -> Option<String> + 'a>;

/// A column: its name, its alignment, and the cell of a variant, in LaTeX.
struct Column<'a> {
    name: &'a str,
    align: char,
    cell: Cell<'a>,
}

/// The ranking of the variants that the report is about: a `tabular` that needs the package `booktabs`.
pub(super) fn table(report: &Report) -> String {
    let standings = Standings::of(&report.variants, report.looks);
    let columns = columns(&standings);
    let ranked: Vec<(usize, &Variant)> = report.variants.iter().enumerate().collect();
    let has_cell = |column: &&Column| ranked.iter().any(|(i, variant)| (column.cell)(*i, variant).is_some());
    let columns: Vec<&Column> = columns.iter().filter(has_cell).collect();
    let row = |cells: Vec<String>| format!("{} \\\\\n", cells.join(" & "));
    let mut text = notes(report, &standings);
    text += &format!("\\begin{{tabular}}{{{}}}\n\\toprule\n", columns.iter().map(|c| c.align).collect::<String>());
    text += &row(columns.iter().map(|column| column.name.to_string()).collect());
    text += "\\midrule\n";
    for (i, variant) in ranked {
        text += &row(columns.iter().map(|c| (c.cell)(i, variant).unwrap_or_else(|| "--".into())).collect());
    }
    text + "\\bottomrule\n\\end{tabular}\n"
}

fn columns(standings: &Standings) -> Vec<Column<'_>> {
    fn column<'a>(name: &'a str, align: char, cell: impl Fn(usize, &Variant) -> Option<String> + 'a) -> Column<'a> {
        Column { name, align, cell: Box::new(cell) }
    }
    let difference = |i: usize| {
        let paired = standings.to_first(i)?;
        Some(format!("${:+.3}$ [${:.3}$, ${:.3}$]", paired.mean, paired.low, paired.high))
    };
    vec![
        column("Variant", 'l', |_, v| Some(escape(&v.name))),
        column("Blocks", 'l', |_, v| v.blocks().map(|blocks| escape(&blocks))),
        column("Parameters", 'r', |_, v| v.parameters().map(si)),
        column("Bits per byte", 'r', |_, v| Some(v.valid_bpb().map_or_else(|| bpb(v), |spread| reached(v, spread)))),
        column("Difference [95\\% CI]", 'r', move |i, _| difference(i)),
        column("Group", 'r', |i, _| standings.group(i).map(|group| group.to_string())),
        column("Training", 'r', |_, v| v.train_rate().map(|rate| with_unit(rate, "B/s"))),
        column("Memory", 'r', |_, v| v.peak_bytes().map(binary)),
    ]
}

fn reached(variant: &Variant, bpb: Spread) -> String {
    let deviation = bpb.deviation.map_or(String::new(), |deviation| format!(" \\pm {deviation:.3}"));
    format!("${:.3}{deviation}${}", bpb.mean, if variant.is_finished() { "" } else { " so far" })
}

/// What the numbers are, as comments.
fn notes(report: &Report, standings: &Standings) -> String {
    let tested = match standings.is_tested() {
        true => format!(
            "% Differences are from the first variant, over shared seeds, with the 95% interval of a paired t test.\n\
             % Group 1 is not distinguishable from the first (p > 0.05 after Holm's adjustment, {} at the data).\n",
            super::count(report.looks.max(1), "look")
        ),
        false if standings.has_unknown_seeds => {
            "% Nothing is tested: the seeds of some runs are not known, so the runs cannot be paired.\n".into()
        }
        false => "% Nothing is tested: a test needs two seeds that both variants have.\n".into(),
    };
    format!(
        "% {}\n% \\usepackage{{booktabs}}\n% Bits per byte in validation: the mean of the seeds, and their standard \
         deviation.\n{tested}",
        escape(&report.title)
    )
}

/// Escapes text so that no command, comment, math, cell or argument begins in it.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.trim().chars() {
        match c {
            '\\' => safe.push_str("\\textbackslash{}"),
            '~' => safe.push_str("\\textasciitilde{}"),
            '^' => safe.push_str("\\textasciicircum{}"),
            '<' => safe.push_str("\\textless{}"),
            '>' => safe.push_str("\\textgreater{}"),
            '|' => safe.push_str("\\textbar{}"),
            '{' | '}' | '$' | '&' | '#' | '_' | '%' => safe.extend(['\\', c]),
            // After the end of a row they would be arguments of it; two dashes would become one.
            '[' | ']' | '*' | '-' | '`' | '\'' | '"' => safe.extend(['{', c, '}']),
            c if c.is_control() => safe.push(' '),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::super::run::Status::{Failed, Finished};
    use super::super::variant::tests::{run, variant};
    use super::*;

    fn report(bpbs: &[&[f64]]) -> Report {
        let of = |(i, bpbs): (usize, &&[f64])| {
            variant(&format!("v_{i}"), bpbs.iter().zip(1..).map(|(bpb, seed)| run(seed, Finished, &[*bpb])).collect())
        };
        Report { title: "a\n\\b".into(), variants: bpbs.iter().enumerate().map(of).collect(), ..Report::default() }
    }

    #[test]
    fn the_table_has_groups_and_intervals() {
        let mut report = report(&[&[2.0, 2.1, 2.2], &[2.5, 2.61, 2.7]]);
        report.variants.push(variant("lost", vec![run(1, Failed("x".into()), &[])]));
        let text = table(&report);
        assert!(text.starts_with("% a \\textbackslash{}b\n% \\usepackage{booktabs}\n"), "{text}");
        assert!(
            text.contains(
                "\\begin{tabular}{lrrr}\n\\toprule\nVariant & Bits per byte & Difference [95\\% CI] & Group \\\\\n"
            ),
            "{text}"
        );
        assert!(text.contains("\nv\\_0 & $2.100 \\pm 0.100$ & -- & 1 \\\\\n"), "{text}");
        assert!(text.contains("\nv\\_1 & $2.603 \\pm 0.100$ & $+0.503$ [$0.489$, $0.518$] & 2 \\\\\n"), "{text}");
        assert!(text.contains("\nlost & failed & -- & -- \\\\\n"), "{text}");
    }

    #[test]
    fn without_seeds_it_says_that_nothing_is_tested() {
        assert!(table(&report(&[&[2.0], &[2.5]])).contains("% Nothing is tested: a test needs two seeds"));
        let mut unknown = report(&[&[2.0, 2.1], &[2.5, 2.6]]);
        unknown.variants.iter_mut().flat_map(|variant| &mut variant.runs).for_each(|run| run.seed = None);
        let text = table(&unknown);
        assert!(
            text.contains("% Nothing is tested: the seeds of some runs are not known") && !text.contains("Group"),
            "{text}"
        );
    }

    #[test]
    fn names_are_text() {
        let found = escape("\\input{x} $1$ 50% a&b #1 a_b ~^ [1] *\n% c");
        let want = "\\textbackslash{}input\\{x\\} \\$1\\$ 50\\% a\\&b \\#1 a\\_b \\textasciitilde{}\\textasciicircum{} {[}1{]} {*} \\% c";
        assert_eq!(found, want);
    }
}
