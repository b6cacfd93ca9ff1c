//! Give a volume's keyslot a new passphrase. No data is rewritten, and the volume may be attached.
//!
//! At each instant the passphrase that the store gives opens the keyslot. What was done so far is told by the header's token and
//! by the sealed key, so there is no journal: any host goes on. docs/rotation.md has the table of what a crash leaves.

use std::{path::Path, sync::Arc};

use serde::Serialize;

use crate::{
    base::key::KeyReference,
    config::Config,
    unlock::{
        self,
        case::{Case, Circumstances, Proven, Strictness},
        container::{Container, Use},
    },
    verbs::{error::Error, keys, rotate},
    volumes::header::{self, Volume, VolumeError},
};

/// Which volume.
pub struct Request<'a> {
    pub device: &'a Path,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// How strict to be about separation.
    pub separation: Strictness,
}

/// A volume with a new passphrase.
#[derive(Debug, Serialize)]
pub struct Rotated {
    pub key: KeyReference,
    /// The one that it opens.
    pub keyslot: u32,
}

/// Rotates the passphrase, or goes on with that.
pub fn rotate(config: &Config, request: &Request<'_>) -> Result<Rotated, Error> {
    let probe = || header::probe(request.device, request.header);
    let volume = probe()?;
    let none = || unlock::Error::NoReference(request.device.to_owned());
    let (luks, reference) =
        volume.luks().and_then(|luks| luks.reference.clone().map(|key| (luks, key))).ok_or_else(none)?;
    let (rotation, _alone) = rotate::claim(config, luks.uuid)?;
    if rotation.exists() {
        let device = request.device.display();
        return Err(Error::Usage(format!(
            "a rotation of the key has begun: end it with 'cryptattach key rotate {device}'"
        )));
    }
    let container = Arc::new(Container::open(config, &reference.store, None, Use::Keys)?);
    let prove = |volume: Volume| {
        let given = Circumstances { strictness: request.separation, ..Circumstances::default() };
        Case::of(config, volume, reference.clone(), container.clone()).prove(given)
    };
    let proven = prove(volume)?;
    let why = match container.store().consumers(&reference.key)?.is_empty() {
        true => proven.not_replaceable()?,
        false => Some("it has consumers"),
    };
    if let Some(why) = why {
        return Err(Error::Usage(format!("the passphrase of the key {reference} cannot be rotated here: {why}")));
    }
    // With two keyslots and no next passphrase an earlier run had to remove the old one only.
    if proven.volume().claimed_keyslots()?.len() < 2 || proven.has_next_passphrase()? {
        add(&proven)?;
        prove(probe()?)?.take_next_passphrase()?;
    }
    let proven = prove(probe()?)?;
    proven.volume().keep_claimed_keyslot(proven.keyslot()?)?;
    // As it is on the device now, and by what the store has.
    let proven = prove(probe()?)?;
    let keyslot = proven.keyslot()?;
    keys::keep_in_lockbox(config, &reference, &proven)?;
    proven.record("key rotate --passphrase");
    Ok(Rotated { key: reference.clone(), keyslot })
}

/// Has the next passphrase open a keyslot that the token claims. An earlier run may have added that, or claimed it, too.
fn add(proven: &Proven<'_>) -> Result<(), Error> {
    let is_new = !proven.has_next_passphrase()?;
    let next = proven.next_passphrase()?;
    let volume = proven.volume();
    let found = match is_new {
        true => None,
        false => match volume.open_keyslot_of(&next, None) {
            Ok((_, number)) => Some(number),
            Err(VolumeError::WrongPassphrase { .. }) => None,
            Err(error) => return Err(error.into()),
        },
    };
    match found {
        Some(number) if volume.claimed_keyslots()?.contains(&number) => {}
        Some(number) => volume.claim_keyslot(number)?,
        None => volume.add_claimed_keyslot(proven.key()?.key(), &next)?,
    }
    Ok(())
}
