//! How far an erase on this host is.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Request;
use crate::{
    base::key::KeyReference,
    config::Config,
    sys::{
        device::{Identity, resolved},
        state,
    },
    unlock::receipt::{Answer, HeaderWas, KeyWas},
    verbs::error::Error,
    volumes::header::wipe::Extent,
};

/// How far an erase on this host is: the file `erase/UUID` of the state directory. It is there from before the first key goes
/// until the receipt is written.
#[derive(Serialize, Deserialize)]
pub(super) struct Journal {
    pub device: PathBuf,
    pub detached: Option<PathBuf>,
    pub volume: Uuid,
    pub begun: u64,
    pub header: HeaderWas,
    pub extent: Extent,
    pub keys: Vec<Key>,
    pub kept: Vec<KeyReference>,
    pub receipt: PathBuf,
    /// The device whose header was about to be wiped.
    pub wiping: Option<Ground>,
}

/// A key that has opened this volume, or that its store did not have.
#[derive(Serialize, Deserialize)]
pub(super) struct Key {
    pub key: KeyReference,
    pub store: String,
    pub places: Vec<String>,
    pub was_there: bool,
    pub answer: Option<Answer>,
    pub lockbox_entry: Option<bool>,
}

/// A device, told from all that may get its path. A block device's numbers say nothing after a restart.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ground {
    pub identity: Identity,
    pub boot: Option<String>,
}

impl Key {
    pub(super) fn was(&self) -> KeyWas {
        KeyWas {
            key: self.key.clone(),
            store: self.store.clone(),
            places: self.places.clone(),
            answer: self.answer.unwrap_or(Answer::NotThere),
            lockbox_entry: self.lockbox_entry,
        }
    }
}

pub(super) fn folder(config: &Config) -> PathBuf {
    config.state.join("erase")
}

/// The volume whose erase was begun under this path.
pub(super) fn begun_at(config: &Config, request: &Request<'_>) -> Result<Option<Uuid>, Error> {
    let folder = folder(config);
    let place = |device: &Path, header: Option<&Path>| (resolved(device), header.map(resolved));
    let asked = place(request.device, request.header);
    for name in state::names(&folder)? {
        let journal = state::read::<Journal>(&folder.join(&name))?;
        if let Some(journal) = journal
            && place(&journal.device, journal.detached.as_deref()) == asked
        {
            return Ok(Some(journal.volume));
        }
    }
    Ok(None)
}
