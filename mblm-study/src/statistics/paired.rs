//! Student's t test of paired differences, with the t interval of their mean.

use statrs::distribution::{ContinuousCDF, StudentsT};
use statrs::function::beta::beta_reg;

use super::ALPHA;

/// What the differences of pairs say. All but `p` and `n` have the unit of the differences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// The mean difference.
    pub mean: f64,
    /// The standard error of the mean.
    pub standard_error: f64,
    /// The low end of the mean's 95% interval.
    pub low: f64,
    /// The high end of the mean's 95% interval.
    pub high: f64,
    /// The two-sided p-value of "the mean is 0".
    pub p: f64,
    /// Pairs.
    pub n: usize,
}

/// The paired t test of `differences`. None for fewer than two, or if one is not finite.
///
/// If all differences are equal, there is no spread to test against: `p` is 1 if they are 0, and 0 otherwise. That happens
/// if seeds change nothing, and not in training.
pub fn paired(differences: &[f64]) -> Option<Paired> {
    let (mean, standard_error) = mean_and_error(differences)?;
    let n = differences.len();
    let freedom = (n - 1) as f64;
    let p = match standard_error > 0.0 {
        // Two tails of Student's t, in the form that keeps its digits far from the centre.
        true => beta_reg(freedom / 2.0, 0.5, freedom / (freedom + (mean / standard_error).powi(2))),
        false => f64::from(mean == 0.0),
    };
    let reach = quantile(freedom)? * standard_error;
    Some(Paired { mean, standard_error, low: mean - reach, high: mean + reach, p, n })
}

fn mean_and_error(values: &[f64]) -> Option<(f64, f64)> {
    if values.len() < 2 || values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let first = values[0];
    if values.iter().all(|value| *value == first) {
        // The mean of equal numbers may differ from them in the last digit.
        return Some((first, 0.0));
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((mean, (squares / (n - 1.0) / n).sqrt()))
}

/// So many standard errors lie between a mean and the end of its interval.
fn quantile(freedom: f64) -> Option<f64> {
    Some(StudentsT::new(0.0, 1.0, freedom).ok()?.inverse_cdf(1.0 - ALPHA / 2.0))
}

#[cfg(test)]
mod tests {
    use super::super::tests::near;
    use super::*;

    /// Five losses of two variants; the numbers of SciPy 1.17.1 below are of `scipy.stats.ttest_rel(B[:n], A[:n])` and
    /// its `confidence_interval(0.95)`.
    const A: [f64; 5] = [2.312, 2.305, 2.321, 2.318, 2.309];
    const B: [f64; 5] = [2.365, 2.351, 2.369, 2.377, 2.350];

    #[test]
    fn the_test_agrees_with_scipy() {
        let cases = [
            (5, 0.04939999999999998, 8.787892388963239e-05, 0.04086045641654118, 0.05793954358345878),
            (3, 0.04900000000000008, 0.0017999322310409916, 0.04004331410496978, 0.05795668589503038),
            (2, 0.0495000000000001, 0.04493872860201575, 0.005028283423385106, 0.0939717165766151),
        ];
        for (n, mean, p, low, high) in cases {
            let differences: Vec<f64> = A.iter().zip(B).take(n).map(|(a, b)| b - a).collect();
            let found = paired(&differences).unwrap();
            let all = [(found.mean, mean), (found.p, p), (found.low, low), (found.high, high)];
            assert!(all.iter().all(|(found, want)| near(*found, *want)), "{found:?}");
            assert_eq!(found.n, n);
        }
        // scipy.stats.sem of the five.
        let differences: Vec<f64> = A.iter().zip(B).map(|(a, b)| b - a).collect();
        assert!(near(paired(&differences).unwrap().standard_error, 0.003075711299845937));
    }

    #[test]
    fn p_values_keep_their_digits_at_both_ends() {
        // scipy.stats.ttest_1samp(x, 0).pvalue
        let none = paired(&[0.001, -0.002, 0.0015, -0.0005, 0.0007, -0.0011, 0.0002]).unwrap();
        assert!(near(none.p, 0.9533912769280634), "{none:?}");
        assert!(near(none.low, -0.0011759198779981734), "{none:?}");
        let far: Vec<f64> = (1..=30).map(|i| 5.0 + f64::from(i) / 1000.0).collect();
        assert!(near(paired(&far).unwrap().p, 1.0945973462363985e-81), "{:?}", paired(&far));
    }

    #[test]
    fn quantiles_agree_with_scipy() {
        // scipy.stats.t.ppf(0.975, freedom)
        let cases = [
            (1.0, 12.706204736174694),
            (2.0, 4.302652729749462),
            (3.0, 3.1824463052837078),
            (9.0, 2.262157162798205),
            (29.0, 2.045229642132703),
            (199.0, 1.9719565442517533),
        ];
        for (freedom, want) in cases {
            let found = quantile(freedom).unwrap();
            assert!(near(found, want), "{freedom}: {found}");
        }
    }

    #[test]
    fn without_spread_there_is_certainty() {
        let equal = paired(&[0.1, 0.1, 0.1]).unwrap();
        assert_eq!((equal.mean, equal.p, equal.low, equal.high), (0.1, 0.0, 0.1, 0.1));
        assert_eq!(paired(&[0.0, 0.0]).unwrap().p, 1.0);
        assert_eq!((paired(&[]), paired(&[1.0]), paired(&[1.0, f64::NAN])), (None, None, None));
    }
}
