//! The registry of data sets. [`register_dataset!`](crate::register_dataset) registers a data set under its id, and
//! `io.dataset_id` finds it.

use mblm_base::nearest::nearest;

use crate::dataset::{DatasetOptions, Splits};
use crate::error::{Error, Result};

/// A registered kind of data set.
pub struct DatasetKind {
    /// The name in `io.dataset_id`.
    pub id: &'static str,
    /// A one-line description of what it reads.
    pub about: &'static str,
    /// Opens and checks it.
    pub open: fn(&DatasetOptions) -> Result<Splits>,
    /// The JSON Schema of what `io.dataset_args` may hold, if it is known.
    pub args: Option<fn() -> schemars::Schema>,
    /// Where it is registered.
    pub place: &'static str,
}

inventory::collect!(DatasetKind);

/// Registers a kind of data set: `register_dataset!("bytes", "files as they are", open)`. With `args = BytesArgs` after
/// that, the struct that it [reads](DatasetOptions::read_args) from `io.dataset_args`, `mblm schema` knows its fields.
#[macro_export]
macro_rules! register_dataset {
    ($id:expr, $about:expr, $open:expr, args = $args:ty) => {
        $crate::register_dataset!(@submit $id, $about, $open, Some(|| $crate::schemars::schema_for!($args)));
    };
    ($id:expr, $about:expr, $open:expr) => {
        $crate::register_dataset!(@submit $id, $about, $open, None);
    };
    (@submit $id:expr, $about:expr, $open:expr, $args:expr) => {
        $crate::inventory::submit! {
            $crate::registry::DatasetKind {
                id: $id,
                about: $about,
                open: $open,
                args: $args,
                place: concat!(file!(), ":", line!()),
            }
        }
    };
}

/// The registered kinds, sorted by id.
///
/// # Errors
/// Two kinds with the same id.
pub fn kinds() -> Result<Vec<&'static DatasetKind>> {
    let mut kinds: Vec<&DatasetKind> = inventory::iter::<DatasetKind>.into_iter().collect();
    kinds.sort_by_key(|kind| kind.id);
    match kinds.windows(2).find(|pair| pair[0].id == pair[1].id) {
        Some(pair) => Err(Error::Config(format!(
            "data set {:?} is registered twice: at {} and at {}",
            pair[0].id, pair[0].place, pair[1].place
        ))),
        None => Ok(kinds),
    }
}

/// Opens the data set called `id`.
pub fn open(id: &str, options: &DatasetOptions) -> Result<Splits> {
    (kind(id)?.open)(options)
}

/// The kind of data set called `id`.
///
/// # Errors
/// There is none; lists those that there are.
pub fn kind(id: &str) -> Result<&'static DatasetKind> {
    let kinds = kinds()?;
    match kinds.iter().find(|kind| kind.id == id) {
        Some(kind) => Ok(kind),
        None => {
            let known: Vec<String> = kinds.iter().map(|kind| format!("{} ({})", kind.id, kind.about)).collect();
            let meant = nearest(id, kinds.iter().map(|kind| kind.id));
            let meant = meant.map_or_else(String::new, |id| format!("did you mean `{id}`? "));
            Err(Error::Config(format!(
                "io.dataset_id: unknown data set {id:?}; {meant}expected one of: {}",
                known.join("; ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_unknown_id_lists_the_known() {
        let dir = Path::new("x");
        let options = DatasetOptions {
            dir,
            output_dir: None,
            args: None,
            seq_len: 1,
            num_tokens: 256,
            pad_token_id: 0,
            cut: None,
        };
        let error = open("pg20", &options).err().unwrap();
        assert!(error.is_configuration());
        let message = error.to_string();
        assert!(message.contains("unknown data set \"pg20\"; expected one of: bytes ("), "{message}");
    }
}
