//! The order in which the package registers its tensors, and so lists them in a `state_dict`: its `migrate_embeddings`
//! holds two of these against each other, name by name.

/// Parts of names in an order that is right wherever two of them are siblings; the exception is [`NORM`].
const ORDER: [&str; 26] = [
    // The model.
    "start_tokens",
    "pos_embs",
    "token_embs_rev",
    "stage_models",
    "to_next_stage_proj",
    "to_logits",
    // A token embedding.
    "embedding",
    "_post",
    // A stage model, and its mixers: parameters of their own before those of their parts.
    "rotary_emb",
    "layers",
    "dt_bias",
    "A_log",
    "D",
    "in_proj",
    "conv1d",
    "x_proj",
    "dt_proj",
    NORM,
    "to_q",
    "to_kv",
    "to_out",
    "out_proj",
    "mixer",
    "norm_f",
    "weight",
    "bias",
];

/// In a layer of Mamba-2 it stands before the mixer, in one of Mamba-1 behind.
const NORM: &str = "norm";

/// Sorts names as the package does; of what it has not, numbers count as such, and words follow the alphabet at the end.
pub(crate) fn sort(names: &mut [&String]) {
    let mamba1: Vec<String> = names
        .iter()
        .filter_map(|name| name.strip_suffix(".mixer.x_proj.weight"))
        .map(|layer| format!("{layer}.norm.weight"))
        .collect();
    names.sort_by_cached_key(|name| {
        let is_last = mamba1.contains(name);
        name.split('.').map(|part| key(part, is_last)).collect::<Vec<_>>()
    });
}

/// Sorts a part of a name among its siblings.
fn key(part: &str, norm_is_last: bool) -> (usize, u64, String) {
    let known = ORDER.iter().position(|known| *known == part && !(norm_is_last && part == NORM));
    (known.unwrap_or(ORDER.len()), part.parse().unwrap_or(u64::MAX), part.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As version 0.4.2 lists them: Mamba-1 above a Transformer, shortened where layers repeat; of Mamba-2, which it has
    /// from `mamba_ssm`, the order of that.
    const REGISTERED: &str = "\
        start_tokens.0 start_tokens.1 pos_embs.1.weight token_embs_rev.0.embedding.weight token_embs_rev.1.embedding.weight \
        token_embs_rev.1._post.1.weight token_embs_rev.1._post.1.bias token_embs_rev.1._post.2.weight \
        stage_models.0.layers.2.mixer.A_log stage_models.0.layers.2.mixer.D stage_models.0.layers.2.mixer.in_proj.weight \
        stage_models.0.layers.2.mixer.conv1d.weight stage_models.0.layers.2.mixer.conv1d.bias \
        stage_models.0.layers.2.mixer.x_proj.weight stage_models.0.layers.2.mixer.dt_proj.weight \
        stage_models.0.layers.2.mixer.dt_proj.bias stage_models.0.layers.2.mixer.out_proj.weight \
        stage_models.0.layers.2.norm.weight stage_models.0.layers.10.mixer.A_log stage_models.1.rotary_emb.inv_freq \
        stage_models.1.layers.0.0.norm.g stage_models.1.layers.0.0.to_q.weight stage_models.1.layers.0.0.to_kv.weight \
        stage_models.1.layers.0.0.to_out.weight stage_models.1.layers.0.1.0.g stage_models.1.layers.0.1.1.weight \
        stage_models.1.layers.0.1.1.bias stage_models.1.layers.0.1.4.weight stage_models.1.layers.0.1.4.bias \
        stage_models.1.norm.g stage_models.2.layers.0.norm.weight stage_models.2.layers.0.mixer.dt_bias \
        stage_models.2.layers.0.mixer.A_log stage_models.2.layers.0.mixer.D stage_models.2.layers.0.mixer.in_proj.weight \
        stage_models.2.layers.0.mixer.conv1d.weight stage_models.2.layers.0.mixer.norm.weight \
        stage_models.2.layers.0.mixer.out_proj.weight stage_models.2.norm_f.weight to_next_stage_proj.0.1.weight \
        to_next_stage_proj.0.1.bias to_logits.weight to_logits.bias";

    #[test]
    fn tensors_are_sorted_as_the_package_registers_them() {
        let registered: Vec<String> = REGISTERED.split_whitespace().map(String::from).collect();
        let mut names: Vec<&String> = registered.iter().collect();
        names.sort();
        sort(&mut names);
        assert_eq!(names, registered.iter().collect::<Vec<_>>());
    }
}
