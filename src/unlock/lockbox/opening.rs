//! Opening the lockbox, once per boot, and closing it.

use std::{fmt, fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{Lockbox, LockboxError, io_error, removed};
use crate::{
    base::{
        chain::chain,
        key::{LockboxKeyId, SealedKey},
    },
    config::{Config, LockboxConfig},
    keys::{
        seal::{Identities, LockboxKey},
        store::{self, StoreError},
    },
    sys::{
        kernel_keyring::{self, KeyringKind},
        state,
    },
};

/// What opening the lockbox did.
#[derive(Debug, Serialize)]
pub struct Opening {
    /// The lockbox key's generation.
    pub generation: u64,
    /// Its fingerprint, for people to compare with what the administrator was told at admission.
    pub fingerprint: String,
    /// Where the sealed lockbox key came from; `None` if it was open already and the store was out of reach.
    pub from: Option<LockboxKeyFrom>,
    /// Where the opened one is kept.
    pub kept: KeyringKind,
    /// It was open already.
    pub already_open: bool,
    /// PCR 15 has been extended: the TPM does not open it again in this boot.
    pub latched: bool,
    /// Entries that were removed: expired, damaged, or of another lockbox key.
    pub swept: usize,
}

/// The lockbox key, as this host's identity has opened it.
pub struct Unsealed {
    /// None if the kernel's keyring has it already.
    new: Option<LockboxKey>,
    from: Option<LockboxKeyFrom>,
}

/// Where a sealed lockbox key came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockboxKeyFrom {
    /// The store.
    Store,
    /// The copy on this host: the store was out of reach.
    Copy,
}

/// What closing the lockbox removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Closed {
    pub was_open: bool,
    /// Entries.
    pub entries: usize,
    /// The copy of the sealed lockbox key.
    pub copy: bool,
}

/// The file `host/NAME.json` of the state directory: the lockbox key that this host has opened.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Trusted {
    generation: u64,
    fingerprint: String,
}

impl Lockbox {
    /// Fetches this host's lockbox key, opens it with this host's identity and keeps it until power-off.
    ///
    /// The first one is taken on trust, and its fingerprint is said aloud: whoever can write to the store can seal a key to
    /// this host's identity. From then on another one is refused, unless `fingerprint` says that it is the right one.
    ///
    /// If the identity is in the TPM, PCR 15 is extended then (`latch` in `[tpm]`).
    pub fn open(&self, config: &Config, fingerprint: Option<&str>) -> Result<Opening, LockboxError> {
        let opening = self.keep(self.unseal(config, fingerprint)?)?;
        self.latch(config, opening)
    }

    /// Fetches this host's lockbox key and opens it with this host's identity; the kernel does not have it yet.
    pub fn unseal(&self, config: &Config, fingerprint: Option<&str>) -> Result<Unsealed, LockboxError> {
        let open_already = self.kept();
        let (sealed, from) = match self.fetch(config) {
            // Nothing is needed of it, and this boot's TPM might not open it again.
            Err(LockboxError::Unreachable { source, .. }) if open_already.is_some() => {
                tracing::warn!("cannot ask the store whether this host is still admitted: {}", chain(&*source));
                return Ok(Unsealed { new: None, from: None });
            }
            fetched => fetched?,
        };
        // What it claims is enough here: nothing is opened with it.
        let is_open = |key: &LockboxKey| sealed.claimed_generation().is_ok_and(|is| is == key.id().generation);
        if let Some((key, _)) = open_already.filter(|(key, _)| is_open(key)) {
            self.trust(key, fingerprint)?;
            self.keep_copy(&sealed, false)?;
            return Ok(Unsealed { new: None, from: Some(from) });
        }
        let identities = Identities::read(self.identities(config), &config.tpm)?;
        let key = LockboxKey::open(&sealed, &identities, &self.config.host).map_err(|error| self.refused(error))?;
        self.trust(&key, fingerprint)?;
        self.keep_copy(&sealed, true)?;
        Ok(Unsealed { new: Some(key), from: Some(from) })
    }

    /// Keeps the lockbox key in the kernel's keyring until power-off. Whoever calls this sees to the latch.
    pub fn keep(&self, unsealed: Unsealed) -> Result<Opening, LockboxError> {
        let Unsealed { new, from } = unsealed;
        let already_open = new.is_none();
        if let Some(key) = new {
            self.put(&key)?;
        }
        // Looked at afresh: what is said next is what the kernel has.
        let now = Self { config: self.config.clone(), state: self.state.clone(), open: Default::default() };
        let (key, kept) = now.kept().ok_or_else(|| LockboxError::Closed(self.config.host.clone()))?;
        let (generation, fingerprint) = (key.id().generation, key.fingerprint().to_owned());
        Ok(Opening { generation, fingerprint, from, kept: *kept, already_open, latched: false, swept: now.sweep()? })
    }

    /// Takes the lockbox key out of the kernel's keyring; whether it was there. Without it the entries open nothing.
    pub fn shut(&self) -> Result<bool, LockboxError> {
        Ok(kernel_keyring::remove(&self.description())?)
    }

    /// Takes the lockbox key out of the kernel's keyring and removes all entries.
    pub fn close(&self) -> Result<Closed, LockboxError> {
        Ok(Closed { was_open: self.shut()?, entries: self.forget_all()?, copy: false })
    }

    /// The sealed lockbox key, from the store, which knows whether this host is still admitted; or, if the store is out of
    /// reach and the site wants that, the copy.
    fn fetch(&self, config: &Config) -> Result<(SealedKey, LockboxKeyFrom), LockboxError> {
        let LockboxConfig { host, store: name, .. } = &self.config;
        let unreachable = |instead, source| {
            let (host, source) = (host.clone(), Box::new(source));
            LockboxError::Unreachable { host, instead, source }
        };
        let from_store = || {
            let Ok(store_config) = config.store(name) else { return Err(LockboxError::Unsupported(name.clone())) };
            let kind = store::kind(store_config).map_err(StoreError::from)?;
            let store = store::open(&*kind, name, store_config, None)?;
            let keys = store.host_keys().ok_or_else(|| LockboxError::Unsupported(name.clone()))?;
            Ok(keys.get(host)?)
        };
        match from_store() {
            Ok(sealed) => Ok((sealed, LockboxKeyFrom::Store)),
            Err(LockboxError::Store(StoreError::NotFound { .. })) => {
                let closed = self.close()?;
                let closed = Closed { copy: self.remove_copy()?, ..closed };
                Err(LockboxError::Removed { host: host.clone(), store: name.clone(), closed })
            }
            Err(LockboxError::Store(source)) if !self.config.offline => {
                Err(unreachable("no copy is kept on this host (offline = false)".to_owned(), source))
            }
            Err(LockboxError::Store(source)) => match self.copy() {
                Ok(sealed) => {
                    tracing::warn!("cannot reach the store; using this host's copy: {}", chain(&source));
                    Ok((sealed, LockboxKeyFrom::Copy))
                }
                Err(why) => Err(unreachable(why, source)),
            },
            Err(error) => Err(error),
        }
    }

    /// The copy on this host; or in words why there is none.
    fn copy(&self) -> Result<SealedKey, String> {
        let path = self.config.offline_copy(&self.state);
        let bytes = fs::read(&path).map_err(|error| format!("cannot read the copy {}: {error}", path.display()))?;
        SealedKey::from_json(&bytes)
            .map_err(|error| format!("the copy {} is damaged: {}", path.display(), chain(&error)))
    }

    /// Keeps the copy that the configuration wants, or removes the one that it does not want. What was not `opened` here may be
    /// anything that the store gave: it does not take the place of a copy of the same lockbox key.
    fn keep_copy(&self, sealed: &SealedKey, opened: bool) -> Result<(), LockboxError> {
        let path = self.config.offline_copy(&self.state);
        if !self.config.offline {
            return self.remove_copy().map(drop);
        }
        let generation = |sealed: &SealedKey| sealed.claimed_generation().ok();
        let same = |kept: SealedKey| kept == *sealed || (!opened && generation(&kept) == generation(sealed));
        if !self.copy().is_ok_and(same) {
            state::put(&path, &sealed.to_json()).map_err(io_error("write", &path))?;
        }
        Ok(())
    }

    fn remove_copy(&self) -> Result<bool, LockboxError> {
        let path = self.config.offline_copy(&self.state);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            removed => removed.map(|()| true).map_err(io_error("remove", &path)),
        }
    }

    /// From now on this key alone is expected, unless a later one was opened meanwhile.
    pub fn expect(&self, generation: u64, fingerprint: &str) -> Result<(), LockboxError> {
        let path = self.trusted();
        let is_later = state::read::<Trusted>(&path)?.is_some_and(|known| known.generation > generation);
        let expected = Trusted { generation, fingerprint: fingerprint.to_owned() };
        if is_later { Ok(()) } else { Ok(state::write(&path, &expected)?) }
    }

    fn trusted(&self) -> PathBuf {
        self.state.join("host").join(format!("{}.json", self.config.host))
    }

    /// Goes on with the key that this host has opened before, or that a person vouches for.
    fn trust(&self, key: &LockboxKey, expected: Option<&str>) -> Result<(), LockboxError> {
        let LockboxKeyId { host, generation } = key.id();
        let (host, is) = (host.clone(), key.fingerprint());
        let path = self.trusted();
        let now = Trusted { generation: *generation, fingerprint: is.to_owned() };
        let another =
            |trusted: &str| LockboxError::Another { host: host.clone(), is: is.into(), trusted: trusted.into() };
        match (state::read::<Trusted>(&path)?, expected) {
            (_, Some(expected)) if expected != is => return Err(another(expected)),
            (Some(known), _) if known == now => return Ok(()),
            // A person vouches for this very key.
            (_, Some(_)) => {}
            (Some(known), None) if known.generation > now.generation => {
                return Err(LockboxError::Older { host, is: now.generation, seen: known.generation });
            }
            (Some(known), None) => return Err(another(&known.fingerprint)),
            (None, None) => tracing::warn!(
                "opening the lockbox of '{host}' for the first time; the fingerprint of its key is {is}: compare it \
                 with the one that 'host admit' printed"
            ),
        }
        Ok(state::write(&path, &now)?)
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = if self.was_open { "the lockbox key was taken out of the kernel's keyring" } else { "it was closed" };
        let copy = if self.copy { ", the copy of the sealed lockbox key was removed" } else { "" };
        write!(f, "{key}, {}{copy}", removed(self.entries))
    }
}
