//! The volumes of a container on this host: those of the configuration and of crypttab, and all block devices whose headers
//! name a key of its store.

use std::{
    fs,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use crate::{
    base::key::{KeyReference, StoreName},
    config::{Config, crypttab},
    keys::store::{KeyStore, StoreError, Stored},
    sys::{block, device::Device, stores::Footing},
    verbs::error::Error,
    volumes::header::{
        reencryption::{self, State},
        rekey,
    },
};

/// A volume whose key is in the store.
pub(super) struct Found {
    pub device: PathBuf,
    pub volume: Option<Uuid>,
    pub size_bytes: u64,
    /// The key that the beginning of its data has.
    pub key: Option<KeyReference>,
    /// Its rotation was begun.
    pub is_begun: bool,
    /// A passphrase opens it, which other programs are given.
    pub has_passphrase: bool,
    /// When its key was made, as the store says: good enough for an order.
    pub created: u64,
    /// Why its key cannot be rotated.
    pub problem: Option<Error>,
    footing: Option<Footing>,
}

/// Where to look.
struct Place {
    device: PathBuf,
    /// Its header is detached.
    is_detached: bool,
    /// The configuration says that its key is in the store.
    is_ours: bool,
}

/// All of them. A store that cannot be asked ends it: nothing is begun then.
pub(super) fn all(config: &Config, name: &StoreName, store: &dyn KeyStore) -> Result<Vec<Found>, Error> {
    let mut all: Vec<Found> = Vec::new();
    for place in places(config, name)? {
        let Some(mut found) = look(place, name) else { continue };
        if let Some(key) = &found.key {
            let Some(created) = created(store, key)? else {
                let device = found.device.display();
                tracing::warn!("{device} is left out: it names the key {key}, which the store does not have");
                continue;
            };
            found.created = created;
        }
        let same = |other: &&mut Found| other.volume.is_some() && other.volume == found.volume;
        let Some(other) = all.iter_mut().find(same) else {
            all.push(found);
            continue;
        };
        // The same bytes by another name: whoever is on top of the other has them.
        match (&other.footing, &found.footing) {
            (Some(before), Some(now)) if before.overlaps(now) => {
                if now.stands_on(before) {
                    *other = found;
                }
            }
            _ => {
                let (device, copy) = (other.device.clone(), found.device);
                other.problem = Some(Error::Copied { device, copy });
            }
        }
    }
    Ok(all)
}

/// What the configuration and crypttab name, as they name it, and then all that the kernel has.
fn places(config: &Config, name: &StoreName) -> Result<Vec<Place>, Error> {
    let crypttab = crypttab::read(Path::new(crypttab::PATH)).map_err(Error::io("read /etc/crypttab"))?;
    let listed = config.volumes.values().map(|volume| Place {
        device: volume.device.path().to_owned(),
        is_detached: volume.header.is_some(),
        is_ours: volume.store(config).as_ref() == Some(name),
    });
    let other = |device: PathBuf| Place { device, is_detached: false, is_ours: false };
    let entries = crypttab.iter().filter(|entry| entry.header().is_none());
    let entries = entries.map(|entry| other(entry.device.path().to_owned()));
    let devices = fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
    let mut devices: Vec<_> = devices.map(|entry| entry.file_name()).collect();
    devices.sort();
    let device = |name: &std::ffi::OsString| other(block::node(&name.to_string_lossy()));
    Ok(listed.chain(entries).chain(devices.iter().map(device)).collect())
}

fn look(place: Place, name: &StoreName) -> Option<Found> {
    let Place { device: path, is_detached, is_ours } = place;
    let cannot = |problem, size_bytes| Found {
        device: path.clone(),
        volume: None,
        size_bytes,
        key: None,
        is_begun: false,
        has_passphrase: false,
        created: 0,
        problem: Some(problem),
        footing: None,
    };
    let device = match Device::look(&path) {
        Ok(device) => device,
        Err(error) => return is_ours.then(|| cannot(error.into(), 0)),
    };
    if is_detached {
        return is_ours.then(|| cannot(Error::detached_header(), device.size_bytes));
    }
    let copies = match rekey::read(&device) {
        Ok(copies) => copies,
        Err(error) => return is_ours.then(|| cannot(error.into(), device.size_bytes)),
    };
    let json = &copies.json;
    let token = reencryption::our_token(json).map(|(_, token)| token);
    let Some((token, digest)) = token.zip(reencryption::digest_of(json, "0")) else {
        let unnamed = || crate::unlock::Error::NoReference(path.clone()).into();
        return is_ours.then(|| cannot(unnamed(), device.size_bytes));
    };
    let key = token.reference(digest);
    (key.store == *name).then(|| Found {
        volume: copies.uuid(),
        size_bytes: device.size_bytes,
        key: Some(key),
        is_begun: token.has_next() || reencryption::state(json) != State::None,
        has_passphrase: !reencryption::is_strict(json),
        created: 0,
        problem: None,
        footing: Some(Footing::of(device.identity)),
        device: path.clone(),
    })
}

/// When the key was made; `None` if the store does not have it.
fn created(store: &dyn KeyStore, key: &KeyReference) -> Result<Option<u64>, Error> {
    match store.get(&key.key) {
        Ok(Stored::Sealed(sealed)) => Ok(Some(sealed.claimed_context().map_or(0, |context| context.created))),
        Ok(Stored::Released(released)) => Ok(Some(released.object.facts.created.unwrap_or(0))),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
