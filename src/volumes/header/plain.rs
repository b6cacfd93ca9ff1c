//! Plain dm-crypt: no header, the key is all there is.

use either::Either;
use libcryptsetup_rs::{CryptInit, CryptParamsPlain, CryptParamsPlainRef, consts::vals::EncryptionFormat};

use super::{CIPHER, HeaderImage, VolumeError, library};
use crate::{
    base::{
        key::{KeySize, SecretBytes, VolumeKey},
        plain_hash::PlainHash,
    },
    sys::device::{Device, DeviceError},
};

/// The key that libcryptsetup makes of the passphrase.
pub fn key_of(
    passphrase: &SecretBytes,
    hash: PlainHash,
    size: KeySize,
    device: &Device,
) -> Result<VolumeKey, VolumeError> {
    let failed = |source| VolumeError::Library { action: "make the key of", path: device.path.clone(), source };
    // It wants a device, and looks at its size only.
    let stand_in = HeaderImage::empty(1 << 20).map_err(DeviceError::io("make a key for", &device.path))?;
    let mut key = SecretBytes::zeroed(size.bytes())?;
    library::call(|| {
        let mut context = CryptInit::init(&stand_in.path())?;
        let hash = match hash {
            PlainHash::Ripemd160 => "ripemd160",
            PlainHash::Sha256 => "sha256",
        };
        let parameters = CryptParamsPlain { hash: hash.to_owned(), offset: 0, sector_size: 512, size: 0, skip: 0 };
        let mut parameters: CryptParamsPlainRef<'_> = (&parameters).try_into()?;
        let cipher = CIPHER.split_once('-').unwrap_or_default();
        let length = Either::Right(size.bytes());
        context.context_handle().format(EncryptionFormat::Plain, cipher, None, length, Some(&mut parameters))?;
        context.volume_key_handle().get(None, key.expose_mut(), Some(passphrase.expose()))
    })
    .map_err(failed)?;
    VolumeKey::from_secret(key).ok_or_else(|| VolumeError::WrongKey { path: device.path.clone() })
}
