//! The program that knows where keys are, run with a pipe.

use std::{
    io::{self, Read},
    os::fd::AsRawFd,
    path::Path,
    process::{ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::page::{PAGE_BYTES, Page};

/// A fixed path: this runs with the rights of whoever opens volumes, whose PATH decides nothing.
const PROGRAM: &str = "/usr/bin/cryptattach";
/// For what the program starts itself.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// The program bounds its own waits (`[network]`, 30 seconds unless configured); this is for when it does not come to that.
const PATIENCE: Duration = Duration::from_secs(90);
/// The program's exit code for a store that cannot be reached or cannot do it now; `cryptattach --help` has them all.
const STORE_UNAVAILABLE: i32 = 69;

/// Why there is no passphrase.
pub struct Failure {
    /// For libcryptsetup.
    pub errno: i32,
    /// What the program has not said itself.
    pub message: Option<String>,
}

impl Failure {
    fn new(errno: i32, message: String) -> Self {
        Self { errno, message: Some(message) }
    }
}

/// The passphrase for the volume on `device`, whose header may be detached.
pub fn passphrase(device: &Path, header: Option<&Path>) -> Result<Page, Failure> {
    let failed = |error: io::Error| Failure::new(libc::ENOENT, format!("cannot run {PROGRAM}: {error}"));
    let mut command = program();
    command.args(["key", "passphrase", "--for"]).arg(device);
    if let Some(header) = header {
        command.arg("--header").arg(header);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let answer = child.stdout.take().map_or_else(|| Page::new().map_err(failed), |pipe| read(pipe, &device.display()));
    if answer.is_err() {
        // It may not have ended by itself.
        let _ = child.kill();
    }
    // It has closed its pipe, or was killed: it ends.
    let status = child.wait().ok();
    let passphrase = answer?;
    match status {
        // The passphrase is the last thing that the program does. A caller that reaps all children, or ignores SIGCHLD,
        // leaves no status.
        Some(status) if !status.success() => Err(refused(status)),
        _ if passphrase.len() == 0 => Err(Failure { errno: libc::ENOENT, message: None }),
        _ => Ok(passphrase),
    }
}

/// The program, with an environment of its own. The caller's may be a user's, by way of sudo: what it says of libraries,
/// configurations and clouds decides nothing.
fn program() -> Command {
    let mut command = Command::new(PROGRAM);
    command.env_clear().env("PATH", PATH);
    command
}

fn refused(status: ExitStatus) -> Failure {
    let errno = if status.code() == Some(STORE_UNAVAILABLE) { libc::EAGAIN } else { libc::ENOENT };
    // With an exit code, it has said why.
    let message = status.code().is_none().then(|| format!("{PROGRAM} was ended: {status}"));
    Failure { errno, message }
}

/// What the program writes until it closes the pipe, straight into locked memory.
fn read(mut pipe: ChildStdout, device: &impl std::fmt::Display) -> Result<Page, Failure> {
    let failed =
        |error: io::Error| Failure::new(libc::ENOENT, format!("cannot read the passphrase of {device}: {error}"));
    let deadline = Instant::now() + PATIENCE;
    let mut page = Page::new().map_err(failed)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let seconds = PATIENCE.as_secs();
            return Err(Failure::new(libc::EAGAIN, format!("no passphrase for {device} within {seconds} seconds")));
        }
        if !readable(&pipe, left).map_err(failed)? {
            continue;
        }
        if page.room().is_empty() {
            return Err(Failure::new(libc::ENOENT, format!("the passphrase of {device} has over {PAGE_BYTES} bytes")));
        }
        match pipe.read(page.room()) {
            Ok(0) => return Ok(page),
            Ok(count) => page.grow(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Waits until there is something to read, or the end.
fn readable(pipe: &ChildStdout, left: Duration) -> io::Result<bool> {
    let mut wanted = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1);
    // SAFETY: one pollfd, on this stack.
    match unsafe { libc::poll(&raw mut wanted, 1, milliseconds) } {
        -1 => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
        ready => Ok(ready > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_environment_reaches_nobody() {
        let program = program();
        let given: Vec<_> = program.get_envs().collect();
        assert_eq!(given, [("PATH".as_ref(), Some(PATH.as_ref()))]);
        // get_envs() does not tell whether the others are inherited.
        assert!(format!("{program:?}").starts_with("env -i"), "{program:?}");
    }
}
