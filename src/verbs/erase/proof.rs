//! What is proven before anything goes: the keys are this volume's, and the header is where the volume's is.

use std::sync::Arc;

use super::{Job, Request, journal::Key};
use crate::{
    base::key::KeyReference,
    keys::store,
    sys::device::{Device, DeviceError},
    unlock::{
        self,
        case::{self, Case, Circumstances},
        container::{Container, Use},
        receipt,
    },
    verbs::error::Error,
    volumes::header::{
        self, Volume,
        copies::Copies,
        reencryption::{self, Side, State},
        rekey, wipe,
    },
};

impl Job<'_> {
    /// The volume as each of its keys has it: one, or in the middle of a rotation two, the new one first.
    pub(super) fn volumes(&self, copies: &Copies) -> Result<Vec<Volume>, Error> {
        let probe = || header::probe(&self.data.path, self.request.header);
        let both = || [Side::New, Side::Old].map(|side| rekey::side(&self.place, copies, side));
        let next = reencryption::next_reference(&copies.json).filter(|_| self.request.header.is_none());
        let both = match (reencryption::state(&copies.json), next) {
            (State::Clean | State::Crash | State::AllDone, Some(_)) => both(),
            (State::None, Some(next)) => {
                let now = probe()?;
                if now.reference() == Some(&next) {
                    return Ok(vec![now]);
                }
                both()
            }
            _ => return Ok(vec![probe()?]),
        };
        Ok(both.into_iter().collect::<Result<_, _>>()?)
    }

    /// A key of this volume, by more than the header's word: else whoever writes to the disk has any key deleted. And the key
    /// that it has taken the place of, if that is still there.
    pub(super) fn key(&self, volume: Volume, is_midway: bool) -> Result<(Key, Option<KeyReference>), Error> {
        let Some(reference) = volume.reference().cloned() else { return Err(case::no_reference(&volume).into()) };
        let store = store::kind(self.config.store(&reference.store)?)?.describe();
        let container = Arc::new(Container::open(self.config, &reference.store, None, Use::Keys)?);
        let key = |was_there| -> Result<_, Error> {
            let places = container.places_in_store(&reference.key)?.into_iter().take(receipt::MOST_PLACES);
            let places = places.map(|place| format!("{}: {}", place.what, place.at)).collect();
            let key = reference.clone();
            Ok(Key { key, store: store.clone(), places, was_there, answer: None, lockbox_entry: None })
        };
        if container.store().is_gone(&reference.key)? {
            self.require_no_other(&reference)?;
            return Ok((key(false)?, None));
        }
        let consumers = container.store().consumers(&reference.key)?;
        if !consumers.is_empty() {
            return Err(unlock::Error::InUse { key: reference, consumers }.into());
        }
        let make = if is_midway { Case::of_rotation } else { Case::of };
        let case = make(self.config, volume, reference.clone(), container.clone());
        let proven = case.prove(Circumstances { strictness: self.request.separation, ..Circumstances::default() })?;
        proven.key().map_err(|source| Error::NotProven {
            device: self.data.path.clone(),
            key: reference.clone(),
            source: Box::new(source.into()),
        })?;
        if let Some(why) = proven.not_replaceable()? {
            return Err(Error::Usage(format!("the key {reference} is not erased here: {why}")));
        }
        Ok((key(true)?, proven.replaces()?))
    }

    /// An old header names a key of old, and whoever writes to the disk any: the volume's own key must not stay behind.
    fn require_no_other(&self, named: &KeyReference) -> Result<(), Error> {
        let mut others = Vec::new();
        for store in self.config.stores.keys() {
            let container = Container::open(self.config, store, None, Use::Keys)?;
            others.extend(container.keys_of_volume(self.volume)?.into_iter().map(|key| container.reference(key)));
        }
        match others.is_empty() {
            true => Ok(()),
            false => Err(Error::KeyElsewhere { device: self.data.path.clone(), named: named.clone(), others }),
        }
    }

    pub(super) fn is_there(&self, key: &KeyReference) -> bool {
        let container = Container::open(self.config, &key.store, None, Use::Keys);
        !container.is_ok_and(|container| container.store().is_gone(&key.key).is_ok_and(|gone| gone))
    }
}

/// A detached header says by itself no more than that it is one; the volume's own may be in the wrong place of the command.
pub(super) fn require_its_header(data: &Device, header: &Device) -> Result<(), Error> {
    if data.identity == header.identity {
        return Ok(());
    }
    let own = Device::open(&data.path)
        .and_then(|(device, file)| wipe::volume(&file).map_err(DeviceError::io("read", &device.path)))?;
    let starts = header::probe(&header.path, None).map_or(0, |volume| volume.geometry.data_offset_bytes);
    let why = match own {
        Some(_) => "the device has a header of its own",
        _ if starts > 0 && header.size_bytes > starts => "it is a volume itself, with its data",
        _ => return Ok(()),
    };
    Err(Error::NotItsHeader { device: data.path.clone(), header: header.path.clone(), why })
}

/// What it is instead of a LUKS2 volume.
pub(super) fn not_ours(request: &Request<'_>) -> Error {
    match header::probe(request.device, request.header) {
        Ok(volume) => case::no_reference(&volume).into(),
        Err(error) => Error::from(error),
    }
}
