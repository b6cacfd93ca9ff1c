//! Where a key's PIN comes from: a file, or the person at the terminal.

use std::{fs::File, io::Read, path::Path};

use super::TpmError;
use crate::{base::key::SecretBytes, config::TpmConfig, sys::terminal};

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
    ask_until(question, &|| false)
}

/// The same, until that `is_over`.
pub fn ask_until(question: &str, is_over: &dyn Fn() -> bool) -> Result<SecretBytes, TpmError> {
    let pin = terminal::ask(question, is_over).ok().flatten().filter(|pin| !pin.is_empty()).ok_or(TpmError::NoPin)?;
    if pin.len() > MOST_BYTES { Err(too_long(Path::new(terminal::PATH))) } else { Ok(pin) }
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
            return Err(too_long(path));
        }
    }
    line.truncate(len);
    if line.is_empty() { Err(TpmError::NoPin) } else { Ok(line) }
}

fn too_long(path: &Path) -> TpmError {
    let why = format!("has a first line of more than {MOST_BYTES} bytes");
    TpmError::Malformed { path: path.to_owned(), why }
}
