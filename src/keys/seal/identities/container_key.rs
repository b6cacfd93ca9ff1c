//! Container keys: key-encryption keys that a container's keys are sealed under (`A256KW`, RFC 7518 section 4.4).
//!
//! A container key is itself sealed, to the owner, the escrow and the hosts that are admitted. Whoever can write to the
//! store can seal one of their own to the owner's public key, too; so a host that seals under a container key has to know
//! that it is the right one. Each new key therefore carries a proof, an HMAC under the key before it, and a host
//! remembers the last one that it trusted.

use std::{collections::BTreeMap, sync::Arc};

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{hash::MessageDigest, memcmp, pkey::PKey, sign::Signer};
use serde::{Deserialize, Serialize};

use super::{Identity, OwnerRecipient};
use crate::{
    base::{
        hex,
        key::{
            ContainerKeyId, Epoch, HostName, JoseHeader, JweRecipient, MalformedSealedKey, SealedKey, SecretBytes,
            StoreName,
        },
    },
    keys::seal::{
        ContentKey, Identities, Node, Recipient, SealError, Shape, Told, VERSION, encrypt, key_wrap,
        payload::{Base64, decode_bytes, read_json, write_json},
    },
};

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
    /// Counts its re-sealings, from 1.
    generation: u64,
    /// The hosts that are admitted: the public keys (JWK) that it is sealed to.
    hosts: BTreeMap<HostName, JoseHeader>,
    told: Option<Told>,
}

/// The `cryptattach` member of a container key's protected header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    version: u32,
    container: StoreName,
    epoch: Epoch,
    generation: u64,
    created: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    hosts: BTreeMap<HostName, JoseHeader>,
}

impl Context {
    fn of(sealed: &SealedKey) -> Result<Self, SealError> {
        let member = sealed.protected_header()?.remove("cryptattach").unwrap_or_default();
        Ok(serde_json::from_value(member).map_err(|error| MalformedSealedKey::Context(error.to_string()))?)
    }
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
    /// A new random key: the first of a container, or the one after `previous`, for the same hosts.
    pub fn random(container: &StoreName, previous: Option<&Self>) -> Result<Self, SealError> {
        let epoch = previous.map_or(Epoch::FIRST, |previous| previous.id.epoch.next());
        let mut new = Self::of(container, epoch, SecretBytes::random(KEY_BYTES)?);
        new.hosts = previous.map(|previous| previous.hosts.clone()).unwrap_or_default();
        new.proof = previous.map(|previous| previous.proof_of(&new)).transpose()?;
        Ok(new)
    }

    fn of(container: &StoreName, epoch: Epoch, key: SecretBytes) -> Self {
        let id = ContainerKeyId { container: container.clone(), epoch };
        let kid = id.to_string();
        Self { kid, id, key, proof: None, created: 0, generation: 1, hosts: BTreeMap::new(), told: None }
    }

    /// When it was sealed, if it was opened: seconds since 1970-01-01 UTC.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Its number.
    pub fn epoch(&self) -> Epoch {
        self.id.epoch
    }

    /// The hosts that are admitted.
    pub fn hosts(&self) -> impl Iterator<Item = &HostName> {
        self.hosts.keys()
    }

    /// The same key for one host more, or for another public key of that host.
    pub fn with_host(&self, host: &HostName, recipient: &OwnerRecipient) -> Result<Self, SealError> {
        let mut new = self.resealed()?;
        new.hosts.insert(host.clone(), recipient.jwk()?);
        Ok(new)
    }

    /// A new random key for the hosts of this one, after `previous`.
    pub fn after(self, previous: &Self) -> Result<Self, SealError> {
        Ok(Self { hosts: self.hosts, ..Self::random(&self.id.container, Some(previous))? })
    }

    /// Leaves a host out of a key that has not been sealed yet.
    pub fn without_host(mut self, host: &HostName) -> Self {
        self.hosts.remove(host);
        self
    }

    fn resealed(&self) -> Result<Self, SealError> {
        Ok(Self {
            proof: self.proof.clone(),
            generation: self.generation + 1,
            hosts: self.hosts.clone(),
            ..Self::of(&self.id.container, self.id.epoch, SecretBytes::copy_of(self.key.expose())?)
        })
    }

    /// What people and hosts tell it from others by: 128 bits in hexadecimal that say nothing of the key.
    pub fn fingerprint(&self) -> Result<String, SealError> {
        let mac = self.mac(b"cryptattach container key fingerprint")?;
        Ok(hex::encode(&mac[..16]))
    }

    /// The hosts that are admitted, as recipients.
    pub fn host_recipients(&self) -> Result<Vec<Box<dyn Recipient>>, SealError> {
        let recipient = |(host, jwk)| Ok(Box::new(host_recipient(host, jwk)?) as Box<dyn Recipient>);
        self.hosts.iter().map(recipient).collect()
    }

    /// What each part of the container's policy said when it was opened; `None` if it has the default policy.
    pub fn told(&self) -> Option<&Told> {
        self.told.as_ref()
    }

    /// Seals it to these. Whether the hosts that are admitted are among them, the container's policy says.
    pub fn seal_to(&self, recipients: Vec<Box<dyn Recipient>>, created: u64) -> Result<SealedKey, SealError> {
        let ContainerKeyId { container, epoch } = self.id.clone();
        let (generation, hosts) = (self.generation, self.hosts.clone());
        let written = Written { container_key: Base64(&self.key), proof: self.proof.as_deref() };
        let context = Context { version: VERSION, container, epoch, generation, created, hosts };
        let sealed = encrypt(&context, &write_json(&written, 1024)?, &recipients)?;
        // A policy may be too large: nobody could read what is stored.
        Node::of(&SealedKey::from_json(&sealed.to_json())?)?;
        Ok(sealed)
    }

    /// When a container key was sealed, and for which hosts, by their key ids: its own word, of which nothing is proven.
    pub fn claims(sealed: &SealedKey) -> Result<(u64, BTreeMap<String, HostName>), SealError> {
        let Context { created, hosts, .. } = Context::of(sealed)?;
        let kid = |(host, jwk): (HostName, JoseHeader)| match host_recipient(&host, &jwk)?.shape() {
            Shape::Key(kid) => Ok(Some((kid, host))),
            Shape::Threshold { .. } => Ok(None),
        };
        let hosts = hosts.into_iter().map(kid).collect::<Result<Vec<_>, SealError>>()?;
        Ok((created, hosts.into_iter().flatten().collect()))
    }

    /// Opens one and checks that it is the one that was asked for.
    pub fn open(sealed: &SealedKey, identities: &Identities, id: &ContainerKeyId) -> Result<Self, SealError> {
        let context = Context::of(sealed)?;
        if context.version != VERSION {
            return Err(SealError::Unsupported(format!("it has version {}", context.version)));
        }
        let is = ContainerKeyId { container: context.container, epoch: context.epoch };
        if is != *id {
            return Err(SealError::Other { what: "container key", is: is.to_string(), asked: id.to_string() });
        }
        let (content, told) = identities.decrypt_and_tell(sealed);
        let content = content?;
        let read: Read<'_> = read_json(&content)?;
        let key = decode_bytes(read.container_key)?.filter(|key| key.len() == KEY_BYTES);
        let key = key.ok_or_else(|| SealError::Payload(format!("expected a container key of {KEY_BYTES} bytes")))?;
        let Context { generation, hosts, created, .. } = context;
        Ok(Self { proof: read.proof, generation, hosts, created, told, ..Self::of(&id.container, id.epoch, key) })
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

    /// The word of whoever holds this key that a backup with this SHA-256 is theirs.
    pub fn vouch_for_backup(&self, digest: &[u8; 32]) -> Result<String, SealError> {
        let mac = self.mac(format!("cryptattach backup {} {}", self.kid, hex::encode(digest)).as_bytes())?;
        Ok(Base64UrlUnpadded::encode_string(&mac))
    }

    /// Whether it is that word.
    pub fn has_vouched_for_backup(&self, digest: &[u8; 32], said: &str) -> Result<bool, SealError> {
        let word = self.vouch_for_backup(digest)?;
        Ok(said.len() == word.len() && memcmp::eq(said.as_bytes(), word.as_bytes()))
    }

    fn mac(&self, text: &[u8]) -> Result<Vec<u8>, SealError> {
        let key = PKey::hmac(self.key.expose())?;
        let mut signer = Signer::new(MessageDigest::sha256(), &key)?;
        Ok(signer.sign_oneshot_to_vec(text)?)
    }
}

fn host_recipient(host: &HostName, jwk: &JoseHeader) -> Result<OwnerRecipient, SealError> {
    let unusable = |why| SealError::Unsupported(format!("the public key of the host {host} {why}"));
    OwnerRecipient::from_jwk(jwk).map_err(unusable)
}

impl Recipient for Arc<ContainerKey> {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        key_wrap::seal(&self.kid, &self.key, key)
    }

    fn shape(&self) -> Shape {
        Shape::Key(self.kid.clone())
    }
}

impl Identity for Arc<ContainerKey> {
    fn kid(&self) -> &str {
        &self.kid
    }

    fn alg(&self) -> &str {
        key_wrap::ALG
    }

    fn unwrap(&self, encrypted_key: &[u8], _: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
        key_wrap::unwrap(&self.key, encrypted_key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::seal::OwnerKey;

    #[test]
    fn opens_for_the_owner_and_nobody_else_and_proves_its_successor() {
        let (owner, stranger) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
        let container = "cinder".parse().unwrap();
        let first = ContainerKey::random(&container, None).unwrap();
        let second = ContainerKey::random(&container, Some(&first)).unwrap();
        let sealed = second.seal_to(vec![Box::new(owner.recipient().unwrap())], 0).unwrap();
        let id = |epoch: &str| ContainerKeyId { container: container.clone(), epoch: epoch.parse().unwrap() };

        let ours = Identities::of(vec![Box::new(owner)]);
        let opened = ContainerKey::open(&sealed, &ours, &id("2")).unwrap();
        assert_eq!(opened.fingerprint().unwrap(), second.fingerprint().unwrap());
        assert!(opened.follows(&first).unwrap());
        assert!(matches!(ContainerKey::open(&sealed, &ours, &id("1")), Err(SealError::Other { .. })));
        let theirs = Identities::of(vec![Box::new(stranger)]);
        assert!(matches!(ContainerKey::open(&sealed, &theirs, &id("2")), Err(SealError::NotForUs { .. })));

        let forged = ContainerKey::of(&container, "2".parse().unwrap(), SecretBytes::random(KEY_BYTES).unwrap());
        assert!(!forged.follows(&first).unwrap());
        let other = ContainerKey::random(&container, None).unwrap();
        assert!(!ContainerKey::random(&container, Some(&other)).unwrap().follows(&first).unwrap());
    }

    #[test]
    fn admitted_hosts_stay_until_they_are_removed() {
        let (owner, host) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
        let (container, name) = ("cinder".parse().unwrap(), "compute-7".parse().unwrap());
        let owners = || -> Vec<Box<dyn Recipient>> { vec![Box::new(owner.recipient().unwrap())] };
        let first = ContainerKey::random(&container, None).unwrap();
        let admitted = first.with_host(&name, &host.recipient().unwrap()).unwrap();
        assert_eq!(admitted.fingerprint().unwrap(), first.fingerprint().unwrap());
        let next = ContainerKey::random(&container, Some(&admitted)).unwrap();
        let after = ContainerKey::random(&container, Some(&next)).unwrap().without_host(&name);
        let sealed = [&first, &admitted, &next, &after].map(|key| {
            let recipients = owners().into_iter().chain(key.host_recipients().unwrap());
            key.seal_to(recipients.collect(), 0).unwrap()
        });
        assert_eq!(sealed[1].claimed_generation().unwrap(), 2);
        let ring = Identities::of(vec![Box::new(host)]);
        let [old, id] =
            ["1", "2"].map(|epoch| ContainerKeyId { container: container.clone(), epoch: epoch.parse().unwrap() });
        let opens = |at: usize| ContainerKey::open(&sealed[at], &ring, if at < 2 { &old } else { &id }).is_ok();
        assert_eq!([0, 1, 2, 3].map(opens), [false, true, true, false]);
        let opened = ContainerKey::open(&sealed[2], &ring, &id).unwrap();
        assert!(opened.follows(&first).unwrap());
        assert_eq!(opened.hosts().collect::<Vec<_>>(), [&name]);

        // Who cannot open the key cannot add a host to its list.
        let mut forged = sealed[2].clone();
        let header = String::from_utf8(Base64UrlUnpadded::decode_vec(&forged.protected).unwrap()).unwrap();
        forged.protected = Base64UrlUnpadded::encode_string(header.replace("compute-7", "compute-8").as_bytes());
        assert!(matches!(ContainerKey::open(&forged, &ring, &id), Err(SealError::Tampered)));
    }
}
