//! `mblm generate --interactive`: a loop of prompts and continuations. On a terminal, lines can be edited and found again
//! (arrows, Ctrl-R); elsewhere they are read as they come.

use std::io::{IsTerminal, StdinLock, Write};
use std::str::FromStr;
use std::time::Instant;

use anyhow::Result;
use mblm::generate::{Sampler, Sampling, TokenStream, Until, generate};
use mblm::model::Mblm;
use mblm::nearest::suggestion;
use mblm::train::terminal;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::{Args, format, output, sampling, until, why};

/// Bytes of an answer, if nothing else is asked for.
const ANSWER: usize = 200;

const HELP: &str = "\
text              continue it; \\n in it is a line break
(an empty line)   go on with the last text
:NAME VALUE       change a setting: temperature, top-k, top-p, min-p, seed, max-bytes; VALUE none: without it
:quit             end, as Ctrl-D does";

/// Runs until the input ends.
pub fn run(model: &Mblm, args: &Args) -> Result<()> {
    let mut session = Session { model, args, sampling: sampling(args), until: until(args), text: vec![] };
    session.until.max_tokens.get_or_insert(ANSWER);
    let mut sampler = Sampler::new(session.sampling.clone())?;
    let mut lines = Lines::new()?;
    while let Some(line) = lines.next()? {
        match line.strip_prefix(':').map(str::trim) {
            Some("quit" | "q") => break,
            Some("help") => terminal::line(HELP),
            Some(setting) => match session.change(setting) {
                Ok(changed) => sampler = changed,
                Err(fault) => terminal::line(fault),
            },
            None => {
                if !line.is_empty() {
                    session.text = line.replace("\\n", "\n").bytes().map(u32::from).collect();
                }
                session.answer(&mut sampler)?;
            }
        }
    }
    Ok(())
}

struct Session<'a> {
    model: &'a Mblm,
    args: &'a Args,
    sampling: Sampling,
    until: Until,
    /// The last prompt and what came after it.
    text: Vec<u32>,
}

impl Session<'_> {
    /// Continues the text, and says at what speed.
    fn answer(&mut self, sampler: &mut Sampler) -> Result<()> {
        let prompt = self.text.clone();
        let mut stream = TokenStream::new(output(self.args), format(self.args));
        if !self.args.no_prompt {
            prompt.iter().try_for_each(|token| stream.write(*token))?;
        }
        let start = Instant::now();
        let prompts = std::slice::from_ref(&prompt);
        let ended = generate(self.model, prompts, std::slice::from_mut(sampler), &self.until, |_, token| {
            self.text.push(token);
            stream.write(token)?;
            Ok(true)
        });
        writeln!(stream.finish()?)?;
        let made = self.text.len() - prompt.len();
        let rate = made as f64 / start.elapsed().as_secs_f64();
        match ended {
            Ok(ended) => {
                let why = why(ended[0], self.model, self.args);
                terminal::line(format_args!("{made} bytes ({why}), {rate:.0} bytes/s"));
            }
            // A prompt that the model does not take ends its answer, not the session.
            Err(mblm::Error::Input(fault)) => terminal::line(fault),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Takes a setting such as `temperature 0.5`; nothing changes if it is wrong.
    fn change(&mut self, setting: &str) -> Result<Sampler, String> {
        const NAMES: [&str; 8] = ["temperature", "top-k", "top-p", "min-p", "seed", "max-bytes", "help", "quit"];
        let (name, value) = setting.split_once(char::is_whitespace).unwrap_or((setting, ""));
        let (mut sampling, mut until, value) = (self.sampling.clone(), self.until.clone(), value.trim());
        match name {
            "temperature" => sampling.temperature = number(name, value)?,
            "top-k" => sampling.top_k = optional(name, value)?,
            "top-p" => sampling.top_p = optional(name, value)?,
            "min-p" => sampling.min_p = optional(name, value)?,
            "seed" => sampling.seed = number(name, value)?,
            "max-bytes" => until.max_tokens = optional(name, value)?,
            _ => return Err(format!("unknown setting `{name}`; {}", suggestion(name, &NAMES))),
        }
        let sampler = Sampler::new(sampling.clone()).map_err(|error| error.to_string())?;
        (self.sampling, self.until) = (sampling, until);
        Ok(sampler)
    }
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{name}: expected a number, found {value:?}"))
}

fn optional<T: FromStr>(name: &str, value: &str) -> Result<Option<T>, String> {
    if value == "none" { Ok(None) } else { number(name, value).map(Some) }
}

/// Where prompts come from.
enum Lines {
    Terminal(Box<DefaultEditor>),
    Piped(std::io::Lines<StdinLock<'static>>),
}

impl Lines {
    fn new() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Lines::Piped(std::io::stdin().lines()));
        }
        terminal::line("type a text to continue; :help says what else");
        Ok(Lines::Terminal(Box::new(DefaultEditor::new()?)))
    }

    /// The next line; none at the end of the input.
    fn next(&mut self) -> Result<Option<String>> {
        let editor = match self {
            Lines::Piped(lines) => return Ok(lines.next().transpose()?),
            Lines::Terminal(editor) => editor,
        };
        match editor.readline("> ") {
            Ok(line) => {
                editor.add_history_entry(&line)?;
                Ok(Some(line))
            }
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
