//! Numbers and text as a reader likes them.

use std::borrow::Cow;

/// Three digits and a metric prefix, `12.3 k`; without trailing zeros that say nothing, `1 M`.
pub(super) fn si(number: f64) -> String {
    if number != 0.0 && number.abs() < 1.0 {
        let decimals = (-number.abs().log10()).ceil().clamp(0.0, 9.0) as usize + 1;
        return format!("{number:.decimals$}").trim_end_matches('0').trim_end_matches('.').into();
    }
    let text = mblm_train::cost::metric(number.abs());
    let (digits, prefix) = text.split_once(' ').unwrap_or((&text, ""));
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    let sign = if number < 0.0 { "−" } else { "" };
    format!("{sign}{digits} {prefix}").trim_end().into()
}

/// A difference with its sign, `+0.031` or `−0.031`.
pub(super) fn signed(number: f64, decimals: usize) -> String {
    let sign = if number < 0.0 { '−' } else { '+' };
    format!("{sign}{:.decimals$}", number.abs())
}

/// Three digits of a number with a unit, `41.2 kB/s`.
pub(crate) fn with_unit(number: f64, unit: &str) -> String {
    let text = mblm_train::cost::metric(number);
    match text.split_once(' ') {
        Some((digits, prefix)) => format!("{digits} {prefix}{unit}"),
        None => format!("{text} {unit}"),
    }
}

/// Floating point operations, `300 TFLOP`.
pub(super) fn flop(number: f64) -> String {
    let text = si(number);
    match text.split_once(' ') {
        Some((digits, prefix)) => format!("{digits} {prefix}FLOP"),
        None => format!("{text} FLOP"),
    }
}

/// `1 h 5 min`, `2 min 3 s`, `4.2 s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => pair(whole, 60, "min", 1, "s"),
        3600..86_400 => pair(whole, 3600, "h", 60, "min"),
        _ => pair(whole, 86_400, "d", 3600, "h"),
    }
}

/// A duration in two units, the second left out if it is none.
fn pair(seconds: u64, large: u64, large_name: &str, small: u64, small_name: &str) -> String {
    match seconds % large / small {
        0 => format!("{} {large_name}", seconds / large),
        rest => format!("{} {large_name} {rest} {small_name}", seconds / large),
    }
}

/// Text in which every control character but line ends and tabs is shown as U+FFFD. A sample may hold any byte; XML does
/// not allow them.
pub(super) fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{FFFD}' } else { c }).collect()
}

/// Text on one line of Markdown, as text alone: no emphasis, link, code, table, heading, list or HTML begins in it.
pub(super) fn markdown(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.trim().chars() {
        match c {
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '~' | '&' => safe.extend(['\\', c]),
            // A list, a heading or the line below one.
            '#' | '+' | '-' | '=' if safe.is_empty() => safe.extend(['\\', c]),
            '.' | ')' if safe.bytes().all(|byte| byte.is_ascii_digit()) => safe.extend(['\\', c]),
            // Addresses become links by themselves.
            ':' => safe.push_str("\\:"),
            '\n' | '\t' => safe.push(' '),
            c if c.is_control() => safe.push('\u{FFFD}'),
            c => safe.push(c),
        }
    }
    safe
}

/// Text of any lines in a fence of Markdown that no line of it closes.
pub(super) fn fenced(text: &str) -> String {
    let text = visible(text);
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat((longest + 1).max(3));
    format!("{fence}text\n{text}\n{fence}\n\n")
}

/// A cell that a spreadsheet takes for text or a number, and never for a formula: `'` is put before what begins like one.
pub fn inert(cell: &str) -> Cow<'_, str> {
    let begins = cell.starts_with(['=', '+', '-', '@', '\t', '\r', '＝', '＋', '－', '＠']);
    let is_number = cell.parse::<f64>().is_ok_and(f64::is_finite);
    if begins && !is_number { format!("'{cell}").into() } else { cell.into() }
}

/// `n thing` or `n things`.
pub(super) fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, want) in [
            (0.0, "0"),
            (1e6, "1 M"),
            (1.5e6, "1.5 M"),
            (41_234.0, "41.2 k"),
            (500.0, "500"),
            (-2000.0, "−2 k"),
            (0.05, "0.05"),
            (3.0 * 0.1, "0.3"),
        ] {
            assert_eq!(si(number), want);
        }
        assert_eq!([with_unit(41_234.0, "B/s"), with_unit(12.0, "B")], ["41.2 kB/s", "12 B"]);
        let durations = [0.25, 42.4, 60.0, 123.0, 3900.0, 90_000.0].map(duration);
        assert_eq!(durations, ["0.2 s", "42 s", "1 min", "2 min 3 s", "1 h 5 min", "1 d 1 h"]);
    }

    #[test]
    fn markdown_stays_text() {
        let cases = [
            ("plain (name) = 2.5!", "plain (name) = 2.5!"),
            ("a|b\n# c", "a\\|b # c"),
            ("![x](http://y) <b>&amp;", "!\\[x\\](http\\://y) \\<b\\>\\&amp;"),
            ("*a* _b_ `c` ~~d~~ \\", "\\*a\\* \\_b\\_ \\`c\\` \\~\\~d\\~\\~ \\\\"),
            ("- a", "\\- a"),
            ("12. a", "12\\. a"),
            ("===", "\\==="),
            ("\u{1b}[31m", "\u{FFFD}\\[31m"),
        ];
        for (text, want) in cases {
            assert_eq!(markdown(text), want);
        }
        assert_eq!(fenced("a\n```\nb\u{1b}"), "````text\na\n```\nb\u{FFFD}\n````\n\n");
        assert_eq!(fenced("a"), "```text\na\n```\n\n");
    }

    #[test]
    fn no_cell_is_a_formula() {
        let cells = ["-1.5", "+1e-3", "a=b", "", "0", "=1+1", "@x", "-a", "+cmd|x", "\t=1", "-inf", "＝1"];
        let want = ["-1.5", "+1e-3", "a=b", "", "0", "'=1+1", "'@x", "'-a", "'+cmd|x", "'\t=1", "'-inf", "'＝1"];
        assert_eq!(cells.map(|cell| inert(cell).into_owned()), want);
    }

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(
            visible("a\u{0}\u{1b}[31m\r\u{7f}\u{9b}\n\té"),
            "a\u{FFFD}\u{FFFD}[31m\u{FFFD}\u{FFFD}\u{FFFD}\n\té"
        );
    }
}
