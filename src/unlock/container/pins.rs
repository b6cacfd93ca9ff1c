//! What the store shows, held against what it has shown this host before.
//!
//! **Container keys**: a host trusts the first container key that it sees, and any later one whose proof chain starts there.
//! The store says which epoch is current, and the store is not trusted: it could bring back an epoch from before a host was
//! withdrawn, or put in a key of its own. So a host remembers epoch and fingerprint of the last key that it sealed under. It
//! goes forward over proofs only, and never back.
//!
//! **Keys**: an older form of a key opens the same volume, but for recipients that may have been withdrawn since. A host that
//! has seen a later generation refuses it, whether the store lies or one of its replicas missed something.

use std::{borrow::Cow, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use super::Container;
use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{ContainerKeyId, Epoch, KeyId, KeyReference},
    },
    keys::{seal::ContainerKey, store::StoreError},
    sys::state::{self, StateError},
    unlock::Error,
};

/// The file `containers/NAME` of the state directory.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Trusted {
    epoch: Epoch,
    fingerprint: String,
}

/// The store shows what this host knows better.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The store went back to an older one.
    #[error("the store says that {id} is the current container key, but this host has sealed under epoch {trusted}")]
    Older {
        /// What the store says.
        id: ContainerKeyId,
        /// What this host knows.
        trusted: Epoch,
    },
    /// It is another one of the same number.
    #[error("the container key {id} has the fingerprint {is}; expected {trusted}, under which this host has sealed")]
    Another {
        id: ContainerKeyId,
        is: String,
        /// What this host knows.
        trusted: String,
    },
    /// It has no proof by the one before it.
    #[error("the container key {0} has no proof by the key before it")]
    Unproven(ContainerKeyId),
    /// The one that this host knows is gone, and the proofs with it.
    #[error(
        "cannot check that the container key {id} follows from epoch {trusted}, under which this host has sealed: the store no longer has that epoch"
    )]
    Gone {
        /// What the store says.
        id: ContainerKeyId,
        /// What this host knows.
        trusted: Epoch,
    },
    /// The store gives an older form of a key than it did before.
    #[error("the store gives generation {is} of the key {key}; this host has seen generation {seen}")]
    OldGeneration {
        key: KeyReference,
        /// What it gives.
        is: u64,
        /// What this host has seen.
        seen: u64,
    },
    /// This host's memory cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
}

impl Advice for TrustError {
    fn exit(&self) -> Exit {
        match self {
            Self::State(error) => error.exit(),
            Self::Older { .. }
            | Self::Another { .. }
            | Self::Unproven(_)
            | Self::Gone { .. }
            | Self::OldGeneration { .. } => Exit::KeyRefused,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::State(error) => return error.next_step(),
            Self::OldGeneration { key, .. } => format!(
                "try again when all of the store's replicas run; if the store was restored from a backup, remove \
                 generations/{key} from the state directory"
            )
            .into(),
            Self::Older { .. } | Self::Another { .. } | Self::Unproven(_) | Self::Gone { .. } => {
                "if the administrator of the keys says that this key's fingerprint is right ('cryptattach container show'), remove the container's file from the state directory".into()
            }
        })
    }
}

impl Container {
    /// The key of this epoch, if it is one that this host may seal under.
    pub(super) fn trusted_key(&self, epoch: Epoch) -> Result<Arc<ContainerKey>, Error> {
        let key = self.container_key(epoch)?;
        let now = Trusted { epoch, fingerprint: key.fingerprint()? };
        let id = |epoch| ContainerKeyId { container: self.name.clone(), epoch };
        match state::read::<Trusted>(&self.trusted()).map_err(TrustError::from)? {
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
        state::write(&self.trusted(), &now).map_err(TrustError::from)?;
        Ok(key)
    }

    /// Goes from the key that is known to a later one, proof by proof.
    fn follow(&self, known: &Trusted, epoch: Epoch) -> Result<(), Error> {
        let id = |epoch| ContainerKeyId { container: self.name.clone(), epoch };
        let mut key = self.container_key(known.epoch).map_err(|error| match error {
            Error::Store(StoreError::NotFound { .. }) => {
                TrustError::Gone { id: id(epoch), trusted: known.epoch }.into()
            }
            other => other,
        })?;
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

    /// The generation of a key that the store gives must not be older than one that this host has seen.
    pub(super) fn check_generation(&self, key: &KeyId, is: u64) -> Result<(), Error> {
        let seen = self.seen_generation(key)?;
        if is < seen {
            return Err(TrustError::OldGeneration { key: self.reference(*key), is, seen }.into());
        }
        // The first generation needs no memory. Nor must a volume stay closed because this host cannot remember.
        if is > seen
            && let Err(error) = state::write(&self.generation(key), &is)
        {
            tracing::warn!("{}", chain(&error));
        }
        Ok(())
    }

    /// The latest generation of a key that this host has seen.
    pub(super) fn seen_generation(&self, key: &KeyId) -> Result<u64, TrustError> {
        Ok(state::read(&self.generation(key))?.unwrap_or(1))
    }

    fn generation(&self, key: &KeyId) -> PathBuf {
        self.state.join("generations").join(self.name.as_str()).join(key.to_string())
    }

    fn trusted(&self) -> PathBuf {
        self.state.join("containers").join(self.name.as_str())
    }

    /// Trusts a key that this host has made.
    pub(super) fn trust(&self, key: &ContainerKey) -> Result<(), Error> {
        let trusted = Trusted { epoch: key.epoch(), fingerprint: key.fingerprint()? };
        Ok(state::write(&self.trusted(), &trusted).map_err(TrustError::from)?)
    }
}
