//! `mblm compare`: train the variants of a study and report which is best.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mblm::base::terminal::{self, Output};
use mblm::device::DeviceName;
use mblm::gemm::autocast;
use mblm::model::Sequences;
use mblm::study::report::{Report, duration};
use mblm::study::{Launcher, Options, Plan, Runner, Spec};
use mblm::train::config::RunConfig;
use mblm::train::model::Model;

use crate::exit::EXIT_CODES;
use crate::plugins::Plugins;
use crate::{signals, trial};

/// How long a dry run measures the speed of each variant; at least one step.
const MEASURED: Duration = Duration::from_millis(500);

/// Arguments of `mblm compare`.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub struct Args {
    /// The study's YAML file
    study: PathBuf,
    /// Only show what would run, and estimate how long it would take
    #[arg(long)]
    dry_run: bool,
    /// Number of runs at a time; without --launcher they share the cores [default: `jobs` of the study]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    jobs: Option<u32>,
    /// Start each run through this command, such as 'srun -n1 -c8', on machines that share the file system
    #[arg(long, value_name = "COMMAND")]
    launcher: Option<Launcher>,
    /// With --launcher: a run has failed if N starts in a row have not brought it further
    #[arg(long, value_name = "N", default_value_t = 8, requires = "launcher")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    tries: u32,
    /// The study's output folder [default: its `output_dir`, or runs/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Run failed runs again
    #[arg(long)]
    retry_failed: bool,
    /// Where to train: cpu, cuda, cuda:N, metal or auto; the same as `--set train.device=DEVICE`
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
    /// After the last run, measure again how fast each run trains and generates, one at a time (on an idle machine)
    #[arg(long, conflicts_with = "launcher")]
    speeds: bool,
    /// If the study has changed: keep the runs that still fit, and move the others to `replaced` in its output folder
    #[arg(long)]
    force: bool,
    /// Override a field of the study (`budget.bytes=1e6`) or of every variant (`io.dataset_dir=DIR`); may be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
}

/// Runs `mblm compare`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let device = args.device.map(|device| format!("train.device={device}"));
    let set: Vec<String> = args.set.iter().cloned().chain(device).collect();
    let mut spec = Spec::read(&args.study, &set)?;
    spec.jobs = args.jobs.map_or(spec.jobs, |jobs| jobs as usize);
    spec.launcher = args.launcher.clone();
    spec.output_dir = args.out.clone().unwrap_or(spec.output_dir);
    let registry = plugins.registry(Some(&args.study))?;
    let mut plan = Plan::new(spec, &registry)?;
    plan.check_earlier_runs(args.force)?;
    let mut out = Output::new();
    let shown = writeln!(out, "{plan}");
    [plan.memory_warning(), plan.patching_warning()].into_iter().flatten().for_each(terminal::line);
    if args.dry_run {
        shown?;
        return hours(&plan);
    }
    signals::LISTENING.store(true, Ordering::SeqCst);
    let folder = plan.folder().to_path_buf();
    let has_unmeasured = plan.variants.iter().any(|variant| variant.about.bytes.is_none());
    let program = std::env::current_exe()?;
    let options = Options { program, retry_failed: args.retry_failed, force: args.force, tries: args.tries };
    let mut runner = Runner::new(&mut plan, options)?;
    if runner.calibrate(&signals::STOP)? && has_unmeasured {
        let _ = writeln!(out, "{}", runner.plan()); // an error comes again at the end
    }
    // On the way a report that cannot be written is no reason to stop.
    let ended =
        runner.run(&signals::STOP, &|| drop(Report::of_study(&folder).and_then(|report| report.write(&folder))))?;
    let is_measured = !args.speeds || ended.interrupted || runner.measure_again(&signals::STOP)?;
    signals::LISTENING.store(false, Ordering::SeqCst);
    let report = Report::of_study(&folder)?;
    report.write(&folder)?;
    let shown = writeln!(out, "\n{}\nreport: {}", report.to_text(), folder.join("report.html").display());
    if ended.interrupted || !is_measured {
        terminal::line("to continue, run the same command again; finished runs are kept");
        signals::check()?;
        bail!("runs were interrupted");
    }
    match ended.failed.len() {
        0 if ended.lost.is_empty() => Ok(shown?),
        0 => bail!("not scored, because tuning failed: {}; see the report for the reasons", listed(&ended.lost)),
        n => bail!(
            "{n} of {} runs failed; see the report for the reasons; --retry-failed runs them again",
            ended.failed.len() + ended.finished
        ),
    }
}

/// Shows how long a study takes, from a few steps of training of each variant.
fn hours(plan: &Plan) -> Result<()> {
    if plan.spec.launcher.is_some() {
        return Ok(());
    }
    let rates = plan.variants.iter().map(|variant| rate(&variant.config)).collect::<Result<Vec<_>>>()?;
    let (least, most) = plan.seconds(&rates);
    if least == 0.0 {
        return Ok(writeln!(Output::new(), "no run is left")?);
    }
    let upto = if most > least { format!(" to {}", duration(most)) } else { String::new() };
    Ok(writeln!(
        Output::new(),
        "training and validation of the runs that are left, from a few steps of each variant here: about {}{upto}",
        duration(least)
    )?)
}

/// Training bytes per second.
fn rate(config: &RunConfig) -> Result<f64> {
    let place = config.train.place()?;
    let model = Model::of(&config.params.model, trial::MASKING_PROBA, 0, place)?;
    let hierarchy = config.params.model.hierarchy();
    let (ids, len) = trial::sequences(hierarchy, config.train.batch_size, config.params.input_seq_len)?;
    let sequences = Sequences { ids: &ids, len, loss_mask: None };
    // It updates after every batch: a run that accumulates gradients is a little faster.
    let mut step = trial::training_step(&model, sequences, config.train.optimizer);
    let mut step = || autocast(config.train.precision, &mut step);
    step()?; // the first one makes buffers
    let (started, mut steps) = (Instant::now(), 0);
    while steps == 0 || started.elapsed() < MEASURED {
        step()?;
        steps += 1;
    }
    Ok((ids.len() * steps) as f64 / started.elapsed().as_secs_f64())
}

/// The names of variants, with quotes.
fn listed(variants: &[(String, String)]) -> String {
    variants.iter().map(|(name, _)| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}
