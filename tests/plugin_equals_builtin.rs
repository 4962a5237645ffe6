//! The LSTM, compiled in and as a plugin, bit for bit.

mod compiled;

use mblm_lstm as _;

#[test]
fn bit_for_bit() {
    let config = "\
num_tokens: 257
pad_token_id: 256
hidden_dims: [24, 24]
num_layers: [2, 3]
seq_lens: [9, 4]
block: {block_type: lstm, dropout: 0.25, pos_emb_type: rope}
";
    compiled::twins::bit_for_bit(config, &compiled::lstm());
}
