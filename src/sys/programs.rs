//! Other programs that are waited for, with an end.

use std::{
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::{
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
    let deadline = Instant::now() + patience;
    let mut said = SecretBytes::zeroed(most + 1).map_err(io::Error::other)?;
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0).spawn()?;
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or_default());
    let heard = hear(&mut child, input, &mut said, deadline, is_over);
    let ended = match heard {
        // Its own end is not waited for at any length: what it has to say, it has said.
        Ok(_) => wait_unreaped(group, deadline.min(Instant::now() + LONGEST_END)),
        Err(_) => false,
    };
    // While it is not reaped, its number is nobody else's.
    let _ = killpg(group, Signal::SIGKILL);
    let status = child.wait()?;
    said.truncate(heard?);
    Ok((said, ended.then_some(status)))
}

fn hear(
    child: &mut Child,
    input: &[&[u8]],
    said: &mut SecretBytes,
    deadline: Instant,
    is_over: &dyn Fn(&[u8]) -> bool,
) -> io::Result<usize> {
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    for part in input {
        // A pipe has room for it. A program that did not read it has said why.
        let _ = stdin.write_all(part);
    }
    drop(stdin);
    let mut len = 0;
    loop {
        if is_over(&said.expose()[..len]) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut ready = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 10_u8)? == 0 {
            continue;
        }
        match stdout.read(&mut said.expose_mut()[len..])? {
            0 => return Ok(len),
            more => len += more,
        }
        if len == said.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// Whether a child has ended by then; it is not reaped.
fn wait_unreaped(child: Pid, deadline: Instant) -> bool {
    loop {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(child), flags) {
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => thread::sleep(POLL),
            Ok(WaitStatus::StillAlive) | Err(_) => return false,
            Ok(_) => return true,
        }
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
