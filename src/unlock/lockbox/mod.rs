//! The lockbox: this host's cache of keys, closed under the host's lockbox key.
//!
//! The lockbox key comes sealed from a key store, which can withdraw it, and opens with this host's identity only. Opened
//! once per boot, it stays in the kernel's keyring until power-off, and with it open all keys of this host's volumes: container
//! keys are sealed to the public key that is derived from it, and entries of the cache are closed under it. So volumes attach
//! when the store is out of reach, and one operation of a TPM serves a whole boot.
//!
//! Entries expire. That is a rule which this program keeps, not one that cryptography enforces: whoever has the lockbox key
//! and the disk reads expired entries as well, until they are gone.

mod admission;
mod entries;
mod latch;
mod opening;
mod seen;
mod status;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

pub use admission::{Admission, admit, withdraw};
pub use entries::{EntryError, NewEntry};
pub use opening::{Closed, LockboxKeyFrom, Opening, Unsealed};
pub use seen::last_seen;
pub use status::{EntryStatus, State, Status};

use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{HostName, LockboxKeyId, Place, SecretBytes, StoreName},
    },
    config::{Config, IdentitySpec, LockboxConfig},
    keys::{
        seal::{LockboxKey, SealError, identities},
        store::{self, StoreError},
        tpm::TpmError,
    },
    sys::{
        kernel_keyring::{self, KeyringError, KeyringKind},
        state::StateError,
    },
};

/// In the kernel's keyring: the generation, big-endian, and the key.
const KEPT_BYTES: usize = size_of::<u64>() + LockboxKey::BYTES;

/// This host's lockbox.
pub struct Lockbox {
    config: LockboxConfig,
    state: PathBuf,
    /// What the kernel's keyring has, looked at once.
    open: OnceLock<Option<(Arc<LockboxKey>, KeyringKind)>>,
}

impl Lockbox {
    /// The lockbox that is configured, if one is; nothing is looked at yet.
    pub fn of(config: &Config) -> Option<Self> {
        let lockbox = config.lockbox.clone()?;
        Some(Self { config: lockbox, state: config.state.to_path_buf(), open: OnceLock::new() })
    }

    /// The same with its key, which no kernel has to keep.
    #[cfg(test)]
    pub fn with_key(self, key: Arc<LockboxKey>) -> Self {
        Self { open: OnceLock::from(Some((key, KeyringKind::User))), ..self }
    }

    /// The lockbox that has to be configured.
    pub fn configured(config: &Config) -> Result<Self, LockboxError> {
        Self::of(config).ok_or_else(|| LockboxError::NotConfigured(config.path.clone()))
    }

    /// The host's name.
    pub fn host(&self) -> &HostName {
        &self.config.host
    }

    /// The lockbox key, if it is open.
    pub fn key(&self) -> Option<&Arc<LockboxKey>> {
        self.kept().map(|(key, _)| key)
    }

    /// The lockbox key, which has to be open.
    pub fn open_key(&self) -> Result<&Arc<LockboxKey>, LockboxError> {
        self.key().ok_or_else(|| LockboxError::Closed(self.config.host.clone()))
    }

    /// The places where this host keeps what the lockbox has, and what opens it.
    ///
    /// `asked` is the store of the key that is asked for, whose places are known besides.
    pub fn places(&self, config: &Config, asked: &StoreName) -> Result<Vec<Place>, LockboxError> {
        let own = &self.config;
        let mut places = vec![Place::path("lockbox entries", &*own.path, true)];
        places.extend(own.offline.then(|| Place::path("sealed lockbox key", own.offline_copy(&self.state), true)));
        let mut specs = own.identities.as_slice();
        if let Ok(other) = config.store(&own.store)
            && own.store != *asked
        {
            let kind = store::kind(other).map_err(StoreError::from)?;
            places.extend(kind.directory().map(|path| Place::path("sealed lockbox key", path, true)));
            specs = self.identities(config);
        }
        places.extend(identities::places(specs)?);
        Ok(places)
    }

    /// This host's private keys that open the lockbox key.
    fn identities<'a>(&'a self, config: &'a Config) -> &'a [IdentitySpec] {
        let of_store = config.store(&self.config.store).map(|store| store.sealing.identities.as_slice());
        if self.config.identities.is_empty() { of_store.unwrap_or_default() } else { &self.config.identities }
    }

    fn kept(&self) -> Option<&(Arc<LockboxKey>, KeyringKind)> {
        let look = || match self.look() {
            Ok(found) => found,
            // Nothing depends on the lockbox alone: what cannot be read counts as closed.
            Err(error) => {
                tracing::warn!("the lockbox counts as closed: {}", chain(&error));
                None
            }
        };
        self.open.get_or_init(look).as_ref()
    }

    fn look(&self) -> Result<Option<(Arc<LockboxKey>, KeyringKind)>, LockboxError> {
        let Some((kept, at)) = kernel_keyring::get(&self.description(), KEPT_BYTES)? else { return Ok(None) };
        let parts = kept.expose().split_first_chunk().filter(|_| kept.len() == KEPT_BYTES);
        let (generation, bytes) = parts.ok_or_else(|| LockboxError::Foreign(self.description()))?;
        let id = LockboxKeyId { host: self.config.host.clone(), generation: u64::from_be_bytes(*generation) };
        Ok(Some((Arc::new(LockboxKey::of(id, SecretBytes::copy_of(bytes)?)?), at)))
    }

    fn put(&self, key: &LockboxKey) -> Result<KeyringKind, LockboxError> {
        let mut kept = SecretBytes::zeroed(KEPT_BYTES)?;
        let (generation, bytes) = kept.expose_mut().split_at_mut(size_of::<u64>());
        generation.copy_from_slice(&key.id().generation.to_be_bytes());
        bytes.copy_from_slice(key.secret().expose());
        Ok(kernel_keyring::put(&self.description(), &kept)?)
    }

    fn description(&self) -> String {
        format!("cryptattach:lockbox:{}", self.config.host)
    }
}

/// "1 entry was removed", "3 entries were removed".
pub fn removed(entries: usize) -> String {
    match entries {
        1 => "1 entry was removed".to_owned(),
        _ => format!("{entries} entries were removed"),
    }
}

/// The lockbox cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LockboxError {
    /// The configuration has no lockbox.
    #[error("the configuration {} has no [lockbox]", .0.display())]
    NotConfigured(PathBuf),
    /// It is not open.
    #[error("the lockbox of '{0}' is closed")]
    Closed(HostName),
    /// The store's kind keeps no lockbox keys.
    #[error("the store '{0}' cannot keep lockbox keys: only a store of type {types} can", types = store::with_host_keys())]
    Unsupported(StoreName),
    /// The store's kind keeps no requests and answers of hosts.
    #[error("the store '{0}' keeps no requests and answers of hosts")]
    NoLetters(StoreName),
    /// The store has no lockbox key for this host.
    #[error(
        "the host '{host}' is not admitted, or was removed: the store '{store}' has no lockbox key for it; {closed}"
    )]
    Removed {
        host: HostName,
        store: StoreName,
        /// What was wiped for that.
        closed: Closed,
    },
    /// The store cannot be asked, and there is no copy that does instead.
    #[error("the lockbox key of '{host}' cannot be fetched, and {instead}")]
    Unreachable {
        host: HostName,
        /// Why there is no copy, in words.
        instead: String,
        #[source]
        source: Box<StoreError>,
    },
    /// The lockbox key does not open here.
    #[error("the lockbox key of '{host}' is refused")]
    Refused {
        host: HostName,
        #[source]
        source: SealError,
    },
    /// The TPM opened it in this boot, and PCR 15 was extended then.
    #[error(
        "the lockbox key of '{host}' was already opened in this boot: 'lockbox open' extended PCR 15 at {at}, so the \
         TPM opens it again only after the next power-on"
    )]
    Latched {
        host: HostName,
        at: String,
        /// What the TPM says.
        #[source]
        source: Box<SealError>,
    },
    /// It was closed again: the TPM would open it once more in this boot.
    #[error(
        "the lockbox of '{host}' was closed again: PCR 15 is not extended, so the TPM could open its key in this boot"
    )]
    NotLatched {
        host: HostName,
        #[source]
        source: TpmError,
    },
    /// The store went back to an older one.
    #[error("the store gives generation {is} of the lockbox key of '{host}'; this host has opened generation {seen}")]
    Older {
        host: HostName,
        /// What the store gives.
        is: u64,
        /// What this host has opened.
        seen: u64,
    },
    /// It is another one than the one that is trusted.
    #[error("the lockbox key of '{host}' has the fingerprint {is}; expected {trusted}")]
    Another {
        host: HostName,
        is: String,
        /// The one of the key that this host opened before, or that was given.
        trusted: String,
    },
    /// Its generation is the time at which it was made.
    #[error("the store gives a lockbox key of '{0}' that says it was made in the future")]
    OfTheFuture(HostName),
    /// What the store gave back is not what was stored.
    #[error("the store returned another lockbox key of '{0}' than the one stored")]
    ReadBack(HostName),
    /// Something that is not ours.
    #[error("the entry {0} of the kernel's keyring is not a lockbox key")]
    Foreign(String),
    /// A file cannot be read or written.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// "write", "remove", ...
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The kernel's keyring refuses.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// This host's memory cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Sealing, or an identity's file.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] crate::base::key::SecretMemoryError),
}

impl Advice for LockboxError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotConfigured(_) | Self::Unsupported(_) | Self::NoLetters(_) => Exit::Config,
            Self::Removed { .. } => Exit::NoKey,
            Self::Latched { .. } => Exit::Tpm,
            Self::NotLatched { source, .. } => source.exit(),
            Self::Refused { source, .. } | Self::Seal(source) => source.exit(),
            Self::Closed(_) | Self::Older { .. } | Self::Another { .. } | Self::OfTheFuture(_) => Exit::KeyRefused,
            Self::ReadBack(_) => Exit::NoSealedKey,
            Self::Unreachable { source, .. } => source.exit(),
            Self::Store(error) => error.exit(),
            Self::Foreign(_) => Exit::System,
            Self::Keyring(error) => error.exit(),
            Self::Memory(error) => error.exit(),
            Self::State(error) => error.exit(),
            Self::Io { .. } => Exit::Io,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::NotConfigured(_) => {
                "name this host and the store of its lockbox key: [lockbox] host = \"NAME\", store = \"STORE\"".into()
            }
            Self::Closed(_) => "'cryptattach lockbox open' opens it".into(),
            Self::Removed { .. } => {
                "if this host should open keys again, the administrator of the keys must admit it".into()
            }
            Self::Unreachable { source, .. } => return source.next_step(),
            Self::Store(error) => return error.next_step(),
            Self::Refused { source: SealError::NotForUs { .. }, .. } => {
                "check 'identities' in [lockbox]; the administrator must admit a host with a new identity again".into()
            }
            Self::Refused { source, .. } | Self::Seal(source) => return source.next_step(),
            Self::Latched { .. } => {
                "power the machine off and on; until then the owner's or the escrow's key opens this host's volumes".into()
            }
            Self::NotLatched { .. } => {
                "run 'cryptattach lockbox open' again; if that fails as well, find out what sits between this machine and its TPM".into()
            }
            Self::Another { is, .. } => format!(
                "if the administrator who admitted this host says that this fingerprint is right: cryptattach lockbox open \
                 --fingerprint {is}"
            )
            .into(),
            Self::Older { .. } => "try again when all of the store's replicas run; the store may lie".into(),
            Self::OfTheFuture(host) => format!(
                "check this machine's clock; if it is right, the store lies or was written to: cryptattach host remove {host}, \
                 then admit it again"
            )
            .into(),
            Self::State(error) => return error.next_step(),
            Self::Io { .. } => "check 'path' in [lockbox], and that its device is present and has free space".into(),
            Self::Unsupported(_) => "name another 'store' in [lockbox]".into(),
            Self::NoLetters(_) => "carry the request and the answer as files: without --store".into(),
            Self::ReadBack(_) | Self::Foreign(_) => return None,
            Self::Keyring(error) => return error.next_step(),
            Self::Memory(error) => return error.next_step(),
        })
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LockboxError {
    let path = path.to_owned();
    move |source| LockboxError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn places(lockbox: &str, asked: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        let store = "type = 'directory'\npath = 'k'\nowner = 'o.pem'\nno_escrow = true\nidentities = ['o.key']\n";
        let stores = format!("[stores.cinder]\n{store}[stores.glance]\n{store}");
        fs::write(&path, format!("{stores}[lockbox]\nhost = 'compute-7'\nstore = 'cinder'\n{lockbox}")).unwrap();
        let config = Config::read(&path).unwrap();
        let places = Lockbox::of(&config).unwrap().places(&config, &asked.parse().unwrap()).unwrap();
        places.into_iter().map(|place| place.what).collect()
    }

    #[test]
    fn of_another_store_than_the_keys_its_directory_and_its_keys_count() {
        let own = "identities = ['tpm:host.tpm.pem']\noffline = true\n";
        assert_eq!(places(own, "cinder"), ["lockbox entries", "sealed lockbox key", "TPM key"]);
        assert_eq!(places("", "cinder"), ["lockbox entries"]);
        assert_eq!(places("", "glance"), ["lockbox entries", "sealed lockbox key", "private key"]);
    }
}
