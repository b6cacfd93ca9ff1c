//! A store is attached once, whatever device names lead to it: two mappings of one store would each cache what the other
//! overwrites.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::{Backend, BackendError};
use crate::{
    base::mapping_name::MappingName,
    sys::{device::Device, stores::Footing},
};

/// How long one command waits for another that maps the same store, or works on the same name.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// A mapping, and the stores that it uses.
pub struct Occupied {
    pub name: MappingName,
    pub footing: Footing,
}

/// The stores of a device, held so that no other command maps them meanwhile.
pub struct Claim {
    _locks: Vec<Flock<File>>,
}

/// Holds the device's stores, if no other mapping of these backends uses them. `folder` is where the locks are.
pub fn claim(
    folder: &Path,
    backends: &[&dyn Backend],
    device: &Device,
    name: &MappingName,
) -> Result<Claim, BackendError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(BackendError::failed(format!("cannot make the directory {}", folder.display())))?;
    // In order, so that two commands never wait for each other.
    let locks = Footing::of(device.identity).roots().into_iter().map(|store| {
        let path = folder.join(format!(".store-{store}.lock"));
        lock(&path, LOCK_PATIENCE).map_err(BackendError::failed(format!("cannot lock {}", path.display())))?.ok_or_else(
            || BackendError::Busy {
                name: name.clone(),
                holders: vec!["another attach of the same device, still under way".to_owned()],
            },
        )
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
    let footing = Footing::of(device.identity);
    for backend in backends {
        let other = |mapping: &Occupied| Some(&mapping.name) != name && mapping.footing.overlaps(&footing);
        if let Some(Occupied { name, .. }) = backend.occupied()?.into_iter().find(other) {
            return Err(BackendError::AttachedAlready { device: device.path.clone(), name });
        }
    }
    Ok(())
}

/// Locks a file of our own directory; `None` if somebody else keeps it for all of `patience`.
pub fn lock(path: &Path, patience: Duration) -> Result<Option<Flock<File>>, std::io::Error> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let deadline = Instant::now() + patience;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = same,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno.into()),
        }
        thread::sleep(POLL);
    }
}
