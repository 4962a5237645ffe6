//! Each kernel on a card against its composition in `f64` on the CPU. Without a card these tests fail, so they only run when
//! asked for: `cargo test --release -p mblm-compute --features cuda --lib cuda:: -- --ignored`.

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor, Var};

use crate::error::Result;
use crate::mode::Dropout;
use crate::ops::adam::Step;
use crate::ops::dropout::factors;
use crate::ops::on_device::{self, Attention};
use crate::ops::rms_norm::Eps;
use crate::ops::rotary::Rotary;
use crate::testing::{assert_close, noise};

const TOLERANCE: f32 = 2e-5;

fn card() -> Device {
    static CARD: OnceLock<Device> = OnceLock::new();
    CARD.get_or_init(|| Device::new_cuda(0).expect("these tests need an NVIDIA card")).clone()
}

fn place(len: usize, seed: u64, dtype: DType, device: &Device) -> Tensor {
    Tensor::from_vec(noise(len, seed), len, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The output of `f` for noise of these shapes, and the gradients of the inputs.
fn run(dtype: DType, device: &Device, shapes: &[&[usize]], f: impl Fn(&[&Tensor]) -> Result<Tensor>) -> Vec<Vec<f32>> {
    let var = |(seed, shape): (usize, &&[usize])| {
        let values = place(shape.iter().product(), seed as u64 + 1, dtype, device);
        Var::from_tensor(&values.reshape(*shape).unwrap()).unwrap()
    };
    let inputs: Vec<Var> = shapes.iter().enumerate().map(var).collect();
    let y = f(&inputs.iter().map(|input| input.as_tensor()).collect::<Vec<_>>()).unwrap();
    let dy = place(y.elem_count(), 100, dtype, device).reshape(y.shape()).unwrap();
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let grads = inputs.iter().map(|input| flat(grads.get(input).expect("a gradient for every input")));
    [flat(&y)].into_iter().chain(grads).collect()
}

/// Holds `f` on the card, where it runs kernels, against `f` on the CPU, where it is the composition.
#[track_caller]
fn check(what: &str, shapes: &[&[usize]], f: impl Fn(&[&Tensor]) -> Result<Tensor>) {
    let got = run(DType::F32, &card(), shapes, &f);
    let want = run(DType::F64, &Device::Cpu, shapes, &f);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let part = if i == 0 { "output".to_string() } else { format!("gradient of input {}", i - 1) };
        assert!(want.iter().any(|value| *value != 0.0), "{what}, {shapes:?}: {part} is zero");
        assert_close(&format!("{what}, {shapes:?}: {part}"), got, want, TOLERANCE);
    }
}

#[test]
#[ignore = "needs a card"]
fn rms_norm() {
    for [batch, seq, dim] in [[1, 1, 5], [2, 7, 33], [3, 300, 64], [2, 5, 1030]] {
        for eps in [Eps::Floor(1e-3), Eps::Floor(0.57), Eps::Inside(1e-5)] {
            for shift in [false, true] {
                let what = format!("RMSNorm, {eps:?}, shift {shift}");
                check(&what, &[&[batch, seq, dim], &[dim]], |v| on_device::rms_norm(v[0], v[1], eps, shift));
            }
        }
    }
}

#[test]
#[ignore = "needs a card"]
fn layer_norm() {
    for [batch, seq, dim] in [[1, 1, 5], [2, 7, 33], [3, 300, 64], [2, 5, 1030]] {
        check("LayerNorm", &[&[batch, seq, dim], &[dim], &[dim]], |v| on_device::layer_norm(v[0], v[1], v[2], 1e-5));
    }
}

#[test]
#[ignore = "needs a card"]
fn gated_rms_norm() {
    for [batch, seq, dim] in [[1, 1, 2], [2, 9, 70]] {
        check("gated RMSNorm", &[&[batch, seq, dim], &[batch, seq, 3 * dim], &[dim]], |v| {
            on_device::gated_rms_norm(v[0], &v[1].narrow(2, dim, dim)?, v[2], 1e-5)
        });
    }
}

#[test]
#[ignore = "needs a card"]
fn linear() {
    // The last has so many rows that their sums are added up in two steps.
    for [batch, seq, inputs, outputs] in [[1, 1, 3, 5], [2, 7, 33, 20], [3, 1400, 16, 130]] {
        let (x, weight) = ([batch, seq, inputs], [outputs, inputs]);
        check("linear", &[&x, &weight], |v| on_device::linear(v[0], v[1], None));
        check("linear with bias", &[&x, &weight, &[outputs]], |v| on_device::linear(v[0], v[1], Some(v[2])));
    }
}

#[test]
#[ignore = "needs a card"]
fn add_to_rows() {
    for [batch, seq, dim] in [[1, 1, 3], [3, 7, 33], [70, 2, 130]] {
        check("added rows", &[&[batch, seq, dim], &[seq, dim]], |v| on_device::add_to_rows(v[0], v[1]));
    }
}

#[test]
#[ignore = "needs a card"]
fn linear_gelu() {
    for dropout in [None, Some(Dropout::new(0.3, 7, 1))] {
        for [batch, seq, inputs, outputs] in [[1, 1, 3, 5], [2, 70, 33, 40]] {
            check(
                &format!("linear and GELU, {dropout:?}"),
                &[&[batch, seq, inputs], &[outputs, inputs], &[outputs]],
                |v| on_device::linear_gelu(v[0], v[1], v[2], dropout),
            );
        }
    }
}

#[test]
#[ignore = "needs a card"]
fn dropout_factors() {
    for (p, shape) in [(0.3, [3, 5, 7]), (0.0, [1, 1, 2]), (0.9, [2, 300, 65])] {
        let dropout = Dropout::new(p, 3, 1 << 40);
        let [got, want] = [card(), Device::Cpu].map(|device| flat(&factors(dropout, &shape, &device).unwrap()));
        assert_eq!(got, want, "dropout of {p}");
    }
}

#[test]
#[ignore = "needs a card"]
fn conv1d() {
    for [batch, seq, width, first, channels, taps] in
        [[1, 1, 5, 0, 5, 1], [2, 3, 20, 4, 9, 4], [3, 70, 130, 1, 129, 4], [2, 9, 40, 8, 32, 8]]
    {
        check("convolution", &[&[batch, seq, width], &[channels, 1, taps], &[channels]], |v| {
            on_device::conv1d_silu(v[0], first, v[1], v[2])
        });
    }
}

/// Attention with and without a mask, dropout and rotary positions.
fn check_attention([batch, heads, seq, head_dim]: [usize; 4], causal: bool, all: bool) {
    let inner = heads * head_dim;
    // The first queries see masked keys alone where they see the past alone.
    let mask: Vec<u8> = (0..batch * seq).map(|i| (i % seq > 2 && i % 5 != 3) as u8).collect();
    let what = format!("attention of {heads} heads, causal {causal}, masked, dropped out and rotated {all}");
    check(&what, &[&[batch, seq, inner], &[batch, seq, 2 * inner]], |v| {
        let mask = Tensor::from_slice(&mask, (batch, seq), v[0].device())?;
        let rotary = Rotary::new(head_dim);
        let attention = Attention {
            heads,
            causal,
            mask: all.then_some(&mask),
            dropout: all.then(|| Dropout::new(0.3, 7, 0)),
            rotary: all.then_some(&rotary),
        };
        attention.forward(v[0], v[1])
    });
}

#[test]
#[ignore = "needs a card"]
fn attention() {
    for sizes in [[2, 1, 9, 4], [2, 3, 20, 4], [1, 2, 257, 32], [3, 2, 70, 6]] {
        for causal in [true, false] {
            for all in [false, true] {
                check_attention(sizes, causal, all);
            }
        }
    }
}

#[test]
#[ignore = "needs a card"]
fn attention_in_blocks_of_queries() {
    // More weights than exist at once.
    check_attention([1, 1, 8200, 2], true, true);
}

#[test]
#[ignore = "needs a card"]
fn cross_entropy() {
    for (rows, vocab) in [(1, 3), (9, 257), (70, 33)] {
        let logits = (place(rows * vocab, 1, DType::F32, &card()) * 5.0).unwrap().reshape((rows, vocab)).unwrap();
        let tokens: Vec<u32> = (0..rows).map(|i| (7 * i % vocab) as u32).collect();
        // Some rows predict nothing.
        let weights: Vec<f32> = (0..rows).map(|i| if i % 4 == 3 { 0.0 } else { 1.0 / rows as f32 }).collect();
        let (mut want, mut dwant) = (vec![], vec![]);
        for ((row, token), weight) in flat(&logits).chunks_exact(vocab).zip(&tokens).zip(&weights) {
            let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            want.push(*weight * (total.ln() - f64::from(row[*token as usize])) as f32);
            let grad = |(i, logit): (usize, &f32)| {
                let one = if i == *token as usize { 1.0 } else { 0.0 };
                *weight * (f64::from(*logit).exp() / total - one) as f32
            };
            dwant.extend(row.iter().enumerate().map(grad));
        }
        let tokens = Tensor::from_vec(tokens, rows, &card()).unwrap();
        let weights = Tensor::from_vec(weights, rows, &card()).unwrap();
        let losses = super::cross_entropy(&logits, &tokens, &weights).unwrap();
        assert_close(&format!("losses of {rows} rows"), &flat(&losses), &want, TOLERANCE);
        assert_close(&format!("gradients of {rows} rows"), &flat(&logits), &dwant, TOLERANCE);
    }
}

#[test]
#[ignore = "needs a card"]
fn adam() {
    let scalars = Step {
        one_minus_beta1: 0.1,
        beta2: 0.99,
        one_minus_beta2: 0.01,
        root_bias2: 0.3,
        eps: 1e-8,
        step_size: 0.02,
        decay: 0.999,
    };
    for len in [1, 33, 70_000] {
        let [p, g, m, v] = [1, 2, 3, 4].map(|seed| place(len, seed, DType::F32, &card()));
        let v = v.abs().unwrap();
        let [before, grad, mean, square] = [&p, &g, &m, &v].map(flat);
        super::adam(&p, &g, &m, &v, &scalars).unwrap();
        let new = |i: usize| {
            let [p, g, m, v] = [before[i], grad[i], mean[i], square[i]].map(f64::from);
            let m = m + f64::from(scalars.one_minus_beta1) * (g - m);
            let v = f64::from(scalars.beta2) * v + f64::from(scalars.one_minus_beta2) * g * g;
            let root = v.sqrt() / f64::from(scalars.root_bias2) + f64::from(scalars.eps);
            [f64::from(scalars.decay) * p - f64::from(scalars.step_size) * m / root, m, v].map(|value| value as f32)
        };
        let new: Vec<[f32; 3]> = (0..len).map(new).collect();
        for (i, (what, got)) in [("parameter", &p), ("mean", &m), ("square", &v)].into_iter().enumerate() {
            let want: Vec<f32> = new.iter().map(|new| new[i]).collect();
            assert_close(&format!("{what} of {len}"), &flat(got), &want, 1e-6);
        }
    }
}

#[test]
#[ignore = "needs a card"]
fn sums() {
    for len in [1, 300, 5000, 1_000_000] {
        let values = noise(len, 1);
        let parts = super::sums(&place(len, 1, DType::F32, &card())).unwrap().to_vec2::<f64>().unwrap();
        let wide = || values.iter().map(|value| f64::from(*value));
        for (i, want) in [wide().sum::<f64>(), wide().map(|value| value * value).sum()].into_iter().enumerate() {
            let got: f64 = parts.iter().map(|part| part[i]).sum();
            assert!((got - want).abs() <= 1e-9 * len as f64, "{len} numbers: {got}, expected {want}");
        }
    }
}

/// x and z side by side, as are dt, B and C; then a_log, D and the bias of dt.
fn scan_shapes([batch, seq, channels, states]: [usize; 4]) -> [Vec<usize>; 5] {
    let rows = [2 * channels, channels + 2 * states].map(|width| vec![batch, seq, width]);
    let [first, second] = rows;
    [first, second, vec![channels, states], vec![channels], vec![channels]]
}

fn scan(v: &[&Tensor], log_step: f64) -> Result<Tensor> {
    let (channels, states) = v[2].dims2()?;
    let (x, z) = (v[0].narrow(2, 0, channels)?, v[0].narrow(2, channels, channels)?);
    let dt = (v[1].narrow(2, 0, channels)? + log_step)?;
    let (b, c) = (v[1].narrow(2, channels, states)?, v[1].narrow(2, channels + states, states)?);
    on_device::selective_scan([&x, &dt, &b, &c, &z], v[2], v[3], v[4])
}

#[test]
#[ignore = "needs a card"]
fn selective_scan() {
    // Odd sizes, borders of chunks, several groups of states, and more chunks than blocks.
    for sizes in [[2, 2, 3, 1], [2, 7, 5, 3], [1, 16, 32, 16], [3, 33, 70, 20], [2, 257, 130, 16], [1100, 9, 130, 4]] {
        for log_step in [-6.0, 0.0, 30.0] {
            let shapes = scan_shapes(sizes);
            let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
            check(&format!("scan with steps of e^{log_step}"), &shapes, |v| scan(v, log_step));
        }
    }
}

#[test]
#[ignore = "needs a card"]
fn the_scan_gives_the_same_bits_each_time() {
    let shapes = scan_shapes([3, 257, 200, 20]);
    let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
    let [first, second] = [0, 1].map(|_| run(DType::F32, &card(), &shapes, |v| scan(v, 0.0)));
    assert_eq!(first, second);
}

#[test]
#[ignore = "needs a card"]
fn ssd() {
    // Batch, positions, heads, width of a head, states.
    for [batch, seq, heads, width, states] in
        [[2, 2, 1, 3, 1], [2, 33, 2, 16, 20], [1, 257, 4, 32, 64], [3, 70, 3, 5, 16]]
    {
        let shapes = [
            vec![batch, seq, heads * width],
            vec![batch, seq, heads],
            vec![batch, seq, states],
            vec![batch, seq, states],
            vec![3, heads],
        ];
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        check(&format!("ssd of {heads} heads, {seq} positions"), &shapes, |v| {
            let params = [0, 1, 2].map(|i| v[4].narrow(0, i, 1)?.squeeze(0)?.contiguous());
            let [a_log, d, bias] = params;
            on_device::ssd([v[0], v[1], v[2], v[3]], &a_log?, &d?, &bias?)
        });
    }
}
