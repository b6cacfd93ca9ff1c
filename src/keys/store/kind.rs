//! Kinds of stores: what the rest of the program has to know of one, beside how to read and write its keys.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use reqwest::Url;
use serde::Serialize;

use super::{KINDS, KeyStore, StoreError, cloud::Service};
use crate::{
    base::key::{Place, StoreName},
    config::{Config, ConfigError, LeafName, Section, StoreConfig},
    keys::{
        net::{Caller, bao, http},
        seal::leaves,
    },
};

/// A kind of store, as one part of the configuration describes it.
pub trait Kind {
    /// The store; nothing is asked yet. `caller` is what a hook's caller brings.
    fn open(
        &self,
        name: &StoreName,
        config: &StoreConfig,
        caller: Option<Arc<Caller>>,
    ) -> Result<Box<dyn KeyStore>, StoreError>;
    /// The kind in words for the user: "Swift", "the directory /srv/keys".
    fn describe(&self) -> String;
    /// The service of a cloud that it is, from which the next five follow.
    fn service(&self) -> Option<Service<'_>> {
        None
    }
    /// The servers that it asks first: where it logs in, or else where it is. None: it needs no network.
    fn servers(&self) -> Result<Vec<Server>, StoreError> {
        self.service().map_or_else(|| Ok(Vec::new()), |service| service.servers())
    }
    /// Whether it is reached over a network.
    fn needs_network(&self) -> bool {
        self.service().is_some()
    }
    /// Whether it is in this machine's TPM.
    fn needs_tpm(&self) -> bool {
        false
    }
    /// The files that logging in and trusting its servers take, for an initramfs.
    fn files(&self) -> Result<Vec<PathBuf>, StoreError> {
        self.service().map_or_else(|| Ok(Vec::new()), |service| service.files())
    }
    /// The files and directories that its configuration names and that opening a key needs.
    fn paths(&self) -> Vec<&Path> {
        self.service().map(|service| service.paths()).unwrap_or_default()
    }
    /// Where this host keeps what gives access to it.
    fn places(&self) -> Vec<Place> {
        self.service().map(|service| service.places()).unwrap_or_default()
    }
    /// The directory of this host that has the keys.
    fn directory(&self) -> Option<&Path> {
        None
    }
    /// Whether it is used as the caller of a hook, where there is one.
    fn takes_caller_token(&self) -> bool {
        false
    }
    /// Whether it keeps keys unsealed, if no owner is configured.
    fn may_keep_unsealed_keys(&self) -> bool {
        false
    }
    /// Why nobody can be let in by access lists; `None` if [`Kind::make`] takes them.
    fn no_access_lists(&self) -> Option<&'static str> {
        None
    }
    /// Makes the place for container keys, or changes who may use it; `None` if it can have no container keys.
    fn make(&self, _: &StoreName, _: &StoreConfig, _: &Access<'_>) -> Option<Result<(), StoreError>> {
        None
    }
    /// Removes what a store has beside keys, if it has no keys; whether it did. `None` if that is not done by a program.
    fn unmake(&self, _: &StoreName, _: &StoreConfig) -> Option<Result<bool, StoreError>> {
        None
    }
    /// Shuts it for the rest of this boot, at the boot's end; `None` if that is not wanted.
    fn shut(&self, _: &StoreName, _: &StoreConfig) -> Option<Result<(), StoreError>> {
        None
    }
    /// What it says of itself; `None` if it can have no container keys.
    fn facts(&self, _: &StoreName, _: &StoreConfig) -> Option<Result<Facts, StoreError>> {
        None
    }
}

/// Who may use a container besides its account's operators; Swift's ACL elements: `PROJECT:USER`.
pub struct Access<'a> {
    /// They may fetch (and list) keys.
    pub readers: &'a [String],
    /// They may create and delete keys.
    pub writers: &'a [String],
}

/// What a store says of itself.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Facts of its kind, for programs.
    #[serde(flatten)]
    pub own: serde_json::Map<String, serde_json::Value>,
    /// The same, for people: each with its name.
    #[serde(skip)]
    pub lines: Vec<(&'static str, String)>,
    /// Number of the current container key.
    pub epoch: Option<serde_json::Value>,
    pub fingerprint: Option<String>,
    /// Keys are being sealed anew.
    pub rotating: bool,
}

/// A server that a store asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Its name or address, without port and brackets.
    pub host: String,
    pub port: u16,
}

impl Server {
    /// The server of a URL.
    pub fn of(url: &Url) -> Self {
        Self { host: http::host(url).to_owned(), port: url.port_or_known_default().unwrap_or(443) }
    }

    /// Its address, if that is known without asking anybody.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

/// What is known of a kind of store before a configuration is read.
pub struct StoreType {
    /// `type` in the configuration.
    pub name: &'static str,
    /// Whether it keeps hosts' lockbox keys.
    pub keeps_host_keys: bool,
    /// Reads its part of the configuration.
    pub read: fn(&Section) -> Result<Box<dyn Kind>, ConfigError>,
}

/// The kind of store that a part of the configuration describes.
pub fn kind(config: &StoreConfig) -> Result<Box<dyn Kind>, ConfigError> {
    let section = &config.section;
    match KINDS.iter().find(|kind| kind.name == section.kind) {
        Some(kind) => (kind.read)(section),
        None => Err(section.unknown_kind(&KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>())),
    }
}

/// The kinds of stores that keep hosts' lockbox keys, in words.
pub fn with_host_keys() -> String {
    let kinds = KINDS.iter().filter(|kind| kind.keeps_host_keys);
    let mut names: Vec<_> = kinds.map(|kind| format!("'{}'", kind.name)).collect();
    let last = names.pop().unwrap_or_default();
    if names.is_empty() { last } else { format!("{} or {last}", names.join(", ")) }
}

/// Refuses a configuration that a kind of store does not understand, or that does not say whom keys are sealed to.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    for server in config.servers.values() {
        bao::urls(server)?;
    }
    for (name, store) in &config.stores {
        let (kind, sealing) = (kind(store)?, &store.sealing);
        // Where sealed or not is a choice: sealed, the choice of escrow has to be made.
        let sealed = sealing.seals() || !kind.may_keep_unsealed_keys();
        if sealed && sealing.owner.is_none() && sealing.policy.names(LeafName::OWNER) {
            return Err(ConfigError::Owner { name: name.clone(), path: config.path.clone() });
        }
        if sealed && sealing.escrow.is_some() == sealing.no_escrow {
            return Err(ConfigError::Escrow { name: name.clone(), path: config.path.clone() });
        }
        if sealing.has_policy() {
            let names_escrow = sealing.policy.names(LeafName::ESCROW);
            let misfit = |why: &str| ConfigError::PolicyMisfit {
                name: name.clone(),
                path: config.path.clone(),
                why: why.to_owned(),
            };
            if names_escrow && sealing.no_escrow {
                return Err(misfit("names escrow, but the store has no_escrow = true"));
            }
            if !names_escrow && !sealing.no_escrow {
                return Err(misfit("does not name escrow, so the escrow key would open nothing"));
            }
        }
        for (name, leaf) in &sealing.leaves {
            leaves::kind(name, leaf, store.network)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::base::chain::chain;

    fn checked(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        fs::write(&path, text).unwrap();
        let config = Config::read(&path)?;
        check(&config)?;
        Ok(config)
    }

    #[test]
    fn a_kind_resolves_its_paths_beside_the_configuration() {
        let sealing = "owner = 'o.pem'\nno_escrow = true\n";
        let config = checked(&format!(
            "[stores.a]\ntype = 'directory'\npath = 'keys'\n{sealing}\
             [stores.b]\ntype = 'swift'\nclouds = 'clouds.yaml'\nsecret = '/run/secret'\n{sealing}"
        ))
        .unwrap();
        let beside = |name: &str| config.path.with_file_name(name);
        let of = |name: &str| kind(config.store(&name.parse().unwrap()).unwrap()).unwrap();
        assert_eq!(of("a").directory(), Some(&*beside("keys")));
        assert_eq!(of("a").paths(), [beside("keys")]);
        assert_eq!(of("b").paths(), [beside("clouds.yaml"), "/run/secret".into()]);
        assert!(of("b").needs_network() && !of("a").needs_network());
    }

    #[test]
    fn insists_on_escrow_or_its_refusal() {
        let store = "[stores.cinder]\ntype = 'directory'\npath = 'k'\nowner = 'o.pem'\n";
        assert!(matches!(checked(store), Err(ConfigError::Escrow { .. })));
        assert!(checked(&format!("{store}no_escrow = true\n")).is_ok());
        assert!(matches!(
            checked(&format!("{store}no_escrow = true\nescrow = 'e'\n")),
            Err(ConfigError::Escrow { .. })
        ));
        assert!(matches!(checked(&store.replace("owner = 'o.pem'", "")), Err(ConfigError::Owner { .. })));
        assert!(checked("[stores.b]\ntype = 'barbican'\n").is_ok());
    }

    #[test]
    fn names_the_store_and_the_member_that_it_does_not_know() {
        let cases = [
            ("type = 'directory'\npath = 'k'\ncloud = 'c'\n", "unknown field `cloud`"),
            ("type = 'directory'\n", "missing field `path`"),
            ("type = 'swift'\nclod = 'c'\n", "unknown field `clod`"),
            ("type = 'barbican'\npath = 'c'\n", "unknown field `path`"),
            ("type = 'cloud'\n", "expected one of `directory`, `swift`, `barbican`, `tpm-nv`, `bao`"),
        ];
        for (text, told) in cases {
            let error = checked(&format!("[stores.cinder]\n{text}")).map(drop).unwrap_err();
            let error = chain(&error);
            assert!(error.contains("store 'cinder'") && error.contains(told), "{text}: {error}");
        }
    }
}
