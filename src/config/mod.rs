//! The configuration: which stores there are, who seals and opens, how strict the separation check is.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use serde::Deserialize;

use paths::Base;

use crate::base::{advice::Advice, exit::Exit, key::StoreName, mapping_name::MappingName, person::Attendant};

mod boot;
mod cloud;
pub mod crypttab;
mod device;
mod hooks;
mod identity;
mod leaves;
mod lockbox;
mod paths;
pub mod policy;
mod servers;
mod stores;
mod tpm;
mod volumes;

pub use boot::{Boot, BootMount, BootVolume, IMAGES};
pub use cloud::CloudConfig;
pub use device::{DeviceSpec, ParseDeviceSpecError};
pub use hooks::{Hooks, Tenants};
pub use identity::IdentitySpec;
pub use leaves::LeafConfig;
pub use lockbox::LockboxConfig;
pub use paths::ConfigPath;
pub use policy::{LeafName, ParsePolicyError, Policy};
pub use servers::{AppRole, Login, ServerConfig};
pub use stores::{Sealing, Section, StoreConfig};
pub use tpm::{Latch, TpmConfig};
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
    /// What policies name.
    #[serde(default)]
    pub leaves: BTreeMap<LeafName, LeafConfig>,
    /// What stores and leaves ask.
    #[serde(default)]
    pub servers: BTreeMap<String, ServerConfig>,
    /// The volumes that this host attaches by itself, by the names of their mappings.
    #[serde(default)]
    pub volumes: BTreeMap<MappingName, VolumeConfig>,
    /// Which volumes that appear are attached unasked.
    #[serde(default)]
    pub hotplug: Hotplug,
    pub lockbox: Option<LockboxConfig>,
    /// What this host counts, for node_exporter's textfile collector.
    pub metrics: Option<ConfigPath>,
    /// Directory for what this host has to remember: which container keys and which lockbox key it trusts. Root's; others have
    /// one of their own.
    #[serde(default = "state")]
    pub state: ConfigPath,
    /// The file itself: it is a place, too.
    #[serde(skip)]
    pub path: PathBuf,
    /// Who may be asked for a recovery key or passphrase; the verb says so, not the file.
    #[serde(skip)]
    pub attendant: Attendant,
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
    pub inventory: Option<ConfigPath>,
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
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// One JSON object per line and event.
    pub file: ConfigPath,
    /// The TPM's NV index for anchors of it.
    pub tpm_index: u32,
}

impl Default for Audit {
    fn default() -> Self {
        // Beside that of [tpm] counter.
        Self { file: "/var/log/cryptattach.jsonl".into(), tpm_index: 0x0180_CA78 }
    }
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

fn state() -> ConfigPath {
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
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is no TOML of the expected form.
    #[error("{} is not a configuration", .path.display())]
    Malformed {
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A store's kind does not know what is configured for it.
    #[error("store '{}' in {} cannot be used", .name.as_ref().map_or("", StoreName::as_str), .path.display())]
    Store {
        name: Option<StoreName>,
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A leaf's kind does not know what is configured for it.
    #[error("leaf '{}' in {} cannot be used", .name.as_ref().map_or("", LeafName::as_str), .path.display())]
    Leaf {
        name: Option<LeafName>,
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A server cannot be asked as it is configured.
    #[error("server '{name}' in {} cannot be used: {why}", .path.display())]
    Server { name: String, path: PathBuf, why: String },
    /// What a store's `opens` says is no policy.
    #[error("'opens' of store '{name}' in {} is not a policy", .path.display())]
    Policy {
        name: StoreName,
        path: PathBuf,
        #[source]
        source: ParsePolicyError,
    },
    /// A policy and the rest of the configuration do not fit together.
    #[error("'opens' of store '{name}' in {} {why}", .path.display())]
    PolicyMisfit {
        name: StoreName,
        path: PathBuf,
        /// "names the leaf 't4', but there is no [leaves.t4]", ...
        why: String,
    },
    /// A leaf is not configured.
    #[error("the configuration {} has no [leaves.{name}]", .path.display())]
    UnknownLeaf { name: LeafName, path: PathBuf },
    /// A volume is not configured.
    #[error("the configuration {} has no volume '{name}'", .path.display())]
    UnknownVolume { name: MappingName, path: PathBuf },
    /// A store is not configured.
    #[error("the configuration {} has no store '{name}' (it has: {})", .path.display(), list(.known))]
    UnknownStore { name: StoreName, path: PathBuf, known: Vec<StoreName> },
    /// No store was named and there is no default.
    #[error("no store is named, and the configuration {} has no default_store", .0.display())]
    NoDefaultStore(PathBuf),
    /// A store has no owner to seal to.
    #[error("store '{name}' in {} must have owner = \"FILE\": keys are sealed to it", .path.display())]
    Owner { name: StoreName, path: PathBuf },
    /// A store has neither escrow nor an explicit refusal of it, or both.
    #[error("store '{name}' in {} must have either escrow = \"FILE\" or no_escrow = true", .path.display())]
    Escrow { name: StoreName, path: PathBuf },
    /// Callers of hooks cannot be both one tenant and told apart.
    #[error("[hooks] in {} has both tenants = \"one\" and a keystone that tells projects apart", .0.display())]
    OneTenantAndKeystone(PathBuf),
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
            Self::Policy { .. } | Self::PolicyMisfit { .. } => {
                Some("write it like: opens = \"any(escrow, all(tpm, 2 of (t1, t2, t3)))\"".into())
            }
            Self::UnknownStore { name, .. } => {
                Some(format!("name one that it has; 'cryptattach init --store {name}' makes a new one").into())
            }
            Self::UnknownLeaf { name, .. } => {
                Some(format!("add it: [leaves.{name}] ('Leaves' in docs/configuration.md)").into())
            }
            Self::NoDefaultStore(_) => Some("name the store, or write there: default_store = \"NAME\"".into()),
            Self::Io { .. }
            | Self::Malformed { .. }
            | Self::Store { .. }
            | Self::Leaf { .. }
            | Self::Server { .. }
            | Self::Owner { .. }
            | Self::Escrow { .. }
            | Self::OneTenantAndKeystone(_)
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
        Self::read_from(Base { file: path.to_owned(), with_credentials: true })
    }

    /// As [`Config::read`], without looking for credentials: where systemd's generators and udev's programs run there are none
    /// yet.
    pub fn outline(path: &Path) -> Result<Self, ConfigError> {
        Self::read_from(Base { file: path.to_owned(), with_credentials: false })
    }

    fn read_from(base: Base) -> Result<Self, ConfigError> {
        let path = &base.file;
        let text = fs::read_to_string(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ConfigError::Missing(path.to_owned()),
            _ => ConfigError::Io { action: "read", path: path.to_owned(), source },
        })?;
        Self::parse_in(&text, &base)
    }

    /// Reads a configuration's text as [`Config::outline`] reads the file at `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Self::parse_in(text, &Base { file: path.to_owned(), with_credentials: false })
    }

    fn parse_in(text: &str, base: &Base) -> Result<Self, ConfigError> {
        let mut config: Self = base.read(|| toml::from_str(text))?;
        config.path = base.file.clone();
        if config.hooks.tenants == Tenants::One && config.hooks.keystone.is_some() {
            return Err(ConfigError::OneTenantAndKeystone(config.path));
        }
        if let Some(lockbox) = &config.lockbox {
            config.store(&lockbox.store)?;
        }
        if !geteuid().is_root() {
            config.state = own_state().map_or(config.state, ConfigPath::from);
        }
        for (name, server) in &mut config.servers {
            server.complete(name, config.path.clone());
        }
        for (name, leaf) in &mut config.leaves {
            leaf.complete(name, &config.servers, &config.state)?;
        }
        for (name, store) in &mut config.stores {
            store.complete(name, config.network, &config.tpm, &config.servers)?;
            store.sealing.complete(name, &config.path, &config.leaves)?;
        }
        Ok(config)
    }

    /// The leaf of that name.
    pub fn leaf(&self, name: &LeafName) -> Result<&LeafConfig, ConfigError> {
        self.leaves.get(name).ok_or_else(|| ConfigError::UnknownLeaf { name: name.clone(), path: self.path.clone() })
    }

    /// The volume of that name.
    pub fn volume(&self, name: &MappingName) -> Result<&VolumeConfig, ConfigError> {
        self.volumes.get(name).ok_or_else(|| ConfigError::UnknownVolume { name: name.clone(), path: self.path.clone() })
    }

    /// The devices of all volumes that it names, with their detached headers.
    pub fn devices(&self) -> impl Iterator<Item = (&Path, Option<&Path>)> {
        let boot = self.boot.volumes.iter().map(|volume| (volume.device.path(), volume.header.as_deref()));
        boot.chain(self.volumes.values().map(|volume| (volume.device.path(), volume.header.as_deref())))
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
             identities = ['owner.key', 'tpm:host.tpm.pem']\n[tpm]\nidentity = 'this.tpm.pem'\n",
        )
        .unwrap();
        let name = config.store_or_default(None).unwrap();
        let store = config.store(&name).unwrap();
        let beside = |name: &str| ConfigPath::from(config.path.with_file_name(name));
        assert_eq!(store.sealing.owner, Some(beside("owner.pem")));
        assert_eq!(config.tpm.identity, beside("this.tpm.pem"));
        let (pem, tpm) = (IdentitySpec::of("", beside("owner.key")), IdentitySpec::of("tpm", beside("host.tpm.pem")));
        assert_eq!(store.sealing.identities, [pem, tpm]);
    }

    #[test]
    fn the_inventory_is_beside_it_as_well() {
        let config = read("[separation]\nlevel = 'rack'\ninventory = 'inventory.toml'\n").unwrap();
        assert_eq!(config.separation.level, SeparationLevel::Rack);
        assert_eq!(config.separation.inventory, Some(config.path.with_file_name("inventory.toml").into()));
        assert_eq!(read("").unwrap().separation.level, SeparationLevel::Host);
    }

    #[test]
    fn a_lockbox_is_of_a_store_that_there_is() {
        let store = "[stores.cinder]\ntype = 'directory'\npath = 'k'\nowner = 'o.pem'\nno_escrow = true\n";
        let lockbox = "[lockbox]\nhost = 'compute-7'\nstore = 'cinder'\nidentities = ['host.key']\n";
        let config = read(&format!("{store}{lockbox}")).unwrap();
        let of = config.lockbox.as_ref().unwrap();
        assert_eq!((of.lifetime.as_secs(), of.offline), (86400, false));
        assert_eq!(of.identities, [IdentitySpec::of("", config.path.with_file_name("host.key"))]);
        assert_eq!(of.path, "/var/lib/cryptattach/lockbox".into());
        assert!(matches!(read(lockbox), Err(ConfigError::UnknownStore { .. })));
        for wrong in ["lifetime_hours = 0.0", "lifetime_hours = 9000.0", "lifetime_hours = nan", "host = '../x'"] {
            let text = format!("{store}{lockbox}{wrong}\n");
            assert!(matches!(read(&text), Err(ConfigError::Malformed { .. })), "{wrong}");
        }
    }

    #[test]
    fn hooks_serve_one_tenant_or_tell_them_apart() {
        let hooks = read("[hooks]\nkeystone = { cloud = 'c', clouds = 'clouds.yaml' }\n").unwrap();
        let clouds = hooks.hooks.keystone.as_ref().unwrap().clouds.clone();
        assert_eq!(clouds, Some(hooks.path.with_file_name("clouds.yaml").into()));
        let hooks = read("").unwrap().hooks;
        assert_eq!(
            (hooks.tenants, hooks.admin_roles, hooks.service_roles),
            (Tenants::Many, vec!["admin".to_owned()], vec!["service".to_owned()])
        );
        let both = read("[hooks]\ntenants = 'one'\nkeystone = { cloud = 'c' }\n");
        assert!(matches!(both, Err(ConfigError::OneTenantAndKeystone(_))));
        assert!(matches!(read("[hooks]\ntenants = 'two'\n"), Err(ConfigError::Malformed { .. })));
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
