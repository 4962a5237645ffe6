//! A CLEVR questions file: where each question stands in it, and the question when it is asked for. The file of the
//! training split has hundreds of megabytes, most of which are not needed.

use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;

use super::places::{Place, places};
use crate::error::{Error, Result};
use crate::files::reader::DataFile;

/// The answers, in the order of the characters that stand for them: `0` to `9`, then `A` to `R`.
const ANSWERS: [&str; 28] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "blue", "brown", "cube", "cyan", "cylinder", "gray",
    "green", "large", "metal", "no", "purple", "red", "rubber", "small", "sphere", "yellow", "yes",
];
const CLASSES: &[u8; 28] = b"0123456789ABCDEFGHIJKLMNOPQR";

/// A question about an image.
#[derive(Debug, Deserialize)]
pub(super) struct Question {
    pub question: String,
    pub answer: String,
    pub image_filename: String,
}

impl Question {
    /// The character that stands for the answer, if it is one of the 28.
    pub fn answer_class(&self) -> Option<u8> {
        ANSWERS.iter().position(|answer| *answer == self.answer).map(|class| CLASSES[class])
    }
}

/// The questions of a split.
#[derive(Debug)]
pub(super) struct Questions {
    data: DataFile,
    file: File,
    entries: Vec<Place>,
}

impl Questions {
    /// Opens the file and finds its questions.
    pub fn open(path: PathBuf) -> Result<Self> {
        let unreadable = |error: &dyn fmt::Display| {
            Error::Config(format!(
                "{error}; data set clevr expects the folders questions (with CLEVR_train_questions.json and \
                 CLEVR_val_questions.json) and images (with train and val), as in \
                 https://cs.stanford.edu/people/jcjohns/clevr"
            ))
        };
        let data = DataFile::new(&path).map_err(|error| unreadable(&error))?;
        let file = data.open().map_err(|error| unreadable(&error))?;
        let entries = places(BufReader::new(&file)).map_err(|error| {
            let path = path.display();
            Error::Config(format!("{path}: {error}; expected an object with a list \"questions\", as CLEVR has it"))
        })?;
        if entries.is_empty() {
            return Err(Error::Config(format!("{}: contains no questions; expected at least one", path.display())));
        }
        Ok(Questions { data, file, entries })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.data.path
    }

    /// The file's size in bytes.
    pub fn num_bytes(&self) -> u64 {
        self.data.len
    }

    /// The number of questions.
    pub fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Question `index`. Panics if there is no such question.
    pub fn read(&self, index: u64) -> Result<Question> {
        let (start, len) = self.entries[index as usize];
        let mut text = vec![0; len as usize];
        self.data.read(&self.file, start, &mut text)?;
        serde_json::from_slice(&text).map_err(|error| {
            let path = self.path().display();
            Error::Config(format!(
                "{path}: question {index}: {error}; expected the strings question, answer and image_filename"
            ))
        })
    }

    /// Reads every question, and returns the one with the most bytes of text: that of the question twice, and that of
    /// the answer.
    ///
    /// # Errors
    /// One is not as it should be; with `categorical`, also an answer that is none of the 28.
    pub fn check(&self, categorical: bool) -> Result<u64> {
        let lens = (0..self.len()).into_par_iter().map(|index| {
            let question = self.read(index)?;
            if categorical && question.answer_class().is_none() {
                return Err(Error::Config(format!(
                    "{}: question {index}: the answer {:?} is not one of the 28 answers of CLEVR ({}); expected one of them, or \
                     io.dataset_args.answer_categorical: false",
                    self.path().display(),
                    question.answer,
                    ANSWERS.join(", ")
                )));
            }
            Ok((2 * question.question.len() + question.answer.len(), std::cmp::Reverse(index)))
        });
        let (_, std::cmp::Reverse(longest)) = lens.try_reduce(|| (0, std::cmp::Reverse(0)), |a, b| Ok(a.max(b)))?;
        Ok(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> Result<Questions> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("questions.json");
        std::fs::write(&path, text).unwrap();
        Questions::open(path)
    }

    const THREE: &str = r#"{"info": {"split": "val"}, "questions": [
        {"question": "How many?", "answer": "10", "image_filename": "a.png", "program": [{"inputs": []}]},
        {"image_filename": "b.png", "answer": "yes", "question": "Is \"it\" a sphe\u0072e?"},
        {"question": "No!", "answer": "no", "image_filename": "c.png"}
    ]}"#;

    #[test]
    fn questions_are_found_where_they_stand() {
        let questions = open(THREE).unwrap();
        assert_eq!((questions.len(), questions.check(true).unwrap()), (3, 1));
        let second = questions.read(1).unwrap();
        assert_eq!((&*second.question, &*second.image_filename), ("Is \"it\" a sphere?", "b.png"));
        let classes = [0, 1, 2].map(|index| questions.read(index).unwrap().answer_class().unwrap());
        assert_eq!(&classes, b"ARK");
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text: &str| {
            let error = open(text).and_then(|questions| questions.check(true)).unwrap_err();
            assert!(error.is_configuration());
            error.to_string()
        };
        assert!(message("[]x").contains("expected an object with a list \"questions\""));
        assert!(message(r#"{"questions": []}"#).contains("contains no questions"));
        let maybe = message(&THREE.replace("\"no\"", "\"maybe\""));
        assert!(maybe.contains("question 2: the answer \"maybe\" is not one of the 28"), "{maybe}");
        assert_eq!(open(&THREE.replace("\"no\"", "\"maybe\"")).unwrap().check(false).unwrap(), 1);
        let missing = message(&THREE.replace("\"answer\": \"yes\",", ""));
        assert!(missing.contains("question 1: missing field `answer`"), "{missing}");
        let error = Questions::open("/nowhere/questions/x.json".into()).unwrap_err().to_string();
        assert!(
            error.contains("/nowhere/questions/x.json") && error.contains("images (with train and val)"),
            "{error}"
        );
    }
}
