//! A volume with the key that opens it. Backends map nothing else.

use super::{
    header::{Volume, VolumeError},
    separation::Separated,
};
use crate::base::key::{KeyReference, SecretBytes, VolumeKey};

/// A volume and its key.
///
/// A person's passphrase that opens a keyslot makes one ([`Unlocked::by_passphrase`]); a stored key makes one only together
/// with the proof that it rests apart from this very volume. So nobody maps a volume with a key that was not proven:
///
/// ```compile_fail,E0451
/// # use cryptattach::{base::key::VolumeKey, volumes::{Unlocked, header::Volume}};
/// fn unproven(volume: Volume, key: VolumeKey) -> Unlocked {
///     Unlocked { volume, key, by: cryptattach::volumes::Authority::Passphrase } // the members are private
/// }
/// ```
///
/// ```compile_fail,E0308
/// # use cryptattach::volumes::{backend::{Activate, Backend}, header::Volume};
/// fn map_without_proof(backend: &dyn Backend, volume: &Volume, options: &Activate) {
///     backend.activate(volume, options); // a backend takes `Unlocked` only
/// }
/// ```
pub struct Unlocked {
    volume: Volume,
    key: VolumeKey,
    by: Authority,
}

/// What has unlocked a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// A sealed key, opened on this host.
    SealedKey(KeyReference),
    /// A key that the store keeps unsealed, and has released.
    ReleasedKey(KeyReference),
    /// A passphrase that a person typed.
    Passphrase,
}

impl Unlocked {
    /// Opens a keyslot with a person's passphrase.
    pub fn by_passphrase(volume: &Volume, passphrase: &SecretBytes) -> Result<Self, VolumeError> {
        let key = volume.open_keyslot(passphrase)?;
        Ok(Self { volume: volume.clone(), key, by: Authority::Passphrase })
    }

    /// The key that a store had, with the proof that it rests apart from this volume.
    pub(crate) fn by_stored_key(
        proof: &Separated,
        volume: &Volume,
        key: VolumeKey,
        by: Authority,
    ) -> Result<Self, VolumeError> {
        let path = volume.device.path.clone();
        if proof.report().device != path {
            return Err(VolumeError::OtherProof { proven: proof.report().device.clone(), path });
        }
        Ok(Self { volume: volume.clone(), key, by })
    }

    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Its key.
    pub fn key(&self) -> &VolumeKey {
        &self.key
    }

    /// What has unlocked it.
    pub fn by(&self) -> &Authority {
        &self.by
    }
}
