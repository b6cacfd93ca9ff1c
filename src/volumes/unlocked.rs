//! A volume with the key that opens it. Backends map nothing else.

use super::{
    header::{Volume, VolumeError},
    separation::Separated,
};
use crate::{
    base::key::{KeyReference, SecretBytes, VolumeKey},
    sys::device::DeviceError,
};

/// A volume and its key.
///
/// A person's passphrase that opens a keyslot makes one ([`Unlocked::by_passphrase`]); a stored key makes one only together
/// with the proof that it rests apart from this very volume, and only if it is the key of that. So nobody maps a volume with
/// a key that was not proven:
///
/// ```compile_fail,E0451
/// # use cryptattach::{base::key::VolumeKey, volumes::{Unlocked, header::Volume}};
/// fn unproven(volume: Volume, key: VolumeKey) -> Unlocked {
///     Unlocked { volume, key, by: cryptattach::volumes::Authority::Passphrase, rest: None } // the members are private
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
    /// The old key, if and only if a part of the volume has that.
    rest: Option<Rest>,
}

/// What opens the part of a volume that has the old key yet.
pub struct Rest {
    pub unlocked: Box<Unlocked>,
    /// It opens a keyslot of each key: by that libcryptsetup has both.
    pub passphrase: SecretBytes,
}

/// What has unlocked a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    /// A sealed key, opened on this host.
    SealedKey(KeyReference),
    /// A key that says nothing of a volume: the store keeps it unsealed, or it is sealed for whatever it is used for.
    ReleasedKey(KeyReference),
    /// A passphrase that a person typed.
    Passphrase,
}

impl Unlocked {
    /// Opens a keyslot with a person's passphrase.
    pub fn by_passphrase(volume: &Volume, passphrase: &SecretBytes) -> Result<Self, VolumeError> {
        let key = volume.open_keyslot(passphrase)?;
        Self { volume: volume.clone(), key, by: Authority::Passphrase, rest: None }.checked()
    }

    /// The key that a store had, with the proof that it rests apart from this volume: the proof says which key that is, and
    /// on which device. The header says whether it is the volume's.
    pub(crate) fn by_stored_key(
        proof: &Separated,
        volume: &Volume,
        key: VolumeKey,
        by: fn(KeyReference) -> Authority,
        rest: Option<Rest>,
    ) -> Result<Self, VolumeError> {
        if !proof.is_of(&volume.device) {
            let (path, proven) = (volume.device.path.clone(), proof.report().device.clone());
            return Err(VolumeError::OtherProof { path, proven });
        }
        volume.verify_key(&key)?;
        Self { volume: volume.clone(), key, by: by(proof.key().clone()), rest }.checked()
    }

    /// The same volume with the same keys, by the header that its device has now: the stretch is recovered in which a run
    /// was killed.
    pub(crate) fn recovered(self, volume: Volume) -> Result<Self, VolumeError> {
        if volume.device.identity != self.volume.device.identity {
            return Err(DeviceError::Replaced(volume.device.path).into());
        }
        volume.verify_key(&self.key)?;
        let rest = self.rest.filter(|_| volume.rest.is_some());
        Self { volume, rest, ..self }.checked()
    }

    /// Nobody has a volume of two keys with one of them.
    fn checked(self) -> Result<Self, VolumeError> {
        let fits = match (&self.volume.rest, &self.rest) {
            (Some(rest), Some(Rest { unlocked, .. })) => {
                let digest = |volume: &Volume| volume.luks().map(|luks| luks.digest.clone());
                digest(&rest.volume) == digest(&unlocked.volume) && self.key.size() == unlocked.key.size()
            }
            (None, None) => true,
            _ => false,
        };
        if fits { Ok(self) } else { Err(VolumeError::TwoKeys { path: self.volume.device.path }) }
    }

    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Its key.
    pub fn key(&self) -> &VolumeKey {
        &self.key
    }

    /// The old key, of the part that [`Volume::rest`] names, and the passphrase of both keys' keyslots.
    pub fn rest(&self) -> Option<(&VolumeKey, &SecretBytes)> {
        self.rest.as_ref().map(|rest| (&rest.unlocked.key, &rest.passphrase))
    }

    /// What has unlocked it.
    pub fn by(&self) -> &Authority {
        &self.by
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{
        base::{
            key::{KeySize, Place},
            plain_hash::PlainHash,
        },
        config::SeparationPolicy,
        volumes::{
            header::{self, PlainParameters, SectorSize},
            separation::{self, Surroundings},
        },
    };

    fn volume(path: &Path) -> Volume {
        let parameters = PlainParameters {
            key_size: KeySize::Bits256,
            sector_size: SectorSize::B512,
            offset_sectors: 0,
            skip_sectors: 0,
            hash: PlainHash::Sha256,
        };
        header::plain(path, &parameters).unwrap()
    }

    #[test]
    fn a_proof_is_of_one_device_and_one_key_and_the_key_is_the_volumes() {
        let folder = tempfile::tempdir().unwrap();
        let [path, other] = ["volume", "other"].map(|name| folder.path().join(name));
        [&path, &other].iter().for_each(|path| fs::write(path, vec![0; 1 << 20]).unwrap());
        let reference: KeyReference = "s/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().unwrap();
        let places = [Place::path("sealed key", "/dev/shm", true)];
        let prove = |volume: &Volume| {
            let policy = SeparationPolicy::Warn;
            separation::prove(volume, &reference, &places, &Surroundings::default(), policy)
        };
        let key = |bytes| VolumeKey::from_secret(SecretBytes::random(bytes).unwrap()).unwrap();
        let proven = volume(&path);
        let proof = prove(&proven).unwrap();

        let unlocked = Unlocked::by_stored_key(&proof, &proven, key(32), Authority::SealedKey, None).unwrap();
        assert_eq!(unlocked.by(), &Authority::SealedKey(reference.clone()));
        let unlock =
            |volume: &Volume, key| Unlocked::by_stored_key(&proof, volume, key, Authority::SealedKey, None).err();
        assert!(matches!(unlock(&volume(&other), key(32)), Some(VolumeError::OtherProof { .. })));
        assert!(matches!(unlock(&proven, key(64)), Some(VolumeError::WrongKey { .. })));

        // The same path, another device there now.
        fs::rename(&other, &path).unwrap();
        assert!(matches!(unlock(&volume(&path), key(32)), Some(VolumeError::OtherProof { .. })));
        let refused = prove(&proven).unwrap_err();
        assert!(matches!(refused.refusal, separation::Refusal::Exchanged(_)));
        assert!(refused.overridden(|_| Ok::<_, separation::Refusal>(())).is_err());
    }
}
