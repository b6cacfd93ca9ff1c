//! Sources: what may have a volume's key, and what has to be there before it can be asked.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::Sender,
    },
    time::{Duration, Instant},
};

use super::{
    BootError, Planned, Report,
    latch::{self, PcrLatch},
    lockbox_once::Opening,
    mounts::Mounts,
    volumes::VolumeNo,
};
use crate::{
    base::{
        chain::chain,
        key::{KeyReference, StoreName},
    },
    config::{Config, DeviceSpec, IdentitySpec, StoreConfig},
    keys::{seal::identities, store},
    sys::announce::{self, Announced, Waits},
    unlock::{
        self,
        case::{Case, Circumstances},
        container::{self, Container, Use},
        lockbox::{Lockbox, LockboxError},
        pins::Pins,
    },
    verbs::{error::Error, rotate},
    volumes::{Unlocked, header::Volume},
};

/// What opened a volume, or failed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenedBy {
    /// A key in a store.
    Store(KeyReference),
    /// The same, with the lockbox open: its entry, or what is sealed to this host.
    Lockbox(KeyReference),
    /// A person.
    Passphrase,
    /// Another program attached it.
    Before,
    /// This boot attached it, and was started once more.
    Earlier,
    /// Nothing yet: the device or its header.
    Device,
}

impl fmt::Display for OpenedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(key) => key.fmt(f),
            Self::Lockbox(key) => write!(f, "{key} with the lockbox"),
            Self::Passphrase => f.write_str("passphrase"),
            Self::Before => f.write_str("another program"),
            Self::Earlier => f.write_str("an earlier run"),
            Self::Device => f.write_str("device"),
        }
    }
}

/// How long a store is asked whether this host is still admitted, where a copy of the lockbox key does without.
const LONGEST_QUESTION: Duration = Duration::from_secs(2);

/// What may have a volume's key: the lockbox, and the store itself if this host has a private key for it besides. Each is
/// named once.
pub fn sources_of(config: &Config, keys: &[KeyReference]) -> Vec<OpenedBy> {
    let has_lockbox = config.lockbox.is_some();
    let has_identities =
        |key: &KeyReference| config.store(&key.store).is_ok_and(|store| !store.sealing.identities.is_empty());
    let mut sources = Vec::new();
    for key in keys {
        let lockbox = has_lockbox.then(|| OpenedBy::Lockbox(key.clone()));
        let store = (!has_lockbox || has_identities(key)).then(|| OpenedBy::Store(key.clone()));
        for source in lockbox.into_iter().chain(store) {
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
    }
    sources
}

/// The TPM, for people.
fn of_tpm(device: &Path) -> String {
    format!("the TPM {}", device.display())
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
    /// By their names, and whether by the lockbox.
    containers: Mutex<BTreeMap<(StoreName, bool), Arc<Container>>>,
    mounts: Mounts,
    lockbox: Opening,
    /// The latch was decided upon: a key that the TPM is asked for now would be latched by nothing.
    tpm_is_over: AtomicBool,
    /// What is waited for.
    pub waits: Waits<VolumeNo>,
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
            tpm_is_over: AtomicBool::default(),
            waits: Waits::default(),
            reports,
        }
    }

    /// The volume, once its device is there.
    pub fn find(&self, number: VolumeNo, planned: &Planned) -> Result<Volume, Error> {
        self.await_device(number, &planned.device)?;
        if let Some(header) = &planned.header {
            self.await_path(number, header)?;
        }
        let volume = rotate::find_to_map(&self.config, planned.device.path(), planned.header.as_deref(), None)?;
        if volume.rest.is_some() {
            tracing::warn!(
                "the key of {} is being rotated: its two stored keys open it together, and no passphrase does",
                planned.name
            );
        }
        Ok(volume)
    }

    /// The volume's key, once the way to it is there.
    pub fn fetch(&self, number: VolumeNo, volume: &Volume, by: &OpenedBy) -> Result<Unlocked, Error> {
        let case = match by {
            OpenedBy::Store(reference) => {
                self.await_store(number, &reference.store)?;
                self.await_leaves(number, &reference.store, false)?;
                self.case(volume, reference, self.container(&reference.store, Use::BootByStore)?, Use::BootByStore)?
            }
            OpenedBy::Lockbox(reference) => {
                self.lockbox.once(|| self.open_lockbox(number))?;
                // Not before: whether the lockbox is open is looked at once.
                let container = self.container(&reference.store, Use::BootByLockbox)?;
                let case = self.case(volume, reference, container, Use::BootByLockbox)?;
                if case.needs_store() {
                    self.await_store(number, &reference.store)?;
                    self.await_leaves(number, &reference.store, true)?;
                }
                case
            }
            OpenedBy::Passphrase | OpenedBy::Before | OpenedBy::Earlier | OpenedBy::Device => {
                return Err(unlock::Error::NoReference(volume.device.path.clone()).into());
            }
        };
        let unlocked = case.prove(Circumstances::default())?.key()?;
        if let Some(uuid) = volume.uuid()
            && let Err(error) = self.pins().hand_on(uuid)
        {
            tracing::warn!("{}", chain(&error));
        }
        Ok(unlocked)
    }

    /// The volumes that this host has opened before.
    pub fn pins(&self) -> Pins {
        Pins::of(&self.config)
    }

    fn case(
        &self,
        volume: &Volume,
        reference: &KeyReference,
        container: Arc<Container>,
        used: Use,
    ) -> Result<Case<'_>, unlock::Error> {
        Case::of(&self.config, volume.clone(), reference.clone(), container).with_rest(used)
    }

    /// What was fetched, ready to be mapped.
    pub fn recovered(&self, unlocked: Unlocked, read_only: bool) -> Result<Unlocked, Error> {
        rotate::recovered(&self.config, unlocked, read_only)
    }

    /// Opens the lockbox.
    fn open_lockbox(&self, number: VolumeNo) -> Result<(), Error> {
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
        let unsealed = lockbox.unseal(&config, None)?;
        // PCR 15 is extended at the boot's end, when it is known what was opened.
        self.lockbox.keep(|| Ok(lockbox.keep(unsealed)?))?;
        let _ = self.reports.send(Report::LockboxOpened);
        Ok(())
    }

    /// The configuration, with little time for a store that cannot be reached, or is not needed.
    fn impatient(&self, store: &StoreConfig) -> Result<Config, Error> {
        let mut impatient = Config::clone(&self.config);
        let patience =
            if store::kind(store)?.servers()?.iter().any(is_reachable) { LONGEST_QUESTION } else { Duration::ZERO };
        for store in impatient.stores.values_mut() {
            store.network.total_seconds = patience.as_secs_f64();
        }
        Ok(impatient)
    }

    /// Waits for all that a store takes: its identities, file systems, the TPM, servers.
    fn await_store(&self, number: VolumeNo, name: &StoreName) -> Result<(), Error> {
        let store = self.config.store(name)?;
        let specs = &store.sealing.identities;
        if container::may_open_without_tpm(&self.config, store, false)? {
            self.await_files_and_servers(number, specs)?;
            self.await_tpm_a_while(number, specs)?;
        } else {
            self.await_identities(number, specs)?;
        }
        let kind = store::kind(store)?;
        for path in kind.paths() {
            self.await_path(number, path)?;
        }
        if kind.needs_tpm() {
            self.await_tpm(number)?;
        }
        self.await_route(number, &kind.servers()?)
    }

    /// Waits for a way to the servers that the store's policy takes, if it takes any.
    fn await_leaves(&self, number: VolumeNo, name: &StoreName, is_host: bool) -> Result<(), Error> {
        let store = self.config.store(name)?;
        let servers = container::servers_to_open(&self.config, store, is_host)?;
        if !container::asks_people(store)? {
            return self.await_route(number, &servers);
        }
        // Without a network a person has to be asked: the servers are tried as long as the boot lasts, but not waited for.
        let what = "a route to the servers of the policy";
        let patience = Instant::now() + self.config.boot.prompt_after;
        let is_there = || servers.is_empty() || servers.iter().any(is_reachable);
        let _ = self.wait_until(patience.min(self.deadline), number, Announced::Routes, what, is_there);
        Ok(())
    }

    /// Waits for all that identities take: file systems, the TPM, servers.
    fn await_identities(&self, number: VolumeNo, specs: &[IdentitySpec]) -> Result<(), Error> {
        self.await_files_and_servers(number, specs)?;
        if identities::need_tpm(specs) {
            self.use_tpm()?;
            self.await_tpm(number)?;
        }
        Ok(())
    }

    fn await_files_and_servers(&self, number: VolumeNo, specs: &[IdentitySpec]) -> Result<(), Error> {
        for path in identities::files(specs) {
            self.await_path(number, &path)?;
        }
        for spec in specs {
            self.await_route(number, &identities::kind(spec).servers())?;
        }
        Ok(())
    }

    /// Waits for the TPM where the policy can do without it: half as long as a person is waited for.
    fn await_tpm_a_while(&self, number: VolumeNo, specs: &[IdentitySpec]) -> Result<(), Error> {
        let Some(device) = self.config.tpm.device().filter(|_| identities::need_tpm(specs)) else { return Ok(()) };
        self.use_tpm()?;
        let deadline = self.deadline.min(Instant::now() + self.config.boot.prompt_after / 2);
        self.wait_until(deadline, number, Announced::Devices, &of_tpm(&device), || device.exists()).map(drop)
    }

    fn await_tpm(&self, number: VolumeNo) -> Result<(), Error> {
        let Some(device) = self.config.tpm.device() else { return Ok(()) };
        self.wait(number, Announced::Devices, &of_tpm(&device), || device.exists())
    }

    /// The TPM may be asked for a key, unless the boot has settled that it is not.
    fn use_tpm(&self) -> Result<(), BootError> {
        let late = BootError::TooLate { what: "the TPM's turn".to_owned(), after: self.config.boot.total };
        if self.tpm_is_over.load(SeqCst) { Err(late) } else { Ok(()) }
    }

    /// The latch, by this event; from now on the TPM is asked for no key.
    pub fn latch(&self, event: &str) -> Result<PcrLatch, Error> {
        self.tpm_is_over.store(true, SeqCst);
        // Volumes that come later in this boot are opened by the lockbox, too, and the TPM would not open it any more.
        self.lockbox.finish();
        latch::latch(&self.config, event)
    }

    /// Closes the lockbox for this boot; whether it was open.
    pub fn shut_lockbox(&self, lockbox: &Lockbox) -> Result<bool, LockboxError> {
        self.lockbox.shut(|| lockbox.shut())
    }

    /// One per store and way: its connections, its log-in and the container keys that it has opened are for all volumes.
    fn container(&self, name: &StoreName, used: Use) -> Result<Arc<Container>, Error> {
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        let way = (name.clone(), used == Use::BootByLockbox);
        if let Some(container) = containers.get(&way) {
            return Ok(container.clone());
        }
        let container = Arc::new(Container::open(&self.config, name, None, used)?);
        containers.insert(way, container.clone());
        Ok(container)
    }

    /// Waits for the file system that a path is on, if it is one that is to be mounted.
    fn await_path(&self, number: VolumeNo, path: &Path) -> Result<(), Error> {
        let Some(mount) = self.config.boot.mount_of(path) else { return Ok(()) };
        self.await_device(number, &mount.device)?;
        Ok(self.mounts.mount(mount)?)
    }

    fn await_device(&self, number: VolumeNo, device: &DeviceSpec) -> Result<(), Error> {
        self.wait(number, Announced::Devices, &format!("the disk {device}"), || device.path().exists())
    }

    /// Waits until one of the servers can be reached. A name tells nothing before a name server is reached, so for names
    /// any address of this host will do.
    fn await_route(&self, number: VolumeNo, servers: &[store::Server]) -> Result<(), Error> {
        let Some(first) = servers.first() else { return Ok(()) };
        let what = format!("a route to {}", first.host);
        self.wait(number, Announced::Routes, &what, || servers.iter().any(is_reachable))
    }

    fn wait(
        &self,
        number: VolumeNo,
        announced: Announced,
        what: &str,
        is_there: impl FnMut() -> bool,
    ) -> Result<(), Error> {
        let started = Instant::now();
        match self.wait_until(self.deadline, number, announced, what, is_there)? {
            true => Ok(()),
            false => Err(BootError::TooLate { what: what.to_owned(), after: started.elapsed() }.into()),
        }
    }

    /// Whether it came in time.
    fn wait_until(
        &self,
        deadline: Instant,
        number: VolumeNo,
        announced: Announced,
        what: &str,
        mut is_there: impl FnMut() -> bool,
    ) -> Result<bool, Error> {
        if is_there() {
            return Ok(true);
        }
        let look = || is_there().then_some(());
        let found = self.waits.during(number, what, || {
            let _ = self.reports.send(Report::Waiting);
            announce::until(announced, deadline, look)
        });
        Ok(found.map_err(Error::io(format!("listen to the kernel for {what}")))?.is_some())
    }

    /// Unmounts what was mounted for the boot.
    pub fn unmount(&self) {
        self.mounts.unmount();
    }
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
        let identity = [IdentitySpec::of("tpm", key)];
        sources().await_identities(VolumeNo::FIRST, &identity).unwrap();
        let over = sources();
        assert!(matches!(over.latch("").unwrap(), PcrLatch::NotWanted));
        assert!(over.await_identities(VolumeNo::FIRST, &identity).is_err());
    }

    #[test]
    fn a_tpm_that_the_policy_can_do_without_is_waited_for_a_while_only() {
        let folder = tempfile::tempdir().unwrap();
        let (path, key) = (folder.path().join("c.toml"), folder.path().join("tpm.key"));
        fs::write(&key, "-----BEGIN TSS2 PRIVATE KEY-----\n").unwrap();
        let waits = |opens: &str| {
            let store = "type = 'directory'\npath = 'a'\nescrow = 'e.pem'\nidentities = ['tpm:tpm.key']\n";
            let leaves = "[leaves.tpm]\npublic = 'o.pem'\n[leaves.t1]\ntang = 'http://127.0.0.1:1'\n\
                [leaves.t2]\ntang = 'http://127.0.0.1:2'\n";
            let rest = "[tpm]\ntcti = 'device:/dev/none'\n[boot]\nprompt_after_seconds = 0.2\n";
            fs::write(&path, format!("[stores.a]\n{store}opens = '{opens}'\n{leaves}{rest}")).unwrap();
            let config = Arc::new(Config::read(&path).unwrap());
            let started = Instant::now();
            let sources = Sources::new(config, started + Duration::from_secs(2), mpsc::channel().0);
            (sources.await_store(VolumeNo::FIRST, &"a".parse().unwrap()), started.elapsed())
        };
        let (awaited, after) = waits("any(escrow, 2 of (tpm, t1, t2))");
        awaited.unwrap();
        assert!((0.1..1.5).contains(&after.as_secs_f64()), "{after:?}");
        let refused = waits("any(escrow, all(tpm, t1))").0.err();
        assert!(matches!(refused, Some(Error::Boot(BootError::TooLate { .. }))), "{refused:?}");
    }
}
