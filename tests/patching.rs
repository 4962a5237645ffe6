//! Patches that follow the content: the model computes what it would compute with padded patches of full length, whatever
//! the blocks, levels and chunks; cached decoding equals the full pass, each sequence with patches of its own.

use candle_core::{Device, Tensor};
use mblm::Mode;
use mblm::base::random::mix;
use mblm::config::MblmConfig;
use mblm::device::composed;
use mblm::generate::{Decoder, Ended, Sampler, Sampling, Until, generate};
use mblm::model::{Mblm, Sequences};
use mblm::patching::{Cutter, PatchRule};
use mblm::registry::BlockRegistry;
use mblm::testing::{assert_close, perturb};
use mblm::yaml::Document;
use mblm_lstm as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const PAD: u32 = 256;
const RULES: [&str; 4] = [
    "spacelike",
    "{patching_type: spacelike, max_patch: 2}",
    "[{patching_type: delimiters, bytes: \";\"}, spacelike]",
    "[fixed, {patching_type: delimiters, bytes: \" ;\"}]",
];

fn block(kind: usize) -> &'static str {
    [
        "{block_type: transformer, attn_head_dims: 4, attn_num_heads: 2, attn_use_rot_embs: true, pos_emb_type: fixed}",
        "{block_type: mamba1, d_state: 5, d_conv: 4, expand: 2, pos_emb_type: rope}",
        "{block_type: mamba2, d_state: 6, d_conv: 3, expand: 2, headdim: 8}",
        "{block_type: lstm}",
    ][kind % 4]
}

/// A model of two or three stages by chance; `rules`: its field `patching`.
fn config(seed: u64, rules: &str, chunks: bool) -> MblmConfig {
    let seq_lens = if rules.starts_with('[') { "[40, 3, 4]" } else { "[60, 4]" };
    let stages = seq_lens.split(',').count();
    let blocks: Vec<&str> = (0..stages).map(|n| block(mix(seed ^ (n as u64 * 77)) as usize)).collect();
    let yaml = format!(
        "num_tokens: 257\npad_token_id: {PAD}\nhidden_dims: {:?}\nnum_layers: {:?}\nseq_lens: {seq_lens}\npatching: {rules}\n\
         train_checkpoint_chunks: {}\nblock: [{}]\n",
        vec![8; stages],
        vec![1; stages],
        if chunks { format!("{:?}", vec![2; stages - 1]) } else { "null".into() },
        blocks.join(", "),
    );
    let document = Document::parse(&yaml, "test.yaml").unwrap();
    MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap()
}

fn model(config: &MblmConfig) -> Mblm {
    let model = Mblm::new(config, 1).unwrap();
    perturb(model.params());
    model
}

/// Sequences of words and lines of different lengths, padded at their ends to one length.
fn batch() -> (Vec<u32>, usize) {
    let texts = ["to be; or not to be", "if x == 12 { y }; z = longword; é", "a"];
    let len = 1 + texts.iter().map(|text| text.len()).max().unwrap();
    let padded = |text: &str| -> Vec<u32> {
        text.bytes().map(u32::from).chain(std::iter::repeat_n(PAD, len - text.len())).collect()
    };
    (texts.iter().flat_map(|text| padded(text)).collect(), len)
}

/// The place of each byte of one sequence in patches padded to their full length, and the number of places.
fn places(config: &MblmConfig, ids: &[u32]) -> (Vec<usize>, usize) {
    let real: Vec<u32> = ids.iter().copied().take_while(|id| *id != PAD).collect();
    let places = Cutter::new(config).places(&real).unwrap();
    let len = places.last().map_or(0, |last| last + 1);
    (places, len.next_multiple_of(config.seq_lens[1..].iter().product()))
}

/// The loss and all gradients.
fn pass(model: &Mblm, ids: &[u32], len: usize, mask: &[f32]) -> (f32, usize, Vec<(String, Vec<f32>)>) {
    let sequences = Sequences { ids, len, loss_mask: Some(mask) };
    model.params().zero_grad();
    let (loss, count) = model.counted_loss(&sequences, Mode::train(3)).unwrap();
    model.params().backward(&loss).unwrap();
    let grads = model.params().iter().map(|param| (param.name().to_string(), param.grad().to_vec())).collect();
    (loss.to_scalar().unwrap(), count, grads)
}

fn logits(model: &Mblm, ids: &[u32], len: usize) -> Vec<f32> {
    let ids = Tensor::from_slice(ids, (ids.len() / len, len), &Device::Cpu).unwrap();
    model.logits(&ids, Mode::Eval).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// What the model with full patches gives on padded patches: the loss of each byte predicted where the last byte before it
/// lies, and logits at the bytes.
#[test]
fn padded_patches_of_full_length_give_the_same_logits() {
    for seed in 0..12 {
        let config = config(seed, RULES[seed as usize % 4], false);
        let fixed = MblmConfig { patching: vec![], ..config.clone() };
        let (model, reference) = (model(&config), model(&fixed));
        let (ids, len) = batch();
        let got = logits(&model, &ids, len);
        let vocab = config.num_tokens;
        for (b, ids) in ids.chunks_exact(len).enumerate() {
            let (places, padded_len) = places(&config, ids);
            let mut padded = vec![PAD; padded_len];
            places.iter().zip(ids).for_each(|(&place, &id)| padded[place] = id);
            let want = logits(&reference, &padded, padded_len);
            for (l, place) in places.iter().enumerate() {
                let got = &got[(b * len + l) * vocab..][..vocab];
                assert_close(&format!("{seed}: byte {l} of {b}"), got, &want[place * vocab..][..vocab], 1e-5);
            }
        }
    }
}

#[test]
fn the_loss_is_that_of_the_logits_and_every_parameter_has_a_gradient() {
    for seed in 0..8 {
        let config = config(seed, RULES[seed as usize % 4], false);
        let model = model(&config);
        let (ids, len) = batch();
        let mask: Vec<f32> = (0..ids.len()).map(|i| (i % 3) as f32).collect();
        let (loss, count, grads) = pass(&model, &ids, len, &mask);
        let bytes = model.byte_losses(&Sequences { ids: &ids, len, loss_mask: None }).unwrap();
        let counts = |i: &usize| ids[*i] != PAD && mask[*i] != 0.0;
        let counted: Vec<usize> = (0..ids.len()).filter(counts).collect();
        let sum: f64 = counted.iter().map(|&i| f64::from(bytes[i] * mask[i])).sum();
        assert_eq!(count, counted.len());
        assert!((f64::from(loss) - sum / count as f64).abs() < 1e-5, "{seed}: {loss}");
        assert!(ids.iter().zip(&bytes).all(|(id, loss)| (*id == PAD) == loss.is_nan()));
        for (name, grad) in grads {
            assert!(grad.iter().all(|g| g.is_finite()) && grad.iter().any(|g| *g != 0.0), "{seed}: {name}");
        }
    }
}

#[test]
fn chunks_and_compositions_give_the_same_loss_and_gradients() {
    for seed in 0..8 {
        let rules = RULES[seed as usize % 4];
        let (ids, len) = batch();
        let mask = vec![1.0; ids.len()];
        let want = pass(&model(&config(seed, rules, false)), &ids, len, &mask);
        let chunked = config(seed, rules, true);
        let others = [pass(&model(&chunked), &ids, len, &mask), composed(|| pass(&model(&chunked), &ids, len, &mask))];
        for (loss, count, grads) in others {
            assert!((loss - want.0).abs() < 1e-5 && count == want.1, "{seed}: {loss}, expected {}", want.0);
            for ((name, got), (_, want)) in grads.iter().zip(&want.2) {
                assert_close(&format!("{seed}: {name}"), got, want, 1e-4);
            }
        }
    }
}

#[test]
fn with_full_patches_it_is_the_fixed_model_bit_for_bit() {
    for seed in 0..4 {
        let never = "{patching_type: delimiters, bytes: [0]}";
        let config = config(seed, never, false);
        let fixed = MblmConfig { patching: vec![], ..config.clone() };
        let (model, reference) = (model(&config), model(&fixed));
        let ids: Vec<u32> = (0..2 * 32).map(|i| b'a' as u32 + i % 7).collect();
        let mask = vec![1.0; ids.len()];
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(logits(&model, &ids, 32)), bits(logits(&reference, &ids, 32)));
        let (got, want) = (pass(&model, &ids, 32, &mask), pass(&reference, &ids, 32, &mask));
        assert_eq!(got.0.to_bits(), want.0.to_bits());
        for ((name, got), (_, want)) in got.2.into_iter().zip(want.2) {
            assert_eq!(bits(got), bits(want), "{name}");
        }
    }
}

#[test]
fn nothing_depends_on_bytes_that_follow() {
    for rules in RULES {
        let model = model(&config(5, rules, false));
        let (ids, len) = batch();
        let ids = &ids[len..len + 33];
        let vocab = model.config().num_tokens;
        let want = logits(&model, ids, 33);
        for changed in [10, 20, 32] {
            let mut ids = ids.to_vec();
            ids[changed] = if ids[changed] == u32::from(b' ') { b'x' } else { b' ' }.into();
            let got = logits(&model, &ids, 33);
            assert_close(
                &format!("{rules}: before {changed}"),
                &got[..changed * vocab],
                &want[..changed * vocab],
                1e-5,
            );
        }
    }
}

#[test]
fn sequences_of_padding_alone_have_no_losses_and_change_no_others() {
    let model = model(&config(3, "spacelike", false));
    let losses = |ids: &[u32]| model.byte_losses(&Sequences { ids, len: 6, loss_mask: None }).unwrap();
    let text: Vec<u32> = "a bc d".bytes().map(u32::from).collect();
    let alone = losses(&text);
    let padding = [PAD; 12];
    assert!(losses(&padding).iter().all(|loss| loss.is_nan()));
    let beside = losses(&[&padding[..6], &text].concat());
    assert!(beside[..6].iter().all(|loss| loss.is_nan()));
    assert_close("beside padding", &beside[6..], &alone, 1e-5);
    let (loss, count) = model.counted_loss(&Sequences { ids: &padding, len: 6, loss_mask: None }, Mode::Eval).unwrap();
    assert_eq!((loss.to_scalar::<f32>().unwrap(), count), (0.0, 0));
    assert_eq!(logits(&model, &padding, 6).len(), 12 * 257);
}

/// Each sequence of a batch has patches of its own, and ends at other bytes.
#[test]
fn cached_decoding_equals_the_full_pass() {
    for seed in 0..12 {
        let model = model(&config(seed, RULES[seed as usize % 4], false));
        let vocab = model.config().num_tokens;
        let texts: [&[u8]; 3] = [b"to be; or not to be ", b"if x == 12 {y}; z = ", b"longwordlongwordlo;;"];
        let ids: Vec<Vec<u32>> = texts.iter().map(|text| text.iter().map(|&byte| byte.into()).collect()).collect();
        let want = logits(&model, &ids.concat(), 20);
        for prefix in [0, 1, 4, 5, 13] {
            let mut decoder = Decoder::new(&model, 3).unwrap();
            let prompt: Vec<u32> = ids.iter().flat_map(|ids| &ids[..prefix]).copied().collect();
            decoder.prefill(&prompt).unwrap();
            for l in prefix..20 {
                if l > 0 {
                    for (b, got) in decoder.logits().chunks_exact(vocab).enumerate() {
                        let want = &want[(b * 20 + l - 1) * vocab..][..vocab];
                        assert_close(&format!("{seed}: byte {l} of {b} after {prefix}"), got, want, 2e-5);
                    }
                }
                decoder.step(&[ids[0][l], ids[1][l], ids[2][l]]).unwrap();
            }
        }
    }
}

#[test]
fn generation_ends_where_the_patches_do() {
    let yaml = "num_tokens: 257\npad_token_id: 256\nhidden_dims: [8, 8]\nnum_layers: [1, 1]\nseq_lens: [4, 3]\npatching: \
                spacelike\nblock: {block_type: transformer, attn_head_dims: 4, attn_num_heads: 2, attn_use_rot_embs: true, \
                pos_emb_type: fixed}\n";
    let document = Document::parse(yaml, "test.yaml").unwrap();
    let config = MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap();
    let model = model(&config);
    let full: Vec<u32> = "a b c d ".bytes().map(u32::from).collect();
    let error =
        model.logits(&Tensor::new(&[[97u32, 32, 98, 32, 99, 32, 100, 32, 101]], &Device::Cpu).unwrap(), Mode::Eval);
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("9 bytes makes 5 patches of at most 3 bytes, but the fixed positions of stage 1 end at 4"),
        "{error}"
    );
    let other: Vec<u32> = "abcdefgh".bytes().map(u32::from).collect();
    let mut samplers = [(); 2].map(|()| Sampler::new(Sampling::greedy()).unwrap());
    let until = Until { max_tokens: None, stop_token: None };
    let mut made = [0, 0];
    let receive = |b: usize, _| {
        made[b] += 1;
        Ok(true)
    };
    let ended = generate(&model, &[full, other], &mut samplers, &until, receive).unwrap();
    assert_eq!(ended, [Ended::ContextLength; 2]);
    assert!(made[0] == 0 && (1..=4).contains(&made[1]), "{made:?}");
}

/// Registered under one name at two places.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
struct Twice {}

mblm::register_patching!(Twice, name = "twice");
mblm::register_patching!(Twice, name = "twice");

#[typetag::serde(name = "twice")]
impl PatchRule for Twice {
    fn ends_patch(&self, _: &[u32]) -> mblm::Result<bool> {
        Ok(false)
    }
}

#[test]
fn mistakes_are_named_with_their_line() {
    let read = |patching: &str, seq_lens: &str| {
        let stages = seq_lens.split(',').count();
        let yaml = format!(
            "num_tokens: 257\npad_token_id: 256\nhidden_dims: {:?}\nnum_layers: {:?}\nseq_lens: [{seq_lens}]\npatching: \
             {patching}\nblock: {}\n",
            vec![8; stages],
            vec![1; stages],
            block(0)
        );
        let document = Document::parse(&yaml, "a.yaml").unwrap();
        MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap())
    };
    for (patching, want) in [
        ("spacelke", "patching: unknown patching rule \"spacelke\"; did you mean `spacelike`? (line 6)"),
        (
            "{patching_type: words}",
            "patching.patching_type: unknown patching rule \"words\"; expected one of `delimiters`,",
        ),
        ("twice", "patching: the patching rule \"twice\" is registered twice: in tests/patching.rs:"),
        ("{max_patch: 3}", "patching: missing field `patching_type`, which names the rule (line 6)"),
        ("3", "patching: expected a rule, such as `spacelike`, found 3 (line 6)"),
        ("{patching_type: spacelike, max_patch: 0}", "patching.max_patch: expected a number from 1 to 4,"),
        ("{patching_type: spacelike, max_patch: 5}", "the stage's entry of seq_lens, found 5 (line 6)"),
        ("{patching_type: spacelike, most: 5}", "patching.most: unknown field; expected `max_patch` (line 6)"),
        ("{patching_type: delimiters, bytes: []}", "patching.bytes: expected at least one byte, found none (line 6)"),
        (
            "{patching_type: delimiters, bytes: [256]}",
            "patching.bytes: expected ASCII characters or a list of numbers from 0 to",
        ),
        ("[spacelike, spacelike]", "patching: expected at most 1, one rule per stage but the first, found 2 (line 6)"),
    ] {
        let error = read(patching, "4, 4").unwrap_err().to_string();
        assert!(error.contains(want), "{error}\n{want}");
    }
    let error = read("spacelike", "4").unwrap_err().to_string();
    assert!(error.contains("a model of one stage has no patches"), "{error}");
    let config = read("[{patching_type: delimiters, bytes: [10]}, spacelike]", "4, 4, 4").unwrap();
    let text = serde_yaml::to_string(&config).unwrap();
    assert!(
        text.contains("patching:\n- patching_type: delimiters\n  bytes:\n  - 10\n- patching_type: spacelike\n"),
        "{text}"
    );
    assert!(!serde_yaml::to_string(&read("fixed", "4, 4").unwrap()).unwrap().contains("patching"));
}
