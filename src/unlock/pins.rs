//! Pins: the volumes that this host has opened, by the digest of their volume key. A header with another digest is another
//! volume's, whoever wrote it; and a key that fits a pinned digest is the right one, whoever stored it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::key::KeyReference,
    config::Config,
    sys::state::{self, StateError},
};

/// Where an initramfs leaves its pins; a tmpfs that outlives it.
const HANDED_ON: &str = "/run/cryptattach/volumes";

/// What this host knows of a volume that it has opened: the file `volumes/UUID` of the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The key that opened it last. A clone of the volume has the same digest and a key of its own.
    pub key: KeyReference,
    /// The volume key's digest, as the header has it.
    pub digest: String,
}

/// The pins of this host.
pub struct Pins {
    folder: PathBuf,
}

impl Pins {
    /// Those in the state directory; nothing is looked at yet.
    pub fn of(config: &Config) -> Self {
        Self { folder: config.state.join("volumes") }
    }

    /// The pin of a volume; `None` if this host has not opened it yet.
    pub fn get(&self, volume: Uuid) -> Result<Option<Pin>, StateError> {
        state::read(&self.file(volume))
    }

    /// Whether this is the digest of a volume that this host has opened.
    pub fn have(&self, volume: Uuid, digest: &str) -> Result<bool, StateError> {
        Ok(self.get(volume)?.is_some_and(|pin| pin.digest == digest))
    }

    /// Remembers a volume whose key has just been compared with its digest.
    pub fn set(&self, volume: Uuid, pin: &Pin) -> Result<(), StateError> {
        if self.get(volume).is_ok_and(|known| known.as_ref() == Some(pin)) {
            return Ok(());
        }
        state::write(&self.file(volume), pin)
    }

    /// Forgets a volume that is no more; whether it was known.
    pub fn forget(&self, volume: Uuid) -> Result<bool, StateError> {
        let handed_on = state::remove(&Path::new(HANDED_ON).join(volume.to_string()))?;
        Ok(state::remove(&self.file(volume))? || handed_on)
    }

    /// Leaves a pin for the system that comes after the initramfs, whose state directory is not there yet.
    pub fn hand_on(&self, volume: Uuid) -> Result<(), StateError> {
        match self.get(volume)? {
            Some(pin) => state::write(&Path::new(HANDED_ON).join(volume.to_string()), &pin),
            None => Ok(()),
        }
    }

    /// Takes the pin over that the initramfs of this boot has left, if this host has none; the file of the pin, if there is one.
    pub fn take_over(&self, volume: Uuid) -> Result<Option<PathBuf>, StateError> {
        let file = self.file(volume);
        if self.get(volume)?.is_none() {
            let Some(pin) = state::read::<Pin>(&Path::new(HANDED_ON).join(volume.to_string()))? else {
                return Ok(None);
            };
            state::write(&file, &pin)?;
        }
        Ok(Some(file))
    }

    fn file(&self, volume: Uuid) -> PathBuf {
        self.folder.join(volume.to_string())
    }
}
