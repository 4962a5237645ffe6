//! Writes the report of a made-up study, to look at its page: in light and dark mode, on a phone, with many variants and
//! with names that try to be more than text.
//!
//! ```sh
//! cargo run --release -p mblm-study --example made_up_report -- FOLDER VARIANTS SEEDS
//! ```

use std::error::Error;
use std::path::Path;

use mblm_base::random::mix;
use mblm_study::passage::Passage;
use mblm_study::report::{
    Generation, Measured, Point, Report, Run, RunResult, Scaling, ScalingData, ScalingVariant, Status, Try, Tuned,
    TunedVariant, Variant,
};
use mblm_train::cost::ModelCost;
use mblm_train::journal::metrics::Kind;

const SIZES: [f64; 4] = [3e5, 1e6, 3e6, 1e7];
const BLOCKS: [&str; 3] = ["mamba2", "transformer", "lstm"];
/// The variant whose runs fail.
const LOST: u64 = 8;
const HOSTILE: [&str; 6] = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "a\"b'c&d",
    "مرحبا \u{202e}abc (2)",
    "a name that is so long that it fits nowhere, not in a table, not beside a curve and least of all on a phone",
    "anamewithoutanyspacethatalsofitsnowhereandcannotbebrokenatawordbecausethereisonlyone",
];
const TEXT: &str = "fn main() {\n\tprintln!(\"Grüße, 世界 & <b>\");\n}\n\n/// The definition of a mean: all numbers \
                    together, divided by how many there are.\nfn mean(numbers: &[f64]) -> f64 {\n    \
                    numbers.iter().sum::<f64>() / numbers.len() as f64\n}\n\n</script><script>alert(3)</script>\n";

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, variants, seeds] = &arguments[..] else {
        return Err("expected FOLDER VARIANTS SEEDS".into());
    };
    let (variants, seeds): (u64, u64) = (variants.parse()?, seeds.parse()?);
    let report = Report {
        title: "Made-up study of <blocks> & \"names\"".into(),
        description: Some("Which block is best? All numbers of this page are made up.".into()),
        facts: vec![format!("{variants} variants"), format!("{seeds} seeds"), "2 MB of training each".into()],
        base: name(variants / 2),
        variants: order(variants).map(|i| variant(i, seeds)).collect::<Result<_, _>>()?,
        tuning: vec![tuned(variants)],
        scaling: Scaling::of(scaling(variants.min(9), seeds)),
        ..Report::default()
    };
    report.write(Path::new(folder))?;
    Ok(())
}

/// The variants, best first: the one that failed comes last.
fn order(variants: u64) -> impl Iterator<Item = u64> {
    (0..variants).filter(|i| *i != LOST).chain((LOST < variants).then_some(LOST))
}

/// From 0 to 1, decided by the numbers given.
fn chance(numbers: &[u64]) -> f64 {
    let hash = numbers.iter().fold(7, |hash, number| mix(hash ^ mix(*number)));
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

fn name(i: u64) -> String {
    match i.checked_sub(2).and_then(|i| HOSTILE.get(i as usize)) {
        Some(hostile) => hostile.to_string(),
        None => format!("{} / {} {i}", BLOCKS[i as usize % 3], BLOCKS[i as usize / 3 % 3]),
    }
}

fn variant(i: u64, seeds: u64) -> Result<Variant, Box<dyn Error>> {
    let blocks = [BLOCKS[i as usize % 3], BLOCKS[i as usize / 3 % 3]];
    let (is_lost, flops) = (i == LOST, 80e3 * (1.0 + chance(&[i, 1])));
    let part = |share: f64| serde_json::json!({"parameters": (3e5 * share) as u64, "flops_per_byte": flops * share, "activation_bytes": 1e5});
    let stage = |block: &str| {
        serde_json::json!({"block_type": block, "seq_len": 64, "hidden_dim": 128, "num_layers": 2,
        "parameters": 140_000, "flops_per_byte": flops * 0.45, "activation_bytes": 1e5})
    };
    let cost: ModelCost = serde_json::from_value(serde_json::json!({
        "step": {"batch": 8, "bytes": 512}, "context_len": 512, "num_tokens": 257, "stages": blocks.map(stage),
        "embeddings": part(0.04), "projections": part(0.02), "head": part(0.04), "total": part(1.0), "peak_bytes": 1e8
    }))?;
    Ok(Variant {
        name: name(i),
        runs: (1..=seeds).map(|seed| run(i, seed, is_lost)).collect(),
        cost: Some(cost),
        differences: vec![format!("params.block[0].block_type: {}, now {}", BLOCKS[0], blocks[0])],
        solved: None,
    })
}

fn tuned(variants: u64) -> Tuned {
    let tries = |i: u64| {
        let best = 1.5 * chance(&[i, 6]) - 0.5;
        let loss = |step: i32| 2.2 + 0.03 * i as f64 + 0.05 * (f64::from(step) - best).powi(2);
        let bpb = |step: i32| (step < 3 && (step < 2 || i.is_multiple_of(3))).then(|| loss(step));
        (-2..=3).map(|step| Try { value: 0.002 * 2f64.powi(step), bpb: bpb(step).filter(|_| i != LOST) }).collect()
    };
    let variants = order(variants).map(|i| TunedVariant::new(name(i), tries(i))).collect();
    Tuned { field: "train.learning_rate".into(), seeds: vec![1000], share: 0.5, is_ranked: true, variants }
}

/// Laws that cross; the largest budget of the third variant has its best size at the edge.
fn scaling(variants: u64, seeds: u64) -> ScalingData {
    let point = |i: u64, parameters: f64, flops: f64| {
        let best = (flops / 1e14).sqrt() * if i == 2 { 4e6 } else { 1.2e6 };
        let law = (20.0 - i as f64) * flops.powf(-0.06 + 0.0018 * i as f64);
        let noise = |seed: u64| 0.03 * chance(&[seed, 8]) + 0.01 * chance(&[seed, i, flops as u64, parameters as u64]);
        let loss = law + 0.03 * (parameters / best).ln().powi(2);
        mblm_study::statistics::scaling::Point {
            parameters,
            flops,
            losses: (1..=seeds).map(|seed| (seed, loss + noise(seed))).collect(),
        }
    };
    let points = |i: u64| [1e14, 3e14, 1e15].into_iter().flat_map(move |flops| SIZES.map(|size| point(i, size, flops)));
    ScalingData {
        variants: (0..variants).map(|i| ScalingVariant { name: name(i), points: points(i).collect() }).collect(),
    }
}

fn run(i: u64, seed: u64, is_lost: bool) -> Run {
    let status = if is_lost { Status::Failed("training stopped: the loss is NaN".into()) } else { Status::Finished };
    let mut run = Run::absent(&format!("variant-{i}-seed{seed}"), seed, status);
    let last = 2.2 + 0.03 * i as f64 + 0.02 * chance(&[i, seed]) + 0.04 * chance(&[seed]);
    for step in 1..=(if is_lost { 5u32 } else { 40 }) {
        let bpb = last + 5.0 / f64::from(step) - 5.0 / 40.0;
        let point = |kind, bpb| Point {
            kind,
            bytes: Some(5e4 * f64::from(step)),
            seconds: Some(2.0 * f64::from(step) * (1.0 + chance(&[i]))),
            bpb: Some(bpb),
            rate: Some(2e4 * (1.0 + chance(&[i, 2]))),
            stage_grads: vec![1.0 / bpb, 0.4 * chance(&[u64::from(step), i]) + 0.1],
        };
        run.points.push(point(Kind::Train, bpb + 0.1 * chance(&[i, seed, u64::from(step)])));
        if step % 4 == 0 {
            run.points.push(point(Kind::Valid, bpb));
        }
    }
    let bytes: Vec<u8> = TEXT.bytes().chain([0, 0x1b, 0xff, 0xfe]).cycle().take(2048).collect();
    let bits = |(at, byte): (usize, &u8)| {
        let surprise = 4.0 * chance(&[u64::from(*byte), at as u64 % 97]) * chance(&[at as u64]);
        ((surprise + 1.5 * chance(&[i, at as u64]).powi(3)) * 1e3).round() as f32 / 1e3
    };
    let passage = Passage { bits: bytes.iter().enumerate().map(bits).collect(), bytes };
    let measured = Measured {
        generation: Some(Generation {
            prompt: "fn main() {".into(),
            text: "</pre><script>alert(4)</script>".into(),
            bytes: 31,
            bytes_per_second: 3e3 * (1.0 + chance(&[i, 3])),
        }),
        passage: Some(passage),
        place_bits: (0..8).map(|place| last - 0.1 + (0.8 + 0.2 * chance(&[i, 4])) * (-place as f64).exp()).collect(),
        ..Measured::default()
    };
    let peak_bytes = Some((2e8 * (1.0 + chance(&[i, 5]))) as u64);
    run.result = Some(RunResult { threads: 2, jobs: 1, hosts: vec!["here".into()], peak_bytes, speed: None, measured });
    run
}
