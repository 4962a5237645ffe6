//! What a run folder tells: the losses over time, what was measured at the end, and how the run ended.
//!
//! `metrics.jsonl` has most of it. A folder of the reference package, or an older one, has `loss.csv` alone; what is not
//! there is left out.

use std::io;
use std::path::{Path, PathBuf};

use mblm_base::files;
use mblm_train::checkpoint::{Checkpoint, Shelf};
use mblm_train::cost;
use mblm_train::error::{AtPath, Error, Result};
use mblm_train::evaluate::bpb;
use mblm_train::journal::folder::read_losses;
use mblm_train::journal::metrics::Kind;
use mblm_train::journal::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use serde_yaml::Value;

use super::charts::scale::LARGEST;
use crate::passage::Passage;

const METRICS: &str = "metrics.jsonl";
pub(super) const LOSSES: &str = "loss.csv";
const MEMORY: &str = "timemem.csv";
const CONFIG: &str = "config.yaml";
pub(super) const LOG: &str = "train.log";
const RESULT: &str = "result.json";
/// Stages whose gradients are read, at most.
const MAX_STAGES: usize = 32;

/// One run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The name of its folder.
    pub name: String,
    /// Where it is; none for a run that failed before it had a folder.
    pub folder: Option<PathBuf>,
    /// Its seed.
    pub seed: Option<u64>,
    /// How it stands.
    pub status: Status,
    /// Its configuration.
    pub config: Option<Value>,
    /// The fingerprint of its data, if it has a checkpoint.
    pub data: Option<String>,
    /// What was measured, in the order of time.
    pub points: Vec<Point>,
    /// What a study measured at its end.
    pub result: Option<RunResult>,
    /// The most memory it held, in bytes, as far as its files tell.
    peak_bytes: Option<f64>,
}

/// How a run stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    /// It trained to its end.
    Finished,
    /// It was stopped, or still trains, or was not begun.
    Unfinished,
    /// It ended with this error.
    Failed(String),
}

/// A line of the metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// On what.
    pub kind: Kind,
    /// Training bytes seen before it.
    pub bytes: Option<f64>,
    /// Seconds since the run's start.
    pub seconds: Option<f64>,
    /// Bits per byte.
    pub bpb: Option<f64>,
    /// Training bytes per second since the point before.
    pub rate: Option<f64>,
    /// The gradient's norm of each stage; empty if it was not measured.
    pub stage_grads: Vec<f64>,
}

/// What a study writes to `result.json` in a run's folder when the run has ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Threads it trained with.
    pub threads: usize,
    /// Runs that trained at a time.
    pub jobs: usize,
    /// The machines that it was on.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// The most memory its process held, in bytes.
    pub peak_bytes: Option<u64>,
    /// Its speed, if that was measured again when nothing else ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// What was measured of its best model.
    pub measured: Measured,
}

/// How fast a configuration trains when nothing else runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Training bytes per second.
    pub bytes_per_second: f64,
    /// Threads that it was measured with.
    pub threads: usize,
}

/// What is measured of a trained model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What the model costs.
    pub cost: Option<cost::ModelCost>,
    /// What it wrote; none for an encoder.
    pub generation: Option<Generation>,
    /// The bits of each byte at the beginning of the validation data; none for an encoder.
    #[serde(default)]
    pub passage: Option<Passage>,
    /// Mean bits by the byte's position in the innermost patch, over a larger sample; empty if there are no patches.
    #[serde(default)]
    pub place_bits: Vec<f64>,
    /// What could not be measured, and why.
    pub missing: Option<String>,
}

/// What a model wrote, and how fast.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// What it continued.
    pub prompt: String,
    /// What it wrote; invalid UTF-8 is replaced.
    pub text: String,
    /// Bytes it wrote.
    pub bytes: usize,
    /// Bytes per second after the prompt was read.
    pub bytes_per_second: f64,
}

impl Run {
    /// A run without a folder.
    pub fn absent(name: &str, seed: u64, status: Status) -> Self {
        Run {
            name: name.into(),
            folder: None,
            seed: Some(seed),
            status,
            config: None,
            data: None,
            points: vec![],
            result: None,
            peak_bytes: None,
        }
    }

    /// Reads a run's folder.
    ///
    /// # Errors
    /// It is no run's folder, or cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let name = folder.canonicalize().unwrap_or(folder.into());
        let name = name.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
        let config: Option<Value> =
            files::read_text(&folder.join(CONFIG), files::SMALL).ok().and_then(|text| config(&text));
        let (metrics, losses) = (folder.join(METRICS), folder.join(LOSSES));
        let (points, memory) = match (metrics.exists(), losses.exists()) {
            (true, _) => read_metrics(&metrics).at(&metrics)?,
            (false, true) => (losses_as_points(&losses, config.as_ref())?, None),
            (false, false) => {
                return Err(Error::Config(format!(
                    "{}: expected a run folder, with {METRICS} or {LOSSES}; found neither",
                    folder.display()
                )));
            }
        };
        if points.is_empty() && config.is_none() {
            let message = "expected a run folder; its losses cannot be read, and there is no config.yaml";
            return Err(Error::Config(format!("{}: {message}", folder.display())));
        }
        let seed = config.as_ref().and_then(|config| config.get("train")?.get("seed")?.as_u64());
        let status = status(&folder.join(LOG)).unwrap_or(Status::Finished);
        let result = RunResult::read(folder);
        let table = peak_memory(&folder.join(MEMORY)).unwrap_or_default();
        let peak_bytes = memory.into_iter().chain(table).max_by(f64::total_cmp);
        let newest = Shelf::of_run(folder).and_then(|shelf| shelf.list()).ok().and_then(|mut paths| paths.pop());
        let state = newest.and_then(|path| Checkpoint::open(&path).and_then(|found| found.state()).ok());
        let data = state.map(|state| state.data).filter(|data| !data.is_empty());
        Ok(Run { name, folder: Some(folder.into()), seed, status, config, data, points, result, peak_bytes })
    }

    /// The points of a kind that have bits per byte.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(move |point| point.kind == kind && point.bpb.is_some())
    }

    /// The lowest bits per byte in validation.
    pub fn valid_bpb(&self) -> Option<f64> {
        self.of_kind(Kind::Valid).filter_map(|point| point.bpb).min_by(f64::total_cmp)
    }

    /// The bits per byte of the best model in the test.
    pub fn test_bpb(&self) -> Option<f64> {
        self.of_kind(Kind::Test).last().and_then(|point| point.bpb)
    }

    /// Training bytes per second, without validations and checkpoints: the mean over all bytes, unless they were measured
    /// apart from that.
    pub fn train_rate(&self) -> Option<f64> {
        if let Some(speed) = self.result.as_ref().and_then(|result| result.speed) {
            return Some(speed.bytes_per_second).filter(|rate| *rate > 0.0);
        }
        let (mut bytes, mut seconds, mut before) = (0.0, 0.0, 0.0);
        for point in self.points.iter().filter(|point| point.kind == Kind::Train) {
            if let (Some(at), Some(rate)) =
                (point.bytes.filter(|at| *at > before), point.rate.filter(|rate| *rate > 0.0))
            {
                bytes += at - before;
                seconds += (at - before) / rate;
                before = at;
            }
        }
        (seconds > 0.0).then(|| bytes / seconds)
    }

    /// Seconds of training, without validations and checkpoints.
    pub fn train_seconds(&self) -> Option<f64> {
        let train = self.points.iter().filter(|point| point.kind == Kind::Train && point.rate.is_some());
        Some(train.filter_map(|point| point.bytes).max_by(f64::total_cmp)? / self.train_rate()?)
    }

    /// Seconds from the start to the last point.
    pub fn seconds(&self) -> Option<f64> {
        self.points.iter().filter_map(|point| point.seconds).max_by(f64::total_cmp)
    }

    /// Training bytes.
    pub fn bytes(&self) -> Option<f64> {
        self.points.iter().filter_map(|point| point.bytes).max_by(f64::total_cmp)
    }

    /// The most memory, in bytes.
    pub fn peak_bytes(&self) -> Option<f64> {
        let measured = self.result.as_ref().and_then(|result| result.peak_bytes).map(|bytes| bytes as f64);
        measured.into_iter().chain(self.peak_bytes).max_by(f64::total_cmp)
    }

    /// What it wrote.
    pub fn generation(&self) -> Option<&Generation> {
        self.result.as_ref()?.measured.generation.as_ref()
    }
}

impl RunResult {
    /// Reads a run's `result.json`, if there is one.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&files::read(&folder.join(RESULT), files::SMALL).ok()?).ok()
    }

    /// Writes a run's `result.json`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(RESULT);
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::from).at(&path)?;
        files::replace_text(&path, &text).at(&path)
    }
}

/// A configuration, of this program or of the package; none if it is no mapping.
fn config(text: &str) -> Option<Value> {
    let document = mblm_yaml::Document::parse(text, CONFIG).ok()?;
    document.get("").filter(|value| value.is_mapping()).cloned()
}

fn kind(name: &str) -> Option<Kind> {
    [Kind::Train, Kind::Valid, Kind::Test].into_iter().find(|kind| kind.name() == name)
}

/// A number that a file holds, if a chart can show it: sums, squares and ratios of such numbers are finite.
pub(super) fn sane(number: f64) -> Option<f64> {
    match number.abs() {
        size if size < 1.0 / LARGEST => Some(0.0),
        size => (size <= LARGEST).then_some(number),
    }
}

/// The points of the metrics, and the most memory that they tell of, in bytes. Lines that are no JSON are skipped.
fn read_metrics(path: &Path) -> io::Result<(Vec<Point>, Option<f64>)> {
    const MIB: f64 = (1u64 << 20) as f64;
    let (mut points, mut memory) = (Vec::new(), None);
    for line in files::lines(files::open(path, files::LOG)?) {
        let Ok(line) = serde_json::from_slice::<Json>(&line?) else { continue };
        memory = highest(memory, line.get("memory_mb").and_then(Json::as_f64).map(|mib| mib * MIB));
        points.extend(point(&line));
    }
    Ok((points, memory))
}

fn highest(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.into_iter().chain(b.and_then(sane).filter(|bytes| *bytes > 0.0)).max_by(f64::total_cmp)
}

fn point(line: &Json) -> Option<Point> {
    let number = |name: &str| line.get(name).and_then(Json::as_f64).and_then(sane);
    let stage_grads = (1..=MAX_STAGES).map_while(|stage| number(&format!("stage{stage}/grad_norm"))).collect();
    Some(Point {
        kind: kind(line.get("kind")?.as_str()?)?,
        bytes: number("bytes_seen"),
        seconds: number("seconds"),
        bpb: number("bpb"),
        rate: number("bytes_per_second"),
        stage_grads,
    })
}

/// The rows of the first process in `loss.csv`: others saw other data at the same time.
fn losses_as_points(path: &Path, config: Option<&Value>) -> Result<Vec<Point>> {
    let rows = read_losses(path)?;
    let rank = rows.iter().map(|row| row.gpu_rank).min();
    let rows: Vec<_> = rows.into_iter().filter(|row| Some(row.gpu_rank) == rank).collect();
    let start = rows.first().and_then(|row| Timestamp::parse(&row.timestamp)).map(|start| start.seconds());
    let bytes_per_element = config.and_then(bytes_per_element);
    let points = rows.into_iter().filter_map(|row| {
        let now = Timestamp::parse(&row.timestamp).map(|now| now.seconds());
        Some(Point {
            kind: kind(&row.kind)?,
            bytes: bytes_per_element
                .filter(|_| row.elements_seen >= 0)
                .and_then(|each| sane(each * row.elements_seen as f64)),
            seconds: now.zip(start).map(|(now, start)| now - start),
            bpb: sane(bpb(row.loss)),
            rate: None,
            stage_grads: vec![],
        })
    });
    Ok(points.collect())
}

/// The package counts elements in bytes or in sequences.
fn bytes_per_element(config: &Value) -> Option<f64> {
    match config.get("train")?.get("target_elements_strategy")?.as_str()? {
        "sequence" => Some(1.0),
        "batch" => config.get("params")?.get("input_seq_len")?.as_f64(),
        _ => None,
    }
}

/// How the last session of a run ended, from its log.
fn status(log: &Path) -> io::Result<Status> {
    const STARTS: [&str; 5] = ["finished: ", "interrupted: ", "error: ", "resume: ", "run: "];
    let mut last = String::new();
    for line in files::lines(files::open(log, files::LOG)?) {
        let line = line?;
        // Lines begin with a date and a time.
        let Some(said) = line.splitn(3, |byte| *byte == b' ').nth(2) else { continue };
        if STARTS.iter().any(|start| said.starts_with(start.as_bytes())) {
            last = String::from_utf8_lossy(said).into_owned();
        }
    }
    Ok(match last.strip_prefix("error: ") {
        Some(error) => Status::Failed(error.into()),
        None if last.starts_with("finished: ") => Status::Finished,
        None => Status::Unfinished,
    })
}

/// The most memory that `timemem.csv` shows, in bytes.
fn peak_memory(table: &Path) -> io::Result<Option<f64>> {
    const GIB: f64 = (1u64 << 30) as f64;
    let (mut column, mut peak) = (None, None);
    for line in files::lines(files::open(table, files::LOG)?) {
        let line = line?;
        let cells = String::from_utf8_lossy(&line);
        let mut cells = cells.trim_end().split(',');
        match column {
            None => column = Some(cells.position(|name| name == "allocated_max").unwrap_or(usize::MAX)),
            Some(column) => {
                let cell = cells.nth(column).and_then(|gib| gib.parse::<f64>().ok());
                peak = highest(peak, cell.map(|gib| gib * GIB));
            }
        }
    }
    Ok(peak)
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use super::*;

    /// A folder with these files.
    pub(crate) fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
        folder
    }

    const LINES: &str = r#"{"batch":0,"step":1,"bytes_seen":100,"seconds":1.5,"kind":"train","loss":5.0,"bpb":7.0,"bytes_per_second":50.0,"memory_mb":100.0,"stage1/grad_norm":1.0,"stage2/grad_norm":2.0}
{"batch":0,"step":1,"bytes_seen":100,"seconds":2.5,"kind":"valid","loss":4.0,"bpb":6.0}
{"batch":2,"step":3,"bytes_seen":300,"seconds":5.0,"kind":"train","loss":3.0,"bpb":4.0,"bytes_per_second":200.0}
{"batch":2,"step":3,"bytes_seen":300,"seconds":6.0,"kind":"valid","loss":3.5,"bpb":5.0}
{"batch":3,"step":3,"bytes_seen":300,"seconds":7.0,"kind":"test","loss":3.5,"bpb":5.5}
{"batch":4,"st"#;

    #[test]
    fn metrics_are_read() {
        let log = "2024-01-01 00:00:00.0 run: x\n2024-01-01 00:00:01.0 finished: saved x\n";
        let timemem = "cum_batch,allocated_max\n0,0.5\n";
        let folder = folder(&[
            ("metrics.jsonl", LINES),
            ("config.yaml", "train: {seed: 7}"),
            ("train.log", log),
            ("timemem.csv", timemem),
        ]);
        let run = Run::read(folder.path()).unwrap();
        assert_eq!((run.points.len(), run.seed, &run.status), (5, Some(7), &Status::Finished));
        assert_eq!((run.valid_bpb(), run.test_bpb(), run.seconds()), (Some(5.0), Some(5.5), Some(7.0)));
        // 100 bytes in 2 s, 200 bytes in 1 s.
        assert_eq!((run.train_rate(), run.bytes()), (Some(100.0), Some(300.0)));
        assert_eq!(run.peak_bytes(), Some((1u64 << 29) as f64));
        assert_eq!(run.points[0].stage_grads, [1.0, 2.0]);
        let result = RunResult { peak_bytes: Some(1 << 30), ..RunResult::default() };
        result.write(folder.path()).unwrap();
        assert_eq!(Run::read(folder.path()).unwrap().peak_bytes(), Some((1u64 << 30) as f64));
    }

    const CSV: &str = "\
gpu_rank,timestamp,elements_seen,kind,epoch,batch,cum_batch,loss,lr,avg_grad,avg_grad_clipped
0,2024-01-01 10:00:00.5,8,train,0,0,0,2.0,0.1,-1,-1
1,2024-01-01 10:00:00.5,8,train,0,0,0,9.0,0.1,-1,-1
0,2024-01-01 10:01:00.5,16,valid,0,0,1,1.5,-1,-1,-1
0,2024-01-01 10:01:30,-1,test,-1,-1,-1,1.25,-1,-1,-1
";

    #[test]
    fn the_packages_losses_are_read() {
        let config = "params: {input_seq_len: 100}\ntrain: {target_elements_strategy: batch}\n";
        let folder = folder(&[("loss.csv", CSV), ("config.yaml", config)]);
        let run = Run::read(folder.path()).unwrap();
        assert_eq!(run.points.len(), 3, "of the first process alone");
        assert_eq!((run.valid_bpb(), run.test_bpb()), (Some(bpb(1.5)), Some(bpb(1.25))));
        assert_eq!((run.bytes(), run.seconds(), run.train_rate()), (Some(1600.0), Some(89.5), None));
        assert_eq!(run.status, Status::Finished, "the package says not how it ended");
        assert_eq!((run.seed, run.peak_bytes()), (None, None));
    }

    #[test]
    fn numbers_that_are_no_measurement_are_left_out() {
        let line = |bpb: &str, rate: &str, bytes: &str| {
            format!(
                "{{\"kind\":\"train\",\"bytes_seen\":{bytes},\"seconds\":1,\"bpb\":{bpb},\"bytes_per_second\":{rate}}}\n"
            )
        };
        let lines = line("1e308", "1e308", "100") + &line("2.5", "1e-308", "1e300") + &line("3.5", "50", "50");
        let run = Run::read(folder(&[("metrics.jsonl", &lines)]).path()).unwrap();
        let found: Vec<_> = run.points.iter().map(|point| (point.bpb, point.rate, point.bytes)).collect();
        let want = [(None, None, Some(100.0)), (Some(2.5), Some(0.0), None), (Some(3.5), Some(50.0), Some(50.0))];
        assert_eq!(found, want);
        assert_eq!(run.train_rate(), Some(50.0));
    }

    #[test]
    fn foreign_folders_are_refused() {
        let cases =
            [(vec![("a.txt", "x")], "found neither"), (vec![("loss.csv", "a,b\n1,2\n")], "there is no config.yaml")];
        for (files, want) in cases {
            let error = Run::read(folder(&files).path()).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains(want), "{error}");
        }
    }

    #[test]
    fn the_log_says_how_it_ended() {
        let at = |lines: &[&str]| {
            let log = lines.iter().map(|line| format!("2024-01-01 00:00:00.0 {line}\n")).collect::<String>();
            status(&folder(&[("train.log", &log)]).path().join(LOG)).unwrap()
        };
        assert_eq!(at(&["run: a", "batch 3"]), Status::Unfinished);
        assert_eq!(at(&["run: a", "error: training stopped"]), Status::Failed("training stopped".into()));
        assert_eq!(at(&["run: a", "error: x", "resume: batch 3"]), Status::Unfinished);
        assert_eq!(
            at(&["run: a", "interrupted: saved", "resume: batch 3", "finished: saved", "test loss"]),
            Status::Finished
        );
    }
}
