//! What a host remembers of a store that it does not trust: small JSON files in the state directory.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// The state directory cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}, where this host remembers what the store has shown it", .path.display())]
pub struct StateError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
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
    let folder = path.parent().unwrap_or(Path::new("/"));
    let write = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut file, value)?;
        file.write_all(b"\n")?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|refused| refused.error).map(drop)
    };
    write().map_err(|source| StateError { action: "write", path: path.to_owned(), source })
}
