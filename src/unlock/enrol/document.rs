//! The two documents that travel between host and administrator: JSON, versioned, never larger than a few pages.

use std::{io, path::Path};

use openssl::sha::sha256;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tss_esapi::{
    structures::{Public, Signature},
    traits::{Marshall, UnMarshall},
};

use super::EnrolError;
use crate::{
    base::{
        hex,
        key::{HostName, StoreName},
    },
    keys::tpm::{Certified, Digest, Name, Policy, TpmError, public},
    sys::durable,
};

/// The largest document; a request with two certificates has 8 KiB.
const MOST_BYTES: u64 = 64 * 1024;
/// The version that we write and read.
const VERSION: u32 = 1;

/// A document with a type of its own.
pub trait Document: Serialize + DeserializeOwned {
    /// Its `type`, in words.
    const TYPE: &'static str;

    /// Reads a document.
    fn read(path: &Path) -> Result<Self, EnrolError> {
        let failed = |source| EnrolError::File { action: "read", path: path.to_owned(), source };
        let json = durable::read_bounded(path, MOST_BYTES as usize).map_err(failed)?;
        Self::parse(&json).map_err(|why| EnrolError::Document { path: path.to_owned(), expected: Self::TYPE, why })
    }

    /// Reads a document's JSON; says what is wrong with it.
    fn parse(json: &[u8]) -> Result<Self, String> {
        parse(json)
    }

    /// The document's JSON.
    fn to_json(&self) -> Result<Vec<u8>, EnrolError> {
        let mut json = serde_json::to_vec_pretty(&Written { kind: Self::TYPE, version: VERSION, content: self })
            .map_err(|error| TpmError::Structure(error.to_string()))?;
        json.push(b'\n');
        Ok(json)
    }

    /// Whether a file has this very document.
    fn is_in(&self, path: &Path) -> bool {
        self.to_json().is_ok_and(|json| is_in(path, &json))
    }

    /// Writes it into a new file; one that has this very document already is left as it is.
    fn write(&self, path: &Path) -> Result<(), EnrolError> {
        let json = self.to_json()?;
        match durable::create(path, &json) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_in(path, &json) => Ok(()),
            written => written.map_err(|source| EnrolError::File { action: "write", path: path.to_owned(), source }),
        }
    }
}

/// Whether a file has this content.
fn is_in(path: &Path, content: &[u8]) -> bool {
    durable::read_bounded(path, content.len()).is_ok_and(|found| found == content)
}

#[derive(Serialize)]
struct Written<'a, T> {
    #[serde(rename = "type")]
    kind: &'static str,
    version: u32,
    #[serde(flatten)]
    content: &'a T,
}

/// What says whether the rest is worth reading.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "type")]
    kind: String,
    version: u32,
}

fn parse<T: Document>(json: &[u8]) -> Result<T, String> {
    if json.len() as u64 > MOST_BYTES {
        return Err(format!("it has more than {MOST_BYTES} bytes"));
    }
    let damaged = |error: serde_json::Error| format!("it is damaged ({error})");
    let mut value: serde_json::Value = serde_json::from_slice(json).map_err(damaged)?;
    let head: Head = Head::deserialize(&value).map_err(|error| format!("it does not say what it is ({error})"))?;
    if head.kind != T::TYPE {
        return Err(format!("it is a '{}'", head.kind.chars().take(80).collect::<String>()));
    }
    if head.version != VERSION {
        return Err(format!("it has version {}; this cryptattach supports {VERSION}", head.version));
    }
    // They have been read; what is left must be known, every member of it.
    if let Some(members) = value.as_object_mut() {
        members.remove("type");
        members.remove("version");
    }
    T::deserialize(value).map_err(damaged)
}

/// What a host asks with: what it says of itself, and how its keys were made.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The [`Statement`], as the bytes that are signed: JSON.
    #[serde(with = "base64")]
    statement: Vec<u8>,
    /// The attestation key's word that its TPM made the identity key.
    pub creation: Attestation,
    /// Its word for the counter that the policy names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counter: Option<Attestation>,
}

impl Document for Request {
    const TYPE: &'static str = "cryptattach enrolment request";
}

/// The part of a request that is signed: both attestations carry its SHA-256.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    pub host: HostName,
    /// Seconds since 1970-01-01 UTC, by the host's clock.
    pub created: u64,
    /// Random: no two enrolments have the same digest.
    #[serde(with = "hex")]
    pub nonce: Digest,
    /// The TPM's endorsement keys, with their certificates.
    pub endorsement_keys: Vec<EndorsementKey>,
    /// The attestation key.
    #[serde(with = "sized")]
    pub attestation_key: Public,
    /// The identity key.
    #[serde(with = "sized")]
    pub identity: Public,
    /// The storage root key that both are under.
    pub storage_root: Name,
    pub policy: Policy,
}

/// An endorsement key.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndorsementKey {
    /// The key.
    #[serde(with = "sized")]
    pub public: Public,
    /// Its certificate (DER), if the TPM has one.
    #[serde(default, with = "base64::option", skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Vec<u8>>,
}

/// A TPMS_ATTEST and its signature (TPMT_SIGNATURE), marshalled.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attestation {
    /// What is signed.
    #[serde(with = "base64")]
    pub attest: Vec<u8>,
    /// The signature.
    #[serde(with = "base64")]
    signature: Vec<u8>,
}

impl Attestation {
    /// As the TPM gave it.
    pub fn of(certified: Certified) -> Result<Self, TpmError> {
        Ok(Self { attest: certified.attest, signature: certified.signature.marshall()? })
    }

    /// The signature.
    pub fn signature(&self) -> Result<Signature, TpmError> {
        Ok(Signature::unmarshall(&self.signature)?)
    }
}

impl Statement {
    /// The bytes that are signed.
    pub fn to_json(&self) -> Result<Vec<u8>, TpmError> {
        serde_json::to_vec(self).map_err(|error| TpmError::Structure(error.to_string()))
    }
}

impl Request {
    /// Of a statement's bytes, and what was signed over their digest.
    pub fn of(statement: Vec<u8>, creation: Attestation, counter: Option<Attestation>) -> Self {
        Self { statement, creation, counter }
    }

    /// What the host says: nothing of it is true before [`super::evidence`] has looked.
    pub fn statement(&self, path: &Path) -> Result<Statement, EnrolError> {
        let why = |error| format!("its statement is damaged ({error})");
        serde_json::from_slice(&self.statement).map_err(|error| EnrolError::Document {
            path: path.to_owned(),
            expected: Self::TYPE,
            why: why(error),
        })
    }

    /// What names this enrolment: the digest of its statement.
    pub fn digest(&self) -> Digest {
        sha256(&self.statement)
    }
}

/// The administrator's answer: what admits the host, if its TPM opens it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub host: HostName,
    /// Digest of the request's statement.
    #[serde(with = "hex")]
    pub enrolment: Digest,
    /// Name of the endorsement key that the credential is for.
    pub endorsement_key: Name,
    /// The credential (TPMS_ID_OBJECT): the share, encrypted.
    #[serde(with = "base64")]
    pub credential: Vec<u8>,
    /// The seed that it is encrypted under, encrypted to the endorsement key (TPM2B_ENCRYPTED_SECRET without its length).
    #[serde(with = "base64")]
    pub secret: Vec<u8>,
    /// The store that has the host's lockbox key.
    pub store: StoreName,
    /// That key's generation.
    pub generation: u64,
    /// Its fingerprint.
    pub lockbox_key: String,
}

impl Document for Answer {
    const TYPE: &'static str = "cryptattach enrolment answer";
}

/// A public area as base64 of TPM2B_PUBLIC, for serde's `with`.
pub mod sized {
    use serde::{Deserializer, Serializer, de, ser};

    use super::{Public, base64, public};

    pub fn serialize<S: Serializer>(key: &Public, serializer: S) -> Result<S::Ok, S::Error> {
        base64::serialize(&public::to_sized(key).map_err(ser::Error::custom)?, serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Public, D::Error> {
        public::from_sized(&base64::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// Base64 with padding, for serde's `with`.
pub mod base64 {
    use base64ct::{Base64, Encoding};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base64::encode_string(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        Base64::decode_vec(&String::deserialize(deserializer)?).map_err(|_| de::Error::custom("not base64"))
    }

    /// For what may be missing.
    pub mod option {
        use super::{Base64, Deserialize, Deserializer, Encoding, Serializer, de};

        pub fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
            match bytes {
                Some(bytes) => super::serialize(bytes, serializer),
                None => serializer.serialize_none(),
            }
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
            let text = Option::<String>::deserialize(deserializer)?;
            text.map(|text| Base64::decode_vec(&text).map_err(|_| de::Error::custom("not base64"))).transpose()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote_and_names_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answer");
        let answer = Answer {
            host: "compute-7".parse().unwrap(),
            enrolment: [2; 32],
            endorsement_key: Name::of(b"key"),
            credential: vec![3],
            secret: vec![4],
            store: "cinder".parse().unwrap(),
            generation: 5,
            lockbox_key: "6".to_owned(),
        };
        answer.write(&path).unwrap();
        assert_eq!(Answer::read(&path).unwrap(), answer);
        answer.write(&path).unwrap();
        let other = Answer { generation: 6, ..answer.clone() };
        assert!(matches!(other.write(&path), Err(EnrolError::File { action: "write", .. })), "never overwrites");

        let whole = std::fs::read_to_string(&path).unwrap();
        let cases = [
            (whole[..whole.len() - 9].to_owned(), "damaged"),
            (whole.replace("answer", "request"), "it is a 'cryptattach enrolment request'"),
            (whole.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (whole.replace("\"host\"", "\"hast\""), "unknown field `hast`"),
            (whole.replace("0202", "02"), "64 hexadecimal"),
            (whole.replace("compute-7", "../compute-7"), "not a host name"),
            ("[]".to_owned(), "does not say what it is"),
            (" ".repeat(1 + MOST_BYTES as usize), "more than 65536"),
        ];
        for (text, expected) in cases {
            let why = parse::<Answer>(text.as_bytes()).unwrap_err();
            assert!(why.contains(expected), "{why} has no '{expected}'");
        }
    }
}
