//! Which container key this host seals under: the first that it saw, and what that one's proof leads to.
//!
//! The store says which epoch is current, and the store is not trusted: it could bring back an epoch from before a host
//! was withdrawn, or put a key of its own in place. So a host remembers epoch and fingerprint of the last key that it
//! sealed under. It goes forward over proofs only, and never back.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::Container;
use crate::{
    error::Error,
    key::{ContainerKeyId, Epoch},
    seal::ContainerKey,
};

/// The file `containers/NAME` of the state directory.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Trusted {
    epoch: Epoch,
    fingerprint: String,
}

/// The container key that the store says is current is not one to seal under.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The store went back to an older one.
    #[error("the store says that the current container key is {id}, but this host has sealed under epoch {trusted}")]
    Older {
        /// What the store says.
        id: ContainerKeyId,
        /// What this host knows.
        trusted: Epoch,
    },
    /// It is another one of the same number.
    #[error("the container key {id} has the fingerprint {is}; this host has sealed under one with {trusted}")]
    Another {
        /// The key.
        id: ContainerKeyId,
        /// Its fingerprint.
        is: String,
        /// What this host knows.
        trusted: String,
    },
    /// It has no proof by the one before it.
    #[error("the container key {0} has no proof by the key before it")]
    Unproven(ContainerKeyId),
    /// The file cannot be read or written.
    #[error("cannot {action} {}, where this host remembers the container key", .path.display())]
    State {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Container {
    /// The key of this epoch, if it is one that this host may seal under.
    pub(super) fn trusted_key(&self, epoch: Epoch) -> Result<Arc<ContainerKey>, Error> {
        let key = self.container_key(epoch)?;
        let now = Trusted { epoch, fingerprint: key.fingerprint()? };
        let id = |epoch| ContainerKeyId { container: self.name.clone(), epoch };
        match read(&self.trusted)? {
            Some(known) if known == now => return Ok(key),
            Some(known) if known.epoch > epoch => {
                return Err(TrustError::Older { id: id(epoch), trusted: known.epoch }.into());
            }
            Some(known) => self.follow(&known, epoch)?,
            None => tracing::warn!(
                "sealing under the container key {} for the first time on this host; its fingerprint is {}",
                id(epoch),
                now.fingerprint
            ),
        }
        write(&self.trusted, &now)?;
        Ok(key)
    }

    /// Goes from the key that is known to a later one, proof by proof.
    fn follow(&self, known: &Trusted, epoch: Epoch) -> Result<(), Error> {
        let id = |epoch| ContainerKeyId { container: self.name.clone(), epoch };
        let mut key = self.container_key(known.epoch)?;
        let is = key.fingerprint()?;
        if is != known.fingerprint {
            return Err(TrustError::Another { id: id(known.epoch), is, trusted: known.fingerprint.clone() }.into());
        }
        while key.epoch() < epoch {
            let next = self.container_key(key.epoch().next())?;
            if !next.follows(&key)? {
                return Err(TrustError::Unproven(id(next.epoch())).into());
            }
            key = next;
        }
        Ok(())
    }

    /// Trusts a key that this host has made.
    pub(super) fn trust(&self, key: &ContainerKey) -> Result<(), Error> {
        Ok(write(&self.trusted, &Trusted { epoch: key.epoch(), fingerprint: key.fingerprint()? })?)
    }
}

fn read(path: &Path) -> Result<Option<Trusted>, TrustError> {
    let failed = |source| TrustError::State { action: "read", path: path.to_owned(), source };
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Whole or not at all.
fn write(path: &Path, trusted: &Trusted) -> Result<(), TrustError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let write = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut file, trusted)?;
        file.write_all(b"\n")?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|refused| refused.error).map(drop)
    };
    write().map_err(|source| TrustError::State { action: "write", path: path.to_owned(), source })
}
