//! The configuration: which stores there are, who seals and opens, how strict the separation check is.

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    key::{Place, StoreName},
    volume::PlainHash,
};

/// Where the configuration is unless `--config` or `CRYPTATTACH_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/cryptattach/cryptattach.toml";

/// The configuration file.
#[derive(Debug, Deserialize)]
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
    /// The stores by name.
    #[serde(default)]
    pub stores: BTreeMap<StoreName, StoreConfig>,
    /// Directory for what this host has to remember: which container keys it trusts.
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
    /// Warn and go on.
    #[default]
    Warn,
    /// Refuse.
    Strict,
}

/// `[separation]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Separation {
    /// What *unproven* leads to.
    #[serde(default)]
    pub policy: SeparationPolicy,
    /// How far apart from the volume the replicas of a key in an object store must be.
    #[serde(default)]
    pub level: SeparationLevel,
    /// What is known of other hosts; see [`crate::separation::Inventory`].
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
#[derive(Debug, Deserialize)]
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

/// `[stores.NAME]`: where the sealed keys are, whom they are sealed to, and what opens them.
#[derive(Debug, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct StoreConfig {
    /// What kind of store it is, and where.
    pub location: Location,
    /// Whom keys are sealed to.
    pub sealing: Sealing,
    /// `[network]`
    pub network: Network,
}

/// The part of `[stores.NAME]` that is the same for all kinds of stores.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealing {
    /// Public key or certificate (PEM) of the owner: new keys are sealed to it. Barbican keeps keys unsealed without.
    pub owner: Option<PathBuf>,
    /// Public key or certificate (PEM) for recovery, whose private key is kept offline.
    pub escrow: Option<PathBuf>,
    /// Go without escrow: a lost owner key is then lost data.
    #[serde(default)]
    pub no_escrow: bool,
    /// Private keys (PEM) that open keys on this host; `credential:NAME` is systemd's credential of that name.
    #[serde(default)]
    pub identities: Vec<PathBuf>,
    /// Public keys or certificates (PEM) of hosts that new container keys are sealed to, besides owner and escrow.
    #[serde(default)]
    pub hosts: Vec<PathBuf>,
}

/// The part of `[stores.NAME]` that its `type` decides.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Location {
    /// One file per key in a directory.
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// A container of OpenStack's object store.
    Swift(SwiftConfig),
    /// OpenStack's key manager.
    Barbican(BarbicanConfig),
}

/// How to reach a cloud and to log in; the same for all OpenStack services.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudConfig {
    /// Entry of clouds.yaml; the environment's `OS_CLOUD` unless given.
    pub cloud: Option<String>,
    /// The clouds.yaml; searched where OpenStack's own clients do unless given.
    pub clouds: Option<PathBuf>,
    /// File with the password, application credential secret or token, in place of the one in clouds.yaml.
    pub secret: Option<PathBuf>,
}

/// `type = "swift"`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwiftConfig {
    /// The cloud.
    #[serde(skip)]
    pub cloud: CloudConfig,
    /// The container; named as the store unless given.
    pub container: Option<String>,
    /// URLs of the account (`https://HOST/v1/AUTH_...`), all of one cluster, in place of the catalogue's.
    #[serde(default)]
    pub urls: Vec<String>,
    /// URL of the list_endpoints middleware (`https://HOST/endpoints`), if that is not beside the account.
    pub endpoints: Option<String>,
    /// Log in as the caller of a hook, by the token in its request.
    #[serde(default)]
    pub caller_token: bool,
}

/// `type = "barbican"`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BarbicanConfig {
    /// The cloud.
    #[serde(skip)]
    pub cloud: CloudConfig,
    /// URLs of the service, in place of the catalogue's.
    #[serde(default)]
    pub urls: Vec<String>,
    /// Log in as the caller of a hook, by the token in its request, as castellan does.
    #[serde(default = "yes")]
    pub caller_token: bool,
}

fn state() -> PathBuf {
    "/var/lib/cryptattach".into()
}

fn yes() -> bool {
    true
}

impl TryFrom<toml::Table> for StoreConfig {
    type Error = toml::de::Error;

    /// Parts with `deny_unknown_fields` each cannot be flattened into one struct, so the table is parted by hand.
    fn try_from(mut table: toml::Table) -> Result<Self, Self::Error> {
        let mut part =
            |names: &[&str]| -> toml::Table { names.iter().filter_map(|name| table.remove_entry(*name)).collect() };
        let sealing = part(&["owner", "escrow", "no_escrow", "identities", "hosts"]);
        let cloud = part(&["cloud", "clouds", "secret"]);
        let mut location = table.try_into()?;
        match &mut location {
            Location::Swift(SwiftConfig { cloud: own, .. }) | Location::Barbican(BarbicanConfig { cloud: own, .. }) => {
                *own = cloud.try_into()?;
            }
            Location::Directory { .. } => {
                if let Some(name) = cloud.keys().next() {
                    return Err(serde::de::Error::custom(format!("a directory has no `{name}`")));
                }
            }
        }
        Ok(Self { sealing: sealing.try_into()?, location, network: Network::default() })
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("there is no configuration {}", .0.display())]
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
    #[error("no store was named, and the configuration {} has no default_store", .0.display())]
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

fn list(names: &[StoreName]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.iter().map(StoreName::as_str).collect::<Vec<_>>().join(", "),
    }
}

impl Config {
    /// Reads a configuration; relative paths in it are relative to its own directory.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ConfigError::Missing(path.to_owned()),
            _ => ConfigError::Io { action: "read", path: path.to_owned(), source },
        })?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Malformed { path: path.to_owned(), source: Box::new(source) })?;
        config.path = path.to_owned();
        let folder = path.parent().unwrap_or(Path::new("."));
        config.separation.inventory = config.separation.inventory.take().map(|file| folder.join(file));
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
            for file in store.files() {
                *file = resolve(folder, file)?;
            }
        }
        Ok(config)
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

impl StoreConfig {
    /// The files that it names.
    fn files(&mut self) -> Vec<&mut PathBuf> {
        let Sealing { owner, escrow, identities, hosts, .. } = &mut self.sealing;
        let sealing = owner.iter_mut().chain(escrow).chain(identities).chain(hosts);
        match &mut self.location {
            Location::Directory { path } => sealing.chain([path]).collect(),
            Location::Swift(SwiftConfig { cloud, .. }) | Location::Barbican(BarbicanConfig { cloud, .. }) => {
                sealing.chain(&mut cloud.clouds).chain(&mut cloud.secret).collect()
            }
        }
    }

    /// Where this host keeps what opens the store's keys. An owner's key on the volume's own disk is as bad as the
    /// volume key there.
    pub fn places(&self, config: &Path) -> Vec<Place> {
        let identities = self.sealing.identities.iter().map(|path| Place::path("private key", path, true));
        let config = Place::path("configuration", config, false);
        // What logs in to Barbican gets unsealed keys; to Swift, sealed ones only.
        let (cloud, opens) = match &self.location {
            Location::Directory { .. } => (None, false),
            Location::Swift(swift) => (Some(&swift.cloud), false),
            Location::Barbican(barbican) => (Some(&barbican.cloud), true),
        };
        let credentials = cloud.into_iter().flat_map(|cloud| cloud.secret.iter().chain(&cloud.clouds));
        let credentials = credentials.map(|path| Place::path("credential", path, opens));
        identities.chain(credentials).chain([config]).collect()
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
