//! Resize: make a mapping as large as its device has become.

use std::path::Path;

use crate::{
    base::{
        key::{KeyReference, SecretBytes},
        mapping_name::MappingName,
    },
    config::Config,
    unlock::{case, container::Container},
    verbs::{detach, error::Error},
    volumes::{
        backend,
        header::{self, PlainParameters},
    },
};

/// Which mapping.
pub struct Request<'a> {
    /// Its name.
    pub name: &'a MappingName,
    /// The volume's key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// The token of a hook's caller.
    pub caller: Option<SecretBytes>,
}

/// Resizes the mapping; its new size in bytes.
pub fn resize(config: &Config, request: Request<'_>) -> Result<u64, Error> {
    let status = detach::status(request.name)?;
    let backend = backend::of(status.backend)?;
    let volume = header::find(&status.source, request.header, request.plain.as_ref())?;
    let reference = case::reference(request.key, &volume)?;
    let container = Container::open(config, &reference.store, request.caller)?.lockbox_first();
    // dm-crypt's new table needs the key again: it is in the keyring of the process that attached the volume.
    let key = case::open(&container, &reference, &volume)?;
    Ok(backend.resize(request.name, &volume, &key)?)
}
