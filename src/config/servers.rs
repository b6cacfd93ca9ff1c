//! `[servers.NAME]`: an OpenBao or Vault service, for the stores and leaves that name it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{ConfigError, ConfigPath};

/// The most URLs of one service.
const MOST_URLS: usize = 16;

/// The servers by name.
pub(super) type Servers = BTreeMap<String, ServerConfig>;

/// `[servers.NAME]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct ServerConfig {
    /// NAME
    pub name: String,
    file: PathBuf,
    /// All of one service.
    pub urls: Vec<String>,
    /// The authorities that its certificate is trusted by, instead of the system's.
    pub ca: Option<ConfigPath>,
    pub namespace: Option<String>,
    pub login: Login,
}

/// How this host logs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    AppRole(AppRole),
    /// By a TLS certificate.
    Certificate {
        certificate: ConfigPath,
        key: ConfigPath,
    },
    /// With a token that somebody else keeps fresh.
    Token(ConfigPath),
}

/// `approle = { role_id, secret_id }`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppRole {
    pub role_id: ConfigPath,
    pub secret_id: ConfigPath,
    /// The file has a token that gives the SecretID out once.
    #[serde(default)]
    pub wrapped: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    bao: Vec<String>,
    ca: Option<ConfigPath>,
    namespace: Option<String>,
    approle: Option<AppRole>,
    certificate: Option<ConfigPath>,
    key: Option<ConfigPath>,
    token_file: Option<ConfigPath>,
}

impl TryFrom<Written> for ServerConfig {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written { bao: urls, ca, namespace, approle, certificate, key, token_file } = written;
        if !(1..=MOST_URLS).contains(&urls.len()) {
            return Err(format!("bao must have 1 to {MOST_URLS} URLs"));
        }
        let login = match (approle, certificate, key, token_file) {
            (Some(approle), None, None, None) => Login::AppRole(approle),
            (None, Some(certificate), Some(key), None) => Login::Certificate { certificate, key },
            (None, None, None, Some(token)) => Login::Token(token),
            _ => return Err("expected exactly one of `approle`, `certificate` with `key`, `token_file`".to_owned()),
        };
        Ok(Self { name: String::new(), file: PathBuf::new(), urls, ca, namespace, login })
    }
}

impl ServerConfig {
    pub(super) fn complete(&mut self, name: &str, file: PathBuf) {
        self.name = name.to_owned();
        self.file = file;
    }

    /// It cannot be used, in words.
    pub fn unusable(&self, why: String) -> ConfigError {
        ConfigError::Server { name: self.name.clone(), path: self.file.clone(), why }
    }

    /// The file that whoever has it may log in with.
    pub fn secret(&self) -> &Path {
        match &self.login {
            Login::AppRole(AppRole { secret_id: secret, .. })
            | Login::Certificate { key: secret, .. }
            | Login::Token(secret) => secret,
        }
    }

    /// The other files that it names.
    pub fn files(&self) -> Vec<&Path> {
        let beside = match &self.login {
            Login::AppRole(AppRole { role_id: beside, .. }) | Login::Certificate { certificate: beside, .. } => {
                Some(beside)
            }
            Login::Token(_) => None,
        };
        self.ca.iter().chain(beside).map(AsRef::as_ref).collect()
    }
}

/// The server that a table names, if it names one.
pub(super) fn named_in(members: &toml::Table, servers: &Servers) -> Result<Option<ServerConfig>, String> {
    let Some(name) = members.get("server").and_then(toml::Value::as_str) else { return Ok(None) };
    let found = servers.get(name).cloned();
    found.map(Some).ok_or_else(|| format!("names the server '{name}', but there is no [servers.{name}]"))
}
