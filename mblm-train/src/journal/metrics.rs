//! The numbers of a run over time: `metrics.jsonl`, one JSON object per line, and the same scalars for TensorBoard in
//! `tensorboard/train`, `tensorboard/valid` and `tensorboard/test`, so that one chart shows their losses together.
//!
//! A line holds `batch`, `step`, `bytes_seen`, `seconds` (of wall-clock time that the run was going, over all its
//! sessions; what a session did after its last point is not in it) and `kind`, then the scalars by their tags:
//!
//! | tag | what |
//! |---|---|
//! | `loss`, `bpb` | the mean loss in nats per byte, and in bits |
//! | `lr` | the learning rate of the next gradient step |
//! | `stage1/lr`, … | with `train.lr_scale`: that of each stage |
//! | `grad_norm`, `grad_norm_clipped` | the Euclidean norm of all gradients, before and after clipping |
//! | `stage1/grad_norm`, … | the same before clipping, of the model of one stage alone |
//! | `stage1/activation_norm`, … | the root mean square of that stage's output, the hidden state after its last layer, over all its elements: sequences of the batch, positions with start tokens and padding, channels |
//! | `bytes_per_second` | training bytes per second since the last point, without validations and checkpoints |
//! | `data_seconds` | seconds spent waiting for training data since the last point |
//! | `wait_seconds` | of several processes: seconds that this one waited for the others, since the last point |
//! | `sum_seconds` | of several processes: seconds in which gradients were summed up, since the last point |
//! | `memory_mb` | resident memory now, in MiB |
//!
//! Where gradients are accumulated over several batches, their norms are on the line of the last of these, with or
//! without a loss: that is when the gradient is complete. A number that is not finite is `null` in the JSON, which has no other word for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mblm_base::files;
use mblm_base::memory::Memory;
use mblm_core::ParamStore;
use mblm_core::param::Part;
use serde::{Deserialize, Serialize, Serializer};

use crate::error::{AtPath, Result};
use crate::evaluate::bpb;
use crate::journal::line_log::LineLog;
use crate::journal::tensorboard::EventFile;
use crate::trainer::optimizer::grad_sums;

const LINES: &str = "metrics.jsonl";
const BOARD: &str = "tensorboard";

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Training.
    Train,
    /// The validation split.
    Valid,
    /// The test split.
    Test,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Train, Kind::Valid, Kind::Test];

    /// `train`, `valid` or `test`, as in the reference package's files.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Train => "train",
            Kind::Valid => "valid",
            Kind::Test => "test",
        }
    }
}

/// Numbers with their tags.
pub type Scalars = Vec<(String, f64)>;

/// What was measured at one moment of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The last batch, counted as `cum_batch` in `loss.csv`: from 0, on from the batches before in a chained run.
    /// TensorBoard's step.
    pub batch: u64,
    /// Gradient steps taken.
    pub step: u64,
    /// Training bytes seen.
    pub bytes_seen: u64,
    /// On what.
    pub kind: Kind,
    /// The numbers.
    pub scalars: Scalars,
}

/// A line of `metrics.jsonl`.
#[derive(Serialize)]
struct Line<'a> {
    batch: u64,
    step: u64,
    bytes_seen: u64,
    seconds: f64,
    kind: &'static str,
    #[serde(flatten, serialize_with = "as_map")]
    scalars: &'a Scalars,
}

fn as_map<S: Serializer>(scalars: &Scalars, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(scalars.iter().map(|(tag, value)| (tag, value)))
}

/// What a resumed run needs to know of a line.
#[derive(Deserialize)]
struct Stamp {
    batch: u64,
    seconds: f64,
}

/// The metrics of a run, open for more points.
pub struct Metrics {
    lines: LineLog,
    board: PathBuf,
    first_batch: u64,
    events: BTreeMap<Kind, EventFile>,
    started: Instant,
    seconds_before: f64,
    pace: Pace,
}

/// What the batches since the last training point took.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    bytes: u64,
    seconds: f64,
    data_seconds: f64,
    /// Waiting for other processes, and adding up gradients with them; none of a process by itself.
    together: Option<(f64, f64)>,
}

/// The folders of metrics in a run's folder.
pub(crate) fn folders(run: &Path) -> impl Iterator<Item = PathBuf> {
    let board = run.join(BOARD);
    std::iter::once(board.clone()).chain(Kind::ALL.map(|kind| board.join(kind.name())))
}

impl Metrics {
    /// Opens the metrics in a run's folder, without what lies at or after batch `batches`, which a resumed run will see
    /// again. The clock goes on from the last point that stays.
    pub fn open(folder: &Path, batches: u64) -> Result<Self> {
        let mut seconds_before = 0.0;
        let lines = LineLog::open(folder, LINES, None, |line| match serde_json::from_str::<Stamp>(line) {
            Ok(stamp) if stamp.batch < batches => {
                seconds_before = stamp.seconds;
                true
            }
            _ => false,
        })?;
        let mut metrics =
            Metrics { lines, board: folder.join(BOARD), first_batch: batches, seconds_before, ..Metrics::nowhere() };
        // A chart of an earlier session must learn where this one goes on, also if it is stopped before its first point.
        for kind in Kind::ALL {
            if metrics.board.join(kind.name()).exists() {
                metrics.begin_events(kind)?;
            }
        }
        Ok(metrics)
    }

    /// Keeps nothing: another process does.
    pub fn nowhere() -> Self {
        Metrics {
            lines: LineLog::nowhere(),
            board: PathBuf::new(),
            first_batch: 0,
            events: BTreeMap::new(),
            started: Instant::now(),
            seconds_before: 0.0,
            pace: Pace::default(),
        }
    }

    fn begin_events(&mut self, kind: Kind) -> Result<()> {
        files::own_folder(&self.board).at(&self.board)?;
        let events = EventFile::create(&self.board.join(kind.name()), self.first_batch)?;
        self.events.insert(kind, events);
        Ok(())
    }

    /// Adds a point; it is on disk, as far as a crash of the program goes, when this returns.
    pub fn record(&mut self, point: &Point) -> Result<()> {
        if self.lines.is_nowhere() {
            return Ok(());
        }
        let Point { batch, step, bytes_seen, kind, ref scalars } = *point;
        let seconds = self.seconds_before + self.started.elapsed().as_secs_f64();
        let line = serde_json::to_string(&Line { batch, step, bytes_seen, seconds, kind: kind.name(), scalars });
        self.lines.add(&line.map_err(std::io::Error::from).at(Path::new(LINES))?)?;
        if !self.events.contains_key(&kind) {
            self.begin_events(kind)?;
        }
        match self.events.get_mut(&kind) {
            Some(events) => events.add(batch, scalars.iter().map(|(tag, value)| (&tag[..], *value))),
            None => Ok(()),
        }
    }

    /// A batch of `bytes` was trained on in `seconds`, `data_seconds` of which went by before its data were there.
    pub fn trained(&mut self, bytes: u64, seconds: f64, data_seconds: f64) {
        let Pace { bytes: all, seconds: total, data_seconds: waited, .. } = &mut self.pace;
        *all += bytes;
        *total += seconds;
        *waited += data_seconds;
    }

    /// Of several processes, this one waited so many seconds for the others, and added up gradients in so many.
    pub fn together(&mut self, waited: f64, summed: f64) {
        let (all_waited, all_summed) = self.pace.together.get_or_insert_default();
        *all_waited += waited;
        *all_summed += summed;
    }

    /// The scalars of how training went since this was last asked, and the memory it holds now.
    pub fn pace(&mut self) -> Scalars {
        let Pace { bytes, seconds, data_seconds, together } = std::mem::take(&mut self.pace);
        let mut scalars =
            vec![("bytes_per_second".into(), bytes as f64 / seconds.max(1e-9)), ("data_seconds".into(), data_seconds)];
        if let Some((waited, summed)) = together {
            scalars.extend([("wait_seconds".into(), waited), ("sum_seconds".into(), summed)]);
        }
        scalars.extend(Memory::now().map(|memory| ("memory_mb".into(), memory.resident as f64 / (1u64 << 20) as f64)));
        scalars
    }
}

/// The scalars of a loss in nats.
pub fn loss_scalars(loss: f64) -> Scalars {
    vec![("loss".into(), loss), ("bpb".into(), bpb(loss))]
}

/// The root mean squares of the stages' outputs under their tags.
pub fn activation_norms(norms: &[f64]) -> Scalars {
    norms.iter().zip(1..).map(|(norm, stage)| (format!("stage{stage}/activation_norm"), *norm)).collect()
}

/// The norm of each stage model's gradient, `stage1/grad_norm` and so on.
/// Embeddings, start tokens and projections between stages are in none of them.
pub fn stage_grad_norms(store: &ParamStore) -> Result<Scalars> {
    let mut squares = BTreeMap::<usize, f64>::new();
    for (param, sums) in store.iter().zip(grad_sums(store)?) {
        if let Some(Part::Stage(stage)) = param.part() {
            *squares.entry(stage).or_default() += sums.map_or(0.0, |(_, square)| square);
        }
    }
    Ok(squares.iter().map(|(stage, square)| (format!("stage{}/grad_norm", stage + 1), square.sqrt())).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use mblm_core::Init;
    use serde_json::Value;

    use super::*;

    fn point(kind: Kind, batch: u64, scalars: &[(&str, f64)]) -> Point {
        let scalars = scalars.iter().map(|(tag, value)| (tag.to_string(), *value)).collect();
        Point { batch, step: batch / 2, bytes_seen: (batch + 1) * 64, kind, scalars }
    }

    fn lines(folder: &Path) -> Vec<String> {
        fs::read_to_string(folder.join(LINES)).unwrap().lines().map(String::from).collect()
    }

    fn seconds(line: &str) -> f64 {
        serde_json::from_str::<Value>(line).unwrap()["seconds"].as_f64().unwrap()
    }

    fn event_files(folder: &Path, kind: Kind) -> usize {
        fs::read_dir(folder.join(BOARD).join(kind.name())).map_or(0, |entries| entries.count())
    }

    #[test]
    fn a_line_has_the_place_and_then_the_scalars_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        let scalars = [("loss", 0.1 + 0.2), ("bpb", f64::NAN), ("stage1/grad_norm", 1e-9)];
        metrics.record(&point(Kind::Train, 5, &scalars)).unwrap();
        let line = &lines(folder.path())[0];
        assert!((0.0..60.0).contains(&seconds(line)), "{line}");
        let time = &serde_json::from_str::<Value>(line).unwrap()["seconds"];
        let want = format!(
            r#"{{"batch":5,"step":2,"bytes_seen":384,"seconds":{time},"kind":"train","loss":0.30000000000000004,"bpb":null,"stage1/grad_norm":1e-9}}"#
        );
        assert_eq!(*line, want);
    }

    #[test]
    fn a_resumed_run_drops_what_it_sees_again_and_its_clock_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        metrics.seconds_before = 1000.0;
        for batch in 0..4 {
            metrics.record(&point(Kind::Train, batch, &[("loss", 2.0)])).unwrap();
        }
        metrics.record(&point(Kind::Valid, 3, &[("loss", 3.0)])).unwrap();
        let before = lines(folder.path());
        fs::write(folder.path().join(LINES), before.join("\n") + "\n{\"batch\":0,\"sec").unwrap();

        let mut metrics = Metrics::open(folder.path(), 3).unwrap();
        assert_eq!(lines(folder.path()), before[..3], "those of batches 0, 1 and 2");
        metrics.record(&point(Kind::Train, 3, &[("loss", 2.5)])).unwrap();
        let after = lines(folder.path());
        assert_eq!(after.len(), 4);
        assert!(after[3].contains(r#""loss":2.5"#) && seconds(&after[3]) >= seconds(&before[2]), "{after:?}");
    }

    #[test]
    fn each_session_begins_event_files_for_the_kinds_there_are() {
        let folder = tempfile::tempdir().unwrap();
        let count = || Kind::ALL.map(|kind| event_files(folder.path(), kind));
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        assert_eq!(count(), [0, 0, 0]);
        metrics.record(&point(Kind::Train, 0, &[("loss", 2.0)])).unwrap();
        metrics.record(&point(Kind::Train, 1, &[("loss", 2.0)])).unwrap();
        assert_eq!(count(), [1, 0, 0]);
        let mut metrics = Metrics::open(folder.path(), 1).unwrap();
        assert_eq!(count(), [2, 0, 0], "before the first point");
        metrics.record(&point(Kind::Valid, 1, &[("loss", 2.0)])).unwrap();
        assert_eq!(count(), [2, 1, 0]);
    }

    #[test]
    fn the_pace_is_of_the_batches_since_it_was_last_asked() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        metrics.trained(64, 0.5, 0.25);
        metrics.trained(64, 1.5, 0.5);
        let pace = metrics.pace();
        assert_eq!(pace[..2], [("bytes_per_second".into(), 64.0), ("data_seconds".into(), 0.75)]);
        if cfg!(target_os = "linux") {
            assert!(pace[2].0 == "memory_mb" && (1.0..1e6).contains(&pace[2].1), "{pace:?}");
        }
        metrics.trained(10, 0.5, 0.0);
        assert_eq!(metrics.pace()[..2], [("bytes_per_second".into(), 20.0), ("data_seconds".into(), 0.0)]);
    }

    #[test]
    fn a_stages_gradient_is_that_of_its_model() {
        let mut store = ParamStore::new(0);
        let grads = [
            ("a", Part::Start(0), 100.0),
            ("b", Part::Stage(0), 3.0),
            ("c", Part::Stage(0), -4.0),
            ("d", Part::Stage(1), 12.0),
            ("e", Part::Stage(10), 0.5),
            ("f", Part::Head, 100.0),
        ];
        for (name, part, grad) in grads {
            store.root().of(part).param(name, &[1], Init::Const(0.0)).unwrap().grad_mut()[0] = grad;
        }
        let want = [("stage1/grad_norm", 5.0), ("stage2/grad_norm", 12.0), ("stage11/grad_norm", 0.5)];
        assert_eq!(stage_grad_norms(&store).unwrap(), want.map(|(tag, norm)| (tag.to_string(), norm)));
    }
}
