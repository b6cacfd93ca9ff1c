//! Container keys: key-encryption keys that a container's keys are sealed under (`A256KW`, RFC 7518 section 4.4).
//!
//! A container key is itself sealed, to the owner, the escrow and the hosts that are admitted. Whoever can write to the
//! store can seal one of their own to the owner's public key, too; so a host that seals under a container key has to know
//! that it is the right one. Each new key therefore carries a proof, an HMAC under the key before it, and a host
//! remembers the last one that it trusted.

use std::sync::Arc;

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{hash::MessageDigest, memcmp, pkey::PKey, sign::Signer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    ContentKey, Identity, Keyring, Recipient, SealError, VERSION, encrypt, key_wrap,
    payload::{Base64, decode_bytes, read_json, write_json},
};
use crate::key::{
    ContainerKeyId, Epoch, JoseHeader, JweRecipient, MalformedSealedKey, SealedKey, SecretBytes, StoreName,
};

/// Value of `alg`.
const ALG: &str = "A256KW";
const KEY_BYTES: usize = 32;

/// An opened container key.
pub struct ContainerKey {
    id: ContainerKeyId,
    kid: String,
    key: SecretBytes,
    /// The proof by the key before this one.
    proof: Option<String>,
    /// Seconds since 1970-01-01 UTC at which it was sealed; authentic, but only as right as its maker's clock.
    created: u64,
}

/// The `cryptattach` member of a container key's protected header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    version: u32,
    container: StoreName,
    epoch: Epoch,
    created: u64,
}

#[derive(Serialize)]
struct Written<'a> {
    container_key: Base64<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    proof: Option<&'a str>,
}

#[derive(Deserialize)]
struct Read<'a> {
    container_key: &'a str,
    proof: Option<String>,
}

impl ContainerKey {
    /// A new random key: the first of a container, or the one after `previous`.
    pub fn random(container: &StoreName, previous: Option<&Self>) -> Result<Self, SealError> {
        let epoch = previous.map_or(Epoch::FIRST, |previous| previous.id.epoch.next());
        let mut new = Self::of(container, epoch, SecretBytes::random(KEY_BYTES)?);
        new.proof = previous.map(|previous| previous.proof_of(&new)).transpose()?;
        Ok(new)
    }

    fn of(container: &StoreName, epoch: Epoch, key: SecretBytes) -> Self {
        let id = ContainerKeyId { container: container.clone(), epoch };
        Self { kid: id.to_string(), id, key, proof: None, created: 0 }
    }

    /// When it was sealed, if it was opened: seconds since 1970-01-01 UTC.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Its number.
    pub fn epoch(&self) -> Epoch {
        self.id.epoch
    }

    /// What people and hosts tell it from others by: 128 bits in hexadecimal that say nothing of the key.
    pub fn fingerprint(&self) -> Result<String, SealError> {
        let mac = self.mac(b"cryptattach container key fingerprint")?;
        Ok(mac[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Seals it.
    pub fn seal_to(&self, recipients: &[Box<dyn Recipient>], created: u64) -> Result<SealedKey, SealError> {
        let ContainerKeyId { container, epoch } = self.id.clone();
        let written = Written { container_key: Base64(&self.key), proof: self.proof.as_deref() };
        encrypt(&Context { version: VERSION, container, epoch, created }, &write_json(&written, 1024)?, recipients)
    }

    /// Opens one and checks that it is the one that was asked for.
    pub fn open(sealed: &SealedKey, keyring: &Keyring, id: &ContainerKeyId) -> Result<Self, SealError> {
        let mut protected = sealed.protected_header()?;
        let member = protected.remove("cryptattach").unwrap_or_default();
        let context: Context =
            serde_json::from_value(member).map_err(|error| MalformedSealedKey::Context(error.to_string()))?;
        if context.version != VERSION {
            return Err(SealError::Unsupported(format!("it has version {}", context.version)));
        }
        let is = ContainerKeyId { container: context.container, epoch: context.epoch };
        if is != *id {
            return Err(SealError::Other { what: "container key", is: is.to_string(), asked: id.to_string() });
        }
        let content = keyring.decrypt(sealed)?;
        let read: Read<'_> = read_json(&content)?;
        let key = decode_bytes(read.container_key)?.filter(|key| key.len() == KEY_BYTES);
        let key = key.ok_or_else(|| SealError::Payload(format!("no container key of {KEY_BYTES} bytes")))?;
        Ok(Self { proof: read.proof, created: context.created, ..Self::of(&id.container, id.epoch, key) })
    }

    /// Whether this is the key that `previous` was followed by.
    pub fn follows(&self, previous: &Self) -> Result<bool, SealError> {
        let proof = previous.proof_of(self)?;
        let follows = self.id.epoch == previous.id.epoch.next() && self.id.container == previous.id.container;
        let said = self.proof.as_deref().unwrap_or_default();
        Ok(follows && said.len() == proof.len() && memcmp::eq(said.as_bytes(), proof.as_bytes()))
    }

    fn proof_of(&self, next: &Self) -> Result<String, SealError> {
        let mac =
            self.mac(format!("cryptattach next container key {} {}", next.kid, next.fingerprint()?).as_bytes())?;
        Ok(Base64UrlUnpadded::encode_string(&mac))
    }

    fn mac(&self, text: &[u8]) -> Result<Vec<u8>, SealError> {
        let key = PKey::hmac(self.key.expose())?;
        let mut signer = Signer::new(MessageDigest::sha256(), &key)?;
        Ok(signer.sign_oneshot_to_vec(text)?)
    }
}

impl Recipient for Arc<ContainerKey> {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        let header = match json!({"alg": ALG, "kid": self.kid}) {
            Value::Object(members) => members,
            _ => JoseHeader::new(),
        };
        let encrypted_key = Base64UrlUnpadded::encode_string(&key_wrap::wrap(&self.key, key)?);
        Ok(JweRecipient { header, encrypted_key })
    }
}

impl Identity for Arc<ContainerKey> {
    fn open(&self, entry: &JweRecipient, header: &JoseHeader) -> Option<Result<ContentKey, SealError>> {
        let text = |name: &str| header.get(name).and_then(Value::as_str);
        if text("kid") != Some(&self.kid) {
            return None;
        }
        if text("alg") != Some(ALG) {
            let algorithm = text("alg").unwrap_or("none");
            return Some(Err(SealError::Unsupported(format!("it is sealed under {} by '{algorithm}'", self.kid))));
        }
        let wrapped = Base64UrlUnpadded::decode_vec(&entry.encrypted_key).unwrap_or_default();
        Some(key_wrap::unwrap(&self.key, &wrapped).and_then(|key| key.ok_or(SealError::Tampered)))
    }

    fn kid(&self) -> &str {
        &self.kid
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::OwnerKey;

    #[test]
    fn opens_for_the_owner_and_nobody_else_and_proves_its_successor() {
        let (owner, stranger) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
        let container = "cinder".parse().unwrap();
        let first = ContainerKey::random(&container, None).unwrap();
        let second = ContainerKey::random(&container, Some(&first)).unwrap();
        let recipients: [Box<dyn Recipient>; 1] = [Box::new(owner.recipient().unwrap())];
        let sealed = second.seal_to(&recipients, 0).unwrap();
        let id = |epoch: &str| ContainerKeyId { container: container.clone(), epoch: epoch.parse().unwrap() };

        let ours = Keyring::of(vec![Box::new(owner)]);
        let opened = ContainerKey::open(&sealed, &ours, &id("2")).unwrap();
        assert_eq!(opened.fingerprint().unwrap(), second.fingerprint().unwrap());
        assert!(opened.follows(&first).unwrap());
        assert!(matches!(ContainerKey::open(&sealed, &ours, &id("1")), Err(SealError::Other { .. })));
        let theirs = Keyring::of(vec![Box::new(stranger)]);
        assert!(matches!(ContainerKey::open(&sealed, &theirs, &id("2")), Err(SealError::NotForUs { .. })));

        let forged = ContainerKey::of(&container, "2".parse().unwrap(), SecretBytes::random(KEY_BYTES).unwrap());
        assert!(!forged.follows(&first).unwrap());
        let other = ContainerKey::random(&container, None).unwrap();
        assert!(!ContainerKey::random(&container, Some(&other)).unwrap().follows(&first).unwrap());
    }
}
