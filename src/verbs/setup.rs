//! A new store in the configuration. Nothing is written before all of it is known to be usable.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use crate::{
    base::key::StoreName,
    config::{Config, ConfigError, IdentitySpec, LeafName},
    keys::{
        seal::identities,
        store::{self, Directory},
    },
    sys::durable::{Folder, folder_of},
    unlock::loops,
    verbs::error::Error,
};

/// The configuration, of which every part is understood.
pub fn configuration(path: &Path) -> Result<Config, ConfigError> {
    let config = Config::read(path)?;
    store::check(&config)?;
    Ok(config)
}

/// Whether a store is configured; without a configuration none is.
pub fn is_configured(path: &Path, name: &StoreName) -> Result<bool, ConfigError> {
    match configuration(path) {
        Ok(config) => Ok(config.stores.contains_key(name)),
        Err(ConfigError::Missing(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where the keys of a new store are to be.
#[derive(Clone, Copy)]
pub enum NewPlace<'a> {
    /// In this directory.
    Directory(&'a Path),
    /// In this machine's TPM.
    Tpm,
    /// In Swift: the entry of clouds.yaml.
    Swift(Option<&'a str>),
}

impl NewPlace<'_> {
    /// `type` and the members of that type. A directory is made, for only then its whole path is known.
    pub fn section(self) -> Result<Vec<(&'static str, String)>, Error> {
        Ok(match self {
            Self::Directory(path) => {
                Directory::make(path)?;
                vec![("type", "directory".to_owned()), ("path", absolute(path)?.to_string_lossy().into_owned())]
            }
            Self::Tpm => vec![("type", "tpm-nv".to_owned())],
            Self::Swift(cloud) => {
                let cloud = cloud.map(|cloud| ("cloud", cloud.to_owned()));
                [("type", "swift".to_owned())].into_iter().chain(cloud).collect()
            }
        })
    }
}

/// What `[stores.NAME]` of a new store says.
pub struct NewStore<'a> {
    pub name: &'a StoreName,
    /// `type` and the members of that type.
    pub own: Vec<(&'static str, String)>,
    pub owner: &'a Path,
    /// `None`: no escrow.
    pub escrow: Option<&'a Path>,
    /// The owner's private key on this host.
    pub identity: Option<&'a IdentitySpec>,
    /// A leaf that a recovery key opens, and its file.
    pub recovery: Option<&'a (LeafName, PathBuf)>,
}

/// The name of a new leaf for a recovery key, and its file beside the configuration.
pub fn new_leaf(config: &Path, folder: &Path) -> Result<(LeafName, PathBuf), Error> {
    let taken = match configuration(config) {
        Err(ConfigError::Missing(_)) => BTreeMap::default(),
        config => config?.leaves,
    };
    let name = free_leaf("paper", &taken)?;
    let file = folder.join(format!("{name}.json"));
    Ok((name, file))
}

/// The first of "paper", "paper2", "paper3", ... that is no leaf's name yet.
pub fn free_leaf<T>(stem: &str, taken: &BTreeMap<LeafName, T>) -> Result<LeafName, Error> {
    let names = std::iter::once(stem.to_owned()).chain((2..).map(|number| format!("{stem}{number}")));
    let name = names.filter_map(|name| name.parse::<LeafName>().ok()).find(|name| !taken.contains_key(name));
    name.ok_or_else(|| Error::Usage("there is no name left for a leaf".to_owned()))
}

/// A configuration that has one section more than its file has.
pub struct Extended {
    pub config: Config,
    /// The whole file.
    text: String,
}

impl NewStore<'_> {
    /// The configuration in this file, or an empty one, with the new store.
    pub fn in_configuration(&self, path: &Path) -> Result<Extended, Error> {
        let section = self.section();
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(Error::io(format!("read {}", path.display())))?,
        };
        let text = self.default_in(&text, path)? + &text + &section;
        let config = Config::parse(&text, path)?;
        store::check(&config)?;
        loops::check(&config, self.name, &[])?;
        Ok(Extended { config, text })
    }

    /// The line that names the store which commands mean that name none: the first one stays it when a second one comes.
    fn default_in(&self, text: &str, path: &Path) -> Result<String, Error> {
        let before = Config::parse(text, path)?;
        let mut stores = before.stores.keys();
        let default = match (before.default_store, stores.next(), stores.next()) {
            (None, None, _) => self.name,
            (None, Some(only), None) => only,
            _ => return Ok(String::new()),
        };
        Ok(format!("default_store = {}\n", toml::Value::String(default.to_string())))
    }

    fn section(&self) -> String {
        let text = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let path = |path: &Path| text(&path.to_string_lossy());
        let mut lines = vec![format!("\n[stores.{}]", self.name)];
        lines.extend(self.own.iter().map(|(member, value)| format!("{member} = {}", text(value))));
        lines.push(format!("owner = {}", path(self.owner)));
        lines.push(match self.escrow {
            Some(escrow) => format!("escrow = {}", path(escrow)),
            None => "no_escrow = true".to_owned(),
        });
        let identity = self.identity.map(|identity| text(&identity.to_string())).unwrap_or_default();
        lines.push(format!("identities = [{identity}]\n"));
        if let Some((leaf, file)) = self.recovery {
            let escrow = self.escrow.map_or("", |_| " escrow,");
            lines.insert(lines.len() - 1, format!("opens = \"any(owner,{escrow} hosts, {leaf})\""));
            lines.push(format!("[leaves.{leaf}]\nrecovery = {}\n", path(file)));
        }
        lines.join("\n")
    }
}

impl Extended {
    /// Writes the file, whole or not at all.
    pub fn write(self) -> Result<Config, Error> {
        let Self { config, text } = self;
        let write = || {
            fs::create_dir_all(folder_of(&config.path))?;
            OpenOptions::new().append(true).create(true).mode(0o600).open(&config.path)
        };
        write().map_err(Error::io(format!("write {}", config.path.display())))?;
        replace(&config.path, &text)?;
        Ok(config)
    }
}

/// Replaces the content of a configuration, whole or not at all; through a link.
pub(super) fn replace(path: &Path, text: &str) -> Result<(), Error> {
    let write = || {
        let path = &path.canonicalize()?;
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        Folder::lock(folder_of(path))?.replace_content(name, text.as_bytes())
    };
    write().map_err(Error::io(format!("write {}", path.display())))
}

/// An identity whose file is there and is of its kind, with its whole path.
pub fn found(identity: &IdentitySpec) -> Result<IdentitySpec, Error> {
    identities::kind(identity).check()?;
    Ok(IdentitySpec::of(&identity.scheme, absolute(&identity.path)?))
}

/// The whole path of what is there.
pub fn absolute(path: &Path) -> Result<PathBuf, Error> {
    path.canonicalize().map_err(Error::io(format!("find {}", path.display())))
}
