//! Release: the passphrase of a compatible volume, for programs that know passphrases only. It takes the same way as
//! [`crate::verbs::attach`]: the header is checked, key and data are apart, the key is for this volume.

use std::path::Path;

use crate::{
    base::key::{KeyReference, SecretBytes},
    config::Config,
    unlock::{
        case::{Asked, Case, Circumstances},
        container::{Container, Use},
    },
    verbs::error::Error,
    volumes::header,
};

/// For which volume.
pub struct Request<'a> {
    pub device: &'a Path,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
}

/// The passphrase of the volume's keyslot.
pub fn release(config: &Config, request: Request<'_>) -> Result<SecretBytes, Error> {
    let volume = header::probe(request.device, request.header)?;
    let asked = Asked { key: request.key, ..Asked::default() };
    let proven = Case::find(config, volume, asked)?.prove(Circumstances::default())?;
    let passphrase = proven.passphrase()?;
    proven.record("release");
    Ok(passphrase)
}

/// The passphrase of a key, whichever volume it is for.
pub fn of_key(config: &Config, key: &KeyReference) -> Result<SecretBytes, Error> {
    let container = Container::open(config, &key.store, None, Use::Keys)?;
    Ok(container.give_out(&key.key)?.passphrase()?)
}
