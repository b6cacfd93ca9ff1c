//! Sources: what may have a volume's key, and what has to be there before it can be asked.

use std::{
    collections::BTreeMap,
    fmt,
    net::ToSocketAddrs,
    path::Path,
    sync::{Arc, Mutex, PoisonError, mpsc::Sender},
    time::Instant,
};

use super::{
    Announced, BootError, Planned, Report,
    mounts::Mounts,
    wait::{self, Waits},
};
use crate::{
    attach::{self, Strictness},
    backend::{self, Activate},
    config::{Config, DeviceSpec},
    container::Container,
    error::Error,
    key::{KeyReference, StoreName, VolumeKey},
    store,
    volume::{self, Volume},
};

/// What opened a volume, or failed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// A key in a store.
    Store(KeyReference),
    /// A person.
    Passphrase,
    /// It was attached before.
    Before,
    /// Nothing yet: the device or its header.
    Device,
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(key) => key.fmt(f),
            Self::Passphrase => f.write_str("passphrase"),
            Self::Before => f.write_str("another program"),
            Self::Device => f.write_str("device"),
        }
    }
}

/// Whether a volume is attached already: of all who get its key, the first attaches it.
#[derive(Default)]
pub struct Claim(Mutex<bool>);

impl Claim {
    /// Attaches the volume, unless another has.
    pub fn attach(&self, volume: &Volume, key: &VolumeKey, options: &Activate) -> Result<(), Error> {
        let mut attached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !*attached {
            let backend = backend::choose(None, &volume.device)?;
            if backend.active(volume, options)?.is_none() {
                backend.activate(volume, key, options)?;
            }
            *attached = true;
        }
        Ok(())
    }
}

/// What all threads of a boot share.
pub struct Sources {
    config: Arc<Config>,
    deadline: Instant,
    containers: Mutex<BTreeMap<StoreName, Arc<Container>>>,
    mounts: Mounts,
    /// What is waited for.
    pub waits: Waits,
    reports: Sender<Report>,
}

impl Sources {
    /// None is asked yet.
    pub fn new(config: Arc<Config>, deadline: Instant, reports: Sender<Report>) -> Self {
        let mounts = Mounts::of(&config.boot.mounts);
        Self { config, deadline, containers: Mutex::default(), mounts, waits: Waits::default(), reports }
    }

    /// The volume, once its device is there.
    pub fn find(&self, number: usize, planned: &Planned) -> Result<Volume, Error> {
        self.await_device(number, &planned.device)?;
        if let Some(header) = &planned.header {
            self.await_path(number, header)?;
        }
        Ok(volume::probe(planned.device.path(), planned.header.as_deref())?)
    }

    /// The volume's key, once the way to it is there.
    pub fn fetch(&self, number: usize, volume: &Volume, by: &By) -> Result<VolumeKey, Error> {
        let By::Store(reference) = by else { return Err(Error::NoReference(volume.device.path.clone())) };
        let store = self.config.store(&reference.store)?;
        for path in store.paths() {
            self.await_path(number, path)?;
        }
        self.await_route(number, &store::servers(store)?)?;
        let container = self.container(&reference.store)?;
        attach::separate(&self.config, &container, reference, volume, None, Strictness::default())?;
        attach::open(&container, reference, volume)
    }

    /// One per store: its connections, its log-in and the container keys that it has opened are for all volumes.
    fn container(&self, name: &StoreName) -> Result<Arc<Container>, Error> {
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(container) = containers.get(name) {
            return Ok(container.clone());
        }
        let container = Arc::new(Container::open(&self.config, name, None)?);
        containers.insert(name.clone(), container.clone());
        Ok(container)
    }

    /// Waits for the file system that a path is on, if it is one that is to be mounted.
    fn await_path(&self, number: usize, path: &Path) -> Result<(), Error> {
        let Some(mount) = self.config.boot.mount_of(path) else { return Ok(()) };
        self.await_device(number, &mount.device)?;
        Ok(self.mounts.mount(mount)?)
    }

    fn await_device(&self, number: usize, device: &DeviceSpec) -> Result<(), Error> {
        self.wait(number, Announced::Devices, &format!("the disk {device}"), || device.path().exists())
    }

    /// Waits until one of the servers can be reached. A name tells nothing before a name server is reached, so for names
    /// any address of this host will do.
    fn await_route(&self, number: usize, servers: &[store::Server]) -> Result<(), Error> {
        let Some(first) = servers.first() else { return Ok(()) };
        let reachable = |server: &store::Server| match (server.address(), server.port) {
            (Some(address), port) => (address, port).to_socket_addrs().into_iter().flatten().any(wait::has_route),
            (None, _) => wait::has_address(),
        };
        let what = format!("a route to {}", first.host);
        self.wait(number, Announced::Routes, &what, || servers.iter().any(reachable))
    }

    fn wait(
        &self,
        number: usize,
        announced: Announced,
        what: &str,
        mut is_there: impl FnMut() -> bool,
    ) -> Result<(), Error> {
        let started = Instant::now();
        if is_there() {
            return Ok(());
        }
        let look = || is_there().then_some(());
        let found = self.waits.during(number, what, || {
            let _ = self.reports.send(Report::Waiting);
            wait::until(announced, self.deadline, look)
        });
        match found.map_err(Error::io(format!("listen to the kernel for {what}")))? {
            Some(()) => Ok(()),
            None => Err(BootError::TooLate { what: what.to_owned(), after: started.elapsed() }.into()),
        }
    }

    /// Unmounts what was mounted for the boot.
    pub fn unmount(&self) {
        self.mounts.unmount();
    }
}
