//! Where the bytes of a batch lie in the stages: the place of each byte, and the sequences of a stage that run together.
//!
//! A patch that ends before it is full is padded on the right with the pad token, and a larger patch with empty patches. So
//! the places of a batch always have the shape `(B, patches, P_2, …, P_N)`. Padding exists only in this layout: a stage runs
//! its sequences without the padding behind them, those of equal length together.

use std::sync::Arc;

use mblm_sdk::error::Result;

use super::projection::Parents;
use super::tokens::Tokens;
use crate::config::MblmConfig;
use crate::patching::{Cutter, without_padding};

/// The layout of a batch.
pub(crate) struct Layout {
    /// Places of each sequence of the batch: a multiple of `P_2 · … · P_N`.
    pub(crate) padded_len: usize,
    /// What runs at each stage, from global to local.
    pub(crate) stages: Vec<Vec<Bucket>>,
    /// Where each byte lies, if patches follow the content.
    pub(crate) bytes: Option<Bytes>,
}

/// The bytes of a batch as they were given.
pub(crate) struct Bytes {
    /// `(B, L)`
    pub(crate) ids: Vec<u32>,
    /// The row of the local stage's output at each byte, `(B, L)`. Padding at the end of a sequence has the row of the last
    /// byte before it.
    pub(crate) rows: Vec<u32>,
}

/// Sequences of one stage that have the same length and run together.
pub(crate) struct Bucket {
    /// Tokens of each, without the start token.
    pub(crate) len: usize,
    /// The outputs of the stage above that are projected to them. The first stage has none above.
    pub(crate) parents: Parents,
    /// The bytes of their tokens, padding within tokens included.
    pub(crate) ids: Tokens,
    /// The first row of their outputs among those of the stage.
    pub(crate) first_row: usize,
    /// The number of sequences in the buckets before.
    pub(crate) before: usize,
}

impl Layout {
    /// The layout of ids `(B, places)` in patches of full length.
    pub(crate) fn full(values: &Tokens, padded_len: usize, config: &MblmConfig) -> Self {
        let bucket = |n: usize| {
            let above = if n == 1 { padded_len / patch_len(config, 0) } else { config.seq_lens[n.max(1) - 1] };
            let len = if n == 0 { padded_len / patch_len(config, 0) } else { config.seq_lens[n] };
            vec![Bucket { len, parents: Parents::First(above), ids: values.clone(), first_row: 0, before: 0 }]
        };
        Layout { padded_len, stages: (0..config.num_stages()).map(bucket).collect(), bytes: None }
    }
}

/// Cuts sequences `(B, L)` by the rules of `config`. Returns the places of the batch, `(B, padded_len)`, and their layout.
/// Pad tokens at the end of a sequence are no part of it. `starts`: start tokens of a sequence of a stage, 1 or 0.
///
/// # Errors
/// A rule fails.
pub(crate) fn cut(flat: &[u32], len: usize, config: &MblmConfig, starts: usize) -> Result<(Tokens, Layout)> {
    let cuts = flat.chunks_exact(len.max(1)).map(|ids| Cut::new(ids, config)).collect::<Result<Vec<_>>>()?;
    let patch = patch_len(config, 0);
    let padded_len = cuts.iter().map(|cut| cut.len).max().unwrap_or(0).next_multiple_of(patch).max(patch);
    let mut places = vec![config.pad_token_id as u32; cuts.len() * padded_len];
    for ((row, ids), cut) in places.chunks_exact_mut(padded_len).zip(flat.chunks_exact(len.max(1))).zip(&cuts) {
        cut.places.iter().zip(ids).for_each(|(&place, &id)| row[place] = id);
    }
    let mut lens = lengths(&cuts, padded_len, config);
    lens[0] = vec![padded_len / patch; cuts.len()];
    let (mut stages, mut above) = (Vec::new(), Vec::new());
    for (n, lens) in lens.iter().enumerate() {
        let (buckets, first_rows) = buckets(n, lens, &above, &places, config, starts);
        stages.push(buckets);
        // The output at position i of a sequence is projected to its token i.
        let per_sequence = if n == 0 { lens[0] } else { config.seq_lens[n] };
        above = first_rows.iter().flat_map(|first| (0..per_sequence as u32).map(move |i| first + i)).collect();
    }
    // Of the local stage, tokens are bytes, and the output at a byte stands behind its start token.
    let row = |b: usize, place: usize| above[b * padded_len + place] + starts as u32;
    let rows = cuts.iter().enumerate().flat_map(|(b, cut)| {
        let last = cut.places.last().copied().unwrap_or(0);
        (0..len).map(move |l| row(b, cut.places.get(l).copied().unwrap_or(last)))
    });
    let bytes = Some(Bytes { ids: flat.to_vec(), rows: rows.collect() });
    Ok((Tokens::new(places), Layout { padded_len, stages, bytes }))
}

/// Bytes of one token of stage `n`.
fn patch_len(config: &MblmConfig, n: usize) -> usize {
    config.seq_lens[n + 1..].iter().product()
}

/// One sequence, cut.
struct Cut {
    /// The place of each byte.
    places: Vec<usize>,
    /// Places up to the last byte.
    len: usize,
}

impl Cut {
    fn new(ids: &[u32], config: &MblmConfig) -> Result<Self> {
        // A sequence of padding alone keeps one token, which is not predicted, so that every stage has something to run.
        let real = without_padding(ids, config.pad_token_id as u32).len().max(ids.len().min(1));
        let places = Cutter::new(config).places(&ids[..real])?;
        let len = places.last().map_or(0, |last| last + 1);
        Ok(Cut { places, len })
    }
}

/// The tokens of every sequence of each stage, of those that the padded layout has; none of the first stage.
fn lengths(cuts: &[Cut], padded_len: usize, config: &MblmConfig) -> Vec<Vec<usize>> {
    let stages = config.num_stages();
    let mut lens: Vec<Vec<usize>> = vec![vec![]; stages];
    let seq = config.seq_lens[stages - 1];
    let mut local = vec![0; cuts.len() * padded_len / seq];
    for (b, cut) in cuts.iter().enumerate() {
        cut.places.iter().for_each(|place| local[(b * padded_len + place) / seq] += 1);
    }
    lens[stages - 1] = local;
    for n in (1..stages - 1).rev() {
        let filled = |tokens: &[usize]| tokens.iter().filter(|&&len| len > 0).count();
        lens[n] = lens[n + 1].chunks_exact(config.seq_lens[n]).map(filled).collect();
    }
    lens
}

/// The buckets of stage `n`, and the first row of each sequence; `above`: the row of the stage above that is
/// projected to each sequence.
fn buckets(
    n: usize,
    lens: &[usize],
    above: &[u32],
    places: &[u32],
    config: &MblmConfig,
    starts: usize,
) -> (Vec<Bucket>, Vec<u32>) {
    let token = patch_len(config, n);
    let room = if n == 0 { lens[0] } else { config.seq_lens[n] } * token;
    let (mut buckets, mut first_rows) = (Vec::new(), vec![0; lens.len()]);
    let (mut row, mut before) = (0, 0);
    let longest = lens.iter().copied().max().unwrap_or(0);
    for len in 1..=longest {
        let members: Vec<usize> = (0..lens.len()).filter(|&r| lens[r] == len).collect();
        if members.is_empty() {
            continue;
        }
        let ids = members.iter().flat_map(|r| places[r * room..][..len * token].iter().copied());
        let parents: Arc<[u32]> = match n {
            0 => Arc::default(),
            _ => members.iter().map(|&r| above[r]).collect(),
        };
        buckets.push(Bucket {
            len,
            parents: Parents::Listed(parents),
            ids: Tokens::new(ids.collect()),
            first_row: row,
            before,
        });
        before += members.len();
        for r in members {
            first_rows[r] = row as u32;
            row += starts + len;
        }
    }
    (buckets, first_rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tests::registry;

    fn config(seq_lens: &str, patching: &str) -> MblmConfig {
        let stages = seq_lens.split(',').count();
        let lists = format!(
            "hidden_dims: [{}]\nnum_layers: [{}]",
            ["2"].repeat(stages).join(","),
            ["1"].repeat(stages).join(",")
        );
        let block = "{block_type: transformer, attn_head_dims: 2, attn_num_heads: 1, attn_use_rot_embs: true}";
        let yaml = format!(
            "num_tokens: 257\npad_token_id: 256\n{lists}\nseq_lens: [{seq_lens}]\npatching: {patching}\nblock: {block}\n"
        );
        let document = mblm_yaml::Document::parse(&yaml, "a.yaml").unwrap();
        MblmConfig::from_document(&document, "", &registry()).unwrap()
    }

    fn text(ids: &[u32]) -> String {
        ids.iter().map(|&id| if id == 256 { '.' } else { id as u8 as char }).collect()
    }

    fn ids(texts: &[&str]) -> (Vec<u32>, usize) {
        let len = texts.iter().map(|text| text.len()).max().unwrap();
        let padded = |text: &&str| -> Vec<u32> {
            let pads = std::iter::repeat_n(256, len - text.len());
            text.bytes().map(u32::from).chain(pads).collect()
        };
        (texts.iter().flat_map(padded).collect(), len)
    }

    #[test]
    fn patches_are_padded_and_run_by_their_length() {
        let config = config("4,3", "spacelike");
        let (flat, len) = ids(&["ab cdef g", "x"]);
        let (places, layout) = cut(&flat, len, &config, 1).unwrap();
        assert_eq!(text(&places), "ab cdef .g..x...........", "a full patch ends without a space");
        assert_eq!((layout.padded_len, layout.stages[0][0].len), (12, 4));
        let local: Vec<(usize, String)> =
            layout.stages[1].iter().map(|bucket| (bucket.len, text(&bucket.ids))).collect();
        assert_eq!(local, [(1, "gx".into()), (2, "f ".into()), (3, "ab cde".into())]);
        // Rows of the first stage: a start and four patches for each of two sequences.
        let parents = |bucket: &Bucket| match &bucket.parents {
            Parents::Listed(rows) => rows.to_vec(),
            Parents::First(_) => panic!("patches follow the content"),
        };
        assert_eq!(layout.stages[1].iter().map(parents).collect::<Vec<_>>(), [vec![3, 5], vec![2], vec![0, 1]]);
        // Rows of the local stage: `g` and `x` with a start each, then `f `, then `ab ` and `cde`.
        let rows = layout.bytes.unwrap().rows;
        assert_eq!(rows[..9], [8, 9, 10, 12, 13, 14, 5, 6, 1]);
        assert_eq!(rows[9..], [3; 9], "behind the end, that of the last byte");
    }

    #[test]
    fn lines_of_words() {
        let config = config("2,3,4", "[{patching_type: delimiters, bytes: \";\"}, spacelike]");
        let (flat, len) = ids(&["ab c;d e f g"]);
        let (places, layout) = cut(&flat, len, &config, 1).unwrap();
        assert_eq!(text(&places), "ab .c;......d ..e ..f ..g...........");
        assert_eq!(layout.padded_len, 36, "the third line begins since the second has three words");
        let middle: Vec<(usize, String)> =
            layout.stages[1].iter().map(|bucket| (bucket.len, text(&bucket.ids))).collect();
        assert_eq!(middle, [(1, "g...".into()), (2, "ab .c;..".into()), (3, "d ..e ..f ..".into())]);
    }
}
