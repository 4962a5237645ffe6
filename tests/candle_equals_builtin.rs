//! Blocks written with candle-nn, compiled in and as a plugin, bit for bit.

mod compiled;

use mblm_candle_blocks as _;

#[test]
fn bit_for_bit() {
    let config = "\
num_tokens: 257
pad_token_id: 256
hidden_dims: [24, 16]
num_layers: [2, 2]
seq_lens: [9, 4]
block:
  - {block_type: candle_llama, num_heads: 3, intermediate_size: 20, dropout: 0.25}
  - {block_type: candle_gru, dropout: 0.25, pos_emb_type: fixed}
";
    compiled::twins::bit_for_bit(config, &compiled::candle());
}
