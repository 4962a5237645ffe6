//! `mblm train`: start or resume a run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use mblm::base::memory::{Limit, Memory};
use mblm::base::terminal::{self, Output};
use mblm::config::MblmConfig;
use mblm::data::{Splits, unigram_entropy};
use mblm::device::{DeviceName, Place};
use mblm::generate::{Format, Sampler, Sampling, TokenStream, Until, generate};
use mblm::model::Mblm;
use mblm::patching::{Cutter, without_padding};
use mblm::train as training;
use mblm::train::config::{ModelConfig, OptimizerKind, Params, RunConfig};
use mblm::train::cost::{ModelCost, Step, bytes as shown_bytes, metric};
use mblm::train::doctor::{Finding, glance};
use mblm::train::evaluate::bpb;
use mblm::train::journal::folder::RunFolder;
use mblm::train::model::{Model, TrainModel};
use mblm::train::session::{self, Session};
use mblm::train::trainer::{End, Outcome};
use mblm::yaml::Document;

use crate::exit::{EXIT_CODES, Usage, is_closed_pipe};
use crate::plugins::Plugins;
use crate::processes::Joined;
use crate::{model, orphan, signals, streams};

/// Bytes of validation data that the sample at a run's end continues, and bytes that it makes.
const PROMPT: usize = 100;
const SAMPLE: usize = 200;

/// How long a run of a study may go on after the study was killed: for the batch in progress and a checkpoint.
const ORPHAN_GRACE: Duration = Duration::from_secs(6);

/// Arguments of `mblm train`.
#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub struct Args {
    /// The training configuration
    #[arg(required_unless_present = "resume")]
    config: Option<PathBuf>,
    /// Resume this run from its newest checkpoint
    #[arg(long, value_name = "RUN", conflicts_with = "config")]
    resume: Option<PathBuf>,
    /// The run folder to create [default: `io.output_dir`/`io.name_model`-TIME]
    #[arg(long, value_name = "RUN", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Where to train: cpu, cuda, cuda:N, metal or auto; the same as `--set train.device=DEVICE`
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
    /// Override a field of the configuration, e.g. `--set train.learning_rate=3e-4`; may be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Resume although the configuration differs from that of the checkpoint
    #[arg(long, requires = "resume", conflicts_with = "config")]
    force: bool,
    /// Resume although a plugin's file differs from the one that the run was trained with
    #[arg(long, requires = "resume", conflicts_with = "config")]
    allow_plugin_change: bool,
    /// After a failure (disk, data, block), continue from the newest checkpoint, at most N times
    #[arg(long, value_name = "N", default_value_t = 0)]
    retries: u32,
    /// Show only warnings and errors; print the run's folder at the end
    #[arg(short, long)]
    quiet: bool,
    /// End as at SIGTERM when standard input does: a run that a study started ends with that study
    #[arg(long, hide = true)]
    until_eof: bool,
}

impl Args {
    /// The fields that the command line sets.
    fn assignments(&self) -> impl Iterator<Item = String> {
        let device = self.device.map(|device| format!("train.device={device}"));
        self.set.iter().cloned().chain(device)
    }
}

/// Runs `mblm train`.
pub fn run(args: &Args, plugins: &Plugins, joined: &Joined) -> Result<()> {
    if args.until_eof {
        signals::catch_end_of_input();
        orphan::end_with_parent(ORPHAN_GRACE);
    }
    let (run, outcome) = match (&args.resume, &args.config) {
        (Some(run), _) => (run.clone(), resume(run, args, plugins, joined)?),
        (None, Some(path)) => {
            let (document, config) = joined.agree(read(path, args, plugins))?;
            // Errors of the data and of the plan begin with the field that is at fault; here its line is known.
            let located = |error: training::Error| error.located(&document);
            session(&config, args, joined)?.train().map_err(located)?
        }
        (None, None) => return Err(Usage("expected a configuration, or --resume RUN".into()).into()),
    };
    if !joined.all().is_first() {
        return if outcome.end == End::Stopped { Err(signals::interrupted().into()) } else { Ok(()) };
    }
    let shown = match outcome.end {
        _ if args.quiet => print_folder(&run),
        End::Stopped | End::TimeLimit => {
            terminal::line(format_args!("to continue: mblm train --resume {}", shell_word(&run)));
            Ok(())
        }
        End::Finished => conclude(&run, &outcome, args.allow_plugin_change, plugins),
    };
    match (outcome.end, shown) {
        (End::TimeLimit | End::Finished, shown) if args.quiet => return shown,
        // The run is complete, whether or not this can be shown.
        (_, Err(error)) if !is_closed_pipe(&error) => terminal::line(format_args!("warning: {error:#}")),
        _ => {}
    }
    match outcome.end {
        End::Stopped => Err(signals::interrupted().into()),
        End::TimeLimit | End::Finished => Ok(()),
    }
}

/// Reads the configuration of a new run.
fn read(path: &Path, args: &Args, plugins: &Plugins) -> Result<(Document, RunConfig)> {
    let mut document = Document::read(path)?;
    args.assignments().try_for_each(|assignment| document.set(&assignment))?;
    let mut config = RunConfig::from_document(&document, &plugins.registry(Some(path))?)?;
    find_checkpoint(&mut config, path, &args.set);
    Ok((document, config))
}

/// Goes on with a run.
fn resume(path: &Path, args: &Args, plugins: &Plugins, joined: &Joined) -> Result<Outcome> {
    // The first process locks the folder.
    let run = match joined.all().is_first() {
        true => RunFolder::open(path),
        false => Ok(RunFolder::of_another(path.into())),
    };
    let run = joined.all().agree(run)?;
    let (config, changes) = joined.agree(read_run(path, &run, args, plugins))?;
    Ok(Session { changes, ..session(&config, args, joined)? }.resume(&run)?)
}

/// Reads the configuration of a run. It is that of its newest checkpoint, unless `--force` lets it be another one; then how
/// they differ comes with it.
fn read_run(path: &Path, run: &RunFolder, args: &Args, plugins: &Plugins) -> Result<(RunConfig, Vec<String>)> {
    let checkpoint = run.checkpoints().newest()?;
    let state = checkpoint.state()?;
    let registry = plugins.registry_of_run(path, &state.plugins, args.allow_plugin_change)?;
    let read = |text: &str, name: &Path, set: &[String]| -> Result<RunConfig> {
        let mut document = Document::parse(text, &name.display().to_string())?;
        set.iter().try_for_each(|assignment| document.set(assignment))?;
        Ok(RunConfig::from_document(&document, &registry)?)
    };
    let assignments: Vec<String> = args.assignments().collect();
    let config = read(&RunFolder::config_yaml(path)?, &path.join("config.yaml"), &assignments)?;
    if !args.allow_plugin_change {
        state.check_plugins(&config.plugins())?;
    }
    // A small model that was moved is looked for where it is now.
    let places: Vec<String> =
        assignments.into_iter().filter(|set| set.starts_with("params.patching") && set.contains(".model=")).collect();
    let before = read(&checkpoint.config_yaml()?, &checkpoint.path().join("config.yaml"), &places)?;
    let mut changes = before.differences(&config)?;
    // Allowed: training says whether the device is another one than the checkpoint's.
    changes.retain(|change| !change.starts_with("train.device:"));
    if !changes.is_empty() {
        let list = changes.iter().map(|change| format!("\n  {change}")).collect::<String>();
        if changes.iter().any(|change| change.starts_with("params.patching")) {
            let (run, saved) = (path.display(), checkpoint.path().display());
            return Err(Usage(format!(
                "{run}: the patches are not those of {saved}:{list}\nrestore the rule: weights do not fit other patches. To begin \
                 a new run with them, export them with `mblm checkpoint export --pth-names` and name the file in \
                 resume.checkpoint_file"
            ))
            .into());
        }
        if !args.force {
            let (run, saved) = (path.display(), checkpoint.path().display());
            return Err(Usage(format!(
                "{run}: the configuration is not that of {saved}:{list}\nrestore it, or accept the change with --force"
            ))
            .into());
        }
    }
    Ok((config, changes))
}

/// Finds the checkpoint that the configuration at `path` begins with. A path on the command line is one from here.
pub fn find_checkpoint(config: &mut RunConfig, path: &Path, set: &[String]) {
    let is_set = |assignment: &String| {
        let field = assignment.split('=').next().unwrap_or_default().trim();
        ["resume", "resume.checkpoint_file"].contains(&field)
    };
    if let (Some(resume), false) = (&mut config.resume, set.iter().any(is_set)) {
        resume.resolve(path.parent().unwrap_or(Path::new("")));
    }
}

fn session<'a>(config: &'a RunConfig, args: &Args, joined: &'a Joined) -> Result<Session<'a>> {
    let device = joined.device(config.train.device);
    let build = move || Ok(Box::new(build(config, device)?) as Box<dyn TrainModel>);
    Ok(Session {
        build: Box::new(build),
        place: args.out.clone(),
        retries: args.retries,
        quiet: args.quiet,
        processes: joined.all(),
        listening: Some(&signals::LISTENING),
        ..Session::new(config, &signals::STOP)?
    })
}

/// Builds the model to train, on `device`.
///
/// # Errors
/// As of [`outline`].
fn build(config: &RunConfig, device: DeviceName) -> training::Result<Model> {
    let model = outline(config, true)?;
    let place = Place::from(device.open()?);
    if !place.is_host() {
        return Model::at(config, config.train.seed, place);
    }
    model.params().draw();
    Ok(model)
}

/// The model to train, without memory for its parameters. Warns if a training step is likely not to fit the machine, and of
/// stages that look wrong.
///
/// # Errors
/// It cannot fit, and is to be trained `here`; a block cannot be trained, or its outputs are not those of its parameters.
pub fn outline(config: &RunConfig, here: bool) -> training::Result<Model> {
    let model = Model::outline(config, config.train.seed)?;
    let step = Step { batch: config.train.batch_size, bytes: config.params.input_seq_len };
    let report = ModelCost::new(config.params.model.hierarchy(), model.params(), &model.stage_models(), step)
        .trained_by(config.train.optimizer);
    match mblm::base::memory::available().filter(|limit| report.least_bytes() > limit.bytes as f64) {
        Some(limit) if here => return Err(training::Error::Config(too_large(&report, &limit))),
        Some(_) => {}
        None => warn_of_stages(config)?,
    }
    if let (Some(peak), Some(memory)) = (report.peak_bytes(), Memory::now())
        && let total = mblm::base::memory::share(memory.total)
        && peak > total as f64
    {
        terminal::line(format_args!(
            "warning: a training step needs about {}, and this machine has {} of memory for it; lower train.batch_size or \
             params.input_seq_len, or recompute stages in chunks (params.train_checkpoint_chunks); `mblm inspect` shows \
             what needs how much",
            shown_bytes(peak),
            shown_bytes(total as f64)
        ));
    }
    Ok(model)
}

/// Looks at the stages, and warns of what looks wrong.
fn warn_of_stages(config: &RunConfig) -> training::Result<()> {
    for Finding { place, what, advice, .. } in glance(&config.params.model)? {
        terminal::line(format_args!("warning: {place}: {what}; {advice}"));
    }
    Ok(())
}

/// Refuses a model of which a training step of `batch` sequences of `bytes` bytes cannot fit the memory.
pub fn must_fit(config: &ModelConfig, step: Step, optimizer: OptimizerKind) -> training::Result<()> {
    let model = Model::outline_of(config, 0.0, 0)?;
    let report = ModelCost::new(config.hierarchy(), model.params(), &model.stage_models(), step).trained_by(optimizer);
    match mblm::base::memory::available().filter(|limit| report.least_bytes() > limit.bytes as f64) {
        Some(limit) => Err(training::Error::Config(too_large(&report, &limit))),
        None => Ok(()),
    }
}

/// What needs the memory that there is not.
fn too_large(report: &ModelCost, limit: &Limit) -> String {
    let parameters = metric(report.total.parameters as f64);
    let stages = report.stages.iter().map(|stage| metric(stage.part.parameters as f64).trim_end().to_string());
    format!(
        "params: training needs at least {}, and {limit}; the model has {} parameters ({} in its stages), and a batch is \
         train.batch_size x params.input_seq_len = {} x {} bytes; make one of them smaller",
        shown_bytes(report.least_bytes()),
        parameters.trim_end(),
        stages.collect::<Vec<_>>().join(" + "),
        report.step().batch,
        report.step().bytes
    )
}

/// Prints a run's folder, byte for byte: it is what quiet training is asked for.
fn print_folder(run: &Path) -> Result<()> {
    let line = [run.as_os_str().as_encoded_bytes(), b"\n"].concat();
    let mut out = Output::new();
    let printed = streams::check_output().and_then(|()| out.write_all(&line)).and_then(|()| out.flush());
    printed.with_context(|| format!("the run is in {}", run.display()))
}

/// A path as a shell takes it.
fn shell_word(path: &Path) -> String {
    let Some(text) = path.to_str() else {
        // The form of bash, zsh and ksh for any bytes.
        return format!("$'{}'", path.as_os_str().as_encoded_bytes().escape_ascii());
    };
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,".contains(c);
    if text.chars().all(is_plain) { text.into() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Says what was reached, shows what the model writes, and how to have it write more.
fn conclude(run: &Path, outcome: &Outcome, allow_plugin_change: bool, plugins: &Plugins) -> Result<()> {
    let args = model::Args { run: run.into(), best: false, device: DeviceName::Cpu, allow_plugin_change };
    let trained = model::load(&args, plugins)?;
    let (data, _) = session::open_data_of(run, &trained.config)?;
    let mut out = Output::new();
    writeln!(out)?;
    if let Some(loss) = outcome.state.valid_loss {
        write!(out, "validation: {:.3} bpb", bpb(loss))?;
        match data.train.byte_counts()? {
            Some(counts) => writeln!(out, "; the entropy of single bytes is {:.3} bits", unigram_entropy(&counts))?,
            None => writeln!(out)?,
        }
    }
    let places = plugins.named().iter().map(|place| format!(" --plugin-dir {}", shell_word(place)));
    let run = shell_word(run) + &places.collect::<String>();
    let Ok(model) = trained.generative() else {
        return Ok(writeln!(out, "\nmore:\n  {} eval {run} DATA", program())?);
    };
    let mut out = sample(out, model, &prompt(&data, &trained.config.params)?)?;
    Ok(writeln!(out, "\nmore:\n  {} generate {run} --prompt \"//! \"", program())?)
}

/// The beginning of the validation data.
pub fn prompt(data: &Splits, params: &Params) -> Result<Vec<u32>> {
    let (seq_len, pad) = (params.input_seq_len, params.model.hierarchy().pad_token_id as u32);
    let mut ids = vec![0; seq_len];
    let mut mask = vec![0.0; if data.valid.has_loss_mask() { seq_len } else { 0 }];
    data.valid.sample(0, 0, &mut ids, &mut mask)?;
    let end = without_padding(&ids, pad).len();
    ids.truncate(PROMPT.min(seq_len / 2).min(end));
    with_room(params.model.hierarchy(), ids)
}

/// A prompt, or its end if it would leave less than half of the context.
///
/// # Errors
/// A rule of patching fails.
pub fn with_room(model: &MblmConfig, mut prompt: Vec<u32>) -> Result<Vec<u32>> {
    prompt.drain(..prompt.len().saturating_sub(model.context_len() / 2));
    if model.is_fixed() {
        return Ok(prompt);
    }
    let patches = |ids: &[u32], count: usize| Cutter::new(model).sequence_len(ids, count);
    let half = (model.seq_lens[0] / 2).max(1);
    while patches(&prompt, half)? < prompt.len() {
        prompt.drain(..patches(&prompt, 1)?);
    }
    Ok(prompt)
}

fn sample(mut out: Output, model: &Mblm, prompt: &[u32]) -> Result<Output> {
    let rule = "─".repeat(78);
    let length = prompt.len();
    writeln!(out, "\na sample: {length} bytes of validation data, continued by the model\n{rule}")?;
    let mut stream = TokenStream::new(out, Format::Utf8);
    prompt.iter().try_for_each(|token| stream.write(*token))?;
    let mut samplers = [Sampler::new(Sampling { temperature: 0.7, ..Sampling::default() })?];
    let until = Until { max_tokens: Some(SAMPLE), stop_token: None };
    generate(model, &[prompt.to_vec()], &mut samplers, &until, |_, token| {
        stream.write(token)?;
        Ok(true)
    })?;
    let mut out = stream.finish()?;
    writeln!(out, "\n{rule}")?;
    Ok(out)
}

/// How this program was called, so that the printed command works as it is.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "mblm".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_a_path_back() {
        let cases = [("runs/a-1.b", "runs/a-1.b"), ("my runs/it's", r"'my runs/it'\''s'"), ("a;b", "'a;b'")];
        for (path, want) in cases {
            assert_eq!(shell_word(Path::new(path)), want);
        }
        #[cfg(unix)]
        {
            let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"it's r\xff");
            assert_eq!(shell_word(Path::new(path)), r"$'it\'s r\xff'");
        }
    }
}
