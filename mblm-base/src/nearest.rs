//! "Did you mean …?": the known name that a mistyped one is closest to.

/// The candidate nearest to `name`, if it is near enough to be what was meant: by its letters, or else the only one that
/// has all its words, such as `attn_num_heads` for `num_heads`, or that it has all the words of.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = (name.chars().count() / 3).max(1);
    let candidates: Vec<&str> = candidates.into_iter().collect();
    let spelt = candidates.iter().map(|candidate| (distance(name, candidate), candidate));
    if let Some((_, candidate)) = spelt.filter(|&(distance, _)| distance <= near).min_by_key(|&(distance, _)| distance)
    {
        return Some(candidate);
    }
    let within = |a: &str, b: &str| a.split('_').all(|word| b.split('_').any(|other| other.eq_ignore_ascii_case(word)));
    let mut worded = candidates.iter().filter(|candidate| within(name, candidate) || within(candidate, name));
    worded.next().filter(|_| worded.next().is_none()).copied()
}

/// What to add to "unknown …": the nearest name, or else all of them.
pub fn suggestion(name: &str, candidates: &[&str]) -> String {
    match nearest(name, candidates.iter().copied()) {
        Some(candidate) => format!("did you mean `{candidate}`?"),
        None if candidates.is_empty() => "none is expected here".into(),
        None if candidates.len() == 1 => format!("expected `{}`", candidates[0]),
        None => format!("expected one of {}", quoted(candidates)),
    }
}

/// The names in backticks, separated by commas.
pub fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Edits that turn `a` into `b`, regardless of case; swapping two neighbours is one edit.
fn distance(a: &str, b: &str) -> usize {
    strsim::osa_distance(&a.to_lowercase(), &b.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_edits() {
        for (a, b, want) in [("", "abc", 3), ("mamba", "mamba2", 1), ("trian", "train", 1), ("LSTM", "lstm", 0)] {
            assert_eq!(distance(a, b), want, "{a} to {b}");
        }
    }

    #[test]
    fn suggests_the_nearest_or_lists_all() {
        let names = ["attn_num_heads", "attn_head_dims", "ff_dropout"];
        assert_eq!(suggestion("width", &names[..1]), "expected `attn_num_heads`");
        assert_eq!(suggestion("num_heads", &names), "did you mean `attn_num_heads`?");
        assert_eq!(suggestion("ff_dropout_rate", &names), "did you mean `ff_dropout`?");
        assert!(suggestion("attn", &names).starts_with("expected one of"), "two have the word");
        assert_eq!(suggestion("attn_num_head", &names), "did you mean `attn_num_heads`?");
        assert_eq!(suggestion("d", &names), "expected one of `attn_num_heads`, `attn_head_dims`, `ff_dropout`");
        assert_eq!(suggestion("d", &[]), "none is expected here");
    }
}
