//! Cached decoding equals the full forward pass: random mixes of blocks and lengths, at patch borders, from the empty
//! prompt, past the prompt's padding, in batches; over slices, and by tensors as on a device.

use candle_core::{DType, Device, Tensor};
use mblm::Mode;
use mblm::base::random::noise;
use mblm::config::MblmConfig;
use mblm::device::{Place, composed};
use mblm::generate::{Decoder, Ended, Sampler, Sampling, Until, generate};
use mblm::model::{Mblm, Sequences};
use mblm::registry::BlockRegistry;
use mblm::testing::{assert_close, perturb};
use mblm::yaml::Document;
use mblm_lstm as _;

/// Blocks that generate, at width 16; positions by letter: none, fixed, rope.
fn block(kind: usize, positions: usize) -> String {
    let positions = ["null", "fixed", "rope"][positions % 3];
    let fields = match kind % 5 {
        0 => "block_type: transformer, attn_head_dims: 4, attn_num_heads: 3, attn_use_rot_embs: true",
        1 => "block_type: transformer, attn_head_dims: 5, attn_num_heads: 2, attn_use_rot_embs: false",
        2 => "block_type: mamba1, d_state: 5, d_conv: 4, expand: 2",
        3 => "block_type: mamba2, d_state: 6, d_conv: 3, expand: 2, headdim: 8",
        _ => "block_type: lstm",
    };
    format!("{{{fields}, pos_emb_type: {positions}}}")
}

fn model(seq_lens: &[usize], blocks: &[String], layers: usize) -> Mblm {
    model_at(Place::default(), seq_lens, blocks, layers)
}

fn model_at(place: Place, seq_lens: &[usize], blocks: &[String], layers: usize) -> Mblm {
    let stages = seq_lens.len();
    let yaml = format!(
        "num_tokens: 259\npad_token_id: 256\nhidden_dims: {:?}\nnum_layers: {:?}\nseq_lens: {seq_lens:?}\nblock: [{}]\n",
        vec![16; stages],
        vec![layers; stages],
        blocks.join(", ")
    );
    let document = Document::parse(&yaml, "test.yaml").unwrap();
    let config = MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap();
    let model = Mblm::at(&config, 1, place).unwrap();
    perturb(model.params());
    model
}

fn bytes(len: usize, seed: u64) -> Vec<u32> {
    noise(len, seed).iter().map(|v| ((v + 1.0) * 128.0) as u32 % 256).collect()
}

/// The full pass's logits for the byte after `sequences`, `(B, V)`.
fn full(model: &Mblm, sequences: &[Vec<u32>]) -> Vec<f32> {
    let (batch, len) = (sequences.len(), sequences[0].len());
    let ids = Tensor::from_vec(sequences.concat(), (batch, len), &Device::Cpu).unwrap();
    let logits = model.logits(&ids, Mode::Eval).unwrap();
    let last = logits.dim(1).unwrap() - 1;
    logits.narrow(1, last, 1).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Decodes up to `len` bytes after a prompt of `prompt` bytes, and holds every step against the full pass.
fn check(model: &Mblm, what: &str, batch: usize, prompt: usize, len: usize) {
    check_within(2e-5, model, what, batch, prompt, len);
}

fn check_within(tolerance: f32, model: &Mblm, what: &str, batch: usize, prompt: usize, len: usize) {
    let sequences: Vec<Vec<u32>> = (0..batch).map(|b| bytes(len, 7 + b as u64)).collect();
    let prefix = |len: usize| sequences.iter().map(|s| s[..len].to_vec()).collect::<Vec<_>>();
    let mut decoder = Decoder::new(model, batch).unwrap();
    decoder.prefill(&prefix(prompt).concat()).unwrap();
    for at in prompt..=len {
        assert_close(&format!("{what}, {at} bytes"), decoder.logits(), &full(model, &prefix(at)), tolerance);
        if at < len {
            decoder.step(&sequences.iter().map(|s| s[at]).collect::<Vec<_>>()).unwrap();
        }
    }
}

/// Mixes of blocks at `place`, with logits within `tolerance` of the full pass's.
fn check_mixes(place: &Place, tolerance: f32) {
    let shapes: [&[usize]; 7] = [&[40], &[7, 4], &[5, 1], &[3, 3, 4], &[4, 1, 3], &[2, 2, 3, 2], &[2, 3, 1, 4]];
    for (i, seq_lens) in shapes.iter().enumerate() {
        for round in 0..4 {
            let blocks: Vec<String> =
                (0..seq_lens.len()).map(|n| block(i + round * 3 + n * (1 + round), i + n + round)).collect();
            let model = model_at(place.clone(), seq_lens, &blocks, 1 + round % 2);
            let len = seq_lens.iter().product::<usize>();
            let prompts = [0, 1, len / 2, len - 1, len];
            let (batch, prompt) = (1 + (i + round) % 3, prompts[(i * 2 + round) % 5]);
            check_within(tolerance, &model, &format!("{seq_lens:?} {blocks:?}"), batch, prompt, len);
        }
    }
}

/// A place in which no op is fused, as on a device.
fn wide() -> Place {
    Place { device: Device::Cpu, dtype: DType::F64 }
}

#[test]
fn decoding_equals_the_full_pass_for_mixes_of_blocks() {
    check_mixes(&Place::default(), 2e-5);
}

#[test]
fn decoding_by_tensors_equals_the_full_pass_for_mixes_of_blocks() {
    check_mixes(&wide(), 1e-6);
}

/// Chunks of scans, and the room of a cache, end within these prompts and sequences.
#[test]
fn decoding_by_tensors_goes_on_after_long_prompts() {
    for kind in 0..5 {
        let model = model_at(wide(), &[170], &[block(kind, 0)], 2);
        check_within(1e-6, &model, &format!("block {kind}"), 2, 150, 157);
    }
}

/// Greedy bytes of three streams with their own prompts, some of which end before the others.
#[test]
fn generation_by_tensors_gives_the_bytes_of_slices() {
    for kind in 0..5 {
        let model = model(&[4, 3, 4], &[block(kind, 1), block(kind + 1, 0), block(kind + 2, 2)], 1);
        let prompts: Vec<Vec<u32>> = (0..3).map(|b| bytes(6, 30 + b)).collect();
        let generated = |stop_token| {
            let mut sequences = prompts.clone();
            let mut samplers = vec![Sampler::new(Sampling::greedy()).unwrap(); 3];
            let until = Until { max_tokens: None, stop_token };
            let ended = generate(&model, &prompts, &mut samplers, &until, |b, token| {
                sequences[b].push(token);
                Ok(true)
            });
            (sequences, ended.unwrap())
        };
        let want = generated(None);
        assert_eq!(composed(|| generated(None)), want, "block {kind}");
        let stop = Some(want.0[1][9]);
        assert_eq!(composed(|| generated(stop)), generated(stop), "block {kind} up to {stop:?}");
    }
}

#[test]
fn errors_of_decoding_by_tensors_name_the_stage() {
    let model = model(&[3, 4], &[block(0, 1), block(3, 0)], 1);
    let positions = model.params().iter().find(|param| param.name().starts_with("pos_embs.0")).unwrap();
    positions.update(|values| values[16..32].fill(f32::INFINITY)).unwrap();
    let (made, error) = composed(|| generated(&model));
    assert_eq!((made, error), generated(&model));
}

#[test]
fn every_prompt_length_continues_alike() {
    let model = model(&[3, 2, 3], &[block(0, 1), block(2, 0), block(3, 1)], 1);
    for prompt in 0..=18 {
        check(&model, &format!("prompt of {prompt}"), 2, prompt, 18);
    }
}

/// Sequences that share a prompt, which is read once, and go on apart.
#[test]
fn samples_of_one_prompt_equal_the_full_pass() {
    for kind in 0..5 {
        let model = model(&[40, 3, 4], &[block(kind, 0), block(kind + 1, 1), block(kind + 2, 1)], 2);
        let prompt = bytes(29, 3);
        let ends: Vec<Vec<u32>> = (0..3).map(|b| bytes(20, 11 + b)).collect();
        let mut decoder = Decoder::after(&model, &prompt, 3).unwrap();
        for len in 0..20 {
            let sequences: Vec<Vec<u32>> = ends.iter().map(|end| [&prompt[..], &end[..len]].concat()).collect();
            assert_close(&format!("{kind}: {len}"), decoder.logits(), &full(&model, &sequences), 2e-5);
            decoder.step(&ends.iter().map(|end| end[len]).collect::<Vec<_>>()).unwrap();
        }
    }
}

#[test]
fn without_fixed_positions_a_sequence_may_grow_past_the_context() {
    let model = model(&[2, 3], &[block(3, 0), block(0, 1)], 1);
    check(&model, "past the context", 1, 5, 14);
}

fn tokens(model: &Mblm, prompt: &[u32], sampling: Sampling, until: Until) -> (Vec<u32>, Ended) {
    let mut out = vec![];
    let mut samplers = [Sampler::new(sampling).unwrap()];
    let ended = generate(model, &[prompt.to_vec()], &mut samplers, &until, |_, token| {
        out.push(token);
        Ok(true)
    });
    (out, ended.unwrap()[0])
}

#[test]
fn generation_ends_where_it_should() {
    let model = model(&[3, 4], &[block(0, 1), block(1, 1)], 1);
    let prompt = bytes(5, 3);
    let all = Until { max_tokens: None, stop_token: None };
    let (whole, ended) = tokens(&model, &prompt, Sampling::default(), all.clone());
    assert_eq!((whole.len(), ended), (7, Ended::ContextLength));
    let (same, ended) = tokens(&model, &prompt, Sampling::default(), Until { max_tokens: Some(3), ..all.clone() });
    assert_eq!((same, ended), (whole[..3].to_vec(), Ended::MaxTokens));
    let stop = whole[4];
    let first = whole.iter().position(|t| *t == stop).unwrap();
    let (same, ended) = tokens(&model, &prompt, Sampling::default(), Until { stop_token: Some(stop), ..all.clone() });
    assert_eq!((same, ended), (whole[..=first].to_vec(), Ended::StopToken));
    let (more, ended) = tokens(&model, &prompt, Sampling::default(), Until { max_tokens: Some(100), ..all });
    assert_eq!((more.len(), ended), (7, Ended::ContextLength));
}

#[test]
fn bad_input_is_named() {
    let model = model(&[2, 3], &[block(0, 1), block(1, 1)], 1);
    let mut decoder = Decoder::new(&model, 1).unwrap();
    let message = decoder.prefill(&[1; 7]).unwrap_err().to_string();
    assert!(message.contains("7 bytes are more than the context of 6 bytes"), "{message}");
    let message = decoder.prefill(&[1, 300]).unwrap_err().to_string();
    assert!(message.contains("id 300 lies outside the vocabulary of 259 tokens"), "{message}");
    let ids = |values: &[i64], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
    let message = model.logits(&ids(&[1; 7], &[1, 7]), Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("a sequence of 7 bytes makes 3 patches of 3 bytes"), "{message}");
    let message = model.logits(&ids(&[1, -1], &[1, 2]), Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("id -1 at flat position 1"), "{message}");
    let message = model.logits(&ids(&[1; 8], &[1, 2, 4]), Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("[1, 2, 4]; expected (batch, bytes) or (batch, patches, 3)"), "{message}");
}

/// Every step needs scratch memory for one position more; a pool that kept each of these buffers would hold 120 MB here.
#[test]
fn scratch_memory_does_not_grow_with_the_square_of_the_bytes() {
    let model = model(&[4096], &[block(0, 0)], 2);
    let until = Until { max_tokens: Some(3000), stop_token: None };
    let mut samplers = [Sampler::new(Sampling::default()).unwrap()];
    generate(&model, &[vec![]], &mut samplers, &until, |_, _| Ok(true)).unwrap();
    let held = mblm::buffer::held_bytes();
    assert!(held < 24 << 20, "{held} bytes are held for scores of 3 heads over 3,000 positions");
}

/// Generates 11 bytes, and returns how many came and what stopped it.
fn generated(model: &Mblm) -> (usize, String) {
    let until = Until { max_tokens: Some(11), stop_token: None };
    let (mut samplers, mut made) = ([Sampler::new(Sampling::default()).unwrap()], 0);
    let ended = generate(model, &[vec![]], &mut samplers, &until, |_, _| {
        made += 1;
        Ok(true)
    });
    (made, ended.unwrap_err().to_string())
}

#[test]
fn numbers_that_are_not_finite_are_errors_that_name_the_stage() {
    let ids = Tensor::from_vec(bytes(11, 3), (1, 11), &Device::Cpu).unwrap();
    for (n, name) in [(0, "stage 1 (transformer)"), (1, "stage 2 (mamba2)")] {
        let model = model(&[3, 4], &[block(0, 1), block(3, 0)], 1);
        let prefix = format!("stage_models.{n}.");
        let params = model.params().iter().filter(|param| param.name().starts_with(&prefix));
        params.for_each(|param| param.update(|values| values.fill(f32::NAN)).unwrap());
        let errors = [
            generated(&model).1,
            model.loss(&ids, None, Mode::Eval).unwrap_err().to_string(),
            model.byte_losses(&Sequences { ids: &bytes(11, 3), len: 11, loss_mask: None }).unwrap_err().to_string(),
        ];
        for error in errors {
            assert!(error.contains(&format!("the output of {name} is NaN")), "{error}");
        }
        // Training looks at the loss itself, and says at which step it happened.
        let loss = model.loss(&ids, None, Mode::train(0)).unwrap();
        assert!(loss.to_scalar::<f32>().unwrap().is_nan());
    }
    let model = model(&[3, 4], &[block(0, 1), block(3, 0)], 1);
    let output = model.params().get("to_logits.weight").unwrap();
    output.update(|values| values.iter_mut().for_each(|v| *v = v.signum() * f32::MAX)).unwrap();
    let error = model.loss(&ids, None, Mode::Eval).unwrap_err().to_string();
    assert!(error.contains("the outputs of all stages are finite"), "{error}");
}

#[test]
fn generation_ends_where_the_numbers_stop_being_finite() {
    let model = model(&[3, 4], &[block(0, 1), block(3, 0)], 1);
    let positions = model.params().iter().find(|param| param.name().starts_with("pos_embs.0")).unwrap();
    // The second patch: position 2, since the start token is position 0.
    positions.update(|values| values[16..32].fill(f32::INFINITY)).unwrap();
    let (made, error) = generated(&model);
    assert_eq!(made, 9, "{error}");
    assert!(error.contains("the logits after 9 bytes are not finite: the output of stage 1 (transformer)"), "{error}");
    assert!(error.contains("at sequence 0, position 2"), "{error}");
}
