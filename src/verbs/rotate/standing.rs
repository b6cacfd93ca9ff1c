//! Where the rotations and encryptions in place stand that this host knows of: by their journals, and by the headers of its
//! volumes.

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::journal;
use crate::{
    base::mapping_name::MappingName,
    config::{Config, VolumeConfig},
    sys::{
        device::{Device, resolved},
        systemd,
    },
    verbs::encrypt,
    volumes::{
        backend::{BackendKind, MappingStatus},
        header::{
            encrypting,
            reencryption::{self, State},
            rekey,
        },
    },
};

/// A volume whose key is being rotated, or that is being encrypted in place.
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
    pub kind: Kind,
    pub state: Worker,
    /// Bytes that have the new key, and the bytes of all; `None` if the device does not have the volume now.
    pub done_bytes: Option<u64>,
    pub all_bytes: Option<u64>,
    /// The command that goes on.
    pub next: Option<String>,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Rotate,
    Encrypt,
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
    let rotations = journal::all(config).into_iter().map(|(volume, journal)| (volume, journal.device, Kind::Rotate));
    let encryptions = encrypt::journal::all(config).into_iter();
    let encryptions = encryptions.map(|(volume, journal)| (volume, journal.device, Kind::Encrypt));
    let journals: Vec<_> = rotations.chain(encryptions).collect();
    let devices = journals.iter().map(|(_, device, _)| device.as_path());
    let devices = devices.chain(config.volumes.values().map(|volume| volume.device.path()));
    let mut standings: Vec<_> = devices.filter_map(|device| of(config, device)).collect();
    for (volume, device, kind) in &journals {
        if !standings.iter().any(|standing| standing.volume == *volume) {
            let next = Some(command(*kind, device));
            // An encryption that was stopped before the header was written.
            let is_early = *kind == Kind::Encrypt && Device::look(device).is_ok();
            let state = if is_early { Worker::Paused } else { Worker::Absent };
            let rotation = Rotation { kind: *kind, state, done_bytes: None, all_bytes: None, next };
            standings.push(standing(config, device, *volume, rotation));
        }
    }
    standings.sort_by(|a, b| (a.volume, &a.source).cmp(&(b.volume, &b.source)));
    standings.dedup_by_key(|standing| standing.volume);
    standings
}

/// The volumes that a rotation on this host has not ended, for those who have it go on.
pub fn unfinished(config: &Config) -> impl Iterator<Item = Uuid> {
    journal::all(config).into_iter().map(|(volume, _)| volume)
}

/// Has systemd go on with the rotation of a volume that is attached now, wherever it was begun.
pub fn go_on(config: &Config, device: &Path) {
    let paused =
        of(config, device).filter(|it| matches!((it.rotation.kind, it.rotation.state), (Kind::Rotate, Worker::Paused)));
    if let Some(Err(error)) = paused.map(|it| systemd::start(&systemd::rekey_unit(it.volume))) {
        tracing::warn!("the rotation of the key of {} does not go on: {error}", device.display());
    }
}

/// That of the volume on a device, if its key is being rotated, or if it is being encrypted, here or by another host.
pub fn of(config: &Config, device: &Path) -> Option<Standing> {
    let looked = Device::look(device).ok()?;
    let copies = rekey::read(&looked).ok()?;
    let (volume, json) = (copies.uuid()?, &copies.json);
    if let Some(progress) = encrypting::progress(json, looked.size_bytes) {
        return Some(at_work(config, device, volume, Kind::Encrypt, progress.done()));
    }
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
    Some(at_work(config, device, volume, Kind::Rotate, (done, all)))
}

fn at_work(config: &Config, device: &Path, volume: Uuid, kind: Kind, (done, all): (u64, u64)) -> Standing {
    let (state, next) = match journal::is_running(config, volume) {
        true => (Worker::Running, None),
        false => (Worker::Paused, Some(command(kind, device))),
    };
    let rotation = Rotation { kind, state, done_bytes: Some(done), all_bytes: Some(all), next };
    standing(config, device, volume, rotation)
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

fn command(kind: Kind, device: &Path) -> String {
    let verb = match kind {
        Kind::Rotate => "key rotate",
        Kind::Encrypt => "encrypt",
    };
    format!("cryptattach {verb} {}", device.display())
}

impl Standing {
    /// Whether a person means this one: by its name or by its device.
    pub fn is_about(&self, word: &str) -> bool {
        self.name.as_ref().is_some_and(|name| name.as_str() == word)
            || resolved(Path::new(word)) == resolved(&self.source)
    }
}

impl Rotation {
    /// The same of a volume that is attached: dm-crypt's goes on as it is, any other once it is detached.
    pub fn of_mapping(self, status: &MappingStatus) -> Self {
        if status.backend == BackendKind::DmCrypt && status.trouble.is_none() {
            return self;
        }
        Self { next: self.next.map(|next| format!("cryptattach detach {} && {next}", status.name)), ..self }
    }
}

impl std::fmt::Display for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.kind {
            Kind::Rotate => "re-encrypting",
            Kind::Encrypt => "being encrypted in place",
        })?;
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
