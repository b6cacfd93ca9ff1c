//! What a host remembers of stores that it does not trust: small JSON files in the state directory.

use std::{
    borrow::Cow,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use nix::fcntl::Flock;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    base::{advice::Advice, chain::chain, exit::Exit},
    sys::{
        durable::{Folder, folder_of, stems},
        lock,
    },
};

/// The state directory cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the state file {}", .path.display())]
pub struct StateError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Advice for StateError {
    fn exit(&self) -> Exit {
        Exit::Io
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some("check the state directory ('state' in the configuration)".into())
    }
}

/// What is remembered; `None` if nothing is.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let failed = |source| StateError { action: "read", path: path.to_owned(), source };
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Remembers it, whole or not at all.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let write = || {
        let mut json = serde_json::to_vec(value)?;
        json.push(b'\n');
        put(path, &json)
    };
    write().map_err(|source| StateError { action: "write", path: path.to_owned(), source })
}

/// Remembers what the name alone says.
pub fn mark(path: &Path) -> Result<(), StateError> {
    create(path, b"").map_err(|source| StateError { action: "write", path: path.to_owned(), source })
}

/// The names of what is remembered in a folder.
pub fn names(folder: &Path) -> Result<Vec<String>, StateError> {
    stems(folder, "").map_err(|source| StateError { action: "read", path: folder.to_owned(), source })
}

/// All that is remembered in a folder, each by its name. What cannot be read hides nothing else.
pub fn all<N: FromStr, T: DeserializeOwned>(folder: &Path) -> Vec<(N, T)> {
    let names = names(folder).unwrap_or_default();
    let each = names.iter().filter_map(|name| Some((name.parse().ok()?, read_or_warn(&folder.join(name))?)));
    each.collect()
}

/// What is remembered, where a file that cannot be read is only worth a word.
pub fn read_or_warn<T: DeserializeOwned>(path: &Path) -> Option<T> {
    read(path).unwrap_or_else(|error| {
        tracing::warn!("{}", chain(&error));
        None
    })
}

/// Forgets it; whether anything was remembered.
pub fn remove(path: &Path) -> Result<bool, StateError> {
    let removed = fs::remove_file(path).and_then(|()| File::open(folder_of(path))?.sync_all());
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        removed => {
            removed.map(|()| true).map_err(|source| StateError { action: "remove", path: path.to_owned(), source })
        }
    }
}

/// That nobody else works on what is remembered under this name in the folder. The error is `TimedOut` if somebody does, and says
/// who.
pub fn claim(folder: &Path, name: &str) -> io::Result<Flock<File>> {
    Folder::make(folder)?;
    lock::lock(&lock_of(folder, name), Duration::ZERO)
}

/// Whether somebody has claimed it.
pub fn is_claimed(folder: &Path, name: &str) -> bool {
    lock::is_held(&lock_of(folder, name))
}

/// No name of what is remembered begins with a dot.
fn lock_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!(".{name}"))
}

/// This boot (random(4), boot_id). Where the kernel does not say, nothing can be remembered for it.
pub fn boot() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

/// Writes a file, with the folders above it, in place of the one that is there.
pub fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    Folder::make(folder_of(path))?.replace(name_of(path)?, bytes)
}

/// The same unless there is one.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match Folder::make(folder_of(path))?.create(name_of(path)?, bytes) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created,
    }
}

fn name_of(path: &Path) -> io::Result<&str> {
    path.file_name().and_then(|name| name.to_str()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
