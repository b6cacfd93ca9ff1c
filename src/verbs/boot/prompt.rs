//! The prompt for a person, which races with the automation: the distribution's own program shows it (on the console, on a
//! splash screen, to its agents), so that a boot looks as it does without us.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, killpg},
        termios::{SetArg, Termios, tcgetattr, tcsetattr},
    },
    unistd::Pid,
};

use crate::base::{chain::printable, key::SecretBytes};

/// cryptsetup's own limit for a passphrase on a terminal (utils_password.c), and a newline.
const MOST_BYTES: usize = 513;

/// Debian's program of cryptsetup-initramfs: console, Plymouth, and the FIFO that `cryptroot-unlock` writes to over SSH.
const ASKPASS: &str = "/lib/cryptsetup/askpass";

/// A prompt that is shown.
pub struct Prompt {
    program: Option<(Pid, Signal)>,
    /// The terminal as it was before a program turned its echo off.
    console: Option<(File, Termios)>,
}

/// What will read the person's answer.
pub struct Answer(Child);

impl Prompt {
    /// Shows a prompt; `None` where there is no program to show one.
    #[allow(unsafe_code)] // between fork(2) and execve(2)
    pub fn show(text: &str, first_volume: &str) -> Option<io::Result<(Self, Answer)>> {
        let (mut command, end) = program(&printable(text))?;
        let terminal = File::options().read(true).write(true).open("/dev/console").ok();
        let console = terminal.and_then(|terminal| tcgetattr(&terminal).ok().map(|before| (terminal, before)));
        command
            .stdin(
                console.as_ref().and_then(|(terminal, _)| terminal.try_clone().ok()).map_or(Stdio::null(), Stdio::from),
            )
            .stdout(Stdio::piped())
            // For `cryptroot-unlock`, which looks for it.
            .env("CRYPTTAB_NAME", first_volume)
            // With all that it starts: Plymouth's client, for one.
            .process_group(0);
        // Two programs that read the console would each get a part of what is typed.
        let end_with_us = move || Ok(set_pdeathsig(end)?);
        // SAFETY: it is one system call, and allocates nothing.
        unsafe { command.pre_exec(end_with_us) };
        Some(command.spawn().map(|child| {
            let program = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
            (Self { program: Some((program, end)), console }, Answer(child))
        }))
    }
}

impl Prompt {
    /// Its program has ended.
    pub fn answered(mut self) {
        self.program = None;
    }
}

impl Drop for Prompt {
    /// Takes the prompt away; the terminal is as before.
    fn drop(&mut self) {
        let Some((program, end)) = self.program else { return };
        let _ = killpg(program, end);
        if let Some((terminal, before)) = &mut self.console {
            let _ = tcsetattr(&*terminal, SetArg::TCSANOW, before);
            let _ = terminal.write_all(b"\n");
        }
    }
}

impl Answer {
    /// Waits for what the person types, if it is only Enter; `None` if the program was ended, or could not ask.
    pub fn read(mut self) -> Option<SecretBytes> {
        let answer = self.0.stdout.take().and_then(|stdout| read(stdout).ok());
        let ended = self.0.wait();
        answer.filter(|_| ended.is_ok_and(|status| status.success()))
    }
}

fn read(mut from: impl Read) -> io::Result<SecretBytes> {
    let mut answer = SecretBytes::zeroed(MOST_BYTES).map_err(io::Error::other)?;
    let mut length = 0;
    while length < MOST_BYTES {
        match from.read(&mut answer.expose_mut()[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    // systemd-ask-password ends its answer with a newline, askpass does not.
    if answer.expose()[..length].last() == Some(&b'\n') {
        length -= 1;
    }
    answer.truncate(length);
    Ok(answer)
}

/// What asks, and the signal that ends it.
fn program(text: &str) -> Option<(Command, Signal)> {
    // sd_booted(3)
    if crate::sys::systemd::is_running() {
        let mut command = Command::new("systemd-ask-password");
        command.args(["--id=cryptattach:boot", "--icon=drive-harddisk", "--no-tty", "--timeout=0", text]);
        // It then takes its question back from its agents.
        return Some((command, Signal::SIGTERM));
    }
    Path::new(ASKPASS).exists().then(|| {
        let mut command = Command::new(ASKPASS);
        command.arg(text);
        // It blocks all others, for itself and Plymouth's client.
        (command, Signal::SIGKILL)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_an_answer_with_and_without_newline() {
        for (typed, answer) in [("secret\n", "secret"), ("secret", "secret"), ("a\n\n", "a\n"), ("", "")] {
            assert_eq!(read(typed.as_bytes()).unwrap().expose(), answer.as_bytes());
        }
        assert_eq!(read(io::repeat(b'x')).unwrap().len(), MOST_BYTES);
    }

    #[test]
    fn only_enter_is_an_answer_and_a_program_that_fails_gives_none() {
        for (script, answer) in [("echo", Some("")), ("echo secret", Some("secret")), ("echo secret; exit 1", None)] {
            let asked = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
            let answered = Answer(asked).read();
            assert_eq!(answered.as_ref().map(SecretBytes::expose), answer.map(str::as_bytes), "{script}");
        }
    }
}
