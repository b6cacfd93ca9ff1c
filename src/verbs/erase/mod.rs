//! Erase a volume for ever: its key goes in its store first, and then its header. docs/erase.md says why in that order, what a
//! crash leaves at each step, and what the receipt promises.

mod journal;
mod proof;
mod receipt;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use nix::fcntl::Flock;
use openssl::sha::sha256;
use serde::Serialize;
use uuid::Uuid;

use self::{
    journal::{Ground, Journal, Key, begun_at, folder},
    proof::{not_ours, require_its_header},
    receipt::require_folder,
};
use crate::{
    base::{clock::now, key::KeyReference},
    config::Config,
    keys::store::StoreError,
    sys::{
        device::{Device, DeviceError, DeviceKind},
        state,
    },
    unlock::{
        self,
        audit::{self, Event},
        case::Strictness,
        container::{Container, Use},
        lockbox::Lockbox,
        pins::Pins,
        receipt::{Answer, Desk, HeaderWas, Receipt},
    },
    verbs::{error::Error, rotate},
    volumes::{
        backend,
        header::{
            Volume, VolumeError,
            copies::Copies,
            wipe::{self, Extent},
        },
    },
};

/// Which volume, and who agrees.
pub struct Request<'a> {
    pub device: &'a Path,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// Where the receipt goes; into the state directory unless given.
    pub receipt: Option<&'a Path>,
    /// How strict to be about separation.
    pub separation: Strictness,
    /// Hears what is about to go, and refuses.
    pub confirm: &'a dyn Fn(&Doomed<'_>) -> Result<(), Error>,
}

/// What is about to go.
pub struct Doomed<'a> {
    pub device: &'a Path,
    pub volume: Uuid,
    pub keys: Vec<&'a KeyReference>,
}

/// A volume that is no more.
#[derive(Debug, Serialize)]
pub struct Erased {
    /// The receipt's file.
    pub file: PathBuf,
    /// Who has signed it.
    pub signer: String,
    pub receipt: Receipt,
}

struct Job<'a> {
    config: &'a Config,
    request: &'a Request<'a>,
    data: Device,
    /// Where the header is: the same device, or a detached header.
    place: Device,
    /// That one for writing, and both for nobody else.
    file: File,
    _data: Option<File>,
    volume: Uuid,
    journal: PathBuf,
    rotation: PathBuf,
    _alone: Flock<File>,
}

/// Erases a volume, or goes on with an erase that was begun here.
pub fn erase(config: &Config, request: &Request<'_>) -> Result<Erased, Error> {
    let job = Job::of(config, request)?;
    let journal = match state::read(&job.journal)? {
        Some(begun) => job.begun(begun)?,
        None => job.begin()?,
    };
    job.go_on(journal).map_err(|source| Error::HalfErased {
        device: job.data.path.clone(),
        volume: job.volume,
        source: Box::new(source),
    })
}

impl<'a> Job<'a> {
    fn of(config: &'a Config, request: &'a Request<'a>) -> Result<Self, Error> {
        let data = Device::look(request.device)?;
        backend::require_free(&data)?;
        let place = request.header.map_or_else(|| Ok(data.clone()), Device::look)?;
        let file = place.open_exclusive()?;
        let held = (place.identity != data.identity).then(|| data.claim(false)).transpose()?;
        let found = wipe::volume(&file).map_err(DeviceError::io("read", &place.path))?;
        // After a restart the path may be another volume's, and the command that is run again a script's.
        let volume = match (found, begun_at(config, request)?) {
            (Some(volume), Some(begun)) if volume != begun => {
                return Err(Error::NotTheVolume { path: place.path, volume: begun });
            }
            (found, begun) => found.or(begun).ok_or_else(|| not_ours(request))?,
        };
        require_its_header(&data, &place)?;
        let (rotation, alone) = rotate::claim(config, volume)?;
        let journal = folder(config).join(volume.to_string());
        Ok(Self { config, request, data, place, file, _data: held, volume, journal, rotation, _alone: alone })
    }

    /// An erase of this volume was begun. It may have another path since; but not if the volume is still under the old one: then
    /// this is a copy of it.
    fn begun(&self, mut journal: Journal) -> Result<Journal, Error> {
        // Before anybody is asked: it has to have a place at the end.
        if let Some(receipt) = self.receipt()? {
            journal.receipt = receipt;
        } else if !self.is_default(&journal.receipt) {
            require_folder(&journal.receipt)?;
        }
        let place = journal.detached.as_deref().unwrap_or(&journal.device);
        if let Ok((before, file)) = Device::open(place)
            && before.identity != self.place.identity
            && wipe::volume(&file).ok().flatten() == Some(self.volume)
        {
            return Err(Error::ErasingCopy { device: self.place.path.clone(), begun: place.to_owned() });
        }
        if journal.keys.iter().all(|key| key.answer.is_none()) {
            // As far as is known nothing is gone yet. The volume may have been used since, and have another key.
            if self.header()?.is_some_and(|(_, header)| header.sha256 != journal.header.sha256) {
                return self.begin();
            }
            self.confirm(&journal)?;
        }
        (journal.device, journal.detached) = self.paths()?;
        Ok(journal)
    }

    fn confirm(&self, journal: &Journal) -> Result<(), Error> {
        let keys = journal.keys.iter().map(|key| &key.key).collect();
        (self.request.confirm)(&Doomed { device: &self.data.path, volume: self.volume, keys })
    }

    /// The device, and a detached header, whatever directory the command is run in next.
    fn paths(&self) -> Result<(PathBuf, Option<PathBuf>), Error> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(Error::io("find the current directory"));
        Ok((absolute(&self.data.path)?, self.request.header.map(absolute).transpose()?))
    }

    /// The header as it is on the device; `None` if no copy is whole.
    fn header(&self) -> Result<Option<(Copies, HeaderWas)>, DeviceError> {
        let read = || -> io::Result<_> {
            let Some(copies) = Copies::read(&self.file)? else { return Ok(None) };
            let (at, bytes) = copies.bytes(&self.file)?;
            let (sequence, sha256, bytes) = (copies.sequence(), sha256(&bytes), copies.size());
            Ok(Some((copies, HeaderWas { sequence, sha256, at, bytes, digest: String::new(), wiped_bytes: 0 })))
        };
        read().map_err(DeviceError::io("read", &self.place.path))
    }

    /// Proves that each key is this volume's, asks whether it is to go, and writes that down. Nothing is changed before.
    fn begin(&self) -> Result<Journal, Error> {
        let Some((copies, mut header)) = self.header()? else { return Err(not_ours(self.request)) };
        let begun = now();
        let receipt = self.receipt()?.unwrap_or_else(|| Desk::of(self.config).file(self.volume, begun));
        let volumes = self.volumes(&copies)?;
        let extent = self.extent(&copies, &volumes);
        let digest = volumes.first().and_then(Volume::luks).map(|luks| luks.digest.clone());
        (header.digest, header.wiped_bytes) = (digest.unwrap_or_default(), extent.bytes());
        let (device, detached) = self.paths()?;
        let mut journal = Journal {
            device,
            detached,
            volume: self.volume,
            begun,
            header,
            extent,
            keys: Vec::new(),
            kept: Vec::new(),
            receipt,
            wiping: None,
        };
        let is_midway = volumes.len() > 1;
        let mut before = Vec::new();
        for volume in volumes {
            let (key, replaced) = self.key(volume, is_midway)?;
            before.push(replaced.filter(|_| key.was_there));
            journal.keys.push(key);
        }
        // One that a rotation had made, and that the header does not name.
        let made = rotate::new_key(&self.rotation)?.filter(|new| journal.keys.iter().all(|key| key.key != *new));
        journal.kept.extend(made.filter(|new| self.is_there(new)));
        if let ([new, old], [replaced, ..]) = (&journal.keys[..], &before[..])
            && new.was_there
            && replaced.as_ref() != Some(&old.key)
        {
            let why = "its next key was not made to take the place of its key".to_owned();
            return Err(VolumeError::NotRotating { path: self.data.path.clone(), why }.into());
        }
        journal.kept.extend(before.pop().flatten().filter(|old| self.is_there(old)));
        // It has to be there before it is needed.
        Desk::of(self.config).public()?;
        self.confirm(&journal)?;
        audit::permit(self.config, &self.event("key erase begin", &journal))?;
        self.write(&journal)?;
        Ok(journal)
    }

    fn extent(&self, copies: &Copies, volumes: &[Volume]) -> Extent {
        let data = volumes.iter().map(|volume| volume.geometry.data_offset_bytes).min();
        Extent::of(copies, self.place.size_bytes, data.filter(|_| self.request.header.is_none()))
    }

    fn write(&self, journal: &Journal) -> Result<(), Error> {
        Ok(state::write(&self.journal, journal)?)
    }

    /// The keys, what this host remembers, the header, the receipt. Each step may be done again.
    fn go_on(&self, mut journal: Journal) -> Result<Erased, Error> {
        for index in 0..journal.keys.len() {
            if journal.keys[index].answer.is_none() {
                self.delete(&mut journal.keys[index])?;
                self.write(&journal)?;
            }
        }
        Pins::of(self.config).forget(self.volume)?;
        state::remove(&self.rotation)?;
        let header = self.wipe(&mut journal)?;
        self.finish(journal, header)
    }

    /// In the store, and in this host's lockbox.
    fn delete(&self, key: &mut Key) -> Result<(), Error> {
        let container = Container::open(self.config, &key.key.store, None, Use::Keys)?;
        let answer = match container.delete(&key.key.key, false) {
            Ok(()) => Answer::Deleted,
            Err(unlock::Error::Store(StoreError::NotFound { .. })) if key.was_there => Answer::GoneMeanwhile,
            Err(unlock::Error::Store(StoreError::NotFound { .. })) => Answer::NotThere,
            Err(error) => return Err(error.into()),
        };
        if !container.store().is_gone(&key.key.key)? {
            return Err(Error::StillThere(key.key.clone()));
        }
        let lockbox = Lockbox::of(self.config);
        key.lockbox_entry = lockbox.map(|lockbox| lockbox.forget(&key.key)).transpose()?;
        key.answer = Some(answer);
        Ok(())
    }

    /// Wipes the header, and says what is read afterwards.
    fn wipe(&self, journal: &mut Journal) -> Result<String, Error> {
        let boot = matches!(self.place.kind, DeviceKind::Block(_)).then(state::boot).flatten();
        let here = Ground { identity: self.place.identity, boot };
        let path = journal.detached.as_ref().unwrap_or(&journal.device).display().to_string();
        let found = wipe::volume(&self.file).map_err(DeviceError::io("read", &self.place.path))?;
        match (found, &journal.wiping) {
            // Never what is another volume's, or nobody's.
            (Some(volume), _) if volume == self.volume => {
                journal.wiping = Some(here);
                self.write(journal)?;
                journal.extent.wipe(&self.file).map_err(DeviceError::io("write to", &self.place.path))?;
            }
            (None, Some(wiped)) if *wiped == here => {}
            (None, Some(wiped)) if wiped.boot != here.boot => {
                return Ok(format!(
                    "{path} has no LUKS header; this host was restarted when that had just been wiped, and cannot tell whether it is \
                     the same device"
                ));
            }
            _ => return Err(Error::NotTheVolume { path: self.place.path.clone(), volume: self.volume }),
        }
        let read = self.place.reopen()?;
        match wipe::is_gone(&read).map_err(DeviceError::io("read", &self.place.path))? {
            true => Ok(format!("{path}, read from the device again, has no LUKS header")),
            false => Err(Error::StillHasHeader(self.place.path.clone())),
        }
    }

    fn event<'e>(&'e self, action: &'e str, journal: &Journal) -> Event<'e> {
        let keys: Vec<_> = journal.keys.iter().map(|key| key.key.to_string()).collect();
        Event { action, device: Some(&self.data.path), key: Some(keys.join(" ")), ..Event::default() }
    }
}
