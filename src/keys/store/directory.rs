//! A store in a directory: one file per key, `KEY-ID.jwe`; container keys below `kek/`, hosts' lockbox keys below `host/`,
//! and in `container.json` which container key is the current one.
//!
//! What is stored appears whole or not at all, and survives a power cut ([`crate::sys::durable`]).

use std::{
    fs::{self, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::libc;
use serde::{Deserialize, Serialize};

use super::{ContainerKeys, Current, HostKeys, KeyStore, StoreError, Stored};
use crate::{
    base::key::{Epoch, HostName, KeyId, MAX_SEALED_BYTES, MalformedSealedKey, Place, SealedKey},
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

/// What a directory says of itself.
#[derive(Debug, Serialize)]
pub struct DirectoryFacts {
    /// The directory.
    pub path: PathBuf,
    /// Number of keys.
    pub keys: usize,
    /// Number of the current container key.
    pub epoch: Option<Epoch>,
    /// Its fingerprint.
    pub fingerprint: Option<String>,
    /// Keys are being sealed anew.
    pub rotating: bool,
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
    pub fn facts(&self) -> Result<DirectoryFacts, StoreError> {
        let container = self.container()?;
        Ok(DirectoryFacts {
            path: self.path()?.to_owned(),
            keys: self.list()?.len(),
            epoch: container.as_ref().map(|container| container.epoch),
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
        let bytes = read_bounded(&path).map_err(|error| match error.kind() {
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
        let claimed = key.claimed_context().map_err(malformed)?;
        if claimed.key_id != *id {
            return Err(malformed(MalformedSealedKey::OtherKey(claimed.key_id)));
        }
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
        match read_bounded(&path) {
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
}

/// A file of the store, which is not trusted: nothing but a file is read, since a pipe would keep us waiting for ever, and no
/// more than one byte beyond what fits, so that the reader sees that it is too long.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_SEALED_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn malformed(path: &Path, source: MalformedSealedKey) -> StoreError {
    StoreError::Malformed { what: path.display().to_string(), source }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread};

    use base64ct::{Base64UrlUnpadded, Encoding};
    use serde_json::json;

    use super::*;
    use crate::base::key::{BoundContext, JweRecipient};

    fn sealed(id: KeyId, generation: u64) -> SealedKey {
        let container = "cinder".parse().unwrap();
        let context = BoundContext { version: 1, key_id: id, container, volume: None, generation, created: 0 };
        let protected = json!({"enc": "A256GCM", "cryptattach": context}).to_string();
        SealedKey {
            protected: Base64UrlUnpadded::encode_string(protected.as_bytes()),
            unprotected: Default::default(),
            recipients: vec![JweRecipient { header: Default::default(), encrypted_key: "AAAA".to_owned() }],
            iv: String::new(),
            ciphertext: format!("AA{generation}"),
            tag: String::new(),
        }
    }

    #[test]
    fn keeps_what_it_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::make(&folder.path().join("deep/cinder")).unwrap();
        let id = KeyId::random();
        assert!(matches!(store.read_key(&id), Err(StoreError::NotFound { .. })));
        KeyStore::create(&store, &id, &sealed(id, 1)).unwrap();
        assert_eq!(store.read_key(&id).unwrap(), sealed(id, 1));
        assert!(matches!(KeyStore::create(&store, &id, &sealed(id, 2)), Err(StoreError::Exists { .. })));
        KeyStore::reseal(&store, &id, &sealed(id, 2)).unwrap();
        assert!(matches!(
            KeyStore::reseal(&store, &id, &sealed(id, 2)),
            Err(StoreError::Outdated { generation: 2, .. })
        ));
        assert_eq!(store.read_key(&id).unwrap(), sealed(id, 2));
        assert_eq!(store.list().unwrap(), [id]);
        KeyStore::delete(&store, &id).unwrap();
        assert!(matches!(KeyStore::delete(&store, &id), Err(StoreError::NotFound { .. })));
        assert!(matches!(KeyStore::reseal(&store, &id, &sealed(id, 3)), Err(StoreError::NotFound { .. })));
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn names_the_file_that_is_no_sealed_key() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::open(folder.path());
        let (id, other) = (KeyId::random(), KeyId::random());
        let whole = sealed(id, 1).to_json();
        let cases: [(&str, Vec<u8>); 5] = [
            ("empty", Vec::new()),
            ("truncated", whole[..whole.len() / 2].to_vec()),
            ("foreign", b"[foreign]\nfile = true\n".to_vec()),
            ("another key's", sealed(other, 1).to_json()),
            ("endless", vec![b' '; MAX_SEALED_BYTES + 1]),
        ];
        for (case, bytes) in cases {
            fs::write(folder.path().join(format!("{id}.jwe")), bytes).unwrap();
            let error = store.read_key(&id).unwrap_err();
            assert!(matches!(error, StoreError::Malformed { .. }), "{case}: {error:?}");
            assert!(error.to_string().contains(&id.to_string()), "{case}: {error}");
        }
    }

    #[test]
    fn a_key_that_a_link_leads_to_has_a_place_of_its_own() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = Directory::open(folder.path());
        let id = KeyId::random();
        KeyStore::create(&store, &id, &sealed(id, 1)).unwrap();
        let places = |store: &Directory| {
            let places = store.places(&id).unwrap();
            places.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let whole = format!("sealed keys {}", folder.path().display());
        assert_eq!(places(&store), std::slice::from_ref(&whole));
        let file = folder.path().join(format!("{id}.jwe"));
        fs::copy(&file, elsewhere.path().join("key")).unwrap();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("key"), &file).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("kek")).unwrap();
        let kek = format!("container key {}", folder.path().join("kek").display());
        assert_eq!(places(&store), [whole, format!("sealed key {}", file.display()), kek]);
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::open(folder.path());
        let id = KeyId::random();
        let pipe = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(&folder.path().join(format!("{id}.jwe")), pipe).unwrap();
        std::os::unix::fs::symlink("/dev/zero", folder.path().join("container.json")).unwrap();
        for error in [store.read_key(&id).unwrap_err(), store.current().unwrap_err()] {
            assert!(
                matches!(&error, StoreError::Io { source, .. } if source.to_string().contains("regular")),
                "{error:?}"
            );
        }
    }

    #[test]
    fn one_of_many_writers_wins() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::open(folder.path());
        let (id, start) = (KeyId::random(), Barrier::new(8));
        let wins: Vec<u64> = thread::scope(|scope| {
            let writers: Vec<_> = (1..=8)
                .map(|generation| {
                    let (store, start) = (&store, &start);
                    scope.spawn(move || {
                        start.wait();
                        KeyStore::create(store, &id, &sealed(id, generation)).is_ok().then_some(generation)
                    })
                })
                .collect();
            writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect()
        });
        assert_eq!(wins.len(), 1, "exactly one create succeeds");
        assert_eq!(store.read_key(&id).unwrap(), sealed(id, wins[0]));
    }
}
