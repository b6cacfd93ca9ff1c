//! The sealed key: a JWE in JSON serialization (RFC 7516 section 7.2), as a store keeps it.
//!
//! Here is its form only. [`crate::keys::seal`] makes and opens it.

use base64ct::{Base64UrlUnpadded, Encoding};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{KeyId, ProjectId, StoreName};

/// A JOSE header: named JSON values (RFC 7516 section 4).
pub type JoseHeader = Map<String, Value>;

/// The largest sealed key that we read: a store's answer is not trusted.
pub const MAX_SEALED_BYTES: usize = 256 * 1024;
/// The most recipients that we read.
pub const MAX_RECIPIENTS: usize = 256;

/// What a sealed key says it is for. It stands in the protected header, so it is authenticated with the payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoundContext {
    /// Version of this member: 1.
    pub version: u32,
    pub key_id: KeyId,
    /// The container that the key belongs to.
    pub container: StoreName,
    /// UUID of the volume's LUKS header; null for plain dm-crypt, which has no header.
    pub volume: Option<Uuid>,
    /// The project that the key was made for; absent if that was nobody's in particular.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectId>,
    /// Counts the re-sealings of this key, from 1.
    pub generation: u64,
    /// Seconds since 1970-01-01 UTC at which the key was made.
    pub created: u64,
}

/// One recipient's header and encrypted content key (RFC 7516 section 7.2.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JweRecipient {
    /// Per-recipient unprotected header: `alg`, `kid`, `epk`, ...
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub header: JoseHeader,
    /// The content key, encrypted to this recipient, base64url.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub encrypted_key: String,
}

/// A volume key encrypted to its recipients, as read from or written to a store.
///
/// Only the form has been checked: whom it is for and whether it is authentic is known once [`crate::keys::seal`] opened it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SealedKey {
    /// More that was authenticated with it, base64url. We write none; other JOSE tools may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aad: Option<String>,
    /// Protected header, base64url, to the letter as it was sealed: it is the authenticated data.
    pub protected: String,
    /// Header shared by all recipients, not protected. We write none; other JOSE tools may.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub unprotected: JoseHeader,
    pub recipients: Vec<JweRecipient>,
    /// Initialization vector, base64url.
    pub iv: String,
    /// Encrypted payload, base64url.
    pub ciphertext: String,
    /// Authentication tag, base64url.
    pub tag: String,
}

/// Bytes that are not a sealed key.
#[derive(Debug, thiserror::Error)]
pub enum MalformedSealedKey {
    /// More bytes than any sealed key has.
    #[error("it is {0} bytes long; a sealed key has at most {MAX_SEALED_BYTES}")]
    TooLarge(usize),
    /// The bytes that it is kept as cannot be unpacked.
    #[error("it cannot be unpacked")]
    Packed,
    /// Not JSON, truncated JSON, or JSON of another form.
    #[error("it is not a JWE in JSON serialization")]
    Json(#[source] serde_json::Error),
    /// The members of the general and of the flattened form.
    #[error("it has 'recipients' beside 'header' or 'encrypted_key'")]
    BothForms,
    /// No recipient, or too many.
    #[error("it has {0} recipients; expected 1 to {MAX_RECIPIENTS}")]
    Recipients(usize),
    /// The protected header is not base64url of a JSON object.
    #[error("its protected header is not base64url JSON")]
    Protected,
    /// It names another key id than the one it is kept under.
    #[error("it belongs to the key {0}")]
    OtherKey(KeyId),
    /// The protected header has no `cryptattach` member of the form we know.
    #[error("its protected header does not say what the key is for: {0}")]
    Context(String),
}

/// The general form, and the flattened form with one recipient's members at the top (RFC 7516 section 7.2.2), which
/// `jose` writes for a single recipient.
#[derive(Deserialize)]
struct AnyForm {
    protected: String,
    #[serde(default)]
    unprotected: JoseHeader,
    recipients: Option<Vec<JweRecipient>>,
    header: Option<JoseHeader>,
    encrypted_key: Option<String>,
    aad: Option<String>,
    iv: String,
    ciphertext: String,
    tag: String,
}

impl SealedKey {
    /// Reads the JSON form, general or flattened.
    pub fn from_json(bytes: &[u8]) -> Result<Self, MalformedSealedKey> {
        if bytes.len() > MAX_SEALED_BYTES {
            return Err(MalformedSealedKey::TooLarge(bytes.len()));
        }
        Self::of(serde_json::from_slice(bytes).map_err(MalformedSealedKey::Json)?)
    }

    /// Reads it out of a value that a sealed key has in its header: its size is bounded by that of the whole.
    pub fn from_value(value: Value) -> Result<Self, MalformedSealedKey> {
        Self::of(serde_json::from_value(value).map_err(MalformedSealedKey::Json)?)
    }

    fn of(any: AnyForm) -> Result<Self, MalformedSealedKey> {
        let recipients = match (any.recipients, any.header, any.encrypted_key) {
            (Some(recipients), None, None) => recipients,
            (None, header, encrypted_key) => {
                let (header, encrypted_key) = (header.unwrap_or_default(), encrypted_key.unwrap_or_default());
                vec![JweRecipient { header, encrypted_key }]
            }
            // One reader would take the one, another reader the other (RFC 7516 section 7.2.2).
            (Some(_), ..) => return Err(MalformedSealedKey::BothForms),
        };
        if !(1..=MAX_RECIPIENTS).contains(&recipients.len()) {
            return Err(MalformedSealedKey::Recipients(recipients.len()));
        }
        let AnyForm { protected, unprotected, aad, iv, ciphertext, tag, .. } = any;
        Ok(Self { protected, unprotected, recipients, aad, iv, ciphertext, tag })
    }

    /// The JSON form (general), one line, ending in a newline.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("strings and maps always serialize");
        json.push(b'\n');
        json
    }

    /// What was authenticated besides the content (RFC 7516 section 5.1, step 14).
    pub fn authenticated(&self) -> Vec<u8> {
        match &self.aad {
            None => self.protected.clone().into_bytes(),
            Some(aad) => format!("{}.{aad}", self.protected).into_bytes(),
        }
    }

    /// The protected header. It is authentic only after the key was opened.
    pub fn protected_header(&self) -> Result<JoseHeader, MalformedSealedKey> {
        let json = Base64UrlUnpadded::decode_vec(&self.protected).map_err(|_| MalformedSealedKey::Protected)?;
        serde_json::from_slice(&json).map_err(|_| MalformedSealedKey::Protected)
    }

    /// What the key claims to be for. Authentic only after the key was opened.
    pub fn claimed_context(&self) -> Result<BoundContext, MalformedSealedKey> {
        let member = self
            .protected_header()?
            .remove("cryptattach")
            .ok_or_else(|| MalformedSealedKey::Context("no member 'cryptattach'".to_owned()))?;
        serde_json::from_value(member).map_err(|error| MalformedSealedKey::Context(error.to_string()))
    }

    /// What the key claims to be for, which has to be the key of this id.
    pub fn claimed_context_of(&self, id: &KeyId) -> Result<BoundContext, MalformedSealedKey> {
        let claimed = self.claimed_context()?;
        if claimed.key_id == *id { Ok(claimed) } else { Err(MalformedSealedKey::OtherKey(claimed.key_id)) }
    }

    /// The generation that it claims, whatever kind of key it is.
    pub fn claimed_generation(&self) -> Result<u64, MalformedSealedKey> {
        let header = self.protected_header()?;
        let generation = header.get("cryptattach").and_then(|member| member.get("generation")?.as_u64());
        generation.ok_or_else(|| MalformedSealedKey::Context("no generation".to_owned()))
    }

    /// The key ids (`kid`, RFC 7638 thumbprints) of the recipients that name one.
    pub fn recipient_kids(&self) -> impl Iterator<Item = &str> {
        self.recipients.iter().filter_map(|recipient| recipient.header.get("kid")?.as_str())
    }
}
