//! Identities: what opens a sealed key, a file per kind; and what the rest of the program has to know of a kind.

mod candidate;
mod container_key;
mod lockbox_key;
mod pem;
mod tpm;

use std::path::{Path, PathBuf};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::Value;

pub use candidate::Candidate;
pub use container_key::ContainerKey;
pub use lockbox_key::{Entry, EntryContext, LockboxKey};
pub use pem::{FLAWED, OwnerKey, OwnerRecipient, is_flawed};
pub use tpm::TpmIdentity;

use super::{ContentKey, SealError};
use crate::{
    base::key::{JoseHeader, JweRecipient, Place},
    config::{ConfigPath, IdentitySpec, TpmConfig},
    keys::store::Server,
};

/// Someone who can open what was sealed to them.
pub trait Identity: Send + Sync {
    /// The key's id: an RFC 7638 thumbprint, or a container key's name.
    fn kid(&self) -> &str;
    /// The `alg` of entries that are for it.
    fn alg(&self) -> &str;
    /// Whether it asks a device or a server, which may take a while.
    fn takes_time(&self) -> bool {
        false
    }
    /// Decrypts the content key; `None` if it was encrypted to another key, or damaged.
    fn unwrap(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError>;
    /// Decrypts the content key; `None` if this entry is not for this identity.
    ///
    /// `header` is the entry's joint header: protected, shared and per-recipient members together.
    fn open(&self, entry: &JweRecipient, header: &JoseHeader) -> Option<Result<ContentKey, SealError>> {
        let text = |name: &str| header.get(name).and_then(Value::as_str);
        let named = match text("kid") {
            Some(kid) if kid != self.kid() => return None,
            kid => kid.is_some(),
        };
        if text("alg") != Some(self.alg()) {
            let algorithm = text("alg").unwrap_or("none");
            return named.then(|| {
                Err(SealError::Unsupported(format!(
                    "it is sealed to this host with the unsupported algorithm '{algorithm}'"
                )))
            });
        }
        let encrypted_key = Base64UrlUnpadded::decode_vec(&entry.encrypted_key).unwrap_or_default();
        match self.unwrap(&encrypted_key, header) {
            Ok(Some(key)) => Some(Ok(key)),
            // Without a kid the entry may be anyone's; with ours it should have opened.
            Ok(None) => named.then_some(Err(SealError::Tampered)),
            // What a TPM refuses may be ours all the same.
            Err(error) => (named || matches!(error, SealError::Tpm(_))).then_some(Err(error)),
        }
    }
}

/// A kind of identity, as the configuration names it.
pub trait Kind {
    /// The identity.
    fn open(&self, tpm: &TpmConfig) -> Result<Box<dyn Identity>, SealError>;
    /// Refuses a file of another kind, if it is there; no secret is read for that.
    fn check(&self) -> Result<(), SealError>;
    /// What rests on this host, and whether it opens keys by itself.
    fn place(&self) -> Place;
    /// The files that it takes.
    fn files(&self) -> Vec<&Path>;
    /// Whether it needs this host's TPM.
    fn needs_tpm(&self) -> bool {
        false
    }
    /// Whether any machine that has its files can open keys.
    fn is_secret(&self) -> bool;
    /// The servers that it asks.
    fn servers(&self) -> Vec<Server> {
        Vec::new()
    }
}

/// How a kind takes what stands behind its scheme.
type Make = for<'a> fn(&'a ConfigPath) -> Box<dyn Kind + 'a>;

/// The kinds of identities by their schemes.
const KINDS: &[(&str, Make)] = &[("", pem::kind), ("tpm", tpm::kind)];

/// The kind of an identity.
pub fn kind(spec: &IdentitySpec) -> Box<dyn Kind + '_> {
    match KINDS.iter().find(|(scheme, _)| *scheme == spec.scheme) {
        Some((_, make)) => make(&spec.path),
        None => Box::new(Unknown(spec)),
    }
}

/// What has a scheme that no kind has: refused whatever it is wanted for, and taken for the worst until then.
struct Unknown<'a>(&'a IdentitySpec);

impl Kind for Unknown<'_> {
    fn open(&self, _: &TpmConfig) -> Result<Box<dyn Identity>, SealError> {
        Err(self.refusal())
    }

    fn check(&self) -> Result<(), SealError> {
        Err(self.refusal())
    }

    fn place(&self) -> Place {
        Place::path("private key", &*self.0.path, true)
    }

    fn files(&self) -> Vec<&Path> {
        Vec::new()
    }

    fn is_secret(&self) -> bool {
        true
    }
}

impl Unknown<'_> {
    fn refusal(&self) -> SealError {
        let known: Vec<_> = KINDS.iter().filter(|(scheme, _)| !scheme.is_empty()).map(|(scheme, _)| *scheme).collect();
        if self.0.scheme == "pkcs11" {
            let why = "is in a token, which 'identities' cannot name: make it a leaf (docs/pkcs11.md)".to_owned();
            return SealError::KeyFile { path: self.0.to_string().into(), why };
        }
        let why = format!(
            "has an unknown scheme; this version knows: {}. A file with a colon is written './FILE'",
            known.join(", ")
        );
        SealError::KeyFile { path: self.0.to_string().into(), why }
    }
}

/// The files that identities take.
pub fn files<'a>(specs: impl IntoIterator<Item = &'a IdentitySpec>) -> Vec<PathBuf> {
    let files = |spec| kind(spec).files().into_iter().map(Path::to_owned).collect::<Vec<_>>();
    specs.into_iter().flat_map(files).collect()
}

/// Where this host keeps identities. Which kind each is, the configuration says; a file of another kind is refused, for it
/// might open more than its place tells.
pub fn places<'a>(specs: impl IntoIterator<Item = &'a IdentitySpec>) -> Result<Vec<Place>, SealError> {
    let place = |spec| {
        let kind = kind(spec);
        kind.check()?;
        Ok(kind.place())
    };
    specs.into_iter().map(place).collect()
}

/// Whether one of these needs this host's TPM.
pub fn need_tpm<'a>(specs: impl IntoIterator<Item = &'a IdentitySpec>) -> bool {
    specs.into_iter().any(|spec| kind(spec).needs_tpm())
}

/// The file of the first key of this host's TPM among these.
pub fn first_of_tpm<'a>(specs: impl IntoIterator<Item = &'a IdentitySpec>) -> Option<PathBuf> {
    let first = specs.into_iter().find(|spec| kind(spec).needs_tpm())?;
    files([first]).into_iter().next()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (pem, tss2) = (folder.path().join("pem"), folder.path().join("tss2"));
        fs::write(&pem, OwnerKey::generate().unwrap().private_pem().unwrap().expose()).unwrap();
        fs::write(&tss2, "-----BEGIN TSS2 PRIVATE KEY-----\n").unwrap();
        let named = |path: &Path| (IdentitySpec::of("", path), IdentitySpec::of("tpm", path));
        let told = |spec: IdentitySpec| {
            let opened = kind(&spec).open(&TpmConfig::default()).err().unwrap();
            let placed = places([&spec]).unwrap_err();
            assert_eq!(opened.to_string(), placed.to_string());
            placed.to_string()
        };
        let ((right, wrong), (plain, _)) = (named(&pem), named(&tss2));
        assert!(kind(&right).open(&TpmConfig::default()).is_ok());
        assert!(told(wrong).contains("without 'tpm:'"));
        assert!(told(plain).contains(&format!("'tpm:{}'", tss2.display())));
        // Neither has a scheme that no kind has, and its file counts as a secret.
        let misspelt = IdentitySpec::of("tmp", &*pem);
        assert!(kind(&misspelt).is_secret());
        assert!(told(misspelt).contains("unknown scheme; this version knows: tpm"));
        // A file that is not there yet has no kind.
        let (pem, tpm) = named(&folder.path().join("none"));
        let opens: Vec<_> = places([&pem, &tpm]).unwrap().into_iter().map(|place| (place.what, place.opens)).collect();
        assert_eq!(opens, [("private key".to_owned(), true), ("TPM key".to_owned(), false)]);
    }
}
