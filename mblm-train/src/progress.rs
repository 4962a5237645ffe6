//! What a run shows: a bar on a terminal, plain lines elsewhere, and every line in `train.log` too.
//!
//! Colours come from indicatif, which leaves them out where `NO_COLOR` is set.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::evaluate::bpb;
use crate::timestamp::Timestamp;

const TEMPLATE: &str =
    "{bar:24.cyan} {percent:>3}%  {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  ETA {eta}  {msg}";

/// How much of the shown training loss the newest batch makes up.
const NEWEST_SHARE: f64 = 0.05;

/// The display of one run.
pub struct Progress {
    file: File,
    bar: Option<ProgressBar>,
    bytes_per_batch: u64,
    total_batches: u64,
    first_batch: u64,
    started: Instant,
    train_loss: Option<f64>,
    valid_loss: Option<f64>,
}

impl Progress {
    /// The display of a run of `total_batches`, of which `done` were trained before; drawn on standard error.
    pub fn new(file: File, total_batches: u64, done: u64, bytes_per_batch: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let total = Some(total_batches * bytes_per_batch);
            let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style);
            bar.set_position(done * bytes_per_batch);
            bar.reset_eta();
            bar
        });
        Progress {
            file,
            bar,
            bytes_per_batch,
            total_batches,
            first_batch: done,
            started: Instant::now(),
            train_loss: None,
            valid_loss: None,
        }
    }

    /// Shows a line, and logs it.
    pub fn line(&mut self, text: &str) {
        self.log(text);
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// A batch was trained; `done` with it.
    pub fn batch(&mut self, done: u64, loss: f64) {
        let before = self.train_loss.unwrap_or(loss);
        self.train_loss = Some(before + NEWEST_SHARE * (loss - before));
        if let Some(bar) = &self.bar {
            bar.set_position(done * self.bytes_per_batch);
            bar.set_message(self.message());
        }
    }

    /// A training loss to log: a line where no bar shows it.
    pub fn train_loss(&mut self, done: u64, loss: f64, lr: f64) {
        let seconds = self.started.elapsed().as_secs_f64();
        let batches = (done - self.first_batch) as f64;
        let rate = DecimalBytes((batches * self.bytes_per_batch as f64 / seconds.max(1e-9)) as u64);
        let left = seconds / batches.max(1.0) * (self.total_batches - done) as f64;
        let eta = FormattedDuration(Duration::from_secs_f64(left));
        let text = format!(
            "batch {done}/{}  train loss {loss:.4} ({:.4} bpb)  lr {lr:.3e}  {rate}/s  ETA {eta}",
            self.total_batches,
            bpb(loss)
        );
        match self.bar {
            Some(_) => self.log(&text),
            None => self.line(&text),
        }
    }

    /// A validation was done.
    pub fn valid_loss(&mut self, done: u64, loss: f64, is_best: bool) {
        self.valid_loss = Some(loss);
        let best = if is_best { ", the best so far" } else { "" };
        let text = format!("batch {done}/{}  valid loss {loss:.4} ({:.4} bpb{best})", self.total_batches, bpb(loss));
        self.line(&text);
        if let Some(bar) = &self.bar {
            bar.set_message(self.message());
        }
    }

    fn message(&self) -> String {
        let shown = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{:.3}", bpb(loss)));
        format!("bpb {} train, {} valid", shown(self.train_loss), shown(self.valid_loss))
    }

    /// Logs a line without showing it. The log never ends a run: a full disk shows when the next checkpoint is saved.
    pub fn log(&mut self, text: &str) {
        let _ = writeln!(self.file, "{} {text}", Timestamp::now());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loss_is_logged_with_its_bpb() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut progress = Progress::new(file.reopen().unwrap(), 10, 2, 64);
        progress.batch(3, 2.0);
        progress.train_loss(3, 2.0, 3e-4);
        progress.valid_loss(10, std::f64::consts::LN_2, true);
        assert_eq!(progress.message(), "bpb 2.885 train, 1.000 valid");
        let log = std::fs::read_to_string(file.path()).unwrap();
        assert!(log.contains("batch 3/10  train loss 2.0000 (2.8854 bpb)  lr 3.000e-4"), "{log}");
        assert!(log.contains("batch 10/10  valid loss 0.6931 (1.0000 bpb, the best so far)"), "{log}");
    }
}
