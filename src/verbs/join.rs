//! `host join`: a host asks to be admitted, and takes the answer.
//!
//! | step | is there when it is done | stopped before it |
//! |---|---|---|
//! | the TPM makes the keys | nothing | nothing is kept |
//! | the request is kept | `enrolment.json`, with the key | the same command writes key and request from it |
//! | the key's file | `host.tpm.pem` | likewise |
//! | the request | the file, or the letter in the store | likewise |
//! | the answer is taken | the share in the key's file | the answer can be taken again |

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{edit, error::Error};
use crate::{
    base::key::{HostName, SecretBytes, StoreName},
    config::{Config, TpmConfig},
    keys::tpm::{IdentityFile, Tpm, TpmError},
    sys::durable::{self, Folder, folder_of},
    unlock::{
        audit::{self, Event},
        container::{Container, Use},
        enrol::{self, Answer, Asked, Document, EnrolError},
        lockbox::{Lockbox, LockboxError},
    },
};

/// What is wanted of a request.
pub struct Wish<'a> {
    pub name: Option<&'a HostName>,
    /// A new key, in place of the one that is there.
    pub replace: bool,
    /// The file for the request of a host of this name, if it is for a file.
    pub output: &'a dyn Fn(&HostName) -> Option<PathBuf>,
    /// Whether the key is protected by a PIN.
    pub pin: bool,
    /// That PIN.
    pub new_pin: &'a dyn Fn(&TpmConfig) -> Result<SecretBytes, Error>,
}

/// This host's request: a new one, with a new key, or the one that it has made before. Its key is in its file.
pub fn ask(config: &Config, wish: &Wish<'_>) -> Result<Asked, Error> {
    if let Some(asked) = before(config, wish)? {
        return again(config, wish, asked);
    }
    let key_file = &config.tpm.identity;
    if !wish.replace && key_file.exists() {
        return Err(Error::Exists(key_file.to_path_buf()));
    }
    let host = host(config, wish.name)?;
    if let Some(output) = (wish.output)(&host) {
        is_free(&output)?;
    }
    let tpm = Tpm::open(&config.tpm)?;
    let with_pin = wish.pin || config.tpm.pin.is_some();
    let policy = tpm.policy_here(&config.tpm, with_pin)?;
    let pin = with_pin.then(|| (wish.new_pin)(&config.tpm)).transpose()?;
    let asked = enrol::request(&tpm, &host, &policy, pin.as_ref())?;
    asked.keep(&config.state)?;
    write_key(key_file, &asked.key()?)?;
    record(config, "host join", &host, None);
    Ok(asked)
}

/// The request that this host has made, if that is the one that is wanted.
fn before(config: &Config, wish: &Wish<'_>) -> Result<Option<Asked>, Error> {
    let Some(asked) = enrol::asked(&config.state)? else { return Ok(None) };
    // Stopped after the last step: what was wanted is there.
    let is_written = || (wish.output)(&asked.host).is_some_and(|output| asked.request.is_in(&output));
    if wish.replace && !is_written() {
        return Ok(None);
    }
    let is_its_key = match IdentityFile::read(&config.tpm.identity) {
        Ok(file) => file.public == asked.key()?.public,
        Err(TpmError::NotEnrolled(_)) => true,
        Err(_) if wish.replace => false,
        Err(error) => return Err(error.into()),
    };
    Ok(is_its_key.then_some(asked))
}

fn again(config: &Config, wish: &Wish<'_>, asked: Asked) -> Result<Asked, Error> {
    if let Some(name) = wish.name.filter(|name| **name != asked.host) {
        return Err(Error::Usage(format!(
            "this host has asked to join as '{}', not as '{name}': --replace makes a new key and a new request",
            asked.host
        )));
    }
    if let Some(output) = (wish.output)(&asked.host).filter(|output| !asked.request.is_in(output)) {
        is_free(&output)?;
    }
    if !config.tpm.identity.exists() {
        write_key(&config.tpm.identity, &asked.key()?)?;
    }
    Ok(asked)
}

/// What is in the way is said before a key is made.
fn is_free(output: &Path) -> Result<(), Error> {
    if output.symlink_metadata().is_ok() {
        return Err(Error::Exists(output.to_owned()));
    }
    let failed = |source| EnrolError::File { action: "write", path: output.to_owned(), source };
    fs::metadata(folder_of(output)).map(drop).map_err(|source| failed(source).into())
}

fn host(config: &Config, wanted: Option<&HostName>) -> Result<HostName, Error> {
    let configured = config.lockbox.as_ref().map(|lockbox| &lockbox.host);
    if let (Some(wanted), Some(configured)) = (wanted, configured)
        && wanted != configured
    {
        let config = config.path.display();
        return Err(Error::Usage(format!(
            "--name is '{wanted}', but 'host' in [lockbox] of {config} is '{configured}'"
        )));
    }
    if let Some(name) = wanted.or(configured) {
        return Ok(name.clone());
    }
    let system = nix::sys::utsname::uname().map_err(io::Error::from).map_err(Error::io("ask for the host name"))?;
    let name = system.nodename().to_string_lossy().to_lowercase();
    name.parse().map_err(|error| Error::Usage(format!("name this host with --name: {error}")))
}

/// Whether the key of this request has its share.
pub fn has_joined(config: &Config, asked: &Asked) -> Result<bool, Error> {
    let file = IdentityFile::read(&config.tpm.identity)?;
    Ok(file.public == asked.key()?.public && file.admission.is_some())
}

/// What a host has when it has joined.
#[derive(Serialize)]
pub struct Taken {
    pub host: HostName,
    /// The file of its key.
    pub key: PathBuf,
    /// The store that has its lockbox key.
    pub store: StoreName,
    /// That key's fingerprint.
    pub lockbox_key: String,
    /// What `[lockbox]` has to say.
    pub lockbox: LockboxTable,
}

/// `[lockbox]` in this host's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockboxTable {
    /// It was there.
    Configured,
    /// It was written.
    Written,
    /// It names another host or store.
    Differs,
    /// It is for a person to write: the configuration does not have the store.
    Missing,
}

/// Takes the answer: from now on this host's key opens the lockbox key, and that key alone is expected.
pub fn take(config: &Config, answer: &Answer, expected: Option<&str>) -> Result<Taken, Error> {
    let host = || answer.host.clone();
    if let Some(trusted) = expected.filter(|expected| **expected != answer.lockbox_key) {
        let (is, trusted) = (answer.lockbox_key.clone(), trusted.to_owned());
        return Err(LockboxError::Another { host: host(), is, trusted }.into());
    }
    let key_file = &config.tpm.identity;
    let joined = enrol::take(&Tpm::open(&config.tpm)?, answer, &config.state)?;
    let file = IdentityFile::read(key_file)?;
    if file.public != joined.key {
        return Err(EnrolError::NotForThisHost(format!("another key than the one in {}", key_file.display())).into());
    }
    let pem = IdentityFile { admission: Some(joined.share), ..file }.to_pem()?;
    let write = durable::replace_content(key_file, pem.as_bytes());
    write.map_err(Error::io(format!("write {}", key_file.display())))?;
    let lockbox = configure(config, answer)?;
    record(config, "host join", &answer.host, Some(answer.store.to_string()));
    let (store, lockbox_key) = (answer.store.clone(), answer.lockbox_key.clone());
    Ok(Taken { host: host(), key: key_file.to_path_buf(), store, lockbox_key, lockbox })
}

fn configure(config: &Config, answer: &Answer) -> Result<LockboxTable, Error> {
    let (table, config) = match &config.lockbox {
        Some(lockbox) if (&lockbox.host, &lockbox.store) == (&answer.host, &answer.store) => {
            (LockboxTable::Configured, config.clone())
        }
        Some(_) => return Ok(LockboxTable::Differs),
        None if config.store(&answer.store).is_err() => return Ok(LockboxTable::Missing),
        None => (LockboxTable::Written, edit::with_table(&config.path, &table(config, answer))?.write()?),
    };
    if let Some(lockbox) = Lockbox::of(&config) {
        lockbox.expect(answer.generation, &answer.lockbox_key)?;
    }
    Ok(table)
}

/// `[lockbox]` for this answer.
pub fn table(config: &Config, answer: &Answer) -> String {
    let identity = toml::Value::from(format!("tpm:{}", config.tpm.identity.display()));
    format!("[lockbox]\nhost = \"{}\"\nstore = \"{}\"\nidentities = [{identity}]\n", answer.host, answer.store)
}

/// Writes the key's file, for this user alone; one that is there is kept beside it, with those that were before: which of them
/// the administrator has admitted, and so opens this host's lockbox key, is not known here.
fn write_key(path: &Path, key: &IdentityFile) -> Result<(), Error> {
    let pem = key.to_pem()?;
    let write = || {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        let folder = Folder::make(folder_of(path))?;
        match fs::read(path) {
            Ok(before) => keep_before(&folder, name, &before)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        folder.replace(name, pem.as_bytes())
    };
    write().map_err(Error::io(format!("write {}", path.display())))
}

/// As FILE.before or, if that is taken, FILE.before.2 and so on.
fn keep_before(folder: &Folder, name: &str, pem: &[u8]) -> io::Result<()> {
    let names = (2..).map(|number| format!("{name}.before.{number}"));
    for before in [format!("{name}.before")].into_iter().chain(names) {
        match folder.create(&before, pem) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
    Ok(())
}

/// What host and administrator leave for each other in a store.
#[derive(Clone, Copy)]
pub enum Letter {
    Request,
    Answer,
}

impl Letter {
    /// Its name in the store.
    pub fn name(self, host: &HostName) -> String {
        let end = if matches!(self, Self::Request) { "request" } else { "answer" };
        format!("join/{host}.{end}")
    }

    /// The document in the store, if it is there.
    pub fn read<D: Document>(
        self,
        config: &Config,
        store: &StoreName,
        host: &HostName,
    ) -> Result<Option<(D, PathBuf)>, Error> {
        let container = Container::open(config, store, None, Use::Keys)?;
        let found = container.letters()?.read(&self.name(host))?;
        let place = PathBuf::from(format!("{store}/{}", self.name(host)));
        let parse = |json: Vec<u8>| match D::parse(&json) {
            Ok(document) => Ok((document, place)),
            Err(why) => Err(EnrolError::Document { path: place, expected: D::TYPE, why }.into()),
        };
        found.map(parse).transpose()
    }

    /// Leaves a document in the store, unless it is there already; where.
    pub fn leave(
        self,
        config: &Config,
        store: &StoreName,
        host: &HostName,
        document: &impl Document,
    ) -> Result<PathBuf, Error> {
        let container = Container::open(config, store, None, Use::Keys)?;
        let (letters, name, json) = (container.letters()?, self.name(host), document.to_json()?);
        if letters.read(&name)?.as_ref() != Some(&json) {
            letters.put(&name, &json)?;
        }
        Ok(PathBuf::from(format!("{store}/{name}")))
    }
}

pub fn record(config: &Config, action: &str, host: &HostName, stores: Option<String>) {
    let name = Some(host.to_string());
    let event = Event { action, key: stores, name, ..Event::default() };
    audit::done(config, &event);
}
