//! Holm's step-down adjustment of p-values (Holm 1979): it bounds the chance of any wrong claim among several tests.

/// The adjusted p-values of `p`, in the order given, each at most 1. NaN counts as 1.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let p: Vec<f64> = p.iter().map(|p| if p.is_nan() { 1.0 } else { *p }).collect();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![0.0; p.len()];
    let mut least: f64 = 0.0;
    for (rank, i) in order.into_iter().enumerate() {
        least = least.max((p.len() - rank) as f64 * p[i]).min(1.0);
        adjusted[i] = least;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::super::tests::near;
    use super::*;

    #[test]
    fn it_agrees_with_statsmodels() {
        // statsmodels 0.15.0: multipletests(p, method="holm")[1]
        let found = holm(&[0.01, 0.04, 0.03, 0.005, 0.9]);
        let want = [0.04, 0.09, 0.09, 0.025, 0.9];
        assert!(found.iter().zip(want).all(|(found, want)| near(*found, want)), "{found:?}");
    }

    #[test]
    fn nothing_is_above_one_or_nan() {
        assert_eq!(holm(&[0.7, f64::NAN, 0.6]), [1.0, 1.0, 1.0]);
        assert_eq!((holm(&[]), holm(&[0.02])), (vec![], vec![0.02]));
    }
}
