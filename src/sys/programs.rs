//! Other programs that are waited for, with an end.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Output, Stdio},
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
/// How long a program that has said all may take to end.
const LONGEST_END: Duration = Duration::from_secs(1);

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
    let Said { output, words, status } =
        attend(command.spawn()?, Until::End, MOST_SECRET_BYTES, patience, &|_| !is_wanted())?;
    let last_line =
        || String::from_utf8_lossy(words.trim_ascii().rsplit(|byte| *byte == b'\n').next().unwrap_or(b"")).into();
    Ok(if status.is_some_and(|status| status.success()) { Ok(output) } else { Err(last_line()) })
}

/// Gives a program its input and returns what it says until it closes its output, with how it ended if it did. It has a
/// process group of its own, which is killed in the end: after `patience` (the error is `TimedOut`), once `is_over` says of
/// what was said that no more is wanted (`Interrupted`), or with more than `most` bytes (`InvalidData`).
pub fn converse(
    command: &mut Command,
    input: &[&[u8]],
    most: usize,
    patience: Duration,
    is_over: &dyn Fn(&[u8]) -> bool,
) -> io::Result<(SecretBytes, Option<ExitStatus>)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take();
    for part in input {
        // A pipe has room for it. A program that did not read it has said why.
        let _ = stdin.as_mut().map(|stdin| stdin.write_all(part));
    }
    drop(stdin);
    let Said { output, status, .. } = attend(child, Until::Closed, most, patience, is_over)?;
    Ok((output, status))
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

/// What a program has said, and how it ended if it did by itself.
struct Said {
    output: SecretBytes,
    /// Of its failure.
    words: Vec<u8>,
    status: Option<ExitStatus>,
}

/// When a program has said all.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Once its output is closed.
    Closed,
    /// Once it has ended: what still holds its pipes is no part of the answer.
    End,
}

/// Hears a program that leads a process group, and then kills the group.
fn attend(
    mut child: Child,
    until: Until,
    most: usize,
    patience: Duration,
    is_over: &dyn Fn(&[u8]) -> bool,
) -> io::Result<Said> {
    let started = Instant::now();
    let heard = hear(&mut child, until, most, &|| started.elapsed() >= patience, is_over);
    // Its own end is not waited for at any length: what it has to say, it has said.
    let grace = patience.saturating_sub(started.elapsed()).min(LONGEST_END);
    let ended = heard.is_ok() && ends_within(&child, grace);
    // While it is not reaped, its number is nobody else's.
    let _ = killpg(group_of(&child), Signal::SIGKILL);
    let status = child.wait()?;
    let (output, words) = heard?;
    Ok(Said { output, words, status: ended.then_some(status) })
}

/// All that a program says.
fn hear(
    child: &mut Child,
    until: Until,
    most: usize,
    is_late: &dyn Fn() -> bool,
    is_over: &dyn Fn(&[u8]) -> bool,
) -> io::Result<(SecretBytes, Vec<u8>)> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut said, mut length) = (SecretBytes::zeroed(most + 1).map_err(io::Error::other)?, 0);
    let mut words = Vec::new();
    loop {
        if stdout.as_ref().is_some_and(is_ready) {
            let read = stdout.as_mut().map_or(Ok(0), |stdout| stdout.read(&mut said.expose_mut()[length..]))?;
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
        let (kind, why) = match () {
            () if length > most => (io::ErrorKind::InvalidData, "it says too much"),
            () if until == Until::Closed && stdout.is_none() => break,
            () if is_over(&said.expose()[..length]) => (io::ErrorKind::Interrupted, "it is not needed any more"),
            () if is_late() => (io::ErrorKind::TimedOut, "it did not end in time"),
            () if until == Until::End && has_ended(child) && !stdout.as_ref().is_some_and(is_ready) => break,
            () => {
                await_words(&stdout, &stderr);
                continue;
            }
        };
        return Err(io::Error::new(kind, why));
    }
    said.truncate(length);
    Ok((said, words))
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

fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + patience;
    loop {
        let ended = child.try_wait()?;
        if ended.is_some() || Instant::now() >= deadline {
            return Ok(ended);
        }
        thread::sleep(POLL);
    }
}

/// Whether a child ends within this time; it is not reaped.
fn ends_within(child: &Child, patience: Duration) -> bool {
    let started = Instant::now();
    loop {
        let ended = has_ended(child);
        if ended || started.elapsed() >= patience {
            return ended;
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

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_conversation_ends_with_the_answer() {
        let never = |_: &[u8]| false;
        let long = Duration::from_secs(20);
        let talk = |script: &str, most| converse(&mut sh(script), &[b"one", b"two"], most, long, &never);
        let (said, status) = talk("cat; exit 3", 6).unwrap();
        assert_eq!((said.expose(), status.unwrap().code()), (&b"onetwo"[..], Some(3)));
        assert_eq!(talk("cat", 5).err().unwrap().kind(), io::ErrorKind::InvalidData);
        assert_eq!(talk("exec yes", 4096).err().unwrap().kind(), io::ErrorKind::InvalidData);
        // It has not read its input, and it lingers.
        let begun = Instant::now();
        let (said, status) = talk("echo all; exec >&-; sleep 60", 6).unwrap();
        assert!(said.expose() == b"all\n" && status.is_none() && begun.elapsed() < Duration::from_secs(15));
        assert_eq!(talk("kill -SEGV $$", 6).unwrap().1.and_then(|status| status.code()), None);
    }

    /// Its children hold the pipe open, and go with it.
    #[test]
    fn a_conversation_that_is_too_long_or_not_wanted_is_broken_off_with_all_children() {
        let talk = |patience, is_over: &dyn Fn(&[u8]) -> bool| {
            let child = std::cell::Cell::new(0);
            let watch = |so_far: &[u8]| {
                std::str::from_utf8(so_far).unwrap().trim().parse().map(|number| child.set(number)).ok();
                is_over(so_far)
            };
            let error = converse(&mut sh("sleep 60 & echo $!; wait"), &[], 99, patience, &watch).err().unwrap();
            (error.kind(), child.get())
        };
        let ends = |child: i32| {
            let stat = || std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            (0..500).any(|_| {
                thread::sleep(POLL);
                stat().is_empty() || stat().contains(") Z ")
            })
        };
        let (kind, child) = talk(Duration::from_millis(500), &|_| false);
        assert!(kind == io::ErrorKind::TimedOut && child > 0 && ends(child));
        let (kind, child) = talk(Duration::from_secs(60), &|so_far| so_far.ends_with(b"\n"));
        assert!(kind == io::ErrorKind::Interrupted && child > 0 && ends(child));
    }
}
