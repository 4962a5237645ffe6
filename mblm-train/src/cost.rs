//! The cost of a model, stage by stage: parameters, operations and memory, and the table of `mblm inspect`.

use std::fmt;

use mblm_core::config::MblmConfig;
use mblm_core::ops::newton_schulz::flops;
use mblm_core::param::Part;
use mblm_core::registry::block_type;
use mblm_core::{ParamStore, StageModel};
use serde::{Deserialize, Serialize};

use crate::config::OptimizerKind;
use crate::patches::PatchLengths;
use crate::trainer::optimizer::is_for_muon;

/// Everything is held in 32 bit floats.
const FLOAT_BYTES: f64 = 4.0;
/// Gradients and AdamW's two moments lie beside the weights; of Muon's matrices, one moment.
const TRAINED_COPIES: f64 = 4.0;
/// What the program holds besides: its code, the threads' stacks, the chunks that long loops work in.
const PROCESS_BYTES: f64 = 128.0 * 1048576.0;
/// A training step in forward passes: backward costs about twice as much as forward.
pub const STEP_PER_FORWARD: f64 = 3.0;

/// What one training step reads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Sequences.
    pub batch: usize,
    /// Bytes of each.
    pub bytes: usize,
}

/// What a part of the model costs. `None` where a block does not say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartCost {
    /// Learned numbers.
    pub parameters: usize,
    /// Floating point operations of a forward pass.
    pub flops_per_byte: Option<f64>,
    /// What a training step keeps for backward, in bytes.
    pub activation_bytes: Option<f64>,
}

/// A stage and its cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Its block's type.
    pub block_type: String,
    /// Its sequence length `P_n`.
    pub seq_len: usize,
    /// Mean tokens of its sequences, where patches follow the content and the data were looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_len: Option<f64>,
    /// Its width `D_n`.
    pub hidden_dim: usize,
    /// Its layers.
    pub num_layers: usize,
    /// What its model costs.
    #[serde(flatten)]
    pub part: PartCost,
}

/// A model's costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCost {
    step: Step,
    context_len: usize,
    num_tokens: usize,
    /// From global to local.
    pub stages: Vec<Stage>,
    /// Token embeddings with their projections, positions and start tokens.
    embeddings: PartCost,
    /// From each stage to the next.
    projections: PartCost,
    /// The logits.
    head: PartCost,
    /// The whole model.
    pub total: PartCost,
    /// What updates it.
    #[serde(skip)]
    optimizer: OptimizerKind,
    /// The moments that Muon would do without.
    #[serde(skip)]
    spared: usize,
    /// What Muon's rounds would cost.
    #[serde(skip)]
    muon_flops: f64,
    /// The most memory that a training step holds at once, in bytes.
    peak_bytes: Option<f64>,
    /// What it holds in any case.
    #[serde(skip)]
    least_bytes: f64,
}

impl ModelCost {
    /// The costs of a model that was built from `config`, with patches of full length.
    pub fn new(config: &MblmConfig, params: &ParamStore, models: &[&dyn StageModel], step: Step) -> Self {
        Self::with_patches(config, params, models, step, None)
    }

    /// Like [`new`](Self::new), with the lengths that patches have in the data. Sequences of `step` then have as many
    /// patches as its bytes would have patches of full length.
    pub fn with_patches(
        config: &MblmConfig,
        params: &ParamStore,
        models: &[&dyn StageModel],
        step: Step,
        patches: Option<&PatchLengths>,
    ) -> Self {
        let full = || config.seq_lens[1..].iter().map(|&len| len as f64).collect();
        let lens = patches.map_or_else(full, |patches| patches.means.clone());
        let tokens = step.bytes.div_ceil(config.seq_lens[1..].iter().product());
        let counts = Counts { config, params, batch: step.batch, tokens, lens };
        let step = match patches {
            Some(_) => Step { bytes: (tokens as f64 * counts.patch_bytes(0)).round() as usize, ..step },
            None => step,
        };
        let stages: Vec<Stage> = (0..config.num_stages())
            .map(|n| Stage {
                block_type: block_type(&*config.blocks[n]).into(),
                seq_len: config.seq_lens[n],
                mean_len: patches.filter(|_| n > 0).map(|patches| patches.means[n - 1]),
                hidden_dim: config.hidden_dims[n],
                num_layers: config.num_layers[n],
                part: counts.stage(n, models.get(n).copied()),
            })
            .collect();
        let (embeddings, projections, head) = (counts.embeddings(), counts.projections(), counts.head());
        let parts: Vec<&PartCost> =
            stages.iter().map(|stage| &stage.part).chain([&embeddings, &projections, &head]).collect();
        let total = PartCost {
            parameters: params.num_elements(),
            flops_per_byte: parts.iter().map(|part| part.flops_per_byte).sum(),
            activation_bytes: parts.iter().map(|part| part.activation_bytes).sum(),
        };
        let (context_len, num_tokens) = (config.context_len(), config.num_tokens);
        let matrices = || params.iter().filter(|param| is_for_muon(param));
        let weights = total.parameters as f64 * FLOAT_BYTES * TRAINED_COPIES;
        let working = (0..stages.len()).map(|n| counts.working_bytes(n, models.get(n).copied())).fold(0.0, f64::max);
        let peak_bytes = total.activation_bytes.map(|kept| PROCESS_BYTES + weights + kept + working);
        let least_bytes = weights + counts.output_bytes();
        ModelCost {
            step,
            context_len,
            num_tokens,
            stages,
            embeddings,
            projections,
            head,
            total,
            optimizer: OptimizerKind::Adamw,
            spared: matrices().map(|param| param.len()).sum(),
            muon_flops: sum(matrices().map(|param| flops(param.shape()[0], param.shape()[1]))),
            peak_bytes,
            least_bytes,
        }
    }

    /// The same model, if AdamW or another optimizer updates it.
    pub fn trained_by(self, optimizer: OptimizerKind) -> Self {
        if optimizer == OptimizerKind::Adamw {
            return self;
        }
        let spared = self.spared as f64 * FLOAT_BYTES;
        let (least_bytes, peak_bytes) = (self.least_bytes - spared, self.peak_bytes.map(|peak| peak - spared));
        ModelCost { optimizer, least_bytes, peak_bytes, ..self }
    }

    /// The training step that is counted.
    pub fn step(&self) -> Step {
        self.step
    }

    /// The bytes that a training step holds in any case: weights, gradients and moments, and the output of each stage
    /// that is not cut into chunks.
    pub fn least_bytes(&self) -> f64 {
        self.least_bytes
    }

    /// The most memory that a training step holds at once, in bytes; `None` if a block does not say.
    pub fn peak_bytes(&self) -> Option<f64> {
        self.peak_bytes
    }
}

/// Counts what a model needs.
struct Counts<'a> {
    config: &'a MblmConfig,
    params: &'a ParamStore,
    /// Sequences of a training step.
    batch: usize,
    /// Tokens of the first stage in each.
    tokens: usize,
    /// Tokens of a sequence of each stage but the first.
    lens: Vec<f64>,
}

impl Counts<'_> {
    /// Bytes that one token of stage `n` (from 0) stands for.
    fn patch_bytes(&self, n: usize) -> f64 {
        self.lens[n..].iter().product()
    }

    /// Tokens in a sequence of stage `n`: as many as the input needs at the first stage, `P_n` at the others, or their mean.
    fn seq_len(&self, n: usize) -> f64 {
        match n {
            0 => self.tokens as f64,
            _ => self.lens[n - 1],
        }
    }

    /// Bytes in a training step, padded to whole patches.
    fn step_bytes(&self) -> f64 {
        self.batch as f64 * self.seq_len(0) * self.patch_bytes(0)
    }

    /// The outputs of the stages that are not cut into chunks.
    fn output_bytes(&self) -> f64 {
        let whole = (0..self.config.num_stages()).filter(|n| self.chunks(*n).is_none());
        let floats = whole.map(|n| self.step_bytes() / self.patch_bytes(n) * self.config.hidden_dims[n] as f64);
        sum(floats) * FLOAT_BYTES
    }

    fn parameters(&self, counts: impl Fn(Part) -> bool) -> usize {
        self.params.iter().filter(|param| param.part().is_some_and(&counts)).map(|param| param.len()).sum()
    }

    /// Into how many chunks the sequences of stage `n` are cut.
    fn chunks(&self, n: usize) -> Option<f64> {
        self.config.train_checkpoint_chunks.as_ref().filter(|_| n > 0).map(|chunks| chunks[n - 1] as f64)
    }

    fn local_is_chunked(&self) -> bool {
        self.chunks(self.config.num_stages() - 1).is_some()
    }

    /// What backward works with in a layer of stage `n`: about twice what forward keeps of one.
    fn working_bytes(&self, n: usize, model: Option<&dyn StageModel>) -> f64 {
        let positions = self.seq_len(n) + 1.0;
        let sequences = self.step_bytes() / (self.seq_len(n) * self.patch_bytes(n));
        let at_once = (sequences / self.chunks(n).unwrap_or(1.0)).ceil();
        let kept = model.and_then(|model| model.cost(positions.round() as usize)).map_or(0.0, |cost| cost.activations);
        2.0 * kept / self.config.num_layers[n] as f64 * at_once * positions * FLOAT_BYTES
    }

    fn stage(&self, n: usize, model: Option<&dyn StageModel>) -> PartCost {
        // The start token is a position too.
        let positions = self.seq_len(n) + 1.0;
        let sequences = self.step_bytes() / (self.seq_len(n) * self.patch_bytes(n));
        let cost = model.and_then(|model| model.cost(positions.round() as usize));
        // A recomputed stage keeps its inputs, and the rest of one chunk at a time; the local one not even these.
        let inputs = if n + 1 < self.config.num_stages() { self.config.hidden_dims[n] as f64 } else { 0.0 };
        let kept = |per_position: f64| match self.chunks(n) {
            Some(chunks) => sequences * inputs + (sequences / chunks).ceil() * per_position,
            None => sequences * per_position,
        };
        PartCost {
            parameters: self.parameters(|part| part == Part::Stage(n)),
            flops_per_byte: cost.map(|cost| cost.flops * positions / (self.seq_len(n) * self.patch_bytes(n))),
            activation_bytes: cost.map(|cost| kept(cost.activations) * positions * FLOAT_BYTES),
        }
    }

    /// Floating point operations per byte of the matrices of some parts. `every` gives the bytes between two
    /// applications; none for other parts.
    fn matrix_flops(&self, every: impl Fn(Part) -> Option<f64>) -> f64 {
        // A table of embeddings is looked up.
        let matrices = self.params.iter().filter(|param| param.shape().len() == 2 && param.zero_row().is_none());
        sum(matrices.filter_map(|param| Some(2.0 * param.len() as f64 / every(param.part()?)?)))
    }

    fn embeddings(&self) -> PartCost {
        let (last, dims) = (self.config.num_stages() - 1, &self.config.hidden_dims);
        // Of a stage above the local one: its tokens before and after the second norm.
        let above = |n: usize| 2.0 * dims[n] as f64 / self.patch_bytes(n);
        let local = if self.local_is_chunked() { 0.0 } else { dims[last] as f64 };
        let floats_per_byte = local + sum((0..last).map(above));
        PartCost {
            parameters: self
                .parameters(|part| matches!(part, Part::Embedding(_) | Part::Positions(_) | Part::Start(_))),
            flops_per_byte: Some(self.matrix_flops(|part| match part {
                Part::Embedding(n) => Some(self.patch_bytes(n)),
                _ => None,
            })),
            activation_bytes: Some(floats_per_byte * self.step_bytes() * FLOAT_BYTES),
        }
    }

    fn projections(&self) -> PartCost {
        let last = self.config.num_stages() - 1;
        // Where the local stage is cut into chunks, what the last projection says lies in memory four times at the peak:
        // itself, and its gradient as a zero, a summand and a sum. About as much again stays with the allocator.
        let copies = |n: usize| if n + 1 == last && self.local_is_chunked() { 5.0 } else { 1.0 };
        let kept = |n: usize| copies(n) * self.config.hidden_dims[n + 1] as f64 / self.patch_bytes(n + 1);
        PartCost {
            parameters: self.parameters(|part| matches!(part, Part::Projection(_))),
            flops_per_byte: Some(self.matrix_flops(|part| match part {
                // Of a patch that is not full, the outputs for its tokens alone are computed.
                Part::Projection(n) => Some(self.patch_bytes(n + 1) * self.config.seq_lens[n + 1] as f64),
                _ => None,
            })),
            activation_bytes: Some(sum((0..last).map(kept)) * self.step_bytes() * FLOAT_BYTES),
        }
    }

    fn head(&self) -> PartCost {
        // The gradient of its input, kept from forward on and scattered in backward.
        let kept = if self.local_is_chunked() {
            0.0
        } else {
            2.0 * self.config.hidden_dims[self.config.num_stages() - 1] as f64
        };
        PartCost {
            parameters: self.parameters(|part| part == Part::Head),
            flops_per_byte: Some(self.matrix_flops(|part| (part == Part::Head).then_some(1.0))),
            activation_bytes: Some(kept * self.step_bytes() * FLOAT_BYTES),
        }
    }
}

/// `Iterator::sum` of nothing is -0, which a table would show.
fn sum(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(0.0, |sum, number| sum + number)
}

impl fmt::Display for ModelCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["stage", "block", "sequence", "width", "layers", "parameters", "FLOP/byte", "activations"];
        let mut rows = vec![header.map(String::from)];
        for (n, stage) in self.stages.iter().enumerate() {
            let [dim, layers] = [stage.hidden_dim, stage.num_layers].map(|n| n.to_string());
            let mean = stage.mean_len.map_or_else(String::new, |mean| format!(" (mean {mean:.2})"));
            let seq_len = format!("{}{mean}", stage.seq_len);
            let [parameters, flops, activations] = stage.part.cells();
            let name = (n + 1).to_string();
            rows.push([name, stage.block_type.clone(), seq_len, dim, layers, parameters, flops, activations]);
        }
        let rest = [("embeddings", &self.embeddings), ("projections", &self.projections), ("head", &self.head)];
        for (name, part) in rest.into_iter().chain([("total", &self.total)]) {
            let [parameters, flops, activations] = part.cells();
            let none = String::new;
            rows.push([name.into(), none(), none(), none(), none(), parameters, flops, activations]);
        }
        write_table(f, &rows)?;

        let lens: Vec<String> = self.stages.iter().map(|stage| stage.seq_len.to_string()).collect();
        let weights = self.total.parameters as f64 * FLOAT_BYTES;
        let step_bytes = (self.step.batch * self.step.bytes) as f64;
        let step_flops = self.total.flops_per_byte.map(|flops| flops * step_bytes * STEP_PER_FORWARD);
        writeln!(f)?;
        writeln!(f, "context    {} bytes ({}), vocabulary {}", self.context_len, lens.join(" · "), self.num_tokens)?;
        let (name, spared) = match self.optimizer {
            OptimizerKind::Adamw => ("AdamW's", 0.0),
            OptimizerKind::Muon => ("Muon's and AdamW's", self.spared as f64 * FLOAT_BYTES),
        };
        let trained = bytes(weights * TRAINED_COPIES - spared);
        writeln!(f, "weights    {}; with gradients and {name} moments {trained}", bytes(weights))?;
        if self.optimizer == OptimizerKind::Muon {
            writeln!(f, "muon       about {}FLOP more per gradient step", metric(self.muon_flops))?;
        }
        let flops = step_flops.map_or("an unknown number of FLOP".into(), |n| format!("about {}FLOP", metric(n)));
        let activations = self.total.activation_bytes.map_or("unknown".into(), bytes);
        writeln!(f, "one step   {} × {} bytes: {flops}, activations {activations}", self.step.batch, self.step.bytes)?;
        let peak = self.peak_bytes.map_or("unknown".into(), |peak| format!("about {} of memory", bytes(peak)));
        writeln!(f, "peak       {peak}")
    }
}

impl PartCost {
    fn cells(&self) -> [String; 3] {
        let parameters = metric(self.parameters as f64).trim_end().to_string();
        let flops = or_unknown(self.flops_per_byte, metric).trim_end().to_string();
        [parameters, flops, or_unknown(self.activation_bytes, bytes)]
    }
}

/// Columns as wide as needed; the first two are text and start at the left.
pub fn write_table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            line += &if column < 2 { format!("{cell:width$}  ") } else { format!("{cell:>width$}  ") };
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

fn or_unknown(number: Option<f64>, show: impl Fn(f64) -> String) -> String {
    number.map_or("unknown".into(), show)
}

/// Three digits and a metric prefix, `12.3 M`.
pub fn metric(number: f64) -> String {
    scaled(number, 1000.0, &["", "k", "M", "G", "T", "P", "E"])
}

/// Three digits and a binary unit, `1.50 GiB`.
pub fn bytes(number: f64) -> String {
    scaled(number, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

fn scaled(number: f64, base: f64, units: &[&str]) -> String {
    let (mut number, mut unit) = (number, 0);
    // What would round up to the base takes the next unit.
    while number >= base - 0.5 && unit + 1 < units.len() {
        number /= base;
        unit += 1;
    }
    let decimals = match number {
        _ if unit == 0 => 0,
        n if n < 9.995 => 2,
        n if n < 99.95 => 1,
        _ => 0,
    };
    format!("{number:.decimals$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Tensor;
    use mblm_core::block::Cost;
    use mblm_core::{Init, Mode, ParamScope, PosEmb, Result, StageBlock};

    use super::*;

    #[derive(Debug, Serialize)]
    struct Toy {}

    impl StageBlock for Toy {
        fn typetag_name(&self) -> &'static str {
            "toy"
        }
        fn typetag_deserialize(&self) {}
        fn pos_emb_type(&self) -> Option<PosEmb> {
            None
        }
        fn build(&self, _: usize, _: usize, _: &mut ParamScope) -> Result<Box<dyn StageModel>> {
            Ok(Box::new(ToyModel(None)))
        }
    }

    struct ToyModel(Option<Cost>);

    impl StageModel for ToyModel {
        fn forward(&self, x: &Tensor, _: Option<&Tensor>, _: Mode) -> Result<Tensor> {
            Ok(x.clone())
        }
        fn cost(&self, seq_len: usize) -> Option<Cost> {
            self.0.map(|cost| Cost { flops: cost.flops * seq_len as f64, ..cost })
        }
    }

    /// Three stages of 4, 3 and 2, with the parameters that the hierarchy creates.
    fn report(chunks: Option<Vec<usize>>, costs: [Option<f64>; 3], step: Step) -> ModelCost {
        let config = MblmConfig {
            num_tokens: 10,
            pad_token_id: 0,
            hidden_dims: vec![8, 6, 4],
            num_layers: vec![3, 2, 1],
            seq_lens: vec![4, 3, 2],
            train_checkpoint_chunks: chunks,
            patching: vec![],
            blocks: vec![Arc::new(Toy {}), Arc::new(Toy {}), Arc::new(Toy {})],
        };
        let mut params = ParamStore::new(0);
        let shapes: [(Part, &str, &[usize]); 11] = [
            (Part::Stage(0), "w0", &[5]),
            (Part::Stage(1), "w1", &[6]),
            (Part::Stage(2), "w2", &[7]),
            (Part::Embedding(1), "e1", &[6, 8]),
            (Part::Embedding(0), "e0", &[8, 24]),
            (Part::Embedding(0), "b0", &[8]),
            (Part::Positions(1), "p1", &[3, 6]),
            (Part::Start(0), "s0", &[8]),
            (Part::Projection(0), "n0", &[18, 8]),
            (Part::Projection(1), "n1", &[8, 6]),
            (Part::Head, "out", &[10, 4]),
        ];
        for (part, name, shape) in shapes {
            params.root().of(part).param(name, shape, Init::Const(0.0)).unwrap();
        }
        params.root().of(Part::Embedding(2)).embedding(10, 4, Some(0)).unwrap();
        let model = |cost: Option<f64>| {
            let cost = cost.map(|cost| Cost { flops: cost, activations: 100.0 });
            Box::new(ToyModel(cost)) as Box<dyn StageModel>
        };
        let models = costs.map(model);
        ModelCost::new(&config, &params, &models.each_ref().map(|model| &**model), step)
    }

    const STEP: Step = Step { batch: 2, bytes: 24 };

    #[test]
    fn parts_add_up() {
        let report = report(None, [Some(1.0), Some(10.0), Some(100.0)], STEP);
        let stages: Vec<PartCost> = report.stages.iter().map(|stage| stage.part).collect();
        let part = |parameters, flops, floats| PartCost {
            parameters,
            flops_per_byte: Some(flops),
            activation_bytes: Some(floats * 4.0),
        };
        // Positions · FLOP of a position / bytes of a sequence; sequences · positions · 100 floats.
        assert_eq!(stages[0], part(5, 5.0 * 5.0 / 24.0, 2.0 * 5.0 * 100.0));
        assert_eq!(stages[1], part(6, 4.0 * 40.0 / 6.0, 8.0 * 4.0 * 100.0));
        assert_eq!(stages[2], part(7, 3.0 * 300.0 / 2.0, 24.0 * 3.0 * 100.0));
        // Per byte: 4 at the local stage, 2 · 6 / 2 and 2 · 8 / 6 above.
        let floats = 48.0 * (4.0 + 16.0 / 6.0 + 6.0);
        let embeddings = part(40 + 48 + 192 + 8 + 18 + 8, 2.0 * 48.0 / 2.0 + 2.0 * 192.0 / 6.0, floats);
        assert_eq!(report.embeddings, embeddings);
        let projections = part(144 + 48, 2.0 * 144.0 / 6.0 + 2.0 * 48.0 / 2.0, 48.0 * (6.0 / 2.0 + 4.0));
        assert_eq!(report.projections, projections);
        assert_eq!(report.head, part(40, 80.0, 48.0 * 8.0));
        assert_eq!(report.total.parameters, 5 + 6 + 7 + 314 + 192 + 40);
        let flops = 25.0 / 24.0 + 160.0 / 6.0 + 450.0 + 112.0 + 96.0 + 80.0;
        assert!((report.total.flops_per_byte.unwrap() - flops).abs() < 1e-9);
    }

    fn config_of_one_stage() -> MblmConfig {
        MblmConfig {
            num_tokens: 10,
            pad_token_id: 0,
            hidden_dims: vec![8],
            num_layers: vec![1],
            seq_lens: vec![4],
            train_checkpoint_chunks: None,
            patching: vec![],
            blocks: vec![Arc::new(Toy {})],
        }
    }

    #[test]
    fn one_stage_has_no_projections() {
        let config = config_of_one_stage();
        let table = ModelCost::new(&config, &ParamStore::new(0), &[], Step { batch: 1, bytes: 4 }).to_string();
        let row = table.lines().find(|line| line.starts_with("projections")).unwrap();
        assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["projections", "0", "0", "0", "B"]);
    }

    #[test]
    fn muon_spares_the_second_moment_of_matrices_and_costs_its_rounds() {
        let mut config = config_of_one_stage();
        config.hidden_dims = vec![32];
        let mut params = ParamStore::new(0);
        params.root().of(Part::Stage(0)).weight("w", &[64, 32], Init::Const(0.0)).unwrap();
        params.root().of(Part::Head).weight("out", &[10, 32], Init::Const(0.0)).unwrap();
        let adamw = ModelCost::new(&config, &params, &[], Step { batch: 1, bytes: 4 });
        let muon = adamw.clone().trained_by(OptimizerKind::Muon);
        assert_eq!(adamw.least_bytes() - muon.least_bytes(), 64.0 * 32.0 * 4.0);
        // Five rounds of two products with 64 columns and one with 32.
        let table = muon.to_string();
        assert!(
            table.contains("Muon's and AdamW's moments 29.0 KiB") && table.contains("about 1.64 MFLOP more"),
            "{table}"
        );
    }

    #[test]
    fn a_shorter_input_needs_fewer_patches() {
        let report = report(None, [Some(1.0); 3], Step { batch: 1, bytes: 7 });
        // 7 bytes are 2 patches of 6.
        assert_eq!(report.stages[0].part.flops_per_byte, Some(3.0 * 3.0 / 12.0));
        assert_eq!(report.stages[2].part.activation_bytes, Some(6.0 * 3.0 * 100.0 * 4.0));
    }

    #[test]
    fn the_table_is_aligned_and_says_what_is_unknown() {
        let want = "\
stage        block  sequence  width  layers  parameters  FLOP/byte  activations
1            toy           4      8       3           5          1     3.91 KiB
2            toy           3      6       2           6    unknown      unknown
3            toy           2      4       1           7        450     28.1 KiB
embeddings                                          314        112     2.38 KiB
projections                                         192         96     1.31 KiB
head                                                 40         80     1.50 KiB
total                                               564    unknown      unknown

context    24 bytes (4 · 3 · 2), vocabulary 10
weights    2.20 KiB; with gradients and AdamW's moments 8.81 KiB
one step   2 × 24 bytes: an unknown number of FLOP, activations unknown
peak       unknown
";
        assert_eq!(report(None, [Some(1.0), None, Some(100.0)], STEP).to_string(), want);
        let json = serde_json::to_value(report(None, [Some(1.0), None, Some(100.0)], STEP)).unwrap();
        assert_eq!((&json["stages"][1]["flops_per_byte"], &json["stages"][2]["parameters"]), (&().into(), &7.into()));
    }

    #[test]
    fn a_recomputed_stage_keeps_one_chunk() {
        let report = report(Some(vec![3, 24]), [Some(1.0); 3], STEP);
        let kept: Vec<_> = report.stages.iter().map(|stage| stage.part.activation_bytes.unwrap() / 4.0).collect();
        assert_eq!(kept, [1000.0, 4.0 * (8.0 * 6.0 + 3.0 * 100.0), 3.0 * 100.0]);
    }

    #[test]
    fn numbers_keep_three_digits() {
        let cases = [
            (0.0, "0 "),
            (999.0, "999 "),
            (999.6, "1.00 k"),
            (12_345.0, "12.3 k"),
            (360e6, "360 M"),
            (9.996e9, "10.0 G"),
        ];
        for (number, want) in cases {
            assert_eq!(metric(number), want);
        }
        assert_eq!([bytes(1023.0), bytes(1536.0), bytes(3.0 * 1024f64.powi(3))], ["1023 B", "1.50 KiB", "3.00 GiB"]);
    }
}
