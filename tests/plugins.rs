//! Plugins as a user meets them: found, checked, trained, generated from, resumed; and every way in which one can be
//! broken is caught by name.

mod compiled;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use assert_cmd::Command;
use compiled::{broken, compile, late, lstm};

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn mblm(folder: &Path, args: &[&str]) -> Ran {
    let output = Command::cargo_bin("mblm")
        .unwrap()
        .current_dir(folder)
        .args(args)
        .env("XDG_DATA_HOME", folder.join("no-data"))
        .env("XDG_CONFIG_HOME", folder.join("settings"))
        .env_remove("MBLM_PLUGIN_PATH")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let code = output.status.code().unwrap_or_else(|| panic!("mblm {args:?} was killed"));
    Ran { code, out: text(output.stdout), err: text(output.stderr) }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A run's configuration with these blocks, and the data it reads.
fn write_config(folder: &Path, blocks: &[&str], layers: usize) {
    let text: String = (0..3000).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
    fs::write(folder.join("data.txt"), text).unwrap();
    let stages = blocks.len();
    let lens = if stages == 2 { "[16, 4]" } else { "[4, 4, 4]" };
    let dims = vec!["32"; stages].join(", ");
    let layers = vec![layers.to_string(); stages].join(", ");
    let blocks: String = blocks.iter().map(|block| format!("    - {block}\n")).collect();
    let yaml = format!(
        "io: {{name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 1, \
         validate_amount: 4, log_train_loss_amount: 10}}\n\
         params:\n  num_tokens: 257\n  pad_token_id: 256\n  input_seq_len: 64\n  seq_lens: {lens}\n  hidden_dims: \
         [{dims}]\n  num_layers: [{layers}]\n  block:\n{blocks}\
         train: {{target_elements: 61440, target_elements_strategy: sequence, batch_size: 8, max_eval_steps: 3, \
         learning_rate: 0.01, gradient_clipping: 1.0, gradient_accumulate_every: 2, shuffle_train: true}}\n"
    );
    fs::write(folder.join("run.yaml"), yaml).unwrap();
}

const TRANSFORMER: &str = "{attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true, pos_emb_type: fixed}";

fn run_of(ran: &Ran) -> String {
    ran.err.lines().find_map(|line| line.strip_prefix("run: ")).unwrap_or_else(|| panic!("{}", ran.err)).to_string()
}

#[test]
fn the_shipped_plugins_pass_every_check() {
    let folder = tempfile::tempdir().unwrap();
    let mingru = compile("plugins/mingru/mingru.c", folder.path(), "mingru", &["-O2", "-Wall", "-Wextra", "-Werror"]);
    let leaky = compile("tests/plugins/broken.c", folder.path(), "leaky", &[]);
    for library in [lstm(), mingru, leaky] {
        let ran = mblm(folder.path(), &["plugin", "check", path(&library)]);
        assert_eq!(ran.code, 0, "{}\n{}", ran.out, ran.err);
        let count = |word: &str| ran.out.lines().filter(|line| line.starts_with(&format!("  {word} "))).count();
        // Nothing panics on demand in C, and blocks in Rust do not save states.
        assert_eq!((count("FAILED"), count("skipped"), count("passed")), (0, 1, 16), "{}", ran.out);
    }
}

#[test]
fn blocks_written_with_candle_nn_pass_every_check() {
    let folder = tempfile::tempdir().unwrap();
    let ran = mblm(folder.path(), &["plugin", "check", path(&compiled::candle())]);
    assert_eq!((ran.code, ran.out.matches("  passed ").count()), (0, 2 * 16), "{}\n{}", ran.out, ran.err);
}

#[test]
fn every_fault_is_caught_by_the_check_of_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let faults = [
        ("HEADER", "header", "no version"),
        ("SCHEMA", "schema", "additionalProperties"),
        ("CONFIGS", "configs", "is accepted"),
        ("CONFIGS_CRASH", "configs", "crashed by signal 6 (abort)"),
        ("PARAMS", "params", "different parameters"),
        ("OUTPUTS", "outputs", "y was filled with NaN before"),
        ("OUTPUTS_GUARD", "outputs", "y: something was written after the buffer"),
        ("OUTPUTS_INPUT", "outputs", "x is an input, but was written to"),
        ("SIZES", "sizes", "batch 1, length 1"),
        ("OWN_WEIGHTS", "reproducible", "built again, with the same parameters, it gives another output"),
        ("STALE", "reproducible", "built again, with the same parameters, it gives another output"),
        ("STATE", "reproducible", "the same input gives another output after other calls"),
        ("CAUSALITY", "causality", "a change at position 1 changes an earlier output"),
        ("DETERMINISTIC", "deterministic", "the output has different bits"),
        ("GRADIENTS", "gradients", "the input: along a random direction"),
        ("GRADIENTS_PARAM", "gradients", "mix gets no gradient"),
        ("ACCUMULATION", "accumulation", "scale: the buffer contained 3 before"),
        ("TAPES", "tapes", "two tapes, backward of number 2"),
        ("DECODING", "decoding", "batch 1, 1 positions, prefill: forward gives other outputs"),
        ("STATES", "states", "a clone continues differently"),
        ("STATES_LOAD", "states", "state_load accepts"),
        ("THREADS", "threads", "from several threads at once"),
        ("LEAKS", "leaks", "1000 rounds grew memory"),
        ("HANG", "outputs", "did not finish within 2 s"),
    ];
    for (fault, check, want) in faults {
        let library = broken(folder.path(), fault);
        let ran = mblm(folder.path(), &["plugin", "check", path(&library), "--only", check, "--limit", "2"]);
        let line = ran.out.lines().skip_while(|line| !line.starts_with("  FAILED")).nth(1).unwrap_or_default();
        assert!(ran.code == 1 && line.contains(want), "{fault}: {}\n{}", ran.out, ran.err);
    }
}

/// Whatever a plugin does in whichever call, `plugin check` says so and fails.
#[test]
fn exits_crashes_and_hangs_are_failures_wherever_they_happen() {
    let folder = tempfile::tempdir().unwrap();
    let faults = [
        ("LOAD_EXIT", "opening", "the plugin ended the process with exit code "),
        ("LOAD_ABORT", "opening", "the plugin crashed by signal 6 (abort)"),
        ("LOAD_HANG", "opening", "the plugin did not finish within 1 s"),
        ("INIT", "opening", "init failed: no licence"),
        ("CHECK_EXIT", "configuration", "the plugin ended the process with exit code "),
        ("CHECK_CRASH", "configuration", "the plugin crashed by signal 11 (segmentation fault)"),
        ("CHECK_HANG", "configuration", "the plugin did not finish within 1 s"),
        ("CREATE_EXIT", "params", "the plugin ended the process with exit code "),
        ("DESTROY_EXIT", "params", "the plugin ended the process with exit code "),
        ("FORWARD_EXIT", "outputs", "the plugin ended the process with exit code "),
    ];
    for (fault, check, want) in faults {
        let library = broken(folder.path(), fault);
        let only = if ["opening", "configuration"].contains(&check) { "header" } else { check };
        let ran = mblm(folder.path(), &["plugin", "check", path(&library), "--only", only, "--limit", "1"]);
        let lines: Vec<&str> = ran.out.lines().skip_while(|line| !line.starts_with("  FAILED")).take(2).collect();
        assert!(ran.code == 1 && lines.len() == 2, "{fault}: {} {}\n{}", ran.code, ran.out, ran.err);
        assert!(lines[0].contains(check) && lines[1].trim().starts_with(want), "{fault}: {lines:?}");
    }
    // What hangs wherever it is built is waited for once.
    for (fault, call) in [("CREATE_HANG", "create"), ("HANG", "forward")] {
        let library = broken(folder.path(), fault);
        let ran = mblm(folder.path(), &["plugin", "check", path(&library), "--limit", "1"]);
        let count = |text: &str| ran.out.matches(text).count();
        let found =
            (ran.code, count("did not finish within 1 s"), count(&format!("not tried: {call} hangs")), count("passed"));
        assert_eq!(found, (1, 1, 14, 3), "{}", ran.out);
    }
    let noisy = broken(folder.path(), "CHECK_NOISE");
    let ran = mblm(folder.path(), &["plugin", "check", path(&noisy), "--only", "header"]);
    assert!(ran.code == 0 && ran.out.contains("passed   header"), "{}", ran.out);
}

/// A process that a plugin starts does not outlive the check, not even in a session of its own.
#[cfg(target_os = "linux")]
#[test]
fn what_a_plugin_starts_ends_with_the_check() {
    let folder = tempfile::tempdir().unwrap();
    let (library, marker) = (broken(folder.path(), "CREATE_DAEMON"), folder.path().join("daemons"));
    let mut check = Command::cargo_bin("mblm").unwrap();
    check.args(["plugin", "check", path(&library), "--only", "params"]).env("MBLM_TEST_MARKER", &marker);
    assert!(check.output().unwrap().status.success());
    let daemons = fs::read_to_string(&marker).unwrap();
    let lives = |daemon: &&str| {
        // A zombie has ended.
        let stat = fs::read_to_string(format!("/proc/{daemon}/stat"));
        stat.is_ok_and(|stat| stat.contains("(mblm") && !stat.contains(") Z "))
    };
    let left: Vec<&str> = daemons.lines().filter(lives).collect();
    assert!(daemons.lines().count() > 0 && left.is_empty(), "{left:?} of {daemons}");
}

#[test]
fn a_block_needs_no_fields_and_a_schema_may_be_a_circle() {
    let folder = tempfile::tempdir().unwrap();
    let bare = broken(folder.path(), "NO_PROPERTIES");
    let ran = mblm(folder.path(), &["plugin", "check", path(&bare), "--only", "schema"]);
    assert!(ran.code == 0 && ran.out.contains("passed   schema"), "{}", ran.out);
    let schema = mblm(folder.path(), &["schema", "--plugin-dir", path(&bare)]);
    let schema: serde_json::Value = serde_json::from_str(&schema.out).unwrap();
    assert_eq!(schema["definitions"]["block leaky"]["properties"]["block_type"]["enum"][0], "leaky");

    let circle = broken(folder.path(), "CIRCLE");
    let ran = mblm(folder.path(), &["plugin", "check", path(&circle), "--only", "schema"]);
    assert!(ran.code == 1 && ran.out.contains("the $ref of `a` leads nowhere or in a circle"), "{}", ran.out);
    let page = mblm(folder.path(), &["schema", "--markdown", "--plugin-dir", path(&circle)]).out;
    assert!(page.contains("| `a` | anything | must be given |"), "{page}");
}

#[test]
fn what_cannot_be_trained_or_evaluated_is_refused_before_training() {
    let cases = [
        ("NO_BACKWARD", "it has no backward pass, so it cannot be trained"),
        ("OWN_WEIGHTS", "built again, with the same parameters, it gives another output"),
        ("STATE", "the same input gives another output after other calls"),
    ];
    for (fault, want) in cases {
        let folder = tempfile::tempdir().unwrap();
        let library = broken(folder.path(), fault);
        write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
        for command in ["check", "train"] {
            let ran = mblm(folder.path(), &[command, "run.yaml", "--plugin-dir", path(&library)]);
            let error = ran.err.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
            assert!(ran.code == 1 && error.contains(want), "{command} {fault}: {}", ran.err);
            assert!(error.contains("stage 2") && error.contains("leaky"), "{error}");
        }
        assert!(!folder.path().join("runs").exists(), "no run folder is made");
    }
}

#[test]
fn a_plugin_beside_the_configuration_trains_generates_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    fs::copy(lstm(), plugins.join("liblstm.so")).unwrap();
    compile("plugins/mingru/mingru.c", &plugins, "mingru", &["-O2"]);
    assert_eq!(mblm(folder.path(), &["plugin", "trust", "plugins"]).code, 0);
    // The type of the first is found by its fields; two plugins, one of them twice.
    let blocks = ["{dropout: 0.1, pos_emb_type: null}", "{block_type: lstm}", "{block_type: mingru, expand: 2}"];
    write_config(folder.path(), &blocks, 2);
    let ran = mblm(folder.path(), &["train", "run.yaml"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let run = run_of(&ran);
    let bpb: f64 = ran.out.split_once("validation: ").unwrap().1.split_once(' ').unwrap().0.parse().unwrap();
    let entropy: f64 = ran.out.split_once("single bytes is ").unwrap().1.split_once(' ').unwrap().0.parse().unwrap();
    assert!(bpb < entropy, "{bpb} bpb, single bytes {entropy}");

    let generate = |run: &str| mblm(folder.path(), &["generate", run, "--prompt", "line 1", "--max-bytes", "30"]);
    let made = generate(&run);
    assert!(made.code == 0 && made.out.starts_with("line 1"), "{}", made.err);
    assert_eq!(mblm(folder.path(), &["eval", &run, "data.txt", "--max-bytes", "2000"]).code, 0);
    let table = mblm(folder.path(), &["inspect", "run.yaml"]).out;
    assert!(table.contains("mingru") && table.contains("lstm"), "{table}");
    let listed = mblm(folder.path(), &["blocks", "--plugin-dir", "plugins"]).out;
    assert!(listed.contains("mingru") && listed.contains("transformerEncoder"), "{listed}");
    let listed = mblm(folder.path(), &["plugin", "list", "run.yaml"]).out;
    assert!(listed.contains("mblm-lstm 0.1.0") && listed.contains("sha256") && listed.contains("  mingru"), "{listed}");

    // The run knows its plugins: other ones, or none, are refused.
    let mut changed = fs::read(plugins.join("mingru.so")).unwrap();
    changed.extend(b"another build");
    fs::remove_file(plugins.join("mingru.so")).unwrap();
    let gone = generate(&run);
    assert!(gone.code == 2 && gone.err.contains("was trained with plugin mingru 1.0.0"), "{}", gone.err);
    fs::write(plugins.join("mingru.so"), changed).unwrap();
    assert_eq!(mblm(folder.path(), &["plugin", "trust", "plugins"]).code, 0);
    for command in ["generate", "--resume"] {
        let args = if command == "generate" { vec!["generate", &run] } else { vec!["train", "--resume", &run] };
        let other = mblm(folder.path(), &args);
        assert!(other.code == 2 && other.err.contains("no library with that SHA-256 was found"), "{}", other.err);
        let allowed = mblm(folder.path(), &[args, vec!["--allow-plugin-change"]].concat());
        assert_eq!(allowed.code, 0, "{}", allowed.err);
    }
    // A run that goes on from it with another build says so.
    let chained = mblm(folder.path(), &["train", "-q", &format!("{run}/config.yaml"), "--plugin-dir", "plugins"]);
    let want = "these weights were trained with another build of a plugin: mingru 1.0.0 (";
    assert!(chained.code == 0 && chained.err.contains(want) && chained.err.contains("is used"), "{}", chained.err);
    assert_eq!(chained.err.matches(", sha256 ").count(), 2, "{}", chained.err);
}

#[test]
fn recomputed_chunks_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("plugins")).unwrap();
    fs::copy(lstm(), folder.path().join("plugins/liblstm.so")).unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: lstm}"], 1);
    let losses = |chunks: &str| {
        let set = format!("params.train_checkpoint_chunks={chunks}");
        let ran = mblm(folder.path(), &["train", "run.yaml", "--plugin-dir", "plugins", "--set", &set]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let csv = fs::read_to_string(folder.path().join(run_of(&ran)).join("loss.csv")).unwrap();
        let last = csv.lines().last().unwrap().split(',').nth(7).unwrap().parse::<f64>().unwrap();
        assert!(last > 0.0, "{csv}");
        last
    };
    let (whole, chunks) = (losses("null"), losses("[3]"));
    assert!((whole - chunks).abs() < 1e-4, "{whole} and {chunks}");
}

#[test]
fn what_cannot_be_loaded_is_listed_with_the_reason_and_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    fs::write(plugins.join("text.so"), "not a library").unwrap();
    fs::create_dir(plugins.join("folder.so")).unwrap();
    std::os::unix::fs::symlink("nowhere.so", plugins.join("dangling.so")).unwrap();
    // Another architecture: an ELF header of a 32-bit ARM library.
    let mut elf = fs::read(lstm()).unwrap();
    elf.truncate(4096);
    (elf[4], elf[18]) = (1, 40);
    fs::write(plugins.join("arm.so"), elf).unwrap();
    let faults = ["SYMBOL", "MAJOR", "MINOR", "INIT", "LOAD_EXIT", "LOAD_ABORT", "LOAD_HANG"];
    faults.iter().for_each(|fault| drop(broken(&plugins, fault)));
    compile("tests/plugins/broken.c", &plugins, "a_good_one", &[]);
    compile("tests/plugins/broken.c", &plugins, "b_the_same_type", &["-DAGAIN", "-O0"]);

    let list = mblm(folder.path(), &["plugin", "list", "--plugin-dir", "plugins"]);
    assert_eq!(list.code, 0, "{}", list.err);
    let reasons = [
        ("text.so", "cannot be opened"),
        ("folder.so", "a folder"),
        ("dangling.so", "a broken symbolic link"),
        ("arm.so", "cannot be opened"),
        ("SYMBOL.so", "not a plugin: it has no symbol mblm_plugin_entry"),
        ("MAJOR.so", "use a newer MBLM"),
        ("MINOR.so", "needs version 1.2"),
        ("INIT.so", "init failed: no licence"),
        ("LOAD_EXIT.so", "ended the process with exit code 0 when it was opened"),
        ("LOAD_ABORT.so", "crashed by signal 6 (abort) when it was opened"),
        ("LOAD_HANG.so", "hangs: opening it took more than"),
        ("b_the_same_type.so", "the block type `leaky` is registered twice"),
    ];
    for (file, reason) in reasons {
        let line = list.out.lines().find(|line| line.contains(&format!("/{file}: "))).unwrap_or_default();
        assert!(line.contains(reason), "{file}: {line:?}\n{}", list.out);
    }
    assert!(list.out.contains("a_good_one.so"), "{}", list.out);

    fs::remove_file(plugins.join("LOAD_HANG.so")).unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    let ran = mblm(folder.path(), &["inspect", "run.yaml", "--plugin-dir", "plugins"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.err.lines().filter(|line| line.starts_with("warning: plugin ")).count(), 11, "{}", ran.err);
    let missing = mblm(folder.path(), &["inspect", "run.yaml", "--plugin-dir", "nowhere"]);
    assert!(missing.code == 2 && missing.err.contains("--plugin-dir nowhere: no such folder"), "{}", missing.err);
}

#[test]
fn a_failure_in_training_names_the_plugin_and_keeps_the_checkpoint() {
    let cases = [
        ("LATE_NAN", "forward gave NaN at sequence 0, position 0, channel 7, from finite inputs"),
        ("LATE_ERROR", "forward: the sensor came off"),
    ];
    for (fault, want) in cases {
        let folder = tempfile::tempdir().unwrap();
        let plugins = folder.path().join("plugins");
        fs::create_dir(&plugins).unwrap();
        broken(&plugins, fault);
        write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
        let ran = mblm(folder.path(), &["train", "run.yaml", "--plugin-dir", "plugins"]);
        let error = ran.err.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(ran.code == 1 && error.contains(want), "{}", ran.err);
        for part in ["block `leaky`", "stage 2", "plugin leaky 1", &format!("{fault}.so")] {
            assert!(error.contains(part), "{error}");
        }
        let run = folder.path().join(run_of(&ran));
        let eval = ["eval", path(&run), "data.txt", "--max-bytes", "256", "--plugin-dir", path(&plugins)];
        let eval = mblm(folder.path(), &eval);
        assert_eq!(eval.code, 0, "the checkpoint of before is whole: {}", eval.err);
    }
}

#[test]
fn a_plugin_whose_decoding_gives_nan_ends_generation_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    broken(&plugins, "STEP_NAN");
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    let ran = mblm(folder.path(), &["train", "run.yaml", "--plugin-dir", "plugins"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let run = folder.path().join(run_of(&ran));
    let args = ["generate", path(&run), "--prompt", "hello", "--max-bytes", "20", "--plugin-dir", "plugins"];
    let ran = mblm(folder.path(), &args);
    let error = ran.err.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    for part in ["block `leaky`", "stage 2", "decoding gave NaN at sequence 0, position 2, channel 3"] {
        assert!(ran.code == 1 && error.contains(part), "{}", ran.err);
    }
}

#[test]
fn a_plugin_that_crashes_or_exits_in_training_is_named() {
    let cases = [
        ("LATE_EXIT", "forward called exit"),
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        ("LATE_UNDERSCORE_EXIT", "forward called _exit"),
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        ("LATE_QUICK_EXIT", "forward called quick_exit"),
        ("LATE_SEGV", "forward crashed: SIGSEGV"),
        ("LATE_ABORT", "forward crashed: SIGABRT"),
        ("LATE_FPE", "forward crashed: SIGFPE"),
        ("LATE_STACK", "forward crashed: SIGSEGV"),
    ];
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    for (fault, want) in cases {
        let library = broken(folder.path(), fault);
        let output = Command::cargo_bin("mblm")
            .unwrap()
            .current_dir(&folder)
            .args(["train", "-q", "run.yaml", "--out", fault, "--plugin-dir", path(&library)])
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{fault}: {err}");
        let error = err.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        for part in ["block `leaky` at stage 2, of plugin leaky 1 (", &format!("{fault}.so): {want}")] {
            assert!(error.contains(part), "{fault}: {err}");
        }
        let log = fs::read_to_string(folder.path().join(fault).join("train.log")).unwrap();
        let last = log.lines().last().and_then(|line| line.splitn(3, ' ').nth(2));
        assert_eq!(last, Some(error), "the run's log has the line, after the time");
        // Rust's own message about a stack overflow still comes.
        assert_eq!(err.contains("has overflowed its stack"), fault == "LATE_STACK", "{fault}: {err}");
    }
}

/// Trains `run.yaml` into the folder `name`, with a block that runs these statements late.
fn train_late(folder: &Path, name: &str, statements: &str) -> Ran {
    let library = late(folder, name, statements);
    mblm(folder, &["train", "run.yaml", "--out", name, "--plugin-dir", path(&library)])
}

#[test]
fn what_a_plugin_changes_by_accident_changes_no_run() {
    let cases = [
        ("nothing", "", ""),
        ("directory", "if (chdir(\"/\")) abort();", ""),
        ("rounding", "fesetround(FE_UPWARD);", ""),
        ("streams", "close(0); close(1); close(2);", "forward closed standard error, which was restored"),
        ("fork", "fork();", "forward forked, and the child process returned from the call; the child ends here"),
    ];
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    let mut without = None;
    for (name, statements, want) in cases {
        let ran = train_late(folder.path(), name, statements);
        assert!(ran.code == 0 && ran.err.contains(want), "{name}: {}", ran.err);
        assert_eq!(ran.err.matches("finished: ").count(), 1, "{name}: {}", ran.err);
        assert!(ran.out.contains("validation: "), "{name}: {}", ran.out);
        let losses = fs::read_to_string(folder.path().join(name).join("loss.csv")).unwrap();
        let losses: Vec<Option<String>> = losses.lines().map(|line| line.split(',').nth(7).map(String::from)).collect();
        assert_eq!(without.get_or_insert_with(|| losses.clone()), &losses, "{name}");
    }
}

#[test]
fn signals_that_a_plugin_resets_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    // Whoever reads the messages of the run is gone.
    let library = late(folder.path(), "pipe", "signal(SIGPIPE, SIG_DFL);");
    let mut train = std::process::Command::new(assert_cmd::cargo::cargo_bin("mblm"));
    train.current_dir(&folder).args(["train", "run.yaml", "--out", "run", "--plugin-dir", path(&library)]);
    let mut train = train.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    drop(train.stderr.take());
    assert_eq!(train.wait().unwrap().code(), Some(0));

    // The second library is opened in a child process, whose end is waited for.
    let plugins = folder.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    broken(&plugins, "INIT_SIGCHLD");
    compile("tests/plugins/broken.c", &plugins, "second", &["-DTYPE=\"second\""]);
    let list = mblm(folder.path(), &["plugin", "list", "--plugin-dir", "plugins"]);
    assert!(list.code == 0 && list.out.contains("  second") && !list.out.contains("hangs"), "{}", list.out);
}

#[test]
fn a_plugin_that_ends_the_process_in_another_way_is_named_too() {
    let cases = [
        ("files", "for (int fd = 3; fd < 1000; fd++) close(fd);", 1, "forward closed files that are not its own"),
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        ("thread", "pthread_t t; pthread_create(&t, 0, exit_on_a_thread, 0); pause();", 1, "thread.so"),
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        ("outside", "pthread_t t; pthread_create(&t, 0, exit_on_a_thread, 0); pthread_detach(t);", 1, "outside.so"),
        // A request to end, on whichever thread it is raised.
        #[cfg(target_os = "linux")]
        ("request", "raise(SIGTERM);", 143, "interrupted: saved "),
    ];
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    for (name, statements, code, want) in cases {
        let ran = train_late(folder.path(), name, statements);
        assert!(ran.code == code && ran.err.contains(want), "{name}: {} {}", ran.code, ran.err);
    }
}

/// No code of the process runs after these, so only a study can tell.
#[test]
fn a_study_names_the_plugins_of_a_process_that_ended_without_a_word() {
    let cases = [
        ("syscall", "syscall(SYS_exit_group, 0);", "ended with exit code 0 before the run was finished"),
        ("exec", "execl(\"/bin/true\", \"true\", (char *)0);", "ended with exit code 0 before the run was finished"),
        ("segv", "signal(SIGSEGV, SIG_DFL); *(volatile int *)8 = 1;", "the process was ended by signal 11"),
    ];
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &[TRANSFORMER, "{block_type: leaky}"], 1);
    for (name, statements, want) in cases {
        let library = late(folder.path(), name, statements);
        let study = format!("name: {name}\nbase: run.yaml\nbudget: {{bytes: 61440}}\n");
        fs::write(folder.path().join("study.yaml"), study).unwrap();
        let ran = mblm(folder.path(), &["compare", "study.yaml", "--plugin-dir", path(&library)]);
        let line = ran.err.lines().find(|line| line.contains("failed: ")).unwrap_or_default();
        assert!(ran.code == 1 && line.contains(want), "{name}: {}", ran.err);
        assert!(line.contains("; it ran code of leaky 1 (") && line.contains(&format!("{name}.so)")), "{line}");
    }
}

#[test]
fn a_wrong_field_of_a_plugin_is_named_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("plugins")).unwrap();
    fs::copy(lstm(), folder.path().join("plugins/liblstm.so")).unwrap();
    compile("plugins/mingru/mingru.c", &folder.path().join("plugins"), "mingru", &[]);
    let cases = [
        ("{block_type: lstm, dropout: 1.5}", "params.block[1].dropout: "),
        ("{block_type: lstm, drop: 0.5}", "params.block[1].drop: unknown field; "),
        ("{block_type: mingru, expand: 99}", "params.block[1].expand: expected an integer from 1 to 16 "),
        ("{block_type: mingru, width: 2}", "params.block[1].width: unknown field; expected one of `expand`"),
        ("{block_type: lstn}", "params.block[1].block_type: unknown block type \"lstn\"; did you mean `lstm`?"),
        ("{pos_emb_type: null}", "params.block[1]: these fields fit several block types, `lstm`, `mingru`"),
    ];
    for (block, want) in cases {
        write_config(folder.path(), &[TRANSFORMER, block], 1);
        let ran = mblm(folder.path(), &["train", "run.yaml", "--plugin-dir", "plugins"]);
        assert!(ran.code == 2 && ran.err.contains(want) && ran.err.contains("(line "), "{}", ran.err);
        assert!(!folder.path().join("runs").exists(), "no run folder is made");
    }
}

#[test]
fn a_new_plugin_in_c_builds_and_passes() {
    let folder = tempfile::tempdir().unwrap();
    let made = mblm(folder.path(), &["plugin", "new", "my-block", "--c"]);
    assert_eq!(made.code, 0, "{}", made.err);
    let make = std::process::Command::new("make").current_dir(folder.path().join("my-block")).output().unwrap();
    assert!(make.status.success(), "{}", String::from_utf8_lossy(&make.stderr));
    let checked = mblm(folder.path(), &["plugin", "check", "my-block/libmy_block.so"]);
    assert!(checked.code == 0 && checked.out.contains("block my-block"), "{}{}", checked.out, checked.err);
    let schema = mblm(folder.path(), &["plugin", "schema", "my-block/libmy_block.so", "my-block"]);
    assert!(schema.out.contains("\"expand\""), "{}", schema.out);
    let again = mblm(folder.path(), &["plugin", "new", "my-block"]);
    assert!(again.code == 2 && again.err.contains("exists"), "{}", again.err);
    assert_eq!(mblm(folder.path(), &["plugin", "new", "My Block"]).code, 2);
}
