//! Key stores: dictionaries from key id to sealed key.
//!
//! A store is not trusted: it keeps only sealed keys, and what it answers is checked against what was asked.

use std::path::PathBuf;

mod directory;

pub use directory::Directory;

use crate::{
    config::{StoreConfig, StoreKind},
    key::{KeyId, MalformedSealedKey, Place, SealedKey},
};

/// A dictionary from key id to sealed key.
///
/// A key id names one volume key for ever. Re-sealing replaces a sealed key by one of the same volume key for other
/// recipients; a new volume key gets a new id. So no store needs compare-and-swap.
pub trait KeyStore {
    /// The sealed key with this id.
    fn get(&self, id: &KeyId) -> Result<SealedKey, StoreError>;
    /// Stores a new key durably; never overwrites.
    fn create(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError>;
    /// Replaces an existing key by its re-sealed form: same volume key, other recipients.
    fn reseal(&self, id: &KeyId, key: &SealedKey) -> Result<(), StoreError>;
    /// Deletes a key: its volume's data can never be read again (crypto-shred).
    fn delete(&self, id: &KeyId) -> Result<(), StoreError>;
    /// The ids of all keys, in order.
    fn list(&self) -> Result<Vec<KeyId>, StoreError>;
    /// Where the bytes of a key rest, or would rest.
    fn places(&self, id: &KeyId) -> Result<Vec<Place>, StoreError>;
}

/// The store that a part of the configuration describes.
pub fn open(config: &StoreConfig) -> Result<Box<dyn KeyStore>, StoreError> {
    Ok(match config.kind {
        StoreKind::Directory => Box::new(Directory::open(&config.path)?),
    })
}

/// A store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no key of that id.
    #[error("there is no key {id} in {at}")]
    NotFound {
        /// The key.
        id: KeyId,
        /// The store, in words.
        at: String,
    },
    /// There is a key of that id already.
    #[error("{at} already has a key {id}")]
    Exists {
        /// The key.
        id: KeyId,
        /// The store, in words.
        at: String,
    },
    /// The store has a newer generation than the one given to replace it.
    #[error("key {id} has been re-sealed meanwhile (generation {generation})")]
    Outdated {
        /// The key.
        id: KeyId,
        /// The generation in the store.
        generation: u64,
    },
    /// What was found under that id is no sealed key.
    #[error("{} is not the sealed key that was asked for", .path.display())]
    Malformed {
        /// The file or object.
        path: PathBuf,
        /// Why not.
        #[source]
        source: MalformedSealedKey,
    },
    /// The store cannot be reached, read or written.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// "read", "write", ...
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
