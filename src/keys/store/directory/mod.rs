//! A store in a directory: one file per key, `KEY-ID.jwe`; container keys below `kek/`, hosts' lockbox keys below `host/`,
//! and in `container.json` which container key is the current one.
//!
//! What is stored appears whole or not at all, and survives a power cut ([`crate::sys::durable`]).

mod consumers;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Access, ContainerKeys, Current, Facts, HostKeys, KeyStore, Kind, Letters, StoreError, StoreType, Stored};
use crate::{
    base::key::{Epoch, HostName, KeyId, MAX_SEALED_BYTES, MalformedSealedKey, Place, SealedKey, StoreName},
    config::{ConfigError, ConfigPath, Section, StoreConfig},
    keys::net::Caller,
    sys::durable::{self, Folder},
};

/// Ends the names of sealed keys.
const END: &str = ".jwe";
/// The file that says which container key is the current one.
const CONTAINER: &str = "container.json";

/// A directory of sealed keys.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Whether it was looked at.
    seen: OnceLock<()>,
}

/// The content of `container.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DirectoryState {
    epoch: Epoch,
    fingerprint: String,
    rotating: bool,
}

/// `type = "directory"`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectoryConfig {
    path: ConfigPath,
}

/// `directory`
pub const TYPE: StoreType = StoreType { name: "directory", keeps_host_keys: true, read: DirectoryConfig::kind };

impl DirectoryConfig {
    fn kind(section: &Section) -> Result<Box<dyn Kind>, ConfigError> {
        Ok(Box::new(section.read::<Self>()?))
    }
}

impl Kind for DirectoryConfig {
    fn open(&self, _: &StoreName, _: &StoreConfig, _: Option<Arc<Caller>>) -> Result<Box<dyn KeyStore>, StoreError> {
        Ok(Box::new(Directory::open(&self.path)))
    }

    fn describe(&self) -> String {
        format!("the directory {}", self.path.display())
    }

    fn paths(&self) -> Vec<&Path> {
        vec![&self.path]
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn no_access_lists(&self) -> Option<&'static str> {
        Some("a directory has no access lists: its owner and mode decide who may use it")
    }

    fn make(&self, _: &StoreName, _: &StoreConfig, _: &Access<'_>) -> Option<Result<(), StoreError>> {
        Some(Directory::make(&self.path).map(drop))
    }

    fn facts(&self, _: &StoreName, _: &StoreConfig) -> Option<Result<Facts, StoreError>> {
        Some(Directory::open(&self.path).facts())
    }
}

impl Directory {
    /// The store in an existing directory; nothing is looked at yet.
    pub fn open(path: &Path) -> Self {
        Self { path: path.to_owned(), seen: OnceLock::new() }
    }

    /// Makes the directory (mode 0700, with its parents) unless it is there.
    pub fn make(path: &Path) -> Result<Self, StoreError> {
        drop(Folder::make(path).map_err(io_error("make the key store", path))?);
        let made = Self::open(path);
        made.path().map(drop)?;
        Ok(made)
    }

    /// What it says of itself.
    fn facts(&self) -> Result<Facts, StoreError> {
        let container = self.container()?;
        let (path, keys) = (self.path()?, self.list()?.len());
        Ok(Facts {
            own: [("path".to_owned(), json!(path)), ("keys".to_owned(), json!(keys))].into_iter().collect(),
            lines: vec![("directory", path.display().to_string()), ("keys", keys.to_string())],
            epoch: container.as_ref().map(|container| json!(container.epoch)),
            rotating: container.as_ref().is_some_and(|container| container.rotating),
            fingerprint: container.map(|container| container.fingerprint),
        })
    }

    /// The directory, which was looked at.
    fn path(&self) -> Result<&Path, StoreError> {
        if self.seen.get().is_none() {
            let metadata = fs::metadata(&self.path).map_err(io_error("open the key store", &self.path))?;
            if !metadata.is_dir() {
                return Err(io_error("open the key store", &self.path)(io::ErrorKind::NotADirectory.into()));
            }
            if self.seen.set(()).is_ok() && metadata.mode() & 0o022 != 0 {
                tracing::warn!("users other than its owner can change the key store {}", self.path.display());
            }
        }
        Ok(&self.path)
    }

    /// A sealed key, container key or lockbox key.
    fn read(&self, name: &str) -> Result<SealedKey, StoreError> {
        let path = self.path()?.join(format!("{name}{END}"));
        let bytes = durable::read_bounded(&path, MAX_SEALED_BYTES).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if self.is_there(&path) => self.not_found(name),
            _ => io_error("read", &path)(error),
        })?;
        SealedKey::from_json(&bytes).map_err(|source| malformed(&path, source))
    }

    /// Whether a file that is not there is none, or belongs to a device that is not mounted now: a host that was removed wipes
    /// its lockbox, and must not do so for the latter.
    fn is_there(&self, path: &Path) -> bool {
        path.parent().is_some_and(Path::is_dir) || self.path.join(CONTAINER).exists()
    }

    fn read_key(&self, id: &KeyId) -> Result<SealedKey, StoreError> {
        let key = self.read(&id.to_string())?;
        let malformed = |source| malformed(&self.path.join(format!("{id}{END}")), source);
        key.claimed_context_of(id).map_err(malformed)?;
        Ok(key)
    }

    /// Never overwrites.
    fn create_file(&self, name: &str, key: &SealedKey) -> Result<(), StoreError> {
        let (folder, file) = self.part(name)?;
        let made = Folder::make(&folder).map_err(io_error("lock the key store", &folder))?;
        made.create(&file, &key.to_json()).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                StoreError::Exists { id: name.to_owned(), at: self.path.display().to_string() }
            }
            _ => io_error("create", &folder.join(file))(error),
        })
    }

    /// Only by a later generation.
    fn replace_file(&self, name: &str, key: &SealedKey) -> Result<(), StoreError> {
        let (folder, file) = self.part(name)?;
        let locked = Folder::lock(&folder).map_err(|error| self.absent(name, &folder, error))?;
        let generation =
            |key: &SealedKey| key.claimed_generation().map_err(|source| malformed(&folder.join(&file), source));
        let (new, stored) = (generation(key)?, generation(&self.read(name)?)?);
        if new <= stored {
            return Err(StoreError::Outdated { id: name.to_owned(), generation: stored });
        }
        locked.replace(&file, &key.to_json()).map_err(io_error("replace", &folder.join(file)))
    }

    fn delete_file(&self, name: &str) -> Result<(), StoreError> {
        let (folder, file) = self.part(name)?;
        let locked = Folder::lock(&folder).map_err(|error| self.absent(name, &folder, error))?;
        locked.remove(&file).map_err(|error| self.absent(name, &folder.join(file), error))
    }

    /// The folder and the file of a name: `kek/1` is one folder down.
    fn part(&self, name: &str) -> Result<(PathBuf, String), StoreError> {
        let (folder, stem) = name.rsplit_once('/').unwrap_or(("", name));
        Ok((self.path()?.join(folder), format!("{stem}{END}")))
    }

    fn absent(&self, name: &str, path: &Path, error: io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::NotFound => self.not_found(name),
            _ => io_error("change", path)(error),
        }
    }

    fn not_found(&self, name: &str) -> StoreError {
        StoreError::NotFound { id: name.to_owned(), at: self.path.display().to_string() }
    }

    /// The names in a part of the store that are of this type.
    fn names<T: std::str::FromStr + Ord>(&self, part: &str) -> Result<Vec<T>, StoreError> {
        let folder = self.path()?.join(part);
        let stems = durable::stems(&folder, END).map_err(io_error("list the key store", &folder))?;
        let mut names: Vec<T> = stems.iter().filter_map(|stem| stem.parse().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn container(&self) -> Result<Option<DirectoryState>, StoreError> {
        let path = self.path()?.join(CONTAINER);
        match durable::read_bounded(&path, MAX_SEALED_BYTES) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|error| io_error("understand", &path)(error.into()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }
}

impl KeyStore for Directory {
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        self.read_key(id).map(Stored::Sealed)
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.create_file(&id.to_string(), key)
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_file(&id.to_string(), key)
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        self.delete_file(&id.to_string())
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        self.names("")
    }

    fn places(&self, id: &KeyId) -> Result<Vec<Place>, StoreError> {
        let path = self.path()?;
        let mut places = vec![Place::path("sealed keys", path, true)];
        // A link, or a mount, may lead from the directory to another file system.
        let rests_on = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        let here = rests_on(path);
        let elsewhere = |path: &PathBuf| rests_on(path).is_some_and(|device| here != Some(device));
        let keys = [path.join(format!("{id}{END}"))].into_iter().filter(elsewhere);
        places.extend(keys.map(|path| Place::path("sealed key", path, true)));
        let epochs = ContainerKeys::epochs(self)?.into_iter().map(|epoch| path.join(format!("kek/{epoch}{END}")));
        let epochs = epochs.chain([path.join("kek")]).filter(elsewhere);
        places.extend(epochs.map(|path| Place::path("container key", path, true)));
        Ok(places)
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        Some(self)
    }

    fn host_keys(&self) -> Option<&dyn HostKeys> {
        Some(self)
    }
}

impl ContainerKeys for Directory {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        Ok(self.container()?.map(|DirectoryState { epoch, rotating, .. }| Current { epoch, rotating }))
    }

    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError> {
        let Current { epoch, rotating } = *current;
        let path = self.path()?.join(CONTAINER);
        let write = || {
            let json = serde_json::to_vec(&DirectoryState { epoch, fingerprint: fingerprint.to_owned(), rotating })?;
            Folder::lock(&self.path)?.replace(CONTAINER, &json)
        };
        write().map_err(io_error("write", &path))
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        self.read(&format!("kek/{epoch}"))
    }

    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.create_file(&format!("kek/{epoch}"), key)
    }

    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_file(&format!("kek/{epoch}"), key)
    }

    fn delete(&self, epoch: Epoch) -> Result<(), StoreError> {
        self.delete_file(&format!("kek/{epoch}"))
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        self.names("kek")
    }
}

impl HostKeys for Directory {
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError> {
        self.read(&format!("host/{host}"))
    }

    fn create(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.create_file(&format!("host/{host}"), key)
    }

    fn replace(&self, host: &HostName, key: &SealedKey) -> Result<(), StoreError> {
        self.replace_file(&format!("host/{host}"), key)
    }

    fn delete(&self, host: &HostName) -> Result<(), StoreError> {
        self.delete_file(&format!("host/{host}"))
    }

    fn hosts(&self) -> Result<Vec<HostName>, StoreError> {
        self.names("host")
    }

    fn letters(&self) -> Option<&dyn Letters> {
        Some(self)
    }
}

impl Letters for Directory {
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path()?.join(name);
        match durable::read_bounded(&path, MAX_SEALED_BYTES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(io_error("read", &path)),
        }
    }

    fn put(&self, name: &str, text: &[u8]) -> Result<(), StoreError> {
        let path = self.path()?.join(name);
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let put = || Folder::make(durable::folder_of(&path))?.replace(file, text);
        put().map_err(io_error("write", &path))
    }
}

fn malformed(path: &Path, source: MalformedSealedKey) -> StoreError {
    StoreError::Malformed { what: path.display().to_string(), source }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}
