//! Hooks: what Nova and Cinder ask for, through os-brick and castellan, when they attach a volume or keep a key.
//!
//! A volume's key is here a managed object, as Cinder makes it, and its passphrase is computed from it as os-brick does,
//! so that both can open each other's volumes. A device is formatted at its first attach only, and only if nothing is
//! on it and its key has never been used: both, for either alone would also be true of a volume that is not where it should be.
//! Until somebody has opened it who does not fill it, it counts as unused for whoever fills it from the beginning.

mod keys;
#[cfg(test)]
pub(super) mod tests;

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use keys::{
    Described, add_consumer, consumers, copy_key, create_key, create_pair, delete_key, get_key, list_keys,
    remove_consumer, store_key,
};

use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, KeySize, VolumeKey},
        mapping_name::MappingName,
    },
    config::Config,
    unlock::{
        case::{Case, Circumstances, Strictness},
        container::{Container, Source, Use},
        tenant::Tenant,
    },
    verbs::{
        attach::{self, Options},
        detach,
        error::Error,
        format::{self, Ground},
        metrics, resize,
    },
    volumes::{
        backend::{BackendError, Backends, Deferred, Mapping, MappingStatus},
        header::{self, CIPHER, PlainParameters, SectorSize, VolumeError},
        separation::Target,
    },
};

/// What os-brick says of a volume.
pub struct Request {
    pub device: PathBuf,
    /// The symbolic link that Nova and Cinder will open; it is to lead to the plaintext device.
    pub link: Option<PathBuf>,
    pub name: MappingName,
    pub key: KeyReference,
    /// The volume is plain dm-crypt.
    pub plain: bool,
    /// Cipher of the volume type.
    pub cipher: Option<String>,
    /// Key size of the volume type.
    pub key_size: Option<KeySize>,
    /// Who serves the volume, as its connection_info says.
    pub target: Option<Target>,
    /// What the caller calls the volume, for the audit record.
    pub volume_id: Option<String>,
    /// The caller is going to fill the whole volume anew, as Cinder does with an image.
    pub fills: bool,
}

impl Request {
    /// The volume's id, if the caller is going to fill it.
    fn filling(&self) -> Option<&str> {
        let most = 64;
        self.volume_id.as_deref().filter(|id| self.fills && (1..=most).contains(&id.len()))
    }
}

/// Attaches a volume; formats it first if that is its first time. One that is attached already is so for the one who has
/// its key, and under this name.
pub fn attach(config: &Config, backends: &dyn Backends, request: &Request, tenant: &Tenant) -> Result<Mapping, Error> {
    metrics::counted(config, |source| map(config, backends, request, tenant, source))
}

fn map(
    config: &Config,
    backends: &dyn Backends,
    request: &Request,
    tenant: &Tenant,
    source: &mut Option<Source>,
) -> Result<Mapping, Error> {
    check_cipher(request)?;
    request.link.as_deref().map_or(Ok(()), can_lead)?;
    let plain = request.plain.then(|| plain(config, request));
    let attached = attached_already(backends, request)?;
    if attached.is_none() {
        make_ready(config, backends, request, plain.as_ref(), tenant)?;
    }
    let device = attached.as_ref().map_or(&request.device, |mapping| &mapping.source);
    let attempt = attach::map(
        config,
        backends,
        attach::Request {
            device,
            name: Some(request.name.clone()),
            key: Some(request.key.clone()),
            header: None,
            plain,
            backend: attached.as_ref().map(|mapping| mapping.backend),
            options: Options::default(),
            separation: Strictness::default(),
            tenant: Some(tenant.clone()),
            target: request.target.clone(),
            volume_id: request.volume_id.as_deref(),
            fills: request.fills,
        },
        source,
    );
    let mapping = attempt.map_err(|error| match &attached {
        // The key is the tenant's, but not that of what is attached.
        Some(mapping) if matches!(error.exit(), Exit::KeyRefused | Exit::Header) => {
            Error::OtherVolume { name: mapping.name.clone(), key: request.key.clone(), source: Box::new(error) }
        }
        _ => error,
    })?;
    if let Some(link) = request.link.as_deref().filter(|link| !leads_to(link, &mapping.device)) {
        point(link, &mapping.device)?;
    }
    Ok(mapping)
}

/// Makes sure that the device is a volume: one that is blank is formatted, and another volume's plaintext is refused.
fn make_ready(
    config: &Config,
    backends: &dyn Backends,
    request: &Request,
    plain: Option<&PlainParameters>,
    tenant: &Tenant,
) -> Result<(), Error> {
    let found = header::find(&request.device, None, plain);
    if found.as_ref().is_ok_and(|volume| volume.luks().is_some()) {
        return Ok(());
    }
    is_no_mapping(backends, request)?;
    match found {
        Err(VolumeError::NoHeader { found: None, .. }) => format_first(config, request, tenant),
        found => Ok(found.map(drop)?),
    }
}

/// Removes a mapping; whether there was one. Cleaning up after a failure, os-brick asks for it more than once.
pub fn detach(backends: &dyn Backends, name: &MappingName) -> Result<bool, Error> {
    match detach::detach(backends, name, Deferred::No) {
        Ok(_) => Ok(true),
        Err(Error::NotAttached(_) | Error::Backend(BackendError::NotActive(_))) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a mapping as large as its device has become.
pub fn extend(config: &Config, backends: &dyn Backends, request: &Request, tenant: &Tenant) -> Result<u64, Error> {
    let plain = request.plain.then(|| plain(config, request));
    resize::resize(
        config,
        backends,
        resize::Request {
            name: &request.name,
            key: Some(request.key.clone()),
            header: None,
            plain,
            separation: Strictness::default(),
            tenant: Some(tenant.clone()),
            target: request.target.as_ref(),
        },
    )
}

fn check_cipher(request: &Request) -> Result<(), Error> {
    match &request.cipher {
        Some(cipher) if cipher != CIPHER => {
            Err(Error::Usage(format!("the volume type wants the cipher '{cipher}'; only {CIPHER} is supported")))
        }
        _ => Ok(()),
    }
}

/// The mapping of that name, if the device leads to it: os-brick names the device by a link that leads to the mapping once
/// the volume is attached.
fn attached_already(backends: &dyn Backends, request: &Request) -> Result<Option<MappingStatus>, Error> {
    match detach::status(backends, &request.name) {
        Err(Error::NotAttached(_)) => Ok(None),
        status => Ok(Some(status?).filter(|status| leads_to(&request.device, &status.device))),
    }
}

/// Refuses a device that is the plaintext of another volume.
fn is_no_mapping(backends: &dyn Backends, request: &Request) -> Result<(), Error> {
    match detach::find(backends, |device| leads_to(&request.device, device))? {
        Some(name) => Err(Error::LeadsToMapping { device: request.device.clone(), name }),
        None => Ok(()),
    }
}

fn leads_to(path: &Path, device: &Path) -> bool {
    let link = fs::read_link(path).is_ok_and(|target| target == device);
    link || matches!((fs::canonicalize(path), fs::canonicalize(device)), (Ok(path), Ok(device)) if path == device)
}

fn plain(config: &Config, request: &Request) -> PlainParameters {
    PlainParameters {
        key_size: request.key_size.unwrap_or(KeySize::Bits256),
        sector_size: SectorSize::B512,
        offset_sectors: 0,
        skip_sectors: 0,
        hash: config.hooks.plain_hash,
    }
}

fn format_first(config: &Config, request: &Request, tenant: &Tenant) -> Result<(), Error> {
    let container = Arc::new(Container::open(config, &request.key.store, Some(tenant), Use::Keys)?);
    let unused = container.unused(&request.key.key, config.hooks.format_with_unmarked_keys, request.filling())?;
    let plan = format::Request {
        device: &request.device,
        store: None,
        keyslot: true,
        header: None,
        key_size: request.key_size.unwrap_or(KeySize::Bits512),
        sector_size: None,
        force: false,
        separation: Strictness::default(),
    };
    let ground = Ground::claim(&plan)?;
    let (key, passphrase) = (VolumeKey::random(plan.key_size)?, unused.passphrase()?);
    let volume = format::plan(&plan, &ground.device, &request.key, &key, Some(&passphrase))?;
    let case = Case::of_new_key(config, volume, request.key.clone(), container.clone());
    let case = case.named(Some(request.name.clone()), request.volume_id.clone());
    let given = Circumstances { target: request.target.as_ref(), strictness: plan.separation, in_memory: None };
    let proven = case.prove(given)?;
    // The key is this volume's before anything is written: of two hosts that attach it for the first time, one comes first.
    container.claim(&request.key.key, unused, proven.volume(), request.filling())?;
    ground.check_blank()?;
    ground.write(proven.volume())?;
    header::probe(&request.device, None)?.unlock(&passphrase)?;
    tracing::warn!("{} was blank and its key unused: formatting it", request.device.display());
    proven.record("format");
    Ok(())
}

/// Whether a link can be put there: nothing but a link is ever replaced.
fn can_lead(link: &Path) -> Result<(), Error> {
    let refused = |why: &str| Err(Error::Usage(format!("'link': {} {why}", link.display())));
    if !link.is_absolute() {
        return refused("is not an absolute path");
    }
    if !link.parent().is_some_and(Path::is_dir) {
        return refused("is in a directory that does not exist");
    }
    match fs::symlink_metadata(link) {
        Ok(there) if !there.is_symlink() => refused("exists and is not a symbolic link"),
        _ => Ok(()),
    }
}

/// Makes the link lead to the device, whatever it led to before, at once.
fn point(link: &Path, device: &Path) -> Result<(), Error> {
    let replace = || -> io::Result<()> {
        let folder = link.parent().unwrap_or(Path::new("/"));
        let new = tempfile::Builder::new().prefix(".cryptattach").make_in(folder, |path| symlink(device, path))?;
        new.persist(link).map_err(|refused| refused.error).map(drop)
    };
    replace().map_err(Error::io(format!("link {} to {}", link.display(), device.display())))
}
