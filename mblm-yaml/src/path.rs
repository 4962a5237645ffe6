//! Paths of fields, such as `params.block[1].attn_num_heads`.

/// One step of a path.
pub(crate) enum Segment<'a> {
    Field(&'a str),
    Index(usize),
}

impl std::fmt::Display for Segment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Segment::Field(name) => f.write_str(name),
            Segment::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// The steps of a path; `None` if it is not one.
pub(crate) fn segments(path: &str) -> Option<Vec<Segment<'_>>> {
    let mut segments = Vec::new();
    for part in path.split('.').filter(|_| !path.is_empty()) {
        let (name, indices) = part.split_at(part.find('[').unwrap_or(part.len()));
        if name.is_empty() {
            return None;
        }
        segments.push(Segment::Field(name));
        for index in indices.split_terminator(']') {
            segments.push(Segment::Index(index.strip_prefix('[')?.parse().ok()?));
        }
        if !indices.is_empty() && !indices.ends_with(']') {
            return None;
        }
    }
    Some(segments)
}

/// A path as its section and its last step.
pub(crate) fn split_last(path: &str) -> (&str, &str) {
    match path.rfind(['.', '[']) {
        Some(at) => (&path[..at], path[at..].trim_start_matches('.')),
        None => ("", path),
    }
}

/// Whether `path` is `section` or lies in it.
pub(crate) fn is_within(path: &str, section: &str) -> bool {
    path.strip_prefix(section).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}
