//! Whose code runs: libraries are opened only where the user pointed, and only for a block type that is not built in.

#![cfg(unix)]

mod compiled;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use compiled::{broken, compile};
use mblm::train::checkpoint::Shelf;
use serde_json::{Value, json};

const TRANSFORMER: &str = "{block_type: transformer, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true}";

/// A folder with a configuration, its data, a home, and a library that leaves a mark when it is opened.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(block: &str) -> Self {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        fs::write(place.at("data.txt"), "the quick brown fox\n".repeat(300)).unwrap();
        let yaml = format!(
            "io: {{name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 1, \
             validate_amount: 2, log_train_loss_amount: 5}}\n\
             params: {{num_tokens: 257, pad_token_id: 256, input_seq_len: 32, seq_lens: [8, 4], hidden_dims: [16, 16], \
             num_layers: [1, 1], block: [{TRANSFORMER}, {block}]}}\n\
             train: {{target_elements: 2560, target_elements_strategy: sequence, batch_size: 4, max_eval_steps: 2, \
             learning_rate: 0.01, gradient_accumulate_every: 1, shuffle_train: true}}\n"
        );
        fs::write(place.at("run.yaml"), yaml).unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A library in `folder` that leaves a mark when it is opened.
    fn marker(&self, folder: &str) -> PathBuf {
        fs::create_dir_all(self.at(folder)).unwrap();
        compile("tests/plugins/marker.c", &self.at(folder), "a", &[])
    }

    /// Exit code and everything that was written, and whether a library was opened.
    fn mblm_in(&self, env: &[(&str, &str)], args: &str) -> (Option<i32>, String, bool) {
        let mark = self.at("OPENED");
        let mut command = Command::cargo_bin("mblm").unwrap();
        command
            .current_dir(&self.folder)
            .args(args.split(' '))
            .env_remove("MBLM_PLUGIN_PATH")
            .env_remove("XDG_DATA_HOME");
        command.env_remove("XDG_CONFIG_HOME").env("HOME", self.at("home")).env("MBLM_TEST_MARKER", &mark);
        let output = command.envs(env.iter().copied()).output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        let opened = mark.exists();
        if opened {
            fs::remove_file(mark).unwrap();
        }
        (output.status.code(), text, opened)
    }

    fn mblm(&self, args: &str) -> (Option<i32>, String, bool) {
        self.mblm_in(&[], args)
    }

    /// Runs a command that must succeed.
    fn succeed(&self, args: &str) -> String {
        let (code, text, _) = self.mblm(args);
        assert_eq!(code, Some(0), "{args}: {text}");
        text
    }
}

/// Changes the state of a run's newest checkpoint, with the sum in its manifest.
fn change_state(run: &Path, change: impl FnOnce(&mut Value)) {
    let newest = Shelf::of_run(run).unwrap().newest().unwrap().path().to_path_buf();
    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(newest.join(name)).unwrap()).unwrap() };
    let (mut state, mut manifest) = (read("state.json"), read("manifest.json"));
    change(&mut state);
    fs::write(newest.join("state.json"), state.to_string()).unwrap();
    let sum = std::process::Command::new("sha256sum").arg(newest.join("state.json")).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap()[..64].to_string();
    manifest["files"]["state.json"] = json!({"bytes": state.to_string().len(), "sha256": sum});
    fs::write(newest.join("manifest.json"), manifest.to_string()).unwrap();
}

#[test]
fn a_run_from_elsewhere_opens_nothing() {
    let place = Place::new(TRANSFORMER);
    place.succeed("train -q run.yaml --out dl");
    let library = place.marker("dl");
    let sum = "0".repeat(64);
    change_state(&place.at("dl"), |state| {
        state["plugins"] = json!([{"name": "lstm", "version": "1", "path": library, "sha256": sum}]);
    });
    let commands = [
        "generate dl --prompt a --max-bytes 3",
        "eval dl data.txt",
        "train --resume dl",
        "train --resume dl --allow-plugin-change",
        "report dl",
        "checkpoint list dl",
        "checkpoint verify dl",
        "checkpoint export dl --out w.safetensors",
        "checkpoint export dl --out w.pth --pth-names",
        "check --no-data dl/config.yaml",
        "train -q dl/config.yaml --out chained",
        "measure-run dl",
        "run-of-study dl x --ticket x",
    ];
    for command in commands {
        let (_, text, opened) = place.mblm(command);
        assert!(!opened, "{command}: {text}");
    }
    // Resuming it recorded anew which plugins it has: none.
    change_state(&place.at("dl"), |state| {
        state["plugins"] = json!([{"name": "lstm", "version": "1", "path": library, "sha256": sum}]);
    });
    // Even a configuration that asks for the block does not open what the run names.
    for file in [place.at("dl/config.yaml"), place.at("run.yaml")] {
        let yaml = fs::read_to_string(&file).unwrap();
        let (head, tail) = yaml.split_at(yaml.rfind("transformer").unwrap());
        fs::write(&file, format!("{head}lstm{}", &tail["transformer".len()..])).unwrap();
    }
    let (code, text, opened) = place.mblm("check --no-data dl/config.yaml");
    assert!(code == Some(2) && !opened && text.contains("unknown block type \"lstm\""), "{text}");
    let (code, text, opened) = place.mblm("train --resume dl --force");
    assert!(code == Some(2) && !opened, "{text}");
    for want in ["dl was trained with plugin lstm 1 (a.so, sha256 000000000000…)", "looked in: ", "--plugin-dir DIR"]
    {
        assert!(text.contains(want), "{text}");
    }
}

#[test]
fn libraries_beside_a_configuration_wait_for_trust() {
    let place = Place::new(TRANSFORMER);
    place.marker("plugins");
    fs::write(place.at("study.yaml"), "base: run.yaml\nbudget: {bytes: 2560}\n").unwrap();
    let commands = [
        "check run.yaml",
        "inspect run.yaml",
        "doctor run.yaml",
        "compare --dry-run study.yaml",
        "plugin list run.yaml",
    ];
    for command in commands {
        let (_, text, opened) = place.mblm(command);
        assert!(!opened, "{command}: {text}");
    }
    // Nor is it opened for built-in blocks where the user points to it.
    let (code, text, opened) = place.mblm("check run.yaml --plugin-dir plugins");
    assert!(code == Some(0) && !opened, "{text}");

    let place = Place::new("{block_type: leaky}");
    place.marker("plugins");
    compile("tests/plugins/broken.c", &place.at("plugins"), "leaky", &[]);
    for command in ["check run.yaml", "train run.yaml", "doctor run.yaml"] {
        let (code, text, opened) = place.mblm(command);
        assert!(code == Some(2) && !opened, "{command}: {text}");
        for want in
            ["plugins holds a.so, leaky.so", "run `mblm plugin trust plugins` once, or add --plugin-dir plugins"]
        {
            assert!(text.contains(want), "{command}: {text}");
        }
    }
    assert!(place.succeed("check run.yaml --plugin-dir plugins").contains("no problems found"));

    let (_, text, opened) = place.mblm("plugin trust plugins");
    assert!(text.contains("leaky.so  sha256 ") && !opened, "trust opens nothing: {text}");
    let (code, text, opened) = place.mblm("check run.yaml");
    assert!(code == Some(0) && opened, "{text}");
    place.succeed("train -q run.yaml --out trained");
    assert!(
        place.succeed("generate trained --prompt a --max-bytes 3").starts_with('a'),
        "a trusted folder has the run's plugin"
    );
    assert!(place.succeed("plugin trust --list").contains("plugins\n  a.so  sha256 "));
    // What is changed, or new, is not trusted.
    compile("tests/plugins/broken.c", &place.at("plugins"), "leaky", &["-DANOTHER", "-O0"]);
    let (code, text, _) = place.mblm("check run.yaml");
    assert!(code == Some(2) && text.contains("leaky.so was not loaded: not the library that was trusted"), "{text}");
    place.succeed("plugin trust plugins");
    place.succeed("check run.yaml");
    // The place counts: a copy elsewhere is not trusted.
    fs::create_dir(place.at("copy")).unwrap();
    fs::copy(place.at("run.yaml"), place.at("copy/run.yaml")).unwrap();
    fs::create_dir(place.at("copy/plugins")).unwrap();
    fs::copy(place.at("plugins/leaky.so"), place.at("copy/plugins/leaky.so")).unwrap();
    assert_eq!(place.mblm("check --no-data copy/run.yaml").0, Some(2));
    place.succeed("plugin trust --remove plugins");
    assert_eq!(place.mblm("check run.yaml").0, Some(2));
    assert!(place.mblm("plugin trust .").1.contains("did you mean ./plugins?"));
}

#[test]
fn what_others_can_write_is_refused() {
    let place = Place::new("{block_type: leaky}");
    fs::create_dir(place.at("libraries")).unwrap();
    let library = place.marker("libraries");
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let folder = place.at("libraries");
    for (path, bits, want) in
        [(&folder, 0o777, "chmod go-w"), (&folder, 0o1777, "everybody can write to"), (&library, 0o666, "chmod go-w")]
    {
        let before = path.metadata().unwrap().permissions().mode();
        mode(path, bits);
        for command in [
            "check run.yaml --plugin-dir libraries",
            "check run.yaml --plugin-dir libraries/a.so",
            "plugin check libraries/a.so",
            "plugin trust libraries",
        ] {
            let (_, text, opened) = place.mblm(command);
            assert!(!opened && text.contains(want), "{bits:o} {command}: {text}");
        }
        mode(path, before);
    }
    assert!(place.mblm("check run.yaml --plugin-dir libraries").2, "without these bits it is opened");
}

#[test]
fn relative_folders_of_the_user_are_ignored() {
    let place = Place::new("{block_type: leaky}");
    place.marker("here/.local/share/mblm/plugins");
    place.marker("here/mblm/plugins");
    for (name, value, opens) in
        [("HOME", "here", false), ("XDG_DATA_HOME", "here", false), ("HOME", place.at("here").to_str().unwrap(), true)]
    {
        let (_, text, opened) = place.mblm_in(&[(name, value)], "check run.yaml");
        assert_eq!(opened, opens, "{name}={value}: {text}");
    }
    let (code, text, _) = place.mblm_in(&[("HOME", "here")], "plugin trust here/mblm/plugins");
    assert!(code == Some(2) && text.contains("set HOME to an absolute path"), "{text}");
    assert!(!place.at("here/.config").exists());
}

#[test]
fn a_runs_plugin_is_found_by_its_sum_wherever_it_lies() {
    let place = Place::new("{block_type: leaky}");
    fs::create_dir(place.at("built")).unwrap();
    compile("tests/plugins/broken.c", &place.at("built"), "leaky", &[]);
    place.succeed("train -q run.yaml --plugin-dir built --out run");
    fs::create_dir(place.at("moved")).unwrap();
    fs::rename(place.at("built/leaky.so"), place.at("moved/b.so")).unwrap();
    place.marker("moved");
    let (code, text, opened) = place.mblm("generate run --prompt a --max-bytes 3");
    assert!(code == Some(2) && !opened && text.contains("plugin leaky 1 (leaky.so, sha256 "), "{text}");
    let (code, text, opened) = place.mblm("generate run --prompt a --max-bytes 3 --plugin-dir moved");
    assert!(code == Some(0) && !opened, "only the library with that sum is opened: {text}");
    assert!(!place.succeed("report run").contains("skipped"), "a report needs no plugin");
    place.succeed("checkpoint export run --out w.safetensors");
    let (_, text, _) = place.mblm("checkpoint export run --out w.pth --pth-names --plugin-dir moved");
    assert!(text.contains("the Python package cannot load blocks of plugins"), "{text}");
}

#[test]
fn two_plugins_of_one_name_are_two_plugins() {
    let place = Place::new("{block_type: leaky}");
    let yaml = fs::read_to_string(place.at("run.yaml")).unwrap().replace(TRANSFORMER, "{block_type: leaky2}");
    fs::write(place.at("run.yaml"), yaml).unwrap();
    fs::create_dir(place.at("both")).unwrap();
    compile("tests/plugins/broken.c", &place.at("both"), "a", &[]);
    compile("tests/plugins/broken.c", &place.at("both"), "b", &["-DTYPE=\"leaky2\""]);
    place.succeed("train -q run.yaml --plugin-dir both --out run");
    place.succeed("generate run --plugin-dir both --prompt a --max-bytes 3");
    place.succeed("eval run data.txt --plugin-dir both --max-bytes 256");
    place.succeed("train -q --resume run --plugin-dir both");
}

#[test]
fn a_library_that_is_overwritten_changes_nothing_in_a_running_program() {
    let folder = tempfile::tempdir().unwrap();
    let library = broken(folder.path(), "NONE");
    let opened = mblm::plugin::host::Library::open(&library).unwrap();
    let sum = opened.origin().sha256.clone();
    // As a linker without a temporary file does: the same file, other bytes.
    let len = fs::metadata(&library).unwrap().len();
    fs::write(&library, vec![0xcc; len as usize]).unwrap();
    use mblm::registry::BlockSource;
    let source = mblm::plugin::host::PluginSource(opened);
    let block = source.parse("leaky", &serde_yaml::from_str("{}").unwrap()).unwrap();
    block.validate(4).unwrap();
    assert_eq!(block.plugin().unwrap().sha256, sum);
}

#[test]
fn a_probe_is_not_defeated_by_what_the_library_does() {
    let place = Place::new(TRANSFORMER);
    let write = |name: &str, code: &str| {
        fs::create_dir_all(place.at(name)).unwrap();
        let source = place.at(&format!("{name}/a.c"));
        let code = format!(
            "#include <stdio.h>\n#include <unistd.h>\n__attribute__((constructor)) static void go(void) {{ {code} }}"
        );
        fs::write(&source, code).unwrap();
        let library = place.at(&format!("{name}/a.so"));
        let made = std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(library).arg(source).status();
        assert!(made.unwrap().success());
    };
    // It would hold the pipe of the answer for as long as it lives.
    write("forks", "if (fork() == 0) { for (;;) pause(); }");
    write("escapes", "if (fork() == 0) { setsid(); sleep(60); _exit(0); }");
    write("prints", "for (int i = 0; i < 10000000; i++) puts(\"mblm-probe: accepted, accepted\");");
    for name in ["forks", "escapes", "prints"] {
        let list = place.succeed(&format!("plugin list --plugin-dir {name}"));
        assert!(list.contains("a.so: not a plugin: it has no symbol mblm_plugin_entry"), "{name}: {list}");
    }
    fs::write(place.at("forks/a.so"), "hi").unwrap();
    let list = place.succeed("plugin list --plugin-dir forks");
    assert!(list.contains("a.so: cannot be opened: file too short"), "the loader's own reason: {list}");
}
