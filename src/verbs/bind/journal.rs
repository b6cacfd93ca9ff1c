//! What `bind` has made for a volume, so that a run that was stopped goes on, and `unbind` takes back that and nothing else.
//!
//! Each is noted before it is made: what is noted may not be there, and what is not noted is not ours.

use std::{fs::File, path::PathBuf};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::boot::Entry;
use crate::{
    base::{
        key::{KeyReference, StoreName},
        mapping_name::MappingName,
    },
    config::Config,
    sys::state,
    verbs::error::Error,
};

/// No volume's UUID.
const HOST: &str = "host";

/// What was made for one volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Journal {
    /// The volume's key, and the token that names it.
    pub key: Option<KeyReference>,
    /// A line of crypttab.
    pub crypttab: Option<Entry>,
    /// A section of the configuration.
    pub volume: Option<MappingName>,
    /// All is made, and was tried.
    pub done: bool,
}

/// What was made for all volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Made {
    /// The configuration's file.
    pub config: bool,
    /// This host's key in its TPM.
    pub tpm_key: Option<PathBuf>,
    pub store: Option<StoreName>,
}

fn folder(config: &Config) -> PathBuf {
    config.state.join("bind")
}

fn path(config: &Config, volume: Uuid) -> PathBuf {
    folder(config).join(volume.to_string())
}

/// That nobody else binds or unbinds here.
pub fn claim(config: &Config) -> Result<Flock<File>, Error> {
    let alone = state::claim(&folder(config), HOST);
    alone.map_err(|source| Error::claimed("what is bound on this host".to_owned(), source))
}

pub fn read(config: &Config, volume: Uuid) -> Result<Option<Journal>, Error> {
    Ok(state::read(&path(config, volume))?)
}

pub fn write(config: &Config, volume: Uuid, journal: &Journal) -> Result<(), Error> {
    Ok(state::write(&path(config, volume), journal)?)
}

pub fn remove(config: &Config, volume: Uuid) -> Result<bool, Error> {
    Ok(state::remove(&path(config, volume))?)
}

pub fn made(config: &Config) -> Result<Made, Error> {
    Ok(state::read(&folder(config).join(HOST))?.unwrap_or_default())
}

/// Notes it; nothing, if nothing is left of it.
pub fn note_made(config: &Config, made: &Made) -> Result<(), Error> {
    let path = folder(config).join(HOST);
    match *made == Made::default() {
        true => state::remove(&path)?,
        false => state::write(&path, made).map(|()| true)?,
    };
    Ok(())
}
