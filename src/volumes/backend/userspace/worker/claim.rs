//! The worker's claim on the encrypted device.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    libc,
};

use super::super::{protocol::Attach, state::State};
use crate::sys::device::{Device, DeviceError, DeviceKind, Identity};

/// Opens the encrypted device such that no second worker, mount or mapping has it.
pub fn open(request: &Attach) -> Result<(Device, File, Option<Flock<File>>), DeviceError> {
    let path = &request.device;
    let device = Device::look(path)?;
    // At least one sector, or there is nothing to attach.
    let data_bytes = request.size_bytes.max(request.sector_size_bytes.into());
    let needed_bytes = request.data_offset_bytes.saturating_add(data_bytes);
    if device.size_bytes < needed_bytes {
        return Err(DeviceError::TooSmall { path: path.clone(), size_bytes: device.size_bytes, needed_bytes });
    }
    let exclusive = if matches!(device.kind, DeviceKind::Block(_)) { libc::O_EXCL } else { 0 };
    let opened = if request.read_only {
        OpenOptions::new().read(true).custom_flags(exclusive).open(path).map_err(DeviceError::io("open", path))
    } else {
        device.open_exclusive()
    };
    let backing = opened.map_err(|error| blame(error, request))?;
    let metadata = backing.metadata().map_err(DeviceError::io("stat", path))?;
    if Identity::of(&metadata) != request.identity {
        return Err(DeviceError::Exchanged(path.clone()));
    }
    let claim = match device.kind {
        DeviceKind::Block(_) => None,
        DeviceKind::File => {
            let same = backing.try_clone().map_err(DeviceError::io("open", path))?;
            let lock = Flock::lock(same, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                Errno::EWOULDBLOCK => blame(DeviceError::Busy { path: path.clone(), holders: Vec::new() }, request),
                errno => DeviceError::io("lock", path)(errno.into()),
            });
            Some(lock?)
        }
    };
    Ok((device, backing, claim))
}

/// Names the mapping that has the device, if it is one of ours.
fn blame(error: DeviceError, request: &Attach) -> DeviceError {
    let DeviceError::Busy { path, mut holders } = error else { return error };
    let states = request.paths.names().unwrap_or_default();
    let mut states = states.iter().filter_map(|name| State::load(&request.paths, name).ok()?);
    if let Some(other) = states.find(|state| state.identity == request.identity && state.worker.is_alive()) {
        holders = vec![format!("the mapping '{}'", other.name)];
    }
    DeviceError::Busy { path, holders }
}
