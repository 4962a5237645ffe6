//! The block as a whole: decoder, causality, gradients, names, and what it refuses.

use candle_core::{DType, Device};
use mblm_sdk::ParamStore;
use mblm_sdk::layer::Dims;
use mblm_sdk::testing::noise;
use mblm_sdk::testing::{check_causality, check_decoder, check_gradients, perturb};

use super::*;

fn model(dropout: f32, dim: usize, num_layers: usize) -> (ParamStore, Box<dyn StageModel>) {
    let mut store = ParamStore::new(1);
    let model = Lstm { dropout, pos_emb_type: None }.build(dim, num_layers, &mut store.root()).unwrap();
    perturb(&store);
    (store, model)
}

#[test]
fn decoder_gives_forward() {
    // Step by step, prefilled in one piece, and as a matrix product from eight sequences on.
    for (batch, seq, dim) in [(1, 20, 8), (1, 150, 33), (3, 7, 17), (9, 40, 32), (70, 5, 16)] {
        let (_store, model) = model(0.5, dim, 3);
        check_decoder(model.as_ref(), Dims { batch, seq, dim }, 2e-5);
    }
}

#[test]
fn a_prefill_goes_on_from_the_state_that_steps_left() {
    let (batch, seq, dim) = (2, 80, 24);
    let (_store, model) = model(0.0, dim, 2);
    let x = noise(seq * batch * dim, 3);
    let (mut want, mut got) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
    let row = batch * dim;
    let mut decoder = model.decoder(batch).unwrap();
    for (x, y) in x.chunks_exact(row).zip(want.chunks_exact_mut(row)) {
        decoder.step(x, y).unwrap();
    }
    let mut decoder = model.decoder(batch).unwrap();
    decoder.step(&x[..row], &mut got[..row]).unwrap();
    decoder.prefill(&x[row..], &mut got[row..], seq - 1).unwrap();
    mblm_sdk::testing::assert_close("prefill after a step", &got, &want, 2e-5);
}

#[test]
fn is_causal_and_every_parameter_learns() {
    let (store, model) = model(0.25, 12, 2);
    check_causality(model.as_ref(), Dims { batch: 1, seq: 9, dim: 12 });
    check_gradients(model.as_ref(), &store, Dims { batch: 3, seq: 9, dim: 12 });
}

#[test]
fn dropout_spares_evaluation_and_the_last_layer() {
    let x = Tensor::from_vec(noise(4 * 8, 5), (1, 4, 8), &Device::Cpu).unwrap();
    let floats = |y: Tensor| y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (layers, changes) in [(1, false), (2, true)] {
        let (_store, model) = model(0.5, 8, layers);
        let eval = floats(model.forward(&x, None, Mode::Eval).unwrap());
        let train = floats(model.forward(&x, None, Mode::train(7)).unwrap());
        assert_eq!(eval != train, changes, "{layers} layers");
        assert!(train.iter().all(|y| *y != 0.0), "an output of the last layer was dropped");
    }
}

#[test]
fn parameters_have_pytorchs_names_shapes_and_bounds() {
    let mut store = ParamStore::new(1);
    let block = Lstm { dropout: 0.0, pos_emb_type: None };
    block.build(16, 2, &mut store.root().sub("stage_models.0")).unwrap();
    let found: Vec<(&str, &[usize])> = store.iter().map(|p| (p.name(), p.shape())).collect();
    let want: [(&str, &[usize]); 8] = [
        ("stage_models.0.lstm.bias_hh_l0", &[64]),
        ("stage_models.0.lstm.bias_hh_l1", &[64]),
        ("stage_models.0.lstm.bias_ih_l0", &[64]),
        ("stage_models.0.lstm.bias_ih_l1", &[64]),
        ("stage_models.0.lstm.weight_hh_l0", &[64, 16]),
        ("stage_models.0.lstm.weight_hh_l1", &[64, 16]),
        ("stage_models.0.lstm.weight_ih_l0", &[64, 16]),
        ("stage_models.0.lstm.weight_ih_l1", &[64, 16]),
    ];
    assert_eq!(found, want);
    for param in store.iter() {
        let largest = param.values().iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!((0.2..=0.25).contains(&largest), "{}: {largest}", param.name());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for dropout in [-0.1, 1.0, f32::NAN] {
        let error = Lstm { dropout, pos_emb_type: None }.validate(8).unwrap_err();
        assert_eq!(error.field, "dropout");
        assert!(error.message.starts_with("expected a probability in [0, 1), found"), "{}", error.message);
    }
    let (_store, model) = model(0.0, 4, 1);
    let x = Tensor::zeros((1, 2, 4), DType::F32, &Device::Cpu).unwrap();
    let message = model.forward(&x, Some(&x), Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("takes no attention mask"), "{message}");
}
