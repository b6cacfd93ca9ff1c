//! What a rotation on this host must know that the header does not say: a file `rekey/UUID` of the state directory for each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{base::key::KeyReference, config::Config, sys::state, verbs::error::Error};

/// The file.
#[derive(Serialize, Deserialize)]
pub(super) struct Journal {
    /// An absolute path.
    pub device: PathBuf,
    pub old: KeyReference,
    pub new: KeyReference,
    /// The header may name both keys, so another host may have gone on with it.
    #[serde(default)]
    pub named: bool,
    /// The header names both keys, and data may have been rewritten.
    pub begun: bool,
    /// The newest header that this host has seen on the device. By an older one, data that has the new key would be taken for
    /// old.
    #[serde(default)]
    pub sequence: u64,
}

fn folder(config: &Config) -> PathBuf {
    config.state.join("rekey")
}

/// Where the journal of a volume is, and that nobody else rotates its key on this host, moves or erases it.
pub(in crate::verbs) fn claim(config: &Config, volume: Uuid) -> Result<(PathBuf, Flock<fs::File>), Error> {
    let alone = state::claim(&folder(config), &volume.to_string());
    let alone =
        alone.map_err(|source| Error::claimed(format!("the key or the header of the volume {volume}"), source))?;
    Ok((path(config, volume), alone))
}

/// The new key of a rotation that was begun on this host and has not ended.
pub(in crate::verbs) fn new_key(journal: &Path) -> Result<Option<KeyReference>, Error> {
    Ok(state::read::<Journal>(journal)?.map(|journal| journal.new))
}

/// Whether a process rotates the key of this volume now.
pub(super) fn is_running(config: &Config, volume: Uuid) -> bool {
    state::is_claimed(&folder(config), &volume.to_string())
}

fn path(config: &Config, volume: Uuid) -> PathBuf {
    folder(config).join(volume.to_string())
}

/// That of a volume.
pub(super) fn of(config: &Config, volume: Uuid) -> Option<Journal> {
    state::read_or_warn(&path(config, volume))
}

/// The rotation that needs this key, as this host knows.
pub(in crate::verbs) fn needs(config: &Config, key: &KeyReference) -> Option<PathBuf> {
    let needed = all(config).into_iter().find(|(_, journal)| journal.old == *key || journal.new == *key);
    needed.map(|(_, journal)| journal.device)
}

/// All of this host. One that cannot be read hides no other.
pub(super) fn all(config: &Config) -> Vec<(Uuid, Journal)> {
    state::all(&folder(config))
}
