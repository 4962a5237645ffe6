//! How the loss falls with the budget: `loss = a · budget^-b`, a straight line in logarithms.

use super::parabola::WhyNot;

/// A power law without an irreducible loss: it holds near the budgets it was fitted to, and says nothing about much
/// larger ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerLaw {
    /// ln(a): the logarithm of the loss at a budget of 1.
    pub log_scale: f64,
    /// b: ten times the budget makes the loss 10^b times smaller.
    pub exponent: f64,
    /// The largest distance of a point from it, in ln(loss): 0.01 is 1% of the loss.
    pub worst: f64,
}

/// Budgets that a power law needs.
const LEAST_BUDGETS: usize = 3;

impl PowerLaw {
    /// The loss at a budget.
    pub fn at(&self, budget: f64) -> f64 {
        (self.log_scale - self.exponent * budget.ln()).exp()
    }

    /// The budget at which another law has the same loss. None for parallel laws, or if that is no number.
    pub fn crossing(&self, other: &PowerLaw) -> Option<f64> {
        let log_budget = (self.log_scale - other.log_scale) / (self.exponent - other.exponent);
        Some(log_budget.exp()).filter(|budget| budget.is_normal())
    }
}

/// The power law through `points` of budget and loss, all above 0, by least squares in logarithms.
///
/// # Errors
/// There are fewer than three budgets: through two, any law fits.
pub fn power_law(points: &[(f64, f64)]) -> Result<PowerLaw, WhyNot> {
    let points: Vec<(f64, f64)> = points
        .iter()
        .map(|(budget, loss)| (budget.ln(), loss.ln()))
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    let mut budgets: Vec<f64> = points.iter().map(|point| point.0).collect();
    budgets.sort_by(f64::total_cmp);
    budgets.dedup();
    if budgets.len() < LEAST_BUDGETS {
        return Err(WhyNot::TooFewBudgets(budgets.len()));
    }
    let n = points.len() as f64;
    let (x_mean, y_mean) =
        (points.iter().map(|point| point.0).sum::<f64>() / n, points.iter().map(|point| point.1).sum::<f64>() / n);
    let products: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let slope = products / points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum::<f64>();
    let log_scale = y_mean - slope * x_mean;
    let worst = points.iter().map(|(x, y)| (y - log_scale - slope * x).abs()).fold(0.0, f64::max);
    Ok(PowerLaw { log_scale, exponent: -slope, worst })
}

#[cfg(test)]
mod tests {
    use super::super::tests::near;
    use super::*;

    const BUDGETS: [f64; 4] = [1e15, 3e15, 1e16, 3e16];

    fn of(losses: &[f64]) -> Result<PowerLaw, WhyNot> {
        power_law(&BUDGETS.into_iter().zip(losses.iter().copied()).collect::<Vec<_>>())
    }

    #[test]
    fn it_agrees_with_scipy() {
        // scipy.stats.linregress(numpy.log(budgets), numpy.log(losses)) of SciPy 1.17.1
        let found = of(&[2.6, 2.45, 2.27, 2.15]).unwrap();
        let all = [
            (found.exponent, 0.05671117984900799),
            (found.log_scale, 2.9143895039073993),
            (found.at(1e17), 2.0026876618616174),
        ];
        assert!(all.iter().all(|(found, want)| near(*found, *want)), "{found:?}");
        // The difference of numbers that are 160 times larger.
        assert!((found.worst - 0.005292595191205729).abs() < 1e-13, "{found:?}");
    }

    #[test]
    fn laws_cross_where_they_are_equal() {
        let (steep, flat) = (of(&[2.6, 2.4, 2.2, 2.0]).unwrap(), of(&[2.5, 2.4, 2.3, 2.2]).unwrap());
        let budget = steep.crossing(&flat).unwrap();
        assert!(BUDGETS[0] < budget && budget < BUDGETS[3], "{budget:e}");
        assert!(near(steep.at(budget), flat.at(budget)));
        assert_eq!(steep.crossing(&steep), None);
    }

    #[test]
    fn two_budgets_are_too_few() {
        assert_eq!(of(&[2.6, 2.4]), Err(WhyNot::TooFewBudgets(2)));
        assert_eq!(power_law(&[(1.0, 2.0), (1.0, 2.1), (2.0, 2.0)]), Err(WhyNot::TooFewBudgets(2)));
        assert_eq!(of(&[2.6, 2.4, 0.0]), Err(WhyNot::TooFewBudgets(2)), "a loss of 0 has no logarithm");
    }
}
