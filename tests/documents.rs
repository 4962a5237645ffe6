//! Evaluation with context: a document that is read piece by piece has the losses of one forward pass.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use mblm::config::MblmConfig;
use mblm::device::composed;
use mblm::model::{Mblm, Reader, Sequences};
use mblm::registry::BlockRegistry;
use mblm::testing::{assert_close, noise, perturb};
use mblm::yaml::Document;
use mblm_lstm as _;

const BLOCKS: [&str; 5] = [
    "{block_type: transformer, attn_head_dims: 4, attn_num_heads: 2, attn_use_rot_embs: true, pos_emb_type: null}",
    "{block_type: transformer, attn_head_dims: 4, attn_num_heads: 2, attn_use_rot_embs: false, pos_emb_type: fixed}",
    "{block_type: mamba1, d_state: 5, d_conv: 4, expand: 2, pos_emb_type: rope}",
    "{block_type: mamba2, d_state: 6, d_conv: 3, expand: 2, headdim: 8}",
    "{block_type: lstm}",
];

/// `block` runs the first of so many stages, Transformers the others.
fn model(block: &str, stages: usize) -> Mblm {
    let lens = &[300, 4, 3][..stages];
    let blocks: Vec<&str> = std::iter::once(block).chain([BLOCKS[1]; 2]).take(stages).collect();
    let yaml = format!(
        "num_tokens: 257\npad_token_id: 256\nhidden_dims: {:?}\nnum_layers: {:?}\nseq_lens: {lens:?}\n\
         train_checkpoint_chunks: null\nblock: [{}]\n",
        vec![8; stages],
        vec![2; stages],
        blocks.join(", "),
    );
    let document = Document::parse(&yaml, "test.yaml").unwrap();
    let config = MblmConfig::from_document(&document, "", &BlockRegistry::builtin().unwrap()).unwrap();
    let model = Mblm::new(&config, 1).unwrap();
    perturb(model.params());
    model
}

fn bytes(len: usize) -> Vec<u32> {
    let ids = noise(len, 3).into_iter().map(|x| ((x + 1.0) * 127.0) as u32);
    // A pad token in the middle, which is not predicted.
    ids.enumerate().map(|(i, id)| if i == 36 { 256 } else { id }).collect()
}

fn reads_as_forward_does(model: &Mblm, what: &str) {
    let bytes = bytes(230);
    let want = model.byte_losses(&Sequences { ids: &bytes, len: bytes.len(), loss_mask: None }).unwrap();
    let unit = Reader::new(model).unwrap().unit();
    for pieces in [vec![1, 1, 2], vec![3, 6], vec![]] {
        let mut reader = Reader::new(model).unwrap();
        let (mut got, mut rest) = (vec![], &bytes[..]);
        for units in pieces {
            let (piece, after) = rest.split_at(units * unit);
            got.extend(reader.losses(piece).unwrap());
            rest = after;
        }
        got.extend(reader.losses(rest).unwrap());
        let known = |losses: &[f32]| losses.iter().copied().filter(|loss| !loss.is_nan()).collect::<Vec<_>>();
        assert!(got[36].is_nan() && got.len() == bytes.len());
        assert_close(what, &known(&got), &known(&want), 2e-5);
    }
}

#[test]
fn pieces_have_the_losses_of_one_pass() {
    for block in BLOCKS {
        for stages in 1..=3 {
            let model = model(block, stages);
            let what = format!("{block} of {stages}");
            reads_as_forward_does(&model, &what);
            composed(|| reads_as_forward_does(&model, &format!("{what}, composed")));
        }
    }
}

#[test]
fn a_reader_says_where_it_ends() {
    let model = model(BLOCKS[1], 2);
    let mut reader = Reader::new(&model).unwrap();
    assert_eq!((reader.limit(), reader.unit()), (Some(1200), 4));
    reader.losses(&[1; 1198]).unwrap();
    let error = reader.losses(&[1]).unwrap_err().to_string();
    assert!(error.contains("a multiple of 4 bytes"), "{error}");
    let error = Reader::new(&model).unwrap().losses(&[1; 1201]).unwrap_err().to_string();
    assert!(error.contains("1201 bytes are more than the context of 1200 bytes"), "{error}");
    let error = Reader::new(&model).unwrap().losses(&[300]).unwrap_err().to_string();
    assert!(error.contains("outside the vocabulary"), "{error}");
}

const RUN: &str = "
io: {name_model: toy, output_dir: runs, dataset_dir: books, dataset_id: bytes, num_models_to_save: 1, validate_amount: 2,
  log_train_loss_amount: 10}
train: {target_elements: 20000, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 3, learning_rate: 0.01,
  gradient_clipping: 1.0, gradient_accumulate_every: 1, shuffle_train: true}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 64, hidden_dims: [32, 32], num_layers: [1, 1], seq_lens: [32, 4],
  block: [{block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16},
    {block_type: transformer, attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}]}
";

/// Exit code, standard output and error.
fn mblm(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("mblm").unwrap().current_dir(folder).args(args).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn run(folder: &Path, set: &[&str]) -> String {
    let args: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
    let (code, _, error) = mblm(folder, &[&["train", "run.yaml"], &args[..]].concat());
    assert_eq!(code, 0, "{error}");
    error.lines().find_map(|line| line.strip_prefix("run: ")).unwrap().into()
}

#[test]
fn documents_are_evaluated_with_the_context_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let books = folder.path().join("books");
    fs::create_dir(&books).unwrap();
    let text = |from: usize| (from..).map(|n| format!("{n} times 3 is {}\n", 3 * n)).take(400).collect::<String>();
    fs::write(books.join("a.txt"), &text(0)[..6400]).unwrap();
    fs::write(books.join("b.txt"), &text(300)[..640]).unwrap();
    fs::write(folder.path().join("run.yaml"), RUN).unwrap();
    let run_of = |set: &[&str]| run(folder.path(), set);
    let model = run_of(&[]);
    let eval = |run: &str, args: &[&str]| -> serde_json::Value {
        let (code, out, error) = mblm(folder.path(), &[&["eval", run, "books", "--json"], args].concat());
        assert_eq!(code, 0, "{error}");
        serde_json::from_str(&out).unwrap()
    };
    let loss = |json: &serde_json::Value| json["loss"].as_f64().unwrap();
    let none = eval(&model, &[]);
    // Windows that move by their length are the sequences without context.
    let apart = eval(&model, &["--context", "slide", "--stride", "64"]);
    assert_eq!((apart["bytes"].as_u64(), none["bytes"].as_u64()), (Some(7040), Some(7040)));
    assert!((loss(&apart) - loss(&none)).abs() < 1e-5, "{apart} {none}");
    let [slide, whole] =
        [vec!["slide", "--stride", "4"], vec!["whole"]].map(|how| eval(&model, &[&["--context"], &how[..]].concat()));
    for json in [&slide, &whole] {
        assert!(json["bytes"] == 7040 && loss(json) < loss(&none) - 0.05, "{json} {none}");
        let sum: u64 = json["depths"].as_array().unwrap().iter().map(|depth| depth["bytes"].as_u64().unwrap()).sum();
        assert_eq!(
            (sum, json["depths"][1]["from"].as_u64(), json["files"][1]["bytes"].as_u64()),
            (7040, Some(256), Some(640))
        );
        let words = fs::read_to_string(books.join("a.txt")).unwrap().split_whitespace().count()
            + fs::read_to_string(books.join("b.txt")).unwrap().split_whitespace().count();
        let perplexity = (loss(json) * 7040.0 / words as f64).exp();
        assert!(json["words"] == words && (json["word_perplexity"].as_f64().unwrap() / perplexity - 1.0).abs() < 1e-9);
    }
    // No further than asked, whatever the file.
    for context in ["whole", "slide"] {
        for (most, files) in [(1000, 1), (6405, 2)] {
            let json = eval(&model, &["--context", context, "--max-bytes", &most.to_string()]);
            assert_eq!((json["bytes"].as_u64(), json["files"].as_array().map(Vec::len)), (Some(most), Some(files)));
        }
    }
    // A window of all that the fixed positions reach, moved by that: whole documents.
    let fixed = "params.block[0]={block_type: transformer, attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}";
    let limited = run_of(&[fixed, "params.input_seq_len=128"]);
    let (whole, none) = (eval(&limited, &["--context", "whole"]), eval(&limited, &[]));
    assert!((loss(&whole) - loss(&none)).abs() < 1e-5 && whole["begins_anew_after"] == 128, "{whole} {none}");
    let (_, out, _) = mblm(folder.path(), &["eval", &limited, "books", "--context", "whole", "--csv", "depths.csv"]);
    assert!(out.contains("files longer than 128 bytes") && out.contains("perplexity per word"), "{out}");
    let csv = fs::read_to_string(folder.path().join("depths.csv")).unwrap();
    assert!(csv.lines().any(|line| line.starts_with("document,,256,512,")), "{csv}");

    let refused = |run: &str, args: &[&str], want: &str| {
        let (code, _, error) = mblm(folder.path(), &[&["eval", run, "books"], args].concat());
        assert!(code == 2 && error.contains(want), "{args:?}: {code} {error}");
    };
    refused(&model, &["--context", "slide", "--stride", "0"], "the stride is 0; expected 1 to 64");
    refused(&model, &["--context", "slide", "--stride", "65"], "the stride is 65");
    refused(&model, &["--stride", "3"], "--stride is for --context slide");
    refused(&model, &["--context", "whole", "--positions"], "--positions is for --context none");
    let words = run_of(&["params.patching=spacelike"]);
    refused(&words, &["--context", "whole"], "only for patches of full length");
}
