//! What the decoder and the encoder share: stages from global to local, each with its embedding, positions, model and
//! the projection to the stage below.

use std::sync::Arc;

use candle_core::Tensor;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::layer::{Group, param_like};
use mblm_sdk::mode::Mode;
use mblm_sdk::node::apply1;
use mblm_sdk::ops::cross_entropy::{CrossEntropy, Target};
use mblm_sdk::ops::linear::linear_composed;
use mblm_sdk::param::{Init, Param, ParamStore, Part};
use mblm_sdk::transfer;

use super::input::Ids;
use super::layout::Bucket;
use super::local_loss::LocalLoss;
use super::stage::Stage;
use super::stage_input::Positions;
use super::watch::{NotFinite, Seen, What};
use crate::config::MblmConfig;

/// The stages and the output layer.
pub(crate) struct Hierarchy {
    pub(crate) config: MblmConfig,
    pub(crate) params: ParamStore,
    pub(crate) stages: Vec<Stage>,
    pub(crate) out_weight: Arc<Param>,
    pub(crate) out_bias: Arc<Param>,
}

impl Hierarchy {
    /// Builds all stages with parameters in `params`; `starts`: with a start token before each sequence.
    pub(crate) fn new(config: &MblmConfig, mut params: ParamStore, starts: bool) -> Result<Self> {
        let stages = (0..config.num_stages())
            .map(|n| at_stage(n, Stage::new(config, n, starts, &mut params)))
            .collect::<Result<Vec<_>>>()?;
        let dim = config.hidden_dims[config.num_stages() - 1];
        let mut root = params.root();
        let mut out = root.sub("to_logits");
        let mut out = out.of(Part::Head);
        let out_weight = out.weight("weight", &[config.num_tokens, dim], Init::linear(dim))?;
        let out_bias = out.param("bias", &[config.num_tokens], Init::linear(dim))?;
        Ok(Hierarchy { config: config.clone(), params, stages, out_weight, out_bias })
    }

    /// Checks a padded length against the fixed positions of the global stage.
    pub(crate) fn check_length(&self, ids: &Ids) -> Result<()> {
        let patch = self.config.context_len() / self.config.seq_lens[0];
        let (patches, limit) = (ids.layout.padded_len / patch, self.config.seq_lens[0]);
        if matches!(self.stages[0].input.positions, Positions::Fixed(_)) && patches > limit {
            let (each, all) = match self.config.is_fixed() {
                true => (format!("of {patch} bytes"), format!(" ({} bytes)", self.config.context_len())),
                false => (format!("of at most {patch} bytes"), String::new()),
            };
            return Err(Error::Input(format!(
                "a sequence of {} bytes makes {patches} patches {each}, but the fixed positions of stage 1 end at {limit} \
                 patches{all}",
                ids.len,
            )));
        }
        Ok(())
    }

    /// Runs all stages and returns the local stage's output: `(local sequences, [1 +] P_N, D_N)`, or `(1, rows, D_N)` where
    /// patches differ in length.
    ///
    /// `masks`: per stage, `(sequences, P_n)`.
    pub(crate) fn run(&self, ids: &Ids, masks: Option<&[Tensor]>, mode: Mode) -> Result<Tensor> {
        let above = self.run_above(ids, masks, mode)?;
        self.run_stage(self.stages.len() - 1, ids, above.as_ref(), masks, mode)
    }

    /// The mean loss of the targets. Where the local stage is cut into chunks, its output never exists as a whole.
    ///
    /// `masks`: as for [`run`](Self::run); `targets`: in the order of their rows.
    ///
    /// # Errors
    /// Outside training a loss that is not finite is an error, which names the stage; training looks at it itself.
    pub(crate) fn loss(&self, ids: &Ids, targets: Vec<Target>, masks: Option<&[Tensor]>, mode: Mode) -> Result<Tensor> {
        if mode != Mode::Eval {
            return self.loss_as_it_is(ids, targets, masks, mode);
        }
        let loss = self.loss_as_it_is(ids, targets.clone(), masks, mode)?;
        let value = transfer::to_scalar::<f32>(&loss)?;
        match value.is_finite() {
            true => Ok(loss),
            false => {
                Err(self.not_finite(&format!("the loss is {value}"), || self.loss_as_it_is(ids, targets, masks, mode)))
            }
        }
    }

    fn loss_as_it_is(
        &self,
        ids: &Ids,
        mut targets: Vec<Target>,
        masks: Option<&[Tensor]>,
        mode: Mode,
    ) -> Result<Tensor> {
        targets.sort_by_key(|target| target.row);
        let local = self.stages.len() - 1;
        if let Some(chunks) = self.stages[local].chunks
            && let Some(above) = self.run_above(ids, masks, mode)?
        {
            return self.loss_in_chunks(ids, &targets, &above, masks, chunks, mode);
        }
        let (weight, bias) = (self.out_weight.clone(), self.out_bias.clone());
        let loss = CrossEntropy { weight, bias, targets, training: mode != Mode::Eval };
        apply1(loss, &self.run(ids, masks, mode)?, mode)
    }

    /// The loss of targets in the order of their rows, as a sum over buckets of the local stage, each in chunks.
    fn loss_in_chunks(
        &self,
        ids: &Ids,
        targets: &[Target],
        above: &Tensor,
        masks: Option<&[Tensor]>,
        chunks: usize,
        mode: Mode,
    ) -> Result<Tensor> {
        let local = self.stages.len() - 1;
        let mut sum: Option<Tensor> = None;
        for bucket in &ids.layout.stages[local] {
            let end = bucket.first_row + self.rows(local, bucket);
            let of_bucket = |row: usize| targets.partition_point(|target| (target.row as usize) < row);
            let mut own = targets[of_bucket(bucket.first_row)..of_bucket(end)].to_vec();
            own.iter_mut().for_each(|target| target.row -= bucket.first_row as u32);
            let Some(above) = self.projected(local, bucket, Some(above), mode)?.filter(|_| !own.is_empty()) else {
                continue;
            };
            let share = own.len() as f64 / targets.len() as f64;
            let loss = LocalLoss {
                stage: self.stages[local].clone(),
                ids: bucket.ids.clone(),
                seq: bucket.len,
                mask: masks.map(|masks| masks[local].clone()),
                targets: own,
                out: [self.out_weight.clone(), self.out_bias.clone()],
                chunks,
                mode: mode.part(bucket.before),
            };
            let loss = loss.apply(&above)?;
            let loss = if share == 1.0 { loss } else { (loss * share)? };
            sum = Some(match sum {
                Some(sum) => (sum + loss)?,
                None => loss,
            });
        }
        sum.map_or_else(|| self.zero(), Ok)
    }

    /// The output of the stage above the local one, if there is one.
    fn run_above(&self, ids: &Ids, masks: Option<&[Tensor]>, mode: Mode) -> Result<Option<Tensor>> {
        let mut above: Option<Tensor> = None;
        for n in 0..self.stages.len() - 1 {
            above = Some(self.run_stage(n, ids, above.as_ref(), masks, mode)?);
        }
        Ok(above)
    }

    /// The output of stage `n`: of its buckets one after the other. `above`: the output of the stage above.
    pub(crate) fn run_stage(
        &self,
        n: usize,
        ids: &Ids,
        above: Option<&Tensor>,
        masks: Option<&[Tensor]>,
        mode: Mode,
    ) -> Result<Tensor> {
        match &ids.layout.stages[n][..] {
            [all] => self.run_bucket(n, all, above, masks, mode),
            buckets => self.run_packed(n, buckets, above, mode),
        }
    }

    /// The output of all buckets of stage `n`, `(1, rows, D_n)`.
    fn run_packed(&self, n: usize, buckets: &[Bucket], above: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let input = |bucket: &Bucket| -> Result<(Tensor, Group)> {
            let input = self.input(n, bucket, above, mode)?;
            let (batch, seq, dim) = input.dims3()?;
            Ok((input.reshape((1, batch * seq, dim))?, Group { batch, seq }))
        };
        let (inputs, groups): (Vec<Tensor>, Vec<Group>) =
            buckets.iter().map(input).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let input = Tensor::cat(&inputs, 1)?;
        let output = self.stages[n].run_packed(&input, &groups.into(), mode)?;
        self.same_shape(n, &input, output)
    }

    /// The output of sequences of stage `n`, `(sequences, [1 +] tokens, D_n)`.
    fn run_bucket(
        &self,
        n: usize,
        bucket: &Bucket,
        above: Option<&Tensor>,
        masks: Option<&[Tensor]>,
        mode: Mode,
    ) -> Result<Tensor> {
        let input = self.input(n, bucket, above, mode)?;
        let output = self.stages[n].run(&input, masks.map(|m| &m[n]), mode)?;
        self.same_shape(n, &input, output)
    }

    /// The input of sequences of stage `n`, `(sequences, [1 +] tokens, D_n)`.
    fn input(&self, n: usize, bucket: &Bucket, above: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (stage, seq) = (&self.stages[n], bucket.len);
        let tokens = stage.embedding.forward(&bucket.ids, mode)?;
        let tokens = tokens.reshape((tokens.dim(0)? / seq, seq, stage.dim))?;
        stage.input.forward(&tokens, self.projected(n, bucket, above, mode)?.as_ref(), mode)
    }

    /// Refuses an output of stage `n` that does not have the shape of its input.
    fn same_shape(&self, n: usize, input: &Tensor, output: Tensor) -> Result<Tensor> {
        match output.dims() == input.dims() {
            true => Ok(output),
            false => Err(Error::Block(format!(
                "the block of stage {} returned shape {:?} for {:?}",
                n + 1,
                output.dims(),
                input.dims()
            ))),
        }
    }

    /// The output `above` of the stage above, projected to the tokens of a bucket: `(sequences, tokens, D_n)`.
    fn projected(&self, n: usize, bucket: &Bucket, above: Option<&Tensor>, mode: Mode) -> Result<Option<Tensor>> {
        let next = n.checked_sub(1).and_then(|above| self.stages[above].next.as_ref());
        next.zip(above).map(|(next, above)| next.forward(above, &bucket.parents, bucket.len, mode)).transpose()
    }

    /// Rows of the output of a bucket of stage `n`.
    fn rows(&self, n: usize, bucket: &Bucket) -> usize {
        let starts = usize::from(self.stages[n].input.start.is_some());
        bucket.ids.len() / (bucket.len * self.patch_len(n)) * (starts + bucket.len)
    }

    /// See [`Mblm::measure_activations`](super::Mblm::measure_activations).
    pub(crate) fn measure_activations<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<f64>) {
        let (done, seen) = self.watch(What::Outputs, work);
        let rms = |(seen, _): &(Seen, _)| if seen.output.is_empty() { f64::NAN } else { seen.output.rms() };
        (done, seen.iter().map(rms).collect())
    }

    /// See [`Mblm::watch_stages`](super::Mblm::watch_stages).
    pub(crate) fn watch_stages<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<Seen>) {
        let (done, seen) = self.watch(What::Training, work);
        (done, seen.into_iter().map(|(seen, _)| seen).collect())
    }

    fn watch<R>(&self, what: What, work: impl FnOnce() -> R) -> (R, Vec<(Seen, Option<NotFinite>)>) {
        self.stages.iter().for_each(|stage| stage.watch.start(what));
        let done = work();
        (done, self.stages.iter().map(|stage| stage.watch.finish()).collect())
    }

    /// The error for `what` is not finite. Runs `pass`, which gave it, again to find the first stage whose output is not.
    pub(crate) fn not_finite(&self, what: &str, pass: impl FnOnce() -> Result<Tensor>) -> Error {
        let (again, found) = self.watch(What::Outputs, pass);
        if let Err(error) = again {
            return error;
        }
        let first = found.iter().enumerate().find_map(|(n, (_, found))| Some((n, (*found)?)));
        Error::NotFinite(match first {
            Some((n, NotFinite { value, sequence, position })) => format!(
                "{what}: the output of {} is {value} first, at sequence {sequence}, position {position}",
                self.stage_name(n)
            ),
            None => format!("{what}, while the outputs of all stages are finite: the output layer overflows"),
        })
    }

    /// What messages call stage `n`.
    pub(crate) fn stage_name(&self, n: usize) -> String {
        format!("stage {} ({})", n + 1, self.config.blocks[n].typetag_name())
    }

    /// Bytes of one token of stage `n` (from 0).
    pub(crate) fn patch_len(&self, n: usize) -> usize {
        self.config.seq_lens[n + 1..].iter().product()
    }

    /// The loss of no targets.
    pub(crate) fn zero(&self) -> Result<Tensor> {
        Ok(Tensor::zeros((), self.params.place().dtype, &self.params.place().device)?)
    }

    /// The output layer.
    pub(crate) fn logits(&self, hidden: &Tensor, mode: Mode) -> Result<Tensor> {
        let weight = param_like(&self.out_weight, hidden, mode)?;
        linear_composed(&hidden.contiguous()?, &weight, Some(&param_like(&self.out_bias, hidden, mode)?))
    }
}

/// Names stage `n` (from 0) in an error about sizes.
fn at_stage<T>(n: usize, built: Result<T>) -> Result<T> {
    built.map_err(|error| match error {
        Error::Input(message) => Error::Input(format!("stage {}: {message}", n + 1)),
        other => other,
    })
}
