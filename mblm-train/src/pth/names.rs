//! Names of version 0.4.0 and before: there, the token embedding of the local stage stood bare, and that of a stage
//! above was the sequence Embedding, Rearrange, LayerNorm, Linear, LayerNorm.

const EMBEDDINGS: &str = "token_embs_rev.";

/// The name that version 0.4.2 gives to what `name` names.
pub(super) fn current(name: &str) -> String {
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
