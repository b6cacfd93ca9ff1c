//! A host that has still to prove that its identity key is in its TPM: what is sealed to it opens in two steps.
//!
//! The content key is the XOR of two shares. One is sealed to the identity key, as for anyone. The other one travels to the
//! host as a credential, which only the TPM opens that made the identity key; from then on it stands in the key's file.
//! So a key that is in no TPM opens nothing, although it was sealed to before the proof.

use serde_json::Value;

use super::OwnerRecipient;
use crate::{
    base::key::{JoseHeader, JweRecipient, SecretBytes},
    keys::{
        seal::{ContentKey, Recipient, SealError, Shape},
        tpm::Share,
    },
};

/// The member of an entry's header that says so.
const MEMBER: &str = "share";
const ADMISSION: &str = "admission";

/// A host's identity key, and the share that its TPM has to earn.
pub struct Candidate {
    pub identity: OwnerRecipient,
    pub share: SecretBytes,
}

impl Recipient for Candidate {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        let mut entry = self.identity.seal(&xor(key, self.share.expose())?)?;
        entry.header.insert(MEMBER.to_owned(), ADMISSION.into());
        Ok(entry)
    }

    fn shape(&self) -> Shape {
        self.identity.shape()
    }
}

/// Whether an entry opens with the share of an admission only.
pub(super) fn needs_share(header: &JoseHeader) -> bool {
    header.get(MEMBER).and_then(Value::as_str) == Some(ADMISSION)
}

/// The content key out of its other share.
pub(super) fn joined(key: &ContentKey, share: &Share) -> Result<ContentKey, SealError> {
    xor(key, &share.0)
}

fn xor(key: &ContentKey, share: &[u8]) -> Result<ContentKey, SealError> {
    let mut bytes = SecretBytes::copy_of(key.expose())?;
    bytes.expose_mut().iter_mut().zip(share).for_each(|(byte, share)| *byte ^= share);
    let whole = ContentKey::from_secret(bytes).filter(|_| share.len() == ContentKey::BYTES);
    whole.ok_or_else(|| SealError::Unsupported("a share of its key has the wrong length".to_owned()))
}
