//! The processes that train one model together: each has the whole model and its own share of the data.
//!
//! [`Processes`] is all that training asks of them. [`Solo`] is the one process of every other run; `mpi` is several,
//! with the feature of that name. Every method is a collective: all processes call the same ones in the same order. What
//! only one of them knows (a failure, a signal, the time) is therefore made known to all before any of them acts on it.

#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(test)]
pub(crate) mod threads;

use std::any::Any;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mblm_base::random::mix;
use mblm_core::ParamStore;
use mblm_data::share::Share;
use rayon::prelude::*;

use crate::error::{Error, Failure, Result};

/// Weights whose bits are mixed one after the other.
const PIECE: usize = 1 << 16;

/// The processes that train together.
pub trait Processes: Send + Sync {
    /// Which one this is, counted from 0. The first alone writes files.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Adds up what each process has in the same place. All get the same bits, and the same ones whenever the same numbers
    /// are added.
    fn sum(&self, numbers: &mut [f64]);

    /// As [`sum`](Self::sum), for gradients.
    fn sum_gradients(&self, gradients: &mut [f32]);

    /// All get the bytes that process `from` has.
    fn broadcast(&self, from: usize, bytes: &mut Vec<u8>);
}

/// A process by itself.
#[derive(Clone, Copy, Debug)]
pub struct Solo;

impl Processes for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn sum(&self, _: &mut [f64]) {}
    fn sum_gradients(&self, _: &mut [f32]) {}
    fn broadcast(&self, _: usize, _: &mut Vec<u8>) {}
}

impl dyn Processes + '_ {
    /// Whether this process is the one that writes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The share of the data that this process trains on.
    pub fn share(&self) -> Share {
        Share { rank: self.rank(), size: self.size() }
    }

    /// Whether `flag` is set in one of them.
    pub fn any(&self, flag: bool) -> bool {
        let mut count = [f64::from(u8::from(flag))];
        self.sum(&mut count);
        count[0] > 0.0
    }

    /// The number that each of them has, in the order of their ranks.
    pub fn gather(&self, number: f64) -> Vec<f64> {
        let mut numbers = vec![0.0; self.size()];
        numbers[self.rank()] = number;
        self.sum(&mut numbers);
        numbers
    }

    /// The failure of the first process that has one, and its rank.
    pub fn first_failure(&self, mine: Option<Failure>) -> Option<(usize, Failure)> {
        if self.size() == 1 {
            return mine.map(|failure| (0, failure));
        }
        let failed = self.gather(f64::from(u8::from(mine.is_some())));
        let rank = failed.iter().position(|failed| *failed > 0.0)?;
        let mut bytes = mine.map_or_else(Vec::new, |failure| failure.to_bytes());
        self.broadcast(rank, &mut bytes);
        Some((rank, Failure::from_bytes(&bytes)))
    }

    /// What this process has, if all of them succeeded.
    ///
    /// # Errors
    /// Of the first that failed: its own error there, and [`Error::Elsewhere`] in the others.
    pub fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        match self.first_failure(mine.as_ref().err().map(Failure::from)) {
            None => mine,
            Some((rank, _)) if rank == self.rank() => mine,
            Some((rank, failure)) => Err(Error::Elsewhere { rank, failure }),
        }
    }

    /// Checks that every process has the same `what` as the first one. `sum` identifies the contents.
    ///
    /// # Errors
    /// A process has something else.
    pub fn must_have_the_same(&self, what: &str, sum: u64) -> Result<()> {
        let mut first = sum.to_le_bytes().to_vec();
        self.broadcast(0, &mut first);
        let differs = first != sum.to_le_bytes();
        self.agree(if differs {
            Err(Error::Config(format!(
                "not the same {what} as in process 0: start all processes with the same program and the same files, on \
                 one kind of machine"
            )))
        } else {
            Ok(())
        })
    }
}

/// A number that identifies contents.
pub(crate) fn sum_of(contents: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    contents.hash(&mut hasher);
    hasher.finish()
}

/// A number that identifies the weights of a model.
pub(crate) fn sum_of_weights(store: &ParamStore) -> u64 {
    let of_piece = |piece: &[f32]| piece.iter().fold(0, |sum, x| mix(sum ^ u64::from(x.to_bits())));
    store.iter().fold(0, |sum, param| {
        let pieces: Vec<u64> = param.values().par_chunks(PIECE).map(of_piece).collect();
        pieces.into_iter().fold(sum, |sum, piece| mix(sum ^ piece))
    })
}

/// Runs what one process does by itself; a panic in it, of a block for example, is an error, so that the others learn of it.
pub(crate) fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let said = |panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".into())
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::Panic(said(panic))))
}

#[cfg(test)]
mod tests {
    use super::threads::together;
    use super::*;

    #[test]
    fn what_one_knows_all_learn() {
        let found = together(3, |processes| {
            let rank = processes.rank();
            let mine = if rank == 1 { Err(Error::Config("no data here".into())) } else { Ok(rank) };
            let failed = processes.agree(mine).unwrap_err();
            assert!(failed.is_configuration() && !failed.is_not_finite(), "{failed}");
            (processes.any(rank == 2), processes.any(false), processes.gather(rank as f64 + 0.5), failed.to_string())
        });
        for (rank, (some, none, all, failed)) in found.into_iter().enumerate() {
            assert_eq!((some, none, all), (true, false, vec![0.5, 1.5, 2.5]));
            assert_eq!(failed, if rank == 1 { "no data here" } else { "process 1: no data here" });
        }
    }

    #[test]
    fn the_first_of_several_failures_is_told() {
        let found = together(3, |processes| {
            let mine = if processes.rank() > 0 { Err(Error::Panic(processes.rank().to_string())) } else { Ok(()) };
            processes.agree(mine).unwrap_err().to_string()
        });
        assert_eq!(
            found,
            ["process 1: training panicked: 1", "training panicked: 1", "process 1: training panicked: 1"]
        );
    }

    #[test]
    fn a_process_that_differs_is_named() {
        let same = |differing: usize| {
            together(3, move |processes| {
                let sum = u64::from(processes.rank() == differing) + 7;
                processes.must_have_the_same("weights", sum).map_err(|error| error.to_string())
            })
        };
        assert!(same(9).iter().all(|found| found.is_ok()));
        let found = same(2);
        assert!(found.iter().all(|found| found.as_ref().unwrap_err().contains("not the same weights as in process 0")));
    }

    #[test]
    fn a_panic_is_an_error() {
        let error = caught(|| if true { panic!("number {}", 5) } else { Ok(()) }).unwrap_err();
        assert_eq!(error.to_string(), "training panicked: number 5");
        assert_eq!(caught(|| Ok(5)).unwrap(), 5);
    }
}
