//! Receipts: what was erased, what each store said, what was verified and what cannot be promised, signed by the host that did it.
//!
//! The key that signs is the host's own, made with its first receipt. It opens nothing.

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
};

use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::{
    base::{advice::Advice, exit::Exit, hex, key::KeyReference},
    config::Config,
    keys::seal::{
        Identity, OwnerKey, SealError,
        jws::{self, NotSigned},
    },
    sys::{durable, state},
};

/// The largest receipt that is read; one with many replicas has a tenth of that.
const MOST_BYTES: usize = 64 << 10;
/// The most places of a key that are named.
pub const MOST_PLACES: usize = 64;

/// What no erase can promise.
pub const NOT_PROMISED: [&str; 5] = [
    "copies of the sealed key that were made before, in backups of the store for one: they are not known here",
    "keys that a host or person had opened before: they may have kept them, and with a copy of the data they read it",
    "a keyslot's passphrase opens any copy of the header that was made before",
    "flash memory, journals and snapshots may keep what was written over or deleted",
    "lockboxes of other hosts keep their entries until those expire",
];

/// What is signed, and the version of its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    #[serde(rename = "cryptattach erase receipt 1")]
    Erase,
}

/// What was erased, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    pub kind: Kind,
    /// The host that did it, by its own word.
    pub host: String,
    /// Seconds since 1970-01-01 UTC.
    pub begun: u64,
    pub ended: u64,
    /// The volume: the path of its device.
    pub device: String,
    /// That of a detached header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detached_header: Option<String>,
    pub volume: Uuid,
    pub header: HeaderWas,
    pub keys: Vec<KeyWas>,
    /// Keys that are still there, and may open copies of the volume: the one before a rotation.
    pub kept: Vec<KeyReference>,
    /// What was looked at afterwards, and found right.
    pub verified: Vec<String>,
    /// What nobody may conclude from it.
    pub not_promised: Vec<String>,
}

/// The header as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeaderWas {
    pub sequence: u64,
    /// Of one copy of the metadata: so many bytes at that place.
    #[serde(with = "hex")]
    pub sha256: [u8; 32],
    pub at: u64,
    pub bytes: u64,
    /// The volume key's digest, as the header had it.
    pub digest: String,
    /// So many bytes were written over, with the keyslots.
    pub wiped_bytes: u64,
}

/// A key that was the volume's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyWas {
    pub key: KeyReference,
    /// Its store in words.
    pub store: String,
    /// Where it rested there.
    pub places: Vec<String>,
    pub answer: Answer,
    /// Whether this host's lockbox had an entry of it, which is removed; `None` if it has no lockbox.
    pub lockbox_entry: Option<bool>,
}

/// What the store said to the deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It has done it.
    Deleted,
    /// The command was interrupted; when it went on, the store had the key no more.
    GoneMeanwhile,
    /// It did not have the key.
    NotThere,
}

impl Answer {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Deleted => "deleted by its store, which has no such key any more when it is asked again",
            Self::GoneMeanwhile => "gone from its store when an interrupted erase went on",
            Self::NotThere => "its store did not have it",
        }
    }
}

/// A receipt cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    /// It does not have the form.
    #[error("{} is not a receipt: {why}", .path.display())]
    NoReceipt { path: PathBuf, why: String },
    /// The signature does not fit.
    #[error("{} was changed, or its signature is not its own", .0.display())]
    Changed(PathBuf),
    /// Somebody else has signed it.
    #[error("{} is signed by another key, {is}; expected {expected}", .path.display())]
    OtherSigner { path: PathBuf, is: String, expected: String },
    /// Nobody has said whose signature it has to be.
    #[error("{} is signed by the key {is}, and this host has no such key", .path.display())]
    UnknownSigner { path: PathBuf, is: String },
    /// Reading or writing.
    #[error("cannot {action} {}", .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The key that signs.
    #[error("the key that signs receipts cannot be used")]
    Key(#[source] SealError),
}

impl Advice for ReceiptError {
    fn exit(&self) -> Exit {
        match self {
            Self::Io { .. } => Exit::Io,
            Self::Key(error) => error.exit(),
            _ => Exit::ReceiptRefused,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::NoReceipt { .. } | Self::Changed(_) => {
                "take the file that 'cryptattach key erase' has written; the host's audit record has its SHA-256".into()
            }
            Self::OtherSigner { .. } => "do not believe it before it is clear who signed it".into(),
            Self::UnknownSigner { is, .. } => format!(
                "compare that with what 'cryptattach receipt key' prints on the host that has erased; if it is the same: --signer {is}"
            )
            .into(),
            Self::Key(error) => return error.next_step(),
            Self::Io { .. } => return None,
        })
    }
}

/// This host's key that signs, and where receipts rest.
pub struct Desk {
    folder: PathBuf,
}

impl Desk {
    /// In the state directory; nothing is looked at yet.
    pub fn of(config: &Config) -> Self {
        Self { folder: config.state.join("receipts") }
    }

    /// Where a receipt goes that nobody has named a file for.
    pub fn file(&self, volume: Uuid, begun: u64) -> PathBuf {
        // A copy of a volume may be erased within the same second.
        let name = |count: u32| match count {
            0 => self.folder.join(format!("{volume}-{begun}.json")),
            _ => self.folder.join(format!("{volume}-{begun}-{count}.json")),
        };
        (0..).map(name).find(|file| !file.exists()).unwrap_or_else(|| name(0))
    }

    fn key_file(&self) -> PathBuf {
        self.folder.join("signing.key")
    }

    /// The key, if there is one.
    fn key(&self) -> Result<Option<OwnerKey>, ReceiptError> {
        let path = self.key_file();
        path.exists().then(|| OwnerKey::read(&path)).transpose().map_err(ReceiptError::Key)
    }

    /// The key; it is made the first time.
    fn key_or_new(&self) -> Result<OwnerKey, ReceiptError> {
        if let Some(key) = self.key()? {
            return Ok(key);
        }
        let key = OwnerKey::generate().map_err(ReceiptError::Key)?;
        let (pem, path) = (key.private_pem().map_err(ReceiptError::Key)?, self.key_file());
        state::create(&path, pem.expose()).map_err(io_error("write", &path))?;
        // Of two commands at once one has made it.
        self.key()?.ok_or_else(|| io_error("read", &path)(io::ErrorKind::NotFound.into()))
    }

    /// The public key, as JWK, and its thumbprint; it is made the first time.
    pub fn public(&self) -> Result<(Value, String), ReceiptError> {
        let recipient = self.key_or_new()?.recipient().map_err(ReceiptError::Key)?;
        let jwk = recipient.jwk().map_err(ReceiptError::Key)?;
        Ok((Value::Object(jwk), recipient.kid().to_owned()))
    }

    /// Signs a receipt and writes it; the SHA-256 of the file. What is there stays, and `None` is returned, unless an interrupted
    /// run of the same erase has written it.
    pub fn write(&self, receipt: &Receipt, path: &Path) -> Result<Option<[u8; 32]>, ReceiptError> {
        let payload = serde_json::to_vec(receipt).map_err(|error| io_error("write", path)(error.into()))?;
        let key = self.key_or_new()?;
        let mut signed = jws::sign(&payload, &key).map_err(ReceiptError::Key)?;
        signed.push(b'\n');
        let is_own = |written: Receipt| (written.volume, written.begun) == (receipt.volume, receipt.begun);
        let written = match durable::create(path, &signed) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !verify(path, Some(key.kid())).is_ok_and(is_own) {
                    return Ok(None);
                }
                durable::replace(path, &signed)
            }
            written => written,
        };
        written.map_err(io_error("write", path))?;
        Ok(Some(sha256(&signed)))
    }

    /// The thumbprint of the key, if there is one.
    pub fn signer(&self) -> Result<Option<String>, ReceiptError> {
        Ok(self.key()?.map(|key| key.kid().to_owned()))
    }
}

/// Reads a receipt that has to be signed by the key with this thumbprint.
pub fn verify(path: &Path, signer: Option<&str>) -> Result<Receipt, ReceiptError> {
    let no_receipt = |why: &str| ReceiptError::NoReceipt { path: path.to_owned(), why: why.to_owned() };
    let signed = jws::verify(&read(path)?).map_err(|why| match why {
        NotSigned::Malformed => no_receipt("it is not a JWS with ES256"),
        NotSigned::Changed => ReceiptError::Changed(path.to_owned()),
    })?;
    let (path, is) = (path.to_owned(), signed.signer);
    match signer {
        Some(expected) if expected == is => {
            serde_json::from_slice(&signed.payload).map_err(|error| no_receipt(&error.to_string()))
        }
        Some(expected) => Err(ReceiptError::OtherSigner { path, is, expected: expected.to_owned() }),
        None => Err(ReceiptError::UnknownSigner { path, is }),
    }
}

/// Not more than a receipt can have.
fn read(path: &Path) -> Result<Vec<u8>, ReceiptError> {
    let no_receipt = |why: String| ReceiptError::NoReceipt { path: path.to_owned(), why };
    match durable::read_bounded(path, MOST_BYTES) {
        Ok(bytes) if bytes.len() > MOST_BYTES => Err(no_receipt(format!("it has more than {MOST_BYTES} bytes"))),
        Err(error) if error.kind() == io::ErrorKind::Other => Err(no_receipt("it is not a file".to_owned())),
        read => read.map_err(io_error("open", path)),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ReceiptError {
    let path = path.to_owned();
    move |source| ReceiptError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::unlock::testing::Site;

    fn receipt() -> Receipt {
        Receipt {
            kind: Kind::Erase,
            host: "a".to_owned(),
            begun: 1,
            ended: 2,
            device: "/dev/vdb".to_owned(),
            detached_header: None,
            volume: Uuid::nil(),
            header: HeaderWas {
                sequence: 3,
                sha256: [7; 32],
                at: 0,
                bytes: 16384,
                digest: "d".to_owned(),
                wiped_bytes: 9,
            },
            keys: Vec::new(),
            kept: Vec::new(),
            verified: Vec::new(),
            not_promised: NOT_PROMISED.map(str::to_owned).to_vec(),
        }
    }

    #[test]
    fn a_receipt_is_believed_by_its_signer_only() {
        let (site, other) = (Site::with(""), Site::with(""));
        let [desk, others] = [&site, &other].map(|site| Desk::of(&site.config));
        let path = site.path("r.json");
        let verified = |desk: &Desk| verify(&path, desk.signer().unwrap().as_deref());
        let nobody = || verified(&desk).unwrap_err();
        others.write(&receipt(), &path).unwrap();
        assert!(matches!(nobody(), ReceiptError::UnknownSigner { .. }), "there is no key here yet");
        desk.public().unwrap();
        assert!(matches!(nobody(), ReceiptError::OtherSigner { .. }));
        assert_eq!(verified(&others).unwrap(), receipt());
        assert_eq!(desk.write(&receipt(), &path).unwrap(), None, "what others have written stays");
        fs::remove_file(&path).unwrap();
        assert!(desk.write(&receipt(), &path).unwrap().is_some());
        assert!(desk.write(&receipt(), &path).unwrap().is_some(), "its own is written once more");
        assert!(matches!(verified(&others), Err(ReceiptError::OtherSigner { .. })));
        assert_eq!(verified(&desk).unwrap(), receipt());
    }

    #[test]
    fn a_signed_thing_of_another_kind_is_no_receipt() {
        let site = Site::with("");
        let (desk, path) = (Desk::of(&site.config), site.path("r.json"));
        let key = desk.key_or_new().unwrap();
        let json = serde_json::to_value(receipt()).unwrap();
        let (mut other, mut more) = (json.clone(), json);
        other["kind"] = "cryptattach move receipt 1".into();
        more["also"] = true.into();
        for payload in [other.to_string(), more.to_string(), "[".repeat(40_000), String::new()] {
            fs::write(&path, jws::sign(payload.as_bytes(), &key).unwrap()).unwrap();
            let refused = verify(&path, Some(key.kid())).unwrap_err();
            assert!(matches!(refused, ReceiptError::NoReceipt { .. }), "{refused:?}");
        }
    }
}
