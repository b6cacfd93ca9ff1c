//! Key files: a keyslot's passphrase as a person or a program has written it.

use crate::{
    base::key::{SecretBytes, VolumeKey},
    verbs::error::Error,
    volumes::header::{Volume, VolumeError},
};

/// Opens a keyslot with what a key file has: every byte counts, as for cryptsetup. If that opens none, without the newline at its
/// end, which editors and echo(1) add, and which clevis leaves out: then the secret is without it, too.
pub fn open(volume: &Volume, secret: &mut SecretBytes) -> Result<VolumeKey, Error> {
    match volume.open_keyslot(secret) {
        Err(VolumeError::WrongPassphrase { .. }) if secret.expose().ends_with(b"\n") => {
            secret.truncate(secret.len() - 1);
            let key = volume.open_keyslot(secret)?;
            tracing::warn!("the key file ends with a newline that is no part of the passphrase; it was left out");
            Ok(key)
        }
        opened => Ok(opened?),
    }
}
