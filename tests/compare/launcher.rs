//! Runs that a launcher starts: it fails, starts a run again by itself, loses a machine; the study is stopped or killed.

use super::*;

/// A launcher that says things, gives no input, and does something else at each start: the first fails, the second kills
/// what it started in the middle and starts it again, the third loses the machine in the middle, the others work.
const UNRELIABLE: &str = r#"
echo "job $$ is queued"
start=$(ls begun | wc -l)
touch begun/$start
in_the_middle() {
    "$@" </dev/null &
    until [ "$(wc -l < out/runs/$run/metrics.jsonl)" -ge 4 ]; do sleep 0.01; done 2>/dev/null
}
case $start in
    0) echo "error of the launcher: no machine" >&2; exit 9 ;;
    1) run=RUN_0; in_the_middle "$@"; kill -9 $!; "$@" </dev/null ;;
    2) run=RUN_1; in_the_middle "$@"; kill -9 $(cat /proc/$!/task/$!/children) $!; exit 137 ;;
    *) "$@" </dev/null ;;
esac
"#;

fn launched(folder: &Path, more: &[&str]) -> Command {
    let mut command = command(folder, &[&["compare", "study.yaml"], more].concat());
    command.env_remove("SLURM_CPUS_PER_TASK");
    command
}

fn ended(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// How often a machine has begun with a run.
fn starts(folder: &Path, run: &str) -> usize {
    read(folder.join("out/launched").join(format!("{run}.starts"))).lines().count()
}

#[cfg(target_os = "linux")]
#[test]
fn whatever_happens_to_a_launcher_the_losses_are_the_same() {
    let whole = workplace(SLOW);
    assert_eq!(mblm(whole.path(), &["compare", "study.yaml"]).0, 0);
    let folder = workplace(SLOW);
    fs::create_dir(folder.path().join("begun")).unwrap();
    let script = UNRELIABLE.replace("RUN_0", SLOW_RUNS[0]).replace("RUN_1", SLOW_RUNS[1]);
    fs::write(folder.path().join("launch.sh"), script).unwrap();
    let (code, said) = ended(launched(folder.path(), &["--launcher", "sh 'launch.sh'"]));
    assert_eq!(code, 0, "{said}");
    let first = "the launcher ended with exit code 9 (error of the launcher: no machine); starting it again in 1.0 s";
    assert!(said.contains(&format!("{}: {first}", SLOW_RUNS[0])), "{said}");
    assert!(said.contains(&format!("{}: the launcher ended with exit code 137", SLOW_RUNS[1])), "{said}");
    for run in SLOW_RUNS {
        assert_eq!(losses(folder.path(), run), losses(whole.path(), run), "{run} is as if nothing had happened");
        assert_eq!(starts(folder.path(), run), 2, "{run}");
        let log = read(folder.path().join("out/runs").join(run).join("train.log"));
        assert!(log.contains("resume: batch"), "{log}");
        let result = json(folder.path().join("out/runs").join(run).join("result.json"));
        let local = json(whole.path().join("out/runs").join(run).join("result.json"));
        assert_eq!((&result["threads"], &result["hosts"]), (&local["threads"], &local["hosts"]));
        assert!(result["peak_bytes"].as_u64().is_some_and(|bytes| bytes > 1_000_000), "{result}");
    }
    let hosts: Vec<String> =
        csv(folder.path().join("out/results.csv")).into_iter().map(|mut row| row.remove("hosts").unwrap()).collect();
    assert!(hosts.len() == 2 && hosts.iter().all(|host| !host.is_empty()), "{hosts:?}");
}

/// Starts the study and returns when a run has logged a few losses.
fn begin_launched(folder: &Path, more: &[&str]) -> std::process::Child {
    let child = launched(folder, more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_losses(folder, &SLOW_RUNS);
    child
}

#[cfg(target_os = "linux")]
#[test]
fn a_study_that_is_killed_takes_its_launched_runs_back() {
    let whole = workplace(SLOW);
    assert_eq!(mblm(whole.path(), &["compare", "study.yaml"]).0, 0);
    let folder = workplace(SLOW);
    let mut study = begin_launched(folder.path(), &["--launcher", "env"]);
    study.kill().unwrap();
    study.wait().unwrap();
    let (code, said) = ended(launched(folder.path(), &["--launcher", "env"]));
    assert_eq!(code, 0, "{said}");
    assert_eq!((starts(folder.path(), SLOW_RUNS[0]), starts(folder.path(), SLOW_RUNS[1])), (2, 1));
    let log = read(folder.path().join("out/runs").join(SLOW_RUNS[0]).join("train.log"));
    assert!(log.contains("interrupted: saved") && log.contains("resume: batch"), "{log}");
    for run in SLOW_RUNS {
        assert_eq!(losses(folder.path(), run), losses(whole.path(), run), "{run}");
    }
}

/// A launcher that starts one run, and lets others wait for ever.
const ONE_AT_A_TIME: &str = "mkdir taken && exec \"$@\"; echo $$ > queued; exec sleep 1000\n";

#[cfg(unix)]
#[test]
fn a_study_that_is_stopped_stops_what_was_launched_and_what_waits() {
    let folder = workplace(SLOW);
    fs::write(folder.path().join("launch.sh"), ONE_AT_A_TIME).unwrap();
    let args = ["--jobs", "2", "--launcher", "sh launch.sh"];
    let mut study = begin_launched(folder.path(), &args);
    let start = Instant::now();
    while !folder.path().join("queued").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "the second run was not launched");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").arg(study.id().to_string()).status().unwrap().success());
    assert_eq!(study.wait().unwrap().code(), Some(143));
    assert!(folder.path().join("out/failed").read_dir().unwrap().next().is_none(), "neither has failed");
    let log = read(folder.path().join("out/study.log"));
    assert!(SLOW_RUNS.iter().all(|run| log.contains(&format!("{run} is stopped"))), "{log}");
    // As many threads as the job was given.
    let (code, said) = ended(launched(folder.path(), &["--launcher", "env SLURM_CPUS_PER_TASK=1"]));
    assert_eq!(code, 0, "{said}");
    for run in SLOW_RUNS {
        assert_eq!(json(folder.path().join("out/runs").join(run).join("result.json"))["threads"], 1);
    }
}

#[test]
fn a_run_that_fails_is_told_from_a_launcher_that_does() {
    let study = "base: base.yaml\nseeds: [1]\nbudget: {bytes: 20_000}\noutput_dir: out\n\
                 variants: [{name: hopeless, set: {train.learning_rate: 1e37, train.gradient_clipping: null, \
                 train.warmup_steps_perc: 0}}]\n";
    let folder = workplace(study);
    let why = || read(folder.path().join("out/failed/hopeless-seed1.txt"));
    let launcher = "sh -c 'echo no such partition >&2; exit 1'";
    let (code, said) = ended(launched(folder.path(), &["--launcher", launcher, "--tries", "2"]));
    assert!(code == 1 && said.contains("1 of 1 runs failed"), "{said}");
    assert_eq!(
        why(),
        "the launcher was tried 2 times in a row without bringing the run further: the launcher ended with exit code 1 \
         (no such partition)"
    );
    // A launcher that starts several copies.
    let launcher = "env SLURM_STEP_NUM_TASKS=4";
    let (code, said) = ended(launched(folder.path(), &["--launcher", launcher, "--tries", "1", "--retry-failed"]));
    assert!(code == 1 && why().contains("error: srun has started 4 copies of this program"), "{said}{}", why());
    let (code, said) = ended(launched(folder.path(), &["--launcher", "env", "--retry-failed"]));
    assert!(code == 1 && why().starts_with("training stopped at gradient step"), "{said}{}", why());
    assert_eq!(starts(folder.path(), "hopeless-seed1"), 1, "what would fail again is not started again");
}

#[test]
fn what_no_launcher_can_do_is_said_before_anything_runs() {
    let folder = workplace("base: base.yaml\nbudget: {seconds: 5}\noutput_dir: out\n");
    let cases = [
        ("", "expected a command, such as 'srun -n1 -c8'; it is empty"),
        ("srun 'x", "a quote is not closed"),
        ("no-such-srun -n1", "there is no program no-such-srun"),
        ("env", "budget.seconds: the speed is measured on this machine, but --launcher trains on others"),
    ];
    for (launcher, want) in cases {
        let (code, said) = ended(launched(folder.path(), &["--launcher", launcher]));
        assert!(code == 2 && said.contains(want), "{said}");
    }
    let (code, said) = ended(launched(folder.path(), &["--tries", "3"]));
    assert!(code == 2 && said.contains("--launcher <COMMAND>"), "{said}");
    // Whether a device is there is for other machines to say.
    let elsewhere = ["--dry-run", "--set", "budget={bytes: 10000}", "--device", "cuda:99"];
    let (code, said) = ended(launched(folder.path(), &elsewhere));
    assert!(code == 2 && said.contains("device cuda"), "{said}");
    let (code, said) = ended(launched(folder.path(), &[&elsewhere[..], &["--launcher", "env"]].concat()));
    assert_eq!(code, 0, "{said}");
    assert!(!folder.path().join("out").exists(), "nothing is written");
}
