//! Studies that tune each variant before they score it, and studies over sizes and budgets.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{TRANSFORMER, begin_until, csv, json, mblm, metrics, read, workplace};

/// One variant has a rate that all but its lowest tries diverge at.
const STUDY: &str = "
base: base.yaml
variants:
  - name: as it is
  - name: Two transformers
    set: {'params.block[0]': TRANSFORMER, train.learning_rate: 1e32, train.gradient_clipping: null, train.warmup_steps_perc: 0}
tune: {train.learning_rate: {factor: 1e17, points: 3}, share: 0.5, widen: 2}
seeds: [1, 2]
budget: {bytes: 20_000}
output_dir: out
";

fn study() -> String {
    STUDY.replace("TRANSFORMER", TRANSFORMER)
}

/// The names of the folders in `folder`.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect()
}

/// The last validation of every run of the study in `folder`.
fn losses(folder: &Path) -> Vec<(String, f64)> {
    let runs = folder.join("out/runs");
    let loss = |name: &String| {
        metrics(&runs.join(name)).iter().rev().find(|m| m["kind"] == "valid").map(|m| m["bpb"].as_f64().unwrap())
    };
    names(&runs).into_iter().filter_map(|name| Some((name.clone(), loss(&name)?))).collect()
}

#[test]
fn every_variant_gets_the_same_number_of_tries_and_is_scored_at_its_best() {
    let folder = workplace(&study());
    let (code, plan, error) = mblm(folder.path(), &["compare", "study.yaml", "--dry-run"]);
    assert_eq!(code, 0, "{plan}{error}");
    let want = "2 variants x 2 seeds = 4 runs, 20.0 kB each, 1 at a time\n\
                tuned first: train.learning_rate, 3 to 5 values for each variant, 50% of the budget each = 6 to 10 runs\n";
    assert!(
        plan.contains(want)
            && plan.contains(
                "training and validation of the runs that are left, from a few steps of each variant here: about "
            ),
        "{plan}"
    );

    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml", "--jobs", "2"]);
    assert_eq!(code, 0, "{out}{error}");
    assert!(error.contains("failed: training stopped"), "a try that diverges is a measurement:\n{error}");
    let study = folder.path().join("out");
    let tried = |slug: &str| {
        let all = names(&study.join("configs"));
        all.into_iter().filter(|name| name.starts_with(&format!("{slug}--try-"))).count()
    };
    assert_eq!(tried("as-it-is"), tried("two-transformers"), "{:?}", names(&study.join("configs")));
    // A finite loss, whether it is a good one or not, with the rate that was the best.
    let (best, _) = losses(folder.path())
        .into_iter()
        .filter(|(name, _)| name.starts_with("as-it-is--try-"))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap();
    let value = best.strip_prefix("as-it-is--try-").unwrap().strip_suffix("-seed1000").unwrap();
    let scored = format!("as-it-is--{value}-seed2");
    let config = read(study.join("runs").join(&scored).join("config.yaml"));
    let rate = config.lines().find_map(|line| line.trim().strip_prefix("learning_rate: ")).unwrap();
    assert_eq!(rate.parse::<f64>().unwrap(), value.parse::<f64>().unwrap());
    let bytes = |run: &str| metrics(&study.join("runs").join(run)).last().unwrap()["bytes_seen"].as_u64().unwrap();
    assert_eq!((bytes(&best), bytes(&scored)), (10_240, 20_480), "half of the budget, and all of it");
    let results = json(study.join("results.json"));
    assert_eq!(results["variants"][0]["valid_bpb"]["seeds"], 2, "tries do not score");

    // Nothing is left to do, and nothing is done again, wherever the folder is.
    let before = losses(folder.path());
    fs::rename(&study, folder.path().join("moved")).unwrap();
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--out", "moved"]);
    assert!(code == 0 && !error.contains("failed: "), "{error}");
    fs::rename(folder.path().join("moved"), &study).unwrap();
    assert_eq!(losses(folder.path()), before);
}

#[cfg(target_os = "linux")]
#[test]
fn a_study_that_was_killed_while_it_tuned_ends_as_if_it_had_not_been() {
    let study = "base: base.yaml\ntune: {train.learning_rate: {points: 3}, widen: 1}\nseeds: [1]\n\
                 budget: {bytes: 60_000}\noutput_dir: out\n";
    let whole = workplace(study);
    assert_eq!(mblm(whole.path(), &["compare", "study.yaml"]).0, 0);
    let folder = workplace(study);
    for run in ["base--try-0.005-seed1000", "base--try-0.02-seed1000"] {
        let mut study = begin_until(folder.path(), run);
        study.kill().unwrap();
        study.wait().unwrap();
    }
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert_eq!(code, 0, "{out}{error}");
    assert_eq!(losses(folder.path()), losses(whole.path()));
}

#[test]
fn a_study_that_changed_is_refused_and_force_keeps_what_fits() {
    let study = "base: base.yaml\nvariants: [{name: a}, {name: b, set: {train.learning_rate: 0.02}}]\nseeds: [1, 2]\n\
                 budget: {bytes: 5_000}\noutput_dir: out\n";
    let folder = workplace(study);
    assert_eq!(mblm(folder.path(), &["compare", "study.yaml"]).0, 0);
    let before = losses(folder.path());
    let changed = study.replace("0.02", "0.03").replace("[1, 2]", "[2, 3]");
    fs::write(folder.path().join("study.yaml"), &changed).unwrap();
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert_eq!(code, 2, "{error}");
    for want in [
        "the study in out has changed since its runs:",
        "the seed 1 was removed: 2 runs no longer count",
        "b-seed2 was trained with another configuration: train.learning_rate: 0.02, now 0.03",
        "or use --force: it keeps the runs that still fit and moves those with another configuration or other data to out/replaced",
    ] {
        assert!(error.contains(want), "{error}\n{want}");
    }
    assert_eq!(losses(folder.path()), before, "nothing was touched");
    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--force", "--dry-run"]);
    assert!(code == 0 && losses(folder.path()) == before, "{error}");

    let (code, _, error) = mblm(folder.path(), &["compare", "study.yaml", "--force"]);
    assert!(code == 0 && error.contains("b-seed2") && error.contains("moved to out/replaced/b-seed2"), "{error}");
    assert_eq!(error.matches("(done before)").count(), 1, "a-seed2:\n{error}");
    let replaced = folder.path().join("out/replaced/b-seed2");
    assert_eq!(metrics(&replaced).last().unwrap()["kind"], "valid", "nothing is lost");
    assert_eq!(
        names(&folder.path().join("out/runs")),
        ["a-seed1", "a-seed2", "a-seed3", "b-seed1", "b-seed2", "b-seed3"].map(String::from).into()
    );
    // Seeds that are added are no change.
    fs::write(folder.path().join("study.yaml"), changed.replace("[2, 3]", "[2, 3, 4]")).unwrap();
    assert_eq!(mblm(folder.path(), &["compare", "study.yaml"]).0, 0);
}

/// What a later round comes to may be of an earlier design too.
#[test]
fn force_holds_the_runs_of_later_rounds_against_the_study_as_well() {
    let study = "base: base.yaml\ntune: {train.learning_rate: {points: 3}, widen: 0}\nseeds: [1]\n\
                 budget: {bytes: 6_000}\noutput_dir: out\n";
    let folder = workplace(study);
    assert_eq!(mblm(folder.path(), &["compare", "study.yaml"]).0, 0);
    // The tries fit, what scored does not: they had a half of the budget that scored then, and all of this one.
    let bytes =
        |run: &str| metrics(&folder.path().join("out").join(run)).last().unwrap()["bytes_seen"].as_u64().unwrap();
    let scored = names(&folder.path().join("out/runs")).into_iter().find(|name| name.ends_with("-seed1")).unwrap();
    assert_eq!(bytes(&format!("runs/{scored}")), 6_144);
    fs::write(folder.path().join("study.yaml"), study.replace("6_000", "12_000").replace("widen", "share: 0.5, widen"))
        .unwrap();
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml", "--force"]);
    assert_eq!(code, 0, "{out}{error}");
    assert_eq!(error.matches("(done before)").count(), 3, "the tries:\n{error}");
    assert!(error.contains(&format!("{scored} was trained with another configuration")), "{error}");
    assert_eq!((bytes(&format!("runs/{scored}")), bytes(&format!("replaced/{scored}"))), (12_288, 6_144));
}

#[test]
fn speeds_are_measured_again_one_run_after_the_other() {
    let folder = workplace("base: base.yaml\nseeds: [1, 2]\nbudget: {bytes: 5_000}\noutput_dir: out\njobs: 2\n");
    assert_eq!(mblm(folder.path(), &["compare", "study.yaml"]).0, 0);
    let result = |seed: u64| json(folder.path().join(format!("out/runs/base-seed{seed}/result.json")));
    let (before, at_once) = (losses(folder.path()), read(folder.path().join("out/report.md")));
    assert!(at_once.contains(", 2 runs at a time") && result(1)["speed"].is_null());
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml", "--speeds"]);
    assert_eq!(code, 0, "{out}{error}");
    for seed in [1, 2] {
        let rate = result(seed)["speed"]["bytes_per_second"].as_f64().unwrap();
        assert!(rate > 0.0 && result(seed)["measured"]["generation"]["bytes"].as_u64() > Some(0));
        let row = &csv(folder.path().join("out/results.csv"))[seed as usize - 1];
        assert_eq!(row["train_bytes_per_second"].parse::<f64>().unwrap(), rate);
    }
    let again = read(folder.path().join("out/report.md"));
    assert!(again.contains(", 2 runs at a time") && again.contains("speeds measured again, one run at a time with "));
    assert_eq!(losses(folder.path()), before);
    assert_eq!(names(&folder.path().join("out/runs")).len(), 2, "nothing is left over");
}

#[test]
fn a_variant_that_no_value_is_finite_for_fails_and_the_others_are_scored() {
    let study = study().replace("1e32", "1e37").replace("1e17", "2");
    let folder = workplace(&study);
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml"]);
    assert!(
        code == 1
            && error
                .contains("not scored, because tuning failed: \"Two transformers\"; see the report for the reasons"),
        "{error}"
    );
    let want = "Two transformers failed: no value of train.learning_rate gave a finite loss; tune it";
    assert!(out.contains(want) && out.contains("1  as it is"), "{out}");
}

#[test]
fn sizes_and_budgets_are_a_grid() {
    let study = "base: base.yaml\nscale: {sizes: [20k, 40k], budgets: [3G, 6G]}\nbudget: {tolerance: 0.2}\nseeds: [1, 2]\n\
                 tune: {train.learning_rate: {points: 3}, widen: 0}\noutput_dir: out\n";
    let folder = workplace(study);
    let (code, plan, error) = mblm(folder.path(), &["compare", "study.yaml", "--dry-run"]);
    assert_eq!(code, 0, "{plan}{error}");
    let want = "1 variant x 2 sizes x 2 budgets x 2 seeds = 8 runs, 6.00 GFLOP each at most, 1 at a time\n\
                tuned first: train.learning_rate, 3 values for each variant and size, 100% of the budget each = 6 runs\n";
    assert!(plan.contains(want) && plan.contains("base, 20k, 3GFLOP"), "{plan}");
    let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml", "--jobs", "2"]);
    assert_eq!(code, 0, "{out}{error}");
    let runs = names(&folder.path().join("out/runs"));
    assert_eq!(runs.iter().filter(|name| name.contains("--try-")).count(), 6);
    assert!(runs.iter().filter(|name| name.contains("--try-")).all(|name| name.contains("-3gflop")), "{runs:?}");
    assert_eq!(runs.len(), 6 + 8);
    assert!(out.contains("base, ") && out.contains("6GFLOP"), "the larger budget is ranked:\n{out}");
}

#[test]
fn what_cannot_be_tuned_or_scaled_is_said_before_anything_runs() {
    let folder = workplace("");
    for (rest, want) in [
        (
            "tune: {train.learning_rat: [1, 2]}\nbudget: {bytes: 9000}",
            "study.yaml: tune.train.learning_rat: expected a field that is a number in every variant, found no such field",
        ),
        (
            "tune: {train.learning_rate: [1, 2]}\nbudget: {bytes: 9000}",
            "the variant's own value, 0.01, is not among the values; add it",
        ),
        ("tune: {train.learning_rate: [0.01, -1]}\nbudget: {bytes: 9000}", "the value -1 cannot be trained: "),
        (
            "tune: {'params.block[0].d_state': [16, 8]}\nbudget: {bytes: 9000}",
            "the value 8 changes the number of parameters; vary the field in `grid` instead",
        ),
        (
            "tune: {train.weight_decay: {points: 3}}\nbudget: {bytes: 9000}",
            "a grid needs a positive value in its middle, found 0; give a list of values",
        ),
        (
            "tune: {train.learning_rate: {points: 3}, seeds: [1]}\nbudget: {bytes: 9000}",
            "tune.seeds[0]: the seed 1 is also in `seeds`",
        ),
        (
            "scale: {sizes: [100], budgets: [3G]}",
            "scale.sizes: hidden_dims of [32, 32] cannot be changed to give 100 parameters",
        ),
        (
            "scale: {sizes: [20.0k, 20.1k], budgets: [3G]}\nbudget: {tolerance: 0.3}",
            "scale.sizes: 20k and 20.1k give the same model of ",
        ),
        (
            "tune: {train.batch_size: [8, 4]}\nbudget: {bytes: 9000}",
            "cannot be tuned with train.max_eval_steps, which counts batches",
        ),
        (
            "scale: {sizes: [20k], budgets: [3G]}\nbudget: {bytes: 1}",
            "budget.bytes: a scaling study has its sizes and budgets in `scale`",
        ),
    ] {
        fs::write(folder.path().join("study.yaml"), format!("base: base.yaml\nseeds: [1]\noutput_dir: out\n{rest}\n"))
            .unwrap();
        let (code, out, error) = mblm(folder.path(), &["compare", "study.yaml"]);
        assert!(code == 2 && error.contains(want), "{rest}: {out}{error}\n{want}");
        assert!(!folder.path().join("out").exists());
    }
}
