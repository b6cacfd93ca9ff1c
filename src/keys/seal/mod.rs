//! Sealing and opening volume keys: JWE (RFC 7516) with the algorithms of RFC 7518.
//!
//! A [`Recipient`] seals, an [`Identity`] opens. The code is small and over libcrypto, not a JOSE library's, for two
//! reasons: content keys and payloads stay in [secret memory](crate::base::key::SecretBytes), and an identity may be a TPM that does the key agreement.
//!
//! ```
//! use cryptattach::base::key::{BoundContext, KeyId, KeySize, VolumeKey};
//! use cryptattach::keys::seal::{Content, Expected, For, Identity, Identities, OwnerKey, Payload, seal};
//!
//! let owner = OwnerKey::generate()?;
//! let context = BoundContext {
//!     version: 1,
//!     key_id: KeyId::random(),
//!     container: "cinder".parse()?,
//!     volume: None,
//!     project: None,
//!     generation: 1,
//!     created: 0,
//! };
//! let payload = Payload {
//!     volume_key: VolumeKey::random(KeySize::Bits512)?,
//!     cipher: "aes-xts-plain64".to_owned(),
//!     sector_size_bytes: 512,
//!     data_offset_bytes: 0,
//!     iv_offset_sectors: 0,
//!     digest: None,
//!     passphrase: None,
//!     passphrase_next: None,
//!     replaces: None,
//! };
//! let sealed = seal(&context, &Content::VolumeKey(payload), &[Box::new(owner.recipient()?)])?;
//!
//! let identities = Identities::of(vec![Box::new(owner)]);
//! let expected = Expected { key_id: context.key_id, container: context.container.clone(), volume: For::Plain };
//! assert!(matches!(identities.open(&sealed, &expected)?.content, Content::VolumeKey(_)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod asking;
pub mod clevis;
mod content;
mod ecdh_es;
pub mod identities;
mod jwk;
pub mod jws;
mod key_wrap;
pub mod leaves;
mod payload;
mod rsa_oaep;
mod sss;
mod tree;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::error::ErrorStack;
use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

pub use asking::Asking;
pub use content::ContentKey;
pub use identities::{
    Candidate, ContainerKey, Entry, EntryContext, Identity, LockboxKey, OwnerKey, OwnerRecipient, TpmIdentity,
};
pub use leaves::LeafError;
pub use payload::{Content, Payload};
pub use tree::{Node, Said, SealedTo, Shape, Threshold, Told};

use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{
            BoundContext, JoseHeader, JweRecipient, KeyId, MAX_RECIPIENTS, MalformedSealedKey, SealedKey, SecretBytes,
            SecretMemoryError, StoreName,
        },
    },
    config::{IdentitySpec, LeafName, TpmConfig},
    keys::tpm::TpmError,
};

/// Value of `typ` in the protected header.
const TYPE: &str = "cryptattach";
/// Version of the `cryptattach` member that we write and read.
const VERSION: u32 = 1;

/// Someone whom a key can be sealed to.
pub trait Recipient {
    /// Encrypts the content key to this recipient.
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError>;
    /// Who it is, for comparing with whom something is sealed to.
    fn shape(&self) -> Shape;
}

/// The holders of public keys in PEM files.
pub fn recipients(files: impl IntoIterator<Item: AsRef<Path>>) -> Result<Vec<Box<dyn Recipient>>, SealError> {
    let boxed = |recipient| Box::new(recipient) as Box<dyn Recipient>;
    files.into_iter().map(|path| OwnerRecipient::read(path.as_ref()).map(boxed)).collect()
}

/// Seals a content to its recipients, bound to its context.
pub fn seal(
    context: &BoundContext,
    content: &Content,
    recipients: &[Box<dyn Recipient>],
) -> Result<SealedKey, SealError> {
    encrypt(context, &content.to_json()?, recipients)
}

/// Encrypts to the recipients; the context goes into the protected header.
fn encrypt(
    context: &impl Serialize,
    content: &SecretBytes,
    recipients: &[Box<dyn Recipient>],
) -> Result<SealedKey, SealError> {
    seal_node(&json!({"typ": TYPE, "enc": content::ENC, "cryptattach": context}).to_string(), content, recipients)
}

/// Encrypts under this protected header.
fn seal_node(
    protected: &str,
    content: &SecretBytes,
    recipients: &[Box<dyn Recipient>],
) -> Result<SealedKey, SealError> {
    let protected = Base64UrlUnpadded::encode_string(protected.as_bytes());
    if recipients.len() > MAX_RECIPIENTS {
        return Err(SealError::Unsupported(format!("a key has at most {MAX_RECIPIENTS} recipients")));
    }
    let key = ContentKey::random()?;
    let recipients = recipients.iter().map(|recipient| recipient.seal(&key)).collect::<Result<_, _>>()?;
    let sealed = content::encrypt(&key, protected.as_bytes(), content)?;
    let encode = |bytes: &[u8]| Base64UrlUnpadded::encode_string(bytes);
    Ok(SealedKey {
        aad: None,
        unprotected: JoseHeader::new(),
        recipients,
        iv: encode(&sealed.iv),
        ciphertext: encode(&sealed.ciphertext),
        tag: encode(&sealed.tag),
        protected,
    })
}

/// What was asked for; a sealed key that says something else is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub key_id: KeyId,
    /// The container that it was asked from.
    pub container: StoreName,
    /// The volume that it is to open.
    pub volume: For,
}

/// Which volume a key is to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// Any.
    Any,
    /// A plain dm-crypt volume, which has no header that could name it.
    Plain,
    /// The LUKS volume of this UUID.
    Luks(Uuid),
}

impl For {
    /// The volume of this UUID; a plain one has none.
    pub fn volume(uuid: Option<Uuid>) -> Self {
        uuid.map_or(Self::Plain, Self::Luks)
    }
}

/// An opened sealed key: authentic, and what was expected.
pub struct Opened {
    /// What the key is bound to.
    pub context: BoundContext,
    /// What was sealed.
    pub content: Content,
}

impl Opened {
    /// Only a volume key of ours is made for one volume; an object is bound to one when that is formatted with it.
    fn check_volume(&self, expected: &Expected) -> Result<(), SealError> {
        let is = self.context.volume;
        let unbound = matches!(self.content, Content::Object(_)) && is.is_none();
        let asked = match expected.volume {
            For::Any => return Ok(()),
            For::Plain => None,
            For::Luks(uuid) => Some(uuid),
        };
        if asked == is || unbound {
            return Ok(());
        }
        let digest = match &self.content {
            Content::VolumeKey(payload) => payload.digest.clone(),
            Content::Object(_) => None,
        };
        Err(SealError::OtherVolume { is, asked, digest })
    }
}

/// Says once that an identity is missing: another one may open what this one would have.
pub fn warn_of_missing(error: &SealError) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let text = chain(error);
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
        tracing::warn!("{text}; the other identities are tried");
    }
}

/// The identities of this host, tried in order.
#[derive(Default)]
pub struct Identities {
    identities: Vec<Box<dyn Identity>>,
    /// The leaves of policies that ask somebody else.
    leaves: Vec<(LeafName, Box<dyn leaves::Kind>)>,
    /// What people call the holders of keys, by key id.
    names: BTreeMap<String, String>,
    /// Whom to ask for what persons have on paper or in mind.
    asking: Asking,
}

impl Identities {
    /// These identities.
    pub fn of(identities: Vec<Box<dyn Identity>>) -> Self {
        Self { identities, ..Self::default() }
    }

    /// Those that the configuration names. A file that is missing is no error as long as another one is there: so the escrow's
    /// key recovers beside the owner's that is lost.
    pub fn read(specs: &[IdentitySpec], tpm: &TpmConfig) -> Result<Self, SealError> {
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for spec in specs {
            match identities::kind(spec).open(tpm) {
                Ok(identity) => found.push(identity),
                Err(error) if error.is_missing_file() => missing.push(error),
                Err(error) => return Err(error),
            }
        }
        match missing.pop() {
            Some(error) if found.is_empty() => return Err(error),
            last => missing.into_iter().chain(last).for_each(|error| warn_of_missing(&error)),
        }
        Ok(Self::of(found))
    }

    /// These identities are tried as well, before the others.
    pub fn with(mut self, identities: impl IntoIterator<Item = Box<dyn Identity>>) -> Self {
        self.identities.splice(0..0, identities);
        self
    }

    /// Whether one of them is the holder of a key.
    pub fn has(&self, shape: &Shape) -> bool {
        matches!(shape, Shape::Key(kid) if self.identities.iter().any(|identity| identity.kid() == kid))
    }

    /// These leaves are asked as well, and these are the names of key ids for people.
    pub fn with_leaves(self, leaves: Vec<(LeafName, Box<dyn leaves::Kind>)>, names: BTreeMap<String, String>) -> Self {
        Self { leaves, names, ..self }
    }

    /// A person is asked if nothing else opens a key.
    pub fn with_person(self, asking: Asking) -> Self {
        Self { asking, ..self }
    }

    /// Asks the person for a leaf of a sealed key now; its key is then known to all that asks the same.
    pub fn ask_person(&self, sealed: &SealedKey, name: &LeafName) -> Result<(), SealError> {
        let node = Node::of(sealed)?;
        let leaf = node.persons(&self.leaves).into_iter().find(|leaf| leaf.name == name);
        asking::ask_now(&self.asking, leaf.ok_or_else(|| LeafError::NotSealedTo(name.to_string()))?)
    }

    /// Opens a sealed key and checks that it is what was asked for.
    pub fn open(&self, sealed: &SealedKey, expected: &Expected) -> Result<Opened, SealError> {
        let context = sealed.claimed_context()?;
        check_context(&context, expected)?;
        let opened = Opened { context, content: Content::from_json(&self.decrypt(sealed)?)? };
        opened.check_volume(expected)?;
        Ok(opened)
    }

    fn decrypt(&self, sealed: &SealedKey) -> Result<SecretBytes, SealError> {
        self.decrypt_and_tell(sealed).0
    }

    /// The content; and if a policy decides who has it, what each part of that said.
    fn decrypt_and_tell(&self, sealed: &SealedKey) -> (Result<SecretBytes, SealError>, Option<Told>) {
        if tree::is_plain(sealed, &self.leaves) {
            return (self.decrypt_plain(sealed), None);
        }
        let node = sealed.protected_header().map_err(SealError::from).and_then(|protected| {
            check_protected(&protected)?;
            Node::of(sealed)
        });
        let node = match node {
            Ok(node) => node,
            Err(error) => return (Err(error), None),
        };
        let (content, told) = self.open_node(&node);
        (content, Some(told))
    }

    /// The leaves of a sealed key's policy whose servers have newer keys than those that it is sealed to.
    pub fn outdated(&self, sealed: &SealedKey) -> Vec<LeafName> {
        Node::of(sealed).map(|node| self.openers(&[]).outdated(&node)).unwrap_or_default()
    }

    /// Whom a key is sealed to, by the names that people have for them. Nothing is opened, and nobody asked.
    pub fn whom(&self, sealed: &SealedKey) -> Result<Vec<SealedTo>, SealError> {
        Ok(self.openers(&[]).whom(&Node::of(sealed)?))
    }

    fn decrypt_plain(&self, sealed: &SealedKey) -> Result<SecretBytes, SealError> {
        let protected = sealed.protected_header()?;
        check_protected(&protected)?;
        let key = self.content_key(sealed, &protected)?;
        content::Sealed {
            iv: decode("iv", &sealed.iv)?,
            ciphertext: decode("ciphertext", &sealed.ciphertext)?,
            tag: decode("tag", &sealed.tag)?,
        }
        .open(&key, &sealed.authenticated())
    }

    fn content_key(&self, sealed: &SealedKey, protected: &JoseHeader) -> Result<ContentKey, SealError> {
        for entry in &sealed.recipients {
            let header = joint_header([protected, &sealed.unprotected, &entry.header])?;
            // The first identity that an entry is for decides: a failure there is damage, not a reason to guess on.
            if let Some(opened) = self.identities.iter().find_map(|identity| identity.open(entry, &header)) {
                return opened;
            }
        }
        let join = |kids: Vec<&str>| if kids.is_empty() { "nobody".to_owned() } else { kids.join(", ") };
        Err(SealError::NotForUs {
            sealed_to: join(sealed.recipient_kids().collect()),
            ours: join(self.identities.iter().map(|identity| identity.kid()).collect()),
        })
    }
}

/// The three headers together. Their names must be disjoint (RFC 7516 section 7.2.1): a name that stands in the protected
/// header cannot be overridden by one that anyone may change.
fn joint_header(parts: [&JoseHeader; 3]) -> Result<JoseHeader, SealError> {
    let mut joint = JoseHeader::new();
    for (name, value) in parts.into_iter().flatten() {
        if joint.insert(name.clone(), value.clone()).is_some() {
            return Err(SealError::Unsupported(format!("its header has '{name}' twice")));
        }
    }
    // Members that change how a JWE is read must be in front of the authentication, and we know none of them.
    for name in ["zip", "crit"] {
        if joint.contains_key(name) {
            return Err(SealError::Unsupported(format!("its header has the unsupported member '{name}'")));
        }
    }
    Ok(joint)
}

fn check_protected(protected: &JoseHeader) -> Result<(), SealError> {
    check_enc(protected)?;
    match text(protected, "typ") {
        TYPE => Ok(()),
        other => Err(SealError::Unsupported(format!("it has the unsupported type '{other}'"))),
    }
}

fn check_enc(protected: &JoseHeader) -> Result<(), SealError> {
    match text(protected, "enc") {
        content::ENC => Ok(()),
        other => Err(SealError::Unsupported(format!("its content is encrypted with the unsupported '{other}'"))),
    }
}

fn text<'a>(header: &'a JoseHeader, name: &str) -> &'a str {
    header.get(name).and_then(Value::as_str).unwrap_or("none")
}

/// A header of these members.
fn members(json: Value) -> JoseHeader {
    match json {
        Value::Object(members) => members,
        _ => JoseHeader::new(),
    }
}

fn check_context(context: &BoundContext, expected: &Expected) -> Result<(), SealError> {
    let other = |what, is: String, asked: String| Err(SealError::Other { what, is, asked });
    if context.version != VERSION {
        return Err(SealError::Unsupported(format!(
            "it has the unsupported version {} (made by a newer cryptattach?)",
            context.version
        )));
    }
    if context.key_id != expected.key_id {
        return other("key", context.key_id.to_string(), expected.key_id.to_string());
    }
    if context.container != expected.container {
        return other("container", context.container.to_string(), expected.container.to_string());
    }
    Ok(())
}

fn decode(what: &str, text: &str) -> Result<Vec<u8>, SealError> {
    Base64UrlUnpadded::decode_vec(text).map_err(|_| SealError::Unsupported(format!("its '{what}' is not base64url")))
}

fn volume(uuid: Option<Uuid>) -> String {
    uuid.map_or("a plain volume".to_owned(), |uuid| format!("volume {uuid}"))
}

/// Sealing or opening failed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// A key file cannot be read.
    #[error("cannot read the key file {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A key file holds no key that we can use.
    #[error("{} {why}", .path.display())]
    KeyFile {
        path: PathBuf,
        /// "is encrypted", "is a key on the curve ...", ...
        why: String,
    },
    /// The form is not that of a sealed key.
    #[error("it is malformed")]
    Malformed(#[from] MalformedSealedKey),
    /// It asks for something that we do not do.
    #[error("{0}")]
    Unsupported(String),
    /// It is for something else than was asked.
    #[error("it belongs to {what} {is}, but {asked} was requested")]
    Other {
        /// "key", "container" or "volume".
        what: &'static str,
        /// What it is for.
        is: String,
        /// What was asked.
        asked: String,
    },
    /// It is for another volume.
    #[error("it belongs to {}, but {} was requested", volume(*.is), volume(*.asked))]
    OtherVolume {
        is: Option<Uuid>,
        asked: Option<Uuid>,
        /// What the other volume's header says of its key, if it has a header.
        digest: Option<String>,
    },
    /// None of our identities is among the recipients.
    #[error("it is sealed to {sealed_to}; this host has {ours}")]
    NotForUs {
        sealed_to: String,
        /// Our key ids.
        ours: String,
    },
    /// This host has not taken the answer that the administrator gave it.
    #[error("it opens with what the administrator's answer brings, which this host has not taken")]
    NotJoined,
    /// Not enough of its policy's leaves opened it.
    #[error("its policy is not met: {0}")]
    PolicyNotMet(Box<Told>),
    /// Not enough shares of a threshold could be had.
    #[error("{had} of the {least} shares that it takes could be had")]
    TooFewShares { had: usize, least: usize },
    /// A leaf of a policy.
    #[error(transparent)]
    Leaf(Box<LeafError>),
    /// It was changed after it was sealed.
    #[error("it has been changed since it was sealed")]
    Tampered,
    /// What is inside is not what we seal.
    #[error("its content is not a valid key: {0}")]
    Payload(String),
    /// libcrypto failed.
    #[error("libcrypto failed")]
    Crypto(#[from] ErrorStack),
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
    /// This host's TPM does not open it.
    #[error(transparent)]
    Tpm(#[from] TpmError),
}

impl From<LeafError> for SealError {
    fn from(error: LeafError) -> Self {
        Self::Leaf(Box::new(error))
    }
}

impl SealError {
    /// Whether the file of an identity is not there.
    pub fn is_missing_file(&self) -> bool {
        match self {
            Self::Read { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Self::Tpm(error) => matches!(error, TpmError::NotEnrolled(_)),
            _ => false,
        }
    }
}

impl Advice for SealError {
    fn exit(&self) -> Exit {
        match self {
            Self::Read { .. } | Self::KeyFile { .. } => Exit::Config,
            Self::Malformed(_)
            | Self::Unsupported(_)
            | Self::Other { .. }
            | Self::OtherVolume { .. }
            | Self::NotForUs { .. }
            | Self::NotJoined
            | Self::Tampered
            | Self::Payload(_)
            | Self::TooFewShares { .. }
            | Self::Crypto(_) => Exit::KeyRefused,
            Self::PolicyNotMet(told) => told.exit(),
            Self::Leaf(error) => error.exit(),
            Self::Memory(error) => error.exit(),
            Self::Tpm(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Read { .. } | Self::KeyFile { .. } => {
                "check the path, here or in owner, escrow and identities in the configuration"
            }
            Self::NotForUs { .. } => "add the private key to the store's identities; the escrow key opens it, too",
            Self::NotJoined => "take the file that 'host admit' wrote for this host: cryptattach host join ANSWER",
            Self::Tampered | Self::Malformed(_) | Self::Payload(_) => {
                "restore this key from a replica or backup of the key store"
            }
            Self::Other { .. } => "check the reference; the store may have mixed up keys, or may lie",
            Self::OtherVolume { .. } => {
                "check that this is the right device, and the right key for it ('cryptattach key list' shows them)"
            }
            Self::Tpm(error) => return error.next_step(),
            Self::PolicyNotMet(told) if told.lacks_a_person() => {
                "a person can open it: run this at a terminal, or with --answer FILE"
            }
            Self::PolicyNotMet(_) | Self::TooFewShares { .. } => {
                "bring back enough of the leaves that failed; the escrow key opens it, too, if the policy names it"
            }
            Self::Leaf(error) => return error.next_step(),
            Self::Unsupported(_) | Self::Crypto(_) => return None,
            Self::Memory(error) => return error.next_step(),
        };
        Some(step.into())
    }
}

#[cfg(test)]
mod tests;
