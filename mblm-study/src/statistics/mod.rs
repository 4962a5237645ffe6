//! What a comparison may claim: paired tests, groups in a ranking, and how losses scale.
//!
//! | file | question |
//! |---|---|
//! | [`paired`] | how far apart two variants are, over the seeds that both have |
//! | [`holm`] | what p-values are worth if several are looked at |
//! | [`groups`] | which variants of a ranking are distinguishable |
//! | [`means`] | which variant is better if they were not trained with the same seeds |
//! | [`parabola`] | which size is best under one budget |
//! | [`power_law`] | how the loss falls with the budget, and where two laws cross |
//! | [`scaling`] | both of these for the variants of a study, with intervals by bootstrap over seeds |

pub mod groups;
pub mod holm;
pub mod means;
pub mod paired;
pub mod parabola;
pub mod power_law;
pub mod scaling;

/// Results with a larger p-value are not distinguishable from chance; intervals cover `1 - ALPHA`.
pub const ALPHA: f64 = 0.05;

#[cfg(test)]
pub(crate) mod tests {
    /// Whether two numbers agree to nine digits.
    pub(crate) fn near(found: f64, want: f64) -> bool {
        (found - want).abs() <= 1e-9 * want.abs().max(1e-12)
    }
}
