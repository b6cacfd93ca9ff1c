//! The entries: one file per key, `STORE/KEY-ID.jwe`, each a JWE under the lockbox key.

use std::{fs, io, path::PathBuf};

use super::{Lockbox, LockboxError, io_error};
use crate::{
    base::{
        clock::now,
        key::{KeyReference, MAX_SEALED_BYTES, Place, SealedKey, StoreName},
    },
    keys::seal::{Entry, EntryContext, Expected, For, Opened, SealError},
    sys::durable::{self, Folder},
};

const END: &str = ".jwe";

/// A clock that was set back by more than this makes entries of the future.
const CLOCK_STEP_SECONDS: u64 = 300;

/// An entry that is there is not used.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Its time is over.
    #[error("it expired {}", ago(*.since))]
    Expired {
        /// Seconds since then.
        since: u64,
    },
    /// It was made later than now.
    #[error("its creation time is in the future (was this host's clock set back?), so its expiry cannot be checked")]
    Future,
    /// It is damaged, or another lockbox's, or for something else.
    #[error("it does not open")]
    Refused(#[from] SealError),
    /// The store has shown a later form of the key.
    #[error("it is outdated: it has generation {is}; the store has shown generation {seen}")]
    OldGeneration {
        is: u64,
        /// What this host has seen.
        seen: u64,
    },
    /// It says something else of the volume than the header does.
    #[error("it does not fit the volume's header: {0}")]
    Unfit(String),
    /// It cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
}

/// An entry that is not kept yet: its key has still to prove itself.
pub struct NewEntry {
    key: KeyReference,
    context: EntryContext,
    sealed: SealedKey,
}

impl EntryError {
    /// Whether it can never be used again.
    pub fn is_final(&self) -> bool {
        match self {
            // The same entry is right for another volume, and another libcrypto may be right for it.
            Self::Refused(error) => {
                !matches!(error, SealError::OtherVolume { .. } | SealError::Crypto(_) | SealError::Memory(_))
            }
            Self::OldGeneration { .. } => true,
            // An expired one says, as long as the store is out of reach, why it is not used.
            // And it may be the header that is wrong.
            Self::Expired { .. } | Self::Future | Self::Unfit(_) | Self::Io(_) => false,
        }
    }
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} seconds ago"),
        120..7200 => format!("{} minutes ago", seconds / 60),
        7200..172_800 => format!("{} hours ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

impl Lockbox {
    /// The entry of a key, opened, if it is for this volume as in [`Expected`]; `None` if there is none or the lockbox is
    /// closed.
    pub fn entry(&self, key: &KeyReference, volume: For) -> Result<Option<Entry>, EntryError> {
        let Some(lockbox_key) = self.key() else { return Ok(None) };
        let Some(sealed) = self.read(key)? else { return Ok(None) };
        let expected = Expected { key_id: key.key, container: key.store.clone(), volume };
        let entry = lockbox_key.open_entry(&sealed, &expected)?;
        check_time(&entry.context, now())?;
        Ok(Some(entry))
    }

    /// The entry of a key that the store gave, not yet kept. `places` are the store's.
    pub fn prepare(&self, key: &KeyReference, opened: &Opened, places: Vec<Place>) -> Result<NewEntry, LockboxError> {
        let added = now();
        // Rounded up, because a lifetime of less than a second would be none.
        let life = self.config.lifetime.as_secs_f64().ceil() as u64;
        let context = EntryContext { version: 1, added, expires: added + life, key: opened.context.clone(), places };
        let sealed = self.open_key()?.close_entry(&context, &opened.content)?;
        Ok(NewEntry { key: key.clone(), context, sealed })
    }

    /// Keeps an entry, in place of the one that is there.
    pub fn keep_entry(&self, entry: NewEntry) -> Result<EntryContext, LockboxError> {
        let NewEntry { key, context, sealed } = entry;
        let folder = self.folder(&key.store);
        let write = || Folder::make(&folder)?.replace(&format!("{}{END}", key.key), &sealed.to_json());
        write().map_err(io_error("add an entry to the lockbox", &folder))?;
        Ok(context)
    }

    /// Whether there is an entry of a key, which may be used or not.
    pub fn has(&self, key: &KeyReference) -> bool {
        self.file(key).exists()
    }

    /// Removes the entry of a key; whether there was one.
    pub fn forget(&self, key: &KeyReference) -> Result<bool, LockboxError> {
        let folder = self.folder(&key.store);
        match Folder::lock(&folder).and_then(|folder| folder.remove(&format!("{}{END}", key.key))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            removed => removed.map(|()| true).map_err(io_error("remove an entry from", &folder)),
        }
    }

    /// Removes all entries; how many there were.
    ///
    /// Writing over them first would be for show: flash, journals and copy-on-write keep the old blocks. What counts is that
    /// the lockbox key is gone.
    pub fn forget_all(&self) -> Result<usize, LockboxError> {
        self.forget_if(|_| true)
    }

    /// Removes the entries that can never be used again; how many there were.
    pub fn sweep(&self) -> Result<usize, LockboxError> {
        self.forget_if(|key| match self.entry(key, For::Any) {
            Err(error) => error.is_final() || matches!(error, EntryError::Expired { .. }),
            Ok(_) => false,
        })
    }

    fn forget_if(&self, goes: impl Fn(&KeyReference) -> bool) -> Result<usize, LockboxError> {
        let mut gone = 0;
        for key in self.list()?.iter().filter(|key| goes(key)) {
            gone += usize::from(self.forget(key)?);
        }
        Ok(gone)
    }

    /// The keys that have an entry, in order.
    pub fn list(&self) -> Result<Vec<KeyReference>, LockboxError> {
        let path = &self.config.path;
        let failed = || io_error("list the lockbox", path);
        let mut keys = Vec::new();
        let folders = match fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
            folders => folders.map_err(failed())?,
        };
        for folder in folders {
            let name = folder.map_err(failed())?.file_name();
            let Some(store) = name.to_str().and_then(|name| name.parse::<StoreName>().ok()) else { continue };
            let stems = durable::stems(&self.folder(&store), END).map_err(failed())?;
            let ids = stems.iter().filter_map(|stem| stem.parse().ok());
            keys.extend(ids.map(|key| KeyReference { store: store.clone(), key }));
        }
        keys.sort_unstable_by_key(ToString::to_string);
        Ok(keys)
    }

    /// The file of a key's entry.
    pub(super) fn file(&self, key: &KeyReference) -> PathBuf {
        self.folder(&key.store).join(format!("{}{END}", key.key))
    }

    fn folder(&self, store: &StoreName) -> PathBuf {
        self.config.path.join(store.as_str())
    }

    /// An entry as it is in its file.
    pub(super) fn read(&self, key: &KeyReference) -> Result<Option<SealedKey>, EntryError> {
        use io::Read;
        let mut bytes = Vec::new();
        match fs::File::open(self.file(key)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?.take(MAX_SEALED_BYTES as u64 + 1).read_to_end(&mut bytes)?,
        };
        Ok(Some(SealedKey::from_json(&bytes).map_err(SealError::from)?))
    }
}

/// Whether an entry may be used at this time.
pub(super) fn check_time(context: &EntryContext, now: u64) -> Result<(), EntryError> {
    match () {
        () if now >= context.expires => Err(EntryError::Expired { since: now - context.expires }),
        () if context.added > now + CLOCK_STEP_SECONDS => Err(EntryError::Future),
        () => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::key::{BoundContext, KeyId};

    #[test]
    fn an_entry_is_used_from_when_it_was_added_until_it_expires() {
        let container = "cinder".parse().unwrap();
        let key = BoundContext {
            version: 1,
            key_id: KeyId::random(),
            container,
            volume: None,
            project: None,
            generation: 1,
            created: 0,
        };
        let context = EntryContext { version: 1, added: 10_000, expires: 20_000, key, places: Vec::new() };
        assert!(check_time(&context, 10_000).is_ok() && check_time(&context, 19_999).is_ok());
        assert!(check_time(&context, 10_000 - CLOCK_STEP_SECONDS).is_ok(), "the clock may be set right a little");
        assert!(matches!(check_time(&context, 20_000), Err(EntryError::Expired { since: 0 })));
        // A clock that starts in 1970 at each boot would otherwise make entries live for ever.
        assert!(matches!(check_time(&context, 9_000), Err(EntryError::Future)));
        assert!(matches!(check_time(&context, 0), Err(EntryError::Future)));
    }

    #[test]
    fn says_since_when() {
        for (seconds, text) in
            [(3, "3 seconds ago"), (300, "5 minutes ago"), (7200, "2 hours ago"), (200_000, "2 days ago")]
        {
            assert_eq!(EntryError::Expired { since: seconds }.to_string(), format!("it expired {text}"));
        }
    }
}
