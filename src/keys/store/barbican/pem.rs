//! Keys and certificates: castellan hands them on as DER, and its driver keeps them in Barbican as PEM. So do we: each reads
//! the other's.

use openssl::{error::ErrorStack, pkey::PKey, x509::X509};
use zeroize::Zeroizing;

use crate::base::key::{ObjectKind, SecretBytes, SecretMemoryError};

/// A value that is not what its type says.
#[derive(Debug, thiserror::Error)]
pub(super) enum PemError {
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

/// The value of what Barbican keeps. What is no PEM is handed on as it is.
pub(super) fn from_pem(kind: ObjectKind, kept: SecretBytes) -> Result<SecretBytes, PemError> {
    let pem = kept.expose();
    if !pem.starts_with(b"-----BEGIN ") {
        return Ok(kept);
    }
    let der = match kind {
        // Without the callback OpenSSL asks the terminal for the passphrase of an encrypted key.
        ObjectKind::Private => {
            PKey::private_key_from_pem_callback(pem, |_| Ok(0)).and_then(|key| key.private_key_to_pkcs8())
        }
        ObjectKind::Public => PKey::public_key_from_pem(pem).and_then(|key| key.public_key_to_der()),
        ObjectKind::Certificate => X509::from_pem(pem).and_then(|certificate| certificate.to_der()),
        ObjectKind::Symmetric | ObjectKind::Passphrase | ObjectKind::Opaque => return Ok(kept),
    };
    secret(der, kind, "PEM")
}

fn secret(bytes: Result<Vec<u8>, ErrorStack>, kind: ObjectKind, form: &'static str) -> Result<SecretBytes, PemError> {
    let bytes = Zeroizing::new(bytes.map_err(|_| PemError::Value(kind, form))?);
    Ok(SecretBytes::copy_of(&bytes)?)
}
