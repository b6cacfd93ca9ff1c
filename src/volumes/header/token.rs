//! Our LUKS2 token: it says where the volume key is, never what it is. And the tokens of clevis, which are read only where a
//! person wants that.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::encrypting::Progress;
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
    /// While the volume is being encrypted in place: how far that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) encrypting: Option<Progress>,
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
        Self {
            kind: TYPE.to_owned(),
            keyslots,
            store: reference.store.clone(),
            key: reference.key,
            next: None,
            encrypting: None,
        }
    }

    /// The same with the key that is to take its place, and the keyslots that are needed until then.
    pub fn with_next(self, next: Next, keyslots: Vec<String>) -> Self {
        Self { keyslots, next: Some(next), ..self }
    }

    /// The same for a key that is kept elsewhere now.
    pub fn moved(self, to: &KeyReference) -> Self {
        Self { store: to.store.clone(), key: to.key, ..self }
    }

    /// The same with one more keyslot.
    pub fn claiming(mut self, keyslot: u32) -> Self {
        self.keyslots.push(keyslot.to_string());
        self
    }

    /// The same of a volume that is being encrypted in place, or is not any more.
    pub fn with_progress(self, encrypting: Option<Progress>) -> Self {
        Self { encrypting, ..self }
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

/// The type of clevis' tokens.
const CLEVIS: &str = "clevis";
/// The most tokens of clevis that are looked at.
const MOST_CLEVIS: usize = 8;

/// A token of clevis: a passphrase that is bound to servers or to this machine. The header's word alone.
#[derive(Clone, Debug)]
pub struct ClevisToken {
    /// Its number.
    pub number: String,
    /// The keyslots that the passphrase opens.
    pub keyslots: Vec<u32>,
    /// The members of a JWE.
    pub jwe: Value,
}

impl ClevisToken {
    /// Those of a header.
    pub fn all<'a>(tokens: impl Iterator<Item = (&'a String, &'a Value)>) -> Vec<Self> {
        let of_clevis = tokens.filter(|(_, token)| token.get("type").is_some_and(|kind| kind == CLEVIS));
        let token = |(number, token): (&String, &Value)| {
            let keyslots = token.get("keyslots").and_then(Value::as_array).into_iter().flatten();
            let keyslots = keyslots.filter_map(|keyslot| keyslot.as_str()?.parse().ok()).collect();
            Self { number: number.clone(), keyslots, jwe: token.get("jwe").cloned().unwrap_or_default() }
        };
        of_clevis.take(MOST_CLEVIS).map(token).collect()
    }

    /// A token as clevis writes it.
    pub fn json(jwe: &Value, keyslot: u32) -> Value {
        json!({"type": CLEVIS, "keyslots": [keyslot.to_string()], "jwe": jwe})
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_first_tokens_of_clevis_are_looked_at_whatever_is_in_them() {
        let token = |number: u32, token: Value| (number.to_string(), token);
        let mut tokens = BTreeMap::from([
            token(0, json!({"type": "cryptattach", "keyslots": ["0"]})),
            token(1, ClevisToken::json(&json!({"protected": "x"}), 3)),
            token(2, json!({"type": "clevis", "keyslots": [1, "-1", "7", {}], "jwe": 5})),
            token(3, json!({"type": "clevis"})),
            token(4, json!([])),
        ]);
        let found = ClevisToken::all(tokens.iter());
        let keyslots: Vec<_> = found.iter().map(|token| (token.number.as_str(), &token.keyslots[..])).collect();
        assert_eq!(keyslots, [("1", &[3][..]), ("2", &[7]), ("3", &[])]);
        assert_eq!(found[0].jwe["protected"], "x");
        tokens.extend((10..40).map(|number| token(number, json!({"type": "clevis"}))));
        assert_eq!(ClevisToken::all(tokens.iter()).len(), MOST_CLEVIS);
    }
}
