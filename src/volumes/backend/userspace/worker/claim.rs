//! The worker's claim on the encrypted device.

use std::fs::File;

use super::super::{protocol::Attach, state::State};
use crate::{
    sys::device::{Device, DeviceError},
    volumes::header::Midway,
};

/// Opens the encrypted device such that no second worker, mount or mapping has it. It is the device whose header was read.
pub fn open(request: &Attach) -> Result<(Device, File), DeviceError> {
    let path = &request.device;
    let device = Device::look(path)?;
    if device.identity != request.identity {
        return Err(DeviceError::Replaced(path.clone()));
    }
    // At least one sector, or there is nothing to attach.
    let data_bytes = request.size_bytes.max(request.sector_size_bytes.into());
    let needed_bytes = request.data_offset_bytes.saturating_add(data_bytes);
    if device.size_bytes < needed_bytes {
        return Err(DeviceError::TooSmall { path: path.clone(), size_bytes: device.size_bytes, needed_bytes });
    }
    let opened = if request.read_only { device.claim(false) } else { device.open_exclusive() };
    let file = opened.map_err(|error| blame(error, request))?;
    // Nobody else can write to it now. A rotation of its key may have gone on since its header was read.
    let midway = Midway::of(&file, request.volume).map_err(DeviceError::io("read", path))?;
    if midway != request.midway {
        return Err(DeviceError::Busy { path: path.clone(), holders: vec!["a rotation of its key".to_owned()] });
    }
    Ok((device, file))
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
