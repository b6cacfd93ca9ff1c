//! What the store shows, held against what it has shown this host before.
//!
//! **Container keys** say who made a key: whoever can seal under one belongs to the owner's side. A host trusts the first
//! container key that it sees, and any earlier or later one that proofs connect with it. The store says which epoch is
//! current, and the store is not trusted: it could bring back an epoch from before a host was withdrawn, or put in a key of
//! its own. So a host remembers epoch and fingerprint of the last key that it trusted, and never seals under an earlier one.
//!
//! **Keys**: an older form of a key opens the same volume, but for recipients that may have been withdrawn since. A host that
//! has seen a later generation refuses it, whether the store lies or one of its replicas missed something.
//!
//! Nothing of that is written down before the key has done its work ([`Seen`]): a lie ends with the lie.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::Container;
use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{ContainerKeyId, Epoch, KeyId, KeyReference, StoreName},
    },
    config::Config,
    keys::{seal::ContainerKey, store::StoreError},
    sys::state::{self, StateError},
    unlock::Error,
};

/// A generation this far beyond the last one is no re-sealing: rotated daily, a key takes 27 years for it.
const LONGEST_JUMP: u64 = 10_000;

/// What vouches for the maker of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Author {
    /// A container key that this host trusts.
    Container,
    /// Nobody: this host knows the digest of the volume key ([`Pin`](crate::unlock::pins::Pin)), and no other key fits it.
    Pinned,
}

/// What a host learns of container keys from a key that has done its work.
#[derive(Debug)]
pub(super) enum Learned {
    /// Nothing, and nothing of the key's generation either: who seals the right volume key under another container key, or under
    /// an old one, may be a host that was removed.
    Nothing,
    /// That the one it trusts is the current one still.
    AsKnown,
    /// A later one, or its first.
    Later(Trusted),
}

/// What a host remembers of a key once that has done its work.
#[derive(Debug, Default)]
pub(in crate::unlock) struct Seen {
    generation: Option<(KeyId, u64)>,
    container_key: Option<Trusted>,
}

/// The file `containers/NAME` of the state directory.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Trusted {
    epoch: Epoch,
    fingerprint: String,
    /// Whom this machine has made it for, if it has; nobody else was given it here since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made_for: Option<String>,
}

impl Trusted {
    fn of(key: &ContainerKey, made_for: Option<String>) -> Result<Self, Error> {
        Ok(Self { epoch: key.epoch(), fingerprint: key.fingerprint()?, made_for })
    }
}

/// The store shows what this host knows better.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The store went back to an older one.
    #[error("the store says that {id} is the current container key, but this host has trusted epoch {trusted}")]
    Older {
        /// What the store says.
        id: ContainerKeyId,
        /// What this host knows.
        trusted: Epoch,
    },
    /// It is another one of the same number.
    #[error("the container key {id} has the fingerprint {is}; expected {trusted}, which this host trusts")]
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
        "cannot check that the container key {id} follows from epoch {trusted}, which this host trusts: the store no longer has that epoch"
    )]
    Gone {
        /// What the store says.
        id: ContainerKeyId,
        /// What this host knows.
        trusted: Epoch,
    },
    /// The store says that the container never had one.
    #[error("the store has no container key for '{container}', but this host has trusted epoch {trusted}")]
    NoneLeft {
        container: StoreName,
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
    /// The generation is beyond what re-sealing can have made of it.
    #[error(
        "the store gives generation {is} of the key {key}; this host has seen generation {seen}, too far back for it"
    )]
    Jump {
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
            | Self::NoneLeft { .. }
            | Self::OldGeneration { .. }
            | Self::Jump { .. } => Exit::KeyRefused,
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
            Self::NoneLeft { container, .. } => format!(
                "check that this is the right store, and that it is mounted; if it is meant to begin anew, or another \
                 configuration's store had that name: cryptattach container create {container}"
            )
            .into(),
            Self::Jump { .. } => "restore this key from a replica or backup of the key store".into(),
            Self::Older { id, .. } | Self::Another { id, .. } | Self::Unproven(id) | Self::Gone { id, .. } => format!(
                "if the administrator of the keys says that this key's fingerprint is right ('cryptattach container show'), remove \
                 containers/{container} from the state directory; if another configuration has a store '{container}', give this \
                 one a state directory of its own (state = \"DIR\")",
                container = id.container
            )
            .into(),
        })
    }
}

fn trusted(state: &Path, name: &StoreName) -> PathBuf {
    state.join("containers").join(name.as_str())
}

/// Forgets which container key this host trusts of a store that is no more.
pub fn forget(config: &Config, name: &StoreName) -> Result<(), Error> {
    state::remove(&trusted(&config.state, name)).map_err(TrustError::from)?;
    Ok(())
}

impl Container {
    /// The key of this epoch, if it is one that this host may seal under.
    pub(super) fn trusted_key(&self, epoch: Epoch) -> Result<Arc<ContainerKey>, Error> {
        let key = self.container_key(epoch)?;
        match self.known()? {
            Some(known) if known.epoch > epoch => {
                Err(TrustError::Older { id: self.key_id(epoch), trusted: known.epoch }.into())
            }
            known => self.connect(&key, known).map(|_| key),
        }
    }

    /// Connects a key with the one that this host trusts. One that opens a volume that this host has opened before need not be
    /// connected.
    pub(super) fn learn(&self, key: &ContainerKey, author: Author) -> Result<Learned, Error> {
        let known = match author {
            Author::Container => self.known()?,
            Author::Pinned => self.known().ok().flatten(),
        };
        let is_old = known.as_ref().is_some_and(|known| key.epoch() < known.epoch);
        let connected = match (author, known) {
            (Author::Container, known) => self.connect(key, known)?,
            (Author::Pinned, known @ Some(_)) if !is_old => match self.connect(key, known) {
                Ok(connected) => connected,
                Err(_) => return Ok(Learned::Nothing),
            },
            (Author::Pinned, _) => return Ok(Learned::Nothing),
        };
        Ok(match connected {
            _ if is_old => Learned::Nothing,
            None => Learned::AsKnown,
            Some(later) => Learned::Later(later),
        })
    }

    /// What to trust from now on, if that is another key than the one that is known.
    fn connect(&self, key: &ContainerKey, known: Option<Trusted>) -> Result<Option<Trusted>, Error> {
        let now = Trusted::of(key, None)?;
        match known {
            Some(known) if known.epoch == now.epoch && known.fingerprint == now.fingerprint => Ok(None),
            Some(known) if known.epoch < now.epoch => self.follow(&known, now.epoch).map(|()| Some(now)),
            Some(known) => self.lead(key.epoch(), &known).map(|()| None),
            None => {
                tracing::warn!(
                    "trusting the container key {} for the first time on this host; its fingerprint is {}",
                    self.key_id(now.epoch),
                    now.fingerprint
                );
                Ok(Some(now))
            }
        }
    }

    /// Goes from the key that is known to a later one, proof by proof.
    fn follow(&self, known: &Trusted, epoch: Epoch) -> Result<(), Error> {
        let key = self.container_key(known.epoch).map_err(|error| match error {
            Error::Store(StoreError::NotFound { .. }) => {
                TrustError::Gone { id: self.key_id(epoch), trusted: known.epoch }.into()
            }
            other => other,
        })?;
        self.is_trusted(&key, known)?;
        self.walk(key, epoch).map(drop)
    }

    /// Goes from an earlier key to the one that is known, proof by proof.
    fn lead(&self, epoch: Epoch, known: &Trusted) -> Result<(), Error> {
        let last = self.walk(self.container_key(epoch)?, known.epoch)?;
        self.is_trusted(&last, known)
    }

    fn walk(&self, mut key: Arc<ContainerKey>, to: Epoch) -> Result<Arc<ContainerKey>, Error> {
        while key.epoch() < to {
            let next = self.container_key(key.epoch().next())?;
            if !next.follows(&key)? {
                return Err(TrustError::Unproven(self.key_id(next.epoch())).into());
            }
            key = next;
        }
        Ok(key)
    }

    fn is_trusted(&self, key: &ContainerKey, known: &Trusted) -> Result<(), Error> {
        let is = key.fingerprint()?;
        if is == known.fingerprint {
            return Ok(());
        }
        Err(TrustError::Another { id: self.key_id(known.epoch), is, trusted: known.fingerprint.clone() }.into())
    }

    /// Whether it is the very one that this host trusts.
    pub(super) fn is_the_trusted(&self, key: &ContainerKey) -> bool {
        let known = self.known().ok().flatten().filter(|known| known.epoch == key.epoch());
        known.is_some_and(|known| key.fingerprint().is_ok_and(|is| is == known.fingerprint))
    }

    /// The latest container key that this host has trusted.
    pub(super) fn trusted_epoch(&self) -> Result<Option<Epoch>, Error> {
        Ok(self.known()?.map(|known| known.epoch))
    }

    fn known(&self) -> Result<Option<Trusted>, Error> {
        Ok(state::read(&self.trusted()).map_err(TrustError::from)?)
    }

    /// What to remember of a key of this generation. It must not be older than one that this host has seen.
    pub(super) fn see(&self, key: &KeyId, is: u64, learned: Learned) -> Result<Seen, Error> {
        let seen = self.seen_generation(key)?;
        let reference = || self.reference(*key);
        if is < seen {
            return Err(TrustError::OldGeneration { key: reference(), is, seen }.into());
        }
        if is - seen > LONGEST_JUMP {
            return Err(TrustError::Jump { key: reference(), is, seen }.into());
        }
        let container_key = match learned {
            Learned::Nothing => return Ok(Seen::default()),
            Learned::AsKnown => None,
            Learned::Later(later) => Some(later),
        };
        // The first generation needs no memory.
        Ok(Seen { generation: (is > seen).then_some((*key, is)), container_key })
    }

    /// Remembers what a key has shown that has done its work. A volume must not stay closed because this host cannot remember.
    pub(in crate::unlock) fn remember(&self, seen: Seen) {
        let Seen { generation, container_key } = seen;
        let generation = generation.map(|(key, is)| state::write(&self.generation(&key), &is));
        let container_key = container_key.map(|trusted| state::write(&self.trusted(), &trusted));
        for error in [generation, container_key].into_iter().flatten().filter_map(Result::err) {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// Remembers what this host has written of a key: a store must not take that back.
    pub(super) fn remember_written(&self, key: &KeyId, generation: u64) {
        self.remember(Seen { generation: Some((*key, generation)), container_key: None });
    }

    /// The latest generation of a key that this host has seen.
    pub(super) fn seen_generation(&self, key: &KeyId) -> Result<u64, TrustError> {
        Ok(state::read(&self.generation(key))?.unwrap_or(1))
    }

    fn generation(&self, key: &KeyId) -> PathBuf {
        self.state.join("generations").join(self.name.as_str()).join(key.to_string())
    }

    fn trusted(&self) -> PathBuf {
        trusted(&self.state, &self.name)
    }

    /// Trusts a key from now on.
    pub(super) fn trust(&self, key: &ContainerKey, made_for: Option<String>) -> Result<(), Error> {
        Ok(state::write(&self.trusted(), &Trusted::of(key, made_for)?).map_err(TrustError::from)?)
    }

    /// Trusts a key that something was sealed under: from now on nothing is sealed under an earlier one.
    pub(super) fn has_sealed_under(&self, key: &ContainerKey) -> Result<(), Error> {
        match self.known()? {
            Some(known) if known.epoch >= key.epoch() => Ok(()),
            _ => self.trust(key, None),
        }
    }

    /// Whether this machine has made a key for those whom it would be made for now.
    pub(super) fn has_made(&self, key: &ContainerKey) -> Result<bool, Error> {
        let made_for = self.known()?.filter(|known| known.epoch == key.epoch()).and_then(|known| known.made_for);
        Ok(made_for == Some(self.whom_for(key)?))
    }

    /// A key is now for others than this machine has made it for.
    pub(super) fn has_not_made(&self, epoch: Epoch) -> Result<(), Error> {
        match self.known()? {
            Some(known) if known.epoch == epoch && known.made_for.is_some() => {
                let known = Trusted { made_for: None, ..known };
                Ok(state::write(&self.trusted(), &known).map_err(TrustError::from)?)
            }
            _ => Ok(()),
        }
    }
}
