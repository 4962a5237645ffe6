//! Several processes on MPI, on one machine or many.

use mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};

use super::Processes;

/// Gradients go out in pieces of so many numbers, so that what is sent has a copy of that size alone.
const PIECE: usize = 1 << 20;

/// So many processors of a machine are told apart.
const CPUS: usize = 1024;

/// The processes that `mpirun`, `srun` or another launcher has started.
///
/// MPI is called from one thread at a time: the one that trains.
pub struct Mpi {
    world: SimpleCommunicator,
    /// Ends MPI when it is dropped.
    _universe: Universe,
}

// SAFETY: the handle of a communicator is a number or a pointer that any thread may use, one at a time, as
// `Threading::Serialized` has it; all of training calls from one.
unsafe impl Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

/// A machine and what the launcher lets this process use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Which of the processes on this machine this one is, from 0.
    pub rank: usize,
    /// How many there are on this machine.
    pub size: usize,
    /// As many threads as keep its cores busy if every process on it does the same.
    pub threads: usize,
}

impl Mpi {
    /// Joins the processes. Call it on the main thread, before there are others that compute.
    ///
    /// # Errors
    /// The MPI library has no support for threads.
    pub fn join() -> Result<Self, String> {
        let (universe, threading) = mpi::initialize_with_threading(mpi::Threading::Serialized)
            .ok_or_else(|| "MPI is initialised already".to_string())?;
        if threading < mpi::Threading::Serialized {
            return Err(format!("the MPI library supports {threading:?} threads only; expected Serialized"));
        }
        Ok(Mpi { world: universe.world(), _universe: universe })
    }

    /// The library that was found, in one line.
    pub fn library() -> String {
        let version = mpi::environment::library_version().unwrap_or_default();
        version.lines().next().unwrap_or_default().split(',').next().unwrap_or_default().trim().into()
    }

    /// This process among those on its machine.
    pub fn local(&self) -> Local {
        let neighbours = self.world.split_shared(self.world.rank());
        let (rank, size) = (neighbours.rank() as usize, neighbours.size() as usize);
        let mine = cpus();
        let mut all = vec![0u64; size * mine.len()];
        neighbours.all_gather_into(&mine[..], &mut all[..]);
        Local { rank, size, threads: threads(&mine, all.chunks(mine.len())) }
    }
}

impl Drop for Mpi {
    /// A process that panics must not wait for the others, which wait for it.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.world.abort(101);
        }
    }
}

impl Processes for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn sum(&self, numbers: &mut [f64]) {
        let mine = numbers.to_vec();
        self.world.all_reduce_into(&mine[..], numbers, SystemOperation::sum());
    }

    fn sum_gradients(&self, gradients: &mut [f32]) {
        let mut mine = vec![0.0; PIECE.min(gradients.len())];
        for piece in gradients.chunks_mut(PIECE) {
            let mine = &mut mine[..piece.len()];
            mine.copy_from_slice(piece);
            self.world.all_reduce_into(mine, piece, SystemOperation::sum());
        }
    }

    fn broadcast(&self, from: usize, bytes: &mut Vec<u8>) {
        let from = self.world.process_at_rank(from as i32);
        let mut len = bytes.len() as u64;
        from.broadcast_into(&mut len);
        bytes.resize(len as usize, 0);
        bytes.chunks_mut(1 << 30).for_each(|piece| from.broadcast_into(piece));
    }
}

/// The processors that this process may run on, a bit each.
fn cpus() -> [u64; CPUS / 64] {
    let mut bits = [0u64; CPUS / 64];
    #[cfg(target_os = "linux")]
    {
        // SAFETY: zeros are an empty set, which the call fills; its size is given.
        let set = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            match libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) {
                0 => Some(set),
                _ => None,
            }
        };
        for cpu in 0..CPUS {
            // SAFETY: the set holds as many processors as are asked for.
            if set.is_some_and(|set| unsafe { libc::CPU_ISSET(cpu, &set) }) {
                bits[cpu / 64] |= 1 << (cpu % 64);
            }
        }
    }
    bits
}

/// As many threads as `mine` leaves each of the processes that may run on the same processors. Those that are not known are
/// shared by all.
fn threads<'a>(mine: &[u64], all: impl Iterator<Item = &'a [u64]>) -> usize {
    let cpus: u32 = mine.iter().map(|bits| bits.count_ones()).sum();
    let cpus = match cpus {
        0 => std::thread::available_parallelism().map_or(1, |cpus| cpus.get()),
        cpus => cpus as usize,
    };
    let sharing = all.filter(|other| *other == mine).count().max(1);
    (cpus / sharing).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_share_the_processors_that_they_are_bound_to() {
        let threads = |all: &[&[u64]]| threads(all[0], all.iter().copied());
        assert_eq!(threads(&[&[0b1111]]), 4);
        assert_eq!(threads(&[&[0b1111], &[0b1111]]), 2, "not bound");
        assert_eq!(threads(&[&[0b0011], &[0b1100]]), 2, "bound to cores of their own");
        assert_eq!(threads(&[&[0b1], &[0b1], &[0b1]]), 1, "more processes than processors");
        assert_eq!(threads(&[&[0, 0b11], &[0b11, 0], &[0, 0b11]]), 1, "a socket each, and one that is shared");
    }
}
