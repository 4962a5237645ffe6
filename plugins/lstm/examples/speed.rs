//! Milliseconds of a forward and a backward pass of one layer, at the shapes of a global and of a local stage.
//! `benches/lstm_torch.py` times PyTorch's in the same way.
//!
//!     cargo run --release -p mblm-lstm --example speed

use std::time::Instant;

use candle_core::{Device, Var};
use mblm_lstm::Lstm;
use mblm_sdk::testing::noise;
use mblm_sdk::{Mode, ParamStore, Result, StageBlock};

const WARM_UP: usize = 3;
const RUNS: usize = 15;

fn main() -> Result<()> {
    for (batch, seq, dim) in [(4, 1028, 512), (1028, 9, 256)] {
        let mut store = ParamStore::new(0);
        let model = Lstm { dropout: 0.0, pos_emb_type: None }.build(dim, 1, &mut store.root())?;
        let x = Var::from_vec(noise(batch * seq * dim, 1), (batch, seq, dim), &Device::Cpu)?;
        let mut times = Vec::new();
        for run in 0..WARM_UP + RUNS {
            let start = Instant::now();
            let y = model.forward(x.as_tensor(), None, Mode::train(0))?;
            let forward = start.elapsed();
            store.backward(&y.sum_all()?)?;
            if run >= WARM_UP {
                times.push((start.elapsed().as_secs_f64() * 1e3, forward.as_secs_f64() * 1e3));
            }
        }
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (total, forward) = times[RUNS / 2];
        println!("batch {batch}, seq {seq}, dim {dim}: {total:.1} ms (forward {forward:.1})");
    }
    Ok(())
}
