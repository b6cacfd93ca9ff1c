//! Paths as the configuration has them. Reading one resolves it, so no path of the configuration can be forgotten.

use std::{
    cell::RefCell,
    env,
    ops::Deref,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer};

use super::ConfigError;

/// What names a systemd credential in place of a path.
pub(super) const CREDENTIAL: &str = "credential:";

/// A path that the configuration names: relative to the configuration's folder, or `credential:NAME`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigPath(PathBuf);

impl Deref for ConfigPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for ConfigPath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl From<PathBuf> for ConfigPath {
    fn from(path: PathBuf) -> Self {
        Self(path)
    }
}

impl From<&Path> for ConfigPath {
    fn from(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl From<&str> for ConfigPath {
    fn from(path: &str) -> Self {
        Self(path.into())
    }
}

impl From<ConfigPath> for PathBuf {
    fn from(path: ConfigPath) -> Self {
        path.0
    }
}

impl<'de> Deserialize<'de> for ConfigPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        PathBuf::deserialize(deserializer).map(|written| resolve(&written))
    }
}

/// The configuration that is being read.
#[derive(Clone, Debug, Default)]
pub(super) struct Base {
    pub file: PathBuf,
    /// Credentials are looked for now. Where systemd's generators and udev's programs run there are none yet.
    pub with_credentials: bool,
}

/// What is being read by this thread, and the first credential that was missing.
struct Reading {
    base: Base,
    missing: Option<PathBuf>,
}

thread_local!(static READING: RefCell<Option<Reading>> = const { RefCell::new(None) });

impl Base {
    /// Reads a part of the configuration; the paths in it are resolved.
    pub fn read<T>(&self, read: impl FnOnce() -> Result<T, toml::de::Error>) -> Result<T, ConfigError> {
        let reading = Reading { base: self.clone(), missing: None };
        let outer = READING.with(|current| current.replace(Some(reading)));
        let result = read();
        let reading = READING.with(|current| current.replace(outer));
        let malformed = |source| ConfigError::Malformed { path: self.file.clone(), source: Box::new(source) };
        let value = result.map_err(malformed)?;
        match reading.and_then(|reading| reading.missing) {
            Some(credential) if self.with_credentials => Err(ConfigError::NoCredentials(credential)),
            _ => Ok(value),
        }
    }

    /// The configuration that this thread reads.
    pub fn current() -> Self {
        READING.with(|current| current.borrow().as_ref().map(|reading| reading.base.clone()).unwrap_or_default())
    }
}

/// The path that is meant by a path of the configuration that is being read.
pub(super) fn resolve(written: &Path) -> ConfigPath {
    let credential = written.to_str().and_then(|text| text.strip_prefix(CREDENTIAL));
    READING.with(|current| {
        let mut current = current.borrow_mut();
        let Some(reading) = current.as_mut() else { return ConfigPath(written.to_owned()) };
        ConfigPath(match (credential, env::var_os("CREDENTIALS_DIRECTORY")) {
            (Some(name), Some(directory)) => Path::new(&directory).join(name),
            (Some(_), None) => {
                reading.missing.get_or_insert_with(|| written.to_owned());
                written.to_owned()
            }
            (None, _) => reading.base.file.parent().unwrap_or(Path::new(".")).join(written),
        })
    })
}
