//! The numbers of every run, as a table and as a file to download.

use std::fmt::Write;

use csv::StringRecord;
use maud::{Markup, html};

/// Digits that are shown of a number.
const DIGITS: usize = 6;

/// `csv` is the text of `results.csv`.
pub(super) fn section(csv: &str) -> Markup {
    let rows: Vec<StringRecord> = csv::ReaderBuilder::new()
        .has_headers(false)
        .from_reader(csv.as_bytes())
        .records()
        .filter_map(Result::ok)
        .collect();
    let Some((header, rows)) = rows.split_first() else { return Markup::default() };
    let is_empty = |column: &usize| rows.iter().all(|row| row[*column].is_empty());
    let columns: Vec<usize> = (0..header.len()).filter(|column| !is_empty(column)).collect();
    html! {
        h2 { "All numbers" }
        p.soft {
            "One row per run, in the order of the ranking. "
            a download="results.csv" href={ "data:text/csv;charset=utf-8," (percent_encoded(csv)) } { "Download as CSV" }
            ", with all digits."
        }
        details.numbers {
            summary { "Show the table" }
            div.scroll {
                table {
                    thead { tr { @for &column in &columns { th { (header[column].replace('_', " ")) } } } }
                    tbody {
                        @for row in rows {
                            tr { @for &column in &columns { (cell(&row[column])) } }
                        }
                    }
                }
            }
        }
    }
}

fn cell(text: &str) -> Markup {
    html! {
        @match text.parse::<f64>() {
            Ok(number) if number.is_finite() => td { (rounded(number)) },
            _ => td.text { bdi { (text) } },
        }
    }
}

/// A number with at most so many digits; whole numbers have all of theirs.
fn rounded(number: f64) -> String {
    let before = number.abs().max(1.0).log10().floor() as usize + 1;
    let text = format!("{number:.*}", DIGITS.saturating_sub(before));
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

/// Text in an address: every byte but letters, digits and a few signs as `%` and two digits.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(2 * text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b',' => encoded.push(char::from(byte)),
            // Writing to a string cannot fail.
            _ => _ = write!(encoded, "%{byte:02X}"),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_whole_ones_whole() {
        let shown = [0.1 + 0.2, 2_000_000.0, 123_456_789.0, 2.123_456_7, 41_234.567_8, -1.5, 0.0].map(rounded);
        assert_eq!(shown, ["0.3", "2000000", "123456789", "2.12346", "41234.6", "-1.5", "0"]);
    }

    #[test]
    fn no_text_leaves_the_address_or_its_cell() {
        let csv = "variant,test_bpb,valid_bpb\n\"\"\"><script>\",,2.5\n";
        let html = section(csv).into_string();
        assert!(
            html.contains(
                "href=\"data:text/csv;charset=utf-8,variant,test_bpb,valid_bpb%0A%22%22%22%3E%3Cscript%3E%22"
            ),
            "{html}"
        );
        assert!(html.contains("<td class=\"text\"><bdi>&quot;&gt;&lt;script&gt;</bdi></td><td>2.5</td>"), "{html}");
        assert!(!html.contains("test bpb"), "a column without numbers is left out");
    }
}
