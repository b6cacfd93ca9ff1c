//! The userspace backend: AES-XTS in a worker process, exported as a block device or a socket.
//!
//! ```text
//! /dev/disk/by-cryptattach/NAME -> /dev/loopN       what users see: a loop device over a FUSE file,
//!   /run/cryptattach/NAME/export/volume
//! /dev/disk/by-cryptattach/NAME -> /dev/ublkbN      or a ublk device,
//! /run/cryptattach/NAME/nbd.sock                    or a socket that speaks NBD
//!     worker process                                holds the key, encrypts and decrypts
//!       /dev/vdb                                    the encrypted device, open exclusively, direct I/O
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process::Child,
    thread,
    time::Duration,
};

use nix::fcntl::Flock;

use self::{
    control::{Order, OrderReply},
    export::Exported,
    protocol::{Attach, Request, WorkerReply},
    state::State,
};
use super::{
    Activate, Backend, BackendError, BackendKind, Deferred, ExportKind, Mapping, MappingStatus,
    dm_crypt::DmCrypt,
    once::{self, Occupied},
};
use crate::{
    base::{key::VolumeKey, mapping_name::MappingName},
    sys::{lock, loop_device::LoopDevice, stores::Footing, users},
    volumes::{
        Unlocked,
        header::{CIPHER, Volume},
    },
};

mod buffers;
pub mod ciphers;
mod control;
mod control_group;
mod discard;
mod export;
mod fuse;
pub mod image;
mod memory_lock;
pub mod nbd;
mod paths;
mod pool;
pub mod protocol;
mod ranges;
mod removal;
mod state;
mod ublk;
mod worker;

pub use paths::Paths;
pub use worker::{SUBCOMMAND, worker_main};

/// How long a worker may take to get ready; opening a device on a network is the longest part.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// How long programs that look at every new device may have it open.
const CLEAR_PATIENCE: Duration = Duration::from_secs(2);

/// The userspace backend.
#[derive(Clone, Debug)]
pub struct Userspace {
    paths: Paths,
    program: PathBuf,
}

impl Default for Userspace {
    /// The system's directories; this program itself is the worker and must lead [`SUBCOMMAND`] to [`worker_main`].
    fn default() -> Self {
        Self::new(Paths::default(), "/proc/self/exe")
    }
}

impl Userspace {
    /// Other directories, or another program as worker.
    pub fn new(paths: Paths, program: impl Into<PathBuf>) -> Self {
        Self { paths, program: program.into() }
    }

    /// Calls `judge` with this backend and the kernel's, if there is one.
    fn with_all<T>(&self, judge: impl FnOnce(&[&dyn Backend]) -> T) -> T {
        match DmCrypt::open() {
            Ok(dm_crypt) => judge(&[self, &dm_crypt]),
            Err(_) => judge(&[self]),
        }
    }

    /// The mapping that has the name, if it is one of this very volume.
    fn same(&self, state: &State, request: &Attach, asked: Option<ExportKind>) -> Result<Mapping, BackendError> {
        let foreign = |by| Err(BackendError::Foreign { name: state.name.clone(), by });
        if (state.identity, state.volume) != (request.identity, request.volume) {
            return foreign(format!("{} is attached under it", state.device.display()));
        }
        if asked.is_some_and(|asked| asked != state.export) {
            return foreign(format!("the same volume is attached under it, but exported by {}", state.export));
        }
        match (state.read_only, request.read_only) {
            (true, false) => foreign("the same volume is attached under it, but read-only".to_owned()),
            (false, true) => foreign("the same volume is attached under it, but for writing".to_owned()),
            _ => Ok(self.mapping(&request.name, state.export, true)),
        }
    }

    /// As [`Self::same`], for whoever has the name's lock. What a dead worker left is removed.
    fn existing(&self, request: &Attach, asked: Option<ExportKind>) -> Result<Option<Mapping>, BackendError> {
        let Some(state) = State::load(&self.paths, &request.name)? else { return Ok(None) };
        if !state.worker.is_alive() {
            tracing::warn!("the worker of '{}' has died; removing what it left", state.name);
            return removal::remove(&self.paths, &state, Deferred::No).map(|()| None);
        }
        if state.exported(&self.paths).is_none() {
            // Its device has just been cleared; it is on its way out.
            return removal::wait_for_end(&state).map(|()| None);
        }
        self.same(&state, request, asked).map(Some)
    }

    fn mapping(&self, name: &MappingName, export: ExportKind, already_active: bool) -> Mapping {
        let device = self.users_path(name, export);
        let uri = (export == ExportKind::Nbd).then(|| export::nbd_uri(&device));
        Mapping { name: name.clone(), device, uri, backend: BackendKind::Userspace, already_active }
    }

    /// Where users find it.
    fn users_path(&self, name: &MappingName, export: ExportKind) -> PathBuf {
        match export {
            ExportKind::Fuse | ExportKind::Ublk => self.paths.link(name),
            ExportKind::Nbd => self.paths.socket(name),
        }
    }

    /// Starts a worker and waits until the mapping is there.
    fn start(&self, request: Attach, keys: &[&VolumeKey], lock: &Flock<File>) -> Result<(), BackendError> {
        let action = || format!("cannot start a worker for '{}'", request.name);
        let (socket, theirs) = UnixStream::pair().map_err(BackendError::failed(action()))?;
        // The worker has the lock as well, should this process die.
        let inherited = lock.try_clone().map_err(BackendError::failed(action()))?;
        let mut worker = worker::command(&self.program)
            .stdin(OwnedFd::from(theirs))
            .stdout(inherited)
            .spawn()
            .map_err(BackendError::failed(action()))?;
        let (name, device) = (request.name.clone(), request.device.clone());
        control_group::give_its_own(worker.id(), &name);
        match converse(&socket, request, keys) {
            Ok(WorkerReply::Failed { action, cause }) => {
                worker.wait().map_err(BackendError::failed(format!("cannot wait for the worker of '{name}'")))?;
                WorkerReply::Failed { action, cause }.into_result(&device)
            }
            Ok(_) => {
                // It outlives this command. A caller that lives on must not collect zombies.
                thread::spawn(move || worker.wait());
                Ok(())
            }
            Err(error) => {
                self.give_up(&name, worker);
                Err(error)
            }
        }
    }

    /// Ends a worker that has died, or does not answer, or whose file nothing can be made of; nothing of it stays.
    fn give_up(&self, name: &MappingName, mut worker: Child) {
        let ended = worker.kill().and_then(|()| worker.wait());
        tracing::debug!("the worker of '{name}': {ended:?}");
        let left = State::load(&self.paths, name).and_then(|state| match state {
            Some(state) => removal::remove(&self.paths, &state, Deferred::No),
            None => Ok(()),
        });
        if let Err(error) = left {
            tracing::warn!("cannot remove what the worker of '{name}' left: {error}");
        }
    }
}

/// Tells the worker what to attach and makes a loop device of the file that it then offers.
fn converse(socket: &UnixStream, request: Attach, keys: &[&VolumeKey]) -> Result<WorkerReply, BackendError> {
    let (name, file, read_only) = (request.name.clone(), request.paths.file(&request.name), request.read_only);
    let silent = || BackendError::failed(format!("the worker of '{name}' does not answer"));
    let block_size_bytes = match order(socket, request, keys).map_err(silent())? {
        WorkerReply::Mounted { block_size_bytes } => block_size_bytes,
        answer => return Ok(answer),
    };
    let loop_device = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(&file)
        .and_then(|open| LoopDevice::configure(&open, &file, block_size_bytes, read_only))
        .map_err(BackendError::failed(format!(
            "cannot make a loop device of {} (is there a /dev/loop-control?)",
            file.display()
        )))?;
    tracing::debug!("{} does direct I/O: {}", loop_device.path().display(), loop_device.is_direct());
    let answer = protocol::send(socket, &loop_device).and_then(|()| protocol::receive(socket)).map_err(silent());
    if !matches!(answer, Ok(WorkerReply::Ready)) {
        // Nobody has used it yet. The worker, if it lives, ends when it has gone.
        loop_device.clear_when_unused(CLEAR_PATIENCE).ok();
    }
    answer
}

fn order(mut socket: &UnixStream, request: Attach, keys: &[&VolumeKey]) -> io::Result<WorkerReply> {
    socket.set_read_timeout(Some(READY_PATIENCE))?;
    protocol::send(socket, &Request::Attach(request))?;
    keys.iter().try_for_each(|key| socket.write_all(key.expose()))?;
    protocol::receive(socket)
}

impl Backend for Userspace {
    fn active(&self, volume: &Volume, options: &Activate) -> Result<Option<Mapping>, BackendError> {
        let Some(state) = State::load(&self.paths, &options.name)? else {
            self.paths.require_link(&options.name)?;
            let judge = |all: &[&dyn Backend]| once::require_free(all, &volume.device, Some(&options.name));
            return self.with_all(judge).map(|()| None);
        };
        if !state.worker.is_alive() || state.exported(&self.paths).is_none() {
            // Dead or dying; activating removes it.
            return Ok(None);
        }
        self.same(&state, &request(&self.paths, volume, options, 0)?, options.export).map(Some)
    }

    fn activate(&self, unlocked: &Unlocked, options: &Activate) -> Result<Mapping, BackendError> {
        let volume = unlocked.volume();
        let keys: Vec<_> = std::iter::once(unlocked.key()).chain(unlocked.rest().map(|(key, _)| key)).collect();
        let midway = volume.midway()?;
        let request = Attach { midway, ..request(&self.paths, volume, options, keys[0].size().bits())? };
        if options.allow_discards && request.export == ExportKind::Fuse {
            tracing::warn!("the FUSE export does not pass discards; use --export ublk or nbd");
        }
        self.paths.create()?;
        let lock = self.paths.lock(&options.name, lock::PATIENCE)?;
        if let Some(mapping) = self.existing(&request, options.export)? {
            return Ok(mapping);
        }
        self.paths.require_link(&options.name)?;
        let _claim = self.with_all(|all| once::claim(&self.paths, all, &volume.device, &options.name))?;
        let mut export = request.export;
        match self.start(request.clone(), &keys, &lock) {
            // It was not asked for, and the driver may be older than what libublk needs.
            Err(error @ BackendError::Failed { .. }) if export == ExportKind::Ublk && options.export.is_none() => {
                tracing::warn!("{error}; using a loop device over FUSE instead");
                export = ExportKind::Fuse;
                self.start(Attach { export, ..request }, &keys, &lock)?;
            }
            started => started?,
        }
        Ok(self.mapping(&options.name, export, false))
    }

    fn resize(&self, name: &MappingName, unlocked: &Unlocked) -> Result<u64, BackendError> {
        let volume = unlocked.volume();
        let _lock = self.paths.lock(name, lock::PATIENCE)?;
        let mut state = State::load(&self.paths, name)?.ok_or_else(|| BackendError::NotActive(name.clone()))?;
        let exported = state.exported(&self.paths).ok_or_else(|| BackendError::NotActive(name.clone()))?;
        if state.volume != volume.uuid() {
            let by = format!("{} is attached under it", state.device.display());
            return Err(BackendError::Foreign { name: name.clone(), by });
        }
        let size_bytes = volume.geometry.size_bytes;
        let mut grow = || match exported {
            Exported::Loop(device) => {
                // The worker accepts what its device has room for, and the kernel notes the new size.
                OpenOptions::new().write(true).open(self.paths.file(name))?.set_len(size_bytes)?;
                state.size_bytes = device.take_size()?;
                state.update(&self.paths).map(|()| state.size_bytes)
            }
            _ => match control::give(&self.paths.control(name), Order::Grow { size_bytes })? {
                OrderReply::Done => Ok(size_bytes),
                OrderReply::InUse(_) => Err(io::ErrorKind::ResourceBusy.into()),
                OrderReply::Failed(number) => Err(io::Error::from_raw_os_error(number)),
            },
        };
        grow().map_err(|error: io::Error| BackendError::failed(format!("cannot resize '{name}'"))(error))
    }

    fn deactivate(&self, name: &MappingName, deferred: Deferred) -> Result<(), BackendError> {
        removal::detach(&self.paths, name, deferred)
    }

    fn status(&self, name: &MappingName) -> Result<Option<MappingStatus>, BackendError> {
        let Some(state) = State::load(&self.paths, name)? else { return Ok(None) };
        let exported = state.exported(&self.paths);
        let trouble = match (&state.fault, &exported) {
            (Some(fault), _) => Some(fault.clone()),
            (None, _) if !state.worker.is_alive() => {
                Some("its worker has died and its data cannot be reached: unmount it, then detach it".to_owned())
            }
            (None, None) => Some("it is being attached or detached".to_owned()),
            (None, Some(exported))
                if state.going || matches!(exported, Exported::Loop(device) if device.is_going()) =>
            {
                Some("it is detached as soon as its last user closes it".to_owned())
            }
            (None, Some(_)) => None,
        };
        Ok(Some(MappingStatus {
            name: name.clone(),
            backend: BackendKind::Userspace,
            device: self.users_path(name, state.export),
            export: Some(state.export),
            source: state.device,
            volume: state.volume,
            cipher: CIPHER.to_owned(),
            key_size_bits: state.key_size_bits,
            sector_size_bytes: state.sector_size_bytes,
            size_bytes: state.size_bytes,
            read_only: state.read_only,
            trouble,
            holders: match exported {
                Some(Exported::Socket(_)) => match control::give(&self.paths.control(name), Order::Users) {
                    Ok(OrderReply::InUse(clients)) => clients,
                    _ => Vec::new(),
                },
                Some(exported) => users::of_path(&exported.path()),
                None => Vec::new(),
            },
        }))
    }

    fn device(&self, name: &MappingName) -> Result<Option<PathBuf>, BackendError> {
        Ok(State::load(&self.paths, name)?.map(|state| self.users_path(name, state.export)))
    }

    fn occupied(&self) -> Result<Vec<Occupied>, BackendError> {
        let mut occupied = Vec::new();
        for name in self.list()? {
            match State::load(&self.paths, &name) {
                Ok(Some(state)) if state.worker.is_alive() => {
                    occupied.push(Occupied { name, footing: Footing::of(state.identity) });
                }
                // One that is being made or removed has no state for a moment.
                Ok(_) => {}
                // Nobody else's attach is to fail by it.
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(occupied)
    }

    fn list(&self) -> Result<Vec<MappingName>, BackendError> {
        let action = || format!("cannot list {}", self.paths.state.display());
        self.paths.names().map_err(BackendError::failed(action()))
    }
}

fn request(paths: &Paths, volume: &Volume, options: &Activate, key_size_bits: u32) -> Result<Attach, BackendError> {
    let (device, geometry) = (&volume.device, &volume.geometry);
    let action = || format!("cannot attach {}", device.path.display());
    // The worker has another working directory.
    let path = std::path::absolute(&device.path).map_err(BackendError::failed(action()))?;
    Ok(Attach {
        name: options.name.clone(),
        paths: paths.clone(),
        device: path,
        identity: device.identity,
        volume: volume.uuid(),
        export: options.export.unwrap_or_else(|| match ublk::is_available() {
            true => ExportKind::Ublk,
            false => ExportKind::Fuse,
        }),
        read_only: options.read_only,
        allow_discards: options.allow_discards,
        key_size_bits,
        sector_size_bytes: geometry.sector_size.bytes(),
        data_offset_bytes: geometry.data_offset_bytes,
        size_bytes: geometry.size_bytes,
        iv_offset_sectors: geometry.iv_offset_sectors,
        midway: None,
    })
}
