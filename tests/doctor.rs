//! `mblm doctor`: finds what is broken on purpose, and nothing in blocks that work.

mod compiled;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use assert_cmd::Command;
use candle_core::{Device, Tensor};
use mblm::base::random::noise;
use mblm::block::StageDecoder;
use mblm::config::MblmConfig;
use mblm::model::Sequences;
use mblm::patching::{PatchRule, Spacelike};
use mblm::registry::BlockRegistry;
use mblm::train::config::ModelConfig;
use mblm::train::doctor::{Examination, Severity, examine, glance};
use mblm::yaml::Document;
use mblm::{Init, Mode, Param, ParamScope, PosEmb, Result, StageBlock, StageModel, register_block};
use mblm_blocks as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A gain per channel, and a fault.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Faulty {
    fault: Fault,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Fault {
    None,
    /// Adds the mean over all positions.
    Leak,
    /// Does not use its parameter.
    Dead,
    /// Multiplies by it only what a parameter that starts at zero lets through.
    Asleep,
    /// Decodes the identity.
    Decoder,
    /// Adds the mean over the batch.
    Batch,
    /// Multiplies by 10,000.
    Large,
    /// Takes the logarithm of negative numbers too.
    Nan,
    /// Cuts the gradient of its input.
    Cut,
    /// Has weights that are drawn when it is built, beside its parameter.
    Own,
    /// Adds noise in evaluation.
    Noise,
    /// Counts its calls.
    Count,
    /// Keeps the values that its parameter had at the first call.
    Stale,
    /// Drops out by random numbers of its own.
    Dropout,
    /// Has no parameter.
    Bare,
}

register_block!(Faulty, name = "faulty", about = "A block with a fault");

#[typetag::serde(name = "faulty")]
impl StageBlock for Faulty {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, _: usize, params: &mut ParamScope) -> Result<Box<dyn StageModel>> {
        let mut param =
            |name, start, wanted: bool| wanted.then(|| params.param(name, &[dim], Init::Const(start))).transpose();
        Ok(Box::new(FaultyModel {
            fault: self.fault,
            gain: param("gain", 1.5, self.fault != Fault::Bare)?,
            gate: param("gate", 0.0, self.fault == Fault::Asleep)?,
            own: Tensor::randn(1f32, 0.1, dim, &Device::Cpu)?,
            calls: AtomicU32::new(0),
            first: OnceLock::new(),
        }))
    }
}

struct FaultyModel {
    fault: Fault,
    gain: Option<Arc<Param>>,
    gate: Option<Arc<Param>>,
    own: Tensor,
    calls: AtomicU32,
    first: OnceLock<Vec<f32>>,
}

impl StageModel for FaultyModel {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let gain = self
            .gain
            .as_ref()
            .map_or_else(|| Ok(self.own.ones_like()?), |gain| Ok::<_, mblm::Error>(gain.tensor(mode)))?;
        let calls = self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(match self.fault {
            Fault::Own => x.broadcast_mul(&(gain * &self.own)?)?,
            Fault::Noise if mode == Mode::Eval => (x.broadcast_mul(&gain)? + x.randn_like(0.0, 0.1)?)?,
            Fault::Count => (x.broadcast_mul(&gain)? + f64::from(calls))?,
            Fault::Stale => {
                let first = self.first.get_or_init(|| gain.to_vec1().unwrap()).clone();
                x.broadcast_mul(&(gain.detach() * 0.0)?.add(&Tensor::new(first, &Device::Cpu)?)?)?
            }
            Fault::Dropout if mode != Mode::Eval => (x.broadcast_mul(&gain)? * x.rand_like(0.5, 1.5)?)?,
            Fault::Noise | Fault::Dropout | Fault::Bare => x.broadcast_mul(&gain)?,
            Fault::None | Fault::Decoder => x.broadcast_mul(&gain)?,
            Fault::Leak => x.broadcast_mul(&gain)?.broadcast_add(&x.mean_keepdim(1)?)?,
            Fault::Dead => (x * 1.5)?,
            Fault::Asleep => match &self.gate {
                Some(gate) => (x + x.broadcast_mul(&(gain * gate.tensor(mode))?)?)?,
                None => x.clone(),
            },
            Fault::Batch => x.broadcast_mul(&gain)?.broadcast_add(&x.mean_keepdim(0)?)?,
            Fault::Large => (x.broadcast_mul(&gain)? * 1e4)?,
            Fault::Nan => x.broadcast_mul(&gain)?.log()?,
            Fault::Cut => x.detach().broadcast_mul(&gain)?,
        })
    }

    fn decoder(&self, batch: usize) -> Result<Box<dyn StageDecoder + '_>> {
        struct Identity;
        impl StageDecoder for Identity {
            fn reset(&mut self) {}
            fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
                y.copy_from_slice(x);
                Ok(())
            }
        }
        struct Forward<'m>(&'m FaultyModel, Vec<Tensor>, usize);
        impl StageDecoder for Forward<'_> {
            fn reset(&mut self) {
                self.1.clear();
            }
            fn step(&mut self, x: &[f32], y: &mut [f32]) -> Result<()> {
                self.1.push(Tensor::from_slice(x, (self.2, x.len() / self.2), &Device::Cpu)?);
                let all = self.0.forward(&Tensor::stack(&self.1, 1)?, None, Mode::Eval)?;
                y.copy_from_slice(&all.narrow(1, self.1.len() - 1, 1)?.flatten_all()?.to_vec1::<f32>()?);
                Ok(())
            }
        }
        match self.fault {
            Fault::Decoder => Ok(Box::new(Identity)),
            _ => Ok(Box::new(Forward(self, vec![], batch))),
        }
    }
}

const TRANSFORMER: &str = "{block_type: transformer, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true}";

/// A 2-stage model with `block` at `stage`, counted from 1, and a Transformer at the other.
fn config(stage: usize, block: &str) -> MblmConfig {
    let blocks = if stage == 1 { [block, TRANSFORMER] } else { [TRANSFORMER, block] };
    let yaml = format!(
        "{{num_tokens: 257, pad_token_id: 256, hidden_dims: [24, 16], num_layers: [2, 1], seq_lens: [9, 4], block: [{}]}}",
        blocks.join(", ")
    );
    let document = Document::parse(&yaml, "test").unwrap();
    MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap()
}

fn report(stage: usize, block: &str) -> Examination {
    let ids: Vec<u32> = noise(2 * 30, 5).iter().map(|noise| ((noise + 1.0) * 127.9) as u32).collect();
    let ids = Sequences { ids: &ids, len: 30, loss_mask: None };
    examine(&ModelConfig::Generative(config(stage, block)), 0.0, 1, &ids, mblm::device::Place::default()).unwrap()
}

/// Problems as `place: what`.
fn problems(report: &Examination) -> Vec<String> {
    let problems = report.findings.iter().filter(|finding| finding.severity == Severity::Problem);
    problems.map(|finding| format!("{}: {}", finding.place, finding.what)).collect()
}

#[test]
fn nothing_is_found_in_blocks_that_work() {
    for block in [
        "{block_type: faulty, fault: none}",
        TRANSFORMER,
        "{block_type: mamba1, d_state: 5, d_conv: 4, expand: 2}",
        "{block_type: mamba2, d_state: 6, d_conv: 3, expand: 2, headdim: 8}",
    ] {
        for stage in [1, 2] {
            let report = report(stage, block);
            assert!(report.findings.is_empty(), "{block} at stage {stage}: {:?}", report.findings);
            assert_eq!(report.checks.len(), 13, "5 for each stage, 3 for the whole");
            let (groups, parameters) =
                (&report.groups, report.groups.iter().map(|group| group.parameters).sum::<usize>());
            assert_eq!(parameters, report.parameters);
            assert!(groups.iter().all(|group| group.gradient_norm > 0.0), "{groups:?}");
            assert_eq!(
                (groups[0].name.as_str(), groups.last().unwrap().name.as_str()),
                ("stage 1 embedding", "output layer")
            );
        }
    }
}

#[test]
fn what_goes_in_and_out_of_a_stage_is_seen() {
    let report = report(1, "{block_type: faulty, fault: none}");
    let seen = &report.stages[0].seen;
    assert!((seen.output.rms() / seen.input.rms() - 1.5).abs() < 1e-4, "{seen:?}");
    assert!((seen.input_gradient.rms() / seen.output_gradient.rms() - 1.5).abs() < 1e-4, "{seen:?}");
    assert!(seen.forward_seconds > 0.0 && seen.backward_seconds > 0.0, "{seen:?}");
    assert!(report.forward_seconds >= report.stages.iter().map(|stage| stage.seen.forward_seconds).sum());
    assert!((report.uniform_loss - 257f64.ln()).abs() < 1e-9);
}

#[test]
fn every_fault_is_named_with_its_stage() {
    let cases = [
        ("leak", "causal: a change of position "),
        ("decoder", "cached == full: the decoder at position 0: element "),
        ("large", "its output has a scale of "),
        ("nan", "its output is not finite"),
        ("cut", "the gradient shrinks to 0.0e0 times its size"),
        ("own", "same outputs again: built again, with the same parameters, it gives another output"),
        ("stale", "same outputs again: built again, with the same parameters, it gives another output"),
        ("noise", "same outputs again: the same input gives another output after other calls"),
        ("count", "same outputs again: the same input gives another output after other calls"),
        ("batch", "independent sequences: a sequence gives a different result beside another sequence than alone"),
    ];
    for (fault, want) in cases {
        for stage in [1, 2] {
            let found = problems(&report(stage, &format!("{{block_type: faulty, fault: {fault}}}")));
            let want = format!("stage {stage} (faulty): {want}");
            assert!(found.iter().any(|problem| problem.starts_with(&want)), "{fault}: {found:#?}");
        }
    }
}

#[test]
fn the_whole_model_is_held_to_the_same() {
    let found = |fault: &str| problems(&report(2, &format!("{{block_type: faulty, fault: {fault}}}")));
    for (fault, want) in [
        ("leak", "the model: causal: the logits at byte "),
        ("decoder", "the model: cached == full: the logits after "),
        (
            "batch",
            "the model: independent sequences: the last sequence of the batch gives a different result when it runs alone",
        ),
        ("nan", "the model: the loss is NaN"),
    ] {
        let found = found(fault);
        assert!(found.iter().any(|problem| problem.starts_with(want)), "{fault}: {found:#?}");
    }
}

/// Ends a patch at every seventh call, whatever the bytes are.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
struct Counting {
    #[serde(skip)]
    calls: AtomicU32,
}

mblm::register_patching!(Counting, name = "counting");

#[typetag::serde(name = "counting")]
impl PatchRule for Counting {
    fn ends_patch(&self, _: &[u32]) -> Result<bool> {
        Ok(self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(7))
    }
}

#[test]
fn a_patching_rule_that_keeps_a_state_is_found() {
    let with = |rule: Arc<dyn PatchRule>| {
        let model = MblmConfig { patching: vec![rule], seq_lens: vec![30, 4], ..config(2, TRANSFORMER) };
        let ids: Vec<u32> = noise(2 * 30, 5).iter().map(|noise| ((noise + 1.0) * 127.9) as u32).collect();
        let ids = Sequences { ids: &ids, len: 30, loss_mask: None };
        examine(&ModelConfig::Generative(model), 0.0, 1, &ids, mblm::device::Place::default()).unwrap()
    };
    let report = with(Arc::new(Spacelike::default()));
    assert!(report.findings.is_empty() && report.checks.len() == 14, "{:?}", report.findings);
    let found = problems(&with(Arc::new(Counting::default())));
    let want = "the model: causal patches: byte ";
    assert!(found.iter().any(|problem| problem.starts_with(want)), "{found:#?}");
}

#[test]
fn a_parameter_without_a_gradient_is_dead_or_asleep() {
    let dead = report(1, "{block_type: faulty, fault: dead}");
    assert_eq!(problems(&dead), ["stage_models.0.gain: it gets no gradient, so it never learns"]);
    let asleep = report(1, "{block_type: faulty, fault: asleep}");
    let [finding] = &asleep.findings[..] else { panic!("{:?}", asleep.findings) };
    assert_eq!((finding.severity, finding.place.as_str()), (Severity::Warning, "stage_models.0.gain"));
}

#[test]
fn what_is_about_to_be_trained_is_looked_at() {
    let glance =
        |fault: &str| glance(&ModelConfig::Generative(config(2, &format!("{{block_type: faulty, fault: {fault}}}"))));
    for fault in ["own", "stale", "noise", "count"] {
        let error = glance(fault).unwrap_err().to_string();
        assert!(error.starts_with("stage 2 (faulty): ") && error.contains("gives another output"), "{error}");
    }
    let cases = [
        ("dropout", "same bits again: the same input and the same dropout seed give another output in training"),
        ("bare", "it has no parameters"),
        ("batch", "independent sequences: "),
        ("leak", "causal: "),
        ("decoder", "cached == full: "),
    ];
    for (fault, want) in cases {
        let found = glance(fault).unwrap();
        assert!(
            found.iter().any(|found| found.place == "stage 2 (faulty)" && found.what.starts_with(want)),
            "{found:#?}"
        );
    }
    for works in ["none", "asleep"] {
        assert!(glance(works).unwrap().is_empty(), "{works}");
    }
}

/// Exit code, standard output and error of `mblm doctor` in the repository.
fn doctor(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("mblm").unwrap();
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("doctor").args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

const SMALL: [&str; 8] = [
    "--set",
    "params.seq_lens=[8, 4]",
    "--set",
    "params.input_seq_len=32",
    "--set",
    "params.hidden_dims=[32, 16]",
    "--set",
    "params.num_layers=[2, 1]",
];

#[test]
fn plugins_are_examined_like_built_in_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let mingru = compiled::compile("plugins/mingru/mingru.c", folder.path(), "mingru", &[]);
    let lstm = compiled::lstm();
    let plugins = ["--plugin-dir", lstm.to_str().unwrap(), "--plugin-dir", mingru.to_str().unwrap()];
    let (code, table, said) = doctor(&[&["configs/plugins.yaml"], &SMALL[..], &plugins].concat());
    assert_eq!((code, said.as_str()), (0, ""), "{table}");
    for line in ["1 lstm x2 (8 x 32) ", "stage 1: cached == full                ok\n", "no problems found\n"] {
        assert!(table.contains(line), "{table}");
    }
    for (fault, want) in [("CAUSALITY", "causal: a change of position"), ("DECODING", "cached == full: the decoder at")]
    {
        let broken = compiled::broken(folder.path(), fault);
        let block = ["--set", "params.block={block_type: leaky}", "--plugin-dir", broken.to_str().unwrap()];
        let (code, table, said) = doctor(&[&["configs/plugins.yaml"], &SMALL[..], &block].concat());
        assert!(code == 1 && said.ends_with(" problem(s), listed above\n"), "{said}{table}");
        assert!(table.contains(&format!("PROBLEM  stage 1 (leaky): {want}")), "{table}");
    }
}

#[test]
fn it_reads_data_and_writes_json() {
    let small = [&["configs/quickstart.yaml", "--json"], &SMALL[..]].concat();
    let block = ["--set", "params.block[0].headdim=16", "--set", "params.block[1].attn_head_dims=8"];
    let (code, json, said) = doctor(&[&small[..], &block, &["--data", "README.md"]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).expect(&said);
    assert_eq!(
        (code, &json["stages"][1]["block_type"], &json["findings"]),
        (0, &"transformer".into(), &serde_json::json!([]))
    );
    assert!(
        json["stages"][0]["output"].as_f64().unwrap() > 0.0
            && json["groups"][3]["gradient_norm"].as_f64().unwrap() > 0.0
    );
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short");
    fs::write(&short, "too short").unwrap();
    let (code, _, said) = doctor(&[&small[..], &block, &["--data", short.to_str().unwrap()]].concat());
    assert!(code == 2 && said.contains("expected at least 64 bytes for one step, found 9"), "{said}");
    let missing = Path::new("no/such/file");
    let (code, _, said) = doctor(&[&small[..], &block, &["--data", missing.to_str().unwrap()]].concat());
    assert!(code == 2 && said.contains("does not exist"), "{said}");
}

#[test]
fn an_encoder_is_examined_too() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("encoder.yaml");
    let block = "{block_type: transformerEncoder, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true}";
    let model = format!(
        "mask_token_id: 257\nmblm_config: {{num_tokens: 258, pad_token_id: 256, hidden_dims: [16, 16], num_layers: [1, 1], \
         seq_lens: [8, 4], block: {block}}}\n"
    );
    fs::write(&config, model).unwrap();
    let (code, table, said) = doctor(&[config.to_str().unwrap()]);
    assert!(code == 0 && table.contains("transformerEncoder") && !table.contains("cached"), "{table}{said}");
}
