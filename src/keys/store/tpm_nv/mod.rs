//! A store in the TPM of this machine: sealed keys, container keys and hosts' lockbox keys are NV indices of the owner's.
//!
//! So a machine with one disk and no network has its keys apart from its data. What is there is sealed like everywhere else:
//! anybody may read it. Whoever clears the TPM (`TPM2_Clear`) removes all of it.

mod consumers;
mod error;
mod value;
mod values;

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::{error::NvError, value::Value};
use self::{
    value::Label,
    values::{AT, Found, Values, Writer},
};
use super::{Access, ContainerKeys, Current, Facts, HostKeys, KeyStore, Kind, StoreError, StoreType, Stored};
use crate::{
    base::key::{Epoch, HostName, KeyId, MalformedSealedKey, Place, SealedKey, StoreName},
    config::{ConfigError, ConfigPath, Section, StoreConfig, TpmConfig},
    keys::{
        net::Caller,
        seal::identities,
        tpm::{self, IdentityFile, Name, NvMemory, Tpm},
    },
};

/// `type = "tpm-nv"`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TpmNvConfig {
    /// File with the owner's password, for writing.
    owner_password: Option<ConfigPath>,
    /// Nobody reads the store any more once a boot has ended.
    #[serde(default)]
    read_lock: bool,
}

/// `tpm-nv`
pub const TYPE: StoreType = StoreType { name: "tpm-nv", keeps_host_keys: true, read: TpmNvConfig::kind };

/// A container in the TPM's NV memory. Each request has a connection of its own.
#[derive(Debug)]
pub struct TpmNv {
    container: StoreName,
    tpm: TpmConfig,
    owner_password: Option<ConfigPath>,
    /// The file of this host's key in the TPM, which has the storage root key's name.
    identity: Option<PathBuf>,
}

/// Which container key is the current one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NvState {
    generation: u64,
    epoch: Epoch,
    fingerprint: String,
    rotating: bool,
}

impl TpmNvConfig {
    fn kind(section: &Section) -> Result<Box<dyn Kind>, ConfigError> {
        Ok(Box::new(section.read::<Self>()?))
    }

    fn store(&self, name: &StoreName, config: &StoreConfig) -> TpmNv {
        TpmNv {
            container: name.clone(),
            tpm: config.sealing.tpm.clone(),
            owner_password: self.owner_password.clone(),
            identity: identities::first_of_tpm(&config.sealing.identities),
        }
    }
}

impl Kind for TpmNvConfig {
    fn open(
        &self,
        name: &StoreName,
        config: &StoreConfig,
        _: Option<Arc<Caller>>,
    ) -> Result<Box<dyn KeyStore>, StoreError> {
        Ok(Box::new(self.store(name, config)))
    }

    fn describe(&self) -> String {
        AT.to_owned()
    }

    fn needs_tpm(&self) -> bool {
        true
    }

    fn no_access_lists(&self) -> Option<&'static str> {
        Some(
            "a TPM has no access lists: everybody reads what is sealed, and the owner's password decides who may write",
        )
    }

    fn make(&self, name: &StoreName, config: &StoreConfig, _: &Access<'_>) -> Option<Result<(), StoreError>> {
        Some(self.store(name, config).facts().map(drop))
    }

    fn unmake(&self, name: &StoreName, config: &StoreConfig) -> Option<Result<bool, StoreError>> {
        Some(self.store(name, config).unmake())
    }

    fn facts(&self, name: &StoreName, config: &StoreConfig) -> Option<Result<Facts, StoreError>> {
        Some(self.store(name, config).facts())
    }

    fn shut(&self, name: &StoreName, config: &StoreConfig) -> Option<Result<(), StoreError>> {
        self.read_lock.then(|| {
            let store = self.store(name, config);
            let root = store.root()?;
            store.read(|values| values.lock_reads(root))
        })
    }
}

impl TpmNv {
    /// Asks the TPM.
    fn read<T>(&self, ask: impl FnOnce(&Values<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let tpm = Tpm::open(&self.tpm)?;
        ask(&Values::of(NvMemory::of(&tpm)?, &self.tpm.tcti()))
    }

    /// Changes what is in the TPM.
    fn write<T>(
        &self,
        change: impl FnOnce(&Values<'_>, &Writer<'_, '_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let password = self.owner_password.as_deref().map(tpm::first_line).transpose()?;
        let root = self.root()?;
        self.read(|values| change(values, &values.writer(password.as_ref(), root)?))
    }

    /// The name of the storage root key, if this host has a key under it.
    fn root(&self) -> Result<Option<Name>, StoreError> {
        let identity = self.identity.as_deref().map(IdentityFile::read).transpose()?;
        Ok(identity.map(|file| file.storage_root))
    }

    /// What it says of itself.
    fn facts(&self) -> Result<Facts, StoreError> {
        let tpm = Tpm::open(&self.tpm)?;
        let (vendor, values) = (tpm.vendor()?, Values::of(NvMemory::of(&tpm)?, &self.tpm.tcti()));
        let (state, usage, keys) = (self.state(&values)?, values.usage()?, self.keys(&values)?);
        let own = [
            ("tpm", json!(vendor.to_string())),
            ("keys", json!(keys.len())),
            ("nv_indices", json!(usage.indices)),
            ("nv_bytes", json!(usage.bytes)),
            ("nv_index_bytes", json!(values.largest())),
        ];
        let used = format!("{} bytes in {} indices of at most {} bytes", usage.bytes, usage.indices, values.largest());
        let mut lines = vec![("TPM", vendor.to_string()), ("NV memory", used), ("keys", keys.len().to_string())];
        if usage.leftovers > 0 {
            let of = format!("{} not finished by whoever made them; the next change removes them", usage.leftovers);
            lines.push(("leftovers", of));
        }
        Ok(Facts {
            own: own.map(|(name, value)| (name.to_owned(), value)).into_iter().collect(),
            lines,
            epoch: state.as_ref().map(|state| json!(state.epoch)),
            rotating: state.as_ref().is_some_and(|state| state.rotating),
            fingerprint: state.map(|state| state.fingerprint),
        })
    }

    /// The error of what is not there. A clear takes all, so that one value that is left rules it out.
    fn not_found(&self, values: &Values<'_>, id: impl ToString) -> StoreError {
        let at = match values.is_empty() {
            Ok(true) => format!(
                "{AT}, which has no key of cryptattach at all: this is another TPM, or it was cleared (by the firmware's \
                 settings, a new system, or tpm2_clear), which removes them"
            ),
            _ => AT.to_owned(),
        };
        StoreError::NotFound { id: id.to_string(), at }
    }

    /// The container keys, the last one first, and then which is the current one: a run that was killed can be repeated.
    fn unmake(&self) -> Result<bool, StoreError> {
        if !self.hosts()?.is_empty() {
            return Ok(false);
        }
        self.write(|values, writer| {
            if !self.keys(values)?.is_empty() {
                return Ok(false);
            }
            let is_own = |label: &Label| label.as_container_key(&self.container).is_some();
            let own: Vec<_> = values.labels()?.into_iter().filter(is_own).collect();
            own.into_iter().rev().try_for_each(|label| writer.remove(label))?;
            writer.remove(Label::current(&self.container)).map(|()| true)
        })
    }

    /// A sealed key under a name.
    fn sealed(&self, values: &Values<'_>, label: Label, id: impl ToString) -> Result<SealedKey, StoreError> {
        let found = values.get(label)?.ok_or_else(|| self.not_found(values, id))?;
        SealedKey::from_json(&found.json()?).map_err(|source| found.malformed(source))
    }

    /// A key of this container. One of another container in this TPM is none.
    fn key(&self, values: &Values<'_>, id: &KeyId) -> Result<SealedKey, StoreError> {
        let found = values.get(Label::key(id))?;
        let key = found.map(|found| self.own_key(&found, id)).transpose()?.flatten();
        key.ok_or_else(|| self.not_found(values, id))
    }

    /// `None` if it is another container's.
    fn own_key(&self, found: &Found, id: &KeyId) -> Result<Option<SealedKey>, StoreError> {
        let key = SealedKey::from_json(&found.json()?).map_err(|source| found.malformed(source))?;
        let claimed = key.claimed_context_of(id).map_err(|source| found.malformed(source))?;
        Ok((claimed.container == self.container).then_some(key))
    }

    /// The keys of this container, and those that are damaged, so that nobody knows whose they are; in order.
    fn keys(&self, values: &Values<'_>) -> Result<Vec<KeyId>, StoreError> {
        let all = values.latest(Label::as_key)?;
        let ours = all.into_iter().filter(|(id, found)| !matches!(self.own_key(found, id), Ok(None)));
        Ok(ours.map(|(id, _)| id).collect())
    }

    fn create_sealed(&self, label: Label, id: impl ToString, key: &SealedKey) -> Result<(), StoreError> {
        let value = Value { label, json: key.to_json() };
        match self.write(|_, writer| writer.create(&value))? {
            true => Ok(()),
            false => Err(StoreError::Exists { id: id.to_string(), at: AT.to_owned() }),
        }
    }

    fn replace_sealed(&self, label: Label, id: impl ToString, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_checked(label, id, key, |_| Ok(()))
    }

    /// Only by a later generation, and if what is there is as it should be, which nobody changes meanwhile.
    fn replace_checked(
        &self,
        label: Label,
        id: impl ToString,
        key: &SealedKey,
        check: impl FnOnce(&Values<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let value = Value { label, json: key.to_json() };
        let malformed = |source| StoreError::Malformed { what: id.to_string(), source };
        let new = value.generation().map_err(malformed)?;
        self.write(|values, writer| {
            check(values)?;
            let before = values.get(label)?.ok_or_else(|| self.not_found(values, id.to_string()))?;
            match before.generation() {
                Some(stored) if new <= stored => Err(StoreError::Outdated { id: id.to_string(), generation: stored }),
                _ => writer.replace(&value),
            }
        })
    }

    fn delete_sealed(&self, label: Label, id: impl ToString) -> Result<(), StoreError> {
        self.write(|values, writer| {
            values.get(label)?.ok_or_else(|| self.not_found(values, id))?;
            writer.remove(label)
        })
    }

    /// What the container says of its container keys.
    fn state(&self, values: &Values<'_>) -> Result<Option<NvState>, StoreError> {
        let Some(found) = values.get(Label::current(&self.container))? else { return Ok(None) };
        let state = serde_json::from_slice(&found.json()?);
        let state = state.map_err(|source| found.malformed(MalformedSealedKey::Json(source)))?;
        Ok(Some(state))
    }
}

/// The host that a lockbox key claims to be for.
fn claimed_host(key: &SealedKey) -> Option<HostName> {
    key.protected_header().ok()?.get("cryptattach")?.get("host")?.as_str()?.parse().ok()
}

impl KeyStore for TpmNv {
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        self.read(|values| self.key(values, id)).map(Stored::Sealed)
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.create_sealed(Label::key(id), id, key)
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_checked(Label::key(id), id, key, |values| self.key(values, id).map(drop))
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        self.write(|values, writer| {
            match self.key(values, id) {
                Ok(_) | Err(StoreError::Malformed { .. }) => {}
                Err(error) => return Err(error),
            }
            writer.remove(Label::consumers(id))?;
            writer.remove(Label::key(id))
        })
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        self.read(|values| self.keys(values))
    }

    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        let vendor = Tpm::open(&self.tpm)?.vendor()?;
        Ok(vec![Place { what: "sealed keys".to_owned(), at: vendor.location(), opens: true }])
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        Some(self)
    }

    fn host_keys(&self) -> Option<&dyn HostKeys> {
        Some(self)
    }
}

impl ContainerKeys for TpmNv {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        let state = self.read(|values| self.state(values))?;
        Ok(state.map(|NvState { epoch, rotating, .. }| Current { epoch, rotating }))
    }

    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError> {
        let Current { epoch, rotating } = *current;
        self.write(|values, writer| {
            let before = self.state(values)?.map(|state| state.generation);
            let generation = before.map_or(1, |before| before.saturating_add(1));
            let state = NvState { generation, epoch, fingerprint: fingerprint.to_owned(), rotating };
            let json = serde_json::to_vec(&state).expect("texts and numbers always serialize");
            let value = Value { label: Label::current(&self.container), json };
            if before.is_some() { writer.replace(&value) } else { writer.create(&value).map(drop) }
        })
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        let label = Label::container_key(&self.container, epoch);
        self.read(|values| self.sealed(values, label, format!("kek/{epoch}")))
    }

    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.create_sealed(Label::container_key(&self.container, epoch), format!("kek/{epoch}"), key)
    }

    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_sealed(Label::container_key(&self.container, epoch), format!("kek/{epoch}"), key)
    }

    fn delete(&self, epoch: Epoch) -> Result<(), StoreError> {
        self.delete_sealed(Label::container_key(&self.container, epoch), format!("kek/{epoch}"))
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        let labels = self.read(|values| values.labels())?;
        let mut epochs: Vec<_> = labels.iter().filter_map(|label| label.as_container_key(&self.container)).collect();
        epochs.sort_unstable();
        Ok(epochs)
    }
}

impl HostKeys for TpmNv {
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError> {
        let label = Label::host_key(&self.container, host);
        self.read(|values| self.sealed(values, label, format!("host/{host}")))
    }

    fn create(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.create_sealed(Label::host_key(&self.container, host), format!("host/{host}"), key)
    }

    fn replace(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_sealed(Label::host_key(&self.container, host), format!("host/{host}"), key)
    }

    fn delete(&self, host: &HostName) -> Result<(), StoreError> {
        self.delete_sealed(Label::host_key(&self.container, host), format!("host/{host}"))
    }

    fn hosts(&self) -> Result<Vec<HostName>, StoreError> {
        let all = self.read(|values| values.latest(|label| label.is_host_key().then_some(*label)))?;
        let host = |(label, found): (Label, Found)| {
            // Its name is a hash; the key says whose it is.
            let host = claimed_host(&SealedKey::from_json(&found.json().ok()?).ok()?)?;
            (Label::host_key(&self.container, &host) == label).then_some(host)
        };
        let mut hosts: Vec<_> = all.into_iter().filter_map(host).collect();
        hosts.sort_unstable();
        Ok(hosts)
    }
}
