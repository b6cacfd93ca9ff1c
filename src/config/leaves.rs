//! `[leaves.NAME]`: what a policy's leaf is. Its kind reads it ([`crate::keys::seal::leaves`]).

use std::path::PathBuf;

use serde::{Deserialize, de::DeserializeOwned};

use super::{
    ConfigError, ConfigPath, ServerConfig,
    paths::Base,
    policy::LeafName,
    servers::{self, Servers},
};

/// `[leaves.NAME]`
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct LeafConfig {
    name: Option<LeafName>,
    members: toml::Table,
    base: Base,
    /// The server that it names, of `[servers.NAME]`.
    pub server: Option<ServerConfig>,
    /// The file in which this host remembers what it knows of it.
    pub memory: PathBuf,
    /// `state`, where this host remembers.
    pub state: ConfigPath,
}

impl TryFrom<toml::Table> for LeafConfig {
    type Error = toml::de::Error;

    fn try_from(members: toml::Table) -> Result<Self, Self::Error> {
        Ok(Self {
            name: None,
            members,
            base: Base::current(),
            server: None,
            memory: PathBuf::new(),
            state: ConfigPath::default(),
        })
    }
}

impl LeafConfig {
    pub(super) fn complete(
        &mut self,
        name: &LeafName,
        servers: &Servers,
        state: &ConfigPath,
    ) -> Result<(), ConfigError> {
        self.name = Some(name.clone());
        self.memory = state.join("leaves").join(format!("{name}.json"));
        self.state = state.clone();
        self.server = servers::named_in(&self.members, servers).map_err(|why| self.unusable(why))?;
        Ok(())
    }

    /// Whether it has this member: a kind of leaf is told by one.
    pub fn has(&self, member: &str) -> bool {
        self.members.contains_key(member)
    }

    /// Reads it as a kind of leaf has it; a path in it is a [`super::ConfigPath`].
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        self.base.read(|| self.members.clone().try_into()).map_err(|error| match error {
            ConfigError::Malformed { source, .. } => self.refusal(*source),
            other => other,
        })
    }

    /// It cannot be used, in words.
    pub fn unusable(&self, why: impl std::fmt::Display) -> ConfigError {
        self.refusal(serde::de::Error::custom(why))
    }

    fn refusal(&self, source: toml::de::Error) -> ConfigError {
        ConfigError::Leaf { name: self.name.clone(), path: self.base.file.clone(), source: Box::new(source) }
    }
}
