//! Whether this program is one of several processes that work together, as `mpirun` and `srun` start them.

use std::env;

use anyhow::Result;
use mblm::device::DeviceName;
use mblm::train::Error;
use mblm::train::error::Failure;
use mblm::train::processes::{Processes, Solo};

use crate::exit::{Usage, is_closed_pipe, is_elsewhere, is_usage};
#[cfg(feature = "mpi")]
use crate::signals;
use crate::signals::Interrupted;

/// The variables in which launchers say how many processes they have started: Open MPI, the launcher of MPICH and its kin,
/// and Slurm in a step of a job. Inside a job's script, outside of steps, there is one.
const LAUNCHERS: [(&str, &str); 3] =
    [("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun")];

/// In which of them it says which one this is, counted from 0.
const RANKS: [&str; 3] = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"];

/// Whether this is one of several copies that a launcher has started, and not the first: what is wrong with the command
/// line, the first one says.
pub fn is_another() -> bool {
    let rank = RANKS.iter().find_map(|name| env::var(name).ok()?.trim().parse().ok());
    Launched::find(|name| env::var(name).ok()).is_some() && rank.is_some_and(|rank: usize| rank > 0)
}

/// What a launcher has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Launched {
    by: &'static str,
    variable: &'static str,
    size: usize,
}

impl Launched {
    /// What the environment says, if it is more than one process.
    fn find(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let (name, by, size) = LAUNCHERS.iter().find_map(|(name, by)| {
            let size: usize = variable(name)?.trim().parse().ok()?;
            Some((*name, *by, size))
        })?;
        (size > 1).then_some(Launched { by, variable: name, size })
    }

    /// Why the copies of this program cannot all run.
    fn refuse(self, why: &str, remedy: &str) -> Usage {
        let Launched { by, variable, size } = self;
        Usage(format!(
            "{by} has started {size} copies of this program ({variable}={size}), and {why}: {remedy}; if each copy has a \
             task of its own, start it as `env -u {variable} mblm ...`"
        ))
    }
}

/// How a command shares its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Several processes do it together.
    Together,
    /// Each process would write the same files.
    Alone,
    /// Each process may do it by itself.
    Each,
}

/// The processes that work on a command, this one among them.
pub struct Joined {
    processes: Box<dyn Processes>,
    /// Which of those on this machine it is.
    local_rank: usize,
}

impl Joined {
    /// Joins the processes that a launcher has started. Call it on the main thread, before there are others that compute.
    ///
    /// # Errors
    /// There are several, and this program cannot work with them.
    pub fn new(sharing: Sharing) -> Result<Self> {
        let solo = || Joined { processes: Box::new(Solo), local_rank: 0 };
        match Launched::find(|name| env::var(name).ok()) {
            Some(launched) if sharing == Sharing::Together => join(launched),
            Some(launched) if sharing == Sharing::Alone => {
                let why = "each would write the same files";
                Err(launched.refuse(why, "this command runs as one process; start it by itself").into())
            }
            _ => Ok(solo()),
        }
    }

    /// All of them.
    pub fn all(&self) -> &dyn Processes {
        &*self.processes
    }

    /// The device of this process where `named` is asked for: of several on one machine each has a card of its own.
    pub fn device(&self, named: DeviceName) -> DeviceName {
        match named {
            DeviceName::Cuda(0) => DeviceName::Cuda(self.local_rank),
            named => named,
        }
    }

    /// What this process has, if all of them succeeded.
    ///
    /// # Errors
    /// The first error, wherever it happened.
    pub fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        let failure = mine.as_ref().err().map(|error| Failure {
            message: format!("{error:#}"),
            is_configuration: is_usage(error),
            is_not_finite: false,
        });
        match self.all().first_failure(failure) {
            Some((rank, failure)) if rank != self.all().rank() => Err(Error::Elsewhere { rank, failure }.into()),
            _ => mine,
        }
    }

    /// Waits until all of them have said what they have to say: a launcher ends the others when one has failed.
    pub fn wait(&self) {
        self.all().any(false);
    }

    /// The end of all of them. A process that was interrupted has not failed, and neither has one whose output nobody reads.
    pub fn all_end(&self, mine: Result<()>) -> Result<()> {
        match mine {
            Err(error) if error.is::<Interrupted>() || is_closed_pipe(&error) || is_elsewhere(&error) => {
                self.agree(Ok(()))?;
                Err(error)
            }
            mine => self.agree(mine),
        }
    }
}

#[cfg(not(feature = "mpi"))]
fn join(launched: Launched) -> Result<Joined> {
    let why = "each would do all of the work, and write the same files";
    let remedy = "build the program with `--features mpi`, with which they share it (docs/cluster.md)";
    Err(launched.refuse(why, remedy).into())
}

#[cfg(feature = "mpi")]
fn join(launched: Launched) -> Result<Joined> {
    use mblm::base::{memory, terminal};
    use mblm::train::processes::mpi::{Local, Mpi};

    let mpi = Mpi::join().map_err(Usage)?;
    if mpi.size() != launched.size {
        let why = format!("{} joins {} of them", Mpi::library(), mpi.size());
        let remedy = match launched.by {
            "srun" => "the two do not know each other; try `srun --mpi=pmix` (`srun --mpi=list` shows what there is)",
            _ => "start them with the launcher of the library that this program was built with",
        };
        return Err(launched.refuse(&why, remedy).into());
    }
    let Local { rank: local_rank, size, threads } = mpi.local();
    if env::var_os("RAYON_NUM_THREADS").is_none() {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    memory::share_among(size);
    if mpi.rank() > 0 {
        terminal::speak_as(format!("process {}: ", mpi.rank()));
        signals::say_nothing();
    }
    Ok(Joined { processes: Box::new(mpi), local_rank })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(variables: &[(&str, &str)]) -> Option<(&'static str, usize)> {
        let value = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string());
        Launched::find(value).map(|launched| (launched.variable, launched.size))
    }

    #[test]
    fn launchers_say_how_many_processes_there_are() {
        assert_eq!(find(&[]), None);
        assert_eq!(find(&[("OMPI_COMM_WORLD_SIZE", "4")]), Some(("OMPI_COMM_WORLD_SIZE", 4)));
        assert_eq!(find(&[("PMI_SIZE", "2")]), Some(("PMI_SIZE", 2)));
        assert_eq!(find(&[("SLURM_STEP_NUM_TASKS", "8")]), Some(("SLURM_STEP_NUM_TASKS", 8)));
        assert_eq!(find(&[("SLURM_STEP_NUM_TASKS", "1")]), None, "a run of a study");
        assert_eq!(find(&[("SLURM_NTASKS", "8")]), None, "a job's script, outside of steps");
        let nested = [("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "1")];
        assert_eq!(find(&nested), None, "the innermost launcher counts");
        assert_eq!(find(&[("PMI_SIZE", "many")]), None);
    }
}
