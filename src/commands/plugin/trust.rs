//! `mblm plugin trust`: which libraries beside configurations may be loaded.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use mblm::base::terminal::Output;

use crate::exit::Usage;
use crate::plugins::trust::{Sums, Trust};

/// Arguments of `mblm plugin trust`.
#[derive(clap::Args)]
pub struct Args {
    /// The folder with the libraries, such as `plugins` beside a configuration
    #[arg(required_unless_present = "list")]
    folder: Option<PathBuf>,
    /// List what is trusted
    #[arg(long, conflicts_with_all = ["folder", "remove"])]
    list: bool,
    /// Stop trusting this folder
    #[arg(long)]
    remove: bool,
}

/// Runs `mblm plugin trust`.
pub fn run(args: &Args) -> Result<()> {
    let mut trust = Trust::read()?;
    let mut out = Output::new();
    let Some(folder) = &args.folder else {
        return trust.folders.iter().try_for_each(|(folder, sums)| {
            writeln!(out, "{}", folder.display())?;
            write_sums(&mut out, sums)
        });
    };
    if args.remove {
        // A folder that is gone is known by the path that --list shows.
        let place = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        if trust.folders.remove(&place).is_none() {
            return Err(
                Usage(format!("{}: not a trusted folder; --list shows the trusted ones", folder.display())).into()
            );
        }
        trust.write()?;
        return Ok(writeln!(out, "{} is trusted no longer", place.display())?);
    }
    let sums = trust.add(folder)?.clone();
    trust.write()?;
    writeln!(out, "configurations beside {} may use these libraries, as they are now:", folder.display())?;
    write_sums(&mut out, &sums)
}

fn write_sums(out: &mut impl Write, sums: &Sums) -> Result<()> {
    sums.iter().try_for_each(|(name, sum)| Ok(writeln!(out, "  {name}  sha256 {sum}")?))
}
