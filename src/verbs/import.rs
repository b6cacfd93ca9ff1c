//! Import: keep the key of a volume that another program made. The volume itself is not changed, but
//! for a token in its header, if that is asked for.

use std::{path::Path, sync::Arc};

use crate::{
    base::key::{KeyReference, SecretBytes, StoreName, VolumeKey},
    config::Config,
    sys::terminal,
    unlock::{
        case::{Case, Circumstances, Strictness},
        container::{Container, Use},
    },
    verbs::{clevis, error::Error, key_file},
    volumes::header::{self, PlainParameters, Volume, VolumeError},
};

/// Which volume, and what opens it now.
pub struct Request<'a> {
    pub device: &'a Path,
    /// The store for the key; the configuration's default unless given.
    pub store: Option<StoreName>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// LUKS: a keyslot's passphrase. Plain: the volume key itself. If there is none, a token of clevis has the passphrase, or the
    /// person at the terminal.
    pub secret: Option<SecretBytes>,
    /// Write into the LUKS2 header where the key is, so that attach and boot find it.
    pub token: bool,
    /// How strict to be about separation.
    pub separation: Strictness,
    /// Hears of the key before it is stored: a run that is killed after that leaves a key that nothing names.
    pub announce: &'a dyn Fn(&KeyReference) -> Result<(), Error>,
}

/// Seals and stores the volume's key; `attach --key` opens the volume with it from then on.
pub fn import(config: &Config, request: Request<'_>) -> Result<KeyReference, Error> {
    let volume = header::find(request.device, request.header, request.plain.as_ref())?;
    if request.token {
        volume.takes_token()?;
    }
    let store_name = config.store_or_default(request.store.as_ref())?;
    let container = Arc::new(Container::open(config, &store_name, None, Use::Keys)?);
    let reference = container.new_reference()?;
    let prepare = || -> Result<_, Error> {
        let case = Case::of_new_key(config, volume, reference.clone(), container.clone());
        let proven = case.prove(Circumstances { strictness: request.separation, ..Circumstances::default() })?;
        let key = match request.secret {
            Some(secret) => volume_key(proven.volume(), secret)?,
            None if proven.volume().luks().is_some_and(|header| header.clevis.is_empty()) => {
                let question = format!("passphrase of {}: ", request.device.display());
                // Without a terminal there is nobody to ask.
                let answer = terminal::ask(&question, &|| false).ok().flatten();
                volume_key(proven.volume(), answer.ok_or_else(|| Error::NoClevis(request.device.to_owned()))?)?
            }
            None => clevis::open(config, proven.volume())?.volume_key,
        };
        proven.volume().verify_key(&key)?;
        (request.announce)(&reference)?;
        Ok((proven, key))
    };
    let (proven, key) = prepare().inspect_err(|_| container.store().abandon(&reference.key))?;
    proven.store_key(key, None)?;
    if request.token {
        proven.volume().write_token(&reference)?;
    }
    proven.record("import");
    Ok(reference)
}

fn volume_key(volume: &Volume, mut secret: SecretBytes) -> Result<VolumeKey, Error> {
    if volume.luks().is_none() {
        let key = VolumeKey::from_secret(secret);
        return Ok(key.ok_or_else(|| VolumeError::WrongKey { path: volume.device.path.clone() })?);
    }
    key_file::open(volume, &mut secret)
}
