//! The best size under one budget: a parabola through losses against the logarithm of the size (Hoffmann et al. 2022,
//! approach 2).

use std::fmt;

/// A parabola that opens upwards, with its lowest point within the sizes it was fitted to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parabola {
    /// Where it is lowest, as ln(size).
    pub log_size: f64,
    /// The loss there.
    pub loss: f64,
    /// How fast the loss rises from there: loss per ln(size)².
    pub curvature: f64,
}

/// Why a curve was not fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// A parabola needs three sizes with a loss; this many have one.
    TooFewSizes(usize),
    /// The parabola has no lowest point.
    OpensDownwards,
    /// The loss is lowest at the smallest size, or below it.
    BestIsSmallest,
    /// The loss is lowest at the largest size, or above it.
    BestIsLargest,
    /// A power law needs three budgets with an optimum; this many have one.
    TooFewBudgets(usize),
}

/// Sizes that a parabola needs.
const LEAST_SIZES: usize = 3;
/// A curvature below this share of the loss is rounding: that of a straight line.
const ROUNDING: f64 = 1e-12;

impl Parabola {
    /// The loss at a size, given as ln(size).
    pub fn at(&self, log_size: f64) -> f64 {
        self.loss + self.curvature * (log_size - self.log_size).powi(2)
    }
}

/// The parabola through `points` of ln(size) and loss, by least squares.
///
/// # Errors
/// There are fewer than three sizes, or the parabola has no lowest point between the smallest and the largest.
pub fn parabola(points: &[(f64, f64)]) -> Result<Parabola, WhyNot> {
    let mut sizes: Vec<f64> = points.iter().map(|point| point.0).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let (&[smallest, .., largest], LEAST_SIZES..) = (&sizes[..], sizes.len()) else {
        return Err(WhyNot::TooFewSizes(sizes.len()));
    };
    // With polynomials that are orthogonal over the points (1, u, and v below) each coefficient is a projection.
    let n = points.len() as f64;
    let sum = |of: &dyn Fn(f64, f64) -> f64| points.iter().map(|(x, loss)| of(*x, *loss)).sum::<f64>();
    let centre = sum(&|x, _| x) / n;
    let u = |x: f64| x - centre;
    let (slant, level) = (sum(&|x, _| u(x).powi(3)) / sum(&|x, _| u(x).powi(2)), sum(&|x, _| u(x).powi(2)) / n);
    let v = |x: f64| u(x).powi(2) - slant * u(x) - level;
    let mean = sum(&|_, loss| loss) / n;
    let slope = sum(&|x, loss| u(x) * loss) / sum(&|x, _| u(x).powi(2));
    let curvature = sum(&|x, loss| v(x) * loss) / sum(&|x, _| v(x).powi(2));
    if curvature <= ROUNDING * mean.abs() {
        return Err(WhyNot::OpensDownwards);
    }
    let log_size = centre + slant / 2.0 - slope / (2.0 * curvature);
    match log_size {
        low if low <= smallest => Err(WhyNot::BestIsSmallest),
        high if high >= largest => Err(WhyNot::BestIsLargest),
        _ => Ok(Parabola { log_size, loss: mean + slope * u(log_size) + curvature * v(log_size), curvature }),
    }
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WhyNot::TooFewSizes(n) => write!(f, "a parabola needs 3 sizes with a loss, and {n} have one"),
            WhyNot::OpensDownwards => f.write_str("the loss has no lowest point between the sizes"),
            WhyNot::BestIsSmallest => f.write_str("the smallest size is the best: the optimum may lie below it"),
            WhyNot::BestIsLargest => f.write_str("the largest size is the best: the optimum may lie above it"),
            WhyNot::TooFewBudgets(n) => write!(f, "it needs 3 budgets with an optimum, and {n} have one"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::near;
    use super::*;

    fn of(losses: &[f64]) -> Result<Parabola, WhyNot> {
        let sizes = [3e5, 1e6, 3e6, 1e7];
        parabola(&sizes.iter().map(|size: &f64| size.ln()).zip(losses.iter().copied()).collect::<Vec<_>>())
    }

    #[test]
    fn it_agrees_with_numpy() {
        // NumPy 2.4.6: c = numpy.polyfit(numpy.log(sizes), losses, 2)
        let found = of(&[2.61, 2.42, 2.38, 2.51]).unwrap();
        assert!(near(found.curvature, 0.057714856062235136), "{found:?}");
        assert!(near(found.log_size, 14.617987036604958) && near(found.loss, 2.378886032321926), "{found:?}");
        assert!(near(found.at(2e6f64.ln()), 2.3795758919605507), "{found:?}");
    }

    #[test]
    fn what_cannot_be_fitted_is_said() {
        assert_eq!(of(&[2.6, 2.4]), Err(WhyNot::TooFewSizes(2)));
        assert_eq!(parabola(&[(1.0, 2.0), (1.0, 2.1), (2.0, 2.2)]), Err(WhyNot::TooFewSizes(2)), "one size twice");
        assert_eq!(of(&[2.60, 2.50, 2.42, 2.35]), Err(WhyNot::BestIsLargest));
        assert_eq!(of(&[2.40, 2.46, 2.56, 2.70]), Err(WhyNot::BestIsSmallest));
        assert_eq!(of(&[2.4, 2.6, 2.6, 2.4]), Err(WhyNot::OpensDownwards));
        assert_eq!(of(&[2.4; 4]), Err(WhyNot::OpensDownwards));
        assert!(WhyNot::BestIsLargest.to_string().contains("the largest size is the best"));
    }
}
