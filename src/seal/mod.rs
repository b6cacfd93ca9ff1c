//! Sealing and opening: a recipient seals, an identity opens.

use crate::key::{JoseHeader, JweRecipient, SecretBytes};

/// The content encryption key of one sealed key: 32 random bytes for A256GCM (RFC 7516 section 2, "CEK").
pub struct ContentKey(SecretBytes);

/// Someone whom a key can be sealed to.
pub trait Recipient {
    /// Encrypts the content key to this recipient.
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError>;
}

/// Someone who can open what was sealed to them.
pub trait Identity {
    /// Decrypts the content key; `None` if this recipient entry is not for this identity.
    ///
    /// `header` is the entry's joint header: protected, shared and per-recipient members together.
    fn open(&self, recipient: &JweRecipient, header: &JoseHeader) -> Option<Result<ContentKey, SealError>>;
}

/// Sealing or opening failed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {}
