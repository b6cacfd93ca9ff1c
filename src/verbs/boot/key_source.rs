//! Sources: what may have a volume's key, and what has to be there before it can be asked.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::{Duration, Instant},
};

use super::{Announced, BootError, Planned, Report, lockbox_once::Opening, mounts::Mounts};
use crate::{
    base::key::{KeyReference, StoreName, VolumeKey},
    config::{Config, DeviceSpec, IdentitySpec, StoreConfig},
    keys::{seal::identities, store, tpm::Tpm},
    sys::announce::{self, Waits},
    unlock::{
        self,
        case::{self, Case, Strictness},
        container::Container,
        lockbox::Lockbox,
    },
    verbs::error::Error,
    volumes::{
        backend::{self, Activate},
        header::{self, Volume},
    },
};

/// What opened a volume, or failed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// A key in a store.
    Store(KeyReference),
    /// The same, with the lockbox open: its entry, or what is sealed to this host.
    Lockbox(KeyReference),
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
            Self::Lockbox(key) => write!(f, "{key} with the lockbox"),
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

/// How long a store is asked whether this host is still admitted, where a copy of the lockbox key does without.
const LONGEST_QUESTION: Duration = Duration::from_secs(2);

/// Whether the TPM has been asked for a key.
#[derive(Default)]
enum TpmUse {
    #[default]
    No,
    Yes,
    /// The latch was decided upon: who comes now would open a key that nothing latches.
    Over,
}

/// What has become of the latch.
#[derive(Debug)]
pub enum Latch {
    /// PCR 15 is extended.
    Done,
    /// The TPM was not asked for a key, or the site does not want it.
    NotWanted,
    /// The TPM is not there, and will open its key when it comes.
    NoTpm(PathBuf),
}

/// Whether there is a way to a server, as far as this host knows.
fn is_reachable(server: &store::Server) -> bool {
    match server.address() {
        Some(address) => announce::has_route((address, server.port).into()),
        None => announce::has_address(),
    }
}

/// What all threads of a boot share.
pub struct Sources {
    config: Arc<Config>,
    deadline: Instant,
    containers: Mutex<BTreeMap<StoreName, Arc<Container>>>,
    mounts: Mounts,
    lockbox: Opening,
    /// Whether the TPM has been asked for a key.
    tpm: Mutex<TpmUse>,
    /// What is waited for.
    pub waits: Waits,
    reports: Sender<Report>,
}

impl Sources {
    /// None is asked yet.
    pub fn new(config: Arc<Config>, deadline: Instant, reports: Sender<Report>) -> Self {
        let mounts = Mounts::of(&config.boot.mounts);
        Self {
            config,
            deadline,
            containers: Mutex::default(),
            mounts,
            lockbox: Opening::default(),
            tpm: Mutex::default(),
            waits: Waits::default(),
            reports,
        }
    }

    /// The volume, once its device is there.
    pub fn find(&self, number: usize, planned: &Planned) -> Result<Volume, Error> {
        self.await_device(number, &planned.device)?;
        if let Some(header) = &planned.header {
            self.await_path(number, header)?;
        }
        Ok(header::probe(planned.device.path(), planned.header.as_deref())?)
    }

    /// Who may have a volume's key: the lockbox, and the store itself if this host has a private key for it besides.
    pub fn of(&self, keys: &[KeyReference]) -> Vec<By> {
        let has_lockbox = self.config.lockbox.is_some();
        let has_identities =
            |key: &KeyReference| self.config.store(&key.store).is_ok_and(|store| !store.sealing.identities.is_empty());
        let of = |key: &KeyReference| {
            let from_store = (!has_lockbox || has_identities(key)).then(|| By::Store(key.clone()));
            has_lockbox.then(|| By::Lockbox(key.clone())).into_iter().chain(from_store)
        };
        keys.iter().flat_map(of).collect()
    }

    /// The volume's key, once the way to it is there.
    pub fn fetch(&self, number: usize, volume: &Volume, by: &By) -> Result<VolumeKey, Error> {
        let (reference, container) = match by {
            By::Store(reference) => {
                self.await_store(number, &reference.store)?;
                (reference, self.container(&reference.store)?)
            }
            By::Lockbox(reference) => {
                self.lockbox.once(|| self.open_lockbox(number))?;
                // Of its own: whether the lockbox is open is looked at once.
                let container = Container::open(&self.config, &reference.store, None)?.lockbox_first();
                if !container.has_entry(&reference.key, Some(volume.uuid())) {
                    self.await_store(number, &reference.store)?;
                }
                (reference, Arc::new(container))
            }
            By::Passphrase | By::Before | By::Device => {
                return Err(unlock::Error::NoReference(volume.device.path.clone()).into());
            }
        };
        Case::new(&self.config, &container, reference, volume).separate(None, Strictness::default())?;
        Ok(case::open(&container, reference, volume)?)
    }

    /// Opens the lockbox.
    fn open_lockbox(&self, number: usize) -> Result<(), Error> {
        let lockbox = Lockbox::configured(&self.config)?;
        let Some(settings) = &self.config.lockbox else { return Ok(()) };
        let store = self.config.store(&settings.store)?;
        let identities = if settings.identities.is_empty() { &store.sealing.identities } else { &settings.identities };
        self.await_identities(number, identities)?;
        let config = if settings.offline {
            // The copy on this host does as well: the store is asked whether this host is still admitted, but not waited for.
            Arc::new(self.impatient(store)?)
        } else {
            self.await_store(number, &settings.store)?;
            Arc::clone(&self.config)
        };
        self.lockbox.asks();
        lockbox.open(&config, None)?;
        let _ = self.reports.send(Report::LockboxOpened);
        Ok(())
    }

    /// The configuration, with little time for a store that cannot be reached, or is not needed.
    fn impatient(&self, store: &StoreConfig) -> Result<Config, Error> {
        let mut impatient = Config::read(&self.config.path)?;
        let patience =
            if store::kind(store)?.servers()?.iter().any(is_reachable) { LONGEST_QUESTION } else { Duration::ZERO };
        for store in impatient.stores.values_mut() {
            store.network.total_seconds = patience.as_secs_f64();
        }
        Ok(impatient)
    }

    /// Waits for all that a store takes.
    fn await_store(&self, number: usize, name: &StoreName) -> Result<(), Error> {
        let store = self.config.store(name)?;
        self.await_identities(number, &store.sealing.identities)?;
        let kind = store::kind(store)?;
        for path in kind.paths() {
            self.await_path(number, path)?;
        }
        self.await_route(number, &kind.servers()?)
    }

    /// Waits for all that identities take: file systems, the TPM, servers.
    fn await_identities(&self, number: usize, specs: &[IdentitySpec]) -> Result<(), Error> {
        for path in identities::files(specs) {
            self.await_path(number, &path)?;
        }
        for spec in specs {
            self.await_route(number, &identities::kind(spec).servers())?;
        }
        if identities::need_tpm(specs) {
            self.use_tpm()?;
            if let Some(device) = self.config.tpm.device() {
                self.wait(number, Announced::Devices, &format!("the TPM {}", device.display()), || device.exists())?;
            }
        }
        Ok(())
    }

    /// The TPM is about to be asked for a key, unless the boot has settled that it is not.
    fn use_tpm(&self) -> Result<(), BootError> {
        let mut tpm = self.lock_tpm();
        if matches!(*tpm, TpmUse::Over) {
            return Err(BootError::TooLate {
                what: "what the TPM is asked for".to_owned(),
                after: self.config.boot.total,
            });
        }
        *tpm = TpmUse::Yes;
        Ok(())
    }

    fn lock_tpm(&self) -> MutexGuard<'_, TpmUse> {
        self.tpm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latch, if the TPM was asked for a key; from now on it is asked for none.
    pub fn latch(&self) -> Result<Latch, Error> {
        let used = std::mem::replace(&mut *self.lock_tpm(), TpmUse::Over);
        if matches!(used, TpmUse::No) {
            return Ok(Latch::NotWanted);
        }
        // Volumes that come later in this boot are opened by the lockbox, too, and the TPM would not open it any more.
        self.lockbox.finish();
        latch(&self.config)
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
        let what = format!("a route to {}", first.host);
        self.wait(number, Announced::Routes, &what, || servers.iter().any(is_reachable))
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
            announce::until(announced, self.deadline, look)
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

/// Extends PCR 15: nothing that runs later in this boot can use a key of the TPM again.
pub fn latch(config: &Config) -> Result<Latch, Error> {
    if !config.tpm.latch {
        return Ok(Latch::NotWanted);
    }
    if let Some(device) = config.tpm.device().filter(|device| !device.exists()) {
        return Ok(Latch::NoTpm(device));
    }
    Tpm::open(&config.tpm)?.latch()?;
    Ok(Latch::Done)
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc};

    use super::*;

    #[test]
    fn the_tpm_is_asked_for_nothing_once_the_latch_is_decided_upon() {
        let folder = tempfile::tempdir().unwrap();
        let (config, key) = (folder.path().join("c.toml"), folder.path().join("tpm.key"));
        fs::write(&config, "[tpm]\ntcti = 'swtpm'\n").unwrap();
        fs::write(&key, "-----BEGIN TSS2 PRIVATE KEY-----\n").unwrap();
        let config = Arc::new(Config::read(&config).unwrap());
        let sources = || Sources::new(config.clone(), Instant::now(), mpsc::channel().0);
        let identity = [IdentitySpec::Tpm(key.into())];
        sources().await_identities(0, &identity).unwrap();
        let over = sources();
        assert!(matches!(over.latch().unwrap(), Latch::NotWanted));
        assert!(over.await_identities(0, &identity).is_err());
    }
}
