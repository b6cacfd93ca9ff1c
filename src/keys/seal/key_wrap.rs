//! AES key wrap with a 256-bit key (RFC 3394; `A256KW` in RFC 7518 section 4.4).

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    cipher::Cipher,
    cipher_ctx::{CipherCtx, CipherCtxFlags},
};
use serde_json::{Value, json};

use super::{ContentKey, SealError, members};
use crate::base::key::{JoseHeader, JweRecipient, SecretBytes};

/// Value of `alg`.
pub const ALG: &str = "A256KW";

/// Length of a wrapped 32-byte key: eight bytes of integrity check more.
pub const WRAPPED_BYTES: usize = ContentKey::BYTES + 8;

/// Wraps a content key.
pub fn wrap(wrapping_key: &SecretBytes, key: &ContentKey) -> Result<Vec<u8>, SealError> {
    let mut context = context()?;
    context.encrypt_init(Some(Cipher::aes_256_wrap()), Some(wrapping_key.expose()), None)?;
    let mut wrapped = vec![0; WRAPPED_BYTES + 8];
    let len = context.cipher_update(key.expose(), Some(&mut wrapped))?;
    wrapped.truncate(len);
    Ok(wrapped)
}

/// Unwraps a content key; `None` if the integrity check fails: the wrong key, or damage.
pub fn unwrap(wrapping_key: &SecretBytes, wrapped: &[u8]) -> Result<Option<ContentKey>, SealError> {
    if wrapped.len() != WRAPPED_BYTES {
        return Ok(None);
    }
    let mut context = context()?;
    context.decrypt_init(Some(Cipher::aes_256_wrap()), Some(wrapping_key.expose()), None)?;
    let mut key = SecretBytes::zeroed(WRAPPED_BYTES + 8)?;
    let Ok(len) = context.cipher_update(wrapped, Some(key.expose_mut())) else { return Ok(None) };
    key.truncate(len);
    Ok(ContentKey::from_secret(key))
}

/// A recipient's entry: the content key under a wrapping key that is known by its id.
pub fn seal(kid: &str, wrapping_key: &SecretBytes, key: &ContentKey) -> Result<JweRecipient, SealError> {
    let header = members(json!({"alg": ALG, "kid": kid}));
    Ok(JweRecipient { header, encrypted_key: Base64UrlUnpadded::encode_string(&wrap(wrapping_key, key)?) })
}

/// The content key out of an entry; `None` if it is under another wrapping key.
pub fn open(
    kid: &str,
    wrapping_key: &SecretBytes,
    entry: &JweRecipient,
    header: &JoseHeader,
) -> Option<Result<ContentKey, SealError>> {
    let text = |name: &str| header.get(name).and_then(Value::as_str);
    if text("kid") != Some(kid) {
        return None;
    }
    if text("alg") != Some(ALG) {
        let algorithm = text("alg").unwrap_or("none");
        return Some(Err(SealError::Unsupported(format!(
            "it is sealed under {kid} with the unsupported algorithm '{algorithm}'"
        ))));
    }
    Some(unwrap_entry(wrapping_key, entry))
}

/// The content key out of an entry that has to be under this wrapping key.
pub fn unwrap_entry(wrapping_key: &SecretBytes, entry: &JweRecipient) -> Result<ContentKey, SealError> {
    let wrapped = Base64UrlUnpadded::decode_vec(&entry.encrypted_key).unwrap_or_default();
    unwrap(wrapping_key, &wrapped)?.ok_or(SealError::Tampered)
}

fn context() -> Result<CipherCtx, SealError> {
    let mut context = CipherCtx::new()?;
    context.set_flags(CipherCtxFlags::FLAG_WRAP_ALLOW);
    Ok(context)
}
