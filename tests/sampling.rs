//! `mblm generate` and `mblm eval` on a trained run: several samples, JSON, prompts through a pipe, losses in parts.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use assert_cmd::Command;
use serde_json::Value;

const CONFIG: &str = "
io: {name_model: toy, output_dir: runs, dataset_dir: data, dataset_id: bytes, num_models_to_save: 1,
  validate_amount: 1, log_train_loss_amount: 2}
train: {target_elements: 20000, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 1,
  learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 1}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 64, hidden_dims: [32, 32], num_layers: [1, 1],
  seq_lens: [16, 4], block: {block_type: mamba2, d_state: 16, d_conv: 4, expand: 2, headdim: 16}}
";

/// A folder with data and a run, trained once for all tests.
static PLACE: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    for (name, lines) in [("a.txt", 200), ("b, c.txt", 50)] {
        fs::write(data.join(name), "one two three four five\n".repeat(lines)).unwrap();
    }
    fs::write(folder.path().join("run.yaml"), CONFIG).unwrap();
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.current_dir(&folder).args(["train", "run.yaml"]).assert().success();
    let run = folder.path().join("runs").read_dir().unwrap().next().unwrap().unwrap().path();
    (folder, run)
});

/// Exit code, standard output and error of a command on the run.
fn mblm(command: &str, args: &[&str], input: &str) -> (i32, String, String) {
    let (folder, run) = &*PLACE;
    let mut mblm = Command::cargo_bin("mblm").unwrap();
    let output = mblm.current_dir(folder).arg(command).arg(run).args(args).write_stdin(input).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn several_samples_have_seeds_of_their_own() {
    let args = ["--prompt", "one ", "--max-bytes", "20", "--samples", "3", "--seed", "5", "--temperature", "2"];
    let (code, text, said) = mblm("generate", &args, "");
    assert_eq!(code, 0, "{said}");
    let samples: Vec<&str> = text.split("── sample ").skip(1).collect();
    assert_eq!(samples.len(), 3, "{text}");
    for (n, sample) in samples.iter().enumerate() {
        assert!(sample.starts_with(&format!("{}, seed {} ──\none ", n + 1, n + 5)), "{sample}");
    }
    let made = |n: usize| samples[n].split_once("one ").unwrap().1;
    assert!(made(0) != made(1) && made(1) != made(2), "{text}");
    assert!(said.starts_with("60 bytes (3 samples), ") && said.ends_with(" bytes/s\n"), "{said}");
    assert_eq!(mblm("generate", &args, "").1, text, "the same seed gives the same samples");
    let (code, _, said) = mblm("generate", &[&args[..], &["--format", "raw"]].concat(), "");
    assert!(code == 2 && said.contains("--format raw supports only one sample"), "{said}");
}

#[test]
fn json_holds_the_samples_of_the_same_seed() {
    let args = ["--prompt", "one ", "--max-bytes", "12", "--seed", "7"];
    let (_, plain, _) = mblm("generate", &args, "");
    let (code, json, said) = mblm("generate", &[&args[..], &["--json"]].concat(), "");
    let json: Value = serde_json::from_str(&json).expect(&said);
    let sample = &json["samples"][0];
    assert_eq!(
        (code, &json["prompt"], &sample["seed"], &sample["ended"]),
        (0, &"one ".into(), &7.into(), &"max_bytes".into())
    );
    assert_eq!(format!("one {}\n", sample["text"].as_str().unwrap()), plain);
    let bytes: Vec<u8> = sample["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), sample["text"].as_str().unwrap());
    let (_, json, _) = mblm("generate", &["--json", "--samples", "2", "--prompt", "one"], "");
    let json: Value = serde_json::from_str(&json).unwrap();
    // Up to the end of the context, 64 bytes.
    assert_eq!(
        (json["samples"][1]["ids"].as_array().unwrap().len(), &json["samples"][1]["ended"]),
        (61, &"context_length".into())
    );
}

#[test]
fn a_number_below_zero_is_a_value_and_no_option() {
    for (option, want) in [
        ("--temperature", "temperature: expected a number of at least 0, found -1"),
        ("--top-p", "top_p: expected a number in [0, 1], found -1"),
        ("--max-bytes", "invalid value '-1' for '--max-bytes <N>'"),
    ] {
        let (code, _, said) = mblm("generate", &["--prompt", "a", option, "-1"], "");
        assert!(code == 2 && said.contains(want) && !said.contains("tip:"), "{said}");
    }
}

#[test]
fn a_prompt_longer_than_the_context_asks_how_far_to_go_on() {
    let prompt = "o".repeat(70);
    let (code, _, said) = mblm("generate", &["--prompt", &prompt], "");
    let want =
        "the prompt has 70 bytes, more than the context of 64; this model can go on past its context, so say for";
    assert!(code == 2 && said.contains(want), "{said}");
    let (code, text, said) = mblm("generate", &["--prompt", &prompt, "--max-bytes", "4", "--no-prompt"], "");
    assert!(code == 0 && !text.is_empty() && said.starts_with("4 bytes (as many as asked for)"), "{said}");
}

#[test]
fn data_that_cannot_be_read_are_named_as_they_were_given() {
    let (code, _, said) = mblm("eval", &["none.txt"], "");
    assert!(
        code == 2 && said.starts_with("error: \"none.txt\" does not exist; expected a file, a folder or"),
        "{said}"
    );
}

#[test]
fn prompts_come_one_after_another() {
    let input =
        "one \n\n:temperature 0\ntwo\\n\n:max-bytes 3\ntwo\\n\n:top-x 3\n:temperature -1\n:help\n:quit\nthree\n";
    let (code, text, said) = mblm("generate", &["--interactive", "--max-bytes", "9"], input);
    assert_eq!(code, 0, "{said}");
    let answers: Vec<&str> = text.split("\ntwo\n").collect();
    assert_eq!(answers.len(), 3, "{text}");
    // The first text, and the same with 9 bytes more.
    let first = &answers[0][..13];
    assert!(
        first.starts_with("one ") && answers[0][14..].starts_with(first) && answers[0].len() == 13 + 1 + 22,
        "{text}"
    );
    assert_eq!((answers[1].len(), answers[2].len()), (9, 3 + 1));
    assert!(answers[1].starts_with(answers[2].trim_end_matches('\n')), "both greedy: {text}");
    let speeds: Vec<&str> = said.lines().filter(|line| line.contains(" bytes (as many as asked for), ")).collect();
    assert_eq!(speeds.len(), 4, "{said}");
    for want in [
        "unknown setting `top-x`; did you mean `top-k`?",
        "temperature: expected a number of at least 0, found -1",
        "end the session, as Ctrl-D does",
    ] {
        assert!(said.contains(want), "{said}");
    }
    assert!(!text.contains("three"), "after :quit: {text}");
}

#[test]
fn the_loss_is_told_by_file_and_position() {
    let csv = PLACE.0.path().join("losses.csv");
    let args = ["data", "--json", "--csv", csv.to_str().unwrap()];
    let (code, json, said) = mblm("eval", &args, "");
    let json: Value = serde_json::from_str(&json).expect(&said);
    let (_, plain, _) = mblm("eval", &args[..2], "");
    let plain: Value = serde_json::from_str(&plain).unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    assert_eq!((code, &json["bytes"]), (0, &6000.into()));
    assert!((number(&json["loss"]) - number(&plain["loss"])).abs() < 1e-5, "{json} {plain}");
    // Weighed by their bytes, the parts give the whole.
    let mean = |parts: &Value| {
        let parts = || parts.as_array().unwrap().iter();
        let bytes: f64 = parts().map(|part| number(&part["bytes"])).sum();
        (bytes, parts().map(|part| number(&part["bytes"]) * number(&part["loss"])).sum::<f64>() / bytes)
    };
    for parts in [&json["files"], &json["stages"][0], &json["stages"][1]] {
        let (bytes, loss) = mean(parts);
        assert!(bytes == 6000.0 && (loss - number(&json["loss"])).abs() < 1e-9, "{parts}");
    }
    assert_eq!((json["stages"][0].as_array().unwrap().len(), json["stages"][1].as_array().unwrap().len()), (16, 4));
    // A patch's first byte knows of the patches before it, the first of a sequence of nothing.
    assert!(number(&json["stages"][0][0]["bpb"]) > number(&json["stages"][0][9]["bpb"]), "{}", json["stages"][0]);

    let text = fs::read_to_string(&csv).unwrap();
    let rows: Vec<&str> = text.lines().collect();
    assert_eq!((rows[0], rows.len()), ("part,name,position,bytes,loss,bpb", 1 + 1 + 2 + 16 + 4));
    assert!(rows[1].starts_with("all,,,6000,") && rows[2].starts_with("file,data/a.txt,,4800,"), "{text}");
    assert!(rows[3].starts_with("file,\"data/b, c.txt\",,1200,") && rows[4].starts_with("stage,1,1,"), "{text}");

    let (_, table, _) = mblm("eval", &["data", "--files", "--positions"], "");
    assert!(table.contains("4800  data/a.txt\n") && table.contains("1500      4 ▇"), "{table}");
}
