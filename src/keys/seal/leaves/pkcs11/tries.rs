//! Tries of a PIN. A token locks itself after a few wrong ones, so nobody but a person has more than one in a boot: what failed
//! once unattended would fail for each volume and each time that a unit is started.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{fcntl::Flock, unistd::geteuid};
use openssl::sha::sha256;

use crate::{
    base::hex,
    sys::{durable::Folder, lock, state},
};

/// Where they are remembered. Its name begins with a dot, which no mapping's does. It outlives the initramfs.
const FOLDER: &str = "/run/cryptattach/.pins";

const POLL: Duration = Duration::from_millis(100);

/// The tries of one token's PIN. Nobody else tries it meanwhile.
pub struct Tries {
    file: PathBuf,
    _lock: Flock<File>,
}

impl Tries {
    /// Of the token with this name. Users other than root remember in their state directory.
    /// Others are waited for until `is_over`.
    pub fn of(token: &str, state: &Path, is_over: &dyn Fn() -> bool) -> io::Result<Self> {
        let folder = if geteuid().is_root() { FOLDER.into() } else { state.join("pins") };
        Folder::make(&folder)?;
        let file = folder.join(hex::encode(&sha256(token.as_bytes())[..16]));
        let path = file.with_extension("lock");
        loop {
            match lock::lock(&path, POLL) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut && !is_over() => {}
                lock => return Ok(Self { file, _lock: lock? }),
            }
        }
    }

    /// Whether the token was given a PIN unattended in this boot, and is not known to have taken it.
    pub fn had_one(&self) -> bool {
        // What cannot be read may say so.
        state::read::<String>(&self.file).map_or(true, |boot| boot.is_some() && boot == state::boot())
    }

    /// Remembers that it is given one now.
    pub fn begin(&self) -> io::Result<()> {
        let boot = state::boot().ok_or_else(|| io::Error::other("the kernel does not say which boot this is"))?;
        state::put(&self.file, format!("\"{boot}\"\n").as_bytes())
    }

    /// It has taken a PIN.
    pub fn forget(&self) {
        // What stays costs a person's PIN the next time.
        let _ = std::fs::remove_file(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_is_remembered_for_this_boot_until_a_pin_is_taken() {
        let state = tempfile::tempdir().unwrap();
        let token = format!("maker\0model\0{}", state.path().display());
        let tries = Tries::of(&token, state.path(), &|| true).unwrap();
        assert!(!tries.had_one());
        tries.begin().unwrap();
        assert!(tries.had_one());
        let told = Tries::of(&token, state.path(), &|| true).err().unwrap();
        assert_eq!(told.kind(), io::ErrorKind::TimedOut, "nobody else tries meanwhile");
        drop(tries);
        let other = Tries::of(&format!("{token}1"), state.path(), &|| true).unwrap();
        assert!(!other.had_one());
        let tries = Tries::of(&token, state.path(), &|| true).unwrap();
        assert!(tries.had_one());
        // Another boot's, and one that cannot be read.
        state::put(&tries.file, b"\"00000000-0000-4000-8000-000000000000\"\n").unwrap();
        assert!(!tries.had_one());
        state::put(&tries.file, b"\"").unwrap();
        assert!(tries.had_one());
        tries.forget();
        assert!(!tries.had_one());
        for tries in [tries, other] {
            std::fs::remove_file(tries.file.with_extension("lock")).unwrap();
        }
    }
}
