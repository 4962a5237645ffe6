//! Where variants differ: a passage whose bytes are colored by the difference of two variants, and bits by position in
//! the patch.
//!
//! Without scripts, the page compares the first two variants. The script compares any two: it has the bits of all
//! variants as numbers, and changes only colors and titles.

use std::fmt::Write;

use maud::{Markup, PreEscaped, html};

use super::Charts;
use crate::report::format::count;
use crate::report::passage::{Common, signs};
use crate::report::{PLACES, Report};

const BY_PLACE: &str = "Bits by position in the patch";
/// Differences in hundredths of a bit from which on the colour is a step stronger; the script has the same.
const STEPS: [u16; 4] = [25, 50, 100, 200];

pub(super) fn section(report: &Report, charts: &Charts) -> Markup {
    let (common, places) = (Common::of(&report.variants), charts.get(PLACES));
    html! {
        @if common.is_some() || places.is_some() {
            section {
                @if let Some(common) = &common {
                    h2 { "Where they differ" }
                    (passage(common))
                }
                @if let Some(chart) = places {
                    @if common.is_some() { h3 { (BY_PLACE) } } @else { h2 { (BY_PLACE) } }
                    p.soft {
                        "Mean bits of a byte by its position in the innermost patch. The first byte of a patch is \
                         predicted only from the patches before it."
                    }
                    figure.panel style="display:block" { (chart) }
                    (super::panels::legend(report))
                }
            }
        }
    }
}

fn passage(common: &Common) -> Markup {
    let [(first, a), (second, b)] = [&common.variants[0], &common.variants[1]];
    html! {
        p.soft {
            "The first " (count(common.bytes.len(), "byte")) " of the validation data. Colors show the difference in \
             bits between two variants, from one run of each."
        }
        div.switches #pair hidden {
            (choice("first", common, 0))
            (choice("second", common, 1))
        }
        p #sums {
            bdi { (first) } " spends " (format!("{:.3}", common.mean(0))) " bits per byte here, and "
            bdi { (second) } " spends " (format!("{:.3}", common.mean(1))) "."
        }
        (key())
        pre.passage #passage tabindex="0" {
            @for ((sign, a), b) in signs(common.bytes).iter().zip(a).zip(b) {
                @let title = format!("{}: {:.2} and {:.2} bits", sign.name, hundred(*a), hundred(*b));
                i class=[step(*a, *b)] title=(title) {
                    @if sign.is_text { (sign.text) } @else { u { (sign.text) } }
                }
                @if sign.text == "↵" { "\n" }
            }
        }
        p.soft #byte aria-live="polite" {}
        @if !common.others.is_empty() {
            p.soft { "Scored on other bytes, and not shown: " (common.others.join(", ")) "." }
        }
        script #bits type="application/json" { (PreEscaped(numbers(common))) }
    }
}

/// A field to choose a variant.
fn choice(which: &str, common: &Common, chosen: usize) -> Markup {
    html! {
        label.choice {
            (which)
            select autocomplete="off" {
                @for (i, (name, _)) in common.variants.iter().enumerate() {
                    option value=(i) selected[i == chosen] { (name) }
                }
            }
        }
    }
}

/// What the colours mean.
fn key() -> Markup {
    let from = |step: usize| hundred(STEPS[step]);
    html! {
        div.key {
            span { "first needs fewer bits" }
            span.steps {
                @for step in (0..STEPS.len()).rev() { i.{ "a" (step + 1) } { (from(step)) } }
                i { "0" }
                @for step in 0..STEPS.len() { i.{ "b" (step + 1) } { (from(step)) } }
            }
            span { "second needs fewer bits" }
        }
    }
}

/// The class of a byte's colour: `a1` to `a4` where the first variant needs fewer bits, `b1` to `b4` where the second does.
fn step(a: u16, b: u16) -> Option<String> {
    let steps = STEPS.iter().filter(|from| a.abs_diff(b) >= **from).count();
    (steps > 0).then(|| format!("{}{steps}", if a < b { 'a' } else { 'b' }))
}

fn hundred(hundredths: u16) -> f64 {
    f64::from(hundredths) / 100.0
}

/// The bits of all variants in hundredths, as JSON. There is nothing in it but digits, commas and brackets.
fn numbers(common: &Common) -> String {
    let mut json = String::from("[");
    for (i, (_, bits)) in common.variants.iter().enumerate() {
        json += if i == 0 { "[" } else { ",[" };
        for (i, bits) in bits.iter().enumerate() {
            // Writing to a string cannot fail.
            let _ = write!(json, "{}{bits}", if i == 0 { "" } else { "," });
        }
        json.push(']');
    }
    json + "]"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::passage::tests::scored;

    #[test]
    fn colours_follow_the_difference() {
        let steps = [(100, 100), (100, 124), (100, 125), (100, 200), (9900, 0), (150, 100)].map(|(a, b)| step(a, b));
        let want = [None, None, Some("a1"), Some("a3"), Some("b4"), Some("b2")];
        assert_eq!(steps.each_ref().map(Option::as_deref), want);
    }

    #[test]
    fn a_passage_is_text_alone() {
        let text = b"</pre><script>\n\"&\xff";
        let variants = [scored("</script>", text, 1.0), scored("b", text, 3.5)];
        let html = passage(&Common::of(&variants).unwrap()).into_string();
        assert!(html.contains("<i class=\"a4\" title=\"&lt;: 1.00 and 3.50 bits\">&lt;</i>"), "{html}");
        assert!(html.contains("<u>↵</u></i>\n<i") && html.contains("<u>FF</u>"), "{html}");
        assert!(html.contains("</bdi> spends 1.000 bits per byte here, and <bdi>b</bdi> spends 3.500."), "{html}");
        assert!(html.contains("type=\"application/json\">[[100,100,") && html.ends_with(",350]]</script>"), "{html}");
        assert_eq!(html.matches("</script>").count(), 1);
        assert_eq!(html.matches("<i class=\"a4\" title").count(), text.len());
    }
}
