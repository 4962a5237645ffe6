//! What a run's bits per byte were measured on: runs of other data, other validation sets or other vocabularies are not
//! ranked together.

use mblm_yaml::difference::shown;
use serde_yaml::Value;

use super::run::Run;
use super::variant::Variant;

/// Variants that are not ranked with the report's others.
#[derive(Clone, Debug)]
pub struct Apart {
    /// How what they were measured on differs.
    pub why: Vec<String>,
    /// The best first.
    pub variants: Vec<Variant>,
}

/// Puts variants together that were measured on the same: the largest group, and the others with the reason why they are
/// apart. A variant whose runs were not measured on the same is divided.
pub(super) fn grouped(variants: Vec<Variant>) -> (Vec<Variant>, Vec<Apart>) {
    let mut groups: Vec<Vec<Variant>> = Vec::new();
    for Variant { name, runs, cost, differences, solved } in variants {
        let mut parts: Vec<Vec<Run>> = Vec::new();
        for run in runs {
            match parts.iter_mut().find(|part| part.iter().all(|other| conflicts(other, &run).is_empty())) {
                Some(part) => part.push(run),
                None => parts.push(vec![run]),
            }
        }
        for runs in parts {
            let (name, cost, differences, solved) = (name.clone(), cost.clone(), differences.clone(), solved.clone());
            let variant = Variant { name, runs, cost, differences, solved };
            let fits = |group: &Vec<Variant>| group.iter().all(|other| between(other, &variant).is_empty());
            match groups.iter_mut().find(|group| fits(group)) {
                Some(group) => group.push(variant),
                None => groups.push(vec![variant]),
            }
        }
    }
    // Of equally large ones the first.
    let Some(main) = (0..groups.len()).rev().max_by_key(|&i| groups[i].len()) else { return (vec![], vec![]) };
    let main = groups.remove(main);
    let why = |group: &[Variant]| group.first().map(|variant| between(&main[0], variant)).unwrap_or_default();
    let apart = groups.into_iter().map(|group| Apart { why: why(&group), variants: group }).collect();
    (main, apart)
}

/// How what two variants were measured on differs.
fn between(a: &Variant, b: &Variant) -> Vec<String> {
    let pairs = a.runs.iter().flat_map(|a| b.runs.iter().map(move |b| (a, b)));
    pairs.map(|(a, b)| conflicts(a, b)).find(|found| !found.is_empty()).unwrap_or_default()
}

/// How what run `b` was measured on differs from what run `a` was, in words; what is not known does not differ.
fn conflicts(a: &Run, b: &Run) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(data) = data_conflict(a, b) {
        found.push(data);
    }
    let mut differ = |what: &str, of: fn(&Value) -> Option<String>| {
        let of = |run: &Run| run.config.as_ref().and_then(of);
        if let (Some(a), Some(b)) = (of(a), of(b))
            && a != b
        {
            found.push(format!("{what}: {b}, not {a}"));
        }
    };
    differ("options of the data set", |config| {
        config.get("io").map(|io| io.get("dataset_args").map_or("none".into(), shown))
    });
    differ("validation", validation);
    differ("prediction of", |config| {
        let is_encoder = config.get("params")?.get("mblm_config").is_some();
        Some(if is_encoder { "masked bytes" } else { "the next byte" }.into())
    });
    differ("num_tokens", |config| hierarchy(config)?.get("num_tokens").map(shown));
    differ("pad_token_id", |config| hierarchy(config)?.get("pad_token_id").map(shown));
    found
}

/// Fingerprints tell whether data are the same; without two of one rule, the names in the configurations do.
fn data_conflict(a: &Run, b: &Run) -> Option<String> {
    let name = |run: &Run| {
        let io = run.config.as_ref()?.get("io")?;
        Some(format!("{} ({})", io.get("dataset_dir")?.as_str()?, io.get("dataset_id")?.as_str()?))
    };
    let rule = |fingerprint: &str| fingerprint.split_once(':').map(|(rule, _)| rule.to_string());
    let (name_a, name_b) = (name(a), name(b));
    let differ = match (&a.data, &b.data) {
        (Some(a), Some(b)) if rule(a) == rule(b) => a != b,
        _ => name_a.is_some() && name_b.is_some() && name_a != name_b,
    };
    let (name_a, name_b) = (name_a.unwrap_or("unknown".into()), name_b.unwrap_or("unknown".into()));
    differ.then(|| match name_a == name_b {
        true => format!("data: the files in {name_a} are not the same"),
        false => format!("data: {name_b}, not {name_a}"),
    })
}

/// How much of the validation data is read.
fn validation(config: &Value) -> Option<String> {
    let train = config.get("train")?;
    let bytes = match train.get("max_eval_steps").and_then(Value::as_u64) {
        None | Some(0) => return Some("all validation data".into()),
        Some(steps) => {
            let batch = train.get("batch_size")?.as_u64()?;
            let sequence = config.get("params")?.get("input_seq_len")?.as_u64()?;
            steps.saturating_mul(batch).saturating_mul(sequence)
        }
    };
    // Sequences are padded where patches follow the content: how many bytes they have depends on the rule.
    let params = hierarchy(config)?;
    let cut = params.get("patching").filter(|rules| !rules.is_null());
    let cut = cut.map_or_else(String::new, |rules| {
        format!(
            ", filled with patches of {} up to {}",
            shown(rules),
            params.get("seq_lens").map_or_else(String::new, shown)
        )
    });
    Some(format!("the first {bytes} bytes (max_eval_steps x batch_size x input_seq_len){cut}"))
}

fn hierarchy(config: &Value) -> Option<&Value> {
    let params = config.get("params")?;
    params.get("mblm_config").or(Some(params))
}

#[cfg(test)]
mod tests {
    use super::super::run::Status;
    use super::super::variant::tests::{run, variant};
    use super::*;

    fn measured_on(name: &str, data: Option<&str>, config: &str) -> Variant {
        let mut run = run(1, Status::Finished, &[2.0]);
        run.data = data.map(String::from);
        run.config = Some(serde_yaml::from_str(config).unwrap());
        variant(name, vec![run])
    }

    fn config(dir: &str, steps: u64, tokens: u64) -> String {
        format!(
            "{{io: {{dataset_dir: {dir}, dataset_id: bytes}}, params: {{num_tokens: {tokens}, pad_token_id: 256, input_seq_len: 64}}, \
             train: {{batch_size: 4, max_eval_steps: {steps}}}}}"
        )
    }

    #[test]
    fn what_was_measured_on_something_else_is_apart_with_the_reason() {
        let plain = config("x", 3, 257);
        let same =
            || vec![measured_on("a", Some("2:aa"), &plain), measured_on("b", Some("2:aa"), &config("y", 3, 257))];
        let (main, apart) = grouped(same());
        assert_eq!((main.len(), apart.len()), (2, 0), "the same bytes in another folder are the same data");
        let cases = [
            (Some("2:bb"), config("x", 3, 257), "data: the files in x (bytes) are not the same"),
            (Some("2:bb"), config("z", 3, 257), "data: z (bytes), not x (bytes)"),
            (None, config("z", 3, 257), "data: z (bytes), not x (bytes)"),
            (
                Some("2:aa"),
                config("x", 5, 257),
                "validation: the first 1280 bytes (max_eval_steps x batch_size x input_seq_len), not the first 768 bytes (max_eval_steps x batch_size x input_seq_len)",
            ),
            (
                Some("2:aa"),
                config("x", 0, 257),
                "validation: all validation data, not the first 768 bytes (max_eval_steps x batch_size x input_seq_len)",
            ),
            (Some("2:aa"), config("x", 3, 300), "num_tokens: 300, not 257"),
            (
                Some("2:aa"),
                config("x", 3, 257).replace("params: {", "params: {patching: spacelike, seq_lens: [8, 8], "),
                "validation: the first 768 bytes (max_eval_steps x batch_size x input_seq_len), filled with patches of \"spacelike\" up to [8, 8], not the first 768 bytes (max_eval_steps x batch_size x input_seq_len)",
            ),
        ];
        for (data, config, want) in cases {
            let mut variants = same();
            variants.insert(0, measured_on("other", data, &config));
            let (main, apart) = grouped(variants);
            assert_eq!(main.iter().map(|v| &v.name[..]).collect::<Vec<_>>(), ["a", "b"], "{want}");
            assert_eq!((apart.len(), &apart[0].why[..]), (1, &[want.to_string()][..]));
        }
        let (main, apart) = grouped(vec![measured_on("a", None, "{}"), measured_on("b", Some("2:cc"), "{}")]);
        assert_eq!((main.len(), apart.len()), (2, 0), "what is not known does not differ");
    }

    #[test]
    fn a_variant_whose_data_changed_between_its_seeds_is_divided() {
        let plain = config("x", 3, 257);
        let mut one = measured_on("a", Some("2:aa"), &plain);
        one.runs.extend(measured_on("a", Some("2:bb"), &plain).runs);
        let (main, apart) = grouped(vec![one]);
        assert_eq!((main.len(), main[0].runs.len(), apart[0].variants[0].runs.len()), (1, 1, 1));
    }
}
