//! A store in OpenBao's or Vault's KV version 2: a secret per key, with the one field `jwe`; container keys below `kek/`, hosts'
//! lockbox keys below `host/`.
//!
//! Every write names the version that it replaces (`cas`), so of two writers one is told. KV deletes softly and keeps former
//! versions unless its mount is configured otherwise; so a key's deletion is that of its metadata, and re-sealing destroys the
//! version that was replaced.

mod consumers;
mod objects;
#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use serde_json::json;

pub use self::objects::Found;
use super::{
    Access, ContainerKeys, Current, Facts, HostKeys, KeyStore, Kind, Letters, Server, StoreError, StoreType, Stored,
};
use crate::{
    base::key::{Epoch, HostName, KeyId, Location, MalformedSealedKey, Place, SealedKey, StoreName},
    config::{ConfigError, Network, Section, ServerConfig, StoreConfig},
    keys::net::{
        Caller,
        bao::{self, Bao},
    },
};

/// The secret that says which container key is the current one.
const CURRENT: &str = "current";

/// `type = "bao"`
pub struct BaoConfig {
    server: ServerConfig,
    path: KvPath,
}

/// Where in a server the keys are.
#[derive(Clone)]
struct KvPath {
    mount: String,
    /// Segments below it.
    prefix: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(rename = "server")]
    _server: String,
    path: String,
}

/// `bao`
pub const TYPE: StoreType = StoreType { name: "bao", keeps_host_keys: true, read: BaoConfig::kind };

/// A container of keys in a server.
pub struct BaoKv {
    bao: Bao,
    path: KvPath,
    servers: Vec<Server>,
}

impl KvPath {
    /// `MOUNT/PREFIX`
    fn of(text: &str) -> Option<Self> {
        let fits = |segment: &String| {
            !matches!(&**segment, "" | "." | "..") && segment.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let mut segments: Vec<String> = text.split('/').map(str::to_owned).collect();
        let is_path = segments.len() > 1 && text.len() <= 200 && segments.iter().all(fits);
        is_path.then(|| Self { mount: segments.remove(0), prefix: segments })
    }
}

impl std::fmt::Display for KvPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.mount, self.prefix.join("/"))
    }
}

impl BaoConfig {
    fn kind(section: &Section) -> Result<Box<dyn Kind>, ConfigError> {
        let table: Table = section.read()?;
        let server = section.server.clone().ok_or_else(|| section.unusable("missing field `server`".to_owned()))?;
        bao::urls(&server)?;
        let path = KvPath::of(&table.path);
        let path =
            path.ok_or_else(|| section.unusable("path: expected 'MOUNT/PATH', as in 'kv/cryptattach/keys'".into()))?;
        Ok(Box::new(Self { server, path }))
    }

    fn store(&self, network: &Network) -> Result<BaoKv, StoreError> {
        let bao = Bao::new(&self.server, network)?;
        Ok(BaoKv { bao, path: self.path.clone(), servers: bao::servers(&self.server) })
    }
}

impl Kind for BaoConfig {
    fn open(
        &self,
        _: &StoreName,
        config: &StoreConfig,
        _: Option<Arc<Caller>>,
    ) -> Result<Box<dyn KeyStore>, StoreError> {
        Ok(Box::new(self.store(&config.network)?))
    }

    fn describe(&self) -> String {
        format!("OpenBao, {}", self.path)
    }

    fn servers(&self) -> Result<Vec<Server>, StoreError> {
        Ok(bao::servers(&self.server))
    }

    fn needs_network(&self) -> bool {
        true
    }

    fn files(&self) -> Result<Vec<PathBuf>, StoreError> {
        Ok(bao::files(&self.server).into_iter().chain([self.server.secret()]).map(Path::to_owned).collect())
    }

    fn paths(&self) -> Vec<&Path> {
        self.server.files().into_iter().chain([self.server.secret()]).collect()
    }

    fn places(&self) -> Vec<Place> {
        vec![Place::path("credential", self.server.secret(), false)]
    }

    fn no_access_lists(&self) -> Option<&'static str> {
        Some(
            "who may use keys in OpenBao is said by its own policies ('bao policy write'), not by --reader and --writer",
        )
    }

    fn make(&self, _: &StoreName, config: &StoreConfig, _: &Access<'_>) -> Option<Result<(), StoreError>> {
        Some(self.store(&config.network).and_then(|store| store.facts()).map(drop))
    }

    fn facts(&self, _: &StoreName, config: &StoreConfig) -> Option<Result<Facts, StoreError>> {
        Some(self.store(&config.network).and_then(|store| store.facts()))
    }
}

/// Which container key is the current one.
#[derive(serde::Serialize, Deserialize)]
struct State {
    epoch: Epoch,
    fingerprint: String,
    rotating: bool,
}

impl BaoKv {
    fn facts(&self) -> Result<Facts, StoreError> {
        let (state, keys) = (self.state()?.0, self.list()?.len());
        let servers = self.servers.iter().map(|server| format!("{}:{}", server.host, server.port));
        let (servers, path) = (servers.collect::<Vec<_>>().join(", "), self.path.to_string());
        let own = [("servers", json!(servers)), ("path", json!(path)), ("keys", json!(keys))];
        Ok(Facts {
            own: own.map(|(name, value)| (name.to_owned(), value)).into_iter().collect(),
            lines: vec![("servers", servers), ("path", path), ("keys", keys.to_string())],
            epoch: state.as_ref().map(|state| json!(state.epoch)),
            rotating: state.as_ref().is_some_and(|state| state.rotating),
            fingerprint: state.map(|state| state.fingerprint),
        })
    }

    /// What the container says of its container keys, and the version that this is; 0 if it says nothing.
    fn state(&self) -> Result<(Option<State>, u64), StoreError> {
        Ok(match self.read(CURRENT)? {
            Found::Nothing => (None, 0),
            Found::There { text, version } => {
                let state = serde_json::from_str(&text);
                (Some(state.map_err(|error| self.malformed(CURRENT, MalformedSealedKey::Json(error)))?), version)
            }
            Found::Deleted { version } => return Err(self.deleted(CURRENT, version)),
        })
    }

    fn sealed(&self, name: &str) -> Result<SealedKey, StoreError> {
        Ok(self.sealed_version(name)?.0)
    }
}

impl KeyStore for BaoKv {
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        let name = id.to_string();
        let key = self.sealed(&name)?;
        key.claimed_context_of(id).map_err(|source| self.malformed(&name, source))?;
        Ok(Stored::Sealed(key))
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.create_object(&id.to_string(), key.to_json())
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_sealed(&id.to_string(), key)
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        self.delete_object(&id.to_string())
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        Ok(self.names(&[])?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Each server of the service may have them all.
    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        let place = |Server { host, port }| Place {
            what: "sealed key".to_owned(),
            at: Location::Server { host, port },
            opens: true,
        };
        Ok(self.servers.iter().cloned().map(place).collect())
    }

    fn as_one(&mut self) {
        self.bao.as_one();
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        Some(self)
    }

    fn host_keys(&self) -> Option<&dyn HostKeys> {
        Some(self)
    }
}

impl ContainerKeys for BaoKv {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        Ok(self.state()?.0.map(|State { epoch, rotating, .. }| Current { epoch, rotating }))
    }

    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError> {
        let Current { epoch, rotating } = *current;
        let (_, version) = self.state()?;
        let state = State { epoch, fingerprint: fingerprint.to_owned(), rotating };
        let json = serde_json::to_vec(&state).expect("texts and numbers always serialize");
        match self.write(CURRENT, json, version)? {
            true => Ok(()),
            false => Err(StoreError::Outdated { id: CURRENT.to_owned(), generation: version }),
        }
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        self.sealed(&format!("kek/{epoch}"))
    }

    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.create_object(&format!("kek/{epoch}"), key.to_json())
    }

    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_sealed(&format!("kek/{epoch}"), key)
    }

    fn delete(&self, epoch: Epoch) -> Result<(), StoreError> {
        self.delete_object(&format!("kek/{epoch}"))
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        let mut epochs: Vec<Epoch> = self.names(&["kek"])?.iter().filter_map(|name| name.parse().ok()).collect();
        epochs.sort_unstable();
        Ok(epochs)
    }
}

impl HostKeys for BaoKv {
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError> {
        let name = format!("host/{host}");
        // Whoever has deleted it has removed the host, though it could be brought back.
        if let Found::There { .. } = self.read(&name)? {
            return self.sealed(&name);
        }
        // A host that was removed wipes what it has; so a path that has no container must not look like that.
        match self.state()?.0 {
            Some(_) => Err(self.not_found(&name)),
            None => Err(StoreError::NoContainer { at: self.to_string() }),
        }
    }

    fn create(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.create_object(&format!("host/{host}"), key.to_json())
    }

    fn replace(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_sealed(&format!("host/{host}"), key)
    }

    fn delete(&self, host: &HostName) -> Result<(), StoreError> {
        self.delete_object(&format!("host/{host}"))
    }

    fn hosts(&self) -> Result<Vec<HostName>, StoreError> {
        Ok(self.names(&["host"])?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn letters(&self) -> Option<&dyn Letters> {
        Some(self)
    }
}

impl Letters for BaoKv {
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let text = |found| if let Found::There { text, .. } = found { Some(text.into_bytes()) } else { None };
        Ok(text(BaoKv::read(self, name)?))
    }

    fn put(&self, name: &str, text: &[u8]) -> Result<(), StoreError> {
        let version = match BaoKv::read(self, name)? {
            Found::Nothing => 0,
            Found::There { version, .. } | Found::Deleted { version } => version,
        };
        match self.write(name, text.to_vec(), version)? {
            true => Ok(()),
            false => Err(StoreError::Exists { id: name.to_owned(), at: self.to_string() }),
        }
    }
}

impl std::fmt::Display for BaoKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.fmt(f)
    }
}
