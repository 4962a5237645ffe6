//! What a step of Adam (Kingma & Ba 2015, algorithm 1) computes with, besides the parameter, its gradient and its moments.

/// The scalars of a step of Adam.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// `1 - β₁`
    pub one_minus_beta1: f32,
    /// `β₂`
    pub beta2: f32,
    /// `1 - β₂`
    pub one_minus_beta2: f32,
    /// The root of the second moment's bias correction.
    pub root_bias2: f32,
    /// Keeps the division finite.
    pub eps: f32,
    /// The learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// What the parameter is multiplied by.
    pub decay: f32,
}
