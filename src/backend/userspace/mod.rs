//! The userspace backend: AES-XTS in a worker process, exported as a loop device over a FUSE file.
//!
//! ```text
//! /dev/disk/by-cryptattach/NAME -> /dev/loopN -> /run/cryptattach/NAME/export/volume (FUSE)
//!                                                   | worker: holds the key, encrypts
//!                                                   v
//!                                                encrypted device or file (direct I/O)
//! ```

mod confine;
mod fuse;
mod image;
mod loop_device;
mod protocol;
mod state;
mod worker;
mod xts;

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use self::{
    loop_device::LoopDevice,
    protocol::{Answer, Request, receive, send},
    state::{Folder, Identity, State},
};
use super::{Activate, Backend, BackendError, BackendKind, Deferred, Mapping, MappingName, MappingStatus};
use crate::{
    holders,
    key::VolumeKey,
    volume::{CIPHER, Volume},
};

/// The hidden verb that runs the worker.
pub const WORKER_VERB: &str = "userspace-worker";

/// Setting up takes milliseconds; taking down must wait for the device to take what is still to be written.
const PATIENCE_WITH_SET_UP: Duration = Duration::from_secs(30);
const PATIENCE_WITH_FLUSH: Duration = Duration::from_secs(600);

/// The userspace backend.
#[derive(Debug)]
pub struct Userspace {
    /// The program that has [`WORKER_VERB`].
    program: PathBuf,
}

impl Default for Userspace {
    fn default() -> Self {
        Self { program: "/proc/self/exe".into() }
    }
}

/// Runs the worker, with the set-up socket on standard input.
pub fn worker_main() -> ExitCode {
    worker::main()
}

impl Userspace {
    /// With this program's own worker.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a worker that has nothing from us but one end of a socket.
    fn start_worker(&self) -> io::Result<UnixStream> {
        let (client, worker) = UnixStream::pair()?;
        client.set_read_timeout(Some(PATIENCE_WITH_SET_UP))?;
        client.set_write_timeout(Some(PATIENCE_WITH_SET_UP))?;
        Command::new(&self.program)
            .arg(WORKER_VERB)
            .env_clear()
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(worker)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(client)
    }

    fn read(&self, name: &MappingName) -> Result<Option<State>, BackendError> {
        Folder::of(name).read().map_err(BackendError::failed(format!("cannot read the state of '{name}'")))
    }
}

impl Backend for Userspace {
    fn active(&self, volume: &Volume, name: &MappingName) -> Result<Option<Mapping>, BackendError> {
        // What a dead worker left is nobody's mapping; the next worker cleans it up.
        let Some(state) = self.read(name)?.filter(State::is_alive) else { return Ok(None) };
        let identity = Identity::of(&volume.device).map_err(BackendError::failed("cannot look at the device"))?;
        if (state.identity, state.volume) == (identity, volume.uuid()) {
            return Ok(Some(mapping(name, true)));
        }
        let by = format!("{} is attached so", state.device.display());
        Err(BackendError::Foreign { name: name.clone(), by })
    }

    fn activate(&self, volume: &Volume, key: &VolumeKey, options: &Activate) -> Result<Mapping, BackendError> {
        let device = &volume.device.path;
        let failed = |action: &str| BackendError::failed::<io::Error>(format!("cannot {action} {}", device.display()));
        if options.allow_discards || options.no_read_workqueue || options.no_write_workqueue {
            tracing::warn!("the userspace backend passes no discards on and has no work queues");
        }
        let request = Request {
            name: options.name.clone(),
            // The worker has another working directory.
            device: std::path::absolute(device).map_err(failed("find"))?,
            volume: volume.uuid(),
            key_size_bits: key.size().bits(),
            sector_size_bytes: volume.geometry.sector_size.bytes(),
            data_offset_bytes: volume.geometry.data_offset_bytes,
            size_bytes: volume.geometry.size_bytes,
            iv_offset_sectors: volume.geometry.iv_offset_sectors,
            read_only: options.read_only,
        };
        let mut worker = self.start_worker().map_err(failed("start a worker for"))?;
        // A worker that fails early has answered why; that is better to report than the broken pipe.
        let sent = send(&worker, &request).and_then(|()| worker.write_all(key.expose()));
        let answer: io::Result<Answer> = receive(&worker);
        match (answer, sent) {
            (Ok(answer), _) => answer.into_result(&options.name, device)?,
            (Err(_), Err(error)) | (Err(error), Ok(())) => {
                return Err(failed("get an answer from the worker for")(error));
            }
        }
        Ok(mapping(&options.name, false))
    }

    fn deactivate(&self, name: &MappingName, deferred: Deferred) -> Result<(), BackendError> {
        let state = self.read(name)?.ok_or_else(|| BackendError::NotActive(name.clone()))?;
        let folder = Folder::of(name);
        let failed = |action: &str| BackendError::failed::<io::Error>(format!("cannot {action} '{name}'"));
        if !state.is_alive() {
            let _turn = Folder::lock().map_err(failed("lock the state of"))?;
            return match worker::clean_up(&folder) {
                Ok(()) => Ok(()),
                Err(answer) => answer.into_result(name, &state.device),
            };
        }
        let ask = || {
            let worker = UnixStream::connect(folder.control())?;
            worker.set_read_timeout(Some(PATIENCE_WITH_FLUSH))?;
            send(
                &worker,
                &match deferred {
                    Deferred::No => protocol::Command::Detach,
                    Deferred::Yes => protocol::Command::DetachDeferred,
                },
            )?;
            receive::<Answer>(&worker)
        };
        ask().map_err(failed("ask the worker to detach"))?.into_result(name, &state.device)
    }

    fn status(&self, name: &MappingName) -> Result<Option<MappingStatus>, BackendError> {
        let Some(state) = self.read(name)? else { return Ok(None) };
        let loop_device = LoopDevice::at(state.loop_device.clone());
        let trouble = if !state.is_alive() {
            Some(
                "its worker has died: reads and writes fail; unmount it, detach cleans up, then attach again"
                    .to_owned(),
            )
        } else if loop_device.is_going() {
            Some("it will be removed when its last user closes it".to_owned())
        } else {
            None
        };
        let own = format!("(pid {})", state.pid);
        let mut holders = holders::of_path(loop_device.path());
        holders.retain(|holder| !holder.contains(&own));
        Ok(Some(MappingStatus {
            name: name.clone(),
            backend: BackendKind::Userspace,
            device: Folder::of(name).link(),
            source: state.device,
            volume: state.volume,
            cipher: CIPHER.to_owned(),
            key_size_bits: state.key_size_bits,
            sector_size_bytes: state.sector_size_bytes,
            size_bytes: state.size_bytes,
            read_only: state.read_only,
            trouble,
            holders,
        }))
    }

    fn list(&self) -> Result<Vec<MappingName>, BackendError> {
        Folder::all().map_err(BackendError::failed("cannot list the userspace mappings"))
    }
}

fn mapping(name: &MappingName, already_active: bool) -> Mapping {
    Mapping { name: name.clone(), device: Folder::of(name).link(), backend: BackendKind::Userspace, already_active }
}
