//! A question at the terminal whose answer nobody sees; and how wide a terminal is.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Mutex, MutexGuard, TryLockError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, poll},
    sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr},
};

use crate::base::{key::SecretBytes, person::Person};

/// The terminal of this process, if it has one.
pub const PATH: &str = "/dev/tty";
/// More than a terminal takes in one line.
const MOST_BYTES: usize = 4096;
/// So often it is looked whether an answer is still wanted.
const LOOK_MILLISECONDS: u8 = 100;
/// What Ctrl-C is in a line.
const INTERRUPT: u8 = 3;

mod ioctl {
    #![allow(unsafe_code)] // the wrapper that nix's macro makes is an unsafe function
    use nix::libc;
    nix::ioctl_read_bad!(tiocgwinsz, libc::TIOCGWINSZ, libc::winsize);
}

/// The columns of the terminal that reads standard output, if one does.
#[allow(unsafe_code)]
pub fn columns() -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the ioctl writes one winsize (ioctl_tty(2)), and standard output stays open.
    unsafe { ioctl::tiocgwinsz(io::stdout().as_raw_fd(), &raw mut size) }.ok()?;
    Some(size.ws_col.into()).filter(|columns| *columns > 0)
}

/// Asks, until that `is_over`; `None` if it is over, or the person has pressed Ctrl-C or Ctrl-D.
///
/// One question at a time: of two that read the same line, each would have a part of the answer, and take it for a wrong one.
pub fn ask(question: &str, is_over: &dyn Fn() -> bool) -> io::Result<Option<SecretBytes>> {
    let Some(_alone) = turn(is_over) else { return Ok(None) };
    let mut terminal = OpenOptions::new().read(true).write(true).open(PATH)?;
    let _hidden = Hidden::on(terminal.try_clone()?)?;
    terminal.write_all(question.as_bytes())?;
    let answer = line(&mut terminal, is_over);
    terminal.write_all(b"\n")?;
    answer
}

/// Waits until nobody else asks; `None` if it is over before.
fn turn(is_over: &dyn Fn() -> bool) -> Option<MutexGuard<'static, ()>> {
    static TERMINAL: Mutex<()> = Mutex::new(());
    while !is_over() {
        match TERMINAL.try_lock() {
            Ok(alone) => return Some(alone),
            Err(TryLockError::Poisoned(alone)) => return Some(alone.into_inner()),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(LOOK_MILLISECONDS.into())),
        }
    }
    None
}

/// One line, byte by byte into secret memory.
fn line(terminal: &mut File, is_over: &dyn Fn() -> bool) -> io::Result<Option<SecretBytes>> {
    let (mut line, mut len) = (SecretBytes::zeroed(MOST_BYTES).map_err(io::Error::other)?, 0);
    while len < MOST_BYTES {
        if is_over() {
            return Ok(None);
        }
        if poll(&mut [PollFd::new(terminal.as_fd(), PollFlags::POLLIN)], LOOK_MILLISECONDS)? == 0 {
            continue;
        }
        match terminal.read(&mut line.expose_mut()[len..=len])? {
            0 => return Ok(None),
            _ => match line.expose()[len] {
                b'\n' | b'\r' => break,
                INTERRUPT => return Ok(None),
                _ => len += 1,
            },
        }
    }
    line.truncate(len);
    Ok(Some(line))
}

/// A terminal that does not show what is typed, until this is dropped. A signal would leave it so: Ctrl-C ends the line instead.
struct Hidden {
    terminal: File,
    before: Termios,
}

impl Hidden {
    fn on(terminal: File) -> nix::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut hidden = before.clone();
        hidden.local_flags.remove(LocalFlags::ECHO | LocalFlags::ISIG);
        hidden.control_chars[SpecialCharacterIndices::VEOL as usize] = INTERRUPT;
        tcsetattr(&terminal, SetArg::TCSAFLUSH, &hidden)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, SetArg::TCSAFLUSH, &self.before);
    }
}

/// The person at the terminal of this process.
#[derive(Default)]
pub struct AtTerminal {
    /// They have pressed Enter only, or Ctrl-C: a store that has many keys for them to open is not to go on asking.
    gave_up: AtomicBool,
}

impl Person for AtTerminal {
    fn ask(&self, question: &str, is_over: &dyn Fn() -> bool) -> Option<SecretBytes> {
        // Without a terminal there is nobody.
        let answer = ask(question, &|| self.gave_up.load(Relaxed) || is_over()).ok().flatten();
        let answer = answer.filter(|answer| !answer.is_empty());
        if answer.is_none() && !is_over() {
            self.gave_up.store(true, Relaxed);
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_question_waits_for_the_other_and_no_longer_than_it_is_wanted() {
        let alone = turn(&|| false).unwrap();
        let mut looks = std::cell::Cell::new(0);
        let is_over = || looks.replace(looks.get() + 1) == 2;
        assert!(turn(&is_over).is_none());
        assert_eq!(*looks.get_mut(), 3);
        thread::scope(|scope| {
            let other = scope.spawn(|| turn(&|| false).is_some());
            drop(alone);
            assert!(other.join().unwrap());
        });
    }
}
