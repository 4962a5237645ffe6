//! Weights of elsewhere as the first checkpoint of a run of their own, which is then like any other: it can be
//! generated from, evaluated, and trained further.

use std::path::{Path, PathBuf};

use mblm_core::param::Part;
use mblm_core::{Param, ParamStore};
use mblm_data::batches::Cursor;
use mblm_pth::{self as pth, Saved};

use crate::checkpoint::{Snapshot, Tensors, TrainState, Which, find};
use crate::config::{ResumeSection, RunConfig};
use crate::error::{Error, Result};
use crate::journal::folder::RunFolder;
use crate::model::{Model, TrainModel};
use crate::trainer::Trainer;
use crate::trainer::optimizer::Optimizer;

/// A buffer of the file may differ by this much, in relation, from the one that the configuration gives: files may be
/// of bfloat16, which is good for 1/256.
const BUFFER_TOLERANCE: f32 = 0.01;

/// How to import.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportOptions<'a> {
    /// The run's folder, which must not exist; else one is made as for training.
    pub place: Option<&'a Path>,
    /// Take tables for fewer tokens than the model has, as the package's `migrate_embeddings` does; the rows of the
    /// other tokens keep their initial values.
    pub migrate_embeddings: bool,
    /// Where the weights come from, for the log.
    pub source: &'a str,
}

/// Makes a run of `saved` and returns its checkpoint. The data of `config` need not exist.
///
/// # Errors
/// The tensors are not those of the model (all that differ are listed), or the run's folder cannot be made.
pub fn import(config: &RunConfig, config_yaml: &str, saved: Saved, options: &ImportOptions) -> Result<PathBuf> {
    let loss = saved.loss;
    let model = Model::new(config, config.train.seed)?;
    let store = model.params();
    load(&model, saved, options.migrate_embeddings)?;
    let state = start(config, loss);
    let optimizer = Optimizer::new(store, config.train.optimizer());
    let first = Snapshot { store, optimizer: &optimizer, state: &state, config_yaml };
    let run = match options.place {
        Some(place) => RunFolder::create_at(place, first)?,
        None => RunFolder::create(&config.io.output_dir, &config.io.name_model, first)?,
    };
    run.note(&format!("imported {} ({})", options.source, shown_loss(loss)));
    Ok(run.checkpoints().newest()?.path().into())
}

/// A loss in words; it may not be known.
pub fn shown_loss(loss: f64) -> String {
    if loss.is_finite() { format!("loss {loss:.4}") } else { "loss not known".into() }
}

/// Puts weights of elsewhere into a model.
///
/// # Errors
/// They are not those of the model; all that differ are listed. Or one is not finite.
pub fn load(model: &dyn TrainModel, saved: Saved, migrate_embeddings: bool) -> Result<()> {
    let Saved { mut weights, others, .. } = saved;
    let store = model.params();
    if let Some((name, what)) = others.iter().find(|(name, _)| store.get(name).is_some()) {
        let message = format!("{name}: expected a tensor of floats, but it {what}");
        return Err(mblm_core::Error::Weights(message).into());
    }
    if migrate_embeddings {
        store.iter().for_each(|param| extend(&mut weights, param));
    }
    let buffers = take_buffers(&mut weights, model);
    store.load(&weights).map_err(|error| match error {
        mblm_core::Error::Weights(message) => mblm_core::Error::Weights(message + &other_blocks(&weights, store)),
        other => other,
    })?;
    buffers?;
    check_finite(store)
}

/// What to change in the configuration, if stages of the file are of another kind than those of the model.
fn other_blocks(weights: &Tensors, store: &ParamStore) -> String {
    let expected = pth::block_types(store.iter().map(|param| param.name()));
    let found = pth::block_types(weights.keys().map(String::as_str));
    let differs = |(stage, block_type): (&usize, &&str)| {
        expected.get(stage).filter(|expected| *expected != block_type).map(|expected| {
            format!(
                "; stage {} of the file is {block_type}, but that of the configuration is {expected}: write \
                 `block_type: {block_type}` for that stage",
                stage + 1
            )
        })
    };
    found.iter().filter_map(differs).collect()
}

/// Gives a new run the beginning that its configuration asks for: a run's weights and moments, or the weights of a `.pth`
/// file, and a place in the data. Returns what the user should be warned of.
pub(crate) fn begin(trainer: &mut Trainer, model: &dyn TrainModel, resume: &ResumeSection) -> Result<Vec<String>> {
    let path = &resume.checkpoint_file;
    if !path.exists() {
        return Err(Error::Config(format!(
            "resume.checkpoint_file: {} does not exist; expected a run, a checkpoint or a .pth file (a run keeps its \
             io.num_models_to_save best checkpoints)",
            path.display()
        )));
    }
    let mut warnings = Vec::new();
    let loss = if path.is_file() {
        let saved = pth::read(path)?;
        let loss = Some(saved.loss).filter(|loss| loss.is_finite());
        load(model, saved, resume.migrate_embeddings)?;
        loss
    } else {
        let checkpoint = find(path, Which::Newest)?;
        let state = checkpoint.state()?;
        let changes = state.plugin_changes(&trainer.state().plugins).into_iter();
        warnings.extend(changes.map(|change| format!("{}: {change}", path.display())));
        let loss = state.valid_loss;
        match resume.migrate_embeddings {
            true => load(model, Saved { weights: checkpoint.weights()?, ..Saved::default() }, true)?,
            false => trainer.take_over(&checkpoint)?,
        }
        loss
    };
    trainer.begin_at(Cursor { epoch: resume.next_epoch_index, batch: resume.next_batch_index }, loss)?;
    Ok(warnings)
}

/// A run that has seen nothing yet: its data may be any.
fn start(config: &RunConfig, loss: f64) -> TrainState {
    let valid_loss = Some(loss).filter(|loss| loss.is_finite());
    let best_valid_loss = valid_loss;
    TrainState { valid_loss, best_valid_loss, ..TrainState::new(config.train.seed, config.plugins()) }
}

/// Takes the vectors that follow from the configuration out of `weights`, and holds them against it: other rotary
/// frequencies would be another model.
fn take_buffers(weights: &mut Tensors, model: &dyn TrainModel) -> Result<()> {
    let mut differing = Vec::new();
    for (name, want) in model.buffers() {
        let Some((_, found)) = weights.remove(&name) else { continue };
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= BUFFER_TOLERANCE * b.abs();
        if found.len() != want.len() || !found.iter().zip(&want).all(close) {
            differing.push(format!("{name}: expected {want:?}, found {found:?}"));
        }
    }
    if differing.is_empty() {
        return Ok(());
    }
    let message = format!("the weights do not fit the configuration: {}", differing.join("; "));
    Err(mblm_core::Error::Weights(message).into())
}

/// Gives a table of embeddings, or the output layer, the rows of `initial` that it lacks.
fn extend(weights: &mut Tensors, param: &Param) {
    let has_row_per_token = param.zero_row().is_some() || param.part() == Some(Part::Head);
    let (shape, initial) = (param.shape(), param.values());
    let Some((found, values)) = weights.get_mut(param.name()).filter(|_| has_row_per_token) else { return };
    if found.len() == shape.len() && found[0] < shape[0] && found[1..] == shape[1..] {
        values.extend(&initial[values.len()..]);
        *found = shape.to_vec();
    }
}

fn check_finite(store: &ParamStore) -> Result<()> {
    match store.iter().find(|param| param.values().iter().any(|value| !value.is_finite())) {
        Some(param) => {
            let message = format!("{} has a value that is infinite or not a number", param.name());
            Err(Error::Core(mblm_core::Error::Weights(message)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mblm_core::model::Sequences;
    use mblm_core::{Init, Mode};

    use super::*;
    use crate::model::Loss;

    struct Untrained(ParamStore);

    impl TrainModel for Untrained {
        fn params(&self) -> &ParamStore {
            &self.0
        }

        fn loss(&self, _: &Sequences, _: Mode) -> mblm_core::Result<Loss> {
            Err(mblm_core::Error::Input("only loaded".into()))
        }
    }

    fn model(name: &str) -> Untrained {
        let mut store = ParamStore::new(0);
        store.root().param(name, &[2], Init::Const(0.0)).unwrap();
        Untrained(store)
    }

    fn saved(name: &str) -> Saved {
        Saved { weights: Tensors::from([(name.into(), (vec![2], vec![1.0, 2.0]))]), ..Saved::default() }
    }

    #[test]
    fn a_tensor_that_is_needed_must_be_of_floats() {
        let others =
            |name: &str| BTreeMap::from([(name.to_string(), "is sparse; save it with .to_dense()".to_string())]);
        let ignored = Saved { others: others("steps"), ..saved("w") };
        load(&model("w"), ignored, false).unwrap();
        let error =
            load(&model("w"), Saved { others: others("w"), ..Saved::default() }, false).unwrap_err().to_string();
        assert_eq!(error, "w: expected a tensor of floats, but it is sparse; save it with .to_dense()");
    }

    #[test]
    fn a_mamba_of_the_other_kind_is_named() {
        let [one, two] = ["x_proj.weight", "dt_bias"].map(|name| format!("stage_models.1.layers.0.mixer.{name}"));
        for (file, config, (found, expected)) in
            [(&one, &two, ("mamba1", "mamba2")), (&two, &one, ("mamba2", "mamba1"))]
        {
            let error = load(&model(config), saved(file), false).unwrap_err().to_string();
            let want = format!(
                "stage 2 of the file is {found}, but that of the configuration is {expected}: write `block_type: {found}` \
                 for that stage"
            );
            assert!(error.ends_with(&want), "{error}");
            load(&model(file), saved(file), false).unwrap();
        }
    }

    #[test]
    fn missing_rows_keep_their_initial_values() {
        let mut store = ParamStore::new(0);
        store.root().sub("table").of(Part::Embedding(1)).embedding(3, 2, Some(0)).unwrap();
        store.root().of(Part::Head).param("out", &[3, 2], Init::Const(9.0)).unwrap();
        store.root().of(Part::Head).param("small", &[1, 2], Init::Const(9.0)).unwrap();
        store.root().of(Part::Stage(0)).param("other", &[3, 2], Init::Const(9.0)).unwrap();
        let tensor = |name: &str| (name.to_string(), (vec![2, 2], vec![1.0, 2.0, 3.0, 4.0]));
        let mut weights = Tensors::from(["table.weight", "out", "small", "other"].map(tensor));
        store.iter().for_each(|param| extend(&mut weights, param));
        assert_eq!(weights["out"], (vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 9.0, 9.0]));
        let initial = store.get("table.weight").unwrap().values().to_vec();
        assert_eq!(weights["table.weight"], (vec![3, 2], [&[1.0, 2.0, 3.0, 4.0], &initial[4..]].concat()));
        assert_eq!(weights["other"].0, [2, 2], "only tables of tokens grow");
        assert_eq!(weights["small"].0, [2, 2], "nothing shrinks");
    }
}
