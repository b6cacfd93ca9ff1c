//! `[stores.NAME]`: which kind of store it is, and whom its keys are sealed to.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, de::DeserializeOwned};

use super::{
    ConfigError, ConfigPath, IdentitySpec, LeafConfig, LeafName, Network, Policy, ServerConfig, TpmConfig,
    paths::Base,
    servers::{self, Servers},
};
use crate::base::key::StoreName;

/// `[stores.NAME]`: where the sealed keys are, whom they are sealed to, and what opens them.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct StoreConfig {
    /// `type`, and the part that this kind of store reads.
    pub section: Section,
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
    pub owner: Option<ConfigPath>,
    /// Public key or certificate (PEM) for recovery, whose private key is kept offline.
    pub escrow: Option<ConfigPath>,
    /// Go without escrow: a lost owner key is then lost data.
    #[serde(default)]
    pub no_escrow: bool,
    /// Private keys that open keys on this host.
    #[serde(default)]
    pub identities: Vec<IdentitySpec>,
    /// Public keys or certificates (PEM) of hosts that new container keys are sealed to, besides owner and escrow.
    #[serde(default)]
    pub hosts: Vec<ConfigPath>,
    /// What may open the container, if it is not the default.
    opens: Option<String>,
    /// `opens`, parsed.
    #[serde(skip)]
    pub policy: Policy,
    /// The leaves that it names, but for those that are built in.
    #[serde(skip)]
    pub leaves: BTreeMap<LeafName, LeafConfig>,
    /// The other leaves of the configuration: a former policy may have named them, and keys of that time may still be there.
    #[serde(skip)]
    pub other_leaves: BTreeMap<LeafName, LeafConfig>,
    /// `[tpm]`
    #[serde(skip)]
    pub tpm: TpmConfig,
}

impl Sealing {
    /// Whether keys are sealed at all: somebody is named who opens them.
    pub fn seals(&self) -> bool {
        self.owner.is_some() || self.has_policy()
    }

    /// Whether the section says what may open the container.
    pub fn has_policy(&self) -> bool {
        self.opens.is_some()
    }

    pub(super) fn complete(
        &mut self,
        name: &StoreName,
        path: &Path,
        leaves: &BTreeMap<LeafName, LeafConfig>,
    ) -> Result<(), ConfigError> {
        if let Some(opens) = &self.opens {
            let refused = |source| ConfigError::Policy { name: name.clone(), path: path.to_owned(), source };
            self.policy = opens.parse().map_err(refused)?;
        }
        let of_tables = self.policy.leaves().into_iter().filter(|leaf| !leaf.is_built_in());
        let found = of_tables.map(|leaf| match leaves.get(leaf) {
            Some(config) => Ok((leaf.clone(), config.clone())),
            None => {
                let why = format!("names the leaf '{leaf}', but there is no [leaves.{leaf}]");
                Err(ConfigError::PolicyMisfit { name: name.clone(), path: path.to_owned(), why })
            }
        });
        self.leaves = found.collect::<Result<_, _>>()?;
        let is_other = |(name, _): &(&LeafName, &LeafConfig)| !self.leaves.contains_key(*name);
        self.other_leaves =
            leaves.iter().filter(is_other).map(|(name, config)| (name.clone(), config.clone())).collect();
        Ok(())
    }
}

/// The part of `[stores.NAME]` that its `type` decides. The kind of store reads it ([`crate::keys::store`]).
#[derive(Clone, Debug)]
pub struct Section {
    /// `type`
    pub kind: String,
    name: Option<StoreName>,
    members: toml::Table,
    base: Base,
    /// The server that it names, of `[servers.NAME]`.
    pub server: Option<ServerConfig>,
}

impl Section {
    /// Reads it as a kind of store has it; a path in it is a [`ConfigPath`].
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        self.explain(self.base.read(|| self.members.clone().try_into()))
    }

    /// Parts it: the members of these names, and the others.
    pub fn part(&self, names: &[&str]) -> (Self, Self) {
        let mut others = self.clone();
        let members = names.iter().filter_map(|name| others.members.remove_entry(*name)).collect();
        (Self { members, ..self.clone() }, others)
    }

    /// There is no such kind of store.
    pub fn unknown_kind(&self, known: &[&str]) -> ConfigError {
        let known = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        self.unusable(format!("unknown variant `{}`, expected one of {known}", self.kind))
    }

    /// It cannot be used, in words.
    pub fn unusable(&self, why: String) -> ConfigError {
        let source = Box::new(serde::de::Error::custom(why));
        ConfigError::Store { name: self.name.clone(), path: self.base.file.clone(), source }
    }

    /// It has to be said which store is at fault.
    fn explain<T>(&self, read: Result<T, ConfigError>) -> Result<T, ConfigError> {
        read.map_err(|error| match error {
            ConfigError::Malformed { path, source } => ConfigError::Store { name: self.name.clone(), path, source },
            other => other,
        })
    }
}

impl TryFrom<toml::Table> for StoreConfig {
    type Error = toml::de::Error;

    /// Parts with `deny_unknown_fields` each cannot be flattened into one struct, so the table is parted by hand.
    fn try_from(mut table: toml::Table) -> Result<Self, Self::Error> {
        let missing = || serde::de::Error::custom("missing field `type`");
        let kind = table.remove("type").ok_or_else(missing)?.try_into()?;
        let section = Section { kind, name: None, members: table, base: Base::current(), server: None };
        let (sealing, section) = section.part(&["owner", "escrow", "no_escrow", "identities", "hosts", "opens"]);
        Ok(Self { sealing: sealing.members.try_into()?, section, network: Network::default() })
    }
}

impl StoreConfig {
    /// What the rest of the configuration says.
    pub(super) fn complete(
        &mut self,
        name: &StoreName,
        network: Network,
        tpm: &TpmConfig,
        servers: &Servers,
    ) -> Result<(), ConfigError> {
        let section = &mut self.section;
        section.name = Some(name.clone());
        section.server = servers::named_in(&section.members, servers).map_err(|why| section.unusable(why))?;
        self.network = network;
        self.sealing.tpm = tpm.clone();
        Ok(())
    }
}
