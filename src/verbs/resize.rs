//! Resize: make a mapping as large as its device has become.

use std::path::Path;

use crate::{
    base::{key::KeyReference, mapping_name::MappingName},
    config::Config,
    unlock::{
        case::{Asked, Case, Circumstances, Strictness},
        tenant::Tenant,
    },
    verbs::{detach, error::Error},
    volumes::{
        backend::Backends,
        header::{self, PlainParameters},
        separation::Target,
    },
};

/// Which mapping.
pub struct Request<'a> {
    pub name: &'a MappingName,
    /// The volume's key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// How strict to be about separation.
    pub separation: Strictness,
    /// On whose behalf a hook asks.
    pub tenant: Option<Tenant>,
    /// Who serves the volume, if the caller knows it.
    pub target: Option<&'a Target>,
}

/// Resizes the mapping; its new size in bytes.
pub fn resize(config: &Config, backends: &dyn Backends, request: Request<'_>) -> Result<u64, Error> {
    let status = detach::status(backends, request.name)?;
    let backend = backends.of(status.backend)?;
    let volume = header::find(&status.source, request.header, request.plain.as_ref())?;
    let given = Circumstances { target: request.target, strictness: request.separation, in_memory: None };
    let asked = Asked { key: request.key, tenant: request.tenant, ..Asked::default() };
    // dm-crypt's new table needs the key again: it is in the keyring of the process that attached the volume.
    let proven = Case::find(config, volume, asked)?.prove(given)?;
    Ok(backend.resize(request.name, &proven.key()?)?)
}
