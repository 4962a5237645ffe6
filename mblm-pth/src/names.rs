//! Names of tensors in other forms than those of version 0.4.2: behind the prefixes of wrappers, and those of version
//! 0.4.0 and before. There, the token embedding of the local stage stood bare, and that of a stage above was the
//! sequence Embedding, Rearrange, LayerNorm, Linear, LayerNorm.

use std::collections::BTreeMap;

/// The keys of the dictionary that the package saves.
pub(crate) const MODEL: &str = "MODEL";
pub(crate) const LOSS: &str = "LOSS";

const EMBEDDINGS: &str = "token_embs_rev.";
/// What torch's wrappers of a module put before every name: `DataParallel` and its kind, `torch.compile`.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];

/// The length of what wrappers, in any order, put before each of `names`.
pub(crate) fn common_prefix(names: &[&str]) -> usize {
    let mut len = 0;
    while let Some(wrapper) = names.first().and_then(|name| WRAPPERS.iter().find(|w| name[len..].starts_with(**w)))
        && names.iter().all(|name| name[len..].starts_with(wrapper))
    {
        len += wrapper.len();
    }
    len
}

/// The parts of tensors' names that tell apart two block types whose fields are the same in a configuration.
const MARKS: [(&str, &str); 2] = [(".mixer.x_proj.weight", "mamba1"), (".mixer.dt_bias", "mamba2")];

/// The block types of stages, counted from 0, where the names of their tensors tell.
pub fn block_types<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<usize, &'static str> {
    let block_type = |name: &'a str| {
        let (stage, rest) = name.strip_prefix("stage_models.")?.split_once('.')?;
        let (_, block_type) = MARKS.iter().find(|(mark, _)| rest.ends_with(mark))?;
        Some((stage.parse().ok()?, *block_type))
    };
    names.filter_map(block_type).collect()
}

/// The name that version 0.4.2 gives to what `name` names.
pub(crate) fn current(name: &str) -> String {
    let renamed = || {
        let (stage, rest) = name.strip_prefix(EMBEDDINGS)?.split_once('.')?;
        let (layer, field) = rest.split_once('.').unwrap_or(("0", rest));
        let rest = match layer.parse::<usize>().ok()? {
            0 => format!("embedding.{field}"),
            layer => format!("_post.{}.{field}", layer - 1),
        };
        Some(format!("{EMBEDDINGS}{stage}.{rest}"))
    };
    renamed().unwrap_or_else(|| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_that_every_name_has_are_counted() {
        let cases: [(&[&str], &str); 7] = [
            (&["module.a.w", "module.b"], "module."),
            (&["_orig_mod.a", "_orig_mod.b"], "_orig_mod."),
            (&["module._orig_mod.a", "module._orig_mod.b"], "module._orig_mod."),
            (&["_orig_mod.module.a", "_orig_mod.module.b"], "_orig_mod.module."),
            (&["module._orig_mod.a", "module.b"], "module."),
            (&["module.a", "b"], ""),
            (&[], ""),
        ];
        for (names, prefix) in cases {
            assert_eq!(common_prefix(names), prefix.len(), "{names:?}");
        }
    }

    #[test]
    fn old_names_become_new_ones_and_new_ones_stay() {
        let pairs = [
            ("token_embs_rev.0.weight", "token_embs_rev.0.embedding.weight"),
            ("token_embs_rev.2.0.weight", "token_embs_rev.2.embedding.weight"),
            ("token_embs_rev.1.2.bias", "token_embs_rev.1._post.1.bias"),
            ("token_embs_rev.1.4.weight", "token_embs_rev.1._post.3.weight"),
        ];
        for (old, new) in pairs {
            assert_eq!((current(old), current(new)), (new.into(), new.into()));
        }
        for other in ["to_logits.weight", "token_embs_rev", "token_embs_rev.", "stage_models.0.layers.0.1.4.bias"] {
            assert_eq!(current(other), other);
        }
    }
}
