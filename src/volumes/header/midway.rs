//! A volume in the middle of a rotation of its key: the first part of its data has the new key, the rest has the old one.

use std::{fs::File, io, path::Path};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    PlainParameters, Volume, VolumeError,
    copies::Copies,
    find,
    reencryption::{self, Side, State},
    rekey,
};
use crate::sys::device::Device;

/// How far a rotation is, and by which header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Midway {
    /// The old key's part begins at this byte of the data.
    pub from_bytes: u64,
    /// The header's sequence number: each stretch that is re-encrypted has a new one.
    pub sequence: u64,
}

/// The part of a volume that has the old key.
#[derive(Clone, Debug)]
pub struct Rest {
    pub midway: Midway,
    /// The volume as if all of it had that key.
    pub volume: Box<Volume>,
}

/// As [`find`], for who maps the volume: one whose key is being rotated is let through, between two stretches, with its rest.
/// One that was killed in a stretch is refused as ever: what is in that is partly old, partly new.
pub fn find_to_map(
    device: &Path,
    detached: Option<&Path>,
    described: Option<&PlainParameters>,
) -> Result<Volume, VolumeError> {
    match find(device, detached, described) {
        Err(VolumeError::Refused { refusal, path }) if detached.is_none() && refusal.is_rotating() => {
            halves(device)?.ok_or(VolumeError::Refused { path, refusal })
        }
        found => found,
    }
}

/// Both by the same header, as it is read now: a worker compares its number again once nobody else can write to the device.
fn halves(device: &Path) -> Result<Option<Volume>, VolumeError> {
    let device = Device::look(device)?;
    let copies = rekey::read(&device)?;
    let Some(from_bytes) = reencryption::boundary(&copies.json) else { return Ok(None) };
    let [new, old] = [Side::New, Side::Old].map(|side| rekey::side(&device, &copies, side));
    let (new, old) = (new?, Box::new(old?));
    let sector_bytes = u64::from(new.geometry.sector_size.bytes());
    let is_whole = from_bytes.is_multiple_of(sector_bytes) && new.geometry == old.geometry;
    let midway = Midway { from_bytes, sequence: copies.sequence() };
    Ok(is_whole.then_some(Volume { rest: Some(Rest { midway, volume: old }), ..new }))
}

impl Midway {
    /// What the header on a device says now. `None` if its data has one key, or if it is not this volume's.
    pub fn of(file: &File, volume: Option<Uuid>) -> io::Result<Option<Self>> {
        let Some(volume) = volume else { return Ok(None) };
        let copies = Copies::read(file)?.filter(|copies| copies.uuid() == Some(volume));
        Ok(copies.and_then(|copies| match reencryption::state(&copies.json) {
            State::Clean | State::Crash => {
                // That of no mapping, if it was killed in a stretch.
                let from_bytes = reencryption::boundary(&copies.json).unwrap_or(u64::MAX);
                Some(Self { from_bytes, sequence: copies.sequence() })
            }
            State::None | State::AllDone | State::Foreign => None,
        }))
    }
}
