//! Attach: find the volume's key, prove that it rests elsewhere, open it, map the volume.

use std::path::Path;

use crate::{
    base::{key::KeyReference, mapping_name::MappingName},
    config::Config,
    unlock::{
        case::{Asked, Case, Circumstances, Strictness},
        container::Source,
        tenant::Tenant,
    },
    verbs::{error::Error, metrics, rotate},
    volumes::{
        backend::{Activate, BackendKind, Backends, ExportKind, Mapping},
        header::{self, PlainParameters, Volume},
        separation::Target,
    },
};

/// What to attach, and how.
pub struct Request<'a> {
    /// The encrypted device or file.
    pub device: &'a Path,
    /// The mapping's name; `luks-UUID` unless given.
    pub name: Option<MappingName>,
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// The backend; the best that there is unless given.
    pub backend: Option<BackendKind>,
    /// How to map.
    pub options: Options,
    /// How strict to be about separation.
    pub separation: Strictness,
    /// On whose behalf a hook asks.
    pub tenant: Option<Tenant>,
    /// Who serves the volume, if the caller knows it.
    pub target: Option<Target>,
    /// What the caller calls the volume, for the audit record.
    pub volume_id: Option<&'a str>,
    /// The caller is going to fill the whole volume anew.
    pub fills: bool,
}

/// Options of the mapping; see [`Activate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// No writes.
    pub read_only: bool,
    /// How the userspace backend exports it.
    pub export: Option<ExportKind>,
    /// Pass discards on.
    pub allow_discards: bool,
    /// No work queue for reads.
    pub no_read_workqueue: bool,
    /// No work queue for writes.
    pub no_write_workqueue: bool,
}

/// Attaches a volume.
pub fn attach(config: &Config, backends: &dyn Backends, request: Request<'_>) -> Result<Mapping, Error> {
    metrics::counted(config, |source| map(config, backends, request, source))
}

/// The same, not counted; `source` is what gave the key.
pub(super) fn map(
    config: &Config,
    backends: &dyn Backends,
    request: Request<'_>,
    source: &mut Option<Source>,
) -> Result<Mapping, Error> {
    let volume = match &request.tenant {
        None => rotate::find_to_map(config, request.device, request.header, request.plain.as_ref())?,
        // Keys of tenants are not rotated.
        Some(_) => header::find(request.device, request.header, request.plain.as_ref())?,
    };
    let options = activation(&request, &volume)?;
    let backend = backends.choose(backend_kind(&request)?, &volume.device)?;
    let active = backend.active(&volume, &options)?;
    let active = match (active, &request.tenant) {
        (Some(mapping), None) if is_of_token(&request, &volume) => return Ok(mapping),
        (active, _) => active,
    };
    let Request { key, tenant, volume_id, fills, .. } = request;
    let (name, volume_id) = (Some(options.name.clone()), volume_id.map(str::to_owned));
    let asked = Asked { key, tenant, name, volume_id, fills, warm: true };
    let given = Circumstances { target: request.target.as_ref(), strictness: request.separation, in_memory: None };
    let case = Case::find(config, volume, asked)?;
    let from = if case.needs_store() { Source::Store } else { Source::Lockbox };
    let proven = case.prove(given)?;
    let key = proven.key()?;
    // A tenant is told of a mapping only if the volume's key is the tenant's, and whoever asks for a key if it opens the volume.
    if let Some(mapping) = active {
        return Ok(mapping);
    }
    *source = Some(from);
    let key = rotate::recovered(config, key, options.read_only)?;
    let mapping = backend.activate(&key, &options)?;
    proven.record("attach");
    Ok(mapping)
}

/// Whether nothing speaks against the key that is asked for: the volume names no other one. If it does, the key has to open it.
fn is_of_token(request: &Request<'_>, volume: &Volume) -> bool {
    let named = volume.reference();
    request.key.clone().is_none_or(|key| named.is_none_or(|named| *named == volume.current(key)))
}

/// The backend that is asked for; an export is the userspace backend's.
fn backend_kind(request: &Request<'_>) -> Result<Option<BackendKind>, Error> {
    match (request.backend, request.options.export) {
        (Some(BackendKind::DmCrypt), Some(_)) => {
            Err(Error::Usage("--export needs the userspace backend: dm-crypt makes a block device itself".to_owned()))
        }
        (None, Some(_)) => Ok(Some(BackendKind::Userspace)),
        (asked, _) => Ok(asked),
    }
}

fn activation(request: &Request<'_>, volume: &Volume) -> Result<Activate, Error> {
    let name = match (&request.name, volume.uuid()) {
        (Some(name), _) => name.clone(),
        // The name that udisks and dracut give to a LUKS volume.
        (None, Some(uuid)) => format!("luks-{uuid}").parse()?,
        (None, None) => return Err(Error::NoName(volume.device.path.clone())),
    };
    let Options { read_only, export, allow_discards, no_read_workqueue, no_write_workqueue } = request.options;
    let read_only = read_only || volume.device.read_only;
    Ok(Activate { name, read_only, export, allow_discards, no_read_workqueue, no_write_workqueue })
}
