//! Our LUKS2 token: it says where the volume key is, never what it is.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::key::{KeyId, KeyReference, StoreName};

/// The token's type; also the name by which libcryptsetup looks for a plug-in.
pub const TYPE: &str = "cryptattach";

/// `{"type":"cryptattach","keyslots":["0"],"store":"cinder","key":"3f2a..."}`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Token {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    store: StoreName,
    key: KeyId,
}

impl Token {
    /// A token for a key and the keyslots whose passphrase is sealed with it.
    pub fn new(reference: &KeyReference, keyslots: Vec<String>) -> Self {
        Self { kind: TYPE.to_owned(), keyslots, store: reference.store.clone(), key: reference.key }
    }

    /// Reads a token of ours; `None` if it is someone else's.
    pub fn from_json(json: &Value) -> Option<Result<Self, serde_json::Error>> {
        (json.get("type")?.as_str()? == TYPE).then(|| Self::deserialize(json))
    }

    /// The key's place.
    pub fn reference(self) -> KeyReference {
        KeyReference { store: self.store, key: self.key }
    }
}
