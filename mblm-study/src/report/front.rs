//! The Pareto front: what no other is better than in both respects.

/// The points that no other beats, as indices in the order of the first coordinate: a point is beaten by one that is at
/// least as good in both coordinates and better in one. Lower second coordinates are better; higher first ones if
/// `more_is_better`, else lower ones.
pub(super) fn front(points: &[(f64, f64)], more_is_better: bool) -> Vec<usize> {
    let cost = |x: f64| if more_is_better { -x } else { x };
    let beats = |a: (f64, f64), b: (f64, f64)| {
        let (ax, bx) = (cost(a.0), cost(b.0));
        ax <= bx && a.1 <= b.1 && (ax < bx || a.1 < b.1)
    };
    let mut best: Vec<usize> =
        (0..points.len()).filter(|&i| !points.iter().any(|&other| beats(other, points[i]))).collect();
    best.sort_by(|&a, &b| points[a].0.total_cmp(&points[b].0));
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_holds_what_is_not_beaten() {
        let points = [(10.0, 2.0), (20.0, 3.0), (15.0, 3.5), (5.0, 1.9), (20.0, 3.0), (5.0, 2.5)];
        assert_eq!(front(&points, true), [3, 0, 1, 4], "equal points are both on it");
        assert_eq!(front(&points, false), [3], "small and good beats all");
        assert_eq!(front(&[], true), [0; 0]);
        assert_eq!(front(&[(1.0, 1.0)], true), [0]);
    }
}
