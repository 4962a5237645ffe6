//! The state of a run: the file `state.json` of a checkpoint.

use std::path::PathBuf;

use mblm_core::block::PluginOrigin;
use mblm_data::batches::Cursor;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::config::{TargetStrategy, TrainSection};
use crate::error::{Error, Result};
use crate::trainer::schedule::Schedule;

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Gradient steps taken.
    pub step: u64,
    /// Steps behind the optimizer's moments: those of this run, and those of the run they were taken over from.
    pub optimizer_step: u64,
    /// Batches seen.
    pub batches: u64,
    /// How many batches of the data lie before the run's first, which the logs count too.
    #[serde(default)]
    pub first_batch: u64,
    /// What the run began with: another run, a checkpoint or a `.pth` file.
    #[serde(default, serialize_with = "shown")]
    pub resumed_from: Option<PathBuf>,
    /// The gradients that wait for the next step.
    #[serde(flatten)]
    pub window: Window,
    /// The batch that comes next.
    pub next: Cursor,
    /// Batches of the epoch that it is in. Not known before data were read, nor of checkpoints of earlier versions.
    #[serde(default)]
    pub epoch_batches: Option<u64>,
    /// Elements seen, as `target_elements_strategy` counts them: sequences or bytes.
    pub elements_seen: u64,
    /// Sequences seen.
    pub sequences_seen: u64,
    /// Bytes seen.
    pub bytes_seen: u64,
    /// The learning rates that the run follows; none before it was trained.
    #[serde(default)]
    pub schedule: Option<Schedule>,
    /// Mean bytes of a training sequence, if patches follow the content: a sequence counts for as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence_bytes: Option<usize>,
    /// The seed of order and dropout.
    pub seed: u64,
    /// Threads that computed: another number rounds sums otherwise. Not known of checkpoints of earlier versions.
    #[serde(default)]
    pub threads: Option<usize>,
    /// The processes that trained, each on batches of its own: `batches` and `next` count those of one process.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub processes: usize,
    /// The instruction set that computed, for the same reason.
    #[serde(default)]
    pub instructions: Option<String>,
    /// What messages call the device that trained; none in checkpoints of before there were several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The version of the program.
    #[serde(default)]
    pub version: Option<String>,
    /// The fingerprint of the data; empty where no data were read yet.
    pub data: String,
    /// The validation loss of these weights; none if they were saved when the run was interrupted.
    pub valid_loss: Option<f64>,
    /// The lowest validation loss of the run so far.
    pub best_valid_loss: Option<f64>,
    /// Validations since the one with the lowest loss.
    #[serde(default)]
    pub stale_validations: u64,
    /// The mean gradient of the last step before and after clipping, -1 before the first step.
    pub avg_grad: (f64, f64),
    /// The plugins that trained it.
    #[serde(default)]
    pub plugins: Vec<PluginOrigin>,
}

fn one() -> usize {
    1
}

fn is_one(number: &usize) -> bool {
    *number == 1
}

/// Serializes a path for readers. A path that is not UTF-8 must not prevent a run from being saved.
fn shown<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.to_string_lossy()).serialize(serializer)
}

/// Gradients of batches that wait for a step. A batch of weight `w` (the number of its elements that count) is added
/// `w / unit` times, so the gradient of the mean over all elements is `unit / weight` times the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Batches in the sum.
    #[serde(rename = "accumulated")]
    pub batches: u64,
    /// What they weigh together.
    #[serde(rename = "accumulated_weight")]
    pub weight: f64,
    /// The weight of a batch whose gradient is added once: that of the first that counts, which is thus not rounded.
    #[serde(rename = "accumulated_unit")]
    pub unit: f64,
}

impl Window {
    /// Takes a batch in; returns how many times its gradient is to be added.
    pub fn add(&mut self, weight: f64) -> f64 {
        self.batches += 1;
        if weight == 0.0 {
            return 0.0;
        }
        if self.weight == 0.0 {
            self.unit = weight;
        }
        self.weight += weight;
        weight / self.unit
    }

    /// What the sum of gradients is multiplied by to be its part of the mean over batches that weigh `all`, those of other
    /// processes among them.
    pub fn scale(&self, all: f64) -> f64 {
        self.unit / all
    }
}

impl TrainState {
    /// The state of a run that has seen nothing.
    pub(crate) fn new(seed: u64, plugins: Vec<PluginOrigin>) -> Self {
        TrainState {
            step: 0,
            optimizer_step: 0,
            batches: 0,
            first_batch: 0,
            resumed_from: None,
            window: Window::default(),
            next: Cursor::default(),
            epoch_batches: None,
            elements_seen: 0,
            sequences_seen: 0,
            bytes_seen: 0,
            schedule: None,
            sequence_bytes: None,
            seed,
            threads: None,
            processes: 1,
            instructions: None,
            device: None,
            version: None,
            data: String::new(),
            valid_loss: None,
            best_valid_loss: None,
            stale_validations: 0,
            avg_grad: (-1.0, -1.0),
            plugins,
        }
    }

    /// Reads `state.json`. What earlier versions did not write follows from the configuration in the same checkpoint, which
    /// has `sizes`.
    ///
    /// # Errors
    /// It is no state, or one that contradicts itself or the configuration; names the field.
    pub(super) fn parse(text: &[u8], sizes: &Sizes) -> std::result::Result<Self, String> {
        let not_a_state = |error: serde_json::Error| format!("not a run's state: {error}");
        let mut fields: Map<String, Value> = serde_json::from_slice(text).map_err(not_a_state)?;
        if ["bytes_seen", "sequences_seen", "accumulated_weight"].iter().any(|name| !fields.contains_key(*name)) {
            complete(&mut fields, sizes);
        }
        if let (None, Some(step)) = (fields.get("optimizer_step"), fields.get("step").cloned()) {
            fields.insert("optimizer_step".into(), step);
        }
        let state: TrainState = serde_json::from_value(Value::Object(fields)).map_err(not_a_state)?;
        match state.check(sizes) {
            Ok(()) => Ok(state),
            Err(what) => Err(format!("{what}: the state contradicts itself")),
        }
    }

    /// Refuses numbers that no run can come to that is configured with `sizes`.
    fn check(&self, sizes: &Sizes) -> std::result::Result<(), String> {
        let at_most = |name: &str, found: u64, limit: &str, most: u64| match found <= most {
            true => Ok(()),
            false => Err(format!("{name} is {found}, more than {limit}, {most}")),
        };
        // Sums of them are made, and logs hold them as signed numbers.
        let largest = u64::MAX / 4;
        if self.processes == 0 {
            return Err("processes is 0".into());
        }
        at_most("first_batch", self.first_batch, "any run can see", largest)?;
        at_most("bytes_seen", self.bytes_seen, "any run can see", largest)?;
        at_most("optimizer_step", self.optimizer_step, "any run can take", largest)?;
        at_most("stale_validations", self.stale_validations, "any run can make", largest)?;
        at_most("step", self.step, "optimizer_step", self.optimizer_step)?;
        at_most("batches", self.batches, "sequences_seen", self.sequences_seen)?;
        at_most("sequences_seen", self.sequences_seen, "bytes_seen", self.bytes_seen)?;
        if ![self.sequences_seen, self.bytes_seen].contains(&self.elements_seen) {
            let (found, sequences, bytes) = (self.elements_seen, self.sequences_seen, self.bytes_seen);
            return Err(format!(
                "elements_seen is {found}, neither sequences_seen, {sequences}, nor bytes_seen, {bytes}"
            ));
        }
        self.check_window()?;
        self.check_next()?;
        if self.seed != sizes.train.seed {
            return Err(format!("seed is {}, but train.seed is {}", self.seed, sizes.train.seed));
        }
        let Some(schedule) = &self.schedule else { return Ok(()) };
        let steps =
            self.step + self.left(&sizes.train, self.sequence_bytes.unwrap_or(sizes.seq_len()), self.processes).1;
        schedule.check(sizes.train.learning_rate, self.step, steps).map_err(|what| format!("schedule.{what}"))
    }

    /// Every batch waits for a step or was stepped on.
    fn check_window(&self) -> std::result::Result<(), String> {
        let Window { batches: waiting, weight, unit } = self.window;
        let Some(stepped) = self.batches.checked_sub(waiting) else {
            return Err(format!("accumulated is {waiting}, more than batches, {}", self.batches));
        };
        if self.step > stepped || (self.step == 0 && stepped > 0) {
            let (step, batches) = (self.step, self.batches);
            return Err(format!(
                "step is {step}, but {batches} batches were seen, of which {waiting} wait (accumulated)"
            ));
        }
        // What waits weighs nothing if it is padding alone.
        let is_weight = |number: f64| number > 0.0 && number.is_finite();
        match (weight, unit) {
            (0.0, 0.0) => Ok(()),
            _ if waiting > 0 && is_weight(weight) && is_weight(unit) => Ok(()),
            _ => Err(format!(
                "accumulated_weight is {weight} and accumulated_unit is {unit}, for {waiting} batches (accumulated)"
            )),
        }
    }

    fn check_next(&self) -> std::result::Result<(), String> {
        let Cursor { epoch, batch } = self.next;
        if let Some(batches) = self.epoch_batches.filter(|batches| batch >= *batches) {
            return Err(format!("next.batch is {batch}, but the epoch has {batches} batches (epoch_batches)"));
        }
        // Epochs of few bytes may have no batch: they begin one byte later each, up to a sequence's length.
        let seq_len = self.bytes_seen.checked_div(self.sequences_seen);
        let before = seq_len.map_or(u64::MAX, |seq_len| self.first_batch.saturating_mul(seq_len));
        let most = if self.first_batch == 0 { self.bytes_seen } else { before.saturating_add(self.bytes_seen) };
        match epoch <= most {
            true => Ok(()),
            false => Err(format!("next.epoch is {epoch}, further than {} batches can have come", self.cum_batch())),
        }
    }

    /// Batches that are left to each of `processes` until the target of `train` is reached in sequences of `seq_len` bytes,
    /// and gradient steps.
    pub(crate) fn left(&self, train: &TrainSection, seq_len: usize, processes: usize) -> (u64, u64) {
        let missing = train.target_elements.saturating_sub(self.elements_seen_by(train.target_elements_strategy));
        let batches = train.batches_of(missing, seq_len, processes);
        let (waiting, accumulate) = (self.window.batches, (train.gradient_accumulate_every as u64).max(1));
        // A window that is full already, of a run that accumulated more batches before, is stepped on at once.
        let steps = match waiting >= accumulate {
            true => 1 + batches.div_ceil(accumulate),
            false => (waiting + batches).div_ceil(accumulate),
        };
        (batches, steps)
    }

    /// The number that the next batch has in the logs: they count the batches before a chained run's first too.
    pub fn cum_batch(&self) -> u64 {
        self.first_batch + self.batches
    }

    /// Counts a batch of `sequences` of `seq_len` bytes.
    pub(crate) fn count(&mut self, sequences: u64, seq_len: u64, strategy: TargetStrategy) {
        self.batches += 1;
        self.sequences_seen += sequences;
        self.bytes_seen += sequences * seq_len;
        self.elements_seen = self.elements_seen_by(strategy);
    }

    /// Elements seen, counted by `strategy`.
    pub(crate) fn elements_seen_by(&self, strategy: TargetStrategy) -> u64 {
        match strategy {
            TargetStrategy::Batch => self.sequences_seen,
            TargetStrategy::Sequence => self.bytes_seen,
        }
    }

    /// Compares the plugins that were found with those that trained: the same files, wherever they lie.
    ///
    /// # Errors
    /// Names the first that is missing or another one.
    pub fn check_plugins(&self, found: &[PluginOrigin]) -> Result<()> {
        let Some(missing) = self.missing_plugins(found).next() else { return Ok(()) };
        let other = found.iter().find(|plugin| plugin.name == missing.name).map_or("none".into(), shown_plugin);
        Err(Error::Config(format!(
            "plugin {}: expected the file that trained, {}; found {other}: restore the old one, or accept the change \
             with --allow-plugin-change",
            missing.name,
            shown_plugin(missing)
        )))
    }

    /// The plugins that another run uses other builds of, in words.
    pub(crate) fn plugin_changes(&self, found: &[PluginOrigin]) -> Vec<String> {
        let change = |missing: &PluginOrigin| {
            let other = found.iter().find(|plugin| plugin.name == missing.name)?;
            let (saved, other) = (shown_plugin(missing), shown_plugin(other));
            Some(format!("these weights were trained with another build of a plugin: {saved}; now {other} is used"))
        };
        self.missing_plugins(found).filter_map(change).collect()
    }

    fn missing_plugins(&self, found: &[PluginOrigin]) -> impl Iterator<Item = &PluginOrigin> {
        self.plugins.iter().filter(move |saved| !found.iter().any(|plugin| plugin.is_file_of(saved)))
    }
}

fn shown_plugin(plugin: &PluginOrigin) -> String {
    format!("{} {} ({}, sha256 {})", plugin.name, plugin.version, plugin.path.display(), plugin.short_sum())
}

/// What a configuration says of batches; the part of it that can be read without the blocks it names.
#[derive(Clone, Debug, Deserialize)]
pub struct Sizes {
    /// Section `train`.
    pub train: TrainSection,
    params: InputLength,
}

#[derive(Clone, Debug, Deserialize)]
struct InputLength {
    input_seq_len: usize,
    /// Absent where all patches are full.
    #[serde(default)]
    patching: serde_yaml::Value,
}

impl Sizes {
    /// The rules of patching; null where all patches are full.
    pub(crate) fn patching(&self) -> &serde_yaml::Value {
        &self.params.patching
    }

    /// Bytes of one training sequence.
    pub fn seq_len(&self) -> usize {
        self.params.input_seq_len
    }
}

/// Adds what earlier versions did not write. Their batches were all of one size, and a batch's gradient was divided by
/// the number of batches in a window when it was added.
fn complete(fields: &mut Map<String, Value>, sizes: &Sizes) {
    let number = |fields: &Map<String, Value>, name: &str| fields.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (batches, accumulated) = (number(fields, "batches"), number(fields, "accumulated"));
    let sequences = batches.saturating_mul(sizes.train.batch_size as u64);
    let batch = (sizes.train.batch_size * sizes.seq_len()) as f64;
    let unit = if accumulated > 0 { batch * sizes.train.gradient_accumulate_every as f64 } else { 0.0 };
    for (name, value) in [
        ("sequences_seen", Value::from(sequences)),
        ("bytes_seen", Value::from(sequences.saturating_mul(sizes.seq_len() as u64))),
        ("accumulated_weight", Value::from(batch * accumulated as f64)),
        ("accumulated_unit", Value::from(unit)),
    ] {
        fields.entry(name).or_insert(value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{config_yaml, state};
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_name_that_is_not_utf_8_does_not_keep_a_run_from_being_saved() {
        let name = std::os::unix::ffi::OsStrExt::from_bytes(b"r\xff/b");
        let mut state = state(7, None);
        state.resumed_from = Some(std::path::Path::new::<std::ffi::OsStr>(name).into());
        state.plugins[0].path = state.resumed_from.clone().unwrap_or_default();
        let saved = serde_json::to_value(&state).unwrap();
        assert_eq!(
            (&saved["resumed_from"], &saved["plugins"][0]["path"]),
            (&"r\u{FFFD}/b".into(), &"r\u{FFFD}/b".into())
        );
    }

    fn parse(change: impl FnOnce(&mut Map<String, Value>)) -> std::result::Result<TrainState, String> {
        let Value::Object(mut fields) = serde_json::to_value(state(7, None)).unwrap() else { panic!("an object") };
        change(&mut fields);
        let sizes = serde_yaml::from_str(&config_yaml()).unwrap();
        TrainState::parse(&serde_json::to_vec(&fields).unwrap(), &sizes)
    }

    #[test]
    fn a_state_comes_back() {
        assert_eq!(parse(|_| {}).unwrap(), state(7, None));
    }

    #[test]
    fn what_an_earlier_version_did_not_write_follows_from_its_configuration() {
        let found = parse(|fields| {
            for name in ["optimizer_step", "sequences_seen", "bytes_seen", "accumulated_weight", "accumulated_unit"] {
                fields.remove(name).unwrap();
            }
            fields["elements_seen"] = (7 * 64).into();
        });
        let found = found.unwrap();
        // Batches of 4 sequences of 16 bytes, three of them a window.
        assert_eq!((found.sequences_seen, found.bytes_seen, found.optimizer_step), (28, 448, 3));
        assert_eq!(found.window, Window { batches: 1, weight: 64.0, unit: 192.0 });
        let mut window = found.window;
        let added = window.add(64.0);
        assert_eq!(
            (added, window.add(64.0), window.scale(window.weight)),
            (1.0 / 3.0, 1.0 / 3.0, 1.0),
            "as that version did"
        );
    }

    #[test]
    fn what_a_run_can_come_to_is_accepted() {
        type Change = fn(&mut Map<String, Value>);
        let changes: [Change; 3] = [
            // Batches of padding alone wait.
            |f| ["accumulated_weight", "accumulated_unit"].iter().for_each(|name| f[*name] = 0.0.into()),
            // Little data, of which few epochs have a batch.
            |f| f["next"] = serde_json::json!({"epoch": 7 * 16, "batch": 0}),
            // An earlier version.
            |f| drop((f.remove("epoch_batches"), f.remove("schedule"))),
        ];
        changes.iter().for_each(|change| drop(parse(change).unwrap()));
    }

    #[test]
    fn a_state_that_contradicts_itself_names_the_field() {
        type Change = fn(&mut Map<String, Value>);
        let cases: [(Change, &str); 25] = [
            (|f| f["step"] = 6.into(), "step is 6, more than optimizer_step, 5"),
            (|f| f["optimizer_step"] = 2.into(), "step is 3, more than optimizer_step, 2"),
            (|f| f["accumulated"] = 9.into(), "accumulated is 9, more than batches, 7"),
            (|f| f["accumulated"] = 7.into(), "step is 3, but 7 batches were seen, of which 7 wait"),
            (|f| f["accumulated"] = 5.into(), "step is 3, but 7 batches were seen, of which 5 wait"),
            (|f| f["step"] = 0.into(), "step is 0, but 7 batches were seen, of which 1 wait"),
            (|f| f["elements_seen"] = 1.into(), "elements_seen is 1, neither sequences_seen, 28, nor bytes_seen, 448"),
            (|f| f["accumulated"] = 0.into(), "accumulated_weight is 64 and accumulated_unit is 64, for 0 batches"),
            (|f| f["accumulated_weight"] = (-1.0).into(), "accumulated_weight is -1"),
            (
                |f| f["accumulated_weight"] = 0.0.into(),
                "accumulated_weight is 0 and accumulated_unit is 64, for 1 batches",
            ),
            (
                |f| f["accumulated_unit"] = 0.0.into(),
                "accumulated_weight is 64 and accumulated_unit is 0, for 1 batches",
            ),
            (|f| f["sequences_seen"] = 6.into(), "batches is 7, more than sequences_seen, 6"),
            (|f| f["step"] = "three".into(), "not a run's state: invalid type: string \"three\""),
            (|f| drop(f.remove("seed")), "missing field `seed`"),
            (|f| f["seed"] = 5.into(), "seed is 5, but train.seed is 11"),
            (
                |f| f["stale_validations"] = u64::MAX.into(),
                "stale_validations is 18446744073709551615, more than any run",
            ),
            (|f| f["next"]["batch"] = 9.into(), "next.batch is 9, but the epoch has 9 batches (epoch_batches)"),
            (|f| f["epoch_batches"] = 0.into(), "next.batch is 2, but the epoch has 0 batches"),
            (|f| f["next"]["epoch"] = 9999.into(), "next.epoch is 9999, further than 14 batches can have come"),
            (|f| f["schedule"]["peak"] = 1e308.into(), "schedule.peak is 1e308, but train.learning_rate is 0.1"),
            (|f| f["schedule"]["top"] = 2.into(), "schedule.top is 2, not a share"),
            (|f| f["schedule"]["start"] = (-1).into(), "schedule.start is -1, not a share"),
            (|f| f["schedule"]["first_step"] = 4.into(), "schedule.first_step is 4, after step 3"),
            (|f| f["schedule"]["decay_steps"] = 0.into(), "decay_steps are 0, 1, 0 and 0, 1 in all, but the run has 8"),
            (|f| f["schedule"]["warmup_steps"] = u64::MAX.into(), "too many in all"),
        ];
        for (change, want) in cases {
            let error = parse(change).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}
