//! Keys and certificates: castellan hands them on as DER, and its driver keeps them in Barbican as PEM. So do we: each reads
//! the other's.

use openssl::{error::ErrorStack, pkey::PKey, x509::X509};
use zeroize::Zeroizing;

use crate::base::key::{ObjectKind, SecretBytes, SecretMemoryError};

/// A value that is not what its type says.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    #[error("the value does not fit its type ({0} in {1})")]
    Value(ObjectKind, &'static str),
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

/// What Barbican is to keep of a value; `None` if that is the value itself.
pub(super) fn to_pem(kind: ObjectKind, value: &SecretBytes) -> Result<Option<SecretBytes>, PemError> {
    let der = value.expose();
    let pem = match kind {
        ObjectKind::Private => PKey::private_key_from_der(der).and_then(|key| key.private_key_to_pem_pkcs8()),
        ObjectKind::Public => PKey::public_key_from_der(der).and_then(|key| key.public_key_to_pem()),
        ObjectKind::Certificate => X509::from_der(der).and_then(|certificate| certificate.to_pem()),
        ObjectKind::Symmetric | ObjectKind::Passphrase | ObjectKind::Opaque => return Ok(None),
    };
    secret(pem, kind, "DER").map(Some)
}

/// The value of what Barbican keeps, or of what a program hands in. Words before the PEM are let pass, as `openssl x509 -text`
/// writes them. Some programs keep DER; anything else is refused.
pub fn from_pem(kind: ObjectKind, kept: SecretBytes) -> Result<SecretBytes, PemError> {
    let bytes = kept.expose();
    let der = match kind {
        ObjectKind::Symmetric | ObjectKind::Passphrase | ObjectKind::Opaque => return Ok(kept),
        _ if is_der(kind, bytes) => return Ok(kept),
        // Without the callback OpenSSL asks the terminal for the passphrase of an encrypted key.
        ObjectKind::Private => {
            PKey::private_key_from_pem_callback(bytes, |_| Ok(0)).and_then(|key| key.private_key_to_pkcs8())
        }
        ObjectKind::Public => PKey::public_key_from_pem(bytes).and_then(|key| key.public_key_to_der()),
        ObjectKind::Certificate => X509::from_pem(bytes).and_then(|certificate| certificate.to_der()),
    };
    secret(der, kind, "PEM")
}

fn is_der(kind: ObjectKind, bytes: &[u8]) -> bool {
    match kind {
        ObjectKind::Private => PKey::private_key_from_der(bytes).is_ok(),
        ObjectKind::Public => PKey::public_key_from_der(bytes).is_ok(),
        ObjectKind::Certificate => X509::from_der(bytes).is_ok(),
        ObjectKind::Symmetric | ObjectKind::Passphrase | ObjectKind::Opaque => false,
    }
}

fn secret(bytes: Result<Vec<u8>, ErrorStack>, kind: ObjectKind, form: &'static str) -> Result<SecretBytes, PemError> {
    let bytes = Zeroizing::new(bytes.map_err(|_| PemError::Value(kind, form))?);
    Ok(SecretBytes::copy_of(&bytes)?)
}

#[cfg(test)]
mod tests {
    use openssl::{
        asn1::Asn1Time,
        ec::{EcGroup, EcKey},
        hash::MessageDigest,
        nid::Nid,
    };

    use super::*;

    #[test]
    fn pem_with_words_before_it_is_read_and_other_text_refused() {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let mut made = X509::builder().unwrap();
        made.set_pubkey(&key).unwrap();
        made.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        made.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
        made.sign(&key, MessageDigest::sha256()).unwrap();
        let made = made.build();
        let of = |kind, kept: &[u8]| from_pem(kind, SecretBytes::copy_of(kept).unwrap());
        for (kind, pem, der) in [
            (ObjectKind::Certificate, made.to_pem(), made.to_der()),
            (ObjectKind::Private, key.private_key_to_pem_pkcs8(), key.private_key_to_pkcs8()),
            (ObjectKind::Public, key.public_key_to_pem(), key.public_key_to_der()),
        ] {
            let (pem, der) = (pem.unwrap(), der.unwrap());
            let with_words = [b"Certificate:\n    Data:\n        Version: 3 (0x2)\n".as_slice(), &pem].concat();
            for kept in [&pem, &with_words, &der] {
                assert_eq!(of(kind, kept).unwrap().expose(), der, "{kind}");
            }
            for wrong in [b"no PEM".as_slice(), b"", b"-----BEGIN CERTIFICATE-----\n"] {
                assert!(matches!(of(kind, wrong), Err(PemError::Value(..))), "{kind}");
            }
        }
        assert_eq!(of(ObjectKind::Opaque, b"no PEM").unwrap().expose(), b"no PEM");
    }
}
