//! Release: the passphrase of a compatible volume, for programs that know passphrases only. It takes the same way as
//! [`crate::verbs::attach`]: the header is checked, key and data are apart, the key is for this volume.

use std::path::Path;

use crate::{
    base::key::{KeyReference, SecretBytes},
    config::Config,
    keys::seal::{Content, Opened},
    unlock::{
        self,
        case::{self, Case, Strictness},
        container::{Container, Fetched},
    },
    verbs::error::Error,
    volumes::header,
};

/// For which volume.
pub struct Request<'a> {
    /// The device or file.
    pub device: &'a Path,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
}

/// The passphrase of the volume's keyslot.
pub fn release(config: &Config, request: Request<'_>) -> Result<SecretBytes, Error> {
    let volume = header::probe(request.device, request.header)?;
    let reference = case::reference(request.key, &volume)?;
    let container = Container::open(config, &reference.store, None)?.as_one().lockbox_first();
    let case = Case::new(config, &container, &reference, &volume);
    let report = case.separate(None, Strictness::default())?;
    let passphrase = match container.fetch(&reference.key, Some(volume.uuid()))? {
        Fetched::Sealed(Opened { content: Content::VolumeKey(payload), .. }) => {
            case::fit(&reference, &payload, &volume)?;
            payload.passphrase.ok_or_else(|| unlock::Error::NoPassphrase(reference.clone()))?
        }
        object => {
            case::spend(&container, &reference, &object, &volume);
            object.passphrase()?.ok_or_else(|| unlock::Error::NoPassphrase(reference.clone()))?
        }
    };
    case.record("release", &report);
    Ok(passphrase)
}
