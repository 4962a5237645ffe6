//! Cutting a grid of sequences and channel groups (or heads) over the thread pool: the scans cannot be cut along time.

use std::ops::Range;

use crate::parallel::MIN_PARALLEL;

/// A grid cut into one task per thread, or a single one where there is little to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tasks {
    sequences: usize,
    groups: usize,
    /// Parts along the sequences.
    pub by_sequence: usize,
    /// Parts along the groups.
    pub by_group: usize,
}

/// A cell of the grid.
#[derive(Clone, Debug)]
pub(super) struct Task {
    pub sequences: Range<usize>,
    pub groups: Range<usize>,
    /// Which part of the sequences this is.
    pub sequence_part: usize,
    /// Which part of the groups this is.
    pub group_part: usize,
}

impl Tasks {
    /// Cuts by sequences as far as these divide evenly over the threads, then by groups.
    pub fn new(sequences: usize, groups: usize, work_per_cell: usize) -> Self {
        let threads = rayon::current_num_threads();
        if sequences * groups * work_per_cell < 4 * MIN_PARALLEL {
            return Tasks { sequences, groups, by_sequence: 1, by_group: 1 };
        }
        let even = |parts: &usize| {
            threads.is_multiple_of(*parts) && (sequences.is_multiple_of(*parts) || sequences >= 8 * parts)
        };
        let by_sequence = (1..=threads.min(sequences)).rev().find(even).unwrap_or(1);
        Tasks { sequences, groups, by_sequence, by_group: (threads / by_sequence).clamp(1, groups) }
    }

    /// Runs `work` on every cell.
    pub fn run(&self, work: impl Fn(Task) + Sync) {
        let part = |whole: usize, i: usize, parts: usize| whole * i / parts..whole * (i + 1) / parts;
        let run = |index: usize| {
            let (sequence_part, group_part) = (index / self.by_group, index % self.by_group);
            work(Task {
                sequences: part(self.sequences, sequence_part, self.by_sequence),
                groups: part(self.groups, group_part, self.by_group),
                sequence_part,
                group_part,
            });
        };
        let run = &run;
        match self.by_sequence * self.by_group {
            1 => run(0),
            tasks => rayon::scope(|scope| (0..tasks).for_each(|index| scope.spawn(move |_| run(index)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_in_one_task() {
        for (sequences, groups) in [(1, 64), (7, 64), (1000, 1), (rayon::current_num_threads(), 3)] {
            let tasks = Tasks::new(sequences, groups, 1 << 20);
            let seen = std::sync::Mutex::new(vec![0; sequences * groups]);
            tasks.run(|task| {
                let mut seen = seen.lock().unwrap();
                task.sequences.for_each(|s| task.groups.clone().for_each(|g| seen[s * groups + g] += 1));
            });
            assert!(seen.into_inner().unwrap().iter().all(|&n| n == 1), "{sequences} x {groups}");
            let parts = tasks.by_sequence * tasks.by_group;
            assert!(parts > 1 || rayon::current_num_threads() == 1, "{sequences} x {groups}");
        }
    }
}
