//! The program and its terminal: without one, with a full disk behind its output, with text that a terminal must not obey,
//! and with somebody who types.
#![cfg(unix)]

mod compiled;
mod programs;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use assert_cmd::cargo::CommandCargoExt;
use programs::text;

const RUN: &str = "\
io: {name_model: toy, output_dir: runs, dataset_dir: data.txt, dataset_id: bytes, num_models_to_save: 1,
  validate_amount: 2, log_train_loss_amount: 5}
params: {num_tokens: 257, pad_token_id: 256, input_seq_len: 32, hidden_dims: [16, 16], num_layers: [1, 1],
  seq_lens: [4, 8], block: {block_type: transformer, attn_head_dims: 8, attn_num_heads: 2, attn_use_rot_embs: true,
  pos_emb_type: fixed}}
train: {target_elements: 60, target_elements_strategy: sequence, batch_size: 4, max_eval_steps: 2, learning_rate: 0.01,
  gradient_accumulate_every: 1, shuffle_train: true}
";

const STUDY: &str = "\
base: run.yaml
variants: [{name: a}]
budget: {bytes: 512}
";

/// A folder with a configuration, a study, data, and a finished run in `R`.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..300).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
    fs::write(folder.path().join("data.txt"), text).unwrap();
    fs::write(folder.path().join("run.yaml"), RUN).unwrap();
    fs::write(folder.path().join("study.yaml"), STUDY).unwrap();
    let output = mblm(folder.path(), &["train", "-q", "run.yaml", "--out", "R"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    folder
}

fn mblm(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.current_dir(folder).args(args).env("XDG_DATA_HOME", folder.join("none")).env_remove("MBLM_PLUGIN_PATH");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

/// Every command whose product is what it prints.
fn commands(plugin: &str) -> Vec<Vec<&str>> {
    let lines = [
        "--help",
        "--version",
        "generate R --prompt a --max-bytes 3",
        "generate R --prompt a --max-bytes 3 --format raw",
        "generate R --prompt a --max-bytes 3 --json",
        "generate R --prompt a --max-bytes 3 --samples 2",
        "report R --out report",
        "eval R data.txt",
        "eval R data.txt --files --positions",
        "eval R data.txt --json",
        "checkpoint list R",
        "checkpoint verify R",
        "checkpoint export R --out weights.safetensors",
        "check run.yaml",
        "inspect run.yaml",
        "doctor run.yaml",
        "blocks",
        "blocks --schema mamba2",
        "schema",
        "schema --markdown",
        "bench run.yaml --batch 1 --steps 1 --bytes 1",
        "bench run.yaml --batch 1 --steps 1 --bytes 1 --json",
        "plugin list",
        "plugin new --c block",
        "compare study.yaml --out study",
        "compare study.yaml --dry-run",
    ];
    let of_plugin = [vec!["plugin", "schema", plugin, "lstm"], vec!["plugin", "check", plugin, "--only", "header"]];
    lines.iter().map(|line| line.split(' ').collect()).chain(of_plugin).collect()
}

#[test]
fn a_full_disk_behind_standard_output_is_an_error() {
    let folder = workplace();
    let plugin = compiled::lstm();
    for args in commands(plugin.to_str().unwrap()) {
        let output = mblm(folder.path(), &args).stdout(full()).output().unwrap();
        let error = text(&output.stderr);
        let want = "error: standard output: No space left on device";
        assert!(error.lines().any(|line| line.starts_with(want)), "{args:?}: {error}");
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(!error.contains("panicked"), "{args:?}: {error}");
        ["weights.safetensors", "block"].iter().for_each(|made| clear(&folder.path().join(made)));
    }
}

/// Runs a command as a shell does with this redirection.
fn redirected(folder: &Path, args: &[&str], how: &str) -> std::process::Output {
    let mut shell = Command::new("sh");
    let program = mblm(folder, &[]);
    shell.args(["-c", &format!(r#"exec "$0" "$@" {how}"#)]).arg(program.get_program()).args(args).current_dir(folder);
    shell.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_closed_standard_output_is_an_error() {
    let folder = workplace();
    let plugin = compiled::lstm();
    for args in commands(plugin.to_str().unwrap()) {
        let output = redirected(folder.path(), &args, ">&-");
        let error = text(&output.stderr);
        assert!(
            error.lines().any(|line| line.starts_with("error: standard output: it is closed")),
            "{args:?}: {error}"
        );
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(!folder.path().join("weights.safetensors").exists(), "{args:?}");
    }
    assert_eq!(redirected(folder.path(), &["blocks"], "1</dev/null").status.code(), Some(1), "open for reading alone");
    // What quiet training prints is its product.
    for (quiet, run, code) in [(None, "O", 0), (Some("-q"), "P", 1)] {
        let args: Vec<&str> = ["train", "run.yaml", "--out", run].into_iter().chain(quiet).collect();
        assert_eq!(redirected(folder.path(), &args, ">&-").status.code(), Some(code), "{args:?}");
        assert_finished(&folder.path().join(run));
    }
}

#[test]
fn a_closed_standard_input_is_an_error_where_it_is_read() {
    let folder = workplace();
    for more in [&[][..], &["--interactive"]] {
        let output = redirected(folder.path(), &[&["generate", "R", "--max-bytes", "2"], more].concat(), "<&-");
        let error = text(&output.stderr);
        assert!(output.status.code() == Some(1) && error.contains("standard input: it is closed"), "{error}");
    }
    let args = ["generate", "R", "--prompt", "a", "--max-bytes", "2"];
    assert_eq!(redirected(folder.path(), &args, "<&-").status.code(), Some(0));
}

fn clear(path: &Path) {
    let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path)); // most commands make neither
}

#[test]
fn nothing_fails_for_want_of_standard_error() {
    let folder = workplace();
    let plugin = compiled::lstm();
    let train = vec!["train", "run.yaml"];
    let warns = vec!["report", "R", "R", "--out", "report"];
    for args in commands(plugin.to_str().unwrap()).into_iter().chain([train, warns]) {
        let output = mblm(folder.path(), &args).stderr(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "full: {args:?}");
        ["weights.safetensors", "block"].iter().for_each(|made| clear(&folder.path().join(made)));
        let output = redirected(folder.path(), &args, "2>&-");
        assert_eq!(output.status.code(), Some(0), "closed: {args:?}");
        ["weights.safetensors", "block"].iter().for_each(|made| clear(&folder.path().join(made)));
    }
    // An error keeps its exit code.
    assert_eq!(mblm(folder.path(), &["inspect", "no.yaml"]).stderr(full()).output().unwrap().status.code(), Some(2));
}

fn assert_finished(run: &Path) {
    let log = fs::read_to_string(run.join("train.log")).unwrap();
    assert!(log.lines().last().unwrap().contains("finished: saved "), "{log}");
}

#[test]
fn training_outlives_its_outputs() {
    let folder = workplace();
    let finished = |run: &str| assert_finished(&folder.path().join(run));
    let output = mblm(folder.path(), &["train", "run.yaml", "--out", "full"]).stdout(full()).stderr(full()).output();
    assert_eq!(output.unwrap().status.code(), Some(0));
    finished("full");
    // What quiet training prints is its product.
    let output = mblm(folder.path(), &["train", "-q", "run.yaml", "--out", "quiet"]).stdout(full()).output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("the run is in quiet: standard output: No space left on device"), "{error}");
    finished("quiet");
    // A reader that is gone.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = mblm(folder.path(), &["train", "run.yaml", "--out", "pipe", "--retries", "2"]);
    let output = command.stdout(writer.try_clone().unwrap()).stderr(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    finished("pipe");
}

#[test]
fn training_and_a_study_outlive_their_terminal() {
    let folder = workplace();
    for args in [["train", "run.yaml", "--out", "T"], ["compare", "study.yaml", "--out", "S"]] {
        let (screen, terminal) = terminal();
        let mut command = mblm(folder.path(), &args);
        command.stdout(terminal.try_clone().unwrap()).stderr(terminal);
        let mut child = command.spawn().unwrap();
        drop(command);
        drop(screen);
        let code = child.wait().unwrap().code();
        // The report of the study is what it should have printed.
        let want = if args[0] == "train" { Some(0) } else { Some(1) };
        assert_eq!(code, want, "{args:?}");
    }
    assert_finished(&folder.path().join("T"));
    assert!(folder.path().join("S/report.html").exists());
}

/// A terminal: what is shown on its screen, and the end that programs write to.
fn terminal() -> (File, File) {
    let (mut screen, mut terminal) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: fills both numbers; neither name nor settings are asked for.
    let failed = unsafe { libc::openpty(&mut screen, &mut terminal, none, none as _, none as _) };
    assert_eq!(failed, 0);
    // SAFETY: both are open, and nobody else has them, nor do the programs that are started.
    unsafe {
        for end in [screen, terminal] {
            libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        (File::from_raw_fd(screen), File::from_raw_fd(terminal))
    }
}

/// What a command shows on a terminal.
fn shown(mut command: Command) -> String {
    let (mut screen, terminal) = terminal();
    command.stdout(terminal.try_clone().unwrap()).stderr(terminal);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut bytes = Vec::new();
    let _ = screen.read_to_end(&mut bytes); // an error, on Linux, when the last program has closed the terminal
    child.wait().unwrap();
    text(&bytes)
}

/// Data that a terminal would obey, learned well enough to be generated.
fn escapes() -> tempfile::TempDir {
    let folder = workplace();
    let data = b"\x1b[31m\x1b]0;T\x07\xc2\x9b2J\r\n".repeat(600);
    fs::write(folder.path().join("data.txt"), data).unwrap();
    folder
}

#[test]
fn no_control_character_reaches_a_terminal() {
    let folder = escapes();
    let at = |name: &str| folder.path().join(name);
    let trained = shown(mblm(folder.path(), &["train", "run.yaml", "--out", "E"]));
    let (_, sample) = trained.split_once("a sample: ").unwrap_or_else(|| panic!("{trained}"));
    assert!(sample.contains(r"\x1b[31m\x1b]0;T\x07\x9b2J\x0d"), "{sample}");
    fs::create_dir(at("files")).unwrap();
    let hostile = "a\x1b]0;T\x07.txt";
    fs::copy(at("data.txt"), at("files").join(hostile)).unwrap();
    fs::create_dir(at(hostile)).unwrap();
    fs::write(at("key.yaml"), RUN.replace("hidden_dims:", "\"\\e[31m\": 1, hidden_dims:")).unwrap();
    let study = STUDY.replace("name: a", "name: \"\\e[31ma\"");
    fs::write(at("names.yaml"), study).unwrap();
    let cases: [&[&str]; 7] = [
        &["generate", "R", "--prompt", "\x1b[31m", "--max-bytes", "9"],
        &["generate", "R", "--prompt", "\x1b[31m", "--max-bytes", "9", "--format", "raw"],
        &["generate", "R", "--prompt", "\x1b[31m", "--max-bytes", "9", "--samples", "2"],
        &["eval", "R", "files", "--files"],
        &["check", "key.yaml"],
        &["report", hostile, "R"],
        &["compare", "names.yaml", "--dry-run"],
    ];
    for args in cases.into_iter() {
        let shown = shown(mblm(folder.path(), args));
        assert!(shown.contains(r"\x1b"), "{args:?}: {shown}");
        assert!(!shown.contains(is_control), "{args:?}: {shown:?}");
        // The same bytes as ever where there is no terminal.
        let output = mblm(folder.path(), args).output().unwrap();
        assert!([&output.stdout[..], &output.stderr[..]].concat().contains(&0x1b), "{args:?}: {output:?}");
    }
    let raw = shown(mblm(folder.path(), &["generate", "R", "--prompt", "\x1b[31m", "--max-bytes", "1", "--raw"]));
    assert!(raw.starts_with("\x1b[31m"), "{raw:?}");
}

fn is_control(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t' | '\r') // a terminal begins each line with a carriage return
}

#[test]
fn quiet_training_still_warns() {
    let folder = workplace();
    let args = ["train", "-q", "run.yaml", "--out", "Q", "--set", "params.pad_token_id=32"];
    let error = text(&mblm(folder.path(), &args).output().unwrap().stderr);
    assert!(error.starts_with("warning: the pad token 32 is also a byte"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(fs::read_to_string(folder.path().join("Q/train.log")).unwrap().contains("warning: the pad token 32"));
}

/// What `mblm generate --interactive` prints for this input, and what it says.
fn interactive(folder: &Path, more: &[&str], input: &[u8]) -> (Vec<u8>, String) {
    let mut command = mblm(folder, &[&["generate", "R", "-i", "--max-bytes", "2"], more].concat());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    (output.stdout, text(&output.stderr))
}

#[test]
fn every_line_of_a_session_is_answered() {
    let folder = workplace();
    let (ids, _) = interactive(folder.path(), &["--format", "ids"], b"ab\n");
    let ids: Vec<u32> = text(&ids).split_whitespace().map(|id| id.parse().unwrap()).collect();
    assert!(ids.starts_with(&[97, 98]) && ids.len() == 4, "{ids:?}");
    // A line that is not UTF-8 is a prompt like any other.
    let (raw, said) = interactive(folder.path(), &["--format", "raw"], b"a\n\xff\xfe\nb\r\nc");
    assert!(raw.starts_with(b"a") && raw.windows(2).any(|two| two == b"\xff\xfe"), "{raw:?}");
    assert_eq!(said.matches("2 bytes (as many as asked for)").count(), 4, "{said}");
    let (path, _) = interactive(folder.path(), &[], br"C:\\new\nx");
    assert!(path.starts_with(b"C:\\new\nx"), "{}", text(&path));
    let (_, said) = interactive(folder.path(), &[], b":help me\n:temperatur 1\n:quit now\nnever\n");
    assert!(said.starts_with("TEXT ") && said.contains("unknown setting `temperatur`"), "{said}");
    assert!(!said.contains("bytes/s"), "{said}");
}

/// A terminal with somebody before it.
struct Person {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Person {
    /// Starts a command on a terminal of its own.
    fn start(mut command: Command) -> (Self, std::process::Child) {
        let (keyboard, terminal) = terminal();
        let files = [(); 3].map(|()| Stdio::from(terminal.try_clone().unwrap()));
        let [stdin, stdout, stderr] = files;
        command.stdin(stdin).stdout(stdout).stderr(stderr).env("TERM", "xterm");
        // SAFETY: both calls are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                programs::hear_signals();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let (send, screen) = channel();
        let mut reader = keyboard.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                send.send(bytes[..n].to_vec()).unwrap_or_default(); // nobody looks any more
            }
        });
        (Person { keyboard, screen, seen: String::new() }, child)
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen shows this, after what was waited for before.
    fn sees(&mut self, what: &str) {
        loop {
            if let Some(at) = self.seen.find(what) {
                self.seen.drain(..at + what.len());
                return;
            }
            let more = self.screen.recv_timeout(Duration::from_secs(60));
            self.seen += &text(&more.unwrap_or_else(|_| panic!("expected {what:?}, found {:?}", self.seen)));
        }
    }
}

#[test]
fn an_answer_can_be_interrupted_and_lines_typed_ahead() {
    let folder = workplace();
    // A context that takes long to fill.
    let train = ["train", "-q", "run.yaml", "--out", "L", "--set", "params.seq_lens=[8192, 8]"];
    assert!(mblm(folder.path(), &train).output().unwrap().status.success());
    let (mut person, mut child) = Person::start(mblm(folder.path(), &["generate", "L", "-i", "--max-bytes", "65000"]));
    person.sees("> ");
    person.types("line 1 of\r");
    person.sees("line 1 of");
    person.sees("line 1 of");
    person.types("\x03");
    person.sees("bytes (interrupted)");
    person.sees("> ");
    person.types(":max-bytes 7\rone\rtwo\r\r:quit\r");
    (0..3).for_each(|_| person.sees("7 bytes (as many as asked for)"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_cannot_be_saved_yet_ends_at_once() {
    let folder = workplace();
    let data = File::create(folder.path().join("large.bin")).unwrap();
    data.set_len(20 << 30).unwrap(); // each byte is held against the vocabulary
    let changes = ["io.dataset_dir=large.bin", "params.num_tokens=128", "params.pad_token_id=127"];
    let sets = changes.iter().flat_map(|change| ["--set", change]);
    let args = ["train", "run.yaml"].into_iter().chain(sets).collect::<Vec<_>>();
    let mut child = mblm(folder.path(), &args).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    // SAFETY: the process is a child that was not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn an_ignored_signal_stays_ignored() {
    let folder = workplace();
    let endless = |name: &str, signals: &[i32], sent: &[i32]| {
        let args = [
            "train",
            "run.yaml",
            "--out",
            name,
            "--set",
            "train.target_elements=4000000",
            "--set",
            "io.log_train_loss_amount=1000000",
        ];
        let mut command = mblm(folder.path(), &args);
        let signals = signals.to_vec();
        // SAFETY: the call is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                programs::hear_signals();
                for signal in &signals {
                    libc::signal(*signal, libc::SIG_IGN);
                }
                Ok(())
            });
        }
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        let log = folder.path().join(name).join("train.log");
        while !fs::read_to_string(&log).is_ok_and(|log| log.contains("  train loss ")) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // SAFETY: the process is a child that was not waited for.
        sent.iter().for_each(|signal| assert_eq!(unsafe { libc::kill(child.id() as i32, *signal) }, 0));
        child.wait_with_output().unwrap().status.code()
    };
    use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    assert_eq!(endless("hup", &[SIGHUP], &[SIGHUP, SIGTERM]), Some(143));
    assert_eq!(endless("int", &[SIGINT, SIGHUP], &[SIGINT, SIGHUP, SIGTERM]), Some(143));
    assert_eq!(endless("background", &[SIGINT, SIGQUIT], &[SIGINT]), Some(130));
    // Twice in a row, as `timeout` sends it, is once.
    assert_eq!(endless("twice", &[], &[SIGTERM, SIGTERM]), Some(143));
}
