//! Global or local? For models of two stages: bits per byte by the block of stage 1 and the block of stage 2.

use super::charts::scale::ceiling;
use super::variant::Variant;

/// Bits per byte, rows by the block of stage 1 and columns by that of stage 2.
pub(super) struct Matrix {
    pub(super) rows: Vec<String>,
    pub(super) columns: Vec<String>,
    /// One row per block of stage 1; none where there is no such variant.
    pub(super) cells: Vec<Vec<Option<f64>>>,
}

impl Matrix {
    /// None unless every variant has two stages and a pair of blocks of its own, and there are at least two blocks at
    /// either stage.
    pub(super) fn of(variants: &[Variant]) -> Option<Self> {
        let mut matrix = Matrix { rows: vec![], columns: vec![], cells: vec![] };
        let mut found = Vec::new();
        for variant in variants {
            let [global, local] = &variant.cost.as_ref()?.stages[..] else { return None };
            let (row, column) =
                (index(&mut matrix.rows, &global.block_type), index(&mut matrix.columns, &local.block_type));
            if found.iter().any(|(r, c, _)| (*r, *c) == (row, column)) {
                return None;
            }
            found.push((row, column, variant.valid_bpb().map(|bpb| bpb.mean)));
        }
        if matrix.rows.len() < 2 || matrix.columns.len() < 2 {
            return None;
        }
        matrix.cells = vec![vec![None; matrix.columns.len()]; matrix.rows.len()];
        found.into_iter().for_each(|(row, column, bpb)| matrix.cells[row][column] = bpb);
        Some(matrix)
    }

    /// The mean of each row, of those that are complete.
    pub(super) fn row_means(&self) -> Vec<Option<f64>> {
        self.cells.iter().map(|row| mean(row.iter().copied())).collect()
    }

    /// The mean of each column, of those that are complete.
    pub(super) fn column_means(&self) -> Vec<Option<f64>> {
        (0..self.columns.len()).map(|column| mean(self.cells.iter().map(|row| row[column]))).collect()
    }

    /// The lowest, and the highest that is no outlier.
    pub(super) fn range(&self) -> (f64, f64) {
        let all = || self.cells.iter().flatten().flatten().copied();
        let most = ceiling(all());
        (all().fold(f64::MAX, f64::min), all().filter(|bpb| *bpb <= most).fold(f64::MIN, f64::max))
    }
}

fn index(names: &mut Vec<String>, name: &str) -> usize {
    names.iter().position(|known| known == name).unwrap_or_else(|| {
        names.push(name.into());
        names.len() - 1
    })
}

fn mean(numbers: impl ExactSizeIterator<Item = Option<f64>>) -> Option<f64> {
    let count = numbers.len() as f64;
    Some(numbers.sum::<Option<f64>>()? / count)
}

#[cfg(test)]
pub(crate) mod tests {
    use mblm_train::cost;

    use super::super::run::Status::Finished;
    use super::super::variant::tests::{run, variant};
    use super::*;

    /// What a model with these blocks costs, in invented numbers.
    pub(crate) fn cost(blocks: &[&str]) -> cost::ModelCost {
        let part = serde_json::json!({"parameters": 1000, "flops_per_byte": 100.0, "activation_bytes": 10.0});
        let stage = |name: &&str| {
            serde_json::json!({"block_type": name, "seq_len": 4, "hidden_dim": 8, "num_layers": 1, "parameters": 400,
                "flops_per_byte": 40.0, "activation_bytes": 5.0})
        };
        let stages: Vec<_> = blocks.iter().map(stage).collect();
        let json = serde_json::json!({"step": {"batch": 1, "bytes": 8}, "context_len": 8, "num_tokens": 257,
            "stages": stages, "embeddings": part, "projections": part, "head": part, "total": part, "peak_bytes": 1e6});
        serde_json::from_value(json).unwrap()
    }

    fn with_blocks(blocks: &[&str], bpb: f64) -> Variant {
        let mut variant = variant("x", vec![run(1, Finished, &[bpb])]);
        variant.cost = Some(cost(blocks));
        variant
    }

    #[test]
    fn blocks_span_a_matrix() {
        let mut all = vec![with_blocks(&["a", "b"], 2.0), with_blocks(&["b", "b"], 3.0), with_blocks(&["b", "a"], 4.0)];
        let matrix = Matrix::of(&all).unwrap();
        assert_eq!(
            (&matrix.rows, &matrix.columns),
            (&vec!["a".to_string(), "b".into()], &vec!["b".to_string(), "a".into()])
        );
        assert_eq!(matrix.cells, [[Some(2.0), None], [Some(3.0), Some(4.0)]]);
        assert_eq!((matrix.row_means(), matrix.column_means()), (vec![None, Some(3.5)], vec![Some(2.5), None]));
        assert_eq!(matrix.range(), (2.0, 4.0));
        all.push(with_blocks(&["a", "b"], 5.0));
        assert!(Matrix::of(&all).is_none(), "a pair twice: variants differ in something else");
        assert!(Matrix::of(&all[..1]).is_none());
        assert!(Matrix::of(&[with_blocks(&["a"], 1.0), with_blocks(&["b"], 1.0)]).is_none());
    }
}
