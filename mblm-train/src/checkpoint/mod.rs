//! A checkpoint: everything that a run needs to resume, in a folder that is either complete or absent.
//!
//! | file | holds |
//! |---|---|
//! | `weights.safetensors` | the parameters |
//! | `optimizer.safetensors` | `m.X` for each parameter X, and `v.X` unless Muon updates it; `grad.X` too while gradients accumulate |
//! | `state.json` | [`TrainState`] |
//! | `config.yaml` | the run's configuration |
//! | `manifest.json` | size and SHA-256 of each file |
//!
//! Checkpoints are written atomically: under a temporary name, with every file synced and read back. Then the folder is
//! renamed and its parent synced.

mod export;
mod shelf;
mod state;
mod sum;
mod survey;
mod tensors;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use mblm_base::files;
use mblm_base::memory::Memory;
use mblm_core::ParamStore;
pub use mblm_pth::Tensors;
use serde::{Deserialize, Serialize};

pub use self::export::{export_pth, export_safetensors};
pub(crate) use self::shelf::{FOLDER, PREFIX};
pub use self::shelf::{Shelf, Which, find};
pub use self::state::{Sizes, TrainState, Window};
use self::sum::FileSum;
pub use self::survey::{Entry, check, shelf_of};
use self::tensors::Named;
use crate::error::{AtPath, Error, Result};
use crate::trainer::optimizer::{Moments, Optimizer};

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const CONFIG: &str = "config.yaml";
const MANIFEST: &str = "manifest.json";
const FILES: [&str; 4] = [WEIGHTS, OPTIMIZER, STATE, CONFIG];

/// The version of this layout.
const FORMAT: u32 = 1;

/// What a checkpoint is made from.
#[derive(Clone, Copy)]
pub struct Snapshot<'a> {
    /// The parameters and their gradients.
    pub store: &'a ParamStore,
    /// The optimizer.
    pub optimizer: &'a Optimizer,
    /// Where the run stands.
    pub state: &'a TrainState,
    /// The run's configuration.
    pub config_yaml: &'a str,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, FileSum>,
}

impl Snapshot<'_> {
    /// Writes the checkpoint's folder, which must not exist yet. Whoever calls renames it into place.
    fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir(folder).at(folder)?;
        let state = serde_json::to_vec_pretty(self.state).map_err(std::io::Error::from).at(folder)?;
        let mut files = BTreeMap::new();
        let mut add = |name: &str, write: &dyn Fn(&mut dyn Write) -> std::io::Result<()>| -> Result<()> {
            let path = folder.join(name);
            files.insert(name.to_string(), FileSum::of_new_file(&path, write).at(&path)?);
            Ok(())
        };
        add(WEIGHTS, &|file| self.write_weights(file))?;
        add(OPTIMIZER, &|file| self.write_optimizer(file))?;
        add(STATE, &|file| file.write_all(&state))?;
        add(CONFIG, &|file| file.write_all(self.config_yaml.as_bytes()))?;
        let path = folder.join(MANIFEST);
        let manifest = serde_json::to_vec_pretty(&Manifest { format: FORMAT, files });
        let manifest = manifest.map_err(std::io::Error::from).at(&path)?;
        FileSum::of_new_file(&path, |file| file.write_all(&manifest)).at(&path)?;
        files::sync_folder(folder).at(folder)
    }

    fn write_weights(&self, file: &mut dyn Write) -> std::io::Result<()> {
        let weights = self.store.iter().map(|p| (p.name().into(), Named { shape: p.shape(), values: p.values() }));
        tensors::write(file, weights.collect())
    }

    fn write_optimizer(&self, file: &mut dyn Write) -> std::io::Result<()> {
        let grads: Vec<_> = self.store.iter().map(|param| param.grad()).collect();
        let moments = self.optimizer.moments(self.store).map_err(std::io::Error::other)?;
        let mut tensors = Vec::new();
        for ((param, moments), grad) in self.store.iter().zip(&moments).zip(&grads) {
            let Moments { m, v } = &**moments;
            let mut add = |kind: &str, values| {
                tensors.push((format!("{kind}.{}", param.name()), Named { shape: param.shape(), values }));
            };
            add("m", &m[..]);
            if let Some(v) = v {
                add("v", &v[..]);
            }
            if self.state.window.weight > 0.0 && !grad.is_empty() {
                add("grad", &grad[..]);
            }
        }
        tensors::write(file, tensors)
    }
}

/// A checkpoint on disk whose files have the sizes in the manifest. Everything that is read from it is verified by
/// SHA-256.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: BTreeMap<String, FileSum>,
}

impl Checkpoint {
    /// Opens the folder of a checkpoint.
    ///
    /// # Errors
    /// A file is missing or has another size than the manifest says; names the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        let text = files::read(&file, files::SMALL).at(&file)?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| Error::checkpoint(&file, format!("not a checkpoint's manifest: {error}")))?;
        if manifest.format != FORMAT {
            let message = format!("format {}, expected {FORMAT}: written by another version", manifest.format);
            return Err(Error::checkpoint(&file, message));
        }
        for name in FILES {
            let file = path.join(name);
            let expected = manifest.files.get(name).ok_or_else(|| {
                Error::checkpoint(&path.join(MANIFEST), format!("does not list {name}: the manifest is damaged"))
            })?;
            let found = files::size(&file)
                .map_err(|error| Error::checkpoint(&file, format!("listed in {MANIFEST}, but {error}")))?;
            if found != expected.bytes {
                let message = format!("{found} bytes, {MANIFEST} says {}: the file is damaged", expected.bytes);
                return Err(Error::checkpoint(&file, message));
            }
        }
        Ok(Checkpoint { path: path.into(), manifest: manifest.files })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        FILES.iter().map(|&name| self.manifest[name].bytes).sum()
    }

    /// The SHA-256 of the file of the weights, in hexadecimal digits.
    pub(crate) fn weights_sum(&self) -> &str {
        &self.manifest[WEIGHTS].sha256
    }

    /// Checks the sum of every file.
    pub fn verify(&self) -> Result<()> {
        if let Some(name) = self.manifest.keys().find(|name| !FILES.contains(&name.as_str())) {
            let message = format!("lists {name:?}, which is not a file of a checkpoint: the manifest is damaged");
            return Err(Error::checkpoint(&self.path.join(MANIFEST), message));
        }
        FILES.iter().try_for_each(|name| {
            let path = self.path.join(name);
            let found = FileSum::of_file(&path, self.manifest[*name].bytes).at(&path)?;
            self.check_sum(name, &found)
        })
    }

    /// Checks what [`verify`](Self::verify) does, that the state does not contradict itself, and that all weights, moments
    /// and gradients are finite. Reads one file after another into memory.
    pub fn check_contents(&self) -> Result<()> {
        let state = self.state()?;
        self.weights()?;
        self.optimizer(&state).map(drop)
    }

    /// Moments and waiting gradients; these are there if, and only if, `state` has batches that wait.
    fn optimizer(&self, state: &TrainState) -> Result<Tensors> {
        let tensors = self.tensors(OPTIMIZER)?;
        let (found, weight) = (tensors.keys().any(|name| name.starts_with("grad.")), state.window.weight);
        if found != (weight > 0.0) {
            let found = if found { "gradients" } else { "no gradients" };
            let message = format!("{found}, although accumulated_weight in {STATE} is {weight}");
            return Err(Error::checkpoint(&self.path.join(OPTIMIZER), message));
        }
        Ok(tensors)
    }

    /// The parameters.
    ///
    /// # Errors
    /// The file is damaged, or a number in it is not finite; names the tensor.
    pub fn weights(&self) -> Result<Tensors> {
        self.tensors(WEIGHTS)
    }

    /// The tensors in the file `name`. None that a run saved is infinite or not a number: training ends before.
    fn tensors(&self, name: &str) -> Result<Tensors> {
        let path = self.path.join(name);
        let tensors = tensors::parse(&path, &self.read(name)?)?;
        for (tensor, (_, values)) in &tensors {
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let found = values[at];
                let message = format!(
                    "number {at} of tensor {tensor} is {found}, expected finite numbers: use an earlier checkpoint"
                );
                return Err(Error::checkpoint(&path, message));
            }
        }
        Ok(tensors)
    }

    /// The configuration of the run that wrote it.
    pub fn config_yaml(&self) -> Result<String> {
        String::from_utf8(self.read(CONFIG)?)
            .map_err(|error| Error::checkpoint(&self.path.join(CONFIG), error.to_string()))
    }

    /// Where the run stood.
    pub fn state(&self) -> Result<TrainState> {
        TrainState::parse(&self.read(STATE)?, &self.sizes()?)
            .map_err(|message| Error::checkpoint(&self.path.join(STATE), message))
    }

    /// What its configuration says of batches.
    pub fn sizes(&self) -> Result<Sizes> {
        serde_yaml::from_str(&self.config_yaml()?)
            .map_err(|error| Error::checkpoint(&self.path.join(CONFIG), error.to_string()))
    }

    /// Puts weights, moments and waiting gradients back, and tells where the run stood.
    pub fn restore(&self, store: &ParamStore, optimizer: &mut Optimizer) -> Result<TrainState> {
        let state = self.state()?;
        let path = self.path.join(OPTIMIZER);
        let mut saved = self.optimizer(&state)?;
        let mut take = |kind: &str, name: &str, len: usize| match saved.remove(&format!("{kind}.{name}")) {
            Some((_, values)) if values.len() == len => Ok(Some(values)),
            Some((shape, _)) => {
                Err(Error::checkpoint(&path, format!("{kind}.{name} has shape {shape:?}, expected {len} values")))
            }
            None => Ok(None),
        };
        let mut moments = Vec::new();
        let mut grads = Vec::new();
        for (param, has_second) in store.iter().zip(optimizer.has_second()) {
            let (name, len) = (param.name(), param.len());
            let (m, v) = (take("m", name, len)?, take("v", name, len)?);
            let Some(m) = m.filter(|_| v.is_some() == has_second) else {
                return Err(Error::checkpoint(
                    &path,
                    format!("the moments of {name} do not fit this optimizer: this is a checkpoint of another model"),
                ));
            };
            moments.push(Moments { m, v });
            grads.push(take("grad", name, len)?);
        }
        store.load(&self.weights()?)?;
        optimizer.restore(store, moments, state.optimizer_step)?;
        store.zero_grad();
        for (param, grad) in store.iter().zip(grads) {
            if let Some(grad) = grad {
                param.set_grad(&grad)?;
            }
        }
        Ok(state)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (path, bytes) = (self.path.join(name), self.manifest[name].bytes);
        let most = match name {
            WEIGHTS | OPTIMIZER => Memory::now().map_or(u64::MAX, |memory| memory.total),
            _ => files::SMALL,
        };
        if bytes > most {
            let message = format!("{bytes} bytes; expected at most {most}, which is what this machine can load");
            return Err(Error::checkpoint(&path, message));
        }
        let read = files::read(&path, bytes).at(&path)?;
        self.check_sum(name, &FileSum::of(&read))?;
        Ok(read)
    }

    fn check_sum(&self, name: &str, found: &FileSum) -> Result<()> {
        let (found, expected) = (&found.sha256, &self.manifest[name].sha256);
        if found != expected {
            let message = format!("SHA-256 {found}, {MANIFEST} says {expected}: the file is damaged");
            return Err(Error::checkpoint(&self.path.join(name), message));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use mblm_core::Init;
    use mblm_core::block::PluginOrigin;
    use mblm_data::batches::Cursor;

    use super::*;
    use crate::trainer::optimizer::AdamConfig;
    use crate::trainer::schedule::{Schedule, Shape};

    pub(crate) fn config_yaml() -> String {
        crate::bigram::config().to_yaml().unwrap()
    }

    pub(crate) fn state(batches: u64, valid_loss: Option<f64>) -> TrainState {
        TrainState {
            step: batches.saturating_sub(1).min(3),
            optimizer_step: 5,
            batches,
            first_batch: 7,
            resumed_from: Some("before".into()),
            window: if batches > 0 { Window { batches: 1, weight: 64.0, unit: 64.0 } } else { Window::default() },
            next: Cursor { epoch: 1, batch: 2 },
            epoch_batches: Some(9),
            elements_seen: 4 * batches,
            sequences_seen: 4 * batches,
            bytes_seen: 64 * batches,
            sequence_bytes: None,
            schedule: Some(Schedule::new(0.1, 10, 0.1, Shape::Cosine)),
            seed: 11,
            threads: Some(2),
            processes: 1,
            instructions: Some("AVX2".into()),
            device: Some("cpu".into()),
            version: Some("0.1.0".into()),
            data: "d".into(),
            valid_loss,
            best_valid_loss: Some(0.1 + 0.2),
            stale_validations: 2,
            avg_grad: (-1.0, 1e-9 / 3.0),
            plugins: vec![plugin("aa")],
        }
    }

    fn plugin(sha256: &str) -> PluginOrigin {
        PluginOrigin { name: "p".into(), version: "1".into(), path: "libp.so".into(), sha256: sha256.into() }
    }

    #[test]
    fn another_plugin_is_noticed() {
        let state = state(1, None);
        state.check_plugins(&[plugin("aa")]).unwrap();
        let error = state.check_plugins(&[plugin("bb")]).unwrap_err().to_string();
        assert!(
            error.contains("found p 1 (libp.so, sha256 bb…)") && error.contains("--allow-plugin-change"),
            "{error}"
        );
        assert!(state.check_plugins(&[]).unwrap_err().to_string().contains("found none"));
    }

    pub(crate) fn store(value: f32) -> ParamStore {
        let mut store = ParamStore::new(0);
        store.root().param("a", &[2, 2], Init::Const(value)).unwrap().grad_mut()[1] = 0.5;
        store.root().param("b", &[3], Init::Const(-value)).unwrap();
        store
    }

    fn snapshot(store: &ParamStore, optimizer: &Optimizer, state: &TrainState, path: &Path) {
        Snapshot { store, optimizer, state, config_yaml: &config_yaml() }.write(path).unwrap();
    }

    fn written() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let store = store(1.5);
        let mut optimizer = Optimizer::new(&store, AdamConfig::default());
        optimizer.step(&store, 0.1).unwrap();
        let path = folder.path().join("c");
        snapshot(&store, &optimizer, &state(7, None), &path);
        (folder, path)
    }

    #[test]
    fn everything_comes_back_bit_for_bit() {
        let (_folder, path) = written();
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.verify().unwrap();
        let other = store(9.0);
        other.get("b").unwrap().grad_mut()[0] = 1.0;
        let mut optimizer = Optimizer::new(&other, AdamConfig::default());
        assert_eq!(checkpoint.restore(&other, &mut optimizer).unwrap(), state(7, None));
        let trained = store(1.5);
        let mut want = Optimizer::new(&trained, AdamConfig::default());
        want.step(&trained, 0.1).unwrap();
        assert_eq!(optimizer.moments(&other).unwrap(), want.moments(&trained).unwrap());
        assert_eq!(optimizer.step_count(), 5);
        assert_eq!(*other.get("a").unwrap().values(), *trained.get("a").unwrap().values());
        assert_eq!(**other.get("a").unwrap().grad(), [0.0, 0.5, 0.0, 0.0]);
        assert_eq!(**other.get("b").unwrap().grad(), [0.0; 3], "a gradient of before must not survive");
        assert_eq!(checkpoint.config_yaml().unwrap(), config_yaml());
    }

    #[test]
    fn every_damage_names_the_file_and_the_check() {
        for name in FILES {
            let (_folder, path) = written();
            let file = path.join(name);
            let mut bytes = fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&file, &bytes).unwrap();
            let error = Checkpoint::open(&path).unwrap().verify().unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("SHA-256"), "{error}");
            fs::write(&file, &bytes[1..]).unwrap();
            let error = Checkpoint::open(&path).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("manifest.json says"), "{error}");
            fs::remove_file(&file).unwrap();
            let error = Checkpoint::open(&path).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("listed in manifest.json"), "{error}");
        }
        let (_folder, path) = written();
        fs::write(path.join(MANIFEST), "{}").unwrap();
        assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("not a checkpoint's manifest"));
    }

    /// Everything that can be read of a checkpoint.
    fn read_all(path: &Path) -> Result<()> {
        let checkpoint = Checkpoint::open(path)?;
        checkpoint.verify()?;
        let other = store(9.0);
        checkpoint.restore(&other, &mut Optimizer::new(&other, AdamConfig::default()))?;
        checkpoint.config_yaml().map(drop)
    }

    #[test]
    fn no_damaged_checkpoint_is_taken_for_a_whole_one() {
        let mut scrambler = mblm_base::scramble::Scrambler::new(12);
        let (_folder, path) = written();
        for round in 0..300 {
            let name = [FILES.as_slice(), &[MANIFEST]].concat()[scrambler.below(FILES.len() + 1)];
            let (file, manifest) = (path.join(name), path.join(MANIFEST));
            let (whole, sums) = (fs::read(&file).unwrap(), fs::read(&manifest).unwrap());
            let damaged = scrambler.damaged(&whole);
            fs::write(&file, &damaged).unwrap();
            // Half of the time the manifest agrees, as it does in a folder that somebody made with care.
            let agrees = name != MANIFEST && scrambler.below(2) == 0;
            if agrees {
                let mut manifest: Manifest = serde_json::from_slice(&sums).unwrap();
                manifest.files.insert(name.into(), FileSum::of(&damaged));
                fs::write(path.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
            }
            let read = read_all(&path);
            assert!(agrees || name == MANIFEST || damaged == whole || read.is_err(), "round {round}: {name}");
            fs::write(&file, &whole).unwrap();
            fs::write(&manifest, &sums).unwrap();
        }
        read_all(&path).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_in_a_checkpoint_is_named() {
        for name in [FILES.as_slice(), &[MANIFEST]].concat() {
            let (_folder, path) = written();
            let file = path.join(name);
            let replace = |with: &dyn Fn(&Path)| {
                fs::remove_file(&file).or_else(|_| fs::remove_dir(&file)).unwrap();
                with(&file);
                let error = read_all(&path).unwrap_err().to_string();
                assert!(error.contains(name), "{error}");
                error
            };
            let fifo =
                |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
            assert!(replace(&fifo).contains("this is a named pipe; expected a regular file"));
            assert!(
                replace(&|path| std::os::unix::fs::symlink("/dev/zero", path).unwrap()).contains("this is a device")
            );
            assert!(replace(&|path| fs::create_dir(path).unwrap()).contains("this is a folder"));
            replace(&|path| fs::File::create(path).unwrap().set_len(1 << 40).unwrap());
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_by_name() {
        for (value, file) in [(f32::NAN, WEIGHTS), (f32::INFINITY, WEIGHTS), (f32::NEG_INFINITY, OPTIMIZER)] {
            let folder = tempfile::tempdir().unwrap();
            let (store, path) = (store(1.5), folder.path().join("c"));
            let optimizer = Optimizer::new(&store, AdamConfig::default());
            let param = store.get("a").unwrap();
            match file {
                WEIGHTS => param.update(|values| values[2] = value).unwrap(),
                _ => param.grad_mut()[2] = value,
            }
            snapshot(&store, &optimizer, &state(7, None), &path);
            let checkpoint = Checkpoint::open(&path).unwrap();
            checkpoint.verify().unwrap();
            let (other, mut optimizer) = (self::store(9.0), optimizer);
            for error in
                [checkpoint.check_contents().unwrap_err(), checkpoint.restore(&other, &mut optimizer).unwrap_err()]
            {
                let error = error.to_string();
                let tensor = if file == WEIGHTS { "a" } else { "grad.a" };
                let want = format!("{file}: number 2 of tensor {tensor} is {value}, expected finite numbers");
                assert!(error.contains(&want), "{error}");
            }
            assert_eq!(*other.get("a").unwrap().values(), [9.0; 4], "nothing is loaded of a bad checkpoint");
            assert_eq!(checkpoint.weights().is_err(), file == WEIGHTS);
        }
    }

    #[test]
    fn a_state_that_contradicts_itself_is_damage() {
        let (_folder, path) = written();
        let fault = |state: TrainState| {
            let bytes = serde_json::to_vec(&state).unwrap();
            let mut manifest: Manifest = serde_json::from_slice(&fs::read(path.join(MANIFEST)).unwrap()).unwrap();
            manifest.files.insert(STATE.into(), FileSum::of(&bytes));
            fs::write(path.join(STATE), bytes).unwrap();
            fs::write(path.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
            let found = read_all(&path).unwrap_err().to_string();
            assert_eq!(check(&path).unwrap_err().to_string(), found);
            found
        };
        let step = fault(TrainState { step: 8, ..state(7, None) });
        assert!(step.contains("state.json: step is 8, more than"), "{step}");
        let window = Window { batches: 1, ..Window::default() };
        let weight = fault(TrainState { window, ..state(7, None) });
        let want = "optimizer.safetensors: gradients, although accumulated_weight in state.json is 0";
        assert!(weight.ends_with(want), "{weight}");
    }

    #[test]
    fn another_model_is_refused_before_anything_changes() {
        let (_folder, path) = written();
        let mut other = ParamStore::new(0);
        let param = other.root().param("z", &[2], Init::Const(4.0)).unwrap();
        let mut optimizer = Optimizer::new(&other, AdamConfig::default());
        let error = Checkpoint::open(&path).unwrap().restore(&other, &mut optimizer).unwrap_err().to_string();
        assert!(error.contains("the moments of z do not fit this optimizer"), "{error}");
        assert_eq!(*param.values(), [4.0, 4.0]);
    }
}
