//! What a rotation of a whole container must remember: a file `rotations/NAME` of the state directory, until all is done.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::found::Found;
use crate::{
    base::{
        clock::{date, now},
        key::{KeyReference, StoreName},
    },
    config::Config,
    sys::state,
    verbs::error::Error,
};

/// The file.
#[derive(Serialize, Deserialize)]
struct Journal {
    /// Seconds since 1970-01-01 UTC.
    begun: u64,
    because_leaked: bool,
    /// The volumes that have a new key.
    done: BTreeMap<Uuid, Done>,
}

#[derive(Serialize, Deserialize)]
struct Done {
    key: KeyReference,
    device: PathBuf,
}

/// A rotation of a container that is under way, and that nobody else on this host works on it.
pub(super) struct Batch {
    path: PathBuf,
    journal: Journal,
    _alone: Flock<File>,
}

impl Batch {
    /// Goes on with the one that was begun before, or begins one.
    pub fn claim(config: &Config, container: &StoreName, because_leaked: bool, anew: bool) -> Result<Self, Error> {
        let folder = config.state.join("rotations");
        let alone = state::claim(&folder, container.as_str())
            .map_err(|source| Error::claimed(format!("the rotation of container '{container}'"), source))?;
        let path = folder.join(container.as_str());
        let before = state::read::<Journal>(&path)?.filter(|_| !anew);
        let journal = match before {
            None => Journal { begun: now(), because_leaked, done: BTreeMap::new() },
            Some(journal) if journal.because_leaked == because_leaked => journal,
            // One leak after another: what was rotated before the second one counts no longer.
            Some(journal) => {
                let with = if journal.because_leaked { "with" } else { "without" };
                return Err(Error::Usage(format!(
                    "the rotation of container '{container}' that was begun {with} --because-leaked on {} is not finished: go \
                     on with it, or begin again with --anew",
                    date(journal.begun)
                )));
            }
        };
        let batch = Self { path, journal, _alone: alone };
        batch.write()?;
        Ok(batch)
    }

    pub fn begun(&self) -> u64 {
        self.journal.begun
    }

    /// How many volumes have been done.
    pub fn done(&self) -> usize {
        self.journal.done.len()
    }

    /// Whether it has been done, and still has that key; or is not here any more.
    pub fn has_done(&self, found: &Found) -> bool {
        match (found.volume, &found.key) {
            (Some(volume), key) => self.journal.done.get(&volume).is_some_and(|done| Some(&done.key) == key.as_ref()),
            (None, _) => self.journal.done.values().any(|done| done.device == found.device),
        }
    }

    pub fn note(&mut self, volume: Uuid, key: KeyReference, device: &Path) -> Result<(), Error> {
        self.journal.done.insert(volume, Done { key, device: device.to_owned() });
        self.write()
    }

    fn write(&self) -> Result<(), Error> {
        Ok(state::write(&self.path, &self.journal)?)
    }

    /// Nothing is left: the next one begins anew.
    pub fn end(self) -> Result<(), Error> {
        state::remove(&self.path)?;
        Ok(())
    }
}
