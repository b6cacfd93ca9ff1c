//! Erase a volume for ever: its key goes in its store first, and then its header. docs/erase.md says why in that order, what a
//! crash leaves at each step, and what the receipt promises.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::fcntl::Flock;
use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::{clock::now, hex, key::KeyReference},
    config::Config,
    keys::store::{self, StoreError},
    sys::{
        device::{Device, DeviceError, DeviceKind, Identity, resolved},
        durable, state,
    },
    unlock::{
        self,
        audit::{self, Event},
        case::{self, Case, Circumstances, Strictness},
        container::{Container, Use},
        lockbox::Lockbox,
        pins::Pins,
        receipt::{self, Answer, Desk, HeaderWas, KeyWas, Receipt},
    },
    verbs::{error::Error, rotate},
    volumes::{
        backend,
        header::{
            self, Volume, VolumeError,
            copies::Copies,
            reencryption::{self, Side, State},
            rekey,
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

/// How far an erase on this host is: the file `erase/UUID` of the state directory. It is there from before the first key goes
/// until the receipt is written.
#[derive(Serialize, Deserialize)]
struct Journal {
    device: PathBuf,
    detached: Option<PathBuf>,
    volume: Uuid,
    begun: u64,
    header: HeaderWas,
    extent: Extent,
    keys: Vec<Key>,
    kept: Vec<KeyReference>,
    receipt: PathBuf,
    /// The device whose header was about to be wiped.
    wiping: Option<Ground>,
}

/// A key that has opened this volume, or that its store did not have.
#[derive(Serialize, Deserialize)]
struct Key {
    key: KeyReference,
    store: String,
    places: Vec<String>,
    was_there: bool,
    answer: Option<Answer>,
    lockbox_entry: Option<bool>,
}

/// A device, told from all that may get its path. A block device's numbers say nothing after a restart.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ground {
    identity: Identity,
    boot: Option<String>,
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
        if let Some(receipt) = self.receipt()?.filter(|receipt| *receipt != journal.receipt) {
            journal.receipt = receipt;
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

    /// The file that is asked for. What is there is not written over.
    fn receipt(&self) -> Result<Option<PathBuf>, Error> {
        let Some(path) = self.request.receipt else { return Ok(None) };
        let path = std::path::absolute(path).map_err(Error::io("find the current directory"))?;
        if !durable::folder_of(&path).is_dir() {
            return Err(Error::io("find the folder of the receipt")(io::ErrorKind::NotFound.into()));
        }
        let is_begun = state::read::<Journal>(&self.journal)?.is_some_and(|begun| begun.receipt == path);
        // A command that was killed has written it.
        if path.exists() && !is_begun { Err(Error::Exists(path)) } else { Ok(Some(path)) }
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

    /// The volume as each of its keys has it: one, or in the middle of a rotation two, the new one first.
    fn volumes(&self, copies: &Copies) -> Result<Vec<Volume>, Error> {
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

    fn extent(&self, copies: &Copies, volumes: &[Volume]) -> Extent {
        let data = volumes.iter().map(|volume| volume.geometry.data_offset_bytes).min();
        Extent::of(copies, self.place.size_bytes, data.filter(|_| self.request.header.is_none()))
    }

    /// A key of this volume, by more than the header's word: else whoever writes to the disk has any key deleted. And the key
    /// that it has taken the place of, if that is still there.
    fn key(&self, volume: Volume, is_midway: bool) -> Result<(Key, Option<KeyReference>), Error> {
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

    fn is_there(&self, key: &KeyReference) -> bool {
        let container = Container::open(self.config, &key.store, None, Use::Keys);
        !container.is_ok_and(|container| container.store().is_gone(&key.key).is_ok_and(|gone| gone))
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

    fn finish(&self, journal: Journal, header: String) -> Result<Erased, Error> {
        let mut verified: Vec<_> = journal
            .keys
            .iter()
            .map(|key| format!("the store '{}' was asked again, and does not have the key {}", key.key.store, key.key))
            .collect();
        verified.push(header);
        let host = nix::sys::utsname::uname().map_err(|errno| Error::io("ask for this host's name")(errno.into()))?;
        let text = |path: &Path| path.display().to_string();
        let receipt = Receipt {
            kind: receipt::Kind::Erase,
            host: host.nodename().to_string_lossy().into_owned(),
            begun: journal.begun,
            ended: now(),
            device: text(&journal.device),
            detached_header: journal.detached.as_deref().map(text),
            volume: journal.volume,
            header: journal.header.clone(),
            keys: journal.keys.iter().map(Key::was).collect(),
            kept: journal.kept.clone(),
            verified,
            not_promised: receipt::NOT_PROMISED.map(str::to_owned).to_vec(),
        };
        let desk = Desk::of(self.config);
        // What is there is written over only if an interrupted run of this has written it.
        let signer = desk.public()?.1;
        let is_own = |written: Receipt| (written.volume, written.begun) == (receipt.volume, receipt.begun);
        if journal.receipt.exists() && !receipt::verify(&journal.receipt, Some(&signer)).is_ok_and(is_own) {
            return Err(Error::Exists(journal.receipt));
        }
        let digest = desk.write(&receipt, &journal.receipt)?;
        let event = self.event("key erase", &journal);
        audit::done(self.config, &Event { receipt: Some(hex::encode(&digest)), ..event });
        state::remove(&self.journal)?;
        Ok(Erased { file: journal.receipt, signer, receipt })
    }

    fn event<'e>(&'e self, action: &'e str, journal: &Journal) -> Event<'e> {
        let keys: Vec<_> = journal.keys.iter().map(|key| key.key.to_string()).collect();
        Event { action, device: Some(&self.data.path), key: Some(keys.join(" ")), ..Event::default() }
    }
}

impl Key {
    fn was(&self) -> KeyWas {
        KeyWas {
            key: self.key.clone(),
            store: self.store.clone(),
            places: self.places.clone(),
            answer: self.answer.unwrap_or(Answer::NotThere),
            lockbox_entry: self.lockbox_entry,
        }
    }
}

/// A detached header says by itself no more than that it is one; the volume's own may be in the wrong place of the command.
fn require_its_header(data: &Device, header: &Device) -> Result<(), Error> {
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

fn folder(config: &Config) -> PathBuf {
    config.state.join("erase")
}

/// The volume whose erase was begun under this path.
fn begun_at(config: &Config, request: &Request<'_>) -> Result<Option<Uuid>, Error> {
    let folder = folder(config);
    let place = |device: &Path, header: Option<&Path>| (resolved(device), header.map(resolved));
    let asked = place(request.device, request.header);
    for name in durable::stems(&folder, "").map_err(Error::io("read the state directory"))? {
        let journal = state::read::<Journal>(&folder.join(&name))?;
        if let Some(journal) = journal
            && place(&journal.device, journal.detached.as_deref()) == asked
        {
            return Ok(Some(journal.volume));
        }
    }
    Ok(None)
}

/// What it is instead of a LUKS2 volume.
fn not_ours(request: &Request<'_>) -> Error {
    match header::probe(request.device, request.header) {
        Ok(volume) => case::no_reference(&volume).into(),
        Err(error) => Error::from(error),
    }
}
