//! Import: keep the key of a volume that another program made. The volume itself is not changed, but
//! for a token in its header, if that is asked for.

use std::path::Path;

use crate::{
    base::key::{KeyReference, SecretBytes, StoreName, VolumeKey},
    config::Config,
    unlock::{
        case::{Case, Strictness},
        container::Container,
        store_key,
    },
    verbs::error::Error,
    volumes::header::{self, PlainParameters, Volume, VolumeError},
};

/// Which volume, and what opens it now.
pub struct Request<'a> {
    /// The device or file.
    pub device: &'a Path,
    /// The store for the key; the configuration's default unless given.
    pub store: Option<StoreName>,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The volume is plain dm-crypt and looks like this.
    pub plain: Option<PlainParameters>,
    /// LUKS: a keyslot's passphrase. Plain: the volume key itself.
    pub secret: SecretBytes,
    /// Write into the LUKS2 header where the key is, so that attach and boot find it.
    pub token: bool,
    /// How strict to be about separation.
    pub separation: Strictness,
}

/// Seals and stores the volume's key; `attach --key` opens the volume with it from then on.
pub fn import(config: &Config, request: Request<'_>) -> Result<KeyReference, Error> {
    let volume = header::find(request.device, request.header, request.plain.as_ref())?;
    if request.token {
        volume.takes_token()?;
    }
    let store_name = config.store_or_default(request.store.as_ref())?;
    let container = Container::open(config, &store_name, None)?;
    let reference = container.new_reference()?;
    let case = Case::new(config, &container, &reference, &volume);
    let prepare = || -> Result<_, Error> {
        let report = case.separate(None, request.separation)?;
        let key = volume_key(&volume, request.secret)?;
        volume.verify_key(&key)?;
        Ok((report, key))
    };
    let (report, key) = prepare().inspect_err(|_| container.store().abandon(&reference.key))?;
    store_key::store_key(&container, &reference, &volume, key, None)?;
    if request.token {
        volume.write_token(&reference)?;
    }
    case.record("import", &report);
    Ok(reference)
}

fn volume_key(volume: &Volume, secret: SecretBytes) -> Result<VolumeKey, VolumeError> {
    match volume.luks() {
        Some(_) => volume.open_keyslot(&secret),
        None => {
            VolumeKey::from_secret(secret).ok_or_else(|| VolumeError::WrongKey { path: volume.device.path.clone() })
        }
    }
}
