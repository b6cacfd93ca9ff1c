//! Rotate a volume's own key: all its data is encrypted anew, in place, while the volume is detached, or attached by dm-crypt.
//!
//! At each instant a stored key that was opened before opens each sector: the header's token names both keys from before the
//! first sector is written until the last one is. docs/rotation.md has the table of what a crash leaves at each step.

mod batch;
pub mod container;
mod found;
mod journal;
mod killed;
pub mod standing;
mod throttle;

use std::{
    cell::RefCell,
    fs::{DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use nix::fcntl::Flock;
use serde::Serialize;
use uuid::Uuid;

use self::journal::Journal;
pub(super) use self::{
    journal::{claim, needs, new_key},
    killed::recovered,
    throttle::Throttle,
};
use crate::{
    base::{
        key::{KeyReference, SecretBytes, StoreName, VolumeKey},
        mapping_name::MappingName,
    },
    config::Config,
    keys::store::StoreError,
    sys::{
        device::{Device, DeviceError, DeviceKind},
        precedence, state,
        stop::Stop,
    },
    unlock::{
        self,
        case::{self, Case, Circumstances, Proven, Strictness},
        container::{Container, Use},
        pins::Pins,
    },
    verbs::{error::Error, keys},
    volumes::{
        backend::{self, BackendError, online::LOCKS},
        header::{
            self, PlainParameters, Volume, VolumeError,
            copies::Copies,
            reencryption::{self, Side, State},
            rekey::{self, Run},
        },
    },
};

/// How.
#[derive(Clone, Copy)]
pub struct How {
    /// Rotate although keyslots or tokens of others become useless.
    pub drop_others: bool,
    /// Delete the old key once nothing needs it.
    pub delete_old: bool,
    /// So much is re-encrypted between two header updates.
    pub hotzone_bytes: u64,
    /// No more than so much is re-encrypted in a second.
    pub bytes_per_second: Option<u64>,
    /// How strict to be about separation.
    pub separation: Strictness,
}

/// A volume with a new key.
#[derive(Debug, Serialize)]
pub struct Rotated {
    pub key: KeyReference,
    /// The key that it had, as the new one says; `None` if that says of none.
    pub old: Option<KeyReference>,
    /// Whether that is deleted.
    pub deleted: bool,
    /// The mapping that it was attached as all the while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attached: Option<MappingName>,
}

/// A key that nothing needs any more: the header, read from the device, has the other key's digest alone, and that key has
/// been fetched from its store, compared with it, and says itself whose place it has taken.
struct Superseded(KeyReference);

/// Each store is opened once, and so are its container keys.
struct Containers<'a> {
    config: &'a Config,
    open: RefCell<Vec<(StoreName, Arc<Container>)>>,
}

impl<'a> Containers<'a> {
    fn of(config: &'a Config) -> Self {
        Self { config, open: RefCell::default() }
    }

    fn open(&self, name: &StoreName) -> Result<Arc<Container>, Error> {
        let mut open = self.open.borrow_mut();
        if let Some((_, container)) = open.iter().find(|(store, _)| store == name) {
            return Ok(container.clone());
        }
        let container = Arc::new(Container::open(self.config, name, None, Use::Keys)?);
        open.push((name.clone(), container.clone()));
        Ok(container)
    }
}

struct Job<'a> {
    config: &'a Config,
    how: &'a How,
    device: Device,
    /// It is attached: libcryptsetup works below this mapping.
    online: Option<MappingName>,
    /// The file, locked. A block device is claimed for each write: libcryptsetup claims it itself.
    held: Option<File>,
    journal: PathBuf,
    containers: &'a Containers<'a>,
    _alone: Flock<File>,
}

/// Rotates the key, or goes on with a rotation that was begun here or on another host. `tell` hears how many bytes have the new
/// key, and how many there are.
pub fn rotate(config: &Config, device: &Path, how: &How, tell: &mut dyn FnMut(u64, u64)) -> Result<Rotated, Error> {
    rotate_with(&Containers::of(config), device, how, tell)
}

fn rotate_with(
    containers: &Containers<'_>,
    device: &Path,
    how: &How,
    tell: &mut dyn FnMut(u64, u64),
) -> Result<Rotated, Error> {
    let config = containers.config;
    let device = Device::look(device)?;
    let uuid = uuid(&device, &rekey::read(&device)?)?;
    let online = backend::online(&device, uuid)?;
    let job = Job::claim(containers, device, online, how)?;
    // Nobody else writes to it from here on.
    let copies = rekey::read(&job.device)?;
    match reencryption::state(&copies.json) {
        State::Crash if let Some(name) = job.online => {
            let why = "a run was killed in the middle of a stretch".to_owned();
            Err(BackendError::NotOnline { device: job.device.path, name, why }.into())
        }
        State::Clean | State::Crash => {
            check_newest(config, &job.device.path, uuid, copies.sequence())?;
            job.go_on(tell)
        }
        // The allow-list says what it is.
        State::Foreign => Err(job.probe().err().map_or_else(|| Error::Stopped(job.device.path.clone()), Error::from)),
        State::AllDone if reencryption::is_rotation(&copies.json) => job.complete(),
        State::AllDone => {
            rekey::settle(&job.device, &job.file()?)?;
            job.begin_or_go_on(tell)
        }
        State::None => job.begin_or_go_on(tell),
    }
}

fn uuid(device: &Device, copies: &Copies) -> Result<Uuid, VolumeError> {
    copies.uuid().ok_or_else(|| VolumeError::NoHeader { path: device.path.clone(), found: None })
}

/// The volume, for who maps it: one in the middle of a rotation has a rest. Its header is the newest one that this host knows.
pub(super) fn find_to_map(
    config: &Config,
    device: &Path,
    detached: Option<&Path>,
    described: Option<&PlainParameters>,
) -> Result<Volume, Error> {
    let volume = header::find_to_map(device, detached, described)?;
    if let (Some(rest), Some(uuid)) = (&volume.rest, volume.uuid()) {
        check_newest(config, device, uuid, rest.header.sequence())?;
    }
    Ok(volume)
}

/// The volume may be the one that this process comes from. While a stretch is suspended, nothing is read from it: no page of
/// the program, none of swap.
fn protect_this_process() -> Result<(), Error> {
    precedence::ask_for_precedence();
    let locked = precedence::lock_memory();
    locked
        .map_err(BackendError::failed("cannot lock this process's memory, which a volume in use may be needed for"))?;
    // libcryptsetup's locks: it does not make them where /run itself has been made anew.
    let folder = DirBuilder::new().recursive(true).mode(0o700).create(LOCKS);
    folder.map_err(Error::io(format!("make {LOCKS}")))
}

/// Refuses a header from the middle of a rotation, if this host has seen a later one.
fn check_newest(config: &Config, device: &Path, volume: Uuid, sequence: u64) -> Result<(), Error> {
    match journal::of(config, volume).filter(|journal| sequence < journal.sequence) {
        Some(Journal { new, .. }) => Err(Error::HeaderRestored { device: device.to_owned(), new }),
        None => Ok(()),
    }
}

impl<'a> Job<'a> {
    /// Nobody else has the device, but for the mapping that is named, nor rotates its key.
    fn claim(
        containers: &'a Containers<'a>,
        device: Device,
        online: Option<MappingName>,
        how: &'a How,
    ) -> Result<Self, Error> {
        let config = containers.config;
        let held = match online {
            Some(_) => protect_this_process().map(|()| None)?,
            None => {
                backend::require_free(&device)?;
                Some(device.open_exclusive()?).filter(|_| device.kind == DeviceKind::File)
            }
        };
        let (journal, alone) = claim(config, uuid(&device, &rekey::read(&device)?)?)?;
        Ok(Self { config, how, device, online, held, journal, containers, _alone: alone })
    }
}

impl Job<'_> {
    /// No re-encryption is under way: one is to begin, was about to, or has just ended.
    fn begin_or_go_on(&self, tell: &mut dyn FnMut(u64, u64)) -> Result<Rotated, Error> {
        let volume = self.probe()?;
        let now = self.reference(&volume)?;
        let json = rekey::read(&self.device)?.json;
        if let Some(next) = reencryption::next_reference(&json) {
            return if next == now { self.complete() } else { self.run(Run::Begin, tell) };
        }
        match state::read::<Journal>(&self.journal)? {
            Some(journal) if journal.new == now => return self.complete(),
            // The header named both keys before any data had the new one: this is an older header, restored since.
            Some(Journal { old, new, begun: true, .. }) if old == now => {
                return Err(Error::HeaderRestored { device: self.device.path.clone(), new });
            }
            // Killed before the header named it: nothing is under it.
            Some(journal) if journal.old == now && !journal.named => self.drop_unused(&journal.new)?,
            // Or just then. This may be a copy of the volume, and the volume itself under the new key by now.
            Some(journal) if journal.old == now => {
                tracing::warn!("the key {} stays in its store: a header may name it", journal.new);
            }
            _ => {}
        }
        let others = rekey::others(&json);
        if !others.is_empty() && !self.how.drop_others {
            return Err(Error::OthersOpen { device: self.device.path.clone(), others });
        }
        self.prepare(volume, &now)?;
        self.run(Run::Begin, tell)
    }

    /// Seals and stores the new key, then writes the header that names both. The old key opens the volume all the while.
    fn prepare(&self, volume: Volume, old: &KeyReference) -> Result<(), Error> {
        let container = self.container(&old.store)?;
        let proven = Case::of(self.config, volume, old.clone(), container.clone()).prove(self.given())?;
        let unlocked = proven.key()?;
        let has_consumers = !container.store().consumers(&old.key)?.is_empty();
        let why = if has_consumers { Some("it has consumers") } else { proven.not_replaceable()? };
        if let Some(why) = why {
            return Err(Error::Usage(format!("the key {old} cannot be rotated here: {why}")));
        }
        let new = container.new_reference()?;
        let prepare = || -> Result<_, Error> {
            let (key, passphrase) = (VolumeKey::random(unlocked.key().size())?, case::random_passphrase()?);
            let prepared = rekey::prepare(unlocked.volume(), [unlocked.key(), &key], &passphrase, &new)?;
            let case = Case::of_rotation(self.config, prepared.volume.clone(), new.clone(), container.clone());
            Ok((key, passphrase, case.prove(self.given())?, prepared))
        };
        let (key, passphrase, successor, prepared) = prepare().inspect_err(|_| container.store().abandon(&new.key))?;
        let device = self.device.lasting_path()?;
        let (old, new) = (old.clone(), new.clone());
        let journal = Journal { device, old: old.clone(), new, named: false, begun: false, sequence: 0 };
        state::write(&self.journal, &journal)?;
        successor.store_successor(key, passphrase, old)?;
        state::write(&self.journal, &Journal { named: true, ..journal })?;
        prepared.write(&self.file()?)?;
        successor.record("key rotate begin");
        Ok(())
    }

    /// Goes on in the middle.
    fn go_on(&self, tell: &mut dyn FnMut(u64, u64)) -> Result<Rotated, Error> {
        let copies = rekey::read(&self.device)?;
        if reencryption::state(&copies.json) == State::Crash {
            let [old, new] = [self.side(Side::Old)?.key()?, self.side(Side::New)?.key()?];
            self.recover(&copies, [old.key(), new.key()], &self.side(Side::New)?.passphrase()?)?;
        }
        match rekey::state(&self.device)? {
            State::Clean => self.run(Run::GoOn, tell),
            State::None | State::AllDone => self.complete(),
            State::Crash | State::Foreign => Err(Error::Stopped(self.device.path.clone())),
        }
    }

    /// Has libcryptsetup re-encrypt to the end, unless a signal asks it to stop.
    fn run(&self, run: Run, tell: &mut dyn FnMut(u64, u64)) -> Result<Rotated, Error> {
        let passphrase = self.passphrase(run)?;
        self.note_newest()?;
        self.require_still_there()?;
        let stop = Stop::by_signals().map_err(Error::io("block signals"))?;
        let mut throttle = Throttle::new(self.how.bytes_per_second);
        let most = self.online.as_ref().map_or(u64::MAX, |_| rekey::MOST_ONLINE_BYTES);
        let stretch = throttle.stretch(self.how.hotzone_bytes.min(most));
        let mut watch = |now: u64, of: u64| {
            tell(now, of);
            !stop.wait(throttle.pause(Instant::now(), now, of))
        };
        rekey::run(&self.device, self.online.as_ref(), &passphrase, run, stretch, &mut watch)?;
        self.note_newest()?;
        let json = rekey::read(&self.device)?.json;
        match reencryption::state(&json) {
            State::None | State::AllDone => self.complete(),
            State::Clean if stop.is_asked() => {
                let percent = reencryption::percent(reencryption::progress(&json, self.device.size_bytes));
                Err(Error::Paused { device: self.device.path.clone(), percent })
            }
            State::Clean | State::Crash | State::Foreign => Err(Error::Stopped(self.device.path.clone())),
        }
    }

    /// The keys may have been fetched for long: the mapping may have gone meanwhile, or one may have come.
    fn require_still_there(&self) -> Result<(), Error> {
        let volume = rekey::read(&self.device)?.uuid().unwrap_or_default();
        match (backend::online(&self.device, volume)?, &self.online) {
            (None, Some(before)) => Err(BackendError::NotActive(before.clone()).into()),
            (Some(name), before) if before.as_ref() != Some(&name) => {
                Err(BackendError::AttachedAlready { device: self.device.path.clone(), name }.into())
            }
            _ => Ok(()),
        }
    }

    /// What the device has now is the newest header: none from before is gone on with here. It is on the disk before the
    /// journal says so.
    fn note_newest(&self) -> Result<(), Error> {
        let Some(journal) = state::read::<Journal>(&self.journal)? else { return Ok(()) };
        self.file()?.sync_all().map_err(DeviceError::io("write", &self.device.path))?;
        let sequence = rekey::read(&self.device)?.sequence();
        Ok(state::write(&self.journal, &Journal { begun: true, sequence, ..journal })?)
    }

    /// The passphrase of both keyslots. Both keys have to open before a sector is written.
    fn passphrase(&self, run: Run) -> Result<SecretBytes, Error> {
        match run {
            Run::Begin => drop(self.proven(self.probe()?)?.key()?),
            Run::GoOn | Run::Recover => drop(self.side(Side::Old)?.key()?),
        }
        Ok(self.side(Side::New)?.passphrase()?)
    }

    /// All data is under the new key: the header gets its last form, and the old key is not needed any more.
    fn complete(&self) -> Result<Rotated, Error> {
        let copies = rekey::read(&self.device)?;
        let is_strict = reencryption::is_strict(&copies.json);
        let volume = match reencryption::state(&copies.json) {
            State::AllDone => rekey::side(&self.device, &copies, Side::New)?,
            State::None | State::Clean | State::Crash | State::Foreign => self.probe()?,
        };
        let proven = self.proven(volume)?;
        proven.key()?;
        let old = self.replaced(&proven, &copies)?;
        if is_strict {
            proven.forget_passphrase()?;
        }
        rekey::settle(&self.device, &self.file()?)?;
        // As it is on the device now, and by what the store has: this host pins that.
        let volume = self.probe()?;
        let key = self.reference(&volume)?;
        let container = self.container(&key.store)?;
        let proven = Case::of(self.config, volume, key.clone(), container).prove(self.given())?;
        proven.key()?;
        proven.record("key rotate");
        let superseded = old.clone().filter(|old| *old != key).map(Superseded);
        let superseded = superseded.filter(|_| self.how.delete_old);
        let deleted = superseded.is_some();
        if let Some(Superseded(old)) = superseded {
            keys::delete_superseded(self.config, &*self.container(&old.store)?, &old)?;
        }
        state::remove(&self.journal)?;
        Ok(Rotated { key, old, deleted, attached: self.online.clone() })
    }

    /// Removes a key that no header names.
    fn drop_unused(&self, new: &KeyReference) -> Result<(), Error> {
        let container = self.container(&new.store)?;
        match container.store().delete(&new.key) {
            Err(StoreError::NotFound { .. }) => Ok(()),
            deleted => Ok(deleted?),
        }
    }

    /// The case of one of the two keys, by the same way as any attach takes.
    fn side(&self, side: Side) -> Result<Proven<'_>, Error> {
        let copies = rekey::read(&self.device)?;
        let proven = self.proven(rekey::side(&self.device, &copies, side)?)?;
        if side == Side::New {
            self.replaced(&proven, &copies)?;
            self.check_not_done(&proven)?;
        }
        Ok(proven)
    }

    /// This host pins the new key once the header is in its last form. A header from before that, a backup for one, would have
    /// data encrypted once more that has the new key already.
    fn check_not_done(&self, new: &Proven<'_>) -> Result<(), Error> {
        let uuid = new.volume().uuid();
        let pin = uuid.map(|uuid| Pins::of(self.config).get(uuid)).transpose().map_err(unlock::Error::from)?.flatten();
        let reference = self.reference(new.volume())?;
        match pin.is_some_and(|pin| pin.key == reference) {
            true => Err(Error::HeaderRestored { device: self.device.path.clone(), new: reference }),
            false => Ok(()),
        }
    }

    /// The key whose place this one takes. Whoever writes to the disk names any two keys in the header: by its word alone
    /// nothing is brought under a key, and no key is deleted.
    fn replaced(&self, new: &Proven<'_>, copies: &Copies) -> Result<Option<KeyReference>, Error> {
        let replaced = new.replaces()?;
        match reencryption::our_token(&copies.json) {
            Some((_, token)) if token.has_next() && replaced != Some(token.old_reference()) => {
                Err(VolumeError::no_successor(&self.device.path).into())
            }
            _ => Ok(replaced),
        }
    }

    fn proven(&self, volume: Volume) -> Result<Proven<'_>, Error> {
        let reference = self.reference(&volume)?;
        let container = self.container(&reference.store)?;
        Ok(Case::of_rotation(self.config, volume, reference, container).prove(self.given())?)
    }

    fn container(&self, name: &StoreName) -> Result<Arc<Container>, Error> {
        self.containers.open(name)
    }

    fn given(&self) -> Circumstances<'static> {
        Circumstances { strictness: self.how.separation, ..Circumstances::default() }
    }

    fn probe(&self) -> Result<Volume, VolumeError> {
        header::probe(&self.device.path, None)
    }

    fn reference(&self, volume: &Volume) -> Result<KeyReference, Error> {
        Ok(volume.reference().cloned().ok_or_else(|| unlock::Error::NoReference(self.device.path.clone()))?)
    }

    /// The device for writing, and for nobody else but the mapping.
    fn file(&self) -> Result<File, DeviceError> {
        match (&self.held, &self.online) {
            (Some(held), _) => held.try_clone().map_err(DeviceError::io("open", &self.device.path)),
            (None, Some(_)) => self.device.open_beside(),
            (None, None) => self.device.open_exclusive(),
        }
    }
}
