//! Where the rotations stand that this host knows of: by their journals, and by the headers of its volumes.

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::journal;
use crate::{
    base::mapping_name::MappingName,
    config::{Config, VolumeConfig},
    sys::device::{Device, resolved},
    volumes::header::{
        reencryption::{self, State},
        rekey,
    },
};

/// A volume whose key is being rotated.
#[derive(Debug, Serialize)]
pub struct Standing {
    /// What the configuration calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<MappingName>,
    /// The encrypted device.
    pub source: PathBuf,
    pub volume: Uuid,
    pub rotation: Rotation,
}

/// How far it is.
#[derive(Debug, Serialize)]
pub struct Rotation {
    pub state: Worker,
    /// Bytes that have the new key, and the bytes of all; `None` if the device does not have the volume now.
    pub done_bytes: Option<u64>,
    pub all_bytes: Option<u64>,
    /// The command that goes on.
    pub next: Option<String>,
}

/// Whether somebody works on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Worker {
    Running,
    /// Or killed: the same command goes on.
    Paused,
    /// The device of the journal is not there, or another one is.
    Absent,
}

/// All that the journals of this host tell of, and the volumes of its configuration.
pub fn all(config: &Config) -> Vec<Standing> {
    let journals = journal::all(config);
    let devices = journals.iter().map(|(_, journal)| journal.device.as_path());
    let devices = devices.chain(config.volumes.values().map(|volume| volume.device.path()));
    let mut standings: Vec<_> = devices.filter_map(|device| of(config, device)).collect();
    for (volume, journal) in &journals {
        if !standings.iter().any(|standing| standing.volume == *volume) {
            let next = Some(command(&journal.device));
            let rotation = Rotation { state: Worker::Absent, done_bytes: None, all_bytes: None, next };
            standings.push(standing(config, &journal.device, *volume, rotation));
        }
    }
    standings.sort_by(|a, b| (a.volume, &a.source).cmp(&(b.volume, &b.source)));
    standings.dedup_by_key(|standing| standing.volume);
    standings
}

/// That of the volume on a device, if its key is being rotated, here or by another host.
pub fn of(config: &Config, device: &Path) -> Option<Standing> {
    let looked = Device::look(device).ok()?;
    let copies = rekey::read(&looked).ok()?;
    let (volume, json) = (copies.uuid()?, &copies.json);
    let (done, all) = reencryption::progress(json, looked.size_bytes);
    let done = match (reencryption::state(json), reencryption::is_rotation(json)) {
        (State::Clean | State::Crash, true) => done,
        (State::AllDone, true) => all,
        (State::None, true) => all_if(all, reencryption::settled(json).is_some()),
        // The header does not say it yet, or no more.
        (State::None, false) => {
            let new = journal::of(config, volume)?.new;
            let (_, token) = reencryption::our_token(json).unzip();
            all_if(all, token.is_some_and(|token| token.old_reference() == new))
        }
        _ => return None,
    };
    let is_running = journal::is_running(config, volume);
    let (state, next) = match is_running {
        true => (Worker::Running, None),
        false => (Worker::Paused, Some(command(device))),
    };
    let rotation = Rotation { state, done_bytes: Some(done), all_bytes: Some(all), next };
    Some(standing(config, device, volume, rotation))
}

fn all_if(all: u64, is_done: bool) -> u64 {
    if is_done { all } else { 0 }
}

fn standing(config: &Config, device: &Path, volume: Uuid, rotation: Rotation) -> Standing {
    let at = resolved(device);
    let is_it = |volume: &VolumeConfig| resolved(volume.device.path()) == at;
    let name = config.volumes.iter().find(|(_, volume)| is_it(volume)).map(|(name, _)| name.clone());
    Standing { name, source: device.to_owned(), volume, rotation }
}

fn command(device: &Path) -> String {
    format!("cryptattach key rotate {}", device.display())
}

impl Standing {
    /// Whether a person means this one: by its name or by its device.
    pub fn is_about(&self, word: &str) -> bool {
        self.name.as_ref().is_some_and(|name| name.as_str() == word)
            || resolved(Path::new(word)) == resolved(&self.source)
    }
}

impl Rotation {
    /// The same of a volume that is attached: it goes on once it is not.
    pub fn of_mapping(self, name: &MappingName) -> Self {
        Self { next: self.next.map(|next| format!("cryptattach detach {name} && {next}")), ..self }
    }
}

impl std::fmt::Display for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("re-encrypting")?;
        if let (Some(done), Some(all)) = (self.done_bytes, self.all_bytes) {
            write!(f, ", {} %", reencryption::percent((done, all)))?;
        }
        f.write_str(match self.state {
            Worker::Running => ", running",
            Worker::Paused => ", paused",
            Worker::Absent => "; its device is not there, or has another volume now: bring it back",
        })?;
        self.next.iter().try_for_each(|next| write!(f, "; go on with: {next}"))
    }
}
