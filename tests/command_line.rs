//! What the program prints, and its exit codes.

use std::fs;

use assert_cmd::Command;

const MODEL: &str = "\
num_tokens: 257
pad_token_id: 256
hidden_dims: [64, 32]
num_layers: [2, 1]
seq_lens: [16, 8]
block:
  block_type: transformer
  attn_head_dims: 16
  attn_num_heads: 2
  attn_use_rot_embs: true
  pos_emb_type: fixed
";

/// Exit code, standard output and error of `mblm` in a folder that holds `model.yaml`.
fn mblm(args: &[&str]) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.yaml"), MODEL).unwrap();
    let output = Command::cargo_bin("mblm").unwrap().current_dir(&folder).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_mistake_in_a_configuration_exits_with_2() {
    let cases = [
        (
            vec!["inspect", "no.yaml"],
            "error: no.yaml: no such file; check the path, which starts at the current directory\n",
        ),
        (
            vec!["inspect", "model.yaml", "--set", "block.attn_num_heads=sixteen"],
            "error: model.yaml: block.attn_num_heads: expected a positive integer, found \"sixteen\" \
             (--set block.attn_num_heads=sixteen)\n",
        ),
        (
            vec!["inspect", "model.yaml", "--set", "pad_token_id"],
            "error: model.yaml: expected NAME=VALUE, such as train.learning_rate=3e-4 (--set pad_token_id)\n",
        ),
        (
            vec!["blocks", "--schema", "transfomer"],
            "error: unknown block type \"transfomer\"; did you mean `transformer`?\n",
        ),
    ];
    for (args, want) in cases {
        assert_eq!(mblm(&args), (2, String::new(), want.into()), "{args:?}");
    }
    assert_eq!(mblm(&["inspect", "model.yaml", "--batch", "0"]).0, 2);
    assert_eq!(mblm(&["inspekt"]).0, 2);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_the_program_lacks_is_an_error_that_says_how_to_build_it() {
    let want = "error: device cuda: this program was built without it; build one that has it with `cargo build --release \
                --features cuda` (docs/devices.md), or use `--device cpu`\n";
    for args in [["bench", "model.yaml", "--device", "cuda:1"], ["doctor", "model.yaml", "--device", "cuda"]] {
        assert_eq!(mblm(&args), (2, String::new(), want.into()), "{args:?}");
    }
    // A training configuration says where it trains.
    let folder = tempfile::tempdir().unwrap();
    let model = MODEL.replace('\n', "\n  ");
    let run = format!(
        "io: {{name_model: toy, output_dir: runs, dataset_dir: data, dataset_id: bytes, num_models_to_save: 1, \
         validate_amount: 1, log_train_loss_amount: 1}}\ntrain: {{target_elements: 1, target_elements_strategy: batch, \
         batch_size: 1, learning_rate: 0.1, gradient_accumulate_every: 1, device: cuda}}\nparams:\n  input_seq_len: \
         64\n  {model}\n"
    );
    let path = folder.path().join("run.yaml");
    fs::write(&path, run).unwrap();
    for command in ["bench", "doctor"] {
        let args = [command, path.to_str().unwrap()];
        assert_eq!(mblm(&args), (2, String::new(), want.into()), "{args:?}");
        let (_, _, error) = mblm(&[&args[..], &["--device", "cpu"]].concat());
        assert!(!error.contains("error:"), "{command} on the CPU: {error}");
    }
    let (code, _, error) = mblm(&["bench", "model.yaml", "--device", "gpu"]);
    assert!(code == 2 && error.contains("expected cpu, cuda, cuda:N"), "{error}");
    let (code, _, error) = mblm(&["bench", "model.yaml", "--device", "auto", "--only", "forward", "--steps", "1"]);
    assert_eq!(code, 0, "{error}");
}

#[test]
fn a_configuration_is_measured_composed_and_examined_in_f64() {
    let (code, out, error) = mblm(&["bench", "model.yaml", "--composed", "--steps", "1", "--batch", "1"]);
    assert!(code == 0 && out.contains("train") && out.contains("generate"), "{out}{error}");
    let (code, out, error) = mblm(&["doctor", "model.yaml", "--dtype", "f64"]);
    assert_eq!(code, 0, "{out}{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.yaml"), MODEL).unwrap();
    let program = Command::cargo_bin("mblm").unwrap();
    let line = r#"ulimit -v 4000000; exec "$0" bench model.yaml --only forward --batch 100000000"#;
    let mut shell = Command::new("sh");
    let output = shell.current_dir(&folder).arg("-c").arg(line).arg(program.get_program()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let want = "error: the memory does not suffice; make the batch, the sequence or the model smaller\n";
    assert!(output.status.code() == Some(1) && said.ends_with(want), "{:?}: {said}", output.status);
    assert!(output.stdout.ends_with(b"batch 100000000 x 128 bytes\n"), "what is known is shown");
}

#[test]
fn blocks_are_listed_and_described() {
    let (code, list, _) = mblm(&["blocks"]);
    let names: Vec<&str> = list.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!((code, names), (0, vec!["mamba1", "mamba2", "transformer", "transformerEncoder"]));
    assert!(list.lines().all(|line| line.split_whitespace().count() > 2), "each has a description\n{list}");
    let (code, schema, _) = mblm(&["blocks", "--schema", "transformer"]);
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    assert_eq!((code, &schema["properties"]["attn_num_heads"]["type"]), (0, &"integer".into()));
}

#[test]
fn inspect_shows_every_stage() {
    let (code, table, _) = mblm(&["inspect", "model.yaml", "--batch", "3", "--set", "num_layers=[5, 1]"]);
    assert_eq!(code, 0);
    let cells = |row: usize| table.lines().nth(row).unwrap().split_whitespace().take(5).collect::<Vec<_>>();
    assert_eq!(cells(1), ["1", "transformer", "16", "64", "5"]);
    assert_eq!(cells(2), ["2", "transformer", "8", "32", "1"]);
    assert!(table.contains("context    128 bytes (16 · 8), vocabulary 257\n"), "{table}");
    assert!(table.contains("one step   3 × 128 bytes: "), "{table}");
    let (code, json, _) = mblm(&["inspect", "model.yaml", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["stages"][1]["hidden_dim"], &json["step"]["bytes"]), (0, &32.into(), &128.into()));
}

#[cfg(not(feature = "mpi"))]
#[test]
fn copies_that_a_launcher_starts_do_not_each_train_the_run() {
    let start = |args: &[&str], name: &str, value: &str| {
        let output = Command::cargo_bin("mblm").unwrap().args(args).env(name, value).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for name in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let (code, said) = start(&["train", "run.yaml"], name, "2");
        assert_eq!(code, Some(2), "{said}");
        let built = "build the program with `--features mpi`, with which they share it (docs/cluster.md)";
        assert!(said.contains(&format!("2 copies of this program ({name}=2)")) && said.contains(built), "{said}");
        assert!(start(&["compare", "study.yaml"], name, "2").1.contains("start it by itself"));
        // One process, and a command of which each copy may do its own: what is wrong is another thing.
        assert!(start(&["train", "no.yaml"], name, "1").1.contains("no such file"));
        assert!(start(&["inspect", "no.yaml"], name, "2").1.contains("no such file"));
    }
}
