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
