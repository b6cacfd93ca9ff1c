//! Init: a store in a directory or in the TPM, its owner's key pair, and its configuration.
//!
//! Whatever may be wrong with a request shows before anything is made. What an interrupted run has made is whole, and the
//! next one takes it up.

use std::{
    fs::{self, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    base::key::StoreName,
    config::{ConfigError, IdentitySpec, TpmConfig},
    keys::{
        seal::{self, OwnerKey, SealError},
        store,
        tpm::IdentityFile,
    },
    sys::durable::folder_of,
    unlock::container::{Container, Use},
    verbs::{
        error::Error,
        leaf::{self, Hands},
        setup::{self, NewPlace, NewStore, absolute},
    },
    volumes::separation,
};

/// The new store.
pub struct Request<'a> {
    pub store: &'a StoreName,
    pub place: NewPlace<'a>,
    /// Public key or certificate; `None`: no escrow.
    pub escrow: Option<&'a Path>,
    /// Public key or certificate; `None`: a new key pair, or for a store in the TPM this host's key in that.
    pub owner: Option<&'a Path>,
    /// The owner's private key on this host; with `owner` only.
    pub identity: Option<&'a IdentitySpec>,
    /// A recovery key is made for this person.
    pub recovery: Option<&'a dyn Hands>,
}

/// What was made.
#[derive(Serialize)]
pub struct Made {
    pub store: StoreName,
    /// Where its keys are, in words.
    pub place: String,
    pub owner: PathBuf,
    #[serde(serialize_with = "as_text")]
    pub identity: Option<IdentitySpec>,
    pub escrow: Option<PathBuf>,
    /// The leaf that the recovery key opens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery: Option<String>,
}

fn as_text<S: serde::Serializer>(identity: &Option<IdentitySpec>, serializer: S) -> Result<S::Ok, S::Error> {
    identity.as_ref().map(ToString::to_string).serialize(serializer)
}

/// Makes a store and adds it to the configuration.
pub fn init(config: &Path, request: &Request<'_>) -> Result<Made, Error> {
    let Request { store, place, .. } = *request;
    if setup::is_configured(config, store)? {
        return Err(Error::StoreExists(store.clone()));
    }
    seal::recipients(request.owner.into_iter().chain(request.escrow))?;
    let given =
        request.owner.map(|owner| Ok::<_, Error>((absolute(owner)?, request.identity.map(setup::found).transpose()?)));
    let given = given.transpose()?;
    let in_tpm = match (&given, place) {
        (None, NewPlace::Tpm) => Some(tpm_key(config)?),
        _ => None,
    };
    if request.escrow.is_none() && request.recovery.is_none() {
        tracing::warn!(
            "store '{store}' has no escrow: if the owner's private key is lost, every volume of this store is lost"
        );
    }
    let folder = folder_of(config);
    fs::create_dir_all(folder).map_err(Error::io(format!("make {}", folder.display())))?;
    let folder = absolute(folder)?;
    let own = place.section()?;
    let (owner, identity) = match (given, in_tpm) {
        (Some(given), _) => given,
        (None, Some((key, file))) => {
            let public = folder.join(format!("{store}.owner.pem"));
            keep(&public, 0o644, &key.public_pem()?)?;
            (public, Some(IdentitySpec::of("tpm", file)))
        }
        (None, None) => owner_pair(&folder, store)?,
    };
    let escrow = request.escrow.map(|escrow| copy_escrow(escrow, &folder, store)).transpose()?;
    let recovery = request.recovery.map(|_| setup::new_leaf(config, &folder)).transpose()?;
    let new = NewStore {
        name: store,
        own,
        owner: &owner,
        escrow: escrow.as_deref(),
        identity: identity.as_ref(),
        recovery: recovery.as_ref(),
    };
    let extended = new.in_configuration(config)?;
    if let Some((hands, (leaf, _))) = request.recovery.zip(recovery.as_ref()) {
        leaf::new_or_left(&extended.config, leaf, hands)?;
    }
    let place = store::kind(extended.config.store(store)?)?.describe();
    let container = Container::open(&extended.config, store, None, Use::Keys)?;
    container.make_first_key()?;
    extended.write()?;
    foretell(&container);
    let recovery = recovery.map(|(leaf, _)| leaf.to_string());
    Ok(Made { store: store.clone(), place, owner, identity, escrow, recovery })
}

/// Says at once what would otherwise be said of each volume, or after a reboot.
fn foretell(container: &Container) {
    let of_keys = container.new_reference().ok().and_then(|new| {
        let places = container.store().places(&new.key).ok();
        container.store().abandon(&new.key);
        places
    });
    let places: Vec<_> = of_keys.into_iter().flatten().chain(container.own_places().iter().cloned()).collect();
    for outlook in separation::outlook(&places) {
        tracing::warn!("{outlook}");
    }
}

/// This host's key in its TPM: the disk that a store in the TPM is for must not have what opens its keys.
fn tpm_key(config: &Path) -> Result<(IdentityFile, PathBuf), Error> {
    let tpm = match setup::configuration(config) {
        Err(ConfigError::Missing(_)) => TpmConfig::default(),
        config => config?.tpm,
    };
    Ok((IdentityFile::read(&tpm.identity)?, absolute(&tpm.identity)?))
}

/// The owner's key pair beside the configuration: a new one, or the one that an interrupted run has made.
fn owner_pair(folder: &Path, store: &StoreName) -> Result<(PathBuf, Option<IdentitySpec>), Error> {
    let private = folder.join(format!("{store}.owner.key"));
    let public = folder.join(format!("{store}.owner.pem"));
    let key = match OwnerKey::read(&private) {
        Err(SealError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            let key = OwnerKey::generate()?;
            keep(&private, 0o600, key.private_pem()?.expose())?;
            key
        }
        key => {
            let key = key?;
            tracing::warn!("{} exists already; it becomes the owner's key of store '{store}'", private.display());
            key
        }
    };
    keep(&public, 0o644, &key.public_pem()?)?;
    Ok((public, Some(IdentitySpec::of("", private))))
}

/// A copy beside the configuration: the original may be on the stick that goes into the safe.
fn copy_escrow(original: &Path, folder: &Path, store: &StoreName) -> Result<PathBuf, Error> {
    let pem = fs::read(original).map_err(Error::io(format!("read {}", original.display())))?;
    let copy = folder.join(format!("{store}.escrow.pem"));
    keep(&copy, 0o644, &pem)?;
    Ok(copy)
}

/// Writes a new file, whole or not at all. One of this name with the same content is as good, another is not overwritten.
pub(super) fn keep(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), Error> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let write = || {
        let mut builder = tempfile::Builder::new();
        let mut file = builder.permissions(Permissions::from_mode(mode)).tempfile_in(folder_of(path))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist_noclobber(path).map(drop).map_err(|refused| refused.error)
    };
    write().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(path.to_owned()),
        _ => Error::io(format!("write {}", path.display()))(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    struct Site(tempfile::TempDir);

    impl Site {
        fn new() -> Self {
            let site = Self(tempfile::tempdir().unwrap());
            let escrow = OwnerKey::generate().unwrap();
            fs::write(site.path("escrow.key"), escrow.private_pem().unwrap().expose()).unwrap();
            fs::write(site.path("escrow.pem"), escrow.public_pem().unwrap()).unwrap();
            site
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn init(&self, store: &str, escrow: &str) -> Result<Made, Error> {
            let (name, path, escrow) = ("s".parse().unwrap(), self.path(store), self.path(escrow));
            let place = NewPlace::Directory(&path);
            let request =
                Request { store: &name, place, escrow: Some(&escrow), owner: None, identity: None, recovery: None };
            init(&self.path("etc/c.toml"), &request)
        }
    }

    #[test]
    fn a_request_that_is_refused_leaves_nothing_behind() {
        let site = Site::new();
        assert!(matches!(site.init("keys", "escrow.key"), Err(Error::Unlock(_))));
        assert!(!site.path("etc").exists() && !site.path("keys").exists());
        site.init("keys", "escrow.pem").unwrap();
        assert!(matches!(site.init("keys", "escrow.pem"), Err(Error::StoreExists(_))));
    }

    #[test]
    fn the_next_run_takes_up_what_an_interrupted_one_has_made() {
        let site = Site::new();
        let made = site.init("keys", "escrow.pem").unwrap();
        let key = fs::read(site.path("etc/s.owner.key")).unwrap();
        // As if the configuration had not been written any more.
        fs::remove_file(site.path("etc/c.toml")).unwrap();
        fs::remove_file(&made.owner).unwrap();
        let again = site.init("keys", "escrow.pem").unwrap();
        assert_eq!(fs::read(site.path("etc/s.owner.key")).unwrap(), key);
        assert!(again.owner.exists() && Config::read(&site.path("etc/c.toml")).is_ok());
    }

    #[test]
    fn files_of_others_are_not_overwritten() {
        let site = Site::new();
        fs::create_dir(site.path("etc")).unwrap();
        fs::write(site.path("etc/s.owner.pem"), "something else").unwrap();
        assert!(matches!(site.init("keys", "escrow.pem"), Err(Error::Exists(_))));
        assert_eq!(fs::read(site.path("etc/s.owner.pem")).unwrap(), b"something else");
    }
}
