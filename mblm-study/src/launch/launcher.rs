//! The command that starts runs on other machines, such as `srun`.

use std::path::Path;
use std::process::Command;
use std::str::FromStr;

/// What a Slurm job says of its own processors and memory, which `srun` would take for those of the new step.
const OF_THIS_STEP: [&str; 2] = ["SLURM_CPU_BIND", "SLURM_MEM_BIND"];

/// A command that starts another one, which follows it, on a machine of its choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launcher(pub(super) Vec<String>);

impl FromStr for Launcher {
    type Err = String;

    /// Splits a command as a shell does, without expanding anything.
    fn from_str(command: &str) -> std::result::Result<Self, String> {
        let words = shlex::split(command).ok_or("a quote is not closed")?;
        let program = words.first().filter(|program| !program.is_empty());
        let program = program.ok_or("expected a command, such as 'srun -n1 -c8'; it is empty")?;
        let found = match program.contains('/') {
            true => Path::new(program).is_file(),
            false => std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file())),
        };
        if found { Ok(Launcher(words)) } else { Err(format!("there is no program {program}; is it in PATH?")) }
    }
}

impl Launcher {
    /// `program`, started by the launcher.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(&self.0[0]);
        command.args(&self.0[1..]).arg(program);
        for (name, _) in std::env::vars_os() {
            if OF_THIS_STEP.iter().any(|start| name.to_string_lossy().starts_with(start)) {
                command.env_remove(name);
            }
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_is_split_as_a_shell_does_and_must_be_there() {
        let words = |command: &str| Launcher::from_str(command).map(|Launcher(words)| words);
        assert_eq!(words("env A='b c' sh").unwrap(), ["env", "A=b c", "sh"]);
        let cases = [
            ("", "it is empty"),
            ("  ", "it is empty"),
            ("'' x", "it is empty"),
            ("srun 'a", "a quote is not closed"),
            ("no-such-program -n1", "there is no program no-such-program"),
            ("./no/such", "there is no program ./no/such"),
        ];
        for (command, want) in cases {
            let found = words(command).unwrap_err();
            assert!(found.contains(want), "{command:?}: {found}");
        }
    }
}
