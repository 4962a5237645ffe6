//! Numbers and text as a reader likes them.

/// Three digits and a metric prefix, `12.3 k`; without trailing zeros that say nothing, `1 M`.
pub(super) fn si(number: f64) -> String {
    if number != 0.0 && number.abs() < 1.0 {
        let decimals = (-number.abs().log10()).ceil().clamp(0.0, 9.0) as usize + 1;
        return format!("{number:.decimals$}").trim_end_matches('0').trim_end_matches('.').into();
    }
    let text = crate::cost::metric(number.abs());
    let (digits, prefix) = text.split_once(' ').unwrap_or((&text, ""));
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    let sign = if number < 0.0 { "−" } else { "" };
    format!("{sign}{digits} {prefix}").trim_end().into()
}

/// Three digits of a number with a unit, `41.2 kB/s`.
pub(crate) fn with_unit(number: f64, unit: &str) -> String {
    let text = crate::cost::metric(number);
    match text.split_once(' ') {
        Some((digits, prefix)) => format!("{digits} {prefix}{unit}"),
        None => format!("{text} {unit}"),
    }
}

/// `1 h 5 min`, `2 min 3 s`, `4.2 s`.
pub(crate) fn duration(seconds: f64) -> String {
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

/// Text between tags or in a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // Not allowed in XML: a sample may hold any byte.
            c if c.is_control() && !matches!(c, '\n' | '\t') => safe.push('\u{FFFD}'),
            c => safe.push(c),
        }
    }
    safe
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
    fn nothing_escapes() {
        assert_eq!(escape("<a href=\"x\">&'\u{1}\n"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;\u{FFFD}\n");
    }
}
