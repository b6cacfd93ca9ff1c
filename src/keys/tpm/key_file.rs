//! A key in its file: "TSS2 PRIVATE KEY", the form of openssl-tpm2-engine, tpm2-openssl and tpm2-tools
//! (draft-bottomley-tpm2-keys).
//!
//! In front of the PEM block stands one line of ours, `cryptattach-identity: {...}`: the storage root key's name, the
//! policy, and the share that the host has for its admission. Readers of PEM skip it (RFC 7468 section 5.2), and it cannot
//! lie: the policy's digest is in the key itself, and with a wrong share nothing opens. The draft's own optional member for policies is left out: Debian's tpm2-tools and tpm2-openssl refuse files that have it, and
//! it has no words for counters.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use der::{
    Decode, Encode, Sequence,
    asn1::{ObjectIdentifier, OctetString},
};
use openssl::pkey::{PKey, Public as PublicPart};
use serde::{Deserialize, Serialize};
use tss_esapi::structures::Public;

use super::{
    Digest, Name, Policy, TpmError,
    public::{from_sized, to_pkey, to_sized},
    signature::read,
};
use crate::base::hex;

/// The PEM label.
pub const LABEL: &str = "TSS2 PRIVATE KEY";
const PREFACE: &str = "cryptattach-identity: ";
/// A key that is loaded under its parent.
const LOADABLE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.10.1.3");
/// The parent: the storage root key.
const PARENT: u32 = 0x8100_0001;

/// A key of a TPM, as it rests in its file: encrypted to the storage root key of that TPM.
#[derive(Clone)]
pub struct IdentityFile {
    pub public: Public,
    /// Its private part (the bytes of TPM2B_PRIVATE).
    pub private: Vec<u8>,
    /// The storage root key that it was made under.
    pub storage_root: Name,
    /// When it can be used.
    pub policy: Policy,
    /// What the host got for proving that the key is in its TPM.
    pub admission: Option<Share>,
}

/// A share of the key of a host's lockbox key. It is worth nothing without the TPM, which opens the other share.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Share(#[serde(with = "hex")] pub Digest);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Preface {
    storage_root: Name,
    policy: Policy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    admission: Option<Share>,
}

#[derive(Sequence)]
struct TpmKey {
    kind: ObjectIdentifier,
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT", optional = "true")]
    empty_auth: Option<bool>,
    parent: u32,
    public: OctetString,
    private: OctetString,
}

impl IdentityFile {
    /// Whether there is one at this path. Of another private key no more is read than how its PEM block begins.
    pub fn is_at(path: &Path) -> bool {
        let starts = [PREFACE.to_owned(), format!("-----BEGIN {LABEL}")];
        let longest = starts.iter().map(String::len).max().unwrap_or_default() as u64;
        let mut start = Vec::new();
        let read = File::open(path).and_then(|file| file.take(longest).read_to_end(&mut start));
        read.is_ok() && starts.iter().any(|known| start.starts_with(known.as_bytes()))
    }

    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, TpmError> {
        let content = read(path).map_err(|error| match error {
            TpmError::File { path, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                TpmError::NotEnrolled(path)
            }
            other => other,
        })?;
        Self::parse(&content).map_err(|why| TpmError::Malformed { path: path.to_owned(), why })
    }

    /// Reads a file's content; says what is wrong with it.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(content).map_err(|_| "is not text".to_owned())?;
        let preface = text.lines().find_map(|line| line.strip_prefix(PREFACE));
        let preface = preface.ok_or_else(|| format!("has no line '{PREFACE}...': it was not made by cryptattach"))?;
        let preface: Preface =
            serde_json::from_str(preface).map_err(|error| format!("has a damaged line '{PREFACE}...': {error}"))?;
        let block = text.find("-----BEGIN").map(|start| &text.as_bytes()[start..]);
        let (label, der) =
            der::pem::decode_vec(block.unwrap_or_default()).map_err(|error| format!("is not PEM: {error}"))?;
        if label != LABEL {
            return Err(format!("is a '{label}', not a '{LABEL}'"));
        }
        let key = TpmKey::from_der(&der).map_err(|error| format!("is not a TPM key: {error}"))?;
        if key.kind != LOADABLE || key.parent != PARENT {
            return Err("is a key of another kind or parent than cryptattach makes".to_owned());
        }
        let (size, private) = key.private.as_bytes().split_first_chunk().ok_or("has no private part")?;
        if usize::from(u16::from_be_bytes(*size)) != private.len() {
            return Err("has a damaged private part".to_owned());
        }
        let file = Self {
            public: from_sized(key.public.as_bytes()).map_err(|error| format!("has a damaged public part: {error}"))?,
            private: private.to_vec(),
            storage_root: preface.storage_root,
            policy: preface.policy,
            admission: preface.admission,
        };
        file.check().map_err(|error| format!("cannot be used: {error}"))?;
        Ok(file)
    }

    /// The policy that stands in the file is the policy that the TPM will insist on.
    fn check(&self) -> Result<(), TpmError> {
        self.policy.check()?;
        let (Public::Ecc { auth_policy, .. } | Public::Rsa { auth_policy, .. }) = &self.public else {
            return Err(TpmError::Structure("neither a P-256 nor an RSA key".to_owned()));
        };
        if auth_policy.value() != self.policy.digest()? {
            return Err(TpmError::Policy("the key's policy differs from the one in its file".to_owned()));
        }
        Ok(())
    }

    /// The file's content.
    pub fn to_pem(&self) -> Result<String, TpmError> {
        let structure = |error: der::Error| TpmError::Structure(error.to_string());
        let octets = |bytes: Vec<u8>| OctetString::new(bytes).map_err(structure);
        let private = [&(self.private.len() as u16).to_be_bytes()[..], &self.private].concat();
        let key = TpmKey {
            kind: LOADABLE,
            empty_auth: (!self.policy.pin).then_some(true),
            parent: PARENT,
            public: octets(to_sized(&self.public)?)?,
            private: octets(private)?,
        };
        let der = key.to_der().map_err(structure)?;
        let pem = der::pem::encode_string(LABEL, der::pem::LineEnding::LF, &der)
            .map_err(|error| TpmError::Structure(error.to_string()))?;
        let (storage_root, policy, admission) = (self.storage_root, self.policy.clone(), self.admission);
        let preface = Preface { storage_root, policy, admission };
        let preface = serde_json::to_string(&preface).map_err(|error| TpmError::Structure(error.to_string()))?;
        Ok(format!("{PREFACE}{preface}\n{pem}"))
    }

    /// The public key, as libcrypto knows it.
    pub fn public_key(&self) -> Result<PKey<PublicPart>, TpmError> {
        to_pkey(&self.public)
    }

    /// The public key (PEM), to seal to.
    pub fn public_pem(&self) -> Result<Vec<u8>, TpmError> {
        Ok(self.public_key()?.public_key_to_pem()?)
    }
}

#[cfg(test)]
mod tests {
    use openssl::{
        ec::{EcGroup, EcKey},
        nid::Nid,
    };
    use proptest::prelude::*;
    use tss_esapi::structures::{EccParameter, EccPoint};

    use super::*;
    use crate::keys::tpm::public::{identity_p256, signing_key};

    /// As a TPM would have made it, but for the private part.
    fn file() -> IdentityFile {
        let policy = Policy { signed: None, pcrs: [(7, [7; 32])].into_iter().collect(), latch: true, pin: false };
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let Public::Ecc { unique: point, .. } = signing_key(&key).unwrap() else { unreachable!() };
        let mut public = identity_p256(&policy.digest().unwrap(), false).unwrap();
        if let Public::Ecc { unique, .. } = &mut public {
            *unique = point;
        }
        let storage_root = Name::of(b"parent");
        IdentityFile { public, private: vec![9; 126], storage_root, policy, admission: Some(Share([8; 32])) }
    }

    #[test]
    fn is_read_as_it_was_written() {
        let file = file();
        let read = IdentityFile::parse(file.to_pem().unwrap().as_bytes()).unwrap();
        assert_eq!(read.public, file.public);
        assert_eq!((read.private, read.storage_root, read.policy), (file.private, file.storage_root, file.policy));
        assert_eq!(read.admission.unwrap().0, [8; 32]);
    }

    #[test]
    fn is_told_from_other_private_keys_by_its_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let is_one = |content: &str| {
            std::fs::write(&path, content).unwrap();
            IdentityFile::is_at(&path)
        };
        let pem = file().to_pem().unwrap();
        assert!(is_one(&pem));
        assert!(is_one(&pem[pem.find("-----BEGIN").unwrap()..]));
        assert!(!is_one("-----BEGIN PRIVATE KEY-----\nMIG"));
        assert!(!is_one(""));
        assert!(!IdentityFile::is_at(&folder.path().join("none")));
    }

    #[test]
    fn says_what_is_wrong() {
        let pem = file().to_pem().unwrap();
        let without_preface = &pem[pem.find("-----BEGIN").unwrap()..];
        let mut off_curve = file();
        if let Public::Ecc { unique, .. } = &mut off_curve.public {
            *unique = EccPoint::new(
                EccParameter::try_from(vec![1; 32]).unwrap(),
                EccParameter::try_from(vec![1; 32]).unwrap(),
            );
        }
        assert!(off_curve.public_key().is_err());
        for (content, why) in [
            (without_preface.to_owned(), "was not made by cryptattach"),
            (pem.replace("TSS2 PRIVATE", "EC PRIVATE"), "is a 'EC PRIVATE KEY'"),
            (pem.replace("\"latch\":true", "\"latch\":false"), "differs from the one in its file"),
            (pem.replace("{\"storage_root", "{\"storage"), "damaged line"),
        ] {
            let said = IdentityFile::parse(content.as_bytes()).err().unwrap();
            assert!(said.contains(why), "{said}");
        }
    }

    proptest! {
        #[test]
        fn damage_is_no_key(at in 0_usize..2000, byte: u8) {
            let whole = file().to_pem().unwrap().into_bytes();
            let mut damaged = whole.clone();
            let at = at % damaged.len();
            damaged[at] = byte;
            // White space may change; else it does not parse, or says the same.
            if let Ok(read) = IdentityFile::parse(&damaged) {
                let same = IdentityFile::parse(&whole).unwrap();
                prop_assert_eq!(read.policy, same.policy);
            }
        }
    }
}
