//! Where a key's PIN comes from: a file, or the person at the terminal.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::Path,
};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

use super::TpmError;
use crate::{base::key::SecretBytes, config::TpmConfig};

/// The longest PIN or password: the size of the TPM's authorization values under SHA-256.
const MOST_BYTES: usize = 32;

/// The PIN of this host's key.
pub fn pin(config: &TpmConfig) -> Result<SecretBytes, TpmError> {
    match &config.pin {
        Some(path) => first_line(path),
        None => ask("PIN of this host's key: "),
    }
}

/// A PIN or password in a file.
pub fn first_line(path: &Path) -> Result<SecretBytes, TpmError> {
    let failed = |source| TpmError::File { action: "read", path: path.to_path_buf(), source };
    line_of(&mut File::open(path).map_err(failed)?, path)
}

/// Asks at the terminal, unseen.
pub fn ask(question: &str) -> Result<SecretBytes, TpmError> {
    let path = Path::new("/dev/tty");
    let Ok(mut terminal) = OpenOptions::new().read(true).write(true).open(path) else { return Err(TpmError::NoPin) };
    let failed = |source| TpmError::File { action: "ask at", path: path.to_owned(), source };
    terminal.write_all(question.as_bytes()).map_err(failed)?;
    let hidden = Hidden::on(terminal.try_clone().map_err(failed)?).map_err(|error| failed(error.into()))?;
    let pin = line_of(&mut terminal, path);
    drop(hidden);
    terminal.write_all(b"\n").map_err(failed)?;
    pin
}

/// The first line, byte by byte into secret memory.
fn line_of(from: &mut File, path: &Path) -> Result<SecretBytes, TpmError> {
    let (mut line, mut len) = (SecretBytes::zeroed(MOST_BYTES + 1)?, 0);
    loop {
        let byte = &mut line.expose_mut()[len..len + 1];
        let read =
            from.read(byte).map_err(|source| TpmError::File { action: "read", path: path.to_owned(), source })?;
        if read == 0 || matches!(byte[0], b'\n' | b'\r') {
            break;
        }
        len += 1;
        if len > MOST_BYTES {
            let why = format!("has a first line of more than {MOST_BYTES} bytes");
            return Err(TpmError::Malformed { path: path.to_owned(), why });
        }
    }
    line.truncate(len);
    if line.is_empty() { Err(TpmError::NoPin) } else { Ok(line) }
}

/// A terminal that does not show what is typed, until this is dropped.
struct Hidden {
    terminal: File,
    before: Termios,
}

impl Hidden {
    fn on(terminal: File) -> nix::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut hidden = before.clone();
        hidden.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&terminal, SetArg::TCSAFLUSH, &hidden)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, SetArg::TCSAFLUSH, &self.before);
    }
}
