//! What an examination found, and what to do about it.

use mblm_core::model::Seen;
use mblm_core::param::Part;
use mblm_core::testing::WITHOUT_GRADIENT;
use mblm_core::{Param, ParamStore};
use serde::Serialize;

use super::checks::{CACHED, CAUSAL, Check, PATCHES, SAME_BITS, SAME_OUTPUTS};
use crate::trainer::optimizer::sums;

/// Norms of gradients, and activations, above this are not those of a model that trains.
const EXPLODED: f64 = 1e3;
/// A stage whose gradient shrinks to this share on its way through learns from the loss, and nothing above it does.
const VANISHED: f64 = 1e-5;

/// What an examination found.
#[derive(Debug, Serialize)]
pub struct Examination {
    /// Sequences of the step.
    pub batch: usize,
    /// Bytes of each.
    pub bytes: usize,
    /// Learned numbers.
    pub parameters: usize,
    /// The loss at the initial values, in nats.
    pub loss: f64,
    /// The loss of a model that takes all tokens for equally likely, `ln V`.
    pub uniform_loss: f64,
    /// Seconds of a forward pass in training.
    pub forward_seconds: f64,
    /// Seconds of a backward pass.
    pub backward_seconds: f64,
    /// The stages, from global to local.
    pub stages: Vec<StageReport>,
    /// The parameters, by what they belong to.
    pub groups: Vec<Group>,
    /// What was held against the forward pass; nothing for an encoder, which does not generate.
    pub checks: Vec<Check>,
    /// What is wrong, or looks as if it were.
    pub findings: Vec<Finding>,
}

/// A stage in one training step.
#[derive(Debug, Serialize)]
pub struct StageReport {
    /// Its number, from 1.
    pub stage: usize,
    /// What runs there.
    pub block_type: &'static str,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Its width.
    pub hidden_dim: usize,
    /// Its layers.
    pub num_layers: usize,
    /// What went in and out.
    #[serde(flatten)]
    pub seen: Seen,
}

/// Parameters that belong together, at the initial values.
#[derive(Debug, Serialize)]
pub struct Group {
    /// What they belong to.
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Numbers.
    pub parameters: usize,
    /// The Euclidean norm of the values.
    pub norm: f64,
    /// The Euclidean norm of the gradients.
    pub gradient_norm: f64,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It looks odd.
    Warning,
    /// It is wrong.
    Problem,
}

/// Something that is wrong, or looks as if it were.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where: a stage, a parameter or the model.
    pub place: String,
    /// What was found.
    pub what: String,
    /// What to do.
    pub advice: &'static str,
}

/// What a parameter belongs to, in the order of the hierarchy.
fn group(param: &Param) -> (usize, usize, String) {
    let (stage, order, what) = match param.part() {
        Some(Part::Embedding(stage)) => (stage, 0, "embedding"),
        Some(Part::Positions(stage)) => (stage, 1, "positions"),
        Some(Part::Start(stage)) => (stage, 2, "start token"),
        Some(Part::Stage(stage)) => (stage, 3, "layers"),
        Some(Part::Projection(stage)) => (stage, 4, "projection to the next"),
        Some(Part::Head) | None => return (usize::MAX, 0, "output layer".into()),
    };
    (stage, order, format!("stage {} {what}", stage + 1))
}

pub(super) fn groups(store: &ParamStore) -> Vec<Group> {
    let mut named: Vec<_> = store.iter().map(|param| (group(param), param)).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let groups = named.chunk_by(|a, b| a.0 == b.0).map(|members| Group {
        name: members[0].0.2.clone(),
        tensors: members.len(),
        parameters: members.iter().map(|(_, param)| param.len()).sum(),
        norm: members.iter().map(|(_, param)| sums(&param.values()).1).sum::<f64>().sqrt(),
        gradient_norm: members.iter().map(|(_, param)| sums(&param.grad()).1).sum::<f64>().sqrt(),
    });
    groups.collect()
}

/// What the numbers of a report mean. `dead`: parameters that never had a gradient; `asleep`: those that had none at
/// their initial values.
pub(super) fn findings(report: &Examination, dead: &[String], asleep: &[String], store: &ParamStore) -> Vec<Finding> {
    let mut found = vec![];
    let mut add = |severity, place: String, what: String, advice| {
        found.push(Finding { severity, place, what, advice });
    };
    use Severity::{Problem, Warning};
    for stage in &report.stages {
        let place = || place(stage.stage, stage.block_type);
        let (output, through) =
            (stage.seen.output.rms(), stage.seen.input_gradient.rms() / stage.seen.output_gradient.rms());
        if !output.is_finite() {
            let advice = "look in `forward` for a division, logarithm or exponential without a bound";
            add(Problem, place(), "its output is not finite".into(), advice);
        } else if output > EXPLODED {
            let advice = "normalize inside the block, or divide its initial weights by the square root of the number of their inputs";
            add(Problem, place(), format!("its output has a scale of {output:.3e}"), advice);
        }
        if through.is_finite() && through > EXPLODED {
            let advice = "normalize inside the block, lower its initial weights, or bound the feedback";
            add(
                Problem,
                place(),
                format!("the gradient grows to {through:.1e} times its size on the way through"),
                advice,
            );
        } else if through < VANISHED {
            let advice = "add a residual connection, or look for an operation without a backward pass; the stages above do not learn";
            add(
                Problem,
                place(),
                format!("the gradient shrinks to {through:.1e} times its size on the way through"),
                advice,
            );
        }
    }
    for param in store.iter() {
        let norm = sums(&param.grad()).1.sqrt();
        let name = || param.name().to_string();
        if !norm.is_finite() {
            add(
                Problem,
                name(),
                "its gradient is not finite".into(),
                "check the operations between this parameter and the loss",
            );
        } else if norm > EXPLODED {
            let advice = "lower its initial values, or normalize what it is multiplied with";
            add(Problem, name(), format!("its gradient has a norm of {norm:.3e}"), advice);
        }
        if dead.iter().any(|dead| dead == param.name()) {
            add(Problem, name(), "it gets no gradient, so it never learns".into(), WITHOUT_GRADIENT);
        } else if asleep.iter().any(|asleep| asleep == param.name()) {
            let advice = "fine if it is multiplied with a parameter that starts at zero; otherwise change the initial value of one of them";
            add(Warning, name(), "it gets no gradient at its initial value, but gets one elsewhere".into(), advice);
        }
    }
    if !report.loss.is_finite() {
        add(Problem, "the model".into(), format!("the loss is {}", report.loss), "fix the stage named above");
    } else if report.loss > 2.0 * report.uniform_loss {
        let what = format!("the loss is {:.2}; guessing gives {:.2}", report.loss, report.uniform_loss);
        add(
            Warning,
            "the model".into(),
            what,
            "scale the output of the last stage down, for example with a norm at its end",
        );
    }
    let block_types: Vec<&str> = report.stages.iter().map(|stage| stage.block_type).collect();
    for (n, block_type) in block_types.iter().enumerate() {
        let has_params = store.iter().any(|param| param.part() == Some(Part::Stage(n)));
        found.extend(of_stage(n, block_type, has_params));
    }
    found.extend(of_checks(&report.checks, &block_types));
    found
}

/// What there is to say of stage `n` (from 0) if it has no parameters.
pub(super) fn of_stage(n: usize, block_type: &str, has_params: bool) -> Option<Finding> {
    (!has_params).then(|| Finding {
        severity: Severity::Warning,
        place: place(n + 1, block_type),
        what: "it has no parameters, so it cannot learn".into(),
        advice: "fine if intended; otherwise create them in `build`, through `ParamScope`, and use them in `forward`",
    })
}

/// What checks found, and what to do about it.
pub(super) fn of_checks(checks: &[Check], block_types: &[&str]) -> Vec<Finding> {
    let finding = |check: &Check| {
        let fault = check.fault.as_ref()?;
        let advice = match check.name {
            CAUSAL => {
                "position t may only depend on positions up to t: look for a missing mask, a reversed scan or a mean over the \
                 sequence; a block that sees all on purpose says so in `is_causal`, and runs in encoders"
            }
            PATCHES => {
                "a patching rule may look at the bytes that it is given and at nothing else: look for a state that it keeps"
            }
            CACHED => {
                "make the decoder compute the same as `forward`, or remove it: without a decoder, `forward` runs again for each byte"
            }
            SAME_OUTPUTS => "a run cannot be evaluated or resumed: each load gives a different model",
            SAME_BITS => "a run will not resume bit for bit; look for sums whose order depends on threads",
            _ => "look for a sum or a norm over the batch",
        };
        Some(Finding {
            severity: if check.name == SAME_BITS { Severity::Warning } else { Severity::Problem },
            place: check.stage.map_or_else(|| "the model".into(), |n| place(n, block_types[n - 1])),
            what: format!("{}: {fault}", check.name),
            advice,
        })
    };
    checks.iter().filter_map(finding).collect()
}

/// A stage, from 1, in words.
fn place(stage: usize, block_type: &str) -> String {
    format!("stage {stage} ({block_type})")
}
