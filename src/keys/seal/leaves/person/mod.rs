//! `recovery = "FILE"` and `passphrase = "FILE"`: what a person has on paper or in mind.
//!
//! Such a leaf is a key pair on P-256 of its own. What is sealed to it is sealed to its public key, so a rotation or another
//! policy needs nobody. Its private key is encrypted under the recovery key or passphrase ([`Locked`]). That stands in a file
//! on this host and, with each recipient, in the store: `"person": {"by", "key"}`. So a copy of the store and the words are
//! enough.

mod locked;
mod words;

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::Deserialize;
use serde_json::{Value, json};

pub use locked::Locked;
pub use words::{WORDS, WordsError};

use super::{Kind, LeafError};
use crate::{
    base::key::{JoseHeader, JweRecipient, SealedKey, SecretBytes},
    config::{ConfigError, ConfigPath, LeafConfig, LeafName, Network},
    keys::seal::{ContentKey, OwnerKey, OwnerRecipient, Recipient, SealError, Shape},
};

/// The member of a recipient's header.
pub(in crate::keys::seal) const MEMBER: &str = "person";
/// The most such leaves of one key: each takes a second for an answer.
pub(in crate::keys::seal) const MOST: usize = 4;
/// A leaf's file has 800 bytes.
const MOST_FILE_BYTES: u64 = 16 * 1024;
/// The shortest passphrase.
const LEAST_PASSPHRASE_BYTES: usize = 12;

/// By what it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Words that were made at random.
    Recovery,
    /// What somebody chose.
    Passphrase,
}

impl By {
    /// The member of `[leaves.NAME]` that tells it, and its name in headers and files.
    pub(super) const fn member(self) -> &'static str {
        match self {
            Self::Recovery => "recovery",
            Self::Passphrase => "passphrase",
        }
    }

    fn of(member: Option<&Value>) -> Option<Self> {
        let by = member?.as_str()?;
        [Self::Recovery, Self::Passphrase].into_iter().find(|known| known.member() == by)
    }

    /// In words for people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Recovery => "recovery key",
            Self::Passphrase => "passphrase",
        }
    }

    /// How often it is hashed. A recovery key has 132 random bits, and `jose` opens up to 32768.
    fn iterations(self) -> u32 {
        match self {
            Self::Recovery => 1000,
            Self::Passphrase => 600_000,
        }
    }

    /// What was typed, in the form that a key is derived from.
    pub fn read(self, typed: &SecretBytes) -> Result<SecretBytes, SealError> {
        match self {
            Self::Recovery => words::read(typed)?.map_err(|error| LeafError::Words(error).into()),
            Self::Passphrase => Ok(SecretBytes::copy_of(typed.expose())?),
        }
    }
}

/// A new recovery key.
pub fn new_words() -> Result<SecretBytes, SealError> {
    Ok(words::random()?)
}

/// Refuses a passphrase that is guessed soon, whatever hashes it.
pub fn check_passphrase(passphrase: &SecretBytes) -> Result<(), SealError> {
    let (is, least) = (passphrase.len(), LEAST_PASSPHRASE_BYTES);
    if is < least { Err(LeafError::TooShort { is, least }.into()) } else { Ok(()) }
}

/// What a leaf's file has.
pub struct Kept {
    by: By,
    public: OwnerRecipient,
    locked: Locked,
}

impl Kept {
    /// A new key pair that this opens.
    pub fn new(by: By, answer: &SecretBytes) -> Result<Self, SealError> {
        let key = OwnerKey::generate()?;
        Ok(Self { by, public: key.recipient()?, locked: Locked::new(&key, answer, by.iterations())? })
    }

    /// Reads a leaf's file.
    pub fn read(path: &Path) -> Result<Self, SealError> {
        let failed = |source| SealError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(MOST_FILE_BYTES).read_to_end(&mut bytes)).map_err(failed)?;
        let unusable = |why: String| SealError::KeyFile { path: path.to_owned(), why };
        let kept =
            Self::of(&bytes).map_err(|error| unusable(format!("is not the file of a person's leaf: {error}")))?;
        Ok(kept)
    }

    /// Reads the bytes of such a file.
    pub fn of(bytes: &[u8]) -> Result<Self, SealError> {
        let malformed = || SealError::Unsupported("it has not the members 'by', 'public' and 'key'".to_owned());
        let mut json: JoseHeader = serde_json::from_slice(bytes).map_err(|_| malformed())?;
        let by = By::of(json.get("by")).ok_or_else(malformed)?;
        let (Some(Value::Object(public)), Some(key), 3) = (json.remove("public"), json.remove("key"), json.len() + 2)
        else {
            return Err(malformed());
        };
        let public = OwnerRecipient::from_jwk(&public);
        let public = public.map_err(|why| SealError::Unsupported(format!("its public key {why}")))?;
        Ok(Self { by, public, locked: Locked::of(SealedKey::from_value(key)?)? })
    }

    /// For the file. There is no secret in it.
    pub fn to_json(&self) -> Result<String, SealError> {
        let json = json!({"by": self.by.member(), "public": self.public.jwk()?, "key": self.locked.to_value()?});
        Ok(json.to_string() + "\n")
    }

    /// The private key, if this is what it opens by.
    pub fn open(&self, answer: &SecretBytes) -> Result<Option<OwnerKey>, SealError> {
        self.locked.open(answer, self.public.kid())
    }
}

/// What a recipient's entry says of a person.
pub struct Entry {
    pub by: By,
    kid: String,
    locked: Locked,
}

impl Entry {
    /// Reads it, within bounds; `None` if it is none.
    pub fn of(header: &JoseHeader) -> Option<Result<Self, SealError>> {
        let member = header.get(MEMBER)?;
        let read = || {
            let wrong = |what: &str| SealError::Unsupported(format!("a person's leaf of its policy has {what}"));
            let by = By::of(member.get("by")).ok_or_else(|| wrong("an unsupported 'by'"))?;
            let kid = header.get("kid").and_then(Value::as_str).ok_or_else(|| wrong("no kid"))?.to_owned();
            let key = member.get("key").cloned().ok_or_else(|| wrong("no 'key'"))?;
            Ok(Self { by, kid, locked: Locked::of(SealedKey::from_value(key)?)? })
        };
        Some(read())
    }

    /// The id of its public key.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The private key, if this is what it opens by.
    pub fn open(&self, answer: &SecretBytes) -> Result<Option<OwnerKey>, SealError> {
        self.locked.open(answer, &self.kid)
    }
}

/// Of either kind: which it is was told by the member's name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(alias = "passphrase")]
    recovery: ConfigPath,
}

pub(super) fn recovery(_: &LeafName, config: &LeafConfig, _: Network) -> Result<Box<dyn Kind>, ConfigError> {
    Ok(Box::new(Person::new(By::Recovery, config.read::<Table>()?.recovery)))
}

pub(super) fn passphrase(_: &LeafName, config: &LeafConfig, _: Network) -> Result<Box<dyn Kind>, ConfigError> {
    Ok(Box::new(Person::new(By::Passphrase, config.read::<Table>()?.recovery)))
}

/// A leaf of the configuration.
struct Person {
    by: By,
    file: PathBuf,
    /// The key id that the file has, once it was looked at.
    kid: OnceLock<Option<String>>,
}

impl Person {
    fn new(by: By, file: ConfigPath) -> Self {
        Self { by, file: file.to_path_buf(), kid: OnceLock::new() }
    }

    fn kept(&self) -> Result<Kept, SealError> {
        let kept = Kept::read(&self.file).map_err(|error| match error {
            SealError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                LeafError::NoFile(self.file.clone()).into()
            }
            other => other,
        })?;
        if kept.by == self.by {
            return Ok(kept);
        }
        let why = format!("is that of a {}: write {} = \"...\"", kept.by.describe(), kept.by.member());
        Err(SealError::KeyFile { path: self.file.clone(), why })
    }
}

impl Kind for Person {
    fn recipients(&self, _: &Path) -> Result<Vec<Box<dyn Recipient>>, SealError> {
        let Kept { by, public, locked } = self.kept()?;
        let member = json!({"by": by.member(), "key": locked.to_value()?});
        Ok(vec![Box::new(PersonRecipient { public, member })])
    }

    /// A host that has lost the file, or never had it, goes by what the store says.
    fn is_for(&self, header: &JoseHeader) -> bool {
        let by = header.get(MEMBER).and_then(|member| member.get("by")).and_then(Value::as_str);
        let kid = || self.kid.get_or_init(|| Some(self.kept().ok()?.public.kid().to_owned()));
        by == Some(self.by.member())
            && kid().as_deref().is_none_or(|kid| header.get("kid").and_then(Value::as_str) == Some(kid))
    }

    fn files(&self) -> Vec<&Path> {
        vec![&self.file]
    }

    fn person(&self) -> Option<(By, &Path)> {
        Some((self.by, &self.file))
    }
}

/// A person's public key: seals.
struct PersonRecipient {
    public: OwnerRecipient,
    member: Value,
}

impl Recipient for PersonRecipient {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        let mut entry = self.public.seal(key)?;
        entry.header.insert(MEMBER.to_owned(), self.member.clone());
        Ok(entry)
    }

    fn shape(&self) -> Shape {
        self.public.shape()
    }
}
