//! A store in a directory: one file per key, `KEY-ID.jwe`.
//!
//! A file appears whole or not at all: it is written under another name, flushed, and then linked to its own. Both the
//! file and the directory are flushed (fsync(2)) before a call returns, so that what is stored survives a power cut.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use tempfile::NamedTempFile;

use super::{KeyStore, StoreError, Stored};
use crate::key::{KeyId, MAX_SEALED_BYTES, MalformedSealedKey, Place, SealedKey};

const EXTENSION: &str = "jwe";
/// Begins the names of files that are being written; a kill leaves one, and the next writer removes it.
const UNFINISHED: &str = ".unfinished-";

/// A directory of sealed keys.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The store in an existing directory.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let metadata = fs::metadata(path).map_err(io_error("open the key store", path))?;
        if !metadata.is_dir() {
            return Err(io_error("open the key store", path)(io::ErrorKind::NotADirectory.into()));
        }
        if metadata.mode() & 0o022 != 0 {
            tracing::warn!("the key store {} can be changed by others than its owner", path.display());
        }
        Ok(Self { path: path.to_owned() })
    }

    /// Makes the directory (mode 0700, with its parents) unless it is there.
    pub fn make(path: &Path) -> Result<Self, StoreError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("make the key store", path))?;
        Self::open(path)
    }

    fn file(&self, id: &KeyId) -> PathBuf {
        self.path.join(format!("{id}.{EXTENSION}"))
    }

    fn not_found(&self, id: &KeyId) -> StoreError {
        StoreError::NotFound { id: id.to_string(), at: self.path.display().to_string() }
    }

    /// Writers take turns; readers need no lock, for a file is whole at all times.
    fn lock(&self) -> Result<Flock<File>, StoreError> {
        let directory = File::open(&self.path).map_err(io_error("open the key store", &self.path))?;
        let lock = Flock::lock(directory, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io_error("lock the key store", &self.path)(errno.into()))?;
        self.remove_unfinished();
        Ok(lock)
    }

    /// What a killed writer left. Nobody else writes, for the caller holds the lock.
    fn remove_unfinished(&self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// The key's bytes in a flushed file that has no final name yet.
    fn written(&self, key: &SealedKey) -> Result<NamedTempFile, StoreError> {
        let write = || {
            let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.path)?;
            file.write_all(&key.to_json())?;
            file.as_file().sync_all()?;
            Ok(file)
        };
        write().map_err(io_error("write to the key store", &self.path))
    }

    fn flush(&self, lock: &File) -> Result<(), StoreError> {
        lock.sync_all().map_err(io_error("flush the key store", &self.path))
    }

    fn read(&self, id: &KeyId) -> Result<SealedKey, StoreError> {
        let path = self.file(id);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.not_found(id),
            _ => io_error("open", &path)(error),
        })?;
        let mut bytes = Vec::new();
        // One byte more than fits, so that the length check sees an overlong file without reading all of it.
        file.take(MAX_SEALED_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        let malformed = |source| StoreError::Malformed { what: path.display().to_string(), source };
        let key = SealedKey::from_json(&bytes).map_err(malformed)?;
        let claimed = key.claimed_context().map_err(malformed)?;
        if claimed.key_id != *id {
            return Err(malformed(MalformedSealedKey::OtherKey(claimed.key_id)));
        }
        Ok(key)
    }
}

impl KeyStore for Directory {
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        self.read(id).map(Stored::Sealed)
    }

    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        let path = self.file(id);
        let lock = self.lock()?;
        self.written(key)?.persist_noclobber(&path).map_err(|refused| match refused.error.kind() {
            io::ErrorKind::AlreadyExists => {
                StoreError::Exists { id: id.to_string(), at: self.path.display().to_string() }
            }
            _ => io_error("create", &path)(refused.error),
        })?;
        self.flush(&lock)
    }

    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError> {
        let lock = self.lock()?;
        let stored = self.read(id)?;
        let generation = |key: &SealedKey| {
            key.claimed_context()
                .map(|context| context.generation)
                .map_err(|source| StoreError::Malformed { what: self.file(id).display().to_string(), source })
        };
        if generation(key)? <= generation(&stored)? {
            return Err(StoreError::Outdated { id: id.to_string(), generation: generation(&stored)? });
        }
        self.written(key)?
            .persist(self.file(id))
            .map_err(|refused| io_error("replace", &self.file(id))(refused.error))?;
        self.flush(&lock)
    }

    fn delete(&self, id: &KeyId) -> Result<(), StoreError> {
        let path = self.file(id);
        let lock = self.lock()?;
        fs::remove_file(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.not_found(id),
            _ => io_error("delete", &path)(error),
        })?;
        self.flush(&lock)
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("list the key store", &self.path))? {
            let name = entry.map_err(io_error("list the key store", &self.path))?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".jwe")).and_then(|stem| stem.parse().ok());
            match id {
                Some(id) => ids.push(id),
                None => tracing::debug!("{} is no key of ours", self.path.join(name).display()),
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        Ok(vec![Place::path("sealed keys", &self.path, true)])
    }
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
    use crate::key::{BoundContext, JweRecipient};

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
        assert!(matches!(store.read(&id), Err(StoreError::NotFound { .. })));
        store.create(&id, &sealed(id, 1)).unwrap();
        assert_eq!(store.read(&id).unwrap(), sealed(id, 1));
        assert!(matches!(store.create(&id, &sealed(id, 2)), Err(StoreError::Exists { .. })));
        store.reseal(&id, &sealed(id, 2)).unwrap();
        assert!(matches!(store.reseal(&id, &sealed(id, 2)), Err(StoreError::Outdated { generation: 2, .. })));
        assert_eq!(store.read(&id).unwrap(), sealed(id, 2));
        assert_eq!(store.list().unwrap(), [id]);
        store.delete(&id).unwrap();
        assert!(matches!(store.delete(&id), Err(StoreError::NotFound { .. })));
        assert!(matches!(store.reseal(&id, &sealed(id, 3)), Err(StoreError::NotFound { .. })));
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn names_the_file_that_is_no_sealed_key() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::open(folder.path()).unwrap();
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
            fs::write(store.file(&id), bytes).unwrap();
            let error = store.read(&id).unwrap_err();
            assert!(matches!(error, StoreError::Malformed { .. }), "{case}: {error:?}");
            assert!(error.to_string().contains(&id.to_string()), "{case}: {error}");
        }
    }

    #[test]
    fn one_of_many_writers_wins() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::open(folder.path()).unwrap();
        let (id, start) = (KeyId::random(), Barrier::new(8));
        let wins: Vec<u64> = thread::scope(|scope| {
            let writers: Vec<_> = (1..=8)
                .map(|generation| {
                    let (store, start) = (&store, &start);
                    scope.spawn(move || {
                        start.wait();
                        store.create(&id, &sealed(id, generation)).is_ok().then_some(generation)
                    })
                })
                .collect();
            writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect()
        });
        assert_eq!(wins.len(), 1, "exactly one create succeeds");
        assert_eq!(store.read(&id).unwrap(), sealed(id, wins[0]));
    }

    #[test]
    fn a_killed_writer_leaves_no_key_and_its_remains_go() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::open(folder.path()).unwrap();
        let remains = folder.path().join(".unfinished-abcdef");
        fs::write(&remains, b"{\"protected\":\"ey").unwrap();
        assert!(store.list().unwrap().is_empty());
        let id = KeyId::random();
        store.create(&id, &sealed(id, 1)).unwrap();
        assert!(!remains.exists());
    }
}
