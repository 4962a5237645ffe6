//! `mblm generate --interactive`: a loop of prompts and continuations. On a terminal, lines can be edited and found again
//! (arrows, Ctrl-R); elsewhere they are read as they come.

use std::io::{BufRead, ErrorKind, IsTerminal, StdinLock, Write};
use std::str::FromStr;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use anyhow::Result;
use mblm::base::nearest::suggestion;
use mblm::base::terminal;
use mblm::generate::{Ended, Sampler, Sampling, TokenStream, Until, generate};
use mblm::model::Mblm;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::{Args, Form, format, output, sampling, until, why};
use crate::{signals, streams};

/// Bytes of an answer, if nothing else is asked for.
const ANSWER: usize = 200;

const HELP: &str = "\
TEXT              continue this text; \\n is a line break, \\\\ a backslash
(an empty line)   continue the last text
(Ctrl-C)          stop the answer
:NAME VALUE       change a setting: temperature, top-k, top-p, min-p, seed, max-bytes; `none` turns it off
:quit             end the session, as Ctrl-D does";

/// Runs until the input ends.
pub fn run(model: &Mblm, args: &Args) -> Result<()> {
    let mut session = Session { model, args, sampling: sampling(args), until: until(args), text: vec![] };
    session.until.max_tokens.get_or_insert(ANSWER);
    let mut sampler = Sampler::new(session.sampling.clone())?;
    let mut lines = Lines::new()?;
    while let Some(line) = lines.next()? {
        let command = line.strip_prefix(b":").map(|command| String::from_utf8_lossy(command).trim().to_string());
        match command.as_deref().map(name_and_value) {
            Some(("quit" | "q", _)) => break,
            Some(("help", _)) => terminal::line(HELP),
            Some(setting) => match session.change(setting) {
                Ok(changed) => sampler = changed,
                Err(fault) => terminal::line(fault),
            },
            None => {
                if !line.is_empty() {
                    session.text = unescaped(&line).into_iter().map(u32::from).collect();
                }
                session.answer(&mut sampler)?;
            }
        }
    }
    Ok(())
}

fn name_and_value(command: &str) -> (&str, &str) {
    let (name, value) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    (name, value.trim())
}

/// A line with its line breaks (`\n`) and backslashes (`\\`); any other backslash stays one.
fn unescaped(line: &[u8]) -> Vec<u8> {
    let mut rest = line;
    let mut text = Vec::new();
    while let Some((first, after)) = rest.split_first() {
        let (byte, length) = match after.first() {
            Some(b'n') if *first == b'\\' => (b'\n', 2),
            Some(b'\\') if *first == b'\\' => (b'\\', 2),
            _ => (*first, 1),
        };
        text.push(byte);
        rest = &rest[length..];
    }
    text
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
        // Whoever sees the prompt again may interrupt what follows.
        signals::LISTENING.store(true, SeqCst);
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
            Ok(!signals::STOP.load(SeqCst))
        });
        signals::LISTENING.store(false, SeqCst);
        let mut out = stream.finish()?;
        if self.args.format != Form::Ids {
            writeln!(out)?;
        }
        let made = self.text.len() - prompt.len();
        let rate = made as f64 / start.elapsed().as_secs_f64();
        match ended {
            Ok(ended) => {
                let why = match ended[0] {
                    Ended::Receiver => "interrupted".into(),
                    ended => why(ended, self.model, self.args),
                };
                terminal::line(format_args!("{made} bytes ({why}), {rate:.0} bytes/s"));
            }
            // A prompt that the model does not take ends its answer, not the session.
            Err(mblm::Error::Input(fault)) => terminal::line(fault),
            Err(error) => return Err(error.into()),
        }
        // Ctrl-C ends the answer; other signals end the session too.
        match signals::check() {
            Err(interrupted) if !interrupted.is_ctrl_c() => Err(interrupted.into()),
            _ => {
                signals::STOP.store(false, SeqCst);
                Ok(())
            }
        }
    }

    /// Takes a setting such as `temperature 0.5`; nothing changes if it is wrong.
    fn change(&mut self, (name, value): (&str, &str)) -> Result<Sampler, String> {
        const NAMES: [&str; 8] = ["temperature", "top-k", "top-p", "min-p", "seed", "max-bytes", "help", "quit"];
        let (mut sampling, mut until) = (self.sampling.clone(), self.until.clone());
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
    Piped(StdinLock<'static>),
}

impl Lines {
    fn new() -> Result<Self> {
        streams::check_input()?;
        if !std::io::stdin().is_terminal() {
            return Ok(Lines::Piped(std::io::stdin().lock()));
        }
        terminal::line("type a prompt; :help lists the commands");
        Ok(Lines::Terminal(Box::new(DefaultEditor::new()?)))
    }

    /// The next line; none at the end of the input.
    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        match self {
            Lines::Piped(input) => {
                let mut line = Vec::new();
                let is_end = input.read_until(b'\n', &mut line)? == 0;
                let line = line.strip_suffix(b"\n").map_or(&line[..], |line| line.strip_suffix(b"\r").unwrap_or(line));
                Ok((!is_end).then(|| line.to_vec()))
            }
            Lines::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        editor.add_history_entry(&line)?;
                        return Ok(Some(line.into_bytes()));
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Interrupted) => terminal::line("Ctrl-D or :quit ends the session"),
                    Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                        terminal::line(
                            "this line is not UTF-8; set the terminal to UTF-8, or pipe the bytes to standard input",
                        );
                    }
                    Err(error) => return Err(error.into()),
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_can_hold_line_breaks_and_backslashes() {
        for (line, want) in
            [(r"a\nb", "a\nb"), (r"C:\\new", r"C:\new"), (r"\\\n", "\\\n"), (r"\t and \", r"\t and \"), ("", "")]
        {
            assert_eq!(unescaped(line.as_bytes()), want.as_bytes(), "{line}");
        }
        assert_eq!(unescaped(b"\xff\\n"), b"\xff\n");
    }
}
