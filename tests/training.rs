//! Training as a user meets it: encoders, the test split, and what ends a run early.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use mblm::gemm::Precision;

const TRAIN: &str = "
io: {name_model: toy, output_dir: runs, dataset_dir: books, dataset_id: DATASET, num_models_to_save: 2,
  validate_amount: 4, log_train_loss_amount: 10}
train: {target_elements: 40000, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 3,
  learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 1, shuffle_train: true}
";

const ENCODER: &str = "
params:
  mask_token_id: 257
  input_seq_len: 64
  mblm_config:
    {num_tokens: 258, pad_token_id: 256, hidden_dims: [32, 32], num_layers: [1, 1], seq_lens: [16, 4],
    block: {block_type: transformerEncoder, attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}}
";

const GENERATIVE: &str = "
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 64, hidden_dims: [32, 32], num_layers: [1, 1],
  seq_lens: [16, 4], block: {block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16}}
";

/// A folder with books to train, validate and test on, and a configuration.
fn workplace(params: &str, dataset: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (i, split) in ["train", "validation", "test"].iter().enumerate() {
        let books = folder.path().join("books").join(split);
        fs::create_dir_all(&books).unwrap();
        let lines = if i == 0 { 1000 } else { 100 };
        let text: String = (0..lines).map(|n| format!("{} times {n} is {}\n", i + 2, (i + 2) * n)).collect();
        fs::write(books.join("1.txt"), text).unwrap();
    }
    fs::write(folder.path().join("run.yaml"), TRAIN.replace("DATASET", dataset) + params).unwrap();
    folder
}

/// Exit code, standard output and error.
fn mblm(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("mblm").unwrap().current_dir(folder).args(args).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn train(folder: &Path, set: &[&str]) -> (PathBuf, String) {
    let set: Vec<&str> = set.iter().flat_map(|assignment| ["--set", assignment]).collect();
    let (code, out, err) = mblm(folder, &[&["train", "run.yaml"], &set[..]].concat());
    assert_eq!(code, 0, "{err}");
    let run = err.lines().find_map(|line| line.strip_prefix("run: ")).unwrap();
    (folder.join(run), out + &err)
}

/// The losses of a kind in `loss.csv`.
fn losses(run: &Path, kind: &str) -> Vec<f64> {
    let text = fs::read_to_string(run.join("loss.csv")).unwrap();
    let rows = text.lines().map(|line| line.split(',').collect::<Vec<_>>()).filter(|row| row[3] == kind);
    rows.map(|row| row[7].parse().unwrap()).collect()
}

/// The mean loss that `mblm eval` finds on the test split, and of how many bytes.
fn loss_of(folder: &Path, run: &str, more: &[&str]) -> (f64, u64) {
    let (code, out, error) = mblm(folder, &[&["eval", run, "books/test", "--json"], more].concat());
    assert_eq!(code, 0, "{error}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    (json["loss"].as_f64().unwrap(), json["bytes"].as_u64().unwrap())
}

#[test]
fn evaluation_counts_what_is_predicted_in_batches_of_any_size() {
    let folder = workplace(GENERATIVE, "pg19");
    // The space is the pad token, and stands in every line; some sequences are nothing but that.
    let test = folder.path().join("books/test/1.txt");
    let text = fs::read_to_string(&test).unwrap() + &" ".repeat(640);
    fs::write(&test, &text).unwrap();
    let (run, _) = train(folder.path(), &["params.pad_token_id=32", "train.target_elements=4096"]);
    let run = run.to_str().unwrap();
    let (loss, bytes) = loss_of(folder.path(), run, &[]);
    assert_eq!(bytes, text.bytes().filter(|byte| *byte != b' ').count() as u64);
    for more in [&["--batch", "1"][..], &["--batch", "3"], &["--batch", "100"], &["--files"], &["--positions"]] {
        let (other, count) = loss_of(folder.path(), run, more);
        assert!((other - loss).abs() < 1e-5 && count == bytes, "{more:?}: {other} of {count}, {loss} of {bytes}");
    }
    fs::write(&test, " ".repeat(640)).unwrap();
    for more in [&[][..], &["--files"]] {
        let (code, _, error) = mblm(folder.path(), &[&["eval", run, "books/test"], more].concat());
        assert!(code == 2 && error.contains("has no byte to predict: all bytes are the pad token"), "{error}");
    }
}

#[test]
fn an_encoder_learns_to_restore_masked_bytes() {
    for dataset in ["pg19masked", "bytes"] {
        let folder = workplace(ENCODER, dataset);
        let (run, said) = train(folder.path(), &["train.masking_proba=0.2"]);
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        for line in metrics.lines().filter(|line| line.contains(r#""kind":"train""#)) {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let norm = |stage: usize| line[format!("stage{stage}/activation_norm")].as_f64();
            assert!(norm(1).is_some_and(|n| n > 0.1) && norm(2).is_some_and(|n| n > 0.1), "{line}");
            assert!(norm(3).is_none(), "{line}");
        }
        let valid = losses(&run, "valid");
        // Bytes that are guessed from their frequency alone cost about 2.6 nats.
        assert!(valid[0] > 4.0 && *valid.last().unwrap() < 2.4, "{valid:?}\n{said}");
        let run = run.to_str().unwrap();
        let eval = |more: &str| mblm(folder.path(), &["eval", run, "books/test", "--json", "--max-bytes", more]).1;
        assert_eq!(eval("1024"), eval("1024"), "the same bytes are masked each time");
        let loss = |batch: &str| loss_of(folder.path(), run, &["--batch", batch, "--max-bytes", "1024"]);
        assert!((loss("1").0 - loss("5").0).abs() < 1e-5, "and in batches of any size");
        let (code, _, error) = mblm(folder.path(), &["generate", run, "--prompt", "2"]);
        assert!(code == 2 && error.contains("is an encoder, which cannot generate"), "{error}");
        let (code, table, _) = mblm(folder.path(), &["inspect", "run.yaml", "--set", "train.masking_proba=0.2"]);
        assert!(code == 0 && table.contains("transformerEncoder"), "{table}");
    }
}

#[test]
fn masking_is_for_encoders_and_only_for_these() {
    let cases = [
        (ENCODER, "train.early_stop=3", "train: missing field `masking_proba`"),
        (ENCODER, "train.masking_proba=0", "train.masking_proba: expected a share above 0, up to 1, found 0"),
        (GENERATIVE, "train.masking_proba=0.1", "train.masking_proba: only encoders"),
        (GENERATIVE, "train.precision=half", "train.precision: unknown value \"half\"; expected"),
        (GENERATIVE, "train.betas=[0.9, 1.0]", "train.betas: expected two rates from 0 to below 1, found [0.9, 1]"),
    ];
    for (params, set, want) in cases {
        let folder = workplace(params, "pg19");
        let (code, _, error) = mblm(folder.path(), &["train", "run.yaml", "--set", set]);
        assert!(code == 2 && error.contains(want), "{error}");
    }
}

#[test]
fn bf16_learns_as_f32_does() {
    let folder = workplace(GENERATIVE, "pg19");
    if !Precision::Bf16.is_available() {
        let (code, _, error) = mblm(folder.path(), &["train", "run.yaml", "--set", "train.precision=bf16"]);
        let want = "train.precision: expected f32: this CPU has no AVX-512 BF16 instructions, found bf16";
        let (inspected, _, _) = mblm(folder.path(), &["inspect", "run.yaml", "--set", "train.precision=bf16"]);
        assert_eq!(inspected, 0, "what does not train does not need it");
        return assert!(code == 2 && error.contains(want), "{error}");
    }
    let curve = |precision: &str| losses(&train(folder.path(), &[&format!("train.precision={precision}")]).0, "train");
    let (f32, bf16) = (curve("f32"), curve("bf16"));
    assert_eq!(f32.len(), bf16.len());
    assert!(f32[0] > 5.0 && *f32.last().unwrap() < 2.0, "{f32:?}");
    for (f32, bf16) in f32.iter().zip(&bf16) {
        assert!((f32 - bf16).abs() < 0.03, "{f32} and {bf16}");
    }
    assert_ne!(f32, bf16, "bf16 was not used");
}

#[test]
fn the_best_model_is_measured_on_the_test_split() {
    let folder = workplace(GENERATIVE, "pg19");
    let (run, said) = train(folder.path(), &["train.max_eval_steps=null"]);
    let [test] = losses(&run, "test")[..] else { panic!("one test, in {said}") };
    assert!(said.contains(&format!("test loss {test:.4}")), "{said}");
    let newest = run.join("checkpoints").read_dir().unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let (_, json, _) = mblm(folder.path(), &["eval", newest.to_str().unwrap(), "books/test", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    // The split's last bytes, which do not fill a sequence, are no part of the test.
    assert!((json["loss"].as_f64().unwrap() - test).abs() < 0.01, "{json} and {test}");
    // Resumed after its end, the run has nothing left to do, and stays as it is.
    let files =
        || ["loss.csv", "metrics.jsonl", "train.log", "config.yaml"].map(|name| fs::read(run.join(name)).unwrap());
    let before = files();
    let (code, _, error) = mblm(folder.path(), &["train", "--resume", run.to_str().unwrap()]);
    assert!(code == 0 && error.contains("finished: all 79 batches are trained"), "{error}");
    let changed = ["train", "--force", "--set", "train.early_stop=9", "--resume", run.to_str().unwrap()];
    let (code, _, error) = mblm(folder.path(), &changed);
    assert!(
        code == 0 && error.contains("nothing is left to train, so the changed configuration is discarded"),
        "{error}"
    );
    assert!(files() == before);
    // One that ended before its test makes up for it.
    let rows = fs::read_to_string(run.join("loss.csv")).unwrap();
    let untested: String = rows.lines().filter(|row| !row.contains(",test,")).map(|row| format!("{row}\n")).collect();
    fs::write(run.join("loss.csv"), untested).unwrap();
    assert_eq!(mblm(folder.path(), &["train", "--resume", run.to_str().unwrap()]).0, 0);
    assert_eq!(losses(&run, "test"), [test]);
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches(r#""kind":"test""#).count(), 1, "{metrics}");
}

#[test]
fn a_run_ends_early_where_asked() {
    let folder = workplace(GENERATIVE, "pg19");
    // Steps so small that nothing becomes better.
    let (run, said) =
        train(folder.path(), &["train.learning_rate=1e-30", "train.early_stop=2", "train.validate_every=5"]);
    let valid = losses(&run, "valid");
    assert!(valid.len() == 3 && said.contains("finished: saved"), "{valid:?}\n{said}");

    let (run, said) = train(folder.path(), &["train.max_seconds=1e-3"]);
    assert!(said.contains("time limit reached: saved") && losses(&run, "train").len() <= 1, "{said}");
    assert!(said.contains("time limit of 0.001 s reached after batch "), "{said}");
    assert_eq!((losses(&run, "valid").len(), losses(&run, "test").len()), (1, 1), "it measures what it has: {said}");
    let (code, _, error) = mblm(folder.path(), &["train", "--resume", run.to_str().unwrap()]);
    assert!(code == 0 && error.contains("time limit reached: saved"), "a little further each time: {error}");
}

#[test]
fn runs_are_chained_by_their_configuration() {
    let folder = workplace(GENERATIVE, "pg19");
    let (first, _) = train(folder.path(), &[]);
    fs::copy(first.join("config.yaml"), folder.path().join("run.yaml")).unwrap();
    let (second, said) = train(folder.path(), &["train.warmup_steps_perc=0"]);
    assert!(said.contains("starts from the weights of"), "{said}");
    let (before, after) = (losses(&first, "valid"), losses(&second, "valid"));
    assert!(after[0] < before[0] - 0.5, "it begins where the first ended: {before:?}, {after:?}");
    let text = |run: &Path, name: &str| fs::read_to_string(run.join(name)).unwrap();
    let places: Vec<_> =
        text(&second, "loss.csv").lines().skip(1).map(|row| row.split(',').nth(4).unwrap().to_string()).collect();
    let yaml = text(&first, "config.yaml");
    let epoch = yaml.lines().find_map(|line| line.trim().strip_prefix("next_epoch_index: ")).unwrap();
    assert_eq!(places[0], epoch, "it goes on in the data");
    let numbers = |run: &Path, name: &str, column: usize| -> Vec<u64> {
        let rows = text(run, name);
        rows.lines().filter_map(|row| row.split(',').nth(column)?.parse().ok()).collect() // the test has -1
    };
    let last = *numbers(&first, "loss.csv", 6).last().unwrap();
    let batches = numbers(&second, "loss.csv", 6);
    assert_eq!((batches[0], batches.last()), (last + 1, Some(&(2 * last + 1))), "cum_batch goes on");
    assert_eq!(numbers(&second, "timemem.csv", 0)[0], last + 1, "and its first batches are measured");
    assert!(text(&second, "metrics.jsonl").starts_with(&format!("{{\"batch\":{},", last + 1)));

    // Resumed, it still knows what it began with and where.
    let began = |run: &Path| {
        let yaml = text(run, "config.yaml");
        yaml.lines().find_map(|line| line.trim().strip_prefix("resumed_from: ")).map(String::from)
    };
    assert!(began(&second).unwrap().starts_with('/'), "{:?}", began(&second));
    let (short, _) = train(folder.path(), &["train.max_seconds=1e-3"]);
    assert_eq!(mblm(folder.path(), &["train", "--resume", short.to_str().unwrap()]).0, 0);
    assert_eq!((began(&short), numbers(&short, "loss.csv", 6)[0]), (began(&second), last + 1));

    // The weights of before are kept as the best, if nothing becomes better.
    let (third, _) = train(folder.path(), &["train.learning_rate=1e-30"]);
    let (_, list, _) = mblm(folder.path(), &["checkpoint", "list", third.to_str().unwrap()]);
    assert!(list.lines().any(|line| line.starts_with("batch-0000000000 ") && line.contains("best")), "{list}");

    let gone = ["train", "run.yaml", "--set", "resume.checkpoint_file=nowhere"];
    let (code, _, error) = mblm(folder.path(), &gone);
    assert!(code == 2 && error.contains("resume.checkpoint_file: nowhere does not exist"), "{error}");
    let far = ["train", "run.yaml", "--set", "resume.next_batch_index=100000"];
    let (code, _, error) = mblm(folder.path(), &far);
    assert!(code == 2 && error.contains("resume.next_batch_index: expected a batch of epoch"), "{error}");

    // A run that is moved, and one that is copied, have their own weights.
    let (moved, copied) = (folder.path().join("moved"), folder.path().join("copied"));
    fs::create_dir_all(copied.join("checkpoints")).unwrap();
    fs::copy(first.join("config.yaml"), copied.join("config.yaml")).unwrap();
    fs::rename(&first, &moved).unwrap();
    let chain =
        |run: &str| mblm(folder.path(), &["train", &format!("{run}/config.yaml"), "--set", "train.max_seconds=1e-3"]);
    let (code, _, error) = chain("moved");
    assert!(code == 0 && error.contains("starts from the weights of moved/checkpoints/batch-"), "{error}");
    let (code, _, error) = chain("copied");
    assert!(code == 2 && error.contains("resume.checkpoint_file: copied/checkpoints/batch-"), "{error}");
}

#[test]
fn more_memory_than_there_is_is_refused() {
    let folder = workplace(GENERATIVE, "pg19");
    // One batch of a sequence that the data have, as wide as no machine is.
    let set = ["train.batch_size=30000000", "train.target_elements=1", "train.target_elements_strategy=batch"];
    let set: Vec<&str> = set.iter().flat_map(|assignment| ["--set", assignment]).collect();
    let (code, _, error) = mblm(folder.path(), &[&["train", "run.yaml"], &set[..]].concat());
    assert!(code == 2 && error.contains("params: training needs at least 286 GiB, and this machine has"), "{error}");
    assert!(error.contains("train.batch_size x params.input_seq_len = 30000000 x 64 bytes"), "{error}");
    assert!(!folder.path().join("runs").exists(), "nothing is made");
}

#[test]
fn a_loss_that_is_not_finite_names_the_stage() {
    let folder = workplace(GENERATIVE, "pg19");
    let (code, _, error) = mblm(folder.path(), &["train", "run.yaml", "--set", "train.learning_rate=1e30"]);
    let line = error.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert_eq!(code, 1, "{error}");
    for part in ["training stopped at gradient step", "the output of stage 1 (mamba2) is NaN"] {
        assert!(line.contains(part), "{error}");
    }
}

const WORDS: [&str; 2] = ["--set", "params.patching=spacelike"];

#[test]
fn patches_that_follow_the_content_are_trained_on_resumed_and_evaluated() {
    let folder = workplace(GENERATIVE, "pg19");
    let (whole, said) = train(folder.path(), &["params.patching=spacelike"]);
    assert!(said.contains("patches: ") && said.contains("sequences of 16 patches"), "{said}");
    // All bytes of the test split are predicted once, whatever the batches.
    let run = whole.to_str().unwrap();
    let all = fs::metadata(folder.path().join("books/test/1.txt")).unwrap().len();
    let (loss, bytes) = loss_of(folder.path(), run, &[]);
    let (again, same) = loss_of(folder.path(), run, &["--batch", "3"]);
    assert!(bytes == all && same == all && (loss - again).abs() < 1e-5, "{loss} {again} {bytes} {same} of {all}");
    let (code, out, error) = mblm(folder.path(), &["eval", run, "books/test", "--positions", "--json"]);
    assert_eq!(code, 0, "{error}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let of = |stage: usize| json["stages"][stage].as_array().unwrap().iter().map(|p| p["bytes"].as_u64().unwrap());
    assert_eq!((of(0).sum::<u64>(), of(1).sum::<u64>(), of(1).count()), (all, all, 4));
    assert!(of(1).next() > of(1).next_back(), "few patches are full");

    // Stopped by its time and trained on, a run has the same bits.
    let first = ["train.max_seconds=0.05", "params.patching=spacelike", "io.name_model=parts"];
    let (parts, said) = train(folder.path(), &first);
    assert!(said.contains("time limit reached"), "{said}");
    let state = |run: &Path| -> serde_json::Value {
        let newest = fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
        serde_json::from_str(&fs::read_to_string(newest.join("state.json")).unwrap()).unwrap()
    };
    let seen = state(&parts)["batches"].as_u64().unwrap();
    let parts = parts.to_str().unwrap();
    let args = ["train", "--resume", parts, "--set", "train.max_seconds=null"];
    let (code, _, error) = mblm(folder.path(), &[&args[..], &["--force"]].concat());
    assert_eq!(code, 0, "{error}");
    let (one, two) = (state(&whole), state(Path::new(parts)));
    assert!(seen < one["batches"].as_u64().unwrap(), "{seen}");
    for field in ["batches", "bytes_seen", "next", "sequence_bytes", "avg_grad"] {
        assert_eq!(one[field], two[field], "{field}");
    }
    let bytes = one["sequence_bytes"].as_u64().unwrap();
    assert!((20..60).contains(&bytes), "{bytes} bytes of 16 patches of at most 4");
    assert_eq!(one["bytes_seen"], one["sequences_seen"].as_u64().unwrap() * bytes);

    // Another rule is refused, here and as the beginning of a new run.
    let (code, _, error) =
        mblm(folder.path(), &["train", "--resume", run, "--force", "--set", "params.patching=fixed"]);
    assert!(code == 2 && error.contains("the patches are not those of"), "{error}");
    assert!(error.contains("params.patching") && !error.contains("--force"), "{error}");
    let config = format!("{run}/config.yaml");
    let (code, _, error) = mblm(folder.path(), &["train", &config, "--set", "params.patching=fixed"]);
    let want = "params.patching: found fixed, expected [{\"patching_type\":\"spacelike\"}], with which";
    assert!(code == 2 && error.contains(want), "{error}");
}

#[test]
fn a_rule_that_does_not_fit_the_data_is_noticed() {
    let folder = workplace(GENERATIVE, "pg19");
    let never = ["--set", "params.patching={patching_type: delimiters, bytes: [0]}"];
    let (code, out, error) = mblm(folder.path(), &[&["inspect", "run.yaml"][..], &never].concat());
    assert!(code == 0 && out.contains("100.0% end because they are full"), "{out}{error}");
    assert!(out.contains("warning: params.patching: 100% of the patches end because they are full"), "{out}");
    let (code, out, error) = mblm(folder.path(), &[&["inspect", "run.yaml", "--json"][..], &WORDS].concat());
    assert_eq!(code, 0, "{error}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let mean = json["patches"]["means"][0].as_f64().unwrap();
    let histogram: Vec<f64> =
        json["patches"]["histogram"].as_array().unwrap().iter().map(|count| count.as_f64().unwrap()).collect();
    let weighed: f64 = histogram.iter().zip(1..).map(|(count, len)| count * f64::from(len)).sum();
    assert!((weighed / histogram.iter().sum::<f64>() - mean).abs() < 0.05 && mean < 4.0, "{mean} {histogram:?}");
    assert_eq!(json["stages"][1]["mean_len"].as_f64().unwrap(), mean);
}
