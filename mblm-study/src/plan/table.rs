//! What `mblm compare --dry-run` shows of a plan.

use std::fmt;

use mblm_train::cost::{self, STEP_PER_FORWARD, bytes as binary, metric, write_table};

use super::{Plan, PlannedVariant};
use crate::course::follow;
use crate::course::outcome::outcomes;
use crate::design::Spec;
use crate::design::budget::Amount;
use crate::folder::AboutVariant;

/// The table of `mblm compare --dry-run`.
impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spec { name, jobs, budget, scale, .. } = &self.spec;
        let variants = plural(self.spec.variants.len(), "variant");
        let (each, amount) = match scale {
            None => (variants, format!("{} each", budget.amount)),
            Some(scale) => {
                let (sizes, budgets) = (plural(scale.sizes.len(), "size"), plural(scale.budgets.len(), "budget"));
                (format!("{variants} x {sizes} x {budgets}"), format!("{} each at most", budget.amount))
            }
        };
        let (least, most) = (self.spec.seeds.first().len(), self.spec.seeds.all().len());
        let runs = range(self.variants.len() * least, self.variants.len() * most);
        let seeds = if most == 1 { "1 seed".into() } else { format!("{} seeds", range(least, most)) };
        let s = if runs == "1" { "" } else { "s" };
        writeln!(f, "{name}: {each} x {seeds} = {runs} run{s}, {amount}, {jobs} at a time")?;
        if let Some(tune) = &self.spec.tune {
            let fields: Vec<&str> = tune.fields.iter().map(|field| &field.path[..]).collect();
            let tries = range(tune.points(), tune.most_points());
            let (least, most) = self.tries();
            writeln!(
                f,
                "tuned first: {}, {tries} values for each {}, {:.0}% of the budget each = {} runs",
                fields.join(", "),
                if scale.is_some() { "variant and size" } else { "variant" },
                100.0 * tune.share,
                range(least, most)
            )?;
        }
        writeln!(f)?;
        let header = ["variant", "blocks", "widths", "layers", "parameters", "FLOP/byte", "bytes", "memory"];
        let mut rows = vec![header.map(String::from)];
        rows.extend(self.variants.iter().map(|variant| variant.about.cells()));
        write_table(f, &rows)?;
        // A size is the same for all budgets.
        let smallest = self.spec.scale.as_ref().map(|scale| scale.budgets[0]);
        let sizes = self.variants.iter().filter(|v| v.about.cell.as_ref().map(|cell| cell.flops) == smallest);
        let solved: Vec<_> = sizes
            .filter_map(|v| {
                let name = v.about.cell.as_ref().map_or(&v.about.name, |cell| &cell.variant);
                Some((name, v.about.solved.as_ref()?))
            })
            .collect();
        if !solved.is_empty() {
            writeln!(f, "\nsolved for {}:", if smallest.is_some() { "these sizes" } else { "equal parameters" })?;
            let width = solved.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
            solved.iter().try_for_each(|(name, solved)| writeln!(f, "  {name:width$}  {solved}"))?;
        }
        Ok(())
    }
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `3`, or `3 to 10`.
fn range(least: usize, most: usize) -> String {
    if least == most { least.to_string() } else { format!("{least} to {most}") }
}

impl Plan<'_> {
    /// The number of tries, at least and at most.
    fn tries(&self) -> (usize, usize) {
        let Some(tune) = &self.spec.tune else { return (0, 0) };
        let budgets = self.spec.scale.as_ref().map_or(1, |scale| scale.budgets.len());
        let runs = self.variants.len() / budgets * tune.seeds.len();
        (runs * tune.points(), runs * tune.most_points())
    }

    /// How many seconds the runs that are left take, at least and at most, if each variant trains so many bytes per second.
    pub fn seconds(&self, rates: &[f64]) -> (f64, f64) {
        let once: Vec<f64> =
            self.variants.iter().zip(rates).map(|(variant, rate)| self.seconds_of_run(variant, *rate)).collect();
        let file = self.file();
        let course = follow(&file, &outcomes(self.folder()));
        let left = course.next.iter().map(|run| (run.variant, run.share)).chain(course.ahead(&file));
        let least: f64 = left.map(|(variant, share)| share * once[variant]).sum();
        let more_seeds = (self.spec.seeds.all().len() - self.spec.seeds.first().len()) as f64;
        let mut more = more_seeds * once.iter().sum::<f64>();
        if let Some(tune) = &self.spec.tune {
            let tries = ((tune.most_points() - tune.points()) * tune.seeds.len()) as f64;
            more += course.units.iter().map(|unit| tries * tune.share * once[unit.variants[0]]).sum::<f64>();
        }
        let jobs = self.spec.jobs as f64;
        (least / jobs, (least + if least > 0.0 { more } else { 0.0 }) / jobs)
    }

    /// Training, and validations at the speed of a forward pass.
    fn seconds_of_run(&self, variant: &PlannedVariant, rate: f64) -> f64 {
        let PlannedVariant { config, about, .. } = variant;
        let train = match self.spec.budget.amount {
            Amount::Seconds(seconds) => return seconds,
            _ => about.bytes.unwrap_or(0) as f64,
        };
        let batch = (config.train.batch_size * config.params.input_seq_len) as f64;
        let validation = config.train.max_eval_steps.unwrap_or(0) as f64 * batch * config.io.validate_amount as f64;
        (train + validation / STEP_PER_FORWARD) / rate
    }
}

impl AboutVariant {
    fn cells(&self) -> [String; 8] {
        let stages = &self.cost.stages;
        let join =
            |cell: &dyn Fn(&cost::Stage) -> String, by: &str| stages.iter().map(cell).collect::<Vec<_>>().join(by);
        let short = |number: f64| metric(number).trim_end().to_string();
        [
            self.name.clone(),
            join(&|stage| stage.block_type.clone(), " / "),
            join(&|stage| stage.hidden_dim.to_string(), " / "),
            join(&|stage| stage.num_layers.to_string(), " / "),
            short(self.cost.total.parameters as f64),
            self.cost.total.flops_per_byte.map_or("unknown".into(), short),
            self.bytes.map_or("measured".into(), |bytes| short(bytes as f64)),
            self.cost.peak_bytes().map_or("unknown".into(), binary),
        ]
    }
}
