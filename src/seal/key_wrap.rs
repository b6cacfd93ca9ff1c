//! AES key wrap with a 256-bit key (RFC 3394; `A256KW` in RFC 7518 section 4.4).

use openssl::{
    cipher::Cipher,
    cipher_ctx::{CipherCtx, CipherCtxFlags},
};

use super::{ContentKey, SealError};
use crate::key::SecretBytes;

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

fn context() -> Result<CipherCtx, SealError> {
    let mut context = CipherCtx::new()?;
    context.set_flags(CipherCtxFlags::FLAG_WRAP_ALLOW);
    Ok(context)
}
