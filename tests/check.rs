//! `mblm check`: mistakes in a configuration and its data, before anything runs.

use std::fs;

use assert_cmd::Command;

const CONFIG: &str = "\
io: {name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 1,
  validate_amount: 2, log_train_loss_amount: 5}
train: {target_elements: 4_000, target_elements_strategy: sequence, batch_size: 4, learning_rate: 0.01,
  gradient_accumulate_every: 1}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 32, hidden_dims: [16], num_layers: [1], seq_lens: [32],
  block: {attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true}}
";

/// Exit code, standard output and error of `mblm check` of [`CONFIG`].
fn check(args: &[&str]) -> (i32, String, String) {
    check_that(CONFIG, args)
}

/// Exit code, standard output and error of `mblm check` in a folder that holds `config` as `run.yaml`, and `data.txt`.
fn check_that(config: &str, args: &[&str]) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("run.yaml"), config).unwrap();
    fs::write(folder.path().join("data.txt"), "0123456789".repeat(100)).unwrap();
    let mut command = Command::cargo_bin("mblm").unwrap();
    let output = command.current_dir(&folder).args(["check", "run.yaml"]).args(args).output().unwrap();
    assert_eq!(folder.path().read_dir().unwrap().count(), 2, "nothing is written");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_good_configuration_is_shown_with_its_defaults() {
    let (code, yaml, said) = check(&[]);
    assert_eq!(code, 0, "{said}");
    let want = "data: 1000 bytes in 1 file(s) of \"data.txt\": the first 900 train, the last 100 validate\n\
                model: 10641 parameters; training: 32 batches, 32 gradient steps\n\
                learning rate schedule: 1.000e-3 at step 0, rises to 1.000e-2 at step 3, then anneals to 0 at step 32\n\
                run.yaml: no problems found\n";
    assert_eq!(said, want);
    for line in [
        "  - block_type: transformer\n",
        "  warmup_steps_perc: 0.1\n",
        "    ff_multiplier: 2\n",
        "  target_elements: 4000\n",
    ] {
        assert!(yaml.contains(line), "{yaml}");
    }
    // What it shows is a configuration that it shows again.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("run.yaml"), &yaml).unwrap();
    let mut again = Command::cargo_bin("mblm").unwrap();
    again.current_dir(&folder).args(["check", "run.yaml", "--no-data"]).assert().success().stdout(yaml);
}

#[test]
fn a_mistake_is_named_with_what_was_meant() {
    let cases = [
        ("params.block.num_heads=3", "params.block: these fields fit no block type"),
        ("params.block.num_heads=3", "transformer: num_heads: unknown field; did you mean `attn_num_heads`?"),
        ("params.block.block_type=transfomer", "unknown block type \"transfomer\"; did you mean `transformer`?"),
        ("params.block.block_type=transformerEncoder", "it can run only in an encoder"),
        ("params.input_len=3", "params.input_len: unknown field; did you mean `input_seq_len`?"),
        (
            "train.learning_rat=3",
            "train.learning_rat: unknown field; did you mean `learning_rate`? (--set train.learning_rat=3)",
        ),
        ("io.dataset_id=byte", "io.dataset_id: unknown data set \"byte\"; did you mean `bytes`?"),
        (
            "io.dataset_args={fraction: 0.2}",
            "io.dataset_args.fraction: unknown field; did you mean `validation_fraction`?",
        ),
        ("io.dataset_dir=none.txt", "io.dataset_dir: \"none.txt\" does not exist"),
        ("train.batch_size=50", "train.batch_size: found 50, but the training data are 28 sequence(s)"),
        (
            "resume={checkpoint_file: no, next_epoch_index: 0, next_batch_index: 0}",
            "resume.checkpoint_file: no does not exist",
        ),
        ("resume={checkpoint: no}", "resume.checkpoint: unknown field; did you mean `checkpoint_file`?"),
    ];
    for (set, want) in cases {
        let (code, yaml, said) = check(&["--set", set]);
        assert!(said.contains(want), "{set}: {said}");
        assert!(code != 0 && yaml.is_empty(), "{set}: {code}");
    }
}

#[test]
fn a_block_that_takes_no_mask_is_refused_in_an_encoder_with_its_line() {
    let (head, _) = CONFIG.split_once("params:").unwrap();
    let encoder = |block: &str| {
        head.replace("train: {", "train: {masking_proba: 0.15, ")
            + "params:\n  input_seq_len: 32\n  mask_token_id: 257\n  mblm_config:\n    {num_tokens: 258, pad_token_id: 256, \
               hidden_dims: [16, 16], num_layers: [1, 1], seq_lens: [8, 4],\n    block: "
            + block
            + "}\n"
    };
    let sees = "{block_type: transformerEncoder, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true}";
    assert_eq!(check_that(&encoder(sees), &[]).0, 0);
    let blocks = [
        ("mamba1", "{block_type: mamba1, d_state: 8, d_conv: 4, expand: 2}"),
        ("mamba2", "{block_type: mamba2, d_state: 8, d_conv: 4, expand: 2, headdim: 8}"),
        ("transformer", "{block_type: transformer, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true}"),
    ];
    for (name, block) in blocks {
        let places = [(block.to_string(), "block", 10), (format!("[{sees},\n    {block}]"), "block[1]", 11)];
        for (blocks, place, line) in places {
            let want = format!(
                "error: run.yaml: params.mblm_config.{place}: `{name}` takes no attention mask, which an encoder has; \
                 expected a block that does, such as `transformerEncoder` (line {line})\n"
            );
            assert_eq!(check_that(&encoder(&blocks), &[]), (2, String::new(), want));
        }
    }
}

#[test]
fn the_data_may_be_elsewhere() {
    let (code, _, said) = check(&["--no-data", "--set", "io.dataset_id=byte"]);
    assert!(code == 2 && said.contains("io.dataset_id: unknown data set \"byte\""), "{said}");
    let (code, yaml, said) = check(&["--no-data", "--set", "io.dataset_dir=none.txt"]);
    assert_eq!((code, yaml.contains("dataset_dir: none.txt\n")), (0, true), "{said}");
    assert!(said.starts_with("data: not checked\n"), "{said}");
}

/// Sizes far beyond any machine, of which products would not fit 64 bits either.
#[test]
fn a_size_that_cannot_fit_is_an_error_before_anything_is_built() {
    let max = u64::MAX.to_string();
    let block = "params.block={block_type: mamba2, d_state: 8, d_conv: 4, expand: 2, headdim: 8}";
    let cases: &[(&[&str], &str)] = &[
        (&["params.num_layers[0]=1000000"], "params.num_layers[0]: expected at most 16384, found 1000000"),
        (&["params.num_layers[0]=MAX"], "params.num_layers[0]: expected at most 16384, found 18446744073709551615"),
        (&["params.hidden_dims[0]=4294967296"], "params.hidden_dims[0]: expected at most 16777216, found 4294967296"),
        (&["params.hidden_dims[0]=8388608"], "params: training needs at least"),
        (&["params.num_tokens=MAX"], "params.num_tokens: expected at most 16777216"),
        (&["params.num_layers[0]=16384", "params.hidden_dims[0]=1024"], "params: training needs at least"),
        (&["params.block.attn_head_dims=4294967296"], "params.block.attn_head_dims: expected at most 16777216 for"),
        (&["params.block.attn_num_heads=MAX"], "attn_num_heads, found 8 x 18446744073709551615"),
        (&["params.block.ff_multiplier=MAX"], "params.block.ff_multiplier: expected at most 16777216 for"),
        (
            &["params.input_seq_len=MAX", "params.seq_lens=[MAX]"],
            "params.input_seq_len: expected at most 2147483647 bytes",
        ),
        (&["train.batch_size=MAX"], "train.batch_size: expected at most 67108863 sequences so long, found 1844"),
        (
            &["params.seq_lens=[MAX]", "params.block.pos_emb_type=fixed"],
            "stage 1: parameter pos_embs.0.weight of shape",
        ),
        (&[block, "params.block.d_state=MAX"], "params.block.d_state: expected at most 16777216, found 1844"),
        (&[block, "params.block.d_conv=MAX"], "params.block.d_conv: expected at most 16777216, found 1844"),
        (&[block, "params.block.expand=MAX"], "params.block.expand: expected at most 16777216 for expand x width"),
        (&[block, "params.block.headdim=MAX"], "params.block.headdim: expected at most 16777216, found 1844"),
    ];
    for (sets, want) in cases {
        let sets: Vec<String> = sets.iter().map(|set| set.replace("MAX", &max)).collect();
        let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let (code, _, said) = check(&args);
        assert!(code == 2 && said.contains(want), "{sets:?}: {code}, {said}");
    }
}

#[test]
fn a_step_that_does_not_fit_the_machine_is_a_warning() {
    let (code, _, said) = check(&["--no-data", "--set", "train.batch_size=60000000"]);
    assert!(code == 0 && said.contains("warning: a training step needs about"), "{said}");
}
