//! `RSA-OAEP-256` (RFC 7518 section 4.3): OAEP with SHA-256 for both its hash and MGF1.

use openssl::{
    md::Md,
    pkey::{PKeyRef, Private, Public},
    pkey_ctx::{PkeyCtx, PkeyCtxRef},
    rsa::Padding,
};

use super::{ContentKey, SealError};
use crate::base::key::SecretBytes;

/// Value of `alg`.
pub const ALG: &str = "RSA-OAEP-256";
/// RFC 7518 section 4.3: "A key of size 2048 bits or larger MUST be used".
pub const LEAST_BITS: u32 = 2048;

/// Encrypts a content key.
pub fn encrypt(key: &PKeyRef<Public>, content_key: &ContentKey) -> Result<Vec<u8>, SealError> {
    let mut context = PkeyCtx::new(key)?;
    context.encrypt_init()?;
    oaep_256(&mut context)?;
    let mut encrypted = Vec::new();
    context.encrypt_to_vec(content_key.expose(), &mut encrypted)?;
    Ok(encrypted)
}

/// Decrypts a content key; `None` if the padding is wrong: the wrong key, or damage.
pub fn decrypt(key: &PKeyRef<Private>, encrypted: &[u8]) -> Result<Option<ContentKey>, SealError> {
    let mut context = PkeyCtx::new(key)?;
    context.decrypt_init()?;
    oaep_256(&mut context)?;
    let mut content_key = SecretBytes::zeroed(key.size())?;
    let Ok(len) = context.decrypt(encrypted, Some(content_key.expose_mut())) else { return Ok(None) };
    content_key.truncate(len);
    Ok(ContentKey::from_secret(content_key))
}

fn oaep_256<T>(context: &mut PkeyCtxRef<T>) -> Result<(), SealError> {
    context.set_rsa_padding(Padding::PKCS1_OAEP)?;
    context.set_rsa_oaep_md(Md::sha256())?;
    context.set_rsa_mgf1_md(Md::sha256())?;
    Ok(())
}
