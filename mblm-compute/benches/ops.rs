//! Each fused op beside its definition in candle's operations, forward, on shapes of `benches/configs/`.
//!
//!     cargo bench -p mblm-core --bench ops

use std::hint::black_box;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mblm_base::random::noise;
use mblm_compute::gemm::{Mat, MatMut, Precision, Update, autocast, matmul};
use mblm_compute::layer::Dims;
use mblm_compute::mode::Mode;
use mblm_compute::node::apply1;
use mblm_compute::ops::attention::{Attention, attention_composed};
use mblm_compute::ops::conv1d::{Conv1d, conv1d_silu_composed};
use mblm_compute::ops::cross_entropy::{CrossEntropy, Target, cross_entropy_composed};
use mblm_compute::ops::gated_rms_norm::{GatedRmsNorm, gated_rms_norm_composed};
use mblm_compute::ops::layer_norm::{self, layer_norm_composed};
use mblm_compute::ops::rms_norm::{Eps, RmsNorm, rms_norm_composed, token_shift_composed};
use mblm_compute::ops::rotary::Rotary;
use mblm_compute::ops::selective_scan::{self, SelectiveScan, selective_scan_composed};
use mblm_compute::ops::ssd::{self, Ssd, ssd_composed};
use mblm_compute::ops::{gelu, linear, newton_schulz};
use mblm_compute::parallel::Threads;
use mblm_compute::param::{Init, ParamStore};
use mblm_compute::rows::Rows;
use rayon::prelude::*;

fn tensor(data: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(data, shape, &Device::Cpu).expect("as many numbers as the shape has")
}

/// Measures both sides of an op.
fn pair<R, S>(
    c: &mut Criterion,
    op: &str,
    mut fused: impl FnMut() -> R,
    mut composed: impl FnMut() -> mblm_compute::Result<S>,
) {
    let mut group = c.benchmark_group(op);
    group.sample_size(10);
    group.bench_function("fused", |b| b.iter(|| black_box(fused())));
    group.bench_function("composed", |b| b.iter(|| black_box(composed().expect("a definition that runs"))));
    group.finish();
}

fn attention(c: &mut Criterion) {
    for (name, batch, seq) in [("attention, 2,048 keys", 1, 2048), ("attention, 9 keys", 512, 9)] {
        let (heads, head_dim) = (4, 64);
        let inner = heads * head_dim;
        let qkv = noise(batch * seq * 3 * inner, 1);
        let (mut out, mut lse) = (vec![0.0; batch * seq * inner], vec![0.0; batch * heads * seq]);
        let fused = Attention { batch, seq, heads, head_dim, causal: true, mask: None, dropout: None };
        let part = tensor(&noise(batch * seq * inner, 2), &[batch, heads, seq, head_dim]);
        pair(
            c,
            name,
            || fused.forward(&qkv, &mut out, &mut lse),
            || attention_composed(&part, &part, &part, true, None, None),
        );
    }
}

fn norms_and_activations(c: &mut Criterion) {
    let dims = Dims { batch: 4, seq: 1024, dim: 512 };
    let shape = [dims.batch, dims.seq, dims.dim];
    let (x, z, gain) = (noise(dims.len(), 1), noise(dims.len(), 2), noise(dims.dim, 3));
    let (x_tensor, z_tensor, gain_tensor) = (tensor(&x, &shape), tensor(&z, &shape), tensor(&gain, &[dims.dim]));
    let mut y = vec![0.0; dims.len()];
    let eps = Eps::Inside(1e-5);
    let shifted = RmsNorm { gain: &gain, eps, shift: true };
    pair(
        c,
        "rms_norm of the shifted tokens",
        || shifted.forward(&x, dims, &mut y),
        || rms_norm_composed(&token_shift_composed(&x_tensor)?, &gain_tensor, eps),
    );
    let gated = GatedRmsNorm { gain: &gain, eps: 1e-5 };
    pair(
        c,
        "gated_rms_norm",
        || gated.forward(&x, Rows::new(&z, dims.dim), &mut y),
        || gated_rms_norm_composed(&x_tensor, &z_tensor, &gain_tensor, 1e-5),
    );
    pair(
        c,
        "layer_norm",
        || layer_norm::forward(&x, &gain, &gain, layer_norm::EPS, &mut y),
        || layer_norm_composed(&x_tensor, &gain_tensor, &gain_tensor, layer_norm::EPS),
    );
    pair(c, "gelu", || gelu::forward(&x, None, &mut y), || Ok(x_tensor.gelu_erf()?));
    let (rotary, heads) = (Rotary::new(64), dims.dim / 64);
    let by_heads = x_tensor.reshape((dims.batch, dims.seq, heads, 64)).and_then(|x| x.transpose(1, 2)?.contiguous());
    let by_heads = by_heads.expect("heads");
    y.copy_from_slice(&x);
    pair(c, "rotary", || rotary.rotate(&mut y, dims.dim, heads, dims.seq, 0, false), || rotary.composed(&by_heads, 0));
    let kernel = noise(dims.dim * 4, 4);
    let kernel_tensor = tensor(&kernel, &[dims.dim, 1, 4]);
    let conv = Conv1d::new(&kernel, &gain);
    pair(
        c,
        "conv1d_silu",
        || conv.forward(Rows::new(&x, dims.dim), dims.seq, &mut y),
        || conv1d_silu_composed(&x_tensor, &kernel_tensor, &gain_tensor),
    );
}

fn scans(c: &mut Criterion) {
    let (batch, seq, channels, d_state) = (4, 256, 512, 16);
    let wide = noise(batch * seq * channels, 1);
    let narrow = noise(batch * seq * d_state, 2);
    let (a_log, per_channel) = (noise(channels * d_state, 3), noise(channels, 4));
    let mut y = vec![0.0; wide.len()];
    let scan = SelectiveScan::new(&a_log, &per_channel, &per_channel);
    let (state, z) = (Rows::new(&narrow, d_state), Rows::new(&wide, channels));
    let inputs = selective_scan::Inputs { x: &wide, dt: &wide, b: state, c: state, z };
    let wide_tensor = tensor(&wide, &[batch, seq, channels]);
    let narrow_tensor = tensor(&narrow, &[batch, seq, d_state]);
    let (a_tensor, channel_tensor) = (tensor(&a_log, &[channels, d_state]), tensor(&per_channel, &[channels]));
    pair(
        c,
        "selective_scan",
        || scan.forward(&inputs, seq, &mut y),
        || {
            let inputs = [&wide_tensor, &wide_tensor, &narrow_tensor, &narrow_tensor, &wide_tensor];
            selective_scan_composed(inputs, &a_tensor, &channel_tensor, &channel_tensor)
        },
    );
    let heads = channels / 64;
    let (dt, per_head) = (noise(batch * seq * heads, 5), noise(heads, 6));
    let ssd = Ssd { a_log: &per_head, d: &per_head, dt_bias: &per_head };
    let inputs = ssd::Inputs { x: z, dt: Rows::new(&dt, heads), b: state, c: state };
    let (dt_tensor, head_tensor) = (tensor(&dt, &[batch, seq, heads]), tensor(&per_head, &[heads]));
    pair(
        c,
        "ssd",
        || ssd.forward(&inputs, seq, &mut y),
        || {
            let inputs = [&wide_tensor, &dt_tensor, &narrow_tensor, &narrow_tensor];
            ssd_composed(inputs, &head_tensor, &head_tensor, &head_tensor)
        },
    );
}

fn loss(c: &mut Criterion) {
    let (rows, dim, vocab) = (4096, 256, 257);
    let mut store = ParamStore::new(1);
    let weight = store.root().param("weight", &[vocab, dim], Init::Normal).expect("a parameter");
    let bias = store.root().param("bias", &[vocab], Init::Normal).expect("a parameter");
    let hidden = tensor(&noise(rows * dim, 2), &[rows, dim]);
    let targets: Vec<Target> =
        (0..rows as u32).map(|row| Target { row, token: row % vocab as u32, weight: 1.0 }).collect();
    pair(
        c,
        "cross_entropy with its output layer",
        || {
            let (weight, bias, targets) = (Arc::clone(&weight), Arc::clone(&bias), targets.clone());
            apply1(CrossEntropy { weight, bias, targets, training: false }, &hidden, Mode::Eval).expect("a loss")
        },
        || cross_entropy_composed(&hidden, &weight.tensor(Mode::Eval), &bias.tensor(Mode::Eval), &targets),
    );
}

/// The products of training in both precisions, and those of decoding beside a product that packs its operands.
fn products(c: &mut Criterion) {
    let (inputs, outputs) = (512, 1024);
    let weight = noise(inputs * outputs, 1);
    let mut group = c.benchmark_group("linear");
    for rows in [1, 16, 1028] {
        let x = noise(rows * inputs, 2);
        let mut y = vec![0.0; rows * outputs];
        group.bench_function(format!("{rows} rows"), |b| {
            b.iter(|| linear::forward(&x, &weight, inputs, Update::Set, &mut y));
        });
        group.bench_function(format!("{rows} rows, packed"), |b| {
            b.iter(|| {
                let (x, weight) = (Mat::new(&x, rows, inputs), Mat::new(&weight, outputs, inputs));
                matmul(MatMut::new(&mut y, rows, outputs), Update::Set, x, weight.t(), Threads::All);
            });
        });
        if Precision::Bf16.is_available() {
            group.bench_function(format!("{rows} rows, bf16"), |b| {
                autocast(Precision::Bf16, || {
                    b.iter(|| linear::forward(&x, &weight, inputs, Update::Set, &mut y));
                });
            });
        }
    }
    group.finish();
}

/// The rounds of Muon for the matrices of `benches/configs/tt.yaml`, all at once as the optimizer has them, beside the products
/// of training with the same matrices. Elements per second are FLOP/s.
fn muon(c: &mut Criterion) {
    let mut group = c.benchmark_group("muon");
    group.sample_size(10);
    for (dim, layers) in [(512, 6), (256, 3)] {
        let shapes = [(dim, dim), (2 * dim, dim), (dim, dim), (2 * dim, dim), (dim, 2 * dim)].repeat(layers);
        let mut matrices: Vec<_> = shapes.iter().map(|&(rows, cols)| (noise(rows * cols, 1), rows, cols)).collect();
        let flops: f64 = shapes.iter().map(|&(rows, cols)| newton_schulz::flops(rows, cols)).sum();
        group.throughput(Throughput::Elements(flops as u64));
        group.bench_function(format!("newton-schulz, width {dim}"), |b| {
            b.iter(|| {
                let matrices = matrices.par_iter_mut();
                matrices.for_each(|(matrix, rows, cols)| newton_schulz::newton_schulz(matrix, *rows, *cols));
            });
        });
        let tokens = 1028;
        let (x, mut y) = (noise(tokens * 2 * dim, 2), vec![0.0; tokens * 2 * dim]);
        let mut dweight = vec![0.0; 2 * dim * dim];
        let flops: f64 = shapes.iter().map(|&(rows, cols)| 6.0 * (tokens * rows * cols) as f64).sum();
        group.throughput(Throughput::Elements(flops as u64));
        group.bench_function(format!("products of training, width {dim}"), |b| {
            b.iter(|| {
                for (weight, rows, cols) in &matrices {
                    let (x, dy) = (&x[..tokens * cols], &x[..tokens * rows]);
                    linear::forward(x, weight, *cols, Update::Set, &mut y[..tokens * rows]);
                    linear::backward_input(dy, weight, *cols, Update::Set, &mut y[..tokens * cols]);
                    linear::backward_weight(dy, x, *cols, &mut dweight[..rows * cols]);
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, attention, norms_and_activations, scans, loss, products, muon);
criterion_main!(benches);
