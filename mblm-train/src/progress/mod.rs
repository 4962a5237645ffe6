//! What a run shows on standard error: two lines that move on a terminal, plain lines elsewhere, warnings alone if it is to
//! be quiet; and every line in `train.log` too.
//!
//! Colours come from indicatif, which leaves them out where `NO_COLOR` is set.

mod sparkline;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use mblm_base::terminal;
use sparkline::Sparkline;

use crate::evaluate::bpb;
use crate::journal::timestamp::Timestamp;

/// The bar has no clock of its own: validations and checkpoints take time too.
const TEMPLATE: &str = "{bar:24.cyan} {percent:>3}%  {prefix}\n{wide_msg}";

/// How much of the shown training loss the newest batch makes up.
const NEWEST_SHARE: f64 = 0.05;

/// The sparkline is as wide as the line leaves room for, but no wider, and left out if it would be narrower.
const WIDEST: usize = 60;
const NARROWEST: usize = 6;

/// The width of a terminal that does not say.
const WIDTH: usize = 80;

/// The display of one run.
pub struct Progress {
    /// None of a process that does not write.
    file: Option<File>,
    screen: Screen,
    course: Course,
    started: Instant,
    /// Batches so far, those of earlier sessions too.
    done: u64,
    /// Waited for training data in this session.
    data: Duration,
    train_loss: Option<f64>,
    valid_loss: Option<f64>,
    best_loss: Option<f64>,
    /// The batches of the last checkpoint.
    saved: Option<u64>,
    curve: Sparkline,
}

/// How far a run goes.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Batches in all.
    pub batches: u64,
    /// Batches that were trained before this session.
    pub done: u64,
    /// Bytes that were trained before this session.
    pub done_bytes: u64,
    /// Bytes of a batch.
    pub bytes_per_batch: u64,
    /// The lowest validation loss before this session.
    pub best_valid_loss: Option<f64>,
}

enum Screen {
    Bar(ProgressBar),
    Lines,
    Quiet,
}

impl Progress {
    /// The display of a run, which logs to `file`.
    pub fn new(file: File, course: Course, quiet: bool) -> Self {
        let screen = match std::io::stderr().is_terminal() {
            _ if quiet => Screen::Quiet,
            false => Screen::Lines,
            true => Screen::Bar(bar(course)),
        };
        let mut progress = Progress::nowhere(course);
        (progress.file, progress.screen) = (Some(file), screen);
        progress
    }

    /// Shows and logs nothing: another process does.
    pub fn nowhere(course: Course) -> Self {
        Progress {
            file: None,
            screen: Screen::Quiet,
            course,
            started: Instant::now(),
            done: course.done,
            data: Duration::ZERO,
            train_loss: None,
            valid_loss: None,
            best_loss: course.best_valid_loss,
            saved: None,
            curve: Sparkline::new(),
        }
    }

    /// Shows a line that stays, and logs it.
    pub fn line(&mut self, text: &str) {
        self.log(text);
        match &self.screen {
            Screen::Bar(bar) => bar.suspend(|| terminal::line(text)),
            Screen::Lines => terminal::line(text),
            Screen::Quiet => {}
        }
    }

    /// Shows a warning, even if the display is to be quiet, and logs it.
    pub fn warn(&mut self, text: &str) {
        let text = format!("warning: {text}");
        match &self.screen {
            Screen::Quiet if self.file.is_some() => {
                self.log(&text);
                terminal::line(text);
            }
            _ => self.line(&text),
        }
    }

    /// A batch was trained, the `done`-th, after `data` of waiting for it. It has no loss if nothing in it counts.
    pub fn batch(&mut self, done: u64, loss: Option<f64>, data: Duration) {
        if let Some(loss) = loss {
            let before = self.train_loss.unwrap_or(loss);
            let smooth = before + NEWEST_SHARE * (loss - before);
            self.train_loss = Some(smooth);
            self.curve.push(bpb(smooth));
        }
        self.done = done;
        self.data += data;
        self.draw();
    }

    /// A training loss to log: a line where no bar shows it.
    pub fn train_loss(&mut self, done: u64, loss: f64, lr: f64) {
        let (batches, bpb, pace) = (self.course.batches, bpb(loss), self.pace());
        let data = self.data_share();
        let text = format!(
            "batch {done}/{batches}  train loss {loss:.4} ({bpb:.4} bpb)  lr {lr:.3e}  {pace}  data {data:.0}%"
        );
        self.detail(&text);
    }

    /// A validation was done.
    pub fn valid_loss(&mut self, done: u64, loss: f64, is_best: bool) {
        self.valid_loss = Some(loss);
        if is_best {
            self.best_loss = Some(loss);
        }
        let best = if is_best { ", the best so far" } else { "" };
        let (batches, bpb) = (self.course.batches, bpb(loss));
        self.line(&format!("batch {done}/{batches}  valid loss {loss:.4} ({bpb:.4} bpb{best})"));
        self.draw();
    }

    /// A checkpoint was saved: a line where no bar shows it.
    pub fn saved(&mut self, done: u64, checkpoint: &Path) {
        self.saved = Some(done);
        let text = format!("batch {done}/{}  saved {}", self.course.batches, checkpoint.display());
        self.detail(&text);
        self.draw();
    }

    /// What the session did, in a line that stays.
    pub fn summary(&mut self) {
        let batches = self.done - self.course.done;
        let bytes = DecimalBytes(batches * self.course.bytes_per_batch);
        let seconds = self.started.elapsed();
        let (took, rate) = (FormattedDuration(seconds), self.rate());
        let best = self.best_loss.map_or_else(String::new, |loss| format!(", best validation {:.4} bpb", bpb(loss)));
        let data = self.data_share();
        self.line(&format!("trained {batches} batches, {bytes}, in {took}: {rate}/s, data {data:.0}%{best}"));
    }

    /// Logs a line without showing it. The log never ends a run: a full disk shows when the next checkpoint is saved.
    pub fn log(&mut self, text: &str) {
        if let Some(file) = &mut self.file {
            let _ = writeln!(file, "{} {text}", Timestamp::now());
        }
    }

    /// What a bar shows in its own way.
    fn detail(&mut self, text: &str) {
        match self.screen {
            Screen::Bar(_) => self.log(text),
            _ => self.line(text),
        }
    }

    fn draw(&self) {
        let Screen::Bar(bar) = &self.screen else { return };
        let width = console::Term::stderr().size_checked().map_or(WIDTH, |(_, columns)| usize::from(columns));
        let Course { done, done_bytes, bytes_per_batch, .. } = self.course;
        let bytes = |batches: u64| DecimalBytes(done_bytes + (batches - done) * bytes_per_batch);
        bar.set_prefix(format!("{}/{}  {}", bytes(self.done), bytes(self.course.batches), self.pace()));
        bar.set_message(self.status(width));
        bar.set_position(self.done);
    }

    /// The line below the bar, at most `width` wide: losses, their curve, time for data, last checkpoint.
    fn status(&self, width: usize) -> String {
        let shown = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{:.3}", bpb(loss)));
        let train = format!("bpb train {}  ", shown(self.train_loss));
        let best = self.best_loss.map_or_else(String::new, |loss| format!(" (best {:.3})", bpb(loss)));
        let saved = self.saved.map_or_else(String::new, |batch| format!("  saved at batch {batch}"));
        let valid = format!("valid {}{best}  data {:.0}%{saved}", shown(self.valid_loss), self.data_share());
        // Two spaces after the curve, and a column that the cursor may need.
        let room = width.saturating_sub(train.len() + valid.len() + 3).min(WIDEST);
        match self.curve.draw(room) {
            curve if curve.is_empty() || room < NARROWEST => format!("{train}{valid}"),
            curve => format!("{train}{curve}  {valid}"),
        }
    }

    /// Training bytes per second of this session, and the time that is left at that pace.
    fn pace(&self) -> String {
        let batches = self.done - self.course.done;
        let left =
            self.started.elapsed().as_secs_f64() / batches.max(1) as f64 * (self.course.batches - self.done) as f64;
        format!("{}/s  ETA {}", self.rate(), FormattedDuration(Duration::from_secs_f64(left)))
    }

    fn rate(&self) -> DecimalBytes {
        let bytes = (self.done - self.course.done) * self.course.bytes_per_batch;
        DecimalBytes((bytes as f64 / self.started.elapsed().as_secs_f64().max(1e-9)) as u64)
    }

    /// The share of the session that was spent waiting for training data, in percent.
    fn data_share(&self) -> f64 {
        100.0 * self.data.as_secs_f64() / self.started.elapsed().as_secs_f64().max(1e-9)
    }
}

fn bar(course: Course) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(course.batches), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_position(course.done);
    bar
}

impl Drop for Progress {
    /// The last state of the bar stays on the screen.
    fn drop(&mut self) {
        if let Screen::Bar(bar) = &self.screen {
            bar.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(file: &tempfile::NamedTempFile) -> Progress {
        Progress::new(
            file.reopen().unwrap(),
            Course { batches: 10, done: 2, done_bytes: 128, bytes_per_batch: 64, best_valid_loss: None },
            true,
        )
    }

    #[test]
    fn everything_is_logged_even_if_nothing_is_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut progress = progress(&file);
        progress.batch(3, Some(2.0), Duration::ZERO);
        progress.train_loss(3, 2.0, 3e-4);
        progress.valid_loss(10, std::f64::consts::LN_2, true);
        progress.saved(10, Path::new("step-10"));
        progress.summary();
        let log = std::fs::read_to_string(file.path()).unwrap();
        for want in [
            "batch 3/10  train loss 2.0000 (2.8854 bpb)  lr 3.000e-4  ",
            "/s  ETA 00:00:",
            "  data 0%\n",
            "batch 10/10  valid loss 0.6931 (1.0000 bpb, the best so far)\n",
            "batch 10/10  saved step-10\n",
            "trained 1 batches, 64 B, in 00:00:00: ",
            "data 0%, best validation 1.0000 bpb\n",
        ] {
            assert!(log.contains(want), "{want}: {log}");
        }
    }

    #[test]
    fn the_status_fits_the_terminal() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut progress = progress(&file);
        assert_eq!(progress.status(80), "bpb train -  valid -  data 0%");
        (0..100).for_each(|i| progress.batch(3, Some(f64::from(100 - i)), Duration::ZERO));
        progress.valid_loss(3, 2.0, true);
        progress.valid_loss(4, 3.0, false);
        progress.saved(4, Path::new("x"));
        let (narrow, wide) = (progress.status(80), progress.status(200));
        assert!(narrow.chars().count() < 80 && narrow.contains('█') && narrow.contains('▁'), "{narrow}");
        assert!(narrow.ends_with("  valid 4.328 (best 2.885)  data 0%  saved at batch 4"), "{narrow}");
        assert_eq!(wide.chars().filter(|c| "▁▂▃▄▅▆▇█".contains(*c)).count(), WIDEST, "{wide}");
        assert!(!progress.status(60).contains('█'));
    }
}
