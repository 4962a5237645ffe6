//! Which part of a model a parameter belongs to.

/// A part of the hierarchy. Stages are counted from 0, the most global one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// From bytes to the tokens of a stage.
    Embedding(usize),
    /// The positions of a stage.
    Positions(usize),
    /// The start token of a stage.
    Start(usize),
    /// The model of a stage, which its block builds.
    Stage(usize),
    /// From a stage to the one below it.
    Projection(usize),
    /// The output layer.
    Head,
}

impl Part {
    /// The stage that it belongs to, of `stages`. The output layer belongs to the local one.
    pub fn stage(self, stages: usize) -> usize {
        match self {
            Part::Embedding(n) | Part::Positions(n) | Part::Start(n) | Part::Stage(n) | Part::Projection(n) => n,
            Part::Head => stages.saturating_sub(1),
        }
    }
}
