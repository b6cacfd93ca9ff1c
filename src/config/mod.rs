//! The configuration: which stores there are, who seals and opens, how strict the separation check is.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use serde::Deserialize;

use crate::base::{advice::Advice, exit::Exit, key::StoreName, mapping_name::MappingName, plain_hash::PlainHash};

mod boot;
pub mod crypttab;
mod device;
mod lockbox;
mod stores;
mod tpm;
mod volumes;

pub use boot::{Boot, BootMount, BootVolume, IMAGES};
pub use device::{DeviceSpec, ParseDeviceSpecError};
pub use lockbox::LockboxConfig;
pub use stores::{BarbicanConfig, CloudConfig, Location, Sealing, StoreConfig, SwiftConfig};
pub use tpm::TpmConfig;
pub use volumes::{Hotplug, VolumeConfig};

/// Where the configuration is unless `--config` or `CRYPTATTACH_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/cryptattach/cryptattach.toml";

/// The configuration file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The store for new keys when the command names none.
    pub default_store: Option<StoreName>,
    /// The separation check.
    #[serde(default)]
    pub separation: Separation,
    /// The audit record.
    #[serde(default)]
    pub audit: Audit,
    /// The hooks.
    #[serde(default)]
    pub hooks: Hooks,
    /// Limits on waiting for servers.
    #[serde(default)]
    pub network: Network,
    /// What is attached while the system boots.
    #[serde(default)]
    pub boot: Boot,
    /// This host's TPM.
    #[serde(default)]
    pub tpm: TpmConfig,
    /// The stores by name.
    #[serde(default)]
    pub stores: BTreeMap<StoreName, StoreConfig>,
    /// The volumes that this host attaches by itself, by the names of their mappings.
    #[serde(default)]
    pub volumes: BTreeMap<MappingName, VolumeConfig>,
    /// Which volumes that appear are attached unasked.
    #[serde(default)]
    pub hotplug: Hotplug,
    /// This host's cache of keys.
    pub lockbox: Option<LockboxConfig>,
    /// Directory for what this host has to remember: which container keys and which lockbox key it trusts. Root's; others have
    /// one of their own.
    #[serde(default = "state")]
    pub state: PathBuf,
    /// The file itself: it is a place, too.
    #[serde(skip)]
    pub path: PathBuf,
}

/// What happens when the separation of key and data is not proven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SeparationPolicy {
    /// Warn and continue.
    #[default]
    Warn,
    /// Refuse.
    Strict,
}

/// `[separation]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Separation {
    /// What *unproven* leads to.
    #[serde(default)]
    pub policy: SeparationPolicy,
    /// How far apart from the volume the replicas of a key in an object store must be.
    #[serde(default)]
    pub level: SeparationLevel,
    /// What is known of other hosts; see [`crate::volumes::separation::Inventory`].
    pub inventory: Option<PathBuf>,
}

/// What a volume and a replica of its key must not have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeparationLevel {
    /// A device.
    Device,
    /// A host.
    #[default]
    Host,
    /// A rack.
    Rack,
}

/// `[audit]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// One JSON object per line and event.
    pub file: PathBuf,
}

impl Default for Audit {
    fn default() -> Self {
        Self { file: "/var/log/cryptattach.jsonl".into() }
    }
}

/// `[hooks]`
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hooks {
    /// What the cryptsetup that made os-brick's plain volumes hashed passphrases with.
    pub plain_hash: PlainHash,
    /// Format blank devices also with keys of a Barbican of which nothing proves that they were never used: those that
    /// castellan's own driver makes.
    pub format_with_unmarked_keys: bool,
}

/// `[network]`: no wait on a server is without a bound.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Seconds until a connection must stand, TLS included.
    pub connect_seconds: f64,
    /// Seconds that one try may take, to the last byte of the answer.
    pub try_seconds: f64,
    /// Seconds that one request may take with all its tries.
    pub total_seconds: f64,
}

impl Default for Network {
    fn default() -> Self {
        Self { connect_seconds: 2.0, try_seconds: 5.0, total_seconds: 30.0 }
    }
}

fn state() -> PathBuf {
    "/var/lib/cryptattach".into()
}

/// Where a user other than root remembers: what root has written is not theirs to read or write (systemd.exec(5), and the
/// XDG base directory specification).
fn own_state() -> Option<PathBuf> {
    let first = |name| env::split_paths(&env::var_os(name)?).next().filter(|path| path.is_absolute());
    first("STATE_DIRECTORY")
        .or_else(|| first("XDG_STATE_HOME").map(|folder| folder.join("cryptattach")))
        .or_else(|| first("HOME").map(|folder| folder.join(".local/state/cryptattach")))
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("the configuration {} does not exist", .0.display())]
    Missing(PathBuf),
    /// It cannot be read or written.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no TOML of the expected form.
    #[error("{} is not a configuration", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A volume is not configured.
    #[error("the configuration {} has no volume '{name}'", .path.display())]
    UnknownVolume {
        /// Its name.
        name: MappingName,
        /// The file.
        path: PathBuf,
    },
    /// A store is not configured.
    #[error("the configuration {} has no store '{name}' (it has: {})", .path.display(), list(.known))]
    UnknownStore {
        /// The store.
        name: StoreName,
        /// The file.
        path: PathBuf,
        /// The stores that there are.
        known: Vec<StoreName>,
    },
    /// No store was named and there is no default.
    #[error("no store is named, and the configuration {} has no default_store", .0.display())]
    NoDefaultStore(PathBuf),
    /// A store has no owner to seal to.
    #[error("store '{name}' in {} must have owner = \"FILE\": keys are sealed to it", .path.display())]
    Owner {
        /// The store.
        name: StoreName,
        /// The file.
        path: PathBuf,
    },
    /// A store has neither escrow nor an explicit refusal of it, or both.
    #[error("store '{name}' in {} must have either escrow = \"FILE\" or no_escrow = true", .path.display())]
    Escrow {
        /// The store.
        name: StoreName,
        /// The file.
        path: PathBuf,
    },
    /// `credential:NAME` outside a unit with credentials.
    #[error("{} names a credential, but CREDENTIALS_DIRECTORY is not set", .0.display())]
    NoCredentials(PathBuf),
}

impl Advice for ConfigError {
    fn exit(&self) -> Exit {
        Exit::Config
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Missing(_) => {
                Some("'cryptattach init' creates it; --config or CRYPTATTACH_CONFIG names another one".into())
            }
            Self::UnknownVolume { name, .. } => {
                Some(format!("add it: [volumes.{name}] with device = \"UUID=...\" ('blkid' shows it)").into())
            }
            Self::Io { .. }
            | Self::Malformed { .. }
            | Self::UnknownStore { .. }
            | Self::NoDefaultStore(_)
            | Self::Owner { .. }
            | Self::Escrow { .. }
            | Self::NoCredentials(_) => None,
        }
    }
}

fn list(names: &[StoreName]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.iter().map(StoreName::as_str).collect::<Vec<_>>().join(", "),
    }
}

impl Config {
    /// Reads a configuration; relative paths in it are relative to its own directory.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut config = Self::outline(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for file in config.tpm.files() {
            *file = resolve(folder, file)?;
        }
        for file in config.lockbox.iter_mut().flat_map(LockboxConfig::files) {
            *file = resolve(folder, file)?;
        }
        for store in config.stores.values_mut() {
            store.sealing.tpm = config.tpm.clone();
            for file in store.files() {
                *file = resolve(folder, file)?;
            }
        }
        for header in config.volumes.values_mut().filter_map(|volume| volume.header.as_mut()) {
            *header = resolve(folder, header)?;
        }
        Ok(config)
    }

    /// As [`Config::read`], for who only wants to know what there is: files named in stores are not looked for. Where
    /// systemd's generators and udev's programs run there are no credentials yet.
    pub fn outline(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ConfigError::Missing(path.to_owned()),
            _ => ConfigError::Io { action: "read", path: path.to_owned(), source },
        })?;
        Self::parse(&text, path)
    }

    /// Reads a configuration's text as [`Config::outline`] reads the file at `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Malformed { path: path.to_owned(), source: Box::new(source) })?;
        config.path = path.to_owned();
        let folder = path.parent().unwrap_or(Path::new("."));
        config.separation.inventory = config.separation.inventory.take().map(|file| folder.join(file));
        for volume in &mut config.boot.volumes {
            volume.header = volume.header.take().map(|file| folder.join(file));
        }
        config.audit.file = folder.join(&config.audit.file);
        config.state = folder.join(&config.state);
        if let Some(lockbox) = &config.lockbox {
            config.store(&lockbox.store)?;
        }
        for (name, store) in &mut config.stores {
            let sealing = &mut store.sealing;
            // Sealed or not is a choice of Barbican's only; sealed, the choice of escrow has to be made.
            let sealed = sealing.owner.is_some() || !matches!(store.location, Location::Barbican(_));
            if sealed && sealing.owner.is_none() {
                return Err(ConfigError::Owner { name: name.clone(), path: path.to_owned() });
            }
            if sealed && sealing.escrow.is_some() == sealing.no_escrow {
                return Err(ConfigError::Escrow { name: name.clone(), path: path.to_owned() });
            }
            store.network = config.network;
        }
        if !geteuid().is_root() {
            config.state = own_state().unwrap_or(config.state);
        }
        Ok(config)
    }

    /// The volume of that name.
    pub fn volume(&self, name: &MappingName) -> Result<&VolumeConfig, ConfigError> {
        self.volumes.get(name).ok_or_else(|| ConfigError::UnknownVolume { name: name.clone(), path: self.path.clone() })
    }

    /// The store of that name.
    pub fn store(&self, name: &StoreName) -> Result<&StoreConfig, ConfigError> {
        self.stores.get(name).ok_or_else(|| ConfigError::UnknownStore {
            name: name.clone(),
            path: self.path.clone(),
            known: self.stores.keys().cloned().collect(),
        })
    }

    /// The named store, or else the default one, or else the only one.
    pub fn store_or_default(&self, name: Option<&StoreName>) -> Result<StoreName, ConfigError> {
        let only = || self.stores.keys().next().filter(|_| self.stores.len() == 1);
        let name = name.or(self.default_store.as_ref()).or_else(only);
        let name = name.ok_or_else(|| ConfigError::NoDefaultStore(self.path.clone()))?;
        self.store(name).map(|_| name.clone())
    }
}

fn resolve(folder: &Path, identity: &Path) -> Result<PathBuf, ConfigError> {
    match identity.to_str().and_then(|text| text.strip_prefix("credential:")) {
        Some(name) => env::var_os("CREDENTIALS_DIRECTORY")
            .map(|directory| Path::new(&directory).join(name))
            .ok_or_else(|| ConfigError::NoCredentials(identity.to_owned())),
        None => Ok(folder.join(identity)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::key::Place;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    #[test]
    fn resolves_paths_beside_itself() {
        let config = read(
            "[stores.cinder]\ntype = 'directory'\npath = '/srv/keys'\nowner = 'owner.pem'\nescrow = 'e.pem'\n\
             identities = ['owner.key']\n",
        )
        .unwrap();
        let name = config.store_or_default(None).unwrap();
        let store = config.store(&name).unwrap();
        assert!(matches!(&store.location, Location::Directory { path } if path == Path::new("/srv/keys")));
        assert_eq!(store.sealing.owner, Some(config.path.with_file_name("owner.pem")));
        assert_eq!(store.sealing.identities, [config.path.with_file_name("owner.key")]);
    }

    #[test]
    fn the_inventory_is_beside_it_as_well() {
        let config = read("[separation]\nlevel = 'rack'\ninventory = 'inventory.toml'\n").unwrap();
        assert_eq!(config.separation.level, SeparationLevel::Rack);
        assert_eq!(config.separation.inventory, Some(config.path.with_file_name("inventory.toml")));
        assert_eq!(read("").unwrap().separation.level, SeparationLevel::Host);
    }

    #[test]
    fn a_lockbox_is_of_a_store_that_there_is() {
        let store = "[stores.cinder]\ntype = 'directory'\npath = 'k'\nowner = 'o.pem'\nno_escrow = true\n";
        let lockbox = "[lockbox]\nhost = 'compute-7'\nstore = 'cinder'\nidentities = ['host.key']\n";
        let config = read(&format!("{store}{lockbox}")).unwrap();
        let of = config.lockbox.as_ref().unwrap();
        assert_eq!((of.lifetime.as_secs(), of.offline), (86400, false));
        assert_eq!(of.identities, [config.path.with_file_name("host.key")]);
        assert_eq!(of.path, Path::new("/var/lib/cryptattach/lockbox"));
        let what = |places: Vec<Place>| places.into_iter().map(|place| place.what).collect::<Vec<_>>();
        assert_eq!(what(of.places(&config.state, None)), ["lockbox entries", "private key"]);
        // Of another store than the key's, its directory and its keys count, for they open the lockbox.
        let text = format!("{store}identities = ['o.key']\n{lockbox}").replace("identities = ['host.key']\n", "");
        let config = read(&text).unwrap();
        let places = config.lockbox.as_ref().unwrap().places(&config.state, config.stores.values().next());
        assert_eq!(what(places), ["lockbox entries", "sealed lockbox key", "private key"]);
        assert!(matches!(read(lockbox), Err(ConfigError::UnknownStore { .. })));
        for wrong in ["lifetime_hours = 0.0", "lifetime_hours = 9000.0", "lifetime_hours = nan", "host = '../x'"] {
            let text = format!("{store}{lockbox}{wrong}\n");
            assert!(matches!(read(&text), Err(ConfigError::Malformed { .. })), "{wrong}");
        }
    }

    #[test]
    fn insists_on_escrow_or_its_refusal() {
        let store = "[stores.cinder]\ntype = 'directory'\npath = 'k'\nowner = 'o.pem'\n";
        assert!(matches!(read(store), Err(ConfigError::Escrow { .. })));
        assert!(read(&format!("{store}no_escrow = true\n")).is_ok());
        assert!(matches!(read(&format!("{store}no_escrow = true\nescrow = 'e'\n")), Err(ConfigError::Escrow { .. })));
    }

    #[test]
    fn says_what_it_does_not_know() {
        let unknown = read("[separation]\npolicie = 'strict'\n").unwrap_err();
        assert!(matches!(&unknown, ConfigError::Malformed { source, .. } if source.to_string().contains("policie")));
        let config = read("").unwrap();
        assert!(matches!(config.store_or_default(None), Err(ConfigError::NoDefaultStore(_))));
        let name = "glance".parse().unwrap();
        assert!(matches!(config.store_or_default(Some(&name)), Err(ConfigError::UnknownStore { .. })));
    }
}
