//! The reference cases: every `NAME.yaml` + `NAME.safetensors` of a folder, against the numbers of the Python package.
#![allow(dead_code)]

pub mod hierarchies;

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mblm::config::{MblmConfig, MblmEncoderConfig};
use mblm::device::{self, DeviceName, Place};
use mblm::generate::{Sampler, Sampling, Until, generate};
use mblm::model::{Mblm, MblmEncoder};
use mblm::registry::BlockRegistry;
use mblm::train::trainer::optimizer::{AdamConfig, Optimizer, clip_grad_norm};
use mblm::yaml::Document;
use mblm::{Mode, ParamStore};

/// How cases are run, and how close to the package's numbers.
pub struct Way {
    /// In reports.
    pub name: &'static str,
    /// Where the parameters lie.
    pub place: Place,
    /// Whether every op is composed of candle's.
    pub composed: bool,
    /// Largest difference of logits, hidden states and losses.
    pub outputs: f32,
    /// Largest difference of a gradient, of the tensor's largest element.
    pub gradients: f32,
    /// Gradients that may be further off: the case, the parameter, and how far.
    pub rounded: &'static [(&'static str, &'static str, f32)],
    /// Largest difference of losses and norms in training.
    pub training: f32,
}

impl Way {
    /// With the fused ops, within the published tolerances.
    pub fn fused() -> Self {
        Way {
            name: "fused",
            place: Place::default(),
            composed: false,
            outputs: 2e-5,
            gradients: 1e-4,
            rounded: &[],
            training: 1e-4,
        }
    }
}

/// The device that tests on a card run on.
pub fn device() -> Place {
    let name = std::env::var("MBLM_GOLDEN_DEVICE").unwrap_or("cuda".into());
    name.parse::<DeviceName>().unwrap().open().unwrap().into()
}

type Tensors = BTreeMap<String, Tensor>;

struct Case<'a> {
    name: String,
    tensors: Tensors,
    way: &'a Way,
}

impl Case<'_> {
    fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.get(name).to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Largest absolute difference, over the largest element if `relative`. Nothing is compared where `want` is NaN.
    #[track_caller]
    fn close(&self, what: &str, got: &[f32], want: &[f32], tolerance: f32, relative: bool) {
        assert_eq!(got.len(), want.len(), "{}: {what}: number of elements", self.name);
        let compared = || got.iter().zip(want).filter(|(_, w)| !w.is_nan());
        let worst = compared().map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
        let nan = compared().next().is_none() || compared().any(|(g, _)| g.is_nan());
        let scale = if relative { want.iter().fold(0.0f32, |m, w| m.max(w.abs())) } else { 1.0 };
        assert!(!nan && worst <= tolerance * scale, "{}: {what} is off by {worst:e} (scale {scale:e})", self.name);
    }

    #[track_caller]
    fn output(&self, what: &str, got: &Tensor, want: &str) {
        assert_eq!(got.dims(), self.get(want).dims(), "{}: {what}", self.name);
        self.close(what, &floats(got), &floats(self.get(want)), self.way.outputs, false);
    }

    fn load(&self, params: &ParamStore) {
        let weights = self.tensors.iter().filter_map(|(name, t)| {
            name.strip_prefix("param.").map(|name| (name.to_string(), (t.dims().to_vec(), floats(t))))
        });
        params.load(&weights.collect()).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        self.decay(params);
    }

    /// Weight decay acts on the matrices of layers, and on nothing else.
    fn decay(&self, params: &ParamStore) {
        for param in params.iter() {
            let parts: Vec<&str> = param.name().split('.').collect();
            let is_table = parts.iter().any(|part| ["embedding", "pos_embs"].contains(part));
            let is_matrix = param.shape().len() >= 2 && parts.last().is_some_and(|last| last.starts_with("weight"));
            assert_eq!(param.weight_decay(), is_matrix && !is_table, "{}: {}", self.name, param.name());
        }
    }

    fn gradients(&self, params: &ParamStore) {
        for param in params.iter() {
            let want = floats(self.get(&format!("grad.{}", param.name())));
            let rounded = self.way.rounded.iter().find(|(case, name, _)| (*case, *name) == (&*self.name, param.name()));
            let tolerance = rounded.map_or(self.way.gradients, |(_, _, tolerance)| *tolerance);
            self.close(&format!("gradient of {}", param.name()), &param.grad(), &want, tolerance, true);
        }
    }

    fn check_decoder(&self, config: &MblmConfig) {
        let model = Mblm::at(config, 0, self.way.place.clone()).unwrap();
        self.load(model.params());
        let (ids, mask) = (self.get("in.input_ids"), self.get("in.loss_mask"));
        self.output("logits", &model.logits(ids, Mode::Eval).unwrap(), "out.logits");
        self.output("hidden state", &model.hidden_state(ids, Mode::Eval).unwrap(), "out.hidden_state");
        self.output("masked loss", &model.loss(ids, Some(mask), Mode::Eval).unwrap(), "out.masked_loss");
        let empty = ids.narrow(1, 0, 0).unwrap();
        self.output("empty logits", &model.logits(&empty, Mode::Eval).unwrap(), "out.empty_logits");

        let (loss, logits) = model.loss_and_logits(ids, None, Mode::train(0)).unwrap();
        self.output("loss", &loss, "out.loss");
        self.output("logits in training", &logits, "out.logits");
        model.params().zero_grad();
        model.params().backward(&loss).unwrap();
        self.gradients(model.params());
        self.greedy(&model);
        self.training(&model);
    }

    /// Arg-max continuations of a prompt and of nothing, and the same prompt twice in a batch.
    fn greedy(&self, model: &Mblm) {
        for (prompt, want) in [(self.ids("in.prime"), "out.greedy"), (vec![], "out.greedy_from_empty")] {
            let want = self.ids(want);
            let mut samplers = vec![Sampler::new(Sampling::greedy()).unwrap(); 2];
            let until = Until { max_tokens: Some(want.len() - prompt.len()), stop_token: None };
            let mut sequences = vec![prompt.clone(); 2];
            generate(model, &[prompt.clone(), prompt], &mut samplers, &until, |b, token| {
                sequences[b].push(token);
                Ok(true)
            })
            .unwrap();
            assert_eq!(sequences, [want.clone(), want], "{}: greedy bytes", self.name);
        }
    }

    /// 20 steps of Adam(1e-3, betas 0.9/0.95), clipped to norm 1.
    fn training(&self, model: &Mblm) {
        let mut optimizer = Optimizer::new(model.params(), AdamConfig::default());
        let batches = self.get("train.batches");
        let (mut losses, mut norms) = (vec![], vec![]);
        for step in 0..batches.dim(0).unwrap() {
            let loss = model.loss(&batches.get(step).unwrap(), None, Mode::train(step as u64)).unwrap();
            losses.push(floats(&loss)[0]);
            model.params().zero_grad();
            model.params().backward(&loss).unwrap();
            norms.push(clip_grad_norm(model.params(), 1.0).unwrap().norm as f32);
            optimizer.step(model.params(), 1e-3).unwrap();
        }
        self.close("training losses", &losses, &floats(self.get("train.losses")), self.way.training, false);
        self.close("gradient norms", &norms, &floats(self.get("train.grad_norms")), self.way.training, false);
    }

    fn check_encoder(&self, config: &MblmEncoderConfig) {
        let model = MblmEncoder::at(config, 0, self.way.place.clone()).unwrap();
        self.load(model.params());
        let (ids, attend) = (self.get("in.input_ids"), Some(self.get("in.attention_mask")));
        self.output("logits", &model.logits(ids, attend, Mode::Eval).unwrap(), "out.logits");
        self.output(
            "logits without mask",
            &model.logits(ids, None, Mode::Eval).unwrap(),
            "out.logits_no_attention_mask",
        );
        self.output("hidden state", &model.hidden_state(ids, attend, Mode::Eval).unwrap(), "out.hidden_state");
        let (labels, mask) = (self.get("in.labels"), Some(self.get("in.loss_mask")));
        let loss = model.loss(ids, labels, attend, mask, Mode::train(0)).unwrap();
        self.output("loss", &loss, "out.loss");
        model.params().backward(&loss).unwrap();
        self.gradients(model.params());
    }
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The registered names, or the reason why a case cannot run here.
fn unavailable(document: &Document, path: &str, registry: &BlockRegistry) -> Option<String> {
    let block = document.get(&format!("{path}block"))?;
    let blocks = block.as_sequence().cloned().unwrap_or(vec![block.clone()]);
    let types = blocks.iter().filter_map(|b| b.get("block_type")?.as_str().map(str::to_string));
    types.filter(|name| registry.get(name).is_none()).map(|name| format!("no block `{name}`")).next()
}

/// Past the test harness, which shows what a passing test prints to nobody.
fn report(line: &str) {
    let mut terminal = std::io::stderr().lock();
    terminal.write_all(format!("golden: {line}\n").as_bytes()).unwrap();
}

/// Runs the case of a YAML file; the reason if it cannot run here.
fn check_case(path: &Path, registry: &BlockRegistry, way: &Way) -> Option<String> {
    let document = Document::read(path).unwrap();
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    let encoder = document.get("mblm_config").is_some();
    if document.get("target_mode").is_some() {
        return Some("a data set, not a model".into());
    }
    if let Some(reason) = unavailable(&document, if encoder { "mblm_config." } else { "" }, registry) {
        return Some(reason);
    }
    let tensors = candle_core::safetensors::load(path.with_extension("safetensors"), &Device::Cpu).unwrap();
    let case = Case { name, tensors: tensors.into_iter().collect(), way };
    let check = || match encoder {
        true => case.check_encoder(&MblmEncoderConfig::from_document(&document, "", registry).unwrap()),
        false => case.check_decoder(&MblmConfig::from_document(&document, "", registry).unwrap()),
    };
    if way.composed {
        device::composed(check)
    } else {
        check()
    }
    None
}

/// Runs every case, also behind one that fails, and then fails with the list.
pub fn check_folder(folder: &Path, registry: &BlockRegistry, way: &Way) {
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "yaml") && p.with_extension("safetensors").exists());
    paths.sort();
    assert!(!paths.is_empty(), "no case in {}", folder.display());
    let (mut passed, mut failed) = (0, Vec::new());
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy();
        match catch_unwind(AssertUnwindSafe(|| check_case(&path, registry, way))) {
            Ok(None) => {
                report(&format!("passed {name}, {}", way.name));
                passed += 1;
            }
            Ok(Some(reason)) => report(&format!("skipped {name}: {reason}")),
            Err(panic) => {
                let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref().copied());
                failed.push(format!("{name}: {}", said.unwrap_or("panicked")));
            }
        }
    }
    let folder = folder.display();
    assert!(failed.is_empty(), "{} of the cases in {folder} failed:\n{}", failed.len(), failed.join("\n"));
    assert!(passed > 0, "every case in {folder} was skipped");
}
