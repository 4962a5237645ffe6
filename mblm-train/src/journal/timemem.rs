//! `timemem.csv`: what the first batches of a run cost, in the reference package's columns.
//!
//! Times are seconds. Memory is in GiB, rounded to three decimals as the package's is; the resident memory of the
//! process stands for what CUDA's allocator calls allocated and reserved, and `total` is the machine's.

use std::path::Path;

use mblm_base::memory::Memory;

use crate::error::Result;
use crate::journal::line_log::LineLog;

const FILE: &str = "timemem.csv";
const HEADER: &str = "cum_batch,num_items,kind,fw_time,bw_time,allocated,allocated_max,reserved,reserved_max,total";

/// So many batches are measured.
pub const BATCHES: u64 = 30;

/// The file, open for more rows.
pub struct TimeMem {
    lines: LineLog,
    /// The first batch that is measured no more.
    end: u64,
}

impl TimeMem {
    /// Opens or makes the file in a run's folder, keeping the rows of batches below `batches`; the run began with
    /// batch `first`.
    pub fn open(folder: &Path, first: u64, batches: u64) -> Result<Self> {
        let cum_batch = |line: &str| line.split(',').next()?.parse::<u64>().ok();
        let keep = |line: &str| cum_batch(line).is_some_and(|batch| batch < batches);
        Ok(TimeMem { lines: LineLog::open(folder, FILE, Some(HEADER), keep)?, end: first + BATCHES })
    }

    /// Keeps nothing: another process does.
    pub fn nowhere() -> Self {
        TimeMem { lines: LineLog::nowhere(), end: 0 }
    }

    /// Adds a training batch of `num_items` sequences, if it is one of the first: the seconds of its forward and of its
    /// backward pass.
    pub fn train(&mut self, cum_batch: u64, num_items: usize, forward: f64, backward: f64) -> Result<()> {
        match cum_batch < self.end {
            true => self.lines.add(&row(cum_batch, num_items as u64, "train", forward, &backward.to_string())),
            false => Ok(()),
        }
    }

    /// Adds a validation after batch `cum_batch`, when `elements_seen` were trained on, if batches after it are still
    /// measured: the seconds of all its forward passes.
    pub fn valid(&mut self, cum_batch: u64, elements_seen: u64, forward: f64) -> Result<()> {
        match cum_batch + 1 < self.end {
            true => self.lines.add(&row(cum_batch, elements_seen, "valid", forward, "")),
            false => Ok(()),
        }
    }
}

fn row(cum_batch: u64, num_items: u64, kind: &str, forward: f64, backward: &str) -> String {
    let memory = Memory::now().unwrap_or(Memory { resident: 0, resident_max: 0, total: 0 });
    let gib = |bytes: u64| format!("{:.3}", bytes as f64 / (1u64 << 30) as f64);
    let (now, max, total) = (gib(memory.resident), gib(memory.resident_max), gib(memory.total));
    format!("{cum_batch},{num_items},{kind},{forward},{backward},{now},{max},{now},{max},{total}")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// `cum_batch`, `num_items`, `kind`, `fw_time` and `bw_time` of each row.
    fn rows(folder: &Path) -> Vec<String> {
        let text = fs::read_to_string(folder.join(FILE)).unwrap();
        assert_eq!(text.lines().next(), Some(HEADER));
        text.lines().skip(1).map(|line| line.split(',').take(5).collect::<Vec<_>>().join(",")).collect()
    }

    #[test]
    fn the_first_batches_are_measured() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = TimeMem::open(folder.path(), 0, 0).unwrap();
        for batch in 0..40 {
            log.train(batch, 4, 0.5, 0.25).unwrap();
            if [0, 28, 29].contains(&batch) {
                log.valid(batch, (batch + 1) * 64, 1.5).unwrap();
            }
        }
        let rows = rows(folder.path());
        assert_eq!(rows.len(), 32, "{rows:?}");
        assert_eq!(rows[..2], ["0,4,train,0.5,0.25", "0,64,valid,1.5,"]);
        // The package counts down before it validates, so the last batch's validation has no row.
        assert_eq!(rows[29..], ["28,4,train,0.5,0.25", "28,1856,valid,1.5,", "29,4,train,0.5,0.25"]);
    }

    #[test]
    fn a_resumed_run_adds_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = TimeMem::open(folder.path(), 0, 0).unwrap();
        (0..3).for_each(|batch| log.train(batch, 4, 0.5, 0.25).unwrap());
        log.lines.add("3,4,tr").unwrap(); // cut short, as the next line shows
        let text = fs::read_to_string(folder.path().join(FILE)).unwrap();
        fs::write(folder.path().join(FILE), text.trim_end()).unwrap();
        let mut log = TimeMem::open(folder.path(), 0, 2).unwrap();
        log.train(2, 4, 2.5, 1.0).unwrap();
        assert_eq!(rows(folder.path()), ["0,4,train,0.5,0.25", "1,4,train,0.5,0.25", "2,4,train,2.5,1"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_in_gib() {
        let row = row(0, 4, "train", 0.5, "0.25");
        let memory: Vec<f64> = row.split(',').skip(5).map(|value| value.parse().unwrap()).collect();
        let [now, max, now_too, max_too, total] = memory[..] else { panic!("{row}") };
        assert!(0.0 < now && now <= max && max < total && (now, max) == (now_too, max_too), "{row}");
        let exact = Memory::now().unwrap().total as f64 / (1u64 << 30) as f64;
        assert!((total - exact).abs() <= 0.0005, "{row}");
    }
}
