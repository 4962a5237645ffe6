//! The reference package's configurations run unchanged, with the built-in blocks.

use std::path::{Path, PathBuf};

use mblm_blocks as _;
use mblm_core::config::{MblmConfig, MblmEncoderConfig};
use mblm_core::registry::{BlockRegistry, block_type};
use mblm_train::config::RunConfig;
use mblm_yaml::Document;

fn registry() -> BlockRegistry {
    BlockRegistry::builtin().unwrap()
}

fn yaml_files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let mut files: Vec<PathBuf> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

#[test]
fn the_packages_training_configurations_are_read() {
    let read = |path: &PathBuf| {
        let config = RunConfig::from_document(&Document::read(path).unwrap(), &registry()).unwrap();
        let text = config.to_yaml().unwrap();
        let again = RunConfig::from_document(&Document::parse(&text, "again").unwrap(), &registry()).unwrap();
        assert_eq!(again.to_yaml().unwrap(), text, "{}", path.display());
        let types: Vec<_> = config.params.model.hierarchy().blocks.iter().map(|block| block_type(&**block)).collect();
        (config.io.name_model, types.join(" "), config.params.input_seq_len, config.train.target_elements)
    };
    let found: Vec<_> = yaml_files("upstream-configs").iter().map(read).collect();
    let want = [
        ("8k_7mi_360m_1d_s_pt1_ft", "mamba2", 8192, 7_000_000),
        ("1m_200b_360m_3d_stt", "mamba2 transformer transformer", 1_048_576, 200_000_000_000),
        ("8k_30b_360m_1d_t", "transformer", 8192, 30_000_000_000),
        ("8k_30b_360m_2d_ss", "mamba2 mamba2", 8192, 30_000_000_000),
        ("8k_30b_360m_2d_st", "mamba2 transformer", 8192, 30_000_000_000),
    ];
    assert_eq!(found, want.map(|(name, types, len, target)| (name.to_string(), types.to_string(), len, target)));
}

#[test]
fn the_golden_models_are_read() {
    for path in yaml_files("golden") {
        let document = Document::read(&path).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if document.get("target_mode").is_some() {
            continue; // a data set's arguments
        } else if name.starts_with("enc") {
            let config = MblmEncoderConfig::from_document(&document, "", &registry()).unwrap();
            assert_eq!((config.mask_token_id, block_type(&*config.mblm_config.blocks[0])), (257, "transformerEncoder"));
        } else if !name.starts_with("lstm") {
            let config = MblmConfig::from_document(&document, "", &registry()).unwrap();
            let num_tokens = if name == "mm_m2_3d" { 257 } else { 259 };
            assert_eq!((config.num_tokens, config.num_stages()), (num_tokens, stages_in(&name)), "{name}");
        }
    }
}

/// Names end in the number of stages, `mt_2d`, and sometimes in more.
fn stages_in(name: &str) -> usize {
    name.split('_').find_map(|part| part.strip_suffix('d')?.parse().ok()).unwrap()
}
