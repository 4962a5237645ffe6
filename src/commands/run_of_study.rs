//! `mblm run-of-study`, which the launcher of a study starts on the machine that it chose: one run, to its end.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use mblm::study::{Errand, Outcome};
use mblm::train::config::RunConfig;
use mblm::yaml::Document;

use crate::plugins::Plugins;
use crate::signals;

/// Arguments of `mblm run-of-study`.
#[derive(clap::Args)]
pub struct Args {
    /// The study's folder
    study: PathBuf,
    /// The run's name
    name: String,
    /// What the study knows this start by
    #[arg(long)]
    ticket: String,
    /// What the sample continues [default: the beginning of the validation data]
    #[arg(long, allow_hyphen_values = true)]
    prompt: Option<String>,
}

/// Runs `mblm run-of-study`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let path = Errand::config_file(&args.study, &args.name);
    let config = RunConfig::from_document(&Document::read(&path)?, &plugins.registry(Some(&path))?)?;
    let errand = Errand {
        program: &std::env::current_exe()?,
        study: &args.study,
        name: &args.name,
        ticket: &args.ticket,
        config: &config,
        prompt: args.prompt.as_deref(),
    };
    signals::LISTENING.store(true, Ordering::SeqCst);
    match errand.run(&signals::STOP)? {
        Outcome::Ended => Ok(()),
        Outcome::Stopped(Some(why)) => bail!("{why}; it can go on from its newest checkpoint"),
        Outcome::Stopped(None) => {
            signals::check()?;
            bail!("the run was interrupted; it can go on from its newest checkpoint")
        }
    }
}
