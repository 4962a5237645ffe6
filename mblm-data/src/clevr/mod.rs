//! Data set `clevr`: questions about images, from [CLEVR](https://cs.stanford.edu/people/jcjohns/clevr).
//!
//! `io.dataset_dir` is laid out as the original: `questions/CLEVR_{train,val}_questions.json` and
//! `images/{train,val}/*.png`; they must not be changed while they are in use. The original's test questions have no
//! answers, so there is no test split. A sequence is one sample, padded to `input_seq_len` with `pad_token_id`:
//!
//! | part | tokens | weight of its losses |
//! |---|---|---|
//! | question | `som_text_token_id`, the bytes of the question, `eom_token_id` | `qiqa_loss_mask[0]` |
//! | image | `som_image_token_id`, the red values row after row, the green, the blue, `eom_token_id` | `qiqa_loss_mask[1]` |
//! | question | the question again | `qiqa_loss_mask[2]` |
//! | answer | `som_text_token_id`, the bytes of the answer or the one of its class, `eom_token_id` | `qiqa_loss_mask[3]` |
//!
//! The image is cropped, resized, binned and shifted, then laid out as pixels or as a JPEG file; see [`ClevrArgs`].
//!
//! It differs from the reference package's in what its arguments have evidently been meant to do: the weights of the
//! mask stay fractions, where the package truncates them to whole numbers; padding has weight 0, where the package
//! gives it the pad token's number, without effect on its loss; a JPEG quality of 0 is a quality; and one of two
//! arguments that have an effect only together is an error.

mod args;
mod image;
mod jpeg;
mod places;
mod questions;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use self::args::{ClevrArgs, TargetMode};
use self::image::Image;
use self::questions::{Question, Questions};
use crate::dataset::{Dataset, DatasetOptions, Splits};
use crate::error::{Error, Result};
use crate::files::fingerprint::hex;
use crate::files::fingerprint::{FileSum, Fingerprint};
use crate::files::reader::DataFile;

crate::register_dataset!("clevr", "questions about images, with their answers", open, args = args::ClevrArgs);

/// How many images of a split, spread evenly over its questions, tell whether the data are the same.
const FINGERPRINT_IMAGES: u64 = 64;

/// A split: its questions, in the order of their file.
struct ClevrSplit {
    questions: Questions,
    images: PathBuf,
    args: ClevrArgs,
    num_tokens: usize,
    pad_token_id: u32,
}

fn open(options: &DatasetOptions) -> Result<Splits> {
    let args = ClevrArgs::new(options)?;
    let split = |name: &str| ClevrSplit::open(options, &args, name);
    let (train, valid) = (split("train")?, split("val")?);
    Ok(Splits {
        about: format!(
            "{:?}: {} questions train, {} validate",
            options.dir,
            train.questions.len(),
            valid.questions.len()
        ),
        fingerprint: fingerprint(options.dir, &[&train, &valid])?,
        train: Box::new(train),
        valid: Box::new(valid),
        test: None,
    })
}

/// Of every split, the file of questions and [`FINGERPRINT_IMAGES`] images. Earlier versions kept a hash of the numbers of
/// questions and the sizes of their files.
fn fingerprint(root: &Path, splits: &[&ClevrSplit]) -> Result<Fingerprint> {
    let mut before = Sha256::new();
    let mut files = Vec::new();
    for ClevrSplit { questions, images, .. } in splits {
        before.update(questions.len().to_le_bytes());
        before.update(questions.num_bytes().to_le_bytes());
        let count = questions.len().min(FINGERPRINT_IMAGES);
        let images = (0..count).map(|n| Ok(images.join(questions.read(n * questions.len() / count)?.image_filename)));
        let mut paths = vec![questions.path().to_path_buf()];
        paths.extend(images.collect::<Result<BTreeSet<PathBuf>>>()?);
        for path in paths {
            let name = path.strip_prefix(root).unwrap_or(&path);
            // A missing image is an error of the sample that needs it.
            if let Ok(data) = DataFile::new(&path) {
                files.push(FileSum::new(name, &data, &data.open()?)?);
            }
        }
    }
    Ok(Fingerprint::new(files, hex(before)[..32].into()))
}

impl ClevrSplit {
    /// Opens a split; all questions and the longest sample are known to be good.
    fn open(options: &DatasetOptions, args: &ClevrArgs, name: &str) -> Result<Self> {
        let root = options.dir;
        let questions = Questions::open(root.join(format!("questions/CLEVR_{name}_questions.json")))?;
        let longest = questions.check(args.answer_categorical)?;
        let split = ClevrSplit {
            questions,
            images: root.join("images").join(name),
            args: args.clone(),
            num_tokens: options.num_tokens,
            pad_token_id: options.pad_token_id as u32,
        };
        split.sample(0, longest, &mut vec![0; options.seq_len], &mut vec![0.0; options.seq_len])?;
        Ok(split)
    }

    /// The image as tokens.
    fn image(&self, question: &Question) -> Result<Vec<u8>> {
        let path = self.images.join(&question.image_filename);
        let mut image = Image::read(&path)?;
        if let Some((height, width)) = self.args.crop() {
            image = image.crop(height, width);
        }
        if let Some((height, width)) = self.args.resize() {
            image = image.resize(height, width);
        }
        if let Some(bins) = self.args.downsample_channels {
            image.bin_channels(bins);
        }
        if let Some(start) = self.args.shift_channels_start {
            image.shift_channels(start);
        }
        match self.args.enable_jpeg_stream_with_quality {
            None => Ok(image.planes().collect()),
            Some(quality) => jpeg::encode(&image, quality, self.args.jpeg_in_rgb_color_space).ok_or_else(|| {
                let (width, height) = (image.width, image.height);
                Error::Config(format!("{}: {width} x {height} pixels; a JPEG has 65535 at most", path.display()))
            }),
        }
    }

    /// The four parts of a sample.
    fn parts(&self, question: &Question) -> Result<[Vec<u32>; 4]> {
        let args = &self.args;
        let enclose = |start: Option<u32>, bytes: &[u8]| -> Vec<u32> {
            start.into_iter().chain(bytes.iter().map(|&byte| byte.into())).chain(args.eom_token_id).collect()
        };
        let class = question.answer_class().filter(|_| args.answer_categorical);
        let answer = match &class {
            Some(class) => std::slice::from_ref(class),
            None => question.answer.as_bytes(),
        };
        let text = enclose(args.som_text_token_id, question.question.as_bytes());
        let image = enclose(args.som_image_token_id, &self.image(question)?);
        Ok([text.clone(), image, text, enclose(args.som_text_token_id, answer)])
    }

    /// The sample must fit a sequence, and its tokens the vocabulary.
    fn check(&self, index: u64, parts: &[Vec<u32>; 4], seq_len: usize) -> Result<()> {
        let lens = parts.each_ref().map(Vec::len);
        let len: usize = lens.iter().sum();
        let path = self.questions.path().display();
        if len > seq_len {
            return Err(Error::Config(format!(
                "params.input_seq_len: found {seq_len}, but question {index} of {path} takes {len} tokens (question \
                 {}, image {}, question again {}, answer {}); raise input_seq_len, or make the image smaller with \
                 io.dataset_args (resize_to_h and resize_to_w, crop_h_perc and crop_w_perc)",
                lens[0], lens[1], lens[2], lens[3]
            )));
        }
        match parts.iter().flatten().max() {
            Some(&token) if token as usize >= self.num_tokens => Err(Error::Config(format!(
                "params.num_tokens: found {}, but question {index} of {path} has the token {token}; expected more than the \
                 largest token, and 256 suffices for bytes",
                self.num_tokens
            ))),
            _ => Ok(()),
        }
    }
}

impl Dataset for ClevrSplit {
    fn num_sequences(&self, _: u64) -> u64 {
        self.questions.len()
    }

    fn sample(&self, _: u64, index: u64, ids: &mut [u32], loss_mask: &mut [f32]) -> Result<()> {
        let parts = self.parts(&self.questions.read(index)?)?;
        self.check(index, &parts, ids.len())?;
        let mut start = 0;
        for (part, weight) in parts.iter().zip(self.args.qiqa_loss_mask) {
            let end = start + part.len();
            ids[start..end].copy_from_slice(part);
            loss_mask[start..end].fill(weight);
            start = end;
        }
        ids[start..].fill(self.pad_token_id);
        loss_mask[start..].fill(0.0);
        Ok(())
    }

    fn has_loss_mask(&self) -> bool {
        true
    }
}
