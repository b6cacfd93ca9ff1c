//! A volume in the middle of a rotation of its key: the first part of its data has the new key, the rest has the old one.

use std::{fs::File, io, path::Path};

use libcryptsetup_rs::CryptDevice;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    HeaderImage, PlainParameters, Volume, VolumeError,
    copies::Copies,
    find, library, luks,
    reencryption::{self, Side, State},
    rekey,
};
use crate::{
    base::key::KeyReference,
    sys::device::{Device, DeviceError},
};

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
    /// `None` if a run was killed in a stretch: what is in that is partly old, partly new. See [`Volume::midway`].
    midway: Option<Midway>,
    /// The volume as if all of it had that key.
    pub volume: Box<Volume>,
    /// The header that says both.
    pub header: Box<Copies>,
}

/// As [`find`], for who maps the volume: one whose key is being rotated is let through, with its rest.
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
    let (from_bytes, sequence) = (reencryption::boundary(&copies.json), copies.sequence());
    if from_bytes.is_none() && reencryption::state(&copies.json) != State::Crash {
        return Ok(None);
    }
    let [new, old] = [Side::New, Side::Old].map(|side| rekey::side(&device, &copies, side));
    let (new, old) = (new?, Box::new(old?));
    let sector_bytes = u64::from(new.geometry.sector_size.bytes());
    let is_whole = from_bytes.is_none_or(|from| from.is_multiple_of(sector_bytes)) && new.geometry == old.geometry;
    let midway = from_bytes.map(|from_bytes| Midway { from_bytes, sequence });
    Ok(is_whole.then_some(Volume { rest: Some(Rest { midway, volume: old, header: Box::new(copies) }), ..new }))
}

impl Volume {
    /// How far a rotation of its key is, for who maps it; `None` if all its data has one key. A volume is not mapped before
    /// the stretch is recovered in which a run was killed.
    pub fn midway(&self) -> Result<Option<Midway>, VolumeError> {
        match &self.rest {
            None => Ok(None),
            Some(Rest { midway: Some(midway), .. }) => Ok(Some(*midway)),
            Some(_) => Err(VolumeError::HalfWritten { path: self.device.path.clone() }),
        }
    }

    /// The key to ask for where this one is asked for: the old key opens a part of the volume only, the new one names it.
    pub fn current(&self, key: KeyReference) -> KeyReference {
        let is_old = self.rest.as_ref().is_some_and(|rest| rest.volume.reference() == Some(&key));
        self.reference().filter(|_| is_old).cloned().unwrap_or(key)
    }
}

impl Rest {
    /// A context of libcryptsetup's with both keys' keyslots, over exactly the bytes that were checked, if the device still
    /// has that header. As it is between two stretches, libcryptsetup writes nothing.
    pub fn load(&self, data: &Path) -> Result<(HeaderImage, CryptDevice), VolumeError> {
        let Volume { device, geometry, .. } = &*self.volume;
        let image = with_keyslots(device, geometry.data_offset_bytes, &self.header)?;
        let failed = |source| VolumeError::Library { action: "read the header of", path: device.path.clone(), source };
        let context = library::call(|| luks::load(&image, data)).map_err(failed)?;
        Ok((image, context))
    }
}

/// A header that was checked, with its keyslots, in memory: the device must still have it.
pub(super) fn with_keyslots(device: &Device, end: u64, checked: &Copies) -> Result<HeaderImage, VolumeError> {
    let failed = |source| VolumeError::from(DeviceError::io("read", &device.path)(source));
    let image = HeaderImage::read(&device.reopen()?, device.size_bytes, end).map_err(failed)?;
    let now = Copies::read(image.file()).map_err(failed)?;
    if !now.is_some_and(|now| now.is(checked)) {
        return Err(VolumeError::HeaderChanged { path: device.path.clone() });
    }
    // A copy that is damaged or older was not checked.
    checked.write(image.file(), &checked.json).map_err(failed)?;
    Ok(image)
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
