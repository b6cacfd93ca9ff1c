//! `[stores.NAME]`: which kind of store it is, where it is, whom its keys are sealed to.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Network, TpmConfig};
use crate::{base::key::Place, keys::tpm::IdentityFile};

/// `[stores.NAME]`: where the sealed keys are, whom they are sealed to, and what opens them.
#[derive(Clone, Debug, Deserialize)]
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
    /// `[tpm]`
    #[serde(skip)]
    pub tpm: TpmConfig,
}

/// The part of `[stores.NAME]` that its `type` decides.
#[derive(Clone, Debug, Deserialize)]
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
#[derive(Clone, Debug, Deserialize)]
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
#[derive(Clone, Debug, Deserialize)]
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

/// Where this host keeps a private key.
pub(super) fn identity_place(path: &Path) -> Place {
    match IdentityFile::is_at(path) {
        // Without this host's TPM it opens nothing.
        true => Place::path("TPM key", path, false),
        false => Place::path("private key", path, true),
    }
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

impl StoreConfig {
    /// The files that it names.
    pub(super) fn files(&mut self) -> Vec<&mut PathBuf> {
        let Sealing { owner, escrow, identities, hosts, .. } = &mut self.sealing;
        let sealing = owner.iter_mut().chain(escrow).chain(identities).chain(hosts);
        match &mut self.location {
            Location::Directory { path } => sealing.chain([path]).collect(),
            Location::Swift(SwiftConfig { cloud, .. }) | Location::Barbican(BarbicanConfig { cloud, .. }) => {
                sealing.chain(&mut cloud.clouds).chain(&mut cloud.secret).collect()
            }
        }
    }

    /// The files and directories that opening a key needs, private keys first.
    pub fn paths(&self) -> Vec<&Path> {
        let identities = self.sealing.identities.iter();
        match &self.location {
            Location::Directory { path } => identities.chain([path]).map(PathBuf::as_path).collect(),
            Location::Swift(SwiftConfig { cloud, .. }) | Location::Barbican(BarbicanConfig { cloud, .. }) => {
                identities.chain(&cloud.clouds).chain(&cloud.secret).map(PathBuf::as_path).collect()
            }
        }
    }

    /// Whether the store is used as the caller of a hook, where there is one.
    pub fn takes_caller_token(&self) -> bool {
        match &self.location {
            Location::Directory { .. } => false,
            Location::Swift(SwiftConfig { caller_token, .. })
            | Location::Barbican(BarbicanConfig { caller_token, .. }) => *caller_token,
        }
    }

    /// Where this host keeps what opens the store's keys. An owner's key on the volume's own disk is as bad as the
    /// volume key there.
    pub fn places(&self, config: &Path) -> Vec<Place> {
        let identities = self.sealing.identities.iter().map(|path| identity_place(path));
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
