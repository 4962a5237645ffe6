//! What is equal between the variants of a study.

use mblm_train::cost::metric;
use mblm_yaml::{ConfigError, Document};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use super::scale::Scale;

const PATH: &str = "budget";
/// How far from the budget a variant may be, unless the study says otherwise.
const TOLERANCE: f64 = 0.05;

/// The budget of every run.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// How much each run trains.
    pub amount: Amount,
    /// How large each model is, if that is to be equal too.
    pub parameters: Option<Parameters>,
    /// How far a variant may be from the requested size and amount, as a share of each.
    pub tolerance: f64,
}

/// How much a run trains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Amount {
    /// Training bytes.
    Bytes(u64),
    /// Floating point operations of training, as `mblm inspect` counts them.
    Flops(f64),
    /// Seconds of training, without validations and checkpoints.
    Seconds(f64),
}

/// The size that all models are brought to.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// The number of parameters; that of the base, if none.
    pub number: Option<u64>,
    /// The fields that change to reach it.
    pub solve: Solve,
}

/// The fields that are changed until a model has the right size.
#[derive(Clone, Debug, PartialEq)]
pub struct Solve {
    /// Widths or layers.
    pub field: SolveField,
    /// Only of this stage, counted from 0; of all stages in proportion, if none.
    pub stage: Option<usize>,
}

/// A list of numbers, one per stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SolveField {
    /// `hidden_dims`
    HiddenDims,
    /// `num_layers`
    NumLayers,
}

impl SolveField {
    /// The name in the YAML.
    pub fn name(self) -> &'static str {
        match self {
            SolveField::HiddenDims => "hidden_dims",
            SolveField::NumLayers => "num_layers",
        }
    }
}

impl std::fmt::Display for Amount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Amount::Bytes(bytes) => write!(f, "{}B", metric(*bytes as f64)),
            Amount::Flops(flops) => write!(f, "{}FLOP", metric(*flops)),
            Amount::Seconds(seconds) => write!(f, "{seconds} s"),
        }
    }
}

impl Budget {
    /// Reads section `budget` of a study. With `scale`, sizes and amounts come from there.
    pub(super) fn from_document(document: &Document, scale: Option<&Scale>) -> Result<Self, ConfigError> {
        if let Some(scale) = scale {
            return Budget::of_scale(document, scale);
        }
        const AMOUNTS: &str = "`bytes: N`, `flops: F` or `seconds: S`";
        document.require(PATH)?;
        document.check_fields(PATH, &["bytes", "flops", "seconds", "parameters", "solve", "tolerance"])?;
        let given: Vec<&str> = ["bytes", "flops", "seconds"]
            .into_iter()
            .filter(|f| document.get(&format!("budget.{f}")).is_some())
            .collect();
        let number = |field: &str| positive(document, field);
        let amount = match given[..] {
            ["bytes"] => {
                number("bytes")?;
                Amount::Bytes(document.section("budget.bytes")?)
            }
            ["flops"] => Amount::Flops(number("flops")?),
            ["seconds"] => Amount::Seconds(number("seconds")?),
            [] => {
                let message = format!("does not say how long a run trains; expected one of {AMOUNTS}");
                return Err(document.error(PATH, message));
            }
            _ => {
                let message = format!("expected one of {AMOUNTS}, found {}", given.join(" and "));
                return Err(document.error(PATH, message));
            }
        };
        Ok(Budget { amount, parameters: Parameters::from_document(document)?, tolerance: tolerance(document)? })
    }

    /// The largest size and budget of a scaling study.
    fn of_scale(document: &Document, scale: &Scale) -> Result<Self, ConfigError> {
        if document.get(PATH).is_some() {
            document.check_fields(PATH, &["bytes", "flops", "seconds", "parameters", "solve", "tolerance"])?;
            for field in ["bytes", "flops", "seconds", "parameters", "solve"] {
                let place = format!("{PATH}.{field}");
                if document.get(&place).is_some() {
                    let message = "a scaling study has its sizes and budgets in `scale`; remove this field";
                    return Err(document.error(&place, message));
                }
            }
        }
        let (size, amount) = (scale.sizes.last().copied(), scale.budgets.last().copied().unwrap_or_default());
        let parameters = Parameters { number: size, solve: Solve { field: SolveField::HiddenDims, stage: None } };
        Ok(Budget { amount: Amount::Flops(amount), parameters: Some(parameters), tolerance: tolerance(document)? })
    }
}

fn tolerance(document: &Document) -> Result<f64, ConfigError> {
    match document.get("budget.tolerance") {
        Some(_) => positive(document, "tolerance"),
        None => Ok(TOLERANCE),
    }
}

fn positive(document: &Document, field: &str) -> Result<f64, ConfigError> {
    let path = format!("{PATH}.{field}");
    let number: f64 = document.section(&path)?;
    match number > 0.0 && number.is_finite() {
        true => Ok(number),
        false => Err(document.error(&path, format!("expected a positive number, found {number}"))),
    }
}

impl Parameters {
    fn from_document(document: &Document) -> Result<Option<Self>, ConfigError> {
        const PATH: &str = "budget.parameters";
        let number = match document.get(PATH) {
            None | Some(Value::Null) => {
                return match document.get("budget.solve") {
                    Some(_) => {
                        Err(document.error("budget.solve", "needs `budget.parameters`, which is missing; add it"))
                    }
                    None => Ok(None),
                };
            }
            Some(Value::String(text)) if text == "base" => None,
            Some(Value::String(text)) => {
                let message = format!("expected a number, or `base` for as many as the base has, found {text:?}");
                return Err(document.error(PATH, message));
            }
            Some(_) => Some(document.section(PATH)?),
        };
        if number == Some(0) {
            return Err(document.error(PATH, "expected a positive integer, found 0"));
        }
        Ok(Some(Parameters { number, solve: Solve::from_document(document)? }))
    }
}

impl Solve {
    fn from_document(document: &Document) -> Result<Self, ConfigError> {
        const PATH: &str = "budget.solve";
        if document.get(PATH).is_none() {
            return Ok(Solve { field: SolveField::HiddenDims, stage: None });
        }
        let text: String = document.section(PATH)?;
        let (name, index) = match text.strip_suffix(']').and_then(|text| text.split_once('[')) {
            Some((name, index)) => (name, index.parse().ok().map(Some)),
            None => (&text[..], Some(None)),
        };
        let field = [SolveField::HiddenDims, SolveField::NumLayers].into_iter().find(|field| field.name() == name);
        match (field, index) {
            (Some(field), Some(stage)) => Ok(Solve { field, stage }),
            _ => Err(document.error(
                PATH,
                format!(
                    "expected `hidden_dims` or `num_layers`, or one stage of these such as `hidden_dims[0]`, found \
                     {text:?}"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Budget, String> {
        let document = Document::parse(&format!("budget: {text}"), "s.yaml").unwrap();
        Budget::from_document(&document, None).map_err(|error| error.to_string())
    }

    #[test]
    fn budgets_are_read() {
        let budget = read("{bytes: 2_000_000}").unwrap();
        assert_eq!(budget, Budget { amount: Amount::Bytes(2_000_000), parameters: None, tolerance: 0.05 });
        let budget = read("{flops: 1e15, parameters: base, solve: 'num_layers[1]', tolerance: 0.2}").unwrap();
        let solve = Solve { field: SolveField::NumLayers, stage: Some(1) };
        let parameters = Some(Parameters { number: None, solve });
        assert_eq!(budget, Budget { amount: Amount::Flops(1e15), parameters, tolerance: 0.2 });
        let solve = Solve { field: SolveField::HiddenDims, stage: None };
        let parameters = Some(Parameters { number: Some(3_000_000), solve });
        assert_eq!(read("{seconds: 60, parameters: 3e6}").unwrap().parameters, parameters);
    }

    #[test]
    fn a_scaling_study_says_elsewhere_how_much_it_trains() {
        let scale = Scale { sizes: vec![10, 20], budgets: vec![1e12, 2e12], deepens: false };
        let read = |text: &str| {
            let document = Document::parse(text, "s.yaml").unwrap();
            Budget::from_document(&document, Some(&scale)).map_err(|error| error.to_string())
        };
        let budget = read("budget: {tolerance: 0.2}").unwrap();
        assert_eq!((budget.amount, budget.parameters.unwrap().number), (Amount::Flops(2e12), Some(20)));
        assert_eq!(read("x: 1").unwrap().tolerance, 0.05);
        let error = read("budget: {bytes: 3}").unwrap_err();
        assert!(
            error.contains("budget.bytes: a scaling study has its sizes and budgets in `scale`; remove this field"),
            "{error}"
        );
    }

    #[test]
    fn mistakes_say_what_was_expected() {
        let cases = [
            ("{}", "s.yaml: budget: does not say how long a run trains; expected one of `bytes: N`, `flops: F`"),
            ("{parameters: 5}", "s.yaml: budget: does not say how long"),
            ("{bytes: 1, flops: 2}", "`seconds: S`, found bytes and flops (line 1)"),
            ("{bites: 1}", "s.yaml: budget.bites: unknown field; did you mean `bytes`? (line 1)"),
            ("{bytes: 0}", "s.yaml: budget.bytes: expected a positive number, found 0"),
            ("{seconds: soon}", "s.yaml: budget.seconds: expected a number, found \"soon\""),
            (
                "{bytes: 1, parameters: bases}",
                "expected a number, or `base` for as many as the base has, found \"bases\"",
            ),
            ("{bytes: 1, solve: num_layers}", "budget.solve: needs `budget.parameters`, which is missing; add it"),
            ("{bytes: 1, parameters: 5, solve: 'layers'}", "found \"layers\""),
            ("{bytes: 1, parameters: 5, solve: 'num_layers[x]'}", "expected `hidden_dims` or `num_layers`"),
        ];
        for (text, want) in cases {
            let found = read(text).unwrap_err();
            assert!(found.contains(want), "{found}\n{want}");
        }
    }
}
