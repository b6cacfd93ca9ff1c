//! Our LUKS2 token: it says where the volume key is, never what it is.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::key::{KeyId, KeyReference, StoreName};

/// The token's type; also the name by which libcryptsetup looks for a plug-in.
pub const TYPE: &str = "cryptattach";

/// `{"type":"cryptattach","keyslots":["0"],"store":"cinder","key":"3f2a..."}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Token {
    #[serde(rename = "type")]
    kind: String,
    pub(super) keyslots: Vec<String>,
    store: StoreName,
    key: KeyId,
    /// The key that takes its place, from before a rotation begins until it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<Next>,
}

/// `{"store":"cinder","key":"77b0...","digest":"1","keyslots":[]}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Next {
    store: StoreName,
    key: KeyId,
    /// The number of its digest: the data's digest says which of the two keys counts.
    pub(super) digest: String,
    /// The keyslots of the token that stay.
    pub(super) keyslots: Vec<String>,
}

impl Token {
    /// A token for a key and the keyslots whose passphrase is sealed with it.
    pub fn new(reference: &KeyReference, keyslots: Vec<String>) -> Self {
        Self { kind: TYPE.to_owned(), keyslots, store: reference.store.clone(), key: reference.key, next: None }
    }

    /// The same with the key that is to take its place, and the keyslots that are needed until then.
    pub fn with_next(self, next: Next, keyslots: Vec<String>) -> Self {
        Self { keyslots, next: Some(next), ..self }
    }

    /// Reads a token of ours; `None` if it is someone else's.
    pub fn from_json(json: &Value) -> Option<Result<Self, serde_json::Error>> {
        (json.get("type")?.as_str()? == TYPE).then(|| Self::deserialize(json))
    }

    /// The place of the key whose digest has this number.
    pub fn reference(&self, digest: &str) -> KeyReference {
        match &self.next {
            Some(next) if next.digest == digest => next.reference(),
            _ => self.old_reference(),
        }
    }

    /// Whether another key is to take the place of its key.
    pub fn has_next(&self) -> bool {
        self.next.is_some()
    }

    /// The place of the key that it names first.
    pub fn old_reference(&self) -> KeyReference {
        KeyReference { store: self.store.clone(), key: self.key }
    }
}

impl Next {
    /// A next key.
    pub fn new(reference: &KeyReference, digest: String, keyslots: Vec<String>) -> Self {
        Self { store: reference.store.clone(), key: reference.key, digest, keyslots }
    }

    /// Its place.
    pub fn reference(&self) -> KeyReference {
        KeyReference { store: self.store.clone(), key: self.key }
    }
}
