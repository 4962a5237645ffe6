//! Brings a model to a number of parameters: its widths, or its layers, are changed in proportion until it has about as
//! many, and then one by one until none is closer.

use std::collections::BTreeMap;

use mblm_core::block::PosEmb;
use mblm_core::config::MblmConfig;
use mblm_train::config::{ModelConfig, RunConfig};
use mblm_train::cost::metric;
use mblm_train::error::{Error, Result};
use mblm_train::model::{Model, TrainModel};

use crate::design::budget::{Parameters, Solve, SolveField};

/// Halvings of the range of scales.
const HALVINGS: usize = 24;
/// No width or number of layers is scaled further than this.
const MAX_SCALE: f64 = 64.0;
/// Widths of larger models are multiples of this, which vector instructions like.
const WIDTH_STEP: usize = 8;
/// Of smaller ones: multiples of this.
const SMALL_WIDTH_STEP: usize = 2;
/// From this width on a model is a larger one.
const LARGE_WIDTH: usize = 128;

/// The number of parameters of a configuration's model.
pub(super) fn num_parameters(config: &RunConfig) -> Result<u64> {
    Ok(Model::outline(config, 0)?.params().num_elements() as u64)
}

/// Changes `config` to have about `target` parameters, and says what was changed and how close that is.
///
/// # Errors
/// It cannot be brought within `tolerance`; says what comes closest.
pub(super) fn solve(config: &mut RunConfig, parameters: &Parameters, target: u64, tolerance: f64) -> Result<String> {
    solve_for("budget.parameters", config, parameters, target, tolerance)
}

/// The same, for a size that the field `asked` names.
fn solve_for(
    asked: &str,
    config: &mut RunConfig,
    parameters: &Parameters,
    target: u64,
    tolerance: f64,
) -> Result<String> {
    let field = parameters.solve.field;
    let mut search = Search::new(config, parameters, target)?;
    let before = list(&search.start);
    let best = search.best()?;
    let found = search.count(&best)?;
    let off = found as f64 / target as f64 - 1.0;
    let reached = format!("{} parameters, {:+.1}% of {}", number(found), 100.0 * off, number(target));
    if off.abs() > tolerance {
        return Err(Error::Config(format!(
            "{asked}: {} of {before} cannot be changed to give {} parameters: {} comes closest, with \
             {reached}, and budget.tolerance allows {:.1}%; solve for another field, allow more, or choose another size",
            field.name(),
            number(target),
            list(&best),
            100.0 * tolerance
        )));
    }
    *values_mut(config, field) = best.clone();
    Ok(match list(&best) {
        same if same == before => format!("{} {before} as given: {reached}", field.name()),
        now => format!("{} {before} → {now}: {reached}", field.name()),
    })
}

/// Brings `config` to a size by its widths; if it `deepens`, by its layers too, in the same proportion. Parameters grow
/// with the layers and with the square of the widths.
pub(super) fn to_size(config: &mut RunConfig, size: u64, deepens: bool, tolerance: f64) -> Result<String> {
    let mut said = String::new();
    if deepens {
        let ratio = (size as f64 / num_parameters(config)? as f64).cbrt();
        let layers = values_mut(config, SolveField::NumLayers);
        let before = list(layers);
        layers.iter_mut().for_each(|layers| *layers = ((*layers as f64 * ratio).round() as usize).max(1));
        said = format!("num_layers {before} → {}, ", list(layers));
    }
    let parameters = Parameters { number: Some(size), solve: Solve { field: SolveField::HiddenDims, stage: None } };
    Ok(said + &solve_for("scale.sizes", config, &parameters, size, tolerance)?)
}

fn list(values: &[usize]) -> String {
    format!("[{}]", values.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
}

fn number(parameters: u64) -> String {
    metric(parameters as f64).trim_end().into()
}

fn hierarchy_mut(config: &mut RunConfig) -> &mut MblmConfig {
    match &mut config.params.model {
        ModelConfig::Generative(model) => model,
        ModelConfig::Encoder(encoder) => &mut encoder.mblm_config,
    }
}

fn values_mut(config: &mut RunConfig, field: SolveField) -> &mut Vec<usize> {
    let model = hierarchy_mut(config);
    match field {
        SolveField::HiddenDims => &mut model.hidden_dims,
        SolveField::NumLayers => &mut model.num_layers,
    }
}

/// A search over the values of one field.
struct Search {
    config: RunConfig,
    field: SolveField,
    /// The stages whose values change.
    stages: Vec<usize>,
    start: Vec<usize>,
    /// Every value is a multiple of it.
    step: usize,
    target: u64,
    counted: BTreeMap<Vec<usize>, u64>,
}

impl Search {
    fn new(config: &RunConfig, parameters: &Parameters, target: u64) -> Result<Self> {
        let mut config = config.clone();
        let field = parameters.solve.field;
        let start = values_mut(&mut config, field).clone();
        let stages = match parameters.solve.stage {
            None => (0..start.len()).collect(),
            Some(stage) if stage < start.len() => vec![stage],
            Some(stage) => {
                return Err(Error::Config(format!(
                    "budget.solve: there is no {}[{stage}] in a model of {} stage(s), counted from 0",
                    field.name(),
                    start.len()
                )));
            }
        };
        let is_large = start.iter().all(|&width| width >= LARGE_WIDTH);
        let step = match field {
            SolveField::NumLayers => 1,
            SolveField::HiddenDims if is_large => WIDTH_STEP,
            SolveField::HiddenDims => SMALL_WIDTH_STEP,
        };
        Ok(Search { config, field, stages, start, step, target, counted: BTreeMap::new() })
    }

    fn count(&mut self, values: &[usize]) -> Result<u64> {
        if let Some(&count) = self.counted.get(values) {
            return Ok(count);
        }
        *values_mut(&mut self.config, self.field) = values.to_vec();
        let count = num_parameters(&self.config)?;
        self.counted.insert(values.to_vec(), count);
        Ok(count)
    }

    /// Whether a stage can have a value.
    fn fits(&self, stage: usize, value: usize) -> bool {
        let block = &self.config.params.model.hierarchy().blocks[stage];
        let is_rotated = block.pos_emb_type() == Some(PosEmb::Rope);
        match self.field {
            SolveField::NumLayers => true,
            SolveField::HiddenDims => block.validate(value).is_ok() && (value.is_multiple_of(2) || !is_rotated),
        }
    }

    /// The values that a stage can have next to `from`, below or above.
    fn neighbour(&self, stage: usize, from: usize, up: bool) -> Option<usize> {
        let last = (self.start[stage] as f64 * MAX_SCALE) as usize;
        let mut value = from / self.step * self.step;
        loop {
            value = if up { value + self.step } else { value.checked_sub(self.step)? };
            match value {
                0 => return None,
                value if value > last => return None,
                value if value != from && self.fits(stage, value) => return Some(value),
                _ => {}
            }
        }
    }

    /// All values times `scale`, each the nearest one that the stage can have.
    fn scaled(&self, scale: f64) -> Vec<usize> {
        let nearest = |stage: usize| {
            let wanted = self.start[stage] as f64 * scale;
            if scale == 1.0 || !self.stages.contains(&stage) {
                return self.start[stage];
            }
            let rounded = ((wanted / self.step as f64).round() as usize * self.step).max(self.step);
            let around = [
                Some(rounded).filter(|&v| self.fits(stage, v)),
                self.neighbour(stage, rounded, false),
                self.neighbour(stage, rounded, true),
            ];
            let distance = |value: &usize| (*value as f64 - wanted).abs();
            around.into_iter().flatten().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(self.start[stage])
        };
        (0..self.start.len()).map(nearest).collect()
    }

    /// The values whose model comes closest to the target.
    fn best(&mut self) -> Result<Vec<usize>> {
        let target = self.target;
        let (mut low, mut high) = (1.0f64, 1.0f64);
        while self.count(&self.scaled(high))? < target && high < MAX_SCALE {
            high *= 2.0;
        }
        while self.count(&self.scaled(low))? > target && low > 1.0 / MAX_SCALE {
            low /= 2.0;
        }
        for _ in 0..HALVINGS {
            if self.scaled(low) == self.scaled(high) {
                break;
            }
            let middle = (low * high).sqrt();
            match self.count(&self.scaled(middle))? < target {
                true => low = middle,
                false => high = middle,
            }
        }
        let mut best = self.closest();
        loop {
            for stage in self.stages.clone() {
                for up in [false, true] {
                    if let Some(value) = self.neighbour(stage, best[stage], up) {
                        let mut next = best.clone();
                        next[stage] = value;
                        self.count(&next)?;
                    }
                }
            }
            match self.closest() {
                same if same == best => return Ok(best),
                closer => best = closer,
            }
        }
    }

    /// Of all that were counted; of equals, the one that changes less.
    fn closest(&self) -> Vec<usize> {
        let change = |values: &[usize]| values.iter().zip(&self.start).map(|(a, b)| a.abs_diff(*b)).sum::<usize>();
        let closest = self.counted.iter().min_by_key(|(values, count)| (count.abs_diff(self.target), change(values)));
        closest.map_or_else(|| self.start.clone(), |(values, _)| values.clone())
    }
}

#[cfg(test)]
mod tests {
    use mblm_blocks as _;
    use mblm_core::registry::BlockRegistry;
    use mblm_yaml::Document;

    use super::*;

    const CONFIG: &str = "
io: {name_model: a, output_dir: runs, dataset_dir: x, dataset_id: bytes, num_models_to_save: 1, validate_amount: 1,
  log_train_loss_amount: 1}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 64, seq_lens: [16, 4], hidden_dims: [64, 48],
  num_layers: [3, 2], block: [{block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16},
  {block_type: transformer, attn_head_dims: 16, attn_num_heads: 2, attn_use_rot_embs: true, pos_emb_type: rope}]}
train: {target_elements: 1, target_elements_strategy: batch, batch_size: 1, learning_rate: 1, gradient_accumulate_every: 1}
";

    fn config() -> RunConfig {
        let document = Document::parse(CONFIG, "a.yaml").unwrap();
        RunConfig::from_document(&document, &BlockRegistry::builtin().unwrap()).unwrap()
    }

    fn parameters(field: SolveField, stage: Option<usize>) -> Parameters {
        Parameters { number: None, solve: Solve { field, stage } }
    }

    #[test]
    fn widths_come_close_and_fit_the_blocks() {
        let start = num_parameters(&config()).unwrap();
        for share in [0.5, 1.0, 1.7, 6.0] {
            let (mut solved, target) = (config(), (start as f64 * share) as u64);
            let said = solve(&mut solved, &parameters(SolveField::HiddenDims, None), target, 0.05).unwrap();
            let count = num_parameters(&solved).unwrap();
            assert!((count as f64 / target as f64 - 1.0).abs() < 0.05, "{count} of {target}: {said}");
            let dims = &solved.params.model.hierarchy().hidden_dims;
            assert!(dims[0].is_multiple_of(8) && dims[1].is_multiple_of(2), "headdim 16 divides 2 · width: {dims:?}");
            assert!(said.starts_with("hidden_dims [64, 48] ") && said.contains(&list(dims)), "{said}");
            assert_eq!(share == 1.0, *dims == [64, 48], "{said}");
        }
    }

    #[test]
    fn one_stage_alone_can_change() {
        let start = num_parameters(&config()).unwrap();
        let mut solved = config();
        solve(&mut solved, &parameters(SolveField::HiddenDims, Some(0)), start * 2, 0.05).unwrap();
        let model = solved.params.model.hierarchy();
        assert!(model.hidden_dims[0] > 64 && model.hidden_dims[1] == 48, "{:?}", model.hidden_dims);
        let mut solved = config();
        solve(&mut solved, &parameters(SolveField::NumLayers, Some(1)), start * 2, 0.1).unwrap();
        let model = solved.params.model.hierarchy();
        assert!(model.num_layers[0] == 3 && model.num_layers[1] > 2 && model.hidden_dims == [64, 48]);
    }

    #[test]
    fn what_cannot_be_reached_says_what_comes_closest() {
        let cases = [
            (
                parameters(SolveField::NumLayers, None),
                1000,
                "num_layers of [3, 2] cannot be changed to give 1.00 k parameters: [1, 1] comes closest",
            ),
            (
                parameters(SolveField::HiddenDims, Some(2)),
                1000,
                "budget.solve: there is no hidden_dims[2] in a model of 2 stage(s)",
            ),
        ];
        for (parameters, target, want) in cases {
            let error = solve(&mut config(), &parameters, target, 0.05).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains(want), "{error}");
        }
    }
}
