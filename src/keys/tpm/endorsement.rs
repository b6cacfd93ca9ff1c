//! Endorsement keys, which a TPM's maker vouches for, and attestation keys, which say what the TPM holds.

use serde::{Deserialize, Serialize};
use tss_esapi::{
    abstraction::ek::create_ek_public_from_default_template,
    attributes::{ObjectAttributes, ObjectAttributesBuilder},
    interface_types::{
        algorithm::{AsymmetricAlgorithm, HashingAlgorithm},
        ecc::EccCurve,
        key_bits::RsaKeyBits,
    },
    structures::{
        Digest as SizedDigest, EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, Public,
        PublicEccParameters, PublicKeyRsa, PublicRsaParameters, RsaExponent, RsaScheme, SymmetricDefinitionObject,
    },
};

use super::{
    Created, Handle, SessionKind, StorageRoot, Tpm, TpmError,
    esys::{ENDORSEMENT, Esys},
    identity::P256,
};
use crate::base::key::SecretBytes;

/// Which of a TPM's endorsement keys: those of the TCG EK Credential Profile's low range, which TPMs are shipped with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndorsementKind {
    /// ECC P-256 (template L-2).
    P256,
    /// RSA 2048 (template L-1).
    Rsa2048,
}

impl EndorsementKind {
    /// All, the quicker first.
    pub const ALL: [Self; 2] = [Self::P256, Self::Rsa2048];

    /// The NV index of its certificate (TCG EK Credential Profile, section 2.2.1.4).
    pub fn certificate_index(self) -> u32 {
        match self {
            Self::P256 => 0x01C0_000A,
            Self::Rsa2048 => 0x01C0_0002,
        }
    }

    /// The public area that the TPM makes the key from: all but its `unique` is fixed by it.
    pub fn template(self) -> Result<Public, TpmError> {
        let algorithm = match self {
            Self::P256 => AsymmetricAlgorithm::Ecc,
            Self::Rsa2048 => AsymmetricAlgorithm::Rsa,
        };
        Ok(create_ek_public_from_default_template(algorithm, None)?)
    }

    /// The kind that this public area is of, if it is one of the templates but for its `unique`.
    pub fn of(public: &Public) -> Result<Option<Self>, TpmError> {
        for kind in Self::ALL {
            if with_unique_of(kind.template()?, public).as_ref() == Some(public) {
                return Ok(Some(kind));
            }
        }
        Ok(None)
    }
}

/// The template with the `unique` of a key; `None` if the key is of another type.
pub fn with_unique_of(template: Public, key: &Public) -> Option<Public> {
    match (template, key) {
        (
            Public::Ecc { object_attributes, name_hashing_algorithm, auth_policy, parameters, .. },
            Public::Ecc { unique, .. },
        ) => Some(Public::Ecc {
            object_attributes,
            name_hashing_algorithm,
            auth_policy,
            parameters,
            unique: unique.clone(),
        }),
        (
            Public::Rsa { object_attributes, name_hashing_algorithm, auth_policy, parameters, .. },
            Public::Rsa { unique, .. },
        ) => Some(Public::Rsa {
            object_attributes,
            name_hashing_algorithm,
            auth_policy,
            parameters,
            unique: unique.clone(),
        }),
        _ => None,
    }
}

/// The attributes of an attestation key. *Restricted*: it signs only what the TPM itself has made up, never a text that
/// somebody gives it.
pub fn attestation_attributes() -> Result<ObjectAttributes, TpmError> {
    Ok(ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_sign_encrypt(true)
        .build()?)
}

/// The templates of attestation keys: ECDSA on P-256, or RSASSA where a TPM does not have that curve; with SHA-256.
pub fn attestation_templates() -> Result<[Public; 2], TpmError> {
    let hash = HashScheme::new(HashingAlgorithm::Sha256);
    let (object_attributes, name_hashing_algorithm) = (attestation_attributes()?, HashingAlgorithm::Sha256);
    Ok([
        Public::Ecc {
            object_attributes,
            name_hashing_algorithm,
            auth_policy: SizedDigest::default(),
            parameters: PublicEccParameters::new(
                SymmetricDefinitionObject::Null,
                EccScheme::EcDsa(hash),
                EccCurve::NistP256,
                KeyDerivationFunctionScheme::Null,
            ),
            unique: EccPoint::default(),
        },
        Public::Rsa {
            object_attributes,
            name_hashing_algorithm,
            auth_policy: SizedDigest::default(),
            parameters: PublicRsaParameters::new(
                SymmetricDefinitionObject::Null,
                RsaScheme::RsaSsa(hash),
                RsaKeyBits::Rsa2048,
                RsaExponent::default(),
            ),
            unique: PublicKeyRsa::default(),
        },
    ])
}

impl Tpm {
    /// An endorsement key: the same one whenever it is made, for it comes from the TPM's endorsement seed.
    pub fn endorsement_key(&self, kind: EndorsementKind) -> Result<Handle<'_>, TpmError> {
        self.esys().create_primary(ENDORSEMENT, &kind.template()?)
    }

    /// The kinds of endorsement keys that this TPM can have a certificate for or, without any, can make.
    pub fn endorsement_kinds(&self) -> Result<Vec<EndorsementKind>, TpmError> {
        let mut kinds = Vec::new();
        for kind in EndorsementKind::ALL {
            if self.endorsement_certificate(kind)?.is_some() {
                kinds.push(kind);
            }
        }
        if kinds.is_empty() {
            let has_p256 = self.esys().has_curve(P256)?;
            kinds.push(if has_p256 { EndorsementKind::P256 } else { EndorsementKind::Rsa2048 });
        }
        Ok(kinds)
    }

    /// The certificate (DER) that the TPM's maker has left in the TPM, without what fills the index up behind it.
    pub fn endorsement_certificate(&self, kind: EndorsementKind) -> Result<Option<Vec<u8>>, TpmError> {
        let content = match self.esys().nv_content(kind.certificate_index()) {
            Err(TpmError::Refused { code, .. }) => {
                tracing::warn!("the NV index 0x{:08x} cannot be read: {code}", kind.certificate_index());
                None
            }
            content => content?,
        };
        let Some(content) = content else { return Ok(None) };
        let len = der_len(&content).filter(|len| *len <= content.len());
        let Some(len) = len else {
            tracing::warn!("the NV index 0x{:08x} has no certificate in DER", kind.certificate_index());
            return Ok(None);
        };
        Ok(Some(content[..len].to_vec()))
    }

    /// Makes an attestation key under the storage root key.
    pub fn create_attestation_key(&self, root: &StorageRoot<'_>) -> Result<Created, TpmError> {
        let [p256, rsa] = attestation_templates()?;
        let template = if self.esys().has_curve(P256)? { p256 } else { rsa };
        let session = self.esys().start_session(SessionKind::Hmac, Some(&root.handle))?;
        self.esys().create(&root.handle, &session, &template, None)
    }

    /// Opens a credential that was made for this endorsement key and this attestation key.
    pub fn activate_credential(
        &self,
        root: &StorageRoot<'_>,
        endorsement_key: &Handle<'_>,
        attestation_key: &Handle<'_>,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<SecretBytes, TpmError> {
        let esys: &Esys = self.esys();
        let session = esys.start_session(SessionKind::Policy, Some(&root.handle))?;
        esys.policy_endorsement(&session)?;
        esys.activate_credential(attestation_key, endorsement_key, &session, credential, secret)
    }
}

/// The length of a DER SEQUENCE with its header, as the header says it.
fn der_len(bytes: &[u8]) -> Option<usize> {
    match bytes {
        [0x30, 0x82, high, low, ..] => Some(4 + usize::from(u16::from_be_bytes([*high, *low]))),
        [0x30, 0x81, len, ..] => Some(3 + usize::from(*len)),
        [0x30, len @ 0..=0x7F, ..] => Some(2 + usize::from(*len)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_certificate_in_an_index_that_is_longer() {
        assert_eq!(der_len(&[0x30, 0x82, 1, 2, 0xFF]), Some(4 + 258));
        assert_eq!(der_len(&[0x30, 0x81, 200]), Some(203));
        assert_eq!(der_len(&[0x30, 5, 0]), Some(7));
        for wrong in [&[][..], &[0x30], &[0x10, 1, 0], &[0xFF; 8]] {
            assert_eq!(der_len(wrong), None);
        }
    }

    #[test]
    fn keys_are_of_a_template_or_not() {
        for kind in EndorsementKind::ALL {
            let mut key = kind.template().unwrap();
            assert_eq!(EndorsementKind::of(&key).unwrap(), Some(kind));
            let (Public::Ecc { object_attributes, .. } | Public::Rsa { object_attributes, .. }) = &mut key else {
                panic!()
            };
            *object_attributes = attestation_attributes().unwrap();
            assert_eq!(EndorsementKind::of(&key).unwrap(), None);
        }
    }
}
