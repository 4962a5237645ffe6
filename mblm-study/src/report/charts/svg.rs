//! Drawing: a frame with axes, in which values have places; lines, dots and labels that do not lie on each other.
//!
//! Charts are styled by classes alone (`chart.css`), so that a page decides on colours, dark or light; a file of its own
//! carries the same style inside. The SVG is written by hand because plotters writes fixed colours and has no
//! classes, groups and tooltips (`<title>`), which dark mode and the page's highlighting need.

use std::fmt::Write;

use maud::Render;

use super::scale::Scale;
use crate::report::format::visible;

/// The style of charts.
pub(crate) const STYLE: &str = include_str!("chart.css");
/// Variants that have a colour of their own.
pub(crate) const COLOURS: usize = 8;
/// The height of a line of text.
const LINE: f64 = 15.0;
/// The width of a letter, about.
const LETTER: f64 = 7.2;

/// Where a chart is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// On a page that is wide: curves have labels beside them.
    Wide,
    /// On a phone.
    Narrow,
}

impl Format {
    pub(crate) fn width(self) -> f64 {
        match self {
            Format::Wide => 960.0,
            Format::Narrow => 360.0,
        }
    }

    /// Marks that fit on the axis along.
    pub(crate) fn ticks(self) -> usize {
        match self {
            Format::Wide => 6,
            Format::Narrow => 3,
        }
    }
}

/// Room around the part of a chart where values are drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Margins {
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
}

/// A chart.
pub(crate) struct Svg {
    body: String,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) margins: Margins,
    title: String,
}

/// The class of a variant's colour, by its rank.
pub(crate) fn colour(rank: usize) -> String {
    if rank < COLOURS { format!("c{rank}") } else { "rest".into() }
}

/// Text between tags or in an attribute in double quotes.
pub(super) fn escape(text: &str) -> String {
    text.render().into_string()
}

impl Svg {
    /// An empty chart. `title` says what it shows, for those who cannot see it.
    pub(crate) fn new(title: &str, width: f64, height: f64, margins: Margins) -> Self {
        Svg { body: String::new(), width, height, margins, title: title.into() }
    }

    /// The place along of `share`, from 0 to 1.
    pub(crate) fn x(&self, share: f64) -> f64 {
        self.margins.left + share * (self.width - self.margins.left - self.margins.right)
    }

    /// The place down of `share`, from 0 at the bottom to 1.
    pub(crate) fn y(&self, share: f64) -> f64 {
        self.height - self.margins.bottom - share * (self.height - self.margins.top - self.margins.bottom)
    }

    /// Adds elements as they are.
    pub(crate) fn add(&mut self, elements: &str) {
        self.body.push_str(elements);
        self.body.push('\n');
    }

    /// A text; `anchor` is `start`, `middle` or `end`.
    pub(crate) fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let text = escape(text);
        self.add(&format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"));
    }

    /// Both axes with their marks and names.
    pub(crate) fn axes(&mut self, (x, x_name): (&Scale, &str), (y, y_name): (&Scale, &str), x_ticks: usize) {
        let (left, right, bottom) = (self.x(0.0), self.x(1.0), self.y(0.0));
        for (value, text) in y.ticks(5) {
            let at = self.y(y.place(value));
            self.add(&format!("<path class=\"grid\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>"));
            self.text(left - 8.0, at + 4.0, "end", "tick", &text);
        }
        for (value, text) in x.ticks(x_ticks) {
            let at = self.x(x.place(value));
            self.add(&format!("<path class=\"mark\" d=\"M{at:.1} {bottom:.1}v5\"/>"));
            self.text(at, bottom + 19.0, "middle", "tick", &text);
        }
        self.add(&format!("<path class=\"axis\" d=\"M{left:.1} {bottom:.1}H{right:.1}\"/>"));
        self.text(right, bottom + 37.0, "end", "name", x_name);
        self.text(4.0, 14.0, "start", "name", y_name);
    }

    /// An area in which everything drawn by `inside` is cut off at the frame.
    pub(crate) fn clipped(&mut self, id: &str, inside: &str) {
        let (x, y) = (self.x(0.0), self.y(1.0));
        let (width, height) = (self.x(1.0) - x, self.y(0.0) - y);
        self.add(&format!(
            "<clipPath id=\"{id}\"><rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/></clipPath>\
             <g clip-path=\"url(#{id})\">{inside}</g>"
        ));
    }

    /// For a page, which has the style.
    pub(crate) fn inline(&self, class: &str) -> String {
        let Svg { body, width, height, title, .. } = self;
        let title = escape(title);
        format!(
            "<svg class=\"chart {class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{title}\">\n{body}</svg>\n"
        )
    }

    /// For a file.
    pub(crate) fn file(&self) -> String {
        let Svg { body, width, height, title, .. } = self;
        let title = escape(title);
        let file = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n\
             <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
        );
        visible(&file)
    }
}

/// A path through points.
pub(crate) fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut d = String::new();
    for (i, (x, y)) in points.enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(d, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
    }
    d
}

/// Every so many of `points` that at most `most` are left, the first and the last among them.
pub(crate) fn thinned<T: Copy>(points: &[T], most: usize) -> Vec<T> {
    if points.len() <= most {
        return points.to_vec();
    }
    (0..most).map(|i| points[i * (points.len() - 1) / (most - 1)]).collect()
}

/// Moves the labels at `wanted` heights apart, so that none overlaps another and all lie within `low..high`; each stays
/// as near to its place as that allows. Heights grow downwards.
pub(crate) fn spread_labels(wanted: &[f64], low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|&a, &b| wanted[a].total_cmp(&wanted[b]));
    let mut places = wanted.to_vec();
    // Clusters of labels that touch, each around the mean of what its members want.
    let mut clusters: Vec<(f64, usize)> = Vec::new();
    for &i in &order {
        let mut cluster = (wanted[i].clamp(low, high), 1);
        while let Some(&(centre, len)) = clusters.last() {
            let gap = (len + cluster.1) as f64 / 2.0 * LINE;
            if centre + gap <= cluster.0 {
                break;
            }
            let all = len + cluster.1;
            cluster = ((centre * len as f64 + cluster.0 * cluster.1 as f64) / all as f64, all);
            clusters.pop();
        }
        let half = (cluster.1 - 1) as f64 / 2.0 * LINE;
        cluster.0 = cluster.0.min(high - half).max(low + half);
        clusters.push(cluster);
    }
    let mut next = order.into_iter();
    for (centre, len) in clusters {
        let first = centre - (len - 1) as f64 / 2.0 * LINE;
        next.by_ref().take(len).enumerate().for_each(|(k, i)| places[i] = first + k as f64 * LINE);
    }
    places
}

/// Rectangles that are taken, and where a label beside a dot still fits.
pub(crate) struct Places {
    taken: Vec<(f64, f64, f64, f64)>,
    /// The least and the greatest place along.
    along: (f64, f64),
}

impl Places {
    /// Labels may lie between these places along.
    pub(crate) fn new(along: (f64, f64)) -> Self {
        Places { taken: vec![], along }
    }

    /// A dot, which no label may cover.
    pub(crate) fn take_dot(&mut self, x: f64, y: f64) {
        self.taken.push((x - 6.0, y - 6.0, x + 6.0, y + 6.0));
    }

    /// The name of the axis up, in the corner.
    pub(crate) fn take_name(&mut self) {
        self.taken.push((0.0, 0.0, 340.0, 20.0));
    }

    /// A place for a label beside the dot at `(x, y)`: where it starts, and its anchor.
    pub(crate) fn label(&mut self, x: f64, y: f64, text: &str) -> Option<(f64, f64, &'static str)> {
        let width = text.chars().count() as f64 * LETTER;
        let right = (x + 10.0, y + 4.0, "start");
        let left = (x - 10.0, y + 4.0, "end");
        let above = (x, y - 11.0, "middle");
        let below = (x, y + 20.0, "middle");
        for (x, y, anchor) in [right, left, above, below] {
            let start = match anchor {
                "start" => x,
                "end" => x - width,
                _ => x - width / 2.0,
            };
            let area = (start, y - 11.0, start + width, y + 3.0);
            let inside = area.0 >= self.along.0 && area.2 <= self.along.1;
            let free = self.taken.iter().all(|t| area.0 >= t.2 || area.2 <= t.0 || area.1 >= t.3 || area.3 <= t.1);
            if inside && free {
                self.taken.push(area);
                return Some((x, y, anchor));
            }
        }
        None
    }
}

/// A name that fits in `width`, cut short if it must.
pub(crate) fn fitting(name: &str, width: f64) -> String {
    let most = (width / LETTER) as usize;
    match name.chars().count() <= most {
        true => name.into(),
        false => name.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_moved_apart_and_stay_inside() {
        assert_eq!(spread_labels(&[50.0, 90.0], 0.0, 100.0), [50.0, 90.0], "those that do not touch stay");
        assert_eq!(spread_labels(&[50.0, 50.0], 0.0, 100.0), [42.5, 57.5]);
        let places = spread_labels(&[99.0, 98.0, 10.0, 97.0], 0.0, 100.0);
        assert_eq!(places, [100.0, 85.0, 10.0, 70.0]);
        for n in [1, 5, 30] {
            let wanted: Vec<f64> = (0..n).map(|i| f64::from(i * 7919 % 401)).collect();
            let mut places = spread_labels(&wanted, 0.0, 600.0);
            places.sort_by(f64::total_cmp);
            assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= LINE - 1e-9), "{places:?}");
            assert!(places[0] >= 0.0 && *places.last().unwrap() <= 600.0, "{places:?}");
        }
    }

    #[test]
    fn a_label_finds_a_free_side() {
        let mut places = Places::new((0.0, 200.0));
        places.take_dot(100.0, 50.0);
        assert_eq!(places.label(100.0, 50.0, "abc"), Some((110.0, 54.0, "start")));
        assert_eq!(places.label(100.0, 50.0, "abc").unwrap().2, "end", "the right side is taken");
        assert_eq!(places.label(195.0, 20.0, "abc").unwrap().2, "end", "it would leave the chart");
        assert_eq!(places.label(100.0, 50.0, &"x".repeat(100)), None);
    }

    #[test]
    fn points_are_thinned_and_keep_their_ends() {
        let points: Vec<usize> = (0..1000).collect();
        let kept = thinned(&points, 50);
        assert_eq!((kept.len(), kept[0], kept[49]), (50, 0, 999));
        assert_eq!(thinned(&points[..5], 50), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn names_are_cut() {
        assert_eq!((&fitting("short", 100.0)[..], &fitting("much too long", 40.0)[..]), ("short", "much…"));
    }
}
