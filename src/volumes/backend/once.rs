//! A store is attached once, whatever device names lead to it: two mappings of one store would each cache what the other
//! overwrites.

use std::{fs::File, io, path::Path};

use nix::fcntl::Flock;

use super::{Backend, BackendError, userspace::Paths};
use crate::{
    base::mapping_name::MappingName,
    sys::{device::Device, lock, stores::Footing},
};

/// A mapping, and the stores that it uses.
pub struct Occupied {
    pub name: MappingName,
    pub footing: Footing,
}

/// The stores of a device, held so that no other command maps them meanwhile.
pub struct Claim {
    _locks: Vec<Flock<File>>,
}

/// Holds the device's stores, if no other mapping of these backends uses them. The locks are where the
/// userspace backend has its own.
pub fn claim(
    paths: &Paths,
    backends: &[&dyn Backend],
    device: &Device,
    name: &MappingName,
) -> Result<Claim, BackendError> {
    paths.create()?;
    // In order, so that two commands never wait for each other.
    let locks = Footing::of(device.identity).roots().into_iter().map(|store| {
        let path = paths.state.join(format!(".store-{store}.lock"));
        lock::lock(&path, lock::PATIENCE).map_err(busy(name, &path))
    });
    let claim = Claim { _locks: locks.collect::<Result<_, _>>()? };
    require_free(backends, device, Some(name))?;
    Ok(claim)
}

/// Refuses a device whose store is mapped under another name.
pub fn require_free(
    backends: &[&dyn Backend],
    device: &Device,
    name: Option<&MappingName>,
) -> Result<(), BackendError> {
    match occupants(backends, device)?.into_iter().find(|other| Some(other) != name) {
        Some(name) => Err(BackendError::AttachedAlready { device: device.path.clone(), name }),
        None => Ok(()),
    }
}

/// The mappings that use a device's store.
pub fn occupants(backends: &[&dyn Backend], device: &Device) -> Result<Vec<MappingName>, BackendError> {
    let footing = Footing::of(device.identity);
    let mut names = Vec::new();
    for backend in backends {
        let mappings = backend.occupied()?.into_iter().filter(|mapping| mapping.footing.overlaps(&footing));
        names.extend(mappings.map(|mapping| mapping.name));
    }
    Ok(names)
}

/// A lock that is held is another command's, still under way.
pub fn busy(name: &MappingName, path: &Path) -> impl FnOnce(io::Error) -> BackendError {
    let (name, action) = (name.clone(), format!("cannot lock {}", path.display()));
    move |error| match error.kind() {
        io::ErrorKind::TimedOut => {
            BackendError::Busy { name, holders: vec![format!("another attach or detach, still under way: {error}")] }
        }
        _ => BackendError::failed(action)(error),
    }
}
