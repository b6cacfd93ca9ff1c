//! Encrypt an unencrypted device in place: its file system becomes the data of a new volume, and nothing of it is lost at any
//! instant. docs/encrypt.md has the table of what a crash leaves at each step.

mod error;
pub(super) mod journal;
mod shrink;

use std::{fs::File, path::Path, sync::Arc, time::Instant};

use cryptattach_xts::{Key, Xts};
use serde::Serialize;
use uuid::Uuid;

pub use self::error::EncryptError;
use self::journal::Journal;
use super::rotate::{self, Throttle};
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, KeySize, StoreName, VolumeKey},
    },
    config::Config,
    keys::store::StoreError,
    sys::{
        device::{Device, DeviceError},
        stop::Stop,
    },
    unlock::{
        self,
        case::{Case, Circumstances, Proven, Strictness},
        container::{Container, Use},
        loops,
    },
    verbs::error::Error,
    volumes::{
        backend,
        filesystem::{self, Unfit},
        header::{self, NewHeader, SectorSize, Volume, copies::Copies, encrypting, reencryption},
        in_place::{self, Fault, Found, Record, Start},
    },
};

/// What, and how.
pub struct Request<'a> {
    pub device: &'a Path,
    /// The store for the key; the configuration's default unless given.
    pub store: Option<StoreName>,
    /// Size of the volume key.
    pub key_size: KeySize,
    /// Shrink an ext4 file system that leaves no room.
    pub shrink: bool,
    /// So much is encrypted between two header updates.
    pub step_bytes: u64,
    /// No more than so much is encrypted in a second.
    pub bytes_per_second: Option<u64>,
    /// How strict to be about separation.
    pub separation: Strictness,
}

/// A device that is a volume now.
#[derive(Debug, Serialize)]
pub struct Encrypted {
    pub key: KeyReference,
    pub volume: Uuid,
}

struct Job<'a> {
    config: &'a Config,
    request: &'a Request<'a>,
    stop: &'a Stop,
    device: Device,
    /// It, for nobody else.
    file: File,
}

/// Encrypts, or goes on with an encryption that was begun here or on another host. `tell` hears how many bytes are done, and
/// how many there are.
pub fn encrypt(config: &Config, request: &Request<'_>, tell: &mut dyn FnMut(u64, u64)) -> Result<Encrypted, Error> {
    let stop = Stop::by_signals().map_err(Error::io("block signals"))?;
    let device = Device::look(request.device)?;
    backend::require_free(&device)?;
    if request.shrink {
        // Not for nothing, should the store be missing.
        container(config, request)?;
        shrink::shrink(&device)?;
    }
    let file = device.open_exclusive()?;
    let job = Job { config, request, stop, device, file };
    match job.look()? {
        Found::Header(copies) => job.go_on(copies, tell),
        Found::Record(record) => job.commit_or_begin(&record, tell),
        Found::Nothing => job.begin(tell),
    }
}

/// Where the new key goes.
fn container(config: &Config, request: &Request<'_>) -> Result<Container, Error> {
    Ok(Container::open(config, &config.store_or_default(request.store.as_ref())?, None, Use::Keys)?)
}

impl Job<'_> {
    fn look(&self) -> Result<Found, DeviceError> {
        in_place::look(&self.file, self.device.size_bytes).map_err(DeviceError::io("read", &self.device.path))
    }

    /// Nothing of ours is on the device. Its file system stays as it is until the record is written.
    fn begin(&self, tell: &mut dyn FnMut(u64, u64)) -> Result<Encrypted, Error> {
        let Self { device, request, .. } = self;
        let unfit = |unfit| EncryptError::Unfit { path: device.path.clone(), unfit };
        let found = filesystem::find(&device.path, &self.file)?.map_err(unfit)?;
        let (kind, size_bytes, most_bytes) = (found.kind, found.size_bytes, in_place::most_bytes(device.size_bytes));
        if size_bytes > most_bytes {
            return Err(EncryptError::NoRoom { path: device.path.clone(), kind, size_bytes, most_bytes }.into());
        }
        self.drop_unused()?;
        let container = Arc::new(container(self.config, request)?);
        let reference = container.new_reference()?;
        let prepare = || -> Result<_, Error> {
            let key = VolumeKey::random(request.key_size)?;
            // A larger sector is one that the file system cannot use.
            let fitting = [4096, 2048, 1024]
                .into_iter()
                .find(|bytes| found.unit_bytes.is_multiple_of(*bytes) && device.size_bytes.is_multiple_of(*bytes));
            let sector_size =
                fitting.and_then(|bytes| SectorSize::from_bytes(bytes as u32)).unwrap_or(SectorSize::B512);
            let header = NewHeader {
                uuid: Uuid::new_v4(),
                key: &key,
                sector_size,
                reference: &reference,
                keyslot: None,
                detached: false,
            };
            let image = header.make(device)?;
            let volume = header::probe_image(device, None, &image)?;
            let case = Case::of_new_key(self.config, volume, reference.clone(), container.clone());
            let proven = case.prove(self.given())?;
            loops::check(self.config, &reference.store, &proven.report().key_places())?;
            Ok((key, image, proven))
        };
        let (key, image, proven) = prepare().inspect_err(|_| container.store().abandon(&reference.key))?;
        let xts = cipher(&key, proven.volume())?;
        let uuid = uuid(proven.volume())?;
        let (_, alone) = rotate::claim(self.config, uuid)?;
        let journal = Journal { device: device.lasting_path()?, key: reference, named: false };
        journal::write(self.config, uuid, &journal)?;
        proven.store_key(key, None)?;
        journal::write(self.config, uuid, &Journal { named: true, ..journal })?;
        let step = self.throttle().stretch(request.step_bytes);
        let prepared = in_place::prepare(&self.file, device.size_bytes, size_bytes, &image, &xts, step);
        let record = prepared.map_err(EncryptError::fault(&device.path))?;
        proven.record("encrypt begin");
        drop(alone);
        self.commit(&record, &xts, tell)
    }

    /// A run was stopped after the record was written, and before the header was.
    fn commit_or_begin(&self, record: &Record, tell: &mut dyn FnMut(u64, u64)) -> Result<Encrypted, Error> {
        let volume = encrypting::volume(&self.device, &record.copies)?;
        let reference = self.reference(&volume)?;
        // One that was not unmounted in good order is refused as that: its superblock is there, so it counts, and not the record.
        let is_fit = || {
            let found = filesystem::find(&self.device.path, &self.file)?;
            Ok::<_, Error>(!matches!(found, Err(Unfit::Other(_))))
        };
        let key = match self.proven(volume).and_then(|proven| Ok(proven.key()?)) {
            // A record of long ago.
            Err(error) if error.exit() == Exit::NoKey && is_fit()? => return self.begin(tell),
            key => key?,
        };
        let xts = cipher(key.key(), key.volume())?;
        let at = match record.start(&self.file, &xts).map_err(DeviceError::io("read", &self.device.path))? {
            Start::Waits => return self.commit(record, &xts, tell),
            Start::Used(at) => at,
        };
        if !is_fit()? {
            return Err(EncryptError::HalfWritten { path: self.device.path.clone(), at, key: reference }.into());
        }
        // Whoever wrote to it since had the file system as it was.
        tracing::warn!(
            "{} was used since its encryption was begun: it begins again, and the key {reference} stays in its store, unused",
            self.device.path.display()
        );
        self.begin(tell)
    }

    fn commit(&self, record: &Record, xts: &Xts, tell: &mut dyn FnMut(u64, u64)) -> Result<Encrypted, Error> {
        let copies = record.commit(&self.file).map_err(DeviceError::io("write the header of", &self.device.path))?;
        self.run(copies, xts, tell)
    }

    /// The header tells how far it is.
    fn go_on(&self, copies: Copies, tell: &mut dyn FnMut(u64, u64)) -> Result<Encrypted, Error> {
        if encrypting::is_begun(&copies.json) {
            let key = self.proven(encrypting::volume(&self.device, &copies)?)?.key()?;
            let xts = cipher(key.key(), key.volume())?;
            return self.run(copies, &xts, tell);
        }
        match copies.uuid().filter(|uuid| journal::exists(self.config, *uuid)) {
            Some(_) => self.complete(copies),
            None => Err(EncryptError::Encrypted(self.device.path.clone()).into()),
        }
    }

    fn run(&self, copies: Copies, xts: &Xts, tell: &mut dyn FnMut(u64, u64)) -> Result<Encrypted, Error> {
        let Self { device, request, stop, .. } = self;
        let uuid = copies.uuid().ok_or_else(|| unlock::Error::NoReference(device.path.clone()))?;
        let (_, _alone) = rotate::claim(self.config, uuid)?;
        // It was begun on another host, or another device of that name has been encrypted since.
        if !journal::exists(self.config, uuid) {
            let key = self.reference(&encrypting::volume(device, &copies)?)?;
            let journal = Journal { device: device.lasting_path()?, key, named: true };
            journal::write(self.config, uuid, &journal)?;
        }
        let mut throttle = self.throttle();
        let step = throttle.stretch(request.step_bytes);
        let mut so_far = (0, 1);
        let mut watch = |done: u64, all: u64| {
            so_far = (done, all);
            tell(done, all);
            !stop.wait(throttle.pause(Instant::now(), done, all))
        };
        let ended = in_place::run(&self.file, device.size_bytes, copies, xts, step, &mut watch);
        if !ended.map_err(EncryptError::fault(&device.path))? {
            let percent = reencryption::percent(so_far);
            return Err(EncryptError::Paused { path: device.path.clone(), percent }.into());
        }
        match self.look()? {
            Found::Header(copies) => self.complete(copies),
            Found::Record(_) | Found::Nothing => Err(EncryptError::fault(&device.path)(Fault::ReadBack(0)).into()),
        }
    }

    /// The header is in its last form: what the store has opens the volume, and this host pins that.
    fn complete(&self, mut copies: Copies) -> Result<Encrypted, Error> {
        in_place::heal(&self.file, &mut copies).map_err(DeviceError::io("write the header of", &self.device.path))?;
        let volume = header::probe(&self.device.path, None)?;
        let (volume_uuid, key) = (uuid(&volume)?, self.reference(&volume)?);
        let proven = self.proven(volume)?;
        proven.key()?;
        proven.record("encrypt");
        journal::remove(self.config, volume_uuid)?;
        Ok(Encrypted { key, volume: volume_uuid })
    }

    /// Keys of runs that were stopped before the device named them.
    fn drop_unused(&self) -> Result<(), Error> {
        for (volume, Journal { key, named, .. }) in journal::of(self.config, &self.device.path) {
            if named {
                // Another device may have had this one's name.
                tracing::warn!(
                    "the key {key} of an earlier run stays in its store: the volume {volume} needs it if its encryption is to go on, \
                     on another device that was called {0} then or on a copy of {0}",
                    self.device.path.display()
                );
            } else {
                let container = Container::open(self.config, &key.store, None, Use::Keys)?;
                match container.store().delete(&key.key) {
                    Ok(()) | Err(StoreError::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            journal::remove(self.config, volume)?;
        }
        Ok(())
    }

    fn throttle(&self) -> Throttle {
        Throttle::new(self.request.bytes_per_second)
    }

    fn proven(&self, volume: Volume) -> Result<Proven<'_>, Error> {
        let reference = self.reference(&volume)?;
        let container = Arc::new(Container::open(self.config, &reference.store, None, Use::Keys)?);
        Ok(Case::of(self.config, volume, reference, container).prove(self.given())?)
    }

    fn given(&self) -> Circumstances<'static> {
        Circumstances { strictness: self.request.separation, ..Circumstances::default() }
    }

    fn reference(&self, volume: &Volume) -> Result<KeyReference, Error> {
        Ok(volume.reference().cloned().ok_or_else(|| unlock::Error::NoReference(self.device.path.clone()))?)
    }
}

fn uuid(volume: &Volume) -> Result<Uuid, Error> {
    Ok(volume.uuid().ok_or_else(|| unlock::Error::NoReference(volume.device.path.clone()))?)
}

fn cipher(key: &VolumeKey, volume: &Volume) -> Result<Xts, Error> {
    let key = Key::of(key.expose()).ok_or_else(|| Error::Usage("the volume key has an odd size".to_owned()))?;
    Ok(Xts::new(key, volume.geometry.sector_size.bytes() as usize, 0))
}
