//! What this host remembers of an encryption: a file `encrypt/UUID` of the state directory, until its end. The device tells all
//! that is needed to go on; this tells which key is unused if it does not say anything yet, and who is to be asked for.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::key::KeyReference,
    config::Config,
    sys::{device::resolved, state},
    verbs::error::Error,
};

/// The file.
#[derive(Serialize, Deserialize)]
pub(in crate::verbs) struct Journal {
    /// An absolute path.
    pub device: PathBuf,
    pub key: KeyReference,
    /// The device may name the key.
    pub named: bool,
}

fn folder(config: &Config) -> PathBuf {
    config.state.join("encrypt")
}

fn path(config: &Config, volume: Uuid) -> PathBuf {
    folder(config).join(volume.to_string())
}

pub(super) fn write(config: &Config, volume: Uuid, journal: &Journal) -> Result<(), Error> {
    Ok(state::write(&path(config, volume), journal)?)
}

/// Whether there was one.
pub(super) fn remove(config: &Config, volume: Uuid) -> Result<bool, Error> {
    Ok(state::remove(&path(config, volume))?)
}

pub(super) fn exists(config: &Config, volume: Uuid) -> bool {
    path(config, volume).exists()
}

/// Those of a device.
pub(super) fn of(config: &Config, device: &Path) -> impl Iterator<Item = (Uuid, Journal)> {
    let device = resolved(device);
    all(config).into_iter().filter(move |(_, journal)| resolved(&journal.device) == device)
}

/// All of this host. One that cannot be read hides no other.
pub(in crate::verbs) fn all(config: &Config) -> Vec<(Uuid, Journal)> {
    state::all(&folder(config))
}
