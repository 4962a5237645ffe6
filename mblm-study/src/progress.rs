//! What a study shows while it runs: on a terminal a bar per running run and one for all, and a line for each that
//! ended; elsewhere the lines alone. Every line is in `study.log` too.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mblm_base::terminal;
use mblm_train::journal::timestamp::Timestamp;

use crate::report::duration;

const RUN: &str = "  {prefix} {bar:24.cyan} {percent:>3}%  {msg}";
const ALL: &str = "  {prefix} {bar:24} {percent:>3}%  {msg}";
/// Parts of a bar.
const PARTS: u64 = 1000;

/// The display of a study.
pub(super) struct Display {
    bars: Option<(MultiProgress, ProgressBar)>,
    state: Mutex<State>,
}

struct State {
    log: File,
    started: Instant,
    /// Runs that ended, of how many.
    ended: usize,
    total: usize,
    /// Of the longest name.
    width: usize,
    /// Work of all runs that are to do.
    work: f64,
    /// Work done in this session.
    done: f64,
}

/// One run on the display.
pub(super) struct RunBar<'a> {
    display: &'a Display,
    bar: Option<ProgressBar>,
    work: f64,
    /// The share that was done before, if it is known.
    first: Option<f64>,
    counted: f64,
}

impl Display {
    /// The display of a study of which nothing is known yet.
    pub(super) fn new(log: File) -> Self {
        let bars = std::io::stderr().is_terminal().then(|| {
            let multi = MultiProgress::new();
            let all = multi.add(bar(ALL));
            all.set_prefix("all runs");
            (multi, all)
        });
        let state = State { log, started: Instant::now(), ended: 0, total: 0, width: 0, work: 0.0, done: 0.0 };
        Display { bars, state: Mutex::new(state) }
    }

    /// There are `total` runs, at least, of which `left` work is to do, in any unit. `width`: of the longest name.
    pub(super) fn expect(&self, total: usize, left: f64, width: usize) {
        let mut state = self.state();
        (state.total, state.work, state.width) = (total, state.done + left, width);
        if let Some((_, all)) = &self.bars {
            all.set_prefix(format!("{:width$}", "all runs"));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a line, and logs it. The log never ends a study.
    pub(super) fn line(&self, text: &str) {
        let _ = writeln!(self.state().log, "{} {text}", Timestamp::now());
        match &self.bars {
            // Its `suspend` panics where the terminal is gone.
            Some((multi, _)) => drop(multi.println(terminal::visible(text))),
            None => terminal::line(text),
        }
    }

    /// A run of so much `work` begins.
    pub(super) fn begin(&self, name: &str, work: f64) -> RunBar<'_> {
        let bar = self.bars.as_ref().map(|(multi, all)| {
            let bar = multi.insert_before(all, bar(RUN));
            let width = self.state().width;
            bar.set_prefix(format!("{:width$}", terminal::visible(name)));
            bar
        });
        RunBar { display: self, bar, work, first: None, counted: 0.0 }
    }

    /// A run ended, or was skipped; `text` says how.
    pub(super) fn ended(&self, name: &str, text: &str) {
        let (ended, total, width) = {
            let mut state = self.state();
            state.ended += 1;
            (state.ended, state.total, state.width)
        };
        let digits = total.to_string().len();
        let left = self.left().map_or(String::new(), |left| format!("  ETA {}", duration(left)));
        let left = if ended < total { left } else { String::new() };
        self.line(&format!("[{ended:digits$}/{total}] {name:width$}  {text}{left}"));
    }

    /// Seconds that the rest will take, from what has been done since the start.
    fn left(&self) -> Option<f64> {
        let state = self.state();
        let rest = (state.work - state.done).max(0.0);
        (state.done > 0.0).then(|| state.started.elapsed().as_secs_f64() * rest / state.done)
    }

    fn refresh(&self) {
        let Some((_, all)) = &self.bars else { return };
        let (ended, total, share) = {
            let state = self.state();
            (state.ended, state.total, state.done / state.work.max(f64::MIN_POSITIVE))
        };
        all.set_position((share.min(1.0) * PARTS as f64) as u64);
        let left = self.left().map_or(String::new(), |left| format!("  ETA {}", duration(left)));
        all.set_message(format!("{ended}/{total} runs{left}"));
    }
}

impl RunBar<'_> {
    /// So much of the run is done, from 0 to 1.
    pub(super) fn at(&mut self, share: f64, message: String) {
        let first = *self.first.get_or_insert(share);
        let counted = self.work * (share - first).max(0.0);
        self.display.state().done += counted - self.counted;
        self.counted = counted;
        if let Some(bar) = &self.bar {
            bar.set_position((share.min(1.0) * PARTS as f64) as u64);
        }
        self.say(message);
        self.display.refresh();
    }

    /// Shows a message beside the bar.
    pub(super) fn say(&self, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        }
    }
}

impl Drop for RunBar<'_> {
    fn drop(&mut self) {
        // What was done before this session is no work of it, and neither is what a failed run left out.
        let rest = self.work - self.counted;
        self.display.state().work -= rest;
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(PARTS).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_what_was_done() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let display = Display::new(file.reopen().unwrap());
        display.expect(3, 30.0, 6);
        assert_eq!(display.left(), None);
        let share = |display: &Display| {
            let state = display.state();
            (state.done, state.work)
        };
        let mut first = display.begin("a", 10.0);
        first.at(0.0, String::new());
        first.at(1.0, String::new());
        drop(first);
        assert_eq!(share(&display), (10.0, 30.0));
        let mut resumed = display.begin("b", 10.0);
        resumed.at(0.75, String::new());
        resumed.at(1.0, String::new());
        drop(resumed);
        assert_eq!(share(&display), (12.5, 22.5), "three quarters of the second were done before");
        display.ended("a", "1.234 bpb");
        let log = std::fs::read_to_string(file.path()).unwrap();
        assert!(log.contains("[1/3] a       1.234 bpb  ETA 0.0 s"), "{log}");
    }
}
