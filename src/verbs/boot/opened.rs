//! What a boot has opened: whether that is this host's own, and how it is measured.

use openssl::{error::ErrorStack, hash::MessageDigest, pkey::PKey, sign::Signer};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{key_source::OpenedBy, volumes::FoundVolume};
use crate::{
    base::{hex, key::VolumeKey, mapping_name::MappingName},
    volumes::{Authority, Unlocked},
};

/// A volume that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub by: OpenedBy,
    pub evidence: Evidence,
}

/// What is known of an attached volume besides. Nothing of one that another program has attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
    /// It is this host's own volume, not only one that has its UUID.
    pub proven: bool,
    /// What is measured of it: see [`identity`].
    pub measured: Option<String>,
    /// The digest of its volume key, as its header spells it.
    pub header: Option<String>,
}

impl Evidence {
    /// Of a volume that this boot has unlocked.
    pub fn of(unlocked: &Unlocked, found: &FoundVolume) -> Self {
        match identity(found.name(), unlocked.volume().uuid(), unlocked.key()) {
            Ok(measured) => Self {
                proven: is_proven(unlocked.by(), found.is_pinned()),
                measured: Some(measured),
                header: unlocked.volume().luks().map(|luks| luks.digest.clone()),
            },
            Err(error) => {
                tracing::warn!("{} cannot be measured: {error}", found.name());
                Self::default()
            }
        }
    }
}

/// Whether it is this host's own volume that was unlocked.
///
/// The key that was sealed for the volume opens no volume of somebody else's. A passphrase that a person types, or a key that
/// is sealed for no volume or not at all, may be that of another volume with the same UUID, unless this host has pinned the volume's digest.
fn is_proven(by: &Authority, is_pinned: bool) -> bool {
    match by {
        Authority::SealedKey(_) => true,
        Authority::ReleasedKey(_) | Authority::Passphrase => is_pinned,
    }
}

/// "cryptsetup:NAME:UUID:HMAC". The HMAC, by the volume key of what stands before it, is what systemd measures of a volume
/// (`tpm2-measure-pcr=` in crypttab(5)): it tells the volume key from any other, and does not tell the key.
fn identity(name: &MappingName, uuid: Option<Uuid>, key: &VolumeKey) -> Result<String, ErrorStack> {
    // As systemd's xescape() does with what it joins by colons. A name has no other byte to be escaped.
    let name = name.as_str().replace(':', "\\x3a");
    let volume = format!("cryptsetup:{name}:{}", uuid.map(|uuid| uuid.to_string()).unwrap_or_default());
    let key = PKey::hmac(key.expose())?;
    let mut signer = Signer::new(MessageDigest::sha256(), &key)?;
    signer.update(volume.as_bytes())?;
    let mac = signer.sign_to_vec()?;
    Ok(format!("{volume}:{}", hex::encode(&mac)))
}

/// What PCR 15 is extended by at the end of a boot: a word for each planned volume.
pub fn event<'a>(volumes: impl Iterator<Item = (&'a MappingName, Option<&'a Evidence>)>) -> String {
    let word = |(name, evidence): (&MappingName, Option<&Evidence>)| match evidence.and_then(|is| is.measured.as_ref())
    {
        Some(measured) => format!(" {measured}"),
        None => format!(" unknown:{name}"),
    };
    format!("cryptattach: this boot has opened{}", volumes.map(word).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::key::SecretBytes;

    #[test]
    fn a_passphrase_proves_a_pinned_volume_only_and_a_sealed_key_any() {
        let key = "a/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().unwrap();
        let sealed = Authority::SealedKey(key);
        assert!(is_proven(&sealed, false) && is_proven(&Authority::Passphrase, true));
        assert!(!is_proven(&Authority::Passphrase, false));
    }

    /// `printf cryptsetup:a\\x3ab:... | openssl dgst -sha256 -mac hmac -macopt hexkey:0001...3f`
    #[test]
    fn a_volume_is_measured_as_systemd_measures_it() {
        let bytes: Vec<u8> = (0..64).collect();
        let key = VolumeKey::from_secret(SecretBytes::copy_of(&bytes).unwrap()).unwrap();
        let measured = identity(&"a:b".parse().unwrap(), Some(Uuid::nil()), &key).unwrap();
        let mac = "4b4f465fa20069659c6b9acc6bcbc17cc9fd4fccb9379dd2dad0efdb31e1373e";
        assert_eq!(measured, format!("cryptsetup:a\\x3ab:00000000-0000-0000-0000-000000000000:{mac}"));
    }

    #[test]
    fn what_was_not_opened_is_measured_as_unknown() {
        let (root, data): (MappingName, MappingName) = ("root".parse().unwrap(), "data".parse().unwrap());
        let evidence = Evidence { proven: true, measured: Some("cryptsetup:root:1:2".to_owned()), header: None };
        let other = Evidence::default();
        let event = event([(&root, Some(&evidence)), (&data, None), (&data, Some(&other))].into_iter());
        assert_eq!(event, "cryptattach: this boot has opened cryptsetup:root:1:2 unknown:data unknown:data");
    }
}
