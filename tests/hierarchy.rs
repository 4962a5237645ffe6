//! The hierarchy's promises beyond the reference cases: folded ids, weights, padding, batches, reproducible values,
//! gradients for every parameter, and encoders.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use mblm::base::random::noise;
use mblm::config::{MblmConfig, MblmEncoderConfig};
use mblm::model::{Mblm, MblmEncoder};
use mblm::registry::BlockRegistry;
use mblm::testing::{assert_close, perturb};
use mblm::yaml::Document;
use mblm::{Init, Mode, Param, ParamScope, ParamStore, PosEmb, StageBlock, StageModel};

const MIXED: &str = "
num_tokens: 257
pad_token_id: 256
hidden_dims: [16, 12, 8]
num_layers: [1, 2, 1]
seq_lens: [4, 3, 2]
block:
  - {block_type: mamba2, d_state: 4, d_conv: 4, expand: 2, headdim: 8, dropout: 0.1}
  - {block_type: mamba1, d_state: 4, d_conv: 4, expand: 2}
  - {block_type: transformer, attn_head_dims: 4, attn_num_heads: 2, attn_use_rot_embs: true, attn_dropout: 0.1,
     ff_dropout: 0.1, pos_emb_type: fixed}
";

const ENCODER: &str = "
mask_token_id: 257
mask_reduce_strat: STRATEGY
mblm_config:
  num_tokens: 259
  pad_token_id: 256
  hidden_dims: [12, 8]
  num_layers: [1, 1]
  seq_lens: [4, 3]
  block: {block_type: transformerEncoder, attn_head_dims: 4, attn_num_heads: 2, attn_use_rot_embs: false, pos_emb_type: fixed}
";

/// A block in plain candle operations, whose gradients candle's graph holds: `x · w + w`, without a decoder of its own.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Affine {}

mblm::register_block!(Affine, name = "affine", about = "A gain");

#[typetag::serde(name = "affine")]
impl StageBlock for Affine {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, _: usize, params: &mut ParamScope) -> mblm::Result<Box<dyn StageModel>> {
        Ok(Box::new(AffineModel(params.param("gain", &[dim], Init::Normal)?)))
    }
}

struct AffineModel(std::sync::Arc<Param>);

impl StageModel for AffineModel {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> mblm::Result<Tensor> {
        let gain = self.0.tensor(mode);
        Ok(x.broadcast_mul(&gain)?.broadcast_add(&gain)?)
    }
}

fn mixed(seed: u64) -> Mblm {
    let document = Document::parse(MIXED, "mixed.yaml").unwrap();
    Mblm::new(&MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap(), seed).unwrap()
}

fn encoder(strategy: &str) -> MblmEncoder {
    encoder_of(&ENCODER.replace("STRATEGY", strategy))
}

fn encoder_of(yaml: &str) -> MblmEncoder {
    let document = Document::parse(yaml, "encoder.yaml").unwrap();
    let config = MblmEncoderConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap();
    let model = MblmEncoder::new(&config, 1).unwrap();
    perturb(model.params());
    model
}

fn ids(batch: usize, len: usize) -> Tensor {
    let values: Vec<u32> = noise(batch * len, 3).iter().map(|v| ((v + 1.0) * 127.9) as u32).collect();
    Tensor::from_vec(values, (batch, len), &Device::Cpu).unwrap()
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn scalar(t: Tensor) -> f32 {
    t.to_scalar().unwrap()
}

#[test]
fn folded_ids_give_the_numbers_of_flat_ones_in_their_shape() {
    let model = mixed(0);
    let flat = ids(2, 18);
    let folded = flat.reshape((2, 3, 3, 2)).unwrap();
    for (f, width) in [(Mblm::logits as fn(&Mblm, &Tensor, Mode) -> _, 257), (Mblm::hidden_state, 8)] {
        let (a, b): (Tensor, Tensor) = (f(&model, &flat, Mode::Eval).unwrap(), f(&model, &folded, Mode::Eval).unwrap());
        assert_eq!((a.dims(), b.dims()), (&[2, 18, width][..], &[2, 3, 3, 2, width][..]));
        assert_eq!(floats(&a), floats(&b));
    }
    let mask = Tensor::from_vec(noise(36, 5), (2, 18), &Device::Cpu).unwrap().abs().unwrap();
    let folded_mask = mask.reshape(folded.dims()).unwrap();
    let loss = |ids, mask| scalar(model.loss(ids, Some(mask), Mode::Eval).unwrap());
    assert_eq!(loss(&flat, &mask), loss(&folded, &folded_mask));
    let message = model.loss(&flat, Some(&folded_mask), Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("loss_mask has shape [2, 3, 3, 2]; expected that of the ids, [2, 18]"), "{message}");
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other_and_padding_changes_nothing() {
    let model = mixed(0);
    let both = ids(2, 17);
    let logits = model.logits(&both, Mode::Eval).unwrap();
    for b in 0..2 {
        let alone = model.logits(&both.narrow(0, b, 1).unwrap(), Mode::Eval).unwrap();
        assert_close("alone", &floats(&alone), &floats(&logits.narrow(0, b, 1).unwrap()), 1e-5);
    }
    let longer = Tensor::cat(&[&both, &Tensor::full(256u32, (2, 3), &Device::Cpu).unwrap()], 1).unwrap();
    let padded = model.logits(&longer, Mode::Eval).unwrap().narrow(1, 0, 17).unwrap();
    assert_close("padded", &floats(&padded), &floats(&logits), 1e-5);
    let loss = |ids| scalar(model.loss(ids, None, Mode::Eval).unwrap());
    assert!((loss(&both) - loss(&longer)).abs() < 1e-5, "pad targets count for nothing");
}

#[test]
fn nothing_to_predict_is_a_loss_of_zero() {
    let model = mixed(0);
    let zeros = Tensor::zeros((1, 6), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(scalar(model.loss(&ids(1, 6), Some(&zeros), Mode::Eval).unwrap()), 0.0);
    let pads = Tensor::full(256u32, (1, 6), &Device::Cpu).unwrap();
    let (loss, logits) = model.loss_and_logits(&pads, None, Mode::Eval).unwrap();
    assert_eq!((scalar(loss), logits.dims()), (0.0, &[1, 6, 257][..]));
    let empty = model.logits(&ids(3, 6).narrow(1, 0, 0).unwrap(), Mode::Eval).unwrap();
    assert_eq!(empty.dims(), [3, 1, 257]);
}

#[test]
fn evaluation_is_training_without_dropout_and_a_seed_fixes_it() {
    let model = mixed(0);
    let ids = ids(2, 24);
    let loss = |mode| scalar(model.loss(&ids, None, mode).unwrap());
    assert_eq!(loss(Mode::train(1)), loss(Mode::train(1)));
    assert_ne!(loss(Mode::train(1)), loss(Mode::train(2)));
    assert_ne!(loss(Mode::train(1)), loss(Mode::Eval));
    assert_eq!(
        loss(Mode::Eval),
        scalar(mixed(0).loss(&ids, None, Mode::Eval).unwrap()),
        "initial values follow the seed"
    );
    assert_ne!(loss(Mode::Eval), scalar(mixed(1).loss(&ids, None, Mode::Eval).unwrap()));
}

#[test]
fn every_parameter_gets_a_gradient_and_the_pad_row_none() {
    let model = mixed(0);
    perturb(model.params());
    let loss = model.loss(&ids(2, 24), None, Mode::train(1)).unwrap();
    model.params().backward(&loss).unwrap();
    assert_live(model.params());
    for name in ["token_embs_rev.0.embedding.weight", "token_embs_rev.2.embedding.weight"] {
        let table = model.params().get(name).unwrap();
        assert!(table.grad()[256 * 8..].iter().all(|g| *g == 0.0), "{name}: the pad row");
    }
}

#[test]
fn recomputed_chunks_give_the_gradients_of_one_pass() {
    let plain = MIXED.replace("dropout: 0.1", "dropout: 0.0");
    let affine = plain.replace("block_type: mamba1, d_state: 4, d_conv: 4, expand: 2", "block_type: affine");
    let build = |yaml: &str| {
        let document = Document::parse(yaml, "mixed.yaml").unwrap();
        let registry = BlockRegistry::builtin().unwrap();
        let model = Mblm::new(&MblmConfig::from_document(&document, "", &registry).unwrap(), 0).unwrap();
        let loss = model.loss(&ids(2, 23), None, Mode::train(1)).unwrap();
        model.params().backward(&loss).unwrap();
        (scalar(loss), model)
    };
    // Chunks that divide the 8 and 24 sequences of the stages and chunks that do not; more chunks than sequences.
    for (yaml, chunks) in [(&plain, "[1, 1]"), (&plain, "[2, 5]"), (&plain, "[3, 100]"), (&affine, "[3, 2]")] {
        let (loss, whole) = build(yaml);
        let (same, recomputed) = build(&format!("{yaml}train_checkpoint_chunks: {chunks}\n"));
        assert!((loss - same).abs() < 1e-6, "{chunks}");
        let evaluated = [&whole, &recomputed].map(|model| scalar(model.loss(&ids(2, 23), None, Mode::Eval).unwrap()));
        assert!((evaluated[0] - evaluated[1]).abs() < 1e-6, "{chunks}: {evaluated:?}");
        assert_live(recomputed.params());
        for (a, b) in whole.params().iter().zip(recomputed.params().iter()) {
            assert_close(&format!("{chunks}: {}", a.name()), &b.grad(), &a.grad(), 1e-5);
        }
    }
}

#[test]
fn an_encoder_is_recomputed_under_its_mask() {
    let ids = ids(3, 11);
    let mask = Tensor::from_vec((0..33).map(|i| (i % 7 > 1) as u8).collect(), (3, 11), &Device::Cpu).unwrap();
    let build = |dropout: &str, chunks: &str| {
        let fields = format!("fixed, ff_dropout: {dropout}}}\n  train_checkpoint_chunks: {chunks}");
        let three =
            ENCODER.replace("[12, 8]", "[12, 12, 8]").replace("[1, 1]", "[1, 2, 1]").replace("[4, 3]", "[3, 2, 2]");
        let model = encoder_of(&three.replace("STRATEGY", "any").replace("fixed}", &fields));
        let loss = model.loss(&ids, &ids, Some(&mask), None, Mode::train(1)).unwrap();
        model.params().backward(&loss).unwrap();
        assert_live(model.params());
        (scalar(loss), model)
    };
    // One chunk is the same computation, bit for bit; several add up the parameters' gradients in another order.
    let cases = [("0.1", "[1, 1]", 0.0), ("0.0", "[1, 1]", 0.0), ("0.0", "[2, 5]", 1e-5), ("0.0", "[4, 50]", 1e-5)];
    for (dropout, chunks, tolerance) in cases {
        let ((loss, whole), (same, recomputed)) = (build(dropout, "null"), build(dropout, chunks));
        assert!((loss - same).abs() <= tolerance, "{chunks}: {loss} and {same}");
        for (a, b) in whole.params().iter().zip(recomputed.params().iter()) {
            assert_close(&format!("{chunks}: {}", a.name()), &b.grad(), &a.grad(), tolerance);
        }
    }
    let seen = |mask| build("0.0", "[2, 2]").1.loss(&ids, &ids, mask, None, Mode::train(1)).map(scalar).unwrap();
    assert_ne!(seen(None), seen(Some(&mask)));
}

/// Passes its input on, times a gain, and keeps what it passed on in training.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Recorder {}

/// Outputs of recorders of any model, by the width of their stage.
static RECORDED: Mutex<BTreeMap<usize, Vec<f32>>> = Mutex::new(BTreeMap::new());

mblm::register_block!(Recorder, name = "recorder", about = "A gain that is listened to");

#[typetag::serde(name = "recorder")]
impl StageBlock for Recorder {
    fn pos_emb_type(&self) -> Option<PosEmb> {
        None
    }

    fn build(&self, dim: usize, _: usize, params: &mut ParamScope) -> mblm::Result<Box<dyn StageModel>> {
        Ok(Box::new(RecorderModel(params.param("gain", &[dim], Init::Normal)?)))
    }
}

struct RecorderModel(std::sync::Arc<Param>);

impl StageModel for RecorderModel {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> mblm::Result<Tensor> {
        let y = x.broadcast_mul(&self.0.tensor(mode))?;
        RECORDED.lock().unwrap().entry(y.dim(2)?).or_default().extend(floats(&y));
        Ok(y)
    }
}

#[test]
fn activations_are_the_root_mean_squares_of_what_the_stages_put_out() {
    let rms = |values: &[f32]| (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
    let stages = "block:\n  - {block_type: recorder}\n  - {block_type: recorder}\n  - {block_type: recorder}\n";
    // Whole, and the last two stages recomputed, the local one with its loss.
    for chunks in ["null", "[2, 5]"] {
        let yaml = MIXED.split_once("block:").unwrap().0.to_string() + stages + "train_checkpoint_chunks: " + chunks;
        let document = Document::parse(&yaml, "recorder.yaml").unwrap();
        let config = MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap();
        let model = Mblm::new(&config, 0).unwrap();
        RECORDED.lock().unwrap().clear();
        let (loss, found) = model.measure_activations(|| model.loss(&ids(2, 23), None, Mode::train(1)));
        let recorded = std::mem::take(&mut *RECORDED.lock().unwrap());
        // 2 sequences of 4 patches, 8 of 3, 24 of 2, each with a start token.
        let sizes: Vec<usize> = recorded.values().rev().map(Vec::len).collect();
        assert_eq!(sizes, [2 * 5 * 16, 8 * 4 * 12, 24 * 3 * 8]);
        for (found, outputs) in found.iter().zip(recorded.values().rev()) {
            assert!((found - rms(outputs)).abs() < 1e-6 * found, "{chunks}: {found} and {}", rms(outputs));
        }
        model.params().backward(&loss.unwrap()).unwrap();
        let (_, none) = model.measure_activations(|| ());
        assert!(none.iter().all(|norm| norm.is_nan()), "nothing is left of passes that nobody measured: {none:?}");
    }
    // An encoder's hidden state is what its local stage puts out, all of it where nothing is padded.
    let model = encoder("any");
    let (hidden, found) = model.measure_activations(|| model.hidden_state(&ids(2, 12), None, Mode::Eval).unwrap());
    assert!((found[1] - rms(&floats(&hidden))).abs() < 1e-6, "{found:?}");
}

fn assert_live(params: &ParamStore) {
    for param in params.iter() {
        let grad = param.grad();
        assert!(grad.iter().all(|g| g.is_finite()), "{}: not finite", param.name());
        assert!(grad.iter().any(|g| *g != 0.0), "{}: no gradient", param.name());
    }
}

#[test]
fn an_encoder_ignores_what_its_mask_hides() {
    for (strategy, hidden) in [("any", 3..6), ("all", 4..5)] {
        // Under `any` a patch must be hidden whole; under `all` one hidden byte hides it.
        let model = encoder(strategy);
        let ids = ids(1, 11);
        let mut mask = vec![1u8; 11];
        mask[hidden.clone()].fill(0);
        let mask = Tensor::from_vec(mask, (1, 11), &Device::Cpu).unwrap();
        let mut changed: Vec<u32> = ids.flatten_all().unwrap().to_vec1().unwrap();
        changed[hidden.start] ^= 1;
        let changed = Tensor::from_vec(changed, (1, 11), &Device::Cpu).unwrap();
        let logits = |ids, mask| floats(&model.logits(ids, mask, Mode::Eval).unwrap());
        // The patch of bytes 3 to 5 itself may change; nothing else may.
        let outside = |v: Vec<f32>| [&v[..3 * 259], &v[6 * 259..]].concat();
        assert_eq!(outside(logits(&ids, Some(&mask))), outside(logits(&changed, Some(&mask))), "{strategy}");
        assert_ne!(outside(logits(&ids, None)), outside(logits(&changed, None)), "{strategy}, without mask");
    }
}

#[test]
fn an_encoder_learns_to_restore_what_was_masked() {
    let model = encoder("any");
    let (ids, labels) = (Tensor::full(257u32, (2, 12), &Device::Cpu).unwrap(), ids(2, 12));
    let weights = Tensor::from_vec((0..24).map(|i| (i % 2) as f32).collect(), (2, 12), &Device::Cpu).unwrap();
    let loss = model.loss(&ids, &labels, None, Some(&weights), Mode::train(0)).unwrap();
    model.params().backward(&loss).unwrap();
    assert_live(model.params());
    let message = model.loss(&ids, &labels.narrow(1, 0, 5).unwrap(), None, None, Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("labels has shape [2, 5]; expected that of the ids, [2, 12]"), "{message}");
}

#[test]
fn only_encoders_take_blocks_that_see_the_future() {
    let yaml = MIXED.replace("block_type: transformer,", "block_type: transformerEncoder,");
    let document = Document::parse(&yaml, "mixed.yaml").unwrap();
    let config = MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap());
    let message = match config {
        Ok(config) => Mblm::new(&config, 0).err().unwrap().to_string(),
        Err(error) => error.to_string(),
    };
    assert!(message.contains("encoder"), "{message}");
}
