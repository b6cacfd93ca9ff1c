//! Whether an endorsement key is a real TPM's: by its maker's certificate, by a fingerprint that the administrator has from
//! elsewhere, or on trust.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use der::{
    Decode, Sequence, Tag, Tagged,
    asn1::{Any, ObjectIdentifier, OctetString},
};
use openssl::{
    error::ErrorStack,
    nid::Nid,
    pkey::{PKey, PKeyRef, Public},
    stack::Stack,
    x509::{
        X509, X509NameRef, X509Ref, X509StoreContext,
        store::{X509Store, X509StoreBuilder},
        verify::X509VerifyFlags,
    },
};
use serde::{Deserialize, Serialize};

use super::{EnrolError, Part, Statement, document::EndorsementKey, evidence::refused};
use crate::{
    base::{chain::chain, hex},
    keys::tpm::{Digest, EndorsementKind, Name, public},
};

/// The largest file of certificates.
const MOST_FILE_BYTES: u64 = 1 << 20;
/// tcg-kp-EKCertificate: a certificate for an endorsement key, and not for another key of the same authority.
const EK_CERTIFICATE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.8.1");
/// id-ce-extKeyUsage (RFC 5280 section 4.2.1.12).
const EXTENDED_KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37");

/// What makes the administrator believe in an endorsement key.
#[derive(Clone, Debug)]
pub enum Trust {
    /// A certificate by an authority in this folder.
    Authorities(PathBuf),
    /// Its fingerprint, known from elsewhere.
    Fingerprint(Digest),
    /// Nothing: this once.
    FirstUse,
}

/// What an endorsement key was believed for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum Vouched {
    /// A certificate.
    Certificate {
        /// Who has signed it.
        issuer: String,
        /// The TPM as the certificate names it: maker, model, version.
        tpm: String,
    },
    /// The administrator knew the fingerprint.
    Fingerprint,
    /// Nothing.
    FirstUse,
}

impl std::fmt::Display for Vouched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Certificate { issuer, tpm } if tpm.is_empty() => write!(f, "certificate by {issuer}"),
            Self::Certificate { issuer, tpm } => write!(f, "certificate by {issuer} for {tpm}"),
            Self::Fingerprint => f.write_str("fingerprint, compared by the administrator"),
            Self::FirstUse => f.write_str("TRUST ON FIRST USE: no proof that it is a real TPM"),
        }
    }
}

/// An endorsement key that is believed in.
pub struct Endorsed {
    pub key: PKey<Public>,
    pub name: Name,
    pub fingerprint: Digest,
    pub vouched: Vouched,
}

/// SHA-256 of the key's SubjectPublicKeyInfo: what people compare.
pub fn fingerprint(key: &PKeyRef<Public>) -> Result<Digest, ErrorStack> {
    Ok(openssl::sha::sha256(&key.public_key_to_der()?))
}

impl Trust {
    /// The first of the host's endorsement keys that is believed in.
    pub fn choose(&self, statement: &Statement) -> Result<Endorsed, EnrolError> {
        let authorities = match self {
            Self::Authorities(folder) => Some(authorities(folder)?),
            _ => None,
        };
        let mut reasons = Vec::new();
        for entry in &statement.endorsement_keys {
            let key = match endorsement_key(entry)? {
                Ok(key) => key,
                Err(why) => {
                    reasons.push(why);
                    continue;
                }
            };
            let fingerprint = fingerprint(&key)?;
            let vouched = match (self, &authorities) {
                (Self::Fingerprint(expected), _) if *expected == fingerprint => Ok(Vouched::Fingerprint),
                (Self::Fingerprint(expected), _) => {
                    Err(format!("its fingerprint is {}; expected {}", hex::encode(&fingerprint), hex::encode(expected)))
                }
                (_, Some(authorities)) => certified(entry, &key, authorities)?,
                _ => Ok(Vouched::FirstUse),
            };
            match vouched {
                Ok(vouched) => {
                    let name = public::name_of(&entry.public)?;
                    return Ok(Endorsed { key, name, fingerprint, vouched });
                }
                Err(why) => reasons.push(why),
            }
        }
        let why = if reasons.is_empty() { "there is none".to_owned() } else { reasons.join("; ") };
        Err(refused(statement, Part::EndorsementKey, why))
    }
}

/// The key, if it is by one of the templates: credentials are made for those.
fn endorsement_key(entry: &EndorsementKey) -> Result<Result<PKey<Public>, String>, EnrolError> {
    if EndorsementKind::of(&entry.public)?.is_none() {
        return Ok(Err("it fits none of the TCG's templates for P-256 and RSA 2048".to_owned()));
    }
    Ok(public::to_pkey(&entry.public).map_err(|error| format!("it is not a key ({})", chain(&error))))
}

fn certified(
    entry: &EndorsementKey,
    key: &PKeyRef<Public>,
    authorities: &X509Store,
) -> Result<Result<Vouched, String>, EnrolError> {
    let Some(der) = &entry.certificate else { return Ok(Err("its TPM has no certificate for it".to_owned())) };
    let Ok(certificate) = X509::from_der(der) else { return Ok(Err("its certificate is damaged".to_owned())) };
    let of = || format!("the certificate of {}", in_words(certificate.issuer_name()));
    if !certificate.public_key().is_ok_and(|certified| certified.public_eq(key)) {
        return Ok(Err(format!("{} is for another key", of())));
    }
    let mut context = X509StoreContext::new()?;
    // Names of a TPM stand in a subject alternative name of the directory kind, often marked critical. libcrypto knows that
    // extension and goes on; others that are critical and unknown it refuses (RFC 5280 section 4.2).
    let verified = context.init(authorities, &certificate, &*Stack::new()?, |context| {
        Ok(if context.verify_cert()? { Ok(()) } else { Err(context.error().error_string().to_owned()) })
    })?;
    if let Err(why) = verified {
        return Ok(Err(format!("{} is not signed by a trusted authority: {why}", of())));
    }
    match key_usages(der) {
        // Certificates from before the profile asked for it have none.
        Ok(None) => {}
        Ok(Some(usages)) if usages.contains(&EK_CERTIFICATE) => {}
        Ok(Some(_)) => return Ok(Err(format!("{} is not for an endorsement key", of()))),
        Err(error) => return Ok(Err(format!("{} cannot be read ({error})", of()))),
    }
    Ok(Ok(Vouched::Certificate { issuer: in_words(certificate.issuer_name()), tpm: tpm_of(&certificate) }))
}

/// All certificates in a folder, each of them trusted as it is: an intermediate authority's need not come with its root's.
fn authorities(folder: &Path) -> Result<X509Store, EnrolError> {
    let failed = |source| EnrolError::File { action: "read", path: folder.to_owned(), source };
    let mut store = X509StoreBuilder::new()?;
    store.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
    let mut count = 0;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        for certificate in certificates(&path) {
            store.add_cert(certificate)?;
            count += 1;
        }
    }
    match count {
        0 => {
            Err(EnrolError::Authorities { path: folder.to_owned(), why: "none of its files has a certificate".into() })
        }
        _ => Ok(store.build()),
    }
}

/// The certificates in a file: several in PEM, or one in DER. Other files may lie there, too.
fn certificates(path: &Path) -> Vec<X509> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST_FILE_BYTES).read_to_end(&mut content));
    let certificates = match read {
        Ok(_) if content.first() == Some(&0x30) => X509::from_der(&content).map(|one| vec![one]).unwrap_or_default(),
        Ok(_) => X509::stack_from_pem(&content).unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    if certificates.is_empty() {
        tracing::debug!("{} has no certificate", path.display());
    }
    certificates
}

#[derive(Sequence)]
struct Extension {
    id: ObjectIdentifier,
    #[asn1(default = "Default::default")]
    critical: bool,
    value: OctetString,
}

/// The purposes in the extended key usage; `None` if there is no such extension. libcrypto shows only those that it knows.
fn key_usages(certificate: &[u8]) -> der::Result<Option<Vec<ObjectIdentifier>>> {
    let parts = Vec::<Any>::from_der(certificate)?;
    let to_be_signed: Vec<Any> = parts.first().ok_or(der::ErrorKind::Failed)?.decode_as()?;
    let tagged = to_be_signed
        .iter()
        .find(|part| matches!(part.tag(), Tag::ContextSpecific { number, .. } if number.value() == 3));
    let Some(tagged) = tagged else { return Ok(None) };
    let extensions = Vec::<Extension>::from_der(tagged.value())?;
    let usage = extensions.iter().find(|extension| extension.id == EXTENDED_KEY_USAGE);
    usage.map(|usage| Vec::from_der(usage.value.as_bytes())).transpose()
}

fn in_words(name: &X509NameRef) -> String {
    let parts = name.entries().filter_map(|entry| entry.data().to_string().ok());
    let words = parts.collect::<Vec<_>>().join(", ");
    if words.is_empty() { "an authority without a name".to_owned() } else { words }
}

/// The TPM's maker, model and version (TCG EK Credential Profile, section 3.1.2), printable characters only.
fn tpm_of(certificate: &X509Ref) -> String {
    let names = certificate.subject_alt_names().into_iter().flatten();
    let directories: Vec<String> = names.filter_map(|name| name.directory_name().map(in_words)).collect();
    let words = match directories.as_slice() {
        [] => {
            let common = certificate.subject_name().entries_by_nid(Nid::COMMONNAME).next();
            common.and_then(|entry| entry.data().to_string().ok()).unwrap_or_default()
        }
        some => some.join(", "),
    };
    words.chars().filter(|c| !c.is_control()).take(200).collect()
}
