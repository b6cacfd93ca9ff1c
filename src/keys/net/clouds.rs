//! clouds.yaml: where a cloud is and how to log in, in the form that all OpenStack clients read.
//!
//! Only the members that this program needs are read; others are let pass, for the file belongs to other programs, too.
//! Environment variables are not read but for `OS_CLOUD` and `OS_CLIENT_CONFIG_FILE`: a secret has no business there.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use zeroize::Zeroizing;

use super::keystone::Caller;

use crate::{
    base::{advice::Advice, exit::Exit, key::SecretBytes},
    config::CloudConfig,
};

/// A cloud, ready to log in.
pub struct Cloud {
    /// Keystone's, or for TempAuth the log-in's URL.
    pub auth_url: String,
    /// How to log in.
    pub credentials: Credentials,
    /// Region in the catalogue; any unless given.
    pub region: Option<String>,
    /// `public`, `internal` or `admin`.
    pub interface: String,
    /// Authorities that are trusted instead of the system's (PEM).
    pub authorities: Option<PathBuf>,
}

/// How to log in.
pub enum Credentials {
    /// Keystone v3 password (`auth_type: password`).
    Password {
        user: Named,
        password: SecretBytes,
        /// On which project.
        project: Named,
    },
    /// Keystone v3 application credential: it is bound to its project.
    ApplicationCredential {
        /// Its id, or its name and its user.
        id: Result<String, (String, Named)>,
        secret: SecretBytes,
    },
    /// A token that someone else got.
    Token(SecretBytes),
    /// What a hook's caller brings.
    Caller(Arc<Caller>),
    /// Swift's own log-in without Keystone (`auth_type: v1password`).
    TempAuth {
        /// `account:user`
        user: String,
        key: SecretBytes,
    },
}

/// A user or project: by id, or by name within a domain.
pub enum Named {
    /// By id.
    Id(String),
    /// By name.
    Name {
        name: String,
        /// `{"id": ...}` or `{"name": ...}` of its domain.
        domain: (&'static str, String),
    },
}

/// clouds.yaml cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CloudsError {
    /// None was found.
    #[error("found no clouds.yaml (looked for: {0})")]
    Missing(String),
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is no YAML of that form.
    #[error("{} is not a valid clouds.yaml: {why}", .path.display())]
    Malformed {
        path: PathBuf,
        /// Where; what stands there is not repeated, it may be a password.
        why: String,
    },
    /// Tokens are to be verified there.
    #[error("the cloud of [hooks] keystone logs in without Keystone (v1password)")]
    NotKeystone,
    /// No cloud is named.
    #[error("neither 'cloud' in the configuration nor OS_CLOUD names a cloud")]
    Unnamed,
    /// It has no such cloud.
    #[error("{} has no cloud '{name}' (it has: {known})", .path.display())]
    Unknown { path: PathBuf, name: String, known: String },
    /// The cloud's entry lacks something, or wants what is not done.
    #[error("cloud '{name}' in {} {what}", .path.display())]
    Unusable {
        path: PathBuf,
        name: String,
        /// "has no auth_url", ...
        what: String,
    },
}

impl Advice for CloudsError {
    fn exit(&self) -> Exit {
        Exit::Config
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some("check 'cloud', 'clouds' and 'secret' of the store in the configuration, and clouds.yaml".into())
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    clouds: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    auth_type: Option<String>,
    #[serde(default)]
    auth: Auth,
    region_name: Option<String>,
    interface: Option<String>,
    cacert: Option<PathBuf>,
    verify: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth_url: Option<String>,
    username: Option<String>,
    user_id: Option<String>,
    user_domain_name: Option<String>,
    user_domain_id: Option<String>,
    project_name: Option<String>,
    project_id: Option<String>,
    project_domain_name: Option<String>,
    project_domain_id: Option<String>,
    domain_name: Option<String>,
    domain_id: Option<String>,
    application_credential_id: Option<String>,
    application_credential_name: Option<String>,
    application_credential_secret: Option<Zeroizing<String>>,
    password: Option<Zeroizing<String>>,
    token: Option<Zeroizing<String>>,
}

impl Cloud {
    /// The cloud that a store's configuration names; `caller` is used instead of any credentials.
    pub fn find(config: &CloudConfig, caller: Option<Arc<Caller>>) -> Result<Self, CloudsError> {
        let path = find_file(config)?;
        let name = config.cloud.clone().or_else(|| env::var("OS_CLOUD").ok()).ok_or(CloudsError::Unnamed)?;
        let text = Zeroizing::new(read(&path)?);
        let secret = config.secret.as_deref().map(read_secret).transpose()?;
        Self::parse(&text, &path, name, secret, caller)
    }

    /// The cloud `name` in the text of the clouds.yaml at `path`; `secret` is used in place of the one there.
    pub fn parse(
        text: &str,
        path: &Path,
        name: String,
        secret: Option<SecretBytes>,
        caller: Option<Arc<Caller>>,
    ) -> Result<Self, CloudsError> {
        let path = path.to_owned();
        let file: File = serde_saphyr::from_str(text)
            .map_err(|error| CloudsError::Malformed { path: path.clone(), why: place(&error) })?;
        let known = file.clouds.keys().cloned().collect::<Vec<_>>().join(", ");
        let mut clouds = file.clouds;
        let entry = clouds.remove(&name);
        let entry = entry.ok_or_else(|| CloudsError::Unknown { path: path.clone(), name: name.clone(), known })?;
        entry.into_cloud(secret, caller, path.parent()).map_err(|what| CloudsError::Unusable { path, name, what })
    }
}

impl Entry {
    fn into_cloud(
        mut self,
        secret: Option<SecretBytes>,
        caller: Option<Arc<Caller>>,
        folder: Option<&Path>,
    ) -> Result<Cloud, String> {
        if self.verify == Some(false) {
            return Err("says 'verify: false'; name its authority with 'cacert' instead".to_owned());
        }
        let auth_url = self.auth.auth_url.take().ok_or("has no auth_url")?;
        let credentials = match caller {
            Some(caller) => Credentials::Caller(caller),
            None => self.auth.credentials(self.auth_type.as_deref(), secret)?,
        };
        let interface = self.interface.unwrap_or_else(|| "public".to_owned());
        let interface = interface.trim_end_matches("URL").to_owned();
        let authorities = self.cacert.map(|path| folder.unwrap_or(Path::new("")).join(path));
        Ok(Cloud { auth_url, credentials, region: self.region_name, interface, authorities })
    }
}

impl Auth {
    fn credentials(&mut self, kind: Option<&str>, secret: Option<SecretBytes>) -> Result<Credentials, String> {
        let secret = |own: Option<Zeroizing<String>>, what: &str| match (secret, own) {
            (Some(secret), _) => Ok(secret),
            (None, Some(own)) => SecretBytes::copy_of(own.as_bytes()).map_err(|error| error.to_string()),
            (None, None) => Err(format!("has no {what}, and the store's configuration names no 'secret' file")),
        };
        Ok(match kind.unwrap_or("password") {
            "password" | "v3password" => Credentials::Password {
                user: self.user()?,
                project: named(
                    self.project_id.take(),
                    self.project_name.take(),
                    self.project_domain_id.take().or(self.domain_id.take()),
                    self.project_domain_name.take().or(self.domain_name.take()),
                )
                .ok_or("has neither project_id nor project_name")?,
                password: secret(self.password.take(), "password")?,
            },
            "v3applicationcredential" => Credentials::ApplicationCredential {
                id: match (self.application_credential_id.take(), self.application_credential_name.take()) {
                    (Some(id), _) => Ok(id),
                    (None, Some(name)) => Err((name, self.user()?)),
                    (None, None) => return Err("has neither application_credential_id nor its name".to_owned()),
                },
                secret: secret(self.application_credential_secret.take(), "application_credential_secret")?,
            },
            "token" | "v3token" => Credentials::Token(secret(self.token.take(), "token")?),
            "v1password" => Credentials::TempAuth {
                user: self.username.take().ok_or("has no username")?,
                key: secret(self.password.take(), "password")?,
            },
            other => return Err(format!("has the unsupported auth_type '{other}'")),
        })
    }

    fn user(&mut self) -> Result<Named, String> {
        named(
            self.user_id.take(),
            self.username.take(),
            self.user_domain_id.take().or(self.domain_id.clone()),
            self.user_domain_name.take().or(self.domain_name.clone()),
        )
        .ok_or_else(|| "has neither user_id nor username".to_owned())
    }
}

fn named(
    id: Option<String>,
    name: Option<String>,
    domain_id: Option<String>,
    domain_name: Option<String>,
) -> Option<Named> {
    let domain = match (domain_id, domain_name) {
        (Some(id), _) => ("id", id),
        (None, Some(name)) => ("name", name),
        // Where keystoneauth wants a domain to be named, all sites with one domain call it this.
        (None, None) => ("id", "default".to_owned()),
    };
    id.map(Named::Id).or_else(|| name.map(|name| Named::Name { name, domain }))
}

/// The given file, or the first that exists where openstacksdk looks, but not in the working directory: whoever makes
/// root run this in a directory of theirs must not choose the cloud.
pub fn find_file(config: &CloudConfig) -> Result<PathBuf, CloudsError> {
    if let Some(path) = &config.clouds {
        return Ok(path.to_path_buf());
    }
    if let Some(path) = env::var_os("OS_CLIENT_CONFIG_FILE") {
        return Ok(path.into());
    }
    let home = env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    let candidates: Vec<_> =
        home.into_iter().chain(["/etc".into()]).map(|folder| folder.join("openstack/clouds.yaml")).collect();
    let looked = || candidates.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    candidates.iter().find(|path| path.exists()).cloned().ok_or_else(|| CloudsError::Missing(looked()))
}

fn read(path: &Path) -> Result<String, CloudsError> {
    fs::read_to_string(path).map_err(|source| CloudsError::Read { path: path.to_owned(), source })
}

/// The file without the newline that editors put at its end.
fn read_secret(path: &Path) -> Result<SecretBytes, CloudsError> {
    let text = Zeroizing::new(read(path)?);
    let failed = |source| CloudsError::Read { path: path.to_owned(), source };
    SecretBytes::copy_of(text.trim_end_matches(['\r', '\n']).as_bytes())
        .map_err(|error| failed(io::Error::other(error)))
}

fn place(error: &serde_saphyr::Error) -> String {
    error.location().map_or_else(
        || "it cannot be read as YAML".to_owned(),
        |at| format!("see line {}, column {}", at.line(), at.column()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, name: &str) -> Result<Cloud, CloudsError> {
        let folder = tempfile::tempdir().unwrap();
        let clouds = folder.path().join("clouds.yaml");
        fs::write(&clouds, text).unwrap();
        Cloud::find(&CloudConfig { cloud: Some(name.to_owned()), clouds: Some(clouds.into()), secret: None }, None)
    }

    const CLOUDS: &str = "
clouds:
  keys:
    auth:
      auth_url: https://keystone.example/v3
      username: cinder
      password: 'pass: word'
      project_name: keys
      user_domain_name: Default
      project_domain_id: default
    region_name: RegionOne
    interface: internalURL
    cacert: ca.pem
    compute_api_version: 2.1
  robot:
    auth_type: v3applicationcredential
    auth: {auth_url: https://keystone.example/v3, application_credential_id: abc, application_credential_secret: s}
  alone:
    auth_type: v1password
    auth: {auth_url: http://127.0.0.1:15081/auth/v1.0, username: 'keys:cinder', password: k}
  careless:
    verify: false
    auth: {auth_url: https://keystone.example/v3}
  odd:
    auth_type: v3oidcpassword
    auth: {auth_url: https://keystone.example/v3}
";

    #[test]
    fn reads_what_openstack_clients_read() {
        let cloud = find(CLOUDS, "keys").unwrap();
        assert_eq!(cloud.auth_url, "https://keystone.example/v3");
        assert_eq!((cloud.region.as_deref(), cloud.interface.as_str()), (Some("RegionOne"), "internal"));
        assert!(cloud.authorities.unwrap().ends_with("ca.pem"));
        let Credentials::Password { user: Named::Name { name, domain }, password, .. } = cloud.credentials else {
            panic!()
        };
        assert_eq!((name.as_str(), domain), ("cinder", ("name", "Default".to_owned())));
        assert_eq!(password.expose(), b"pass: word");
        let Credentials::ApplicationCredential { id: Ok(id), .. } = find(CLOUDS, "robot").unwrap().credentials else {
            panic!()
        };
        assert_eq!(id, "abc");
        assert!(matches!(find(CLOUDS, "alone").unwrap().credentials, Credentials::TempAuth { .. }));
    }

    #[test]
    fn says_what_is_wrong_and_no_secret() {
        let error = |text, name| find(text, name).err().unwrap().to_string();
        assert!(error(CLOUDS, "nova").contains("has no cloud 'nova' (it has: alone, careless, keys, odd, robot)"));
        assert!(error(CLOUDS, "careless").contains("'verify: false'"));
        assert!(error(CLOUDS, "odd").contains("v3oidcpassword"));
        let broken = error("clouds:\n  keys:\n    auth: {password: hunter2\n", "keys");
        assert!(broken.contains("line") && !broken.contains("hunter2"), "{broken}");
        let wrong = error("clouds:\n  keys:\n    auth: hunter2\n", "keys");
        assert!(!wrong.contains("hunter2"), "{wrong}");
    }
}
