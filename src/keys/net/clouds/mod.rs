//! clouds.yaml: where a cloud is and how to log in, in the form that all OpenStack clients read, and with the meaning that
//! openstacksdk gives it (`openstack.config`).
//!
//! Only the cloud that is used is looked at, and of it the members that this program needs: the file belongs to other programs,
//! too. What would change where a key goes and is not supported is refused by name. Environment variables are not read but for
//! `OS_CLOUD`, `OS_CLIENT_CONFIG_FILE` and `OS_CLIENT_SECURE_FILE`: a secret has no business there.

mod node;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use openssl::{pkey::PKey, x509::X509};
use zeroize::Zeroizing;

use super::{http::ClientIdentity, keystone::Caller};
use crate::{
    base::{advice::Advice, exit::Exit, key::SecretBytes},
    config::CloudConfig,
};
use node::Node;

/// A cloud, ready to log in.
pub struct Cloud {
    /// Keystone's, or for TempAuth the log-in's URL.
    pub auth_url: String,
    /// How to log in.
    pub credentials: Credentials,
    /// Authorities that are trusted instead of the system's (a PEM or DER file).
    pub authorities: Option<PathBuf>,
    /// What this client shows of itself in TLS.
    pub client: Option<ClientCertificate>,
    /// What says which end point of a service is meant, for all services or for one.
    endpoints: BTreeMap<String, Vec<String>>,
    /// The region that stands in `regions` or `region_name`.
    region: Option<String>,
}

/// A certificate with its private key (PEM files; one may have both).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Which end point of a service is meant.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The end point itself: the catalogue is not asked.
    pub url: Option<String>,
    /// Region in the catalogue; any unless given.
    pub region: Option<String>,
    /// `public`, `internal` or `admin`; the first that there is.
    pub interfaces: Vec<String>,
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
    /// A file with certificates or keys has none.
    #[error("{} has no {what}", .path.display())]
    Certificate {
        path: PathBuf,
        /// "certificate (PEM or DER)", ...
        what: &'static str,
    },
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

/// The texts that together say what a cloud is.
#[derive(Clone, Copy, Default)]
pub struct Texts<'a> {
    /// clouds.yaml
    pub clouds: &'a str,
    /// secure.yaml: the same form, with the secrets.
    pub secure: Option<&'a str>,
    /// clouds-public.yaml: profiles that clouds refer to.
    pub public: Option<&'a str>,
}

impl Cloud {
    /// The cloud that a configuration names; `caller` is used instead of any credentials.
    pub fn find(config: &CloudConfig, caller: Option<Arc<Caller>>) -> Result<Self, CloudsError> {
        let path = find_file(config)?;
        let name = config.cloud.clone().or_else(|| env::var("OS_CLOUD").ok()).ok_or(CloudsError::Unnamed)?;
        let read = |path: PathBuf| read(&path).map(Zeroizing::new);
        let (secure, public) = (secure_file(&path).map(read).transpose()?, beside(&path, "clouds-public").map(read));
        let (clouds, public) = (read(path.clone())?, public.transpose()?);
        let secret = config.secret.as_deref().map(read_secret).transpose()?;
        let texts = Texts {
            clouds: &clouds,
            secure: secure.as_ref().map(|text| text.as_str()),
            public: public.as_ref().map(|text| text.as_str()),
        };
        Self::parse(texts, &path, name, secret, caller)
    }

    /// The cloud `name` in the text of the clouds.yaml at `path` and of those beside it; `secret` is used in place of the one
    /// there.
    pub fn parse(
        texts: Texts<'_>,
        path: &Path,
        name: String,
        secret: Option<SecretBytes>,
        caller: Option<Arc<Caller>>,
    ) -> Result<Self, CloudsError> {
        let file = |text: &str| -> Result<Node, CloudsError> {
            text.parse().map_err(|place| CloudsError::Malformed { path: path.to_owned(), why: format!("{place}") })
        };
        let member = |text: Option<&str>, name: &str| -> Result<Node, CloudsError> {
            Ok(file(text.unwrap_or_default())?.get(name).cloned().unwrap_or_default())
        };
        let clouds = member(Some(texts.clouds), "clouds")?;
        let secure = member(texts.secure, "clouds")?;
        let public = member(texts.public, "public-clouds")?;
        let known = || clouds.map().into_iter().flatten().map(|(name, _)| name.clone()).collect::<Vec<_>>().join(", ");
        let unknown = || CloudsError::Unknown { path: path.to_owned(), name: name.clone(), known: known() };
        let mut entry = clouds.map().and_then(|clouds| clouds.get(&name)).ok_or_else(unknown)?.clone();
        if let Some(secure) = secure.get(&name) {
            entry.merge(secure);
        }
        let cloud = Entry::of(entry, &public).and_then(|entry| entry.into_cloud(secret, caller, path.parent()));
        cloud.map_err(|what| CloudsError::Unusable { path: path.to_owned(), name, what })
    }

    /// Which end point of a service is meant: what is said of this service comes before what is said of all.
    pub fn wanted(&self, service: &str) -> Wanted {
        let prefix = service.replace('-', "_");
        let own = |what: &str| self.endpoints.get(&format!("{prefix}_{what}"));
        let of_all = |what: &str| own(what).or_else(|| self.endpoints.get(what)).cloned();
        let first = |values: Vec<String>| values.into_iter().next();
        Wanted {
            url: own("endpoint_override").or_else(|| own("endpoint")).cloned().and_then(first),
            region: own("region_name").cloned().and_then(first).or_else(|| self.region.clone()),
            interfaces: of_all("interface").unwrap_or_else(|| vec!["public".to_owned()]),
        }
    }

    /// The certificates of the authorities that are trusted instead of the system's.
    pub fn read_authorities(&self) -> Result<Option<Vec<X509>>, CloudsError> {
        self.authorities.as_deref().map(authorities).transpose()
    }

    /// What this client shows of itself in TLS.
    pub fn read_client(&self) -> Result<Option<ClientIdentity>, CloudsError> {
        self.client.as_ref().map(|client| client_identity(&client.certificate, &client.key)).transpose()
    }
}

/// The certificates in a file.
pub fn authorities(path: &Path) -> Result<Vec<X509>, CloudsError> {
    let bytes = fs::read(path).map_err(|source| CloudsError::Read { path: path.to_owned(), source })?;
    let found = X509::stack_from_pem(&bytes).ok().filter(|found| !found.is_empty());
    let found = found.or_else(|| X509::from_der(&bytes).ok().map(|only| vec![only]));
    found.ok_or_else(|| CloudsError::Certificate { path: path.to_owned(), what: "certificate (PEM or DER)" })
}

/// What a client shows of itself, out of the files of its certificate and key.
pub fn client_identity(certificate: &Path, key: &Path) -> Result<ClientIdentity, CloudsError> {
    let read = |path: &Path| {
        fs::read(path).map(Zeroizing::new).map_err(|source| CloudsError::Read { path: path.to_owned(), source })
    };
    let missing = |path: &Path, what| CloudsError::Certificate { path: path.to_owned(), what };
    let chain = X509::stack_from_pem(&read(certificate)?).ok().filter(|chain| !chain.is_empty());
    let chain = chain.ok_or_else(|| missing(certificate, "certificate (PEM)"))?;
    let chain: Result<Vec<_>, _> = chain.iter().map(|certificate| certificate.to_pem()).collect();
    let chain = chain.map_err(|_| missing(certificate, "certificate (PEM)"))?.concat();
    // Without the callback OpenSSL asks the terminal for the passphrase of an encrypted key.
    let private = PKey::private_key_from_pem_callback(&read(key)?, |_| Ok(0));
    let private = private.and_then(|key| key.private_key_to_pem_pkcs8());
    let private = private.map_err(|_| missing(key, "private key without passphrase (PEM)"))?;
    Ok(ClientIdentity { chain, key: Zeroizing::new(private) })
}

/// What a cloud's entry says, with its profile and the region that is meant.
struct Entry(Node);

impl Entry {
    fn of(own: Node, public: &Node) -> Result<Self, String> {
        if own.map().is_none() {
            return Err("is not a mapping".to_owned());
        }
        let own = own.normalized();
        let mut entry = Node::Map(BTreeMap::new());
        let profile = own.get("profile").or_else(|| own.get("cloud"));
        if let Some(profile) = profile {
            let name = profile.text().unwrap_or_default();
            let found = public.get(name).ok_or_else(|| {
                format!("refers to the profile '{name}', which is not in a clouds-public.yaml beside it (the profiles that are built into openstacksdk are not supported)")
            })?;
            entry.merge(&found.clone().normalized());
        }
        // Of regions, the entry's own come before the profile's, whichever way each says them.
        let regions = regions(&own)?.or(regions(&entry)?);
        entry.merge(&own);
        if let Some((name, values)) = regions {
            entry.merge(&values.normalized());
            entry.merge(&Node::Map([("region_name".to_owned(), name)].into()));
        }
        if let Node::Map(members) = &mut entry {
            members.remove("regions");
            let renamed: Vec<_> = members.keys().filter(|name| name.ends_with("endpoint_type")).cloned().collect();
            for name in renamed {
                if let Some(node) = members.remove(&name) {
                    members.insert(name.replace("endpoint_type", "interface"), node);
                }
            }
        }
        Ok(Self(entry))
    }

    /// A setting of the log-in: in `auth`, or beside it.
    fn auth(&self, names: &[&str]) -> Option<&str> {
        let (auth, beside) = (self.0.get("auth"), &self.0);
        let find = |name: &&str| auth.and_then(|auth| auth.get(name)).or_else(|| beside.get(name))?.text();
        names.iter().find_map(find)
    }

    /// A setting that may stand beside `auth` with more weight.
    fn scope(&self, names: &[&str]) -> Option<String> {
        let beside = names.iter().find_map(|name| self.0.get(name)?.text());
        beside.or_else(|| self.auth(names)).map(str::to_owned)
    }

    /// A setting that is true or false, in the words of YAML 1.1, which openstacksdk reads.
    fn truth(&self, name: &str) -> Result<Option<bool>, String> {
        let Some(node) = self.0.get(name) else { return Ok(None) };
        match node.text().unwrap_or_default().to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Ok(Some(true)),
            "false" | "no" | "off" => Ok(Some(false)),
            _ => Err(format!("has a '{name}' that is neither true nor false; name its authority with 'cacert'")),
        }
    }

    fn path(&self, name: &str, folder: Option<&Path>) -> Result<Option<PathBuf>, String> {
        let Some(node) = self.0.get(name) else { return Ok(None) };
        let Some(text) = node.text() else {
            return if matches!(node, Node::Text(_)) {
                Ok(None)
            } else {
                Err(format!("has a '{name}' that is not a path"))
            };
        };
        let path = match text.strip_prefix("~/") {
            Some(rest) => {
                Path::new(&env::var_os("HOME").ok_or(format!("has a '{name}' below ~, but HOME is not set"))?)
                    .join(rest)
            }
            None => folder.unwrap_or(Path::new("")).join(text),
        };
        Ok(Some(path))
    }

    fn into_cloud(
        self,
        secret: Option<SecretBytes>,
        caller: Option<Arc<Caller>>,
        folder: Option<&Path>,
    ) -> Result<Cloud, String> {
        for (name, unsafe_value) in [("verify", false), ("insecure", true)] {
            if self.truth(name)? == Some(unsafe_value) {
                return Err(format!("says '{name}: {unsafe_value}'; name its authority with 'cacert' instead"));
            }
        }
        let auth_url = self.auth(&["auth_url"]).ok_or("has no auth_url")?.to_owned();
        let credentials = match caller {
            Some(caller) => Credentials::Caller(caller),
            None => self.credentials(secret)?,
        };
        let certificate = self.path("cert", folder)?;
        let key = self.path("key", folder)?;
        let client =
            certificate.map(|certificate| ClientCertificate { key: key.unwrap_or(certificate.clone()), certificate });
        let endpoints = self.endpoints()?;
        let region = self.0.get("region_name").and_then(Node::text).map(str::to_owned);
        Ok(Cloud { auth_url, credentials, authorities: self.path("cacert", folder)?, client, endpoints, region })
    }

    /// What says which end point is meant, by service.
    fn endpoints(&self) -> Result<BTreeMap<String, Vec<String>>, String> {
        let mut endpoints = BTreeMap::new();
        for (name, node) in self.0.map().into_iter().flatten().filter(|(_, node)| !matches!(node, Node::Null)) {
            // Of our services only; those of others are none of our business.
            let service = SERVICES.iter().find_map(|service| name.strip_prefix(service)?.strip_prefix('_'));
            match (service, name.as_str()) {
                (Some("service_type" | "service_name"), _) => {
                    return Err(format!(
                        "sets '{name}', which is not supported; name the service's 'urls' in the configuration"
                    ));
                }
                (Some("region_name" | "interface" | "endpoint_override" | "endpoint"), _) | (None, "interface") => {
                    let mut values = node
                        .texts()
                        .ok_or_else(|| format!("has a '{name}' that is neither a text nor a list of texts"))?;
                    if name.ends_with("interface") {
                        // As in the environment of old clients: "publicURL".
                        values.iter_mut().for_each(|value| *value = value.trim_end_matches("URL").to_owned());
                    }
                    endpoints.insert(name.clone(), values);
                }
                _ => {}
            }
        }
        Ok(endpoints)
    }

    fn credentials(&self, secret: Option<SecretBytes>) -> Result<Credentials, String> {
        let secret = |own: Option<&str>, what: &str| match (secret, own) {
            (Some(secret), _) => Ok(secret),
            (None, Some(own)) => SecretBytes::copy_of(own.as_bytes()).map_err(|error| error.to_string()),
            (None, None) => Err(format!("has no {what}, and the store's configuration names no 'secret' file")),
        };
        for scope in ["trust_id", "system_scope"] {
            if self.auth(&[scope]).is_some() {
                return Err(format!("sets '{scope}'; only a project is supported"));
            }
        }
        let kind = self.0.get("auth_type").or_else(|| self.0.get("auth_plugin"));
        Ok(match kind.and_then(Node::text).unwrap_or("password") {
            "password" | "v3password" => Credentials::Password {
                user: self.user()?,
                project: named(
                    self.scope(&["project_id", "tenant_id"]),
                    self.scope(&["project_name", "tenant_name"]),
                    self.scope(&["project_domain_id"]).or_else(|| self.scope(&["domain_id"])),
                    self.scope(&["project_domain_name"]).or_else(|| self.scope(&["domain_name"])),
                )
                .ok_or("has neither project_id nor project_name")?,
                password: secret(self.auth(&["password"]), "password")?,
            },
            "v3applicationcredential" => Credentials::ApplicationCredential {
                id: match (self.auth(&["application_credential_id"]), self.auth(&["application_credential_name"])) {
                    (Some(id), _) => Ok(id.to_owned()),
                    (None, Some(name)) => Err((name.to_owned(), self.user()?)),
                    (None, None) => return Err("has neither application_credential_id nor its name".to_owned()),
                },
                secret: secret(self.auth(&["application_credential_secret"]), "application_credential_secret")?,
            },
            "token" | "v3token" => Credentials::Token(secret(self.auth(&["token", "auth_token"]), "token")?),
            "v1password" => Credentials::TempAuth {
                user: self.auth(&["username", "user_name"]).ok_or("has no username")?.to_owned(),
                key: secret(self.auth(&["password"]), "password")?,
            },
            other => return Err(format!("has the unsupported auth_type '{other}'")),
        })
    }

    fn user(&self) -> Result<Named, String> {
        named(
            self.auth(&["user_id"]).map(str::to_owned),
            self.auth(&["username", "user_name"]).map(str::to_owned),
            self.scope(&["user_domain_id"]).or_else(|| self.scope(&["domain_id"])),
            self.scope(&["user_domain_name"]).or_else(|| self.scope(&["domain_name"])),
        )
        .ok_or_else(|| "has neither user_id nor username".to_owned())
    }
}

/// The services that are used, as clouds.yaml has their names.
const SERVICES: [&str; 3] = ["object_store", "key_manager", "identity"];

/// The first region that is said, and what is set for it: openstacksdk takes that one unless it is told another.
fn regions(entry: &Node) -> Result<Option<(Node, Node)>, String> {
    let wrong = |name: &str| format!("has a '{name}' that is not understood");
    let text = |text: &str| Node::Text(Zeroizing::new(text.trim().to_owned()));
    if let Some(regions) = entry.get("regions") {
        let first = match regions {
            Node::List(regions) => regions.first(),
            _ => return Err(wrong("regions")),
        };
        return match first {
            None => Ok(None),
            Some(region) => match (region.text(), region.get("name").and_then(Node::text)) {
                (Some(name), _) => Ok(Some((text(name), Node::Null))),
                (None, Some(name)) => Ok(Some((text(name), region.get("values").cloned().unwrap_or_default()))),
                (None, None) => Err(wrong("regions")),
            },
        };
    }
    let Some(names) = entry.get("region_name") else { return Ok(None) };
    let names = names.texts().ok_or_else(|| wrong("region_name"))?;
    let first = names.first().and_then(|names| names.split(',').next()).filter(|name| !name.is_empty());
    Ok(first.map(|name| (text(name), Node::Null)))
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
    let found = candidates.iter().find_map(|path| beside(path, "clouds"));
    found.ok_or_else(|| CloudsError::Missing(looked()))
}

/// All files that say what the cloud is, and may have its secrets.
pub fn files(config: &CloudConfig) -> Result<Vec<PathBuf>, CloudsError> {
    let clouds = find_file(config)?;
    let others = [secure_file(&clouds), beside(&clouds, "clouds-public")].into_iter().flatten();
    let secret = config.secret.clone().map(PathBuf::from);
    Ok([clouds.clone()].into_iter().chain(others).chain(secret).collect())
}

/// secure.yaml, if there is one.
fn secure_file(clouds: &Path) -> Option<PathBuf> {
    env::var_os("OS_CLIENT_SECURE_FILE").map(PathBuf::from).or_else(|| beside(clouds, "secure"))
}

/// The file of that name in the folder of clouds.yaml, with one of the endings that openstacksdk knows.
fn beside(clouds: &Path, name: &str) -> Option<PathBuf> {
    let endings = ["yaml", "yml", "json"].iter();
    endings.map(|ending| clouds.with_file_name(format!("{name}.{ending}"))).find(|path| path.exists())
}

fn read(path: &Path) -> Result<String, CloudsError> {
    fs::read_to_string(path).map_err(|source| CloudsError::Read { path: path.to_owned(), source })
}

/// The file without the newline that editors put at its end.
pub fn read_secret(path: &Path) -> Result<SecretBytes, CloudsError> {
    let text = Zeroizing::new(read(path)?);
    let failed = |source| CloudsError::Read { path: path.to_owned(), source };
    SecretBytes::copy_of(text.trim_end_matches(['\r', '\n']).as_bytes())
        .map_err(|error| failed(io::Error::other(error)))
}

#[cfg(test)]
mod tests;
