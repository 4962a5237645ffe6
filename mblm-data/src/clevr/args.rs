//! `io.dataset_args` of data set `clevr`: the reference package's, checked.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::dataset::DatasetOptions;
use crate::error::{Error, Result};

/// `io.dataset_args` of data set `clevr`. Whatever is `null` or left out is not done.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClevrArgs {
    /// What to learn: everything, or the answer. It has no effect, as in the package: `qiqa_loss_mask` decides.
    pub target_mode: TargetMode,
    /// Loss weights of the question, the image, the repeated question and the answer.
    pub qiqa_loss_mask: [f32; 4],
    /// Whether to encode the answer as one character, one for each of the 28 answers.
    #[serde(default)]
    pub answer_categorical: bool,
    /// Resize the (cropped) image to this height in pixels.
    pub resize_to_h: Option<usize>,
    /// Resize the (cropped) image to this width in pixels.
    pub resize_to_w: Option<usize>,
    /// The fraction of the height to crop at the top, and again at the bottom.
    pub crop_h_perc: Option<f64>,
    /// The fraction of the width to crop at each side.
    pub crop_w_perc: Option<f64>,
    /// Number of bins for the values of a channel.
    pub downsample_channels: Option<usize>,
    /// Map the binned values to consecutive tokens, starting with this one.
    pub shift_channels_start: Option<usize>,
    /// The token after each part.
    pub eom_token_id: Option<u32>,
    /// The token before questions and answers.
    pub som_text_token_id: Option<u32>,
    /// The token before the image.
    pub som_image_token_id: Option<u32>,
    /// Encode the image as a JPEG file of this quality (0 to 95) instead of pixels.
    pub enable_jpeg_stream_with_quality: Option<u8>,
    /// Whether the JPEG file stores red, green and blue, or else luminance and chrominance at half resolution.
    #[serde(default = "yes")]
    pub jpeg_in_rgb_color_space: bool,
}

fn yes() -> bool {
    true
}

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TargetMode {
    /// Question, image, question and answer.
    Qiqa,
    /// The answer.
    A,
}

impl ClevrArgs {
    /// Reads and checks the arguments.
    pub(super) fn new(options: &DatasetOptions) -> Result<Self> {
        let args: ClevrArgs = options.read_args()?;
        args.check(options.num_tokens)?;
        Ok(args)
    }

    /// The crop margins as shares of height and width.
    pub(super) fn crop(&self) -> Option<(f64, f64)> {
        self.crop_h_perc.zip(self.crop_w_perc)
    }

    /// The size `(height, width)` to resize to.
    pub(super) fn resize(&self) -> Option<(usize, usize)> {
        self.resize_to_h.zip(self.resize_to_w)
    }

    fn check(&self, num_tokens: usize) -> Result<()> {
        let weights = self.qiqa_loss_mask;
        let usable = weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0) && weights != [0.0; 4];
        require(usable, "qiqa_loss_mask", "weights of at least 0, not all of them 0", format!("{weights:?}"))?;
        let pairs = [
            ("crop_h_perc", self.crop_h_perc.is_some(), "crop_w_perc", self.crop_w_perc.is_some()),
            ("resize_to_h", self.resize_to_h.is_some(), "resize_to_w", self.resize_to_w.is_some()),
        ];
        for (first, has_first, second, has_second) in pairs {
            let (given, missing) = if has_first { (first, second) } else { (second, first) };
            require(has_first == has_second, given, &format!("{missing} beside it"), "it alone; give both or none")?;
        }
        for (field, share) in [("crop_h_perc", self.crop_h_perc), ("crop_w_perc", self.crop_w_perc)] {
            let share = share.unwrap_or(0.0);
            require((0.0..0.5).contains(&share), field, "a share from 0 to below 0.5 (it is cut off twice)", share)?;
        }
        let sizes = [("resize_to_h", self.resize_to_h), ("resize_to_w", self.resize_to_w)];
        for (field, number) in sizes.into_iter().chain([("downsample_channels", self.downsample_channels)]) {
            require(number != Some(0), field, "a positive number, or null to leave it out", 0)?;
        }
        if let Some(quality) = self.enable_jpeg_stream_with_quality {
            require(quality <= 95, "enable_jpeg_stream_with_quality", "a quality from 0 to 95, or null", quality)?;
        }
        self.check_shift()?;
        let specials = [
            ("eom_token_id", self.eom_token_id),
            ("som_text_token_id", self.som_text_token_id),
            ("som_image_token_id", self.som_image_token_id),
        ];
        for (field, id) in specials {
            let id = id.unwrap_or(0) as usize;
            require(id < num_tokens, field, &format!("an id below num_tokens, which is {num_tokens}"), id)?;
        }
        Ok(())
    }

    fn check_shift(&self) -> Result<()> {
        const FIELD: &str = "shift_channels_start";
        let Some(start) = self.shift_channels_start else { return Ok(()) };
        let Some(bins) = self.downsample_channels else {
            return require(false, FIELD, "downsample_channels beside it", "it alone; give both or none");
        };
        let most = 256usize.saturating_sub(bins.min(256));
        let expected = format!("at most {most}, so that the {bins} values of downsample_channels stay below 256");
        require(start <= most, FIELD, &expected, start)
    }
}

fn require(fits: bool, field: &str, expected: &str, found: impl std::fmt::Display) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::Config(format!("io.dataset_args.{field}: expected {expected}, found {found}")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn options(args: Option<&Value>) -> DatasetOptions<'_> {
        let dir = std::path::Path::new("");
        DatasetOptions { dir, output_dir: None, args, seq_len: 1, num_tokens: 256, pad_token_id: 0, cut: None }
    }

    fn read(changes: Value) -> Result<ClevrArgs> {
        let mut args = json!({"target_mode": "a", "qiqa_loss_mask": [0.0, 0.5, 0, 1]});
        args.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let args = Some(&args);
        ClevrArgs::new(&options(args))
    }

    #[test]
    fn defaults_are_the_packages() {
        let args = read(json!({"downsample_channels": null})).unwrap();
        assert_eq!((args.target_mode, args.qiqa_loss_mask), (TargetMode::A, [0.0, 0.5, 0.0, 1.0]));
        assert_eq!((args.crop(), args.resize(), args.jpeg_in_rgb_color_space), (None, None, true));
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (json!({"target_mode": "q"}), ".target_mode: unknown value \"q\"; did you mean `a`?"),
            (json!({"qiqa_loss_mask": [0, 1]}), ".qiqa_loss_mask: expected a list of 4, found one of 2"),
            (json!({"qiqa_loss_mask": [0, 0, 0, -1]}), "expected weights of at least 0, not all of them 0, found [0.0"),
            (json!({"crop": 1}), ".crop: unknown field; expected one of `target_mode`"),
            (json!({"crop_w_perc": 0.1}), ".crop_w_perc: expected crop_h_perc beside it, found it alone"),
            (json!({"resize_to_h": 3}), ".resize_to_h: expected resize_to_w beside it, found it alone"),
            (
                json!({"crop_h_perc": 0.5, "crop_w_perc": 0.1}),
                ".crop_h_perc: expected a share from 0 to below 0.5 (it is cut off twice), found 0.5",
            ),
            (json!({"resize_to_h": 3, "resize_to_w": 0}), ".resize_to_w: expected a positive number"),
            (json!({"enable_jpeg_stream_with_quality": 96}), "expected a quality from 0 to 95, or null, found 96"),
            (json!({"shift_channels_start": 3}), ".shift_channels_start: expected downsample_channels beside it"),
            (
                json!({"shift_channels_start": 249, "downsample_channels": 8}),
                "expected at most 248, so that the 8 values of downsample_channels stay below 256, found 249",
            ),
            (json!({"eom_token_id": 256}), ".eom_token_id: expected an id below num_tokens, which is 256, found 256"),
        ];
        for (changes, want) in cases {
            let error = read(changes).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains(want), "{error}\n{want}");
        }
        let error = ClevrArgs::new(&options(None)).unwrap_err().to_string();
        assert_eq!(error, "io.dataset_args: missing field `target_mode`");
    }
}
