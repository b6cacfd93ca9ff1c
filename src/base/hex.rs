//! Hexadecimal, as systemd and tpm2-tools print digests.

use serde::{Deserialize, Deserializer, Serializer, de};

/// A SHA-256 digest.
type Digest = [u8; 32];

/// As lower-case digits.
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From digits; `None` if there are others.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// For serde's `with`.
pub fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(digest))
}

/// For serde's `with`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digest = decode(&text).and_then(|bytes| bytes.try_into().ok());
    digest.ok_or_else(|| de::Error::custom("not 64 hexadecimal digits"))
}
