//! Other programs that are waited for, with an end.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

use crate::base::key::SecretBytes;

const POLL: Duration = Duration::from_millis(10);

/// Runs a program without input and returns what it says. One that takes longer than `patience` is killed, and the error is
/// `TimedOut`.
pub fn output_of(command: &mut Command, patience: Duration) -> io::Result<Output> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Read beside the wait: a program that fills the pipe would wait for us.
    let (stdout, stderr) = (beside(child.stdout.take()), beside(child.stderr.take()));
    let status = match wait(&mut child, patience)? {
        Some(status) => status,
        None => {
            child.kill()?;
            child.wait()?;
            let program = command.get_program().to_string_lossy();
            let why = format!("{program} did not end within {} seconds", patience.as_secs_f32());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    };
    let all = |reader: thread::JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    Ok(Output { status, stdout: all(stdout), stderr: all(stderr) })
}

/// The most that [`secret_of`] takes: a passphrase.
const MOST_SECRET_BYTES: usize = 4096;
/// The most that is kept of what a program says of its failure.
const MOST_WORDS_BYTES: usize = 1024;

/// Runs a program that is given `input` and returns a secret; or the last line of what it says of its failure. It and all that
/// it has started are killed once it takes longer than `patience`, says too much, or is not wanted any more.
pub fn secret_of(
    command: &mut Command,
    input: &[u8],
    patience: Duration,
    is_wanted: &dyn Fn() -> bool,
) -> io::Result<Result<SecretBytes, String>> {
    let mut stdin = File::from(memfd_create(c"input", MFdFlags::MFD_CLOEXEC)?);
    stdin.write_all(input)?;
    stdin.rewind()?;
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).current_dir("/");
    let mut child = command.spawn()?;
    let said = listen(&mut child, Instant::now() + patience, is_wanted);
    // It is not waited for yet, so its number is still its own.
    let _ = killpg(group_of(&child), Signal::SIGKILL);
    let status = child.wait()?;
    let (secret, words) = said?;
    let last_line =
        || String::from_utf8_lossy(words.trim_ascii().rsplit(|byte| *byte == b'\n').next().unwrap_or(b"")).into();
    Ok(if status.success() { Ok(secret) } else { Err(last_line()) })
}

/// A command with an environment that has nothing but a path.
pub fn bare(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

fn group_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

/// All that a program says, until it has ended.
fn listen(child: &mut Child, deadline: Instant, is_wanted: &dyn Fn() -> bool) -> io::Result<(SecretBytes, Vec<u8>)> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut secret, mut length) = (SecretBytes::zeroed(MOST_SECRET_BYTES + 1).map_err(io::Error::other)?, 0);
    let mut words = Vec::new();
    loop {
        if stdout.as_ref().is_some_and(is_ready) {
            let read = stdout.as_mut().map_or(Ok(0), |stdout| stdout.read(&mut secret.expose_mut()[length..]))?;
            length += read;
            stdout = stdout.filter(|_| read > 0);
        }
        if stderr.as_ref().is_some_and(is_ready) {
            let mut some = [0; MOST_WORDS_BYTES];
            let read = stderr.as_mut().map_or(Ok(0), |stderr| stderr.read(&mut some))?;
            words.extend_from_slice(&some[..read]);
            words.drain(..words.len().saturating_sub(MOST_WORDS_BYTES));
            stderr = stderr.filter(|_| read > 0);
        }
        let why = match () {
            () if length > MOST_SECRET_BYTES => "it says too much",
            () if !is_wanted() => "it is not needed any more",
            () if Instant::now() >= deadline => "it did not end in time",
            // What still holds its pipes is no part of the answer.
            () if has_ended(child) && !stdout.as_ref().is_some_and(is_ready) => break,
            () => {
                await_words(&stdout, &stderr);
                continue;
            }
        };
        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
    }
    secret.truncate(length);
    Ok((secret, words))
}

fn has_ended(child: &Child) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    !matches!(waitid(Id::Pid(group_of(child)), flags), Ok(WaitStatus::StillAlive))
}

fn is_ready(pipe: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Until one of them has something, or for a moment.
fn await_words(stdout: &Option<ChildStdout>, stderr: &Option<ChildStderr>) {
    let fds = [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)];
    let mut fds: Vec<_> = fds.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    let _ = poll(&mut fds, PollTimeout::from(POLL.as_millis() as u8));
}

fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + patience;
    loop {
        let ended = child.try_wait()?;
        if ended.is_some() || Instant::now() >= deadline {
            return Ok(ended);
        }
        thread::sleep(POLL);
    }
}

fn beside(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was said until the end, or the error, is all there is.
            pipe.read_to_end(&mut bytes).ok();
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let said =
            output_of(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]), Duration::from_secs(20));
        let said = said.expect("it ends");
        assert_eq!((said.status.code(), &said.stdout[..], &said.stderr[..]), (Some(3), &b"out\n"[..], &b"err\n"[..]));
        let begun = Instant::now();
        let error = output_of(Command::new("sleep").arg("60"), Duration::from_millis(50)).expect_err("it sleeps");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(20) && error.to_string().starts_with("sleep did not end"));
    }

    fn told(script: &str, patience: Duration, is_wanted: &dyn Fn() -> bool) -> Result<Result<String, String>, String> {
        let secret = secret_of(bare("sh").args(["-c", script]), b"in", patience, is_wanted);
        let text = |secret: SecretBytes| String::from_utf8(secret.expose().to_vec()).unwrap();
        secret.map(|told| told.map(text)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_program_gets_its_input_and_gives_a_secret_or_says_why_not() {
        let long = Duration::from_secs(20);
        let told = |script| told(script, long, &|| true);
        assert_eq!(told("cat; echo -n out; env | grep -c HOME"), Ok(Err(String::new())), "grep finds no HOME");
        assert_eq!(told("cat; echo -n out"), Ok(Ok("inout".to_owned())));
        assert_eq!(told("echo out; printf 'much\\nwhy\\n' >&2; exit 3"), Ok(Err("why".to_owned())));
        assert_eq!(told("yes"), Err("it says too much".to_owned()));
        assert_eq!(told("yes >&2 & sleep 0.1; echo -n out"), Ok(Ok("out".to_owned())), "its words have no end");
        // What it leaves behind holds its pipes.
        let begun = Instant::now();
        assert_eq!(told("sleep 60 & echo -n out"), Ok(Ok("out".to_owned())));
        assert!(begun.elapsed() < long);
    }

    #[test]
    fn a_program_that_is_not_wanted_any_more_is_killed_with_all_that_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script = format!("(echo $BASHPID; sleep 61) & echo $! >{}; wait", pid.display());
        let begun = Instant::now();
        let is_wanted = || begun.elapsed() < Duration::from_millis(200);
        assert_eq!(told(&script, Duration::from_secs(60), &is_wanted), Err("it is not needed any more".to_owned()));
        assert_eq!(told("sleep 60", Duration::from_millis(50), &|| true), Err("it did not end in time".to_owned()));
        let process = format!("/proc/{}/stat", std::fs::read_to_string(pid).unwrap().trim());
        let is_gone = || std::fs::read_to_string(&process).map_or(true, |stat| stat.contains(") Z "));
        while !is_gone() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{process}");
            thread::sleep(POLL);
        }
    }
}
