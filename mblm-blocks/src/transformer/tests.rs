//! Fused equals composed, decoder equals forward, causality and live gradients of both Transformer blocks.

use candle_core::Device;
use mblm_sdk::layer::Dims;
use mblm_sdk::param::ParamStore;
use mblm_sdk::testing::{check_causality, check_decoder, check_gradients, check_layer, perturb};

use super::*;

fn config(head_dim: usize, heads: usize, rotary: bool, dropout: f32) -> TransformerConfig {
    TransformerConfig {
        pos_emb_type: None,
        attn_head_dims: head_dim,
        attn_num_heads: heads,
        attn_use_rot_embs: rotary,
        attn_dropout: dropout,
        ff_multiplier: 3,
        ff_dropout: dropout,
        use_flash_attn: false,
    }
}

fn model(config: &TransformerConfig, kind: Kind, dim: usize, layers: usize) -> (TransformerModel, ParamStore) {
    let mut store = ParamStore::new(5);
    let model = TransformerModel::new(config, kind, dim, layers, &mut store.root()).unwrap();
    perturb(&store);
    (model, store)
}

/// A store that holds one layer alone, so that every parameter in it must get a gradient.
fn layer(config: &TransformerConfig, kind: Kind, dim: usize) -> (Arc<TransformerLayer>, ParamStore) {
    let mut store = ParamStore::new(6);
    let rotary = config.attn_use_rot_embs.then(|| Arc::new(Rotary::new(config.attn_head_dims)));
    let layer = TransformerLayer::new(config, kind, dim, rotary, &mut store.root()).unwrap();
    perturb(&store);
    (Arc::new(layer), store)
}

#[test]
fn fused_equals_composed() {
    // Short and long sequences, borders of the tiles, odd widths, with and without rotation and dropout.
    for (batch, seq) in [(1, 2), (40, 9), (3, 24), (2, 25), (1, 64), (2, 97), (1, 310)] {
        for (dim, head_dim, heads, rotary, dropout) in [(12, 6, 2, true, 0.0), (7, 40, 3, false, 0.2)] {
            let (layer, store) = layer(&config(head_dim, heads, rotary, dropout), Kind::Decoder, dim);
            check_layer(&layer, &store, Dims { batch, seq, dim }, None, Mode::train(9));
        }
    }
}

#[test]
fn encoder_equals_composed_under_masks() {
    for (batch, seq) in [(3, 9), (2, 70), (2, 310)] {
        let (layer, store) = layer(&config(8, 2, true, 0.1), Kind::Encoder, 10);
        let dims = Dims { batch, seq, dim: 10 };
        check_layer(&layer, &store, dims, None, Mode::train(3));
        // The last sequence attends to nothing at all.
        let mask = |i: usize| (i < (batch - 1) * seq && !i.is_multiple_of(3)) as u8;
        let mask: Vec<u8> = (0..batch * seq).map(mask).collect();
        let mask = Tensor::from_vec(mask, (batch, seq), &Device::Cpu).unwrap();
        check_layer(&layer, &store, dims, Some(&mask), Mode::train(3));
    }
}

#[test]
fn decoder_equals_forward_and_is_causal() {
    for (batch, seq, rotary) in [(1, 1, true), (3, 11, true), (2, 70, false), (9, 30, true)] {
        let (model, store) = model(&config(8, 3, rotary, 0.3), Kind::Decoder, 20, 2);
        let dims = Dims { batch, seq, dim: 20 };
        check_decoder(&model, dims, 1e-5);
        check_causality(&model, Dims { batch: 1, ..dims });
        if seq > 1 {
            check_gradients(&model, &store, dims);
        }
    }
}

#[test]
fn a_causal_block_refuses_a_mask_and_an_encoder_refuses_to_generate() {
    let x = Tensor::zeros((1, 2, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
    let mask = Tensor::ones((1, 2), candle_core::DType::U8, &Device::Cpu).unwrap();
    let (decoder, _) = model(&config(4, 2, false, 0.0), Kind::Decoder, 8, 1);
    let message = decoder.forward(&x, Some(&mask), Mode::Eval).unwrap_err().to_string();
    assert!(message.contains("takes no attention mask"), "{message}");
    let (encoder, _) = model(&config(4, 2, false, 0.0), Kind::Encoder, 8, 1);
    assert!(encoder.decoder(1).err().unwrap().to_string().contains("cannot generate"));
}
