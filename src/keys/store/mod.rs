//! Key stores: dictionaries from key id to sealed key.
//!
//! A store is not trusted: it keeps only sealed keys, and what it answers is checked against what was asked. The one
//! exception is Barbican with keys that other programs put there: those it keeps, and gives out, unsealed.

use std::{borrow::Cow, path::PathBuf, sync::Arc};

mod bao;
mod barbican;
mod cloud;
mod consumers;
mod directory;
mod kind;
#[cfg(test)]
pub(crate) mod memory;
pub mod pem;
mod swift;
mod tpm_nv;

pub use bao::Found as BaoFound;
pub use barbican::Barbican;
pub use cloud::SYSTEM_AUTHORITIES;
pub use consumers::Consumers;
pub use directory::Directory;
pub use kind::{Access, Facts, Kind, Server, StoreType, check, kind, with_host_keys};
pub use swift::{MalformedEndpoints, Swift, parse_endpoints};
pub use tpm_nv::{NvError, Value as NvValue};

use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{
            Epoch, HostName, KeyId, MalformedSealedKey, ManagedObject, ObjectFacts, Place, Ring, SealedKey,
            SecretMemoryError, StoreName,
        },
    },
    config::{ConfigError, StoreConfig},
    keys::net::{AuthError, Caller, SendError, bao::BaoError},
};

/// A dictionary from key id to sealed key.
///
/// A key id names one volume key for ever. Re-sealing replaces a sealed key by one of the same volume key for other
/// recipients; a new volume key gets a new id. So no store needs compare-and-swap.
pub trait KeyStore: Consumers + Send + Sync {
    /// An id for a new key.
    fn new_id(&self) -> Result<KeyId, StoreError> {
        Ok(KeyId::random())
    }
    /// Whether it stores a new key under any id that is free, too: that of the same key in another store.
    fn takes_any_id(&self) -> bool {
        true
    }
    /// Gives an id of [`KeyStore::new_id`] back under which nothing was stored.
    fn abandon(&self, _: &KeyId) {}
    /// The key with this id.
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError>;
    /// Stores a new key durably under an id of [`KeyStore::new_id`]; never overwrites.
    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError>;
    /// Replaces an existing key by its re-sealed form: same volume key, other recipients.
    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError>;
    /// Deletes a key: its volume's data can never be read again (crypto-shred).
    fn delete(&self, id: &KeyId) -> Result<(), StoreError>;
    /// Whether the key is gone from wherever the store can look: a deletion that only some replicas have heard of is none.
    fn is_gone(&self, id: &KeyId) -> Result<bool, StoreError> {
        let gone = match self.get(id) {
            Err(gone @ StoreError::NotFound { .. }) => gone,
            found => return found.map(|_| false),
        };
        // The place where a disk is not mounted has no keys either.
        match self.container_keys().map(ContainerKeys::current).transpose()? {
            Some(None) => Err(StoreError::Vacant(gone.to_string())),
            _ => Ok(true),
        }
    }
    /// The ids of all keys, in order.
    fn list(&self) -> Result<Vec<KeyId>, StoreError>;
    /// Where the bytes of a key rest, or would rest.
    fn places(&self, id: &KeyId) -> Result<Vec<Place>, StoreError>;
    /// From now on all that is asked of the store is one phase, with one limit in time.
    fn as_one(&mut self) {}
    /// From now on it may go on with what earlier processes of this boot have had of it, and leaves that to later ones.
    fn warm(&mut self) {}
    /// What the store says of where its replicas of a key are, and with `rows`, those of the rows that list all keys.
    fn rings(&self, _: &KeyId, _rows: bool) -> Result<Vec<RingAnswer>, StoreError> {
        Ok(Vec::new())
    }
    /// The keys that the container's keys are sealed under, if this kind of store has such.
    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        None
    }
    /// The lockbox keys of hosts, if this kind of store keeps such.
    fn host_keys(&self) -> Option<&dyn HostKeys> {
        None
    }
    /// What is known of a key that the store keeps unsealed, without fetching its value; `None` if the key is sealed.
    fn released_facts(&self, _: &KeyId) -> Result<Option<ObjectFacts>, StoreError> {
        Ok(None)
    }
    /// Notes what a key that the store keeps unsealed was used for, and the volume that is being filled. What is noted already
    /// stays, unless that volume was being filled. The key is fresh no longer.
    fn mark_used(&self, id: &KeyId, _: &str, _filling: Option<&str>) -> Result<(), StoreError> {
        Err(StoreError::NotFound { id: id.to_string(), at: "a store of sealed keys, unsealed".to_owned() })
    }
    /// The objects that the store itself keeps unsealed, if this kind of store does that.
    fn objects(&self) -> Option<&dyn ObjectStore> {
        None
    }
}

/// The answer of Swift's list_endpoints middleware for one ring.
pub struct RingAnswer {
    /// Which ring.
    pub ring: Ring,
    /// The answer, JSON; or in words why there is none.
    pub answer: Result<Vec<u8>, String>,
}

/// What is stored under a key's id.
pub enum Stored {
    /// A sealed key.
    Sealed(SealedKey),
    /// A key that the store has released unsealed.
    Released(Released),
}

/// A key that the store keeps unsealed.
pub struct Released {
    pub object: ManagedObject,
    /// What it was used for, in words; `None` if it was for nothing, as far as the store knows. See [`ObjectFacts::fresh`].
    pub used_for: Option<String>,
}

/// What a container says of its container keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Current {
    /// The number of the key that new keys are sealed under.
    pub epoch: Epoch,
    /// Keys are being sealed anew under it.
    pub rotating: bool,
}

/// Container keys: one key-encryption key per epoch, each an object of its own.
pub trait ContainerKeys {
    /// The key that new keys are sealed under; `None` if the container has none.
    fn current(&self) -> Result<Option<Current>, StoreError>;
    /// Makes a key the current one. The fingerprint is for people to compare.
    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError>;
    /// A container key, sealed.
    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError>;
    /// Stores a new container key; never overwrites.
    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError>;
    /// Replaces a container key by its re-sealed form: same key, other recipients, a later generation.
    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError>;
    /// Deletes a container key: what is still sealed under it can never be opened again.
    fn delete(&self, epoch: Epoch) -> Result<(), StoreError>;
    /// All epochs that have a key, in order.
    fn epochs(&self) -> Result<Vec<Epoch>, StoreError>;
}

/// Lockbox keys: one per host, each an object of its own, sealed to that host's identity.
pub trait HostKeys {
    /// A host's lockbox key, sealed. `NotFound` says that the host is not admitted, or no longer.
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError>;
    /// Stores the lockbox key of a new host; never overwrites.
    fn create(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError>;
    /// Replaces a host's lockbox key by one of a later generation.
    fn replace(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError>;
    /// Deletes a host's lockbox key: the host opens nothing at its next boot.
    fn delete(&self, host: &HostName) -> Result<(), StoreError>;
    /// All hosts that have one, in order.
    fn hosts(&self) -> Result<Vec<HostName>, StoreError>;
    /// Where a host that asks to join and its administrator leave letters for each other, if it has room for that.
    fn letters(&self) -> Option<&dyn Letters> {
        None
    }
}

/// Small texts that are neither secret nor trusted, by names such as `join/compute-7.request`.
pub trait Letters {
    /// What stands there, if anything does.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError>;
    /// Puts it there, in place of what stood there.
    fn put(&self, name: &str, text: &[u8]) -> Result<(), StoreError>;
}

/// Objects that a store keeps unsealed.
pub trait ObjectStore {
    /// Has the store make a symmetric key, and marks it as fresh.
    fn order(&self, facts: &ObjectFacts) -> Result<KeyId, StoreError>;
    /// Stores an object.
    fn create(&self, object: &ManagedObject) -> Result<KeyId, StoreError>;
}

/// The most names of a listing, on all its pages together: a store that makes new ones up would never end.
const MOST_NAMES: usize = 1_000_000;

/// The kinds of stores.
const KINDS: &[StoreType] = &[directory::TYPE, swift::TYPE, barbican::TYPE, tpm_nv::TYPE, bao::TYPE];

/// The store of a kind that a part of the configuration describes; `caller` is what a hook's caller brings.
pub fn open(
    kind: &dyn Kind,
    name: &StoreName,
    config: &StoreConfig,
    caller: Option<Arc<Caller>>,
) -> Result<Box<dyn KeyStore>, StoreError> {
    #[cfg(test)]
    if let Some(store) = memory::Memory::named(name) {
        return Ok(Box::new(store));
    }
    kind.open(name, config, caller)
}

/// A store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no key of that id.
    #[error("there is no key {id} in {at}")]
    NotFound { id: String, at: String },
    /// A key has no such consumer.
    #[error("the key {id} has no consumer '{consumer}'")]
    NoConsumer { id: String, consumer: String },
    /// There is a key of that id already.
    #[error("{at} already has another key {id}")]
    Exists { id: String, at: String },
    /// The store has a newer generation than the one given to replace it.
    #[error("key {id} has been re-sealed meanwhile (generation {generation})")]
    Outdated {
        id: String,
        /// The generation in the store.
        generation: u64,
    },
    /// What was found under that id is no sealed key.
    #[error("{what} is not the requested sealed key")]
    Malformed {
        what: String,
        #[source]
        source: MalformedSealedKey,
    },
    /// A directory cannot be read or written.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// "read", "write", ...
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The cloud's configuration, before anything is sent.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// A server cannot be reached, or logged in to.
    #[error("cannot {action} {at}")]
    Unreachable {
        /// "read from", "write to", ...
        action: &'static str,
        at: String,
        #[source]
        source: Box<SendError>,
    },
    /// The store does not let this user do that.
    #[error("this user may not {action} {at}")]
    Denied {
        /// "read from", "write to", ...
        action: &'static str,
        at: String,
    },
    /// Likewise, and it says why.
    #[error("{at} refuses to let this user {action} it: {said}")]
    Refused {
        /// "read from", "write to", ...
        action: &'static str,
        at: String,
        /// What it says.
        said: String,
        /// What helps in this kind of store.
        hint: &'static str,
    },
    /// The container is not there.
    #[error("{at} does not exist")]
    NoContainer { at: String },
    /// It does not have the key, and nothing that a container has.
    #[error("{0}, but there is no container either")]
    Vacant(String),
    /// The store answers, but not what was asked for.
    #[error("cannot {action} {at}: {what}")]
    Answer {
        /// "read from", "write to", ...
        action: &'static str,
        at: String,
        /// What it answers.
        what: String,
    },
    /// The TPM's NV memory.
    #[error(transparent)]
    Nv(#[from] NvError),
    /// OpenBao.
    #[error(transparent)]
    Bao(Box<BaoError>),
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl From<BaoError> for StoreError {
    fn from(error: BaoError) -> Self {
        Self::Bao(Box::new(error))
    }
}

impl StoreError {
    /// Whether the store does not let this user do that.
    pub fn is_denial(&self) -> bool {
        let of_bao = |error: &BaoError| matches!(error, BaoError::Denied { .. });
        matches!(self, Self::Denied { .. } | Self::Refused { .. }) || matches!(self, Self::Bao(error) if of_bao(error))
    }
}

impl Advice for StoreError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotFound { .. } | Self::NoConsumer { .. } => Exit::NoKey,
            Self::Exists { .. } | Self::Outdated { .. } => Exit::InTheWay,
            Self::Malformed { .. } => Exit::NoSealedKey,
            Self::Denied { .. } | Self::Refused { .. } => Exit::PermissionDenied,
            Self::NoContainer { .. } => Exit::Config,
            Self::Config(error) => error.exit(),
            Self::Auth(error) => error.exit(),
            Self::Unreachable { source, .. } => source.exit(),
            Self::Io { .. } | Self::Answer { .. } | Self::Vacant(_) => Exit::StoreUnavailable,
            Self::Nv(error) => error.exit(),
            Self::Bao(error) => error.exit(),
            Self::Memory(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::NotFound { .. } => {
                "check the store in the configuration; if the key was moved and this header is an older one: \
                 'cryptattach header restore --key' names the new place; a copy may be in a backup of the store"
            }
            Self::Malformed { .. } => "restore this key from a replica or backup of the key store",
            Self::Io { .. } | Self::Vacant(_) => {
                "check that the key store's device is present, mounted, and has free space"
            }
            Self::Denied { .. } => {
                "check the user with which the store's configuration logs in, and the container's access lists ('cryptattach container show')"
            }
            Self::Refused { hint, .. } => hint,
            Self::NoContainer { .. } => {
                "'cryptattach container create' makes one; check 'container' and 'cloud', or 'path', in the configuration"
            }
            Self::Auth(error) => return error.next_step(),
            Self::Config(error) => return error.next_step(),
            Self::Unreachable { source, .. } => return source.next_step(),
            Self::Answer { .. } => "the store's own log says more; -v shows every request",
            Self::Outdated { .. } => "run the command again: it starts from what is stored now",
            Self::Exists { .. } | Self::NoConsumer { .. } => return None,
            Self::Nv(error) => return error.next_step(),
            Self::Bao(error) => return error.next_step(),
            Self::Memory(error) => return error.next_step(),
        };
        Some(step.into())
    }
}
