//! Data set `clevr` against the sequences that the Python package makes of the one sample in `tests/data/clevr`.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use mblm_data::{self as data, Dataset, DatasetOptions, Splits};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests");
const PAD: u32 = 128;
/// Bytes of the sample's question twice and of its answer.
const TEXT: usize = 2 * 205 + 8;

/// The sample in both splits: as questions and image.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let sample = Path::new(TESTS).join("data/clevr");
    fs::create_dir(folder.path().join("questions")).unwrap();
    for split in ["train", "val"] {
        let questions = folder.path().join(format!("questions/CLEVR_{split}_questions.json"));
        fs::copy(sample.join("questions/CLEVR_val_questions.json"), questions).unwrap();
        let images = folder.path().join("images").join(split);
        fs::create_dir_all(&images).unwrap();
        fs::copy(sample.join("images/val/CLEVR_val_000000.png"), images.join("CLEVR_val_000000.png")).unwrap();
    }
    folder
}

fn open(folder: &Path, args: &Value, seq_len: usize, num_tokens: usize) -> mblm_data::Result<Splits> {
    let (dir, args, pad_token_id) = (folder, Some(args), PAD as usize);
    data::open("clevr", &DatasetOptions { dir, output_dir: None, args, seq_len, num_tokens, pad_token_id, cut: None })
}

fn sample(split: &dyn Dataset, seq_len: usize) -> (Vec<u32>, Vec<f32>) {
    assert!(split.has_loss_mask());
    let (mut ids, mut mask) = (vec![0; seq_len], vec![f32::NAN; seq_len]);
    split.sample(3, 0, &mut ids, &mut mask).unwrap();
    (ids, mask)
}

/// Checks a case under the given weights, of which the reference has only those of its YAML file, `[0, 0, 0, 1]`.
fn check(name: &str, seq_len: usize, weights: [f32; 4]) {
    let path = Path::new(TESTS).join("golden").join(name);
    let mut args: Value = serde_yaml::from_str(&fs::read_to_string(path.with_extension("yaml")).unwrap()).unwrap();
    assert_eq!(args["qiqa_loss_mask"], json!([0.0, 0.0, 0.0, 1.0]));
    args["qiqa_loss_mask"] = json!(weights);
    let golden = candle_core::safetensors::load(path.with_extension("safetensors"), &Device::Cpu).unwrap();
    let tensor =
        |name: &str| golden[name].flatten_all().unwrap().to_dtype(DType::I64).unwrap().to_vec1::<i64>().unwrap();
    let want: Vec<u32> = tensor("ids").into_iter().map(|id| id as u32).collect();
    assert_eq!(want.len(), seq_len);

    let folder = folder();
    let splits = open(folder.path(), &args, seq_len, 256).unwrap();
    assert!(splits.test.is_none());
    assert_eq!((splits.train.num_sequences(0), splits.valid.num_sequences(7)), (1, 1));
    for split in [&splits.train, &splits.valid] {
        let (ids, mask) = sample(&**split, seq_len);
        let differing = ids.iter().zip(&want).filter(|(id, want)| id != want).count();
        assert_eq!(differing, 0, "{name}: ids that differ, of {seq_len}");
        let lens = [tensor("question").len(), tensor("image_len")[0] as usize, tensor("question").len()];
        let parts = lens.into_iter().chain([tensor("answer").len()]);
        let mut want: Vec<f32> = parts.zip(weights).flat_map(|(len, weight)| vec![weight; len]).collect();
        want.resize(seq_len, 0.0); // padding: the pad token's number in the reference
        assert_eq!(mask, want, "{name}: the loss mask");
        let reference = tensor("loss_mask");
        let same = |(i, weight): (usize, &i64)| {
            *weight == if ids[i] == PAD && mask[i] == 0.0 { *weight } else { mask[i] as i64 }
        };
        assert!(
            weights != [0.0, 0.0, 0.0, 1.0] || reference.iter().enumerate().all(same),
            "{name}: the reference's mask"
        );
    }
}

#[test]
fn the_packages_sequences_are_reproduced() {
    let answer = [0.0, 0.0, 0.0, 1.0];
    check("clevr_raw", 470_000, answer);
    check("clevr_crop", 470_000, answer);
    check("clevr_crop_resize", 8192, answer);
    check("clevr_binned", 470_000, answer);
}

#[test]
fn fractional_weights_stay_fractions() {
    check("clevr_crop_resize", 8192, [0.25, 0.1, 0.0, 1.5]);
}

/// The SHA-256 of the image's tokens, which are `len`, under `args`.
fn image_hash(folder: &Path, args: Value, len: usize) -> String {
    let mut all = json!({"target_mode": "qiqa", "qiqa_loss_mask": [1, 1, 1, 1]});
    all.as_object_mut().unwrap().extend(args.as_object().unwrap().clone());
    let seq_len = TEXT + len;
    let splits = open(folder, &all, seq_len, 256).unwrap();
    let (ids, _) = sample(&*splits.valid, seq_len);
    let bytes: Vec<u8> = ids[205..205 + len].iter().map(|&id| id as u8).collect();
    assert_eq!(&ids[205 + len..][..9], b"The longe".map(u32::from), "the question follows at once: {args}");
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn images_are_those_of_pillow() {
    let folder = folder();
    let cases = [
        (
            json!({"resize_to_h": 500, "resize_to_w": 70}),
            105_000,
            "d6db07b6143e3eddaba2cc586a24bfc0dd8d6fb80621c19014b069d40ac2b080",
        ),
        (
            json!({"resize_to_h": 320, "resize_to_w": 70, "downsample_channels": 7}),
            67_200,
            "673c160927fae39189c627537058b6395dc80bc2b24fd1c8f8c1571ffb3892b8",
        ),
        (
            json!({"resize_to_h": 33, "resize_to_w": 480, "downsample_channels": 100, "shift_channels_start": 150}),
            47_520,
            "a43f4e9c10ed151122a52251b559eced690aa0ba6f62cf6082ba5caa521a7c58",
        ),
        (
            json!({"resize_to_h": 35, "resize_to_w": 51, "downsample_channels": 13, "shift_channels_start": 150,
                   "enable_jpeg_stream_with_quality": 60}),
            440,
            "d8fdca018290c5f4d8416dbed587aa454c97877afc80407717b03837809c7fc2",
        ),
    ];
    for (args, len, want) in cases {
        assert_eq!(image_hash(folder.path(), args.clone(), len), want, "{args}");
    }
}

/// Quality, whether in RGB, whether 62 x 41 pixels (not whole blocks) instead of 480 x 320; length and SHA-256 of the
/// file that Pillow 13.0 with libjpeg-turbo 3.2 writes.
const JPEGS: [(u8, bool, bool, usize, &str); 16] = [
    (1, true, false, 6005, "85363c7b3e93ed4b0af4445e4d77117a028f66c63fcaa305d574a78f8447e8da"),
    (1, true, true, 472, "d4fb83176a91b88bf836093c94973a200262ffe2a25528bc30a4b20f39b1f518"),
    (1, false, false, 3129, "a6d6276ea5deb71b479e95ceb80f933642a1f28f67079396cbd8f00c5ae9cac8"),
    (1, false, true, 682, "f40252d2fd646d942fbd93d054fbf7a0734d08a3e15413dc2c24e6a340f87d98"),
    (30, true, false, 9227, "afa30231cdcc8d79a71b481621cfdf8ef560898137544c9bf91002539cec509c"),
    (30, true, true, 908, "1f79836a16967945bc8d5450116d12289696c67b64f4c364d29bd1a0f20bb82a"),
    (30, false, false, 4326, "d73cdcdbde0c2fae4a485646830d37eff425d38d497eb1bb6584471add86af94"),
    (30, false, true, 833, "07944f9c1bf2c7777be38e335fc2e9f47f6c118d0fcc7cb8b32f885fdb916bd4"),
    (75, true, false, 15226, "19ec01764a9eae3e6005a06fcb78fec4fe9e87b61041ead01d7a0a8c4df82201"),
    (75, true, true, 1434, "99316f1e2b041c76ff6dc993b717e539a97c92bf52a24263597af4fb670543a5"),
    (75, false, false, 6540, "ca64a6b8e00cb126e3273466a9e11c9a76142761042078966313127975314657"),
    (75, false, true, 1035, "b036ae9007ecf8f5d8ef9ef9e5d3267ece12f9d5ddafd1f7d9dea7b3a44101ec"),
    (95, true, false, 47540, "7482d9c28f558dfa9fb08502e53cabc9e197b97df25127ba96b0bcc6ea968c53"),
    (95, true, true, 2946, "42cd5ec40e7008fb1f88b3205c9c329b370b501ae25c3b4b39a54ea1b21fb129"),
    (95, false, false, 18112, "bbddb555cc9e6fe1aeaea42af8327f3569699aa1039a41cff583923d9803b130"),
    (95, false, true, 1606, "d9b08be502f7244c0dd4425a62bfecdb2ba44aba731f47f1fc62fbd9dd545706"),
];

#[test]
fn jpeg_files_are_those_of_pillow() {
    let folder = folder();
    for (quality, rgb, small, len, want) in JPEGS {
        let mut args = json!({"enable_jpeg_stream_with_quality": quality, "jpeg_in_rgb_color_space": rgb});
        if small {
            let size = json!({"crop_h_perc": 0.1, "crop_w_perc": 0.1, "resize_to_h": 41, "resize_to_w": 62});
            args.as_object_mut().unwrap().extend(size.as_object().unwrap().clone());
        }
        assert_eq!(image_hash(folder.path(), args.clone(), len), want, "{args}");
    }
}

#[test]
fn samples_that_do_not_fit_are_named_before_training() {
    let folder = folder();
    let mut args = json!({"target_mode": "a", "qiqa_loss_mask": [0, 0, 0, 1]});
    let message = |args: &Value, seq_len, num_tokens| {
        let error = open(folder.path(), args, seq_len, num_tokens).err().unwrap();
        assert!(error.is_configuration());
        error.to_string()
    };
    let long = message(&args, 8192, 256);
    let want = "takes 461218 tokens (question 205, image 460800, question again 205, answer 8); raise input_seq_len";
    assert!(long.contains("params.input_seq_len: found 8192") && long.contains(want), "{long}");
    let tokens = message(&args, 470_000, 160);
    assert!(tokens.contains("num_tokens: found 160") && tokens.contains("question 0 of"), "{tokens}");
    args["downsample_channels"] = json!(8);
    args["shift_channels_start"] = json!(130);
    open(folder.path(), &args, 470_000, 160).unwrap();

    fs::remove_file(folder.path().join("images/val/CLEVR_val_000000.png")).unwrap();
    let image = message(&args, 470_000, 256);
    assert!(image.contains("cannot read image") && image.contains("images/val/CLEVR_val_000000.png"), "{image}");
    fs::remove_file(folder.path().join("questions/CLEVR_train_questions.json")).unwrap();
    let questions = message(&args, 470_000, 256);
    assert!(questions.contains("CLEVR_train_questions.json: No such file"), "{questions}");
}

#[test]
fn other_data_have_another_fingerprint() {
    let folder = folder();
    let args = json!({"target_mode": "a", "qiqa_loss_mask": [0, 0, 0, 1], "resize_to_h": 2, "resize_to_w": 2});
    let before = open(folder.path(), &args, 1000, 256).unwrap().fingerprint;
    assert_eq!(open(folder.path(), &args, 1000, 256).unwrap().fingerprint, before);
    let path = folder.path().join("questions/CLEVR_val_questions.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("cylinder", "cube")).unwrap();
    assert_ne!(open(folder.path(), &args, 1000, 256).unwrap().fingerprint, before);
    fs::write(&path, text.replace("cylinder", "pyramids")).unwrap();
    assert_ne!(open(folder.path(), &args, 1000, 256).unwrap().fingerprint, before, "at equal size");
    fs::write(&path, text).unwrap();
    let names: Vec<String> = before.files().iter().map(|file| file.file.clone()).collect();
    let want = [
        "questions/CLEVR_train_questions.json",
        "images/train/CLEVR_val_000000.png",
        "questions/CLEVR_val_questions.json",
        "images/val/CLEVR_val_000000.png",
    ];
    assert_eq!(names, want);
    assert_eq!(open(folder.path(), &args, 1000, 256).unwrap().fingerprint, before);
}

#[test]
fn a_questions_file_that_shrinks_is_an_error_that_names_it() {
    let folder = folder();
    let args = json!({"target_mode": "a", "qiqa_loss_mask": [0, 0, 0, 1], "resize_to_h": 2, "resize_to_w": 2});
    let splits = open(folder.path(), &args, 1000, 256).unwrap();
    fs::write(folder.path().join("questions/CLEVR_train_questions.json"), "{}").unwrap();
    let error = splits.train.sample(0, 0, &mut vec![0; 1000], &mut vec![0.0; 1000]).unwrap_err();
    assert!(!error.is_configuration());
    assert!(error.to_string().contains("CLEVR_train_questions.json: this data file was "), "{error}");
    assert!(error.to_string().contains(" and is 2 bytes long now"), "{error}");
    splits.valid.sample(0, 0, &mut vec![0; 1000], &mut vec![0.0; 1000]).unwrap();
}
