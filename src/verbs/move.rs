//! Move keys to another store, with no moment at which no stored key opens the volume.
//!
//! The key is stored in its new place, read back and opened before the volume's header names that place; and the header as it
//! is on the device has been opened by what the new store has before the old key is deleted. Only the header is written, so
//! the volume may be attached. docs/move.md has the table of what a crash leaves at each step.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::{
        chain::chain,
        key::{BoundContext, KeyId, KeyReference, StoreName},
    },
    config::Config,
    keys::store::{StoreError, Stored},
    sys::{
        device::{Identity, by_uuid},
        state,
        stop::Stop,
    },
    unlock::{
        self,
        case::{Case, Circumstances, Proven, Strictness},
        container::{Container, Progress, Step, Use, for_each, lock},
    },
    verbs::{error::Error, keys, rotate},
    volumes::header::{self, Volume, VolumeError, rekey},
};

/// Where to, and how strict to be about separation.
pub struct Request<'a> {
    pub to: &'a StoreName,
    /// `allow_shared` lets a key go that rests on its volume's device; never to such a place.
    pub separation: Strictness,
}

/// A volume on this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct At {
    pub device: PathBuf,
    /// A detached LUKS header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<PathBuf>,
}

/// A key in its new place.
#[derive(Debug, Serialize)]
pub struct Moved {
    pub key: KeyReference,
    pub old: KeyReference,
    pub device: PathBuf,
}

/// What became of a container's keys.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub moved: Vec<Moved>,
    /// Those that are not to be moved, or not from here, and why.
    pub left: Vec<(KeyId, String)>,
    /// Those that could not be moved, and why.
    pub failed: Vec<(KeyId, String)>,
    /// How many were not begun when the run was asked to stop.
    pub waiting: usize,
}

/// A move that has begun: the file `move/STORE/KEY-ID` of the state directory.
#[derive(Serialize, Deserialize)]
struct Journal {
    volume: Uuid,
    at: At,
    new: KeyReference,
}

/// A key that nothing needs any more: the header, read from the device, names the other one; that has been fetched from its
/// store, has opened the volume, and says all that this one says.
struct Superseded(KeyReference);

struct Job<'a> {
    config: &'a Config,
    request: &'a Request<'a>,
    from: Arc<Container>,
    to: Arc<Container>,
    /// The volume that a person has named.
    given: Option<At>,
    /// The volumes that the configuration names, by what their headers say.
    configured: BTreeMap<Uuid, Vec<At>>,
}

/// Moves one key. The volume is looked for unless it is given.
pub fn one(config: &Config, request: &Request<'_>, old: &KeyReference, volume: Option<At>) -> Result<Moved, Error> {
    let job = Job::new(config, request, &old.store, volume)?;
    let at = job.look(old)?;
    job.carry(old, &at)
}

/// Moves all keys of a container whose volumes are on this host, or goes on with that. Each is looked at before the first one
/// is moved.
pub fn all(config: &Config, request: &Request<'_>, from: &StoreName, progress: &Progress<'_>) -> Result<Report, Error> {
    let stop = Stop::by_signals().map_err(Error::io("block signals"))?;
    let job = Job::new(config, request, from, None)?;
    let (mut report, mut movable, mut refused) = (Report::default(), Vec::new(), Vec::new());
    for old in job.keys(from)? {
        match job.look(&old) {
            Ok(at) => movable.push((old, at)),
            Err(error @ Error::Unlock(unlock::Error::NotSeparate(_))) => refused.push(error),
            // A store may list a key that was moved before.
            Err(Error::Unlock(unlock::Error::Store(StoreError::NotFound { id, .. }))) if id == old.key.to_string() => {}
            Err(error) => report.note(&old, &error, progress),
        }
    }
    if !refused.is_empty() {
        refused.iter().for_each(|refusal| tracing::warn!("{}", chain(refusal)));
        let (to, volumes) = (request.to.clone(), refused.len());
        return Err(Error::NotApartThere { to, volumes, source: Box::new(refused.swap_remove(0)) });
    }
    let report = Mutex::new(report);
    for_each(&movable, progress, &|(old, at)| match stop.is_asked() {
        true => lock(&report).waiting += 1,
        false => {
            let carried = job.carry(old, at);
            let mut report = lock(&report);
            match carried {
                Ok(moved) => report.moved.push(moved),
                Err(error) => report.note(old, &error, progress),
            }
        }
    });
    Ok(std::mem::take(&mut *lock(&report)))
}

impl Report {
    fn note(&mut self, old: &KeyReference, error: &Error, progress: &Progress<'_>) {
        let (what, list, why) = match error {
            Error::NotMovable { why, .. } => ("left alone", &mut self.left, why.clone()),
            Error::VolumeElsewhere { volume, .. } => {
                let why = "its volume {} is not on this host, or in a file: 'key move' takes that by --volume";
                ("left alone", &mut self.left, why.replace("{}", &volume.to_string()))
            }
            error => ("failed", &mut self.failed, chain(error)),
        };
        progress(Step::Not(what, &old.key, &why));
        list.push((old.key, why));
    }
}

impl At {
    fn probe(&self) -> Result<Volume, VolumeError> {
        header::probe(&self.device, self.header.as_deref())
    }

    /// Where its LUKS2 header is, and the UUID that it has, if one can be read.
    fn found(&self) -> Option<(Identity, Uuid)> {
        rekey::found(self.header.as_deref().unwrap_or(&self.device))
    }
}

impl<'a> Job<'a> {
    fn new(config: &'a Config, request: &'a Request<'a>, from: &StoreName, given: Option<At>) -> Result<Self, Error> {
        if from == request.to {
            return Err(Error::Usage(format!("the keys of '{from}' are there already")));
        }
        let open = |name| Container::open(config, name, None, Use::Keys).map(Arc::new);
        let mut configured: BTreeMap<Uuid, Vec<At>> = BTreeMap::new();
        for (device, header) in config.devices() {
            let at = At { device: device.to_owned(), header: header.map(Path::to_owned) };
            if let Some((_, uuid)) = at.found() {
                configured.entry(uuid).or_default().push(at);
            }
        }
        Ok(Self { config, request, from: open(from)?, to: open(request.to)?, given, configured })
    }

    /// The keys that are in the container, and those whose move was killed in the last moment.
    fn keys(&self, from: &StoreName) -> Result<Vec<KeyReference>, Error> {
        let mut keys: BTreeSet<_> = self.from.store().list()?.into_iter().collect();
        let begun = state::names(&self.config.state.join("move").join(from.as_str()))?;
        keys.extend(begun.iter().filter_map(|name| name.parse::<KeyId>().ok()));
        Ok(keys.into_iter().map(|key| self.from.reference(key)).collect())
    }

    fn journal(&self, old: &KeyReference) -> PathBuf {
        self.config.state.join("move").join(old.store.as_str()).join(old.key.to_string())
    }

    /// Where the volume of a key is, if the key may be moved and would rest apart from it. Nothing is written.
    fn look(&self, old: &KeyReference) -> Result<At, Error> {
        let cannot = |why: &str| Error::NotMovable { key: old.clone(), why: why.to_owned() };
        let begun = state::read::<Journal>(&self.journal(old))?;
        if let Some(Journal { new, .. }) = begun.as_ref().filter(|begun| begun.new.store != *self.request.to) {
            return Err(cannot(&format!("its move to '{}' has begun: end that first", new.store)));
        }
        let uuid = match self.from.store().get(&old.key) {
            Ok(Stored::Released(_)) => return Err(cannot("the store itself keeps it, for other programs")),
            Ok(Stored::Sealed(sealed)) => {
                if !self.from.store().consumers(&old.key)?.is_empty() {
                    return Err(cannot("it has consumers"));
                }
                let BoundContext { volume, project, .. } = sealed
                    .claimed_context()
                    .map_err(|source| unlock::Error::KeyRefused { reference: old.clone(), source: source.into() })?;
                if project.is_some() {
                    return Err(cannot("it is a tenant's: whoever has asked for it knows it by its id"));
                }
                volume.ok_or_else(|| cannot("no header names it"))?
            }
            // An earlier run has deleted it.
            Err(gone @ StoreError::NotFound { .. }) => {
                let of_copy = || match self.to.store().get(&old.key) {
                    Ok(Stored::Sealed(copy)) => copy.claimed_context().ok()?.volume,
                    _ => None,
                };
                begun.as_ref().map(|begun| begun.volume).or_else(of_copy).ok_or(gone)?
            }
            Err(error) => return Err(error.into()),
        };
        let own = self.config.volumes.values().filter_map(|volume| volume.key.as_ref());
        if own.chain(self.config.boot.volumes.iter().flat_map(|volume| &volume.keys)).any(|named| named == old) {
            return Err(cannot(
                "the configuration names it; the header does so, too: remove it from the configuration",
            ));
        }
        let at = self.find(old, uuid, begun)?;
        let volume = at.probe()?;
        let place = match volume.reference() {
            Some(named) if named == old => self.to.reference(old.key),
            Some(named) if named.store == *self.request.to => named.clone(),
            Some(named) => return Err(cannot(&format!("the header of its volume names another key, {named}"))),
            None => return Err(cannot("the header of its volume has no token that names it")),
        };
        self.there(volume, place)?;
        Ok(at)
    }

    fn find(&self, key: &KeyReference, uuid: Uuid, begun: Option<Journal>) -> Result<At, Error> {
        if let Some(given) = &self.given {
            return Ok(given.clone());
        }
        let by_uuid = At { device: by_uuid(uuid), header: None };
        let configured = self.configured.get(&uuid).into_iter().flatten().cloned();
        let mut known = configured.chain(begun.map(|begun| begun.at)).chain([by_uuid]).filter_map(|at| {
            let (identity, is) = at.found()?;
            (is == uuid).then_some((at, identity))
        });
        let Some((found, identity)) = known.next() else {
            return Err(Error::VolumeElsewhere { key: key.clone(), volume: uuid });
        };
        // With one of them changed and the old key gone, the other one would not come up again.
        match known.find(|(_, other)| *other != identity) {
            Some((copy, _)) => Err(Error::Copied { device: found.device, copy: copy.device }),
            None => Ok(found),
        }
    }

    /// Moves a key, or goes on with that.
    fn carry(&self, old: &KeyReference, at: &At) -> Result<Moved, Error> {
        let volume = at.probe()?;
        let cannot = |why| Error::NotMovable { key: old.clone(), why };
        let uuid = volume.uuid().ok_or_else(|| cannot("its volume has no header".to_owned()))?;
        let (rotation, _alone) = rotate::claim(self.config, uuid)?;
        if rotation.exists() {
            let device = at.device.display();
            return Err(cannot(format!("a rotation has begun: end it with 'cryptattach key rotate {device}'")));
        }
        let new = match volume.reference() {
            Some(named) if named.store == *self.request.to => named.clone(),
            _ => self.copy(old, at, uuid, volume)?,
        };
        // As it is on the device now, and by what the new store has.
        let moved = self.there(at.probe()?, new.clone())?;
        let superseded = self.superseded(old, &moved)?;
        keys::keep_in_lockbox(self.config, old, &moved)?;
        moved.record("key move");
        match superseded {
            Some(Superseded(old)) => keys::delete_superseded(self.config, &self.from, &old)?,
            // It was killed before it could put that on record.
            None => keys::deleted(self.config, old, None),
        }
        state::remove(&self.journal(old))?;
        Ok(Moved { key: new, old: old.clone(), device: at.device.clone() })
    }

    /// Stores the key in its new place, then has the header name that.
    fn copy(&self, old: &KeyReference, at: &At, uuid: Uuid, volume: Volume) -> Result<KeyReference, Error> {
        let begun = state::read::<Journal>(&self.journal(old))?;
        let wished = begun.map_or_else(|| self.to.reference(old.key), |begun| begun.new);
        if let Err(StoreError::NotFound { .. }) = self.from.store().get(&old.key) {
            // The header is an older one that was restored, and the key in its new place opens the volume.
            self.there(volume.clone(), wished.clone())?.key()?;
            volume.move_token(old, &wished)?;
            return Ok(wished);
        }
        let from = self.here(volume, old)?;
        if let Some(why) = from.not_replaceable()? {
            return Err(Error::NotMovable { key: old.clone(), why: why.to_owned() });
        }
        let (target, is_there) = self.target(&from, wished)?;
        let new = target.reference().clone();
        if !is_there {
            state::write(&self.journal(old), &Journal { volume: uuid, at: at.clone(), new: new.clone() })?;
            target.store_copy(&from)?;
        }
        from.volume().move_token(old, &new)?;
        Ok(new)
    }

    /// The new place: with what an earlier run has stored there, or under the key's own id if that is free, or a new one.
    fn target(&self, from: &Proven<'_>, wished: KeyReference) -> Result<(Proven<'a>, bool), Error> {
        let is_free = match self.to.store().get(&wished.key) {
            Ok(_) | Err(StoreError::Malformed { .. }) => false,
            Err(StoreError::NotFound { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        let target = self.there(from.volume().clone(), wished)?;
        if !is_free && target.is_copy(from).is_ok_and(|is_copy| is_copy) {
            return Ok((target, true));
        }
        if is_free && self.to.store().takes_any_id() {
            return Ok((target, false));
        }
        let new = self.to.new_reference()?;
        let target = self.there(from.volume().clone(), new.clone());
        target.map(|target| (target, false)).inspect_err(|_| self.to.store().abandon(&new.key))
    }

    /// Only here a key is found to be superseded; `None` if an earlier run has deleted it.
    fn superseded(&self, old: &KeyReference, moved: &Proven<'_>) -> Result<Option<Superseded>, Error> {
        moved.key()?;
        let is_named = moved.volume().reference() == Some(moved.reference());
        match self.from.store().get(&old.key) {
            // Where the disk is not mounted it is not there either.
            Err(StoreError::NotFound { .. }) if is_named && self.from.store().is_gone(&old.key)? => Ok(None),
            _ if is_named && moved.is_copy(&self.here(moved.volume().clone(), old)?)? => {
                Ok(Some(Superseded(old.clone())))
            }
            _ => {
                let why = format!("{}, which the header of its volume names, is no copy of it", moved.reference());
                Err(Error::NotMovable { key: old.clone(), why })
            }
        }
    }

    fn here(&self, volume: Volume, old: &KeyReference) -> Result<Proven<'a>, Error> {
        let given = Circumstances { strictness: self.request.separation, ..Circumstances::default() };
        Ok(Case::of_rotation(self.config, volume, old.clone(), self.from.clone()).prove(given)?)
    }

    fn there(&self, volume: Volume, new: KeyReference) -> Result<Proven<'a>, Error> {
        let strictness = Strictness { allow_shared: false, ..self.request.separation };
        let given = Circumstances { strictness, ..Circumstances::default() };
        Ok(Case::of(self.config, volume, new, self.to.clone()).prove(given)?)
    }
}
