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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        base::key::HostName,
        keys::seal::{Identities, Identity, LockboxKey, OwnerKey},
    };

    /// Who has the identity key in software, and so is no TPM; with or without the share of somebody's admission.
    struct Thief(OwnerKey, Option<Share>);

    impl Identity for Thief {
        fn kid(&self) -> &str {
            self.0.kid()
        }

        fn alg(&self) -> &str {
            self.0.alg()
        }

        fn unwrap(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
            assert!(needs_share(header));
            let half = self.0.unwrap(encrypted_key, header)?;
            let Some(share) = &self.1 else { return Ok(half) };
            half.map(|half| joined(&half, share)).transpose()
        }
    }

    #[test]
    fn the_identity_alone_opens_nothing_and_neither_does_another_share() {
        let host: HostName = "compute-7".parse().unwrap();
        let share = Share([7; 32]);
        let opens = |share: Option<Share>| {
            let (owner, escrow) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
            let (identity, secret) = (owner.recipient().unwrap(), SecretBytes::copy_of(&[7; 32]).unwrap());
            let recipients: [Box<dyn Recipient>; 2] =
                [Box::new(escrow.recipient().unwrap()), Box::new(Candidate { identity, share: secret })];
            let made = Arc::new(LockboxKey::random(&host, None, 5).unwrap());
            let sealed = made.seal_to(&recipients).unwrap();
            let by_escrow = LockboxKey::open(&sealed, &Identities::of(vec![Box::new(escrow)]), &host).unwrap();
            assert_eq!(by_escrow.fingerprint(), made.fingerprint());
            LockboxKey::open(&sealed, &Identities::of(vec![Box::new(Thief(owner, share))]), &host)
        };
        assert!(opens(Some(share)).is_ok());
        assert!(matches!(opens(None).err().unwrap(), SealError::Tampered));
        assert!(matches!(opens(Some(Share([8; 32]))).err().unwrap(), SealError::Tampered));
    }

    #[test]
    fn a_share_of_another_length_is_refused() {
        let key = ContentKey::random().unwrap();
        assert!(xor(&key, &[0; 31]).is_err());
        assert_eq!(xor(&key, &[0; 32]).unwrap().expose(), key.expose());
    }
}
