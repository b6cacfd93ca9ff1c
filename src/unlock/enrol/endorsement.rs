//! Whether an endorsement key is a real TPM's: by its maker's certificate, by a fingerprint that the administrator has from
//! elsewhere, or on trust.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use der::{
    Decode, Sequence, Tag, Tagged,
    asn1::{Any, BitString, ObjectIdentifier, OctetString},
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
    keys::{
        seal::identities::{FLAWED, is_flawed},
        tpm::{Digest, EndorsementKind, Name, public},
    },
};

/// The largest file of certificates.
const MOST_FILE_BYTES: u64 = 1 << 20;
/// tcg-kp-EKCertificate: a certificate for an endorsement key, and not for another key of the same authority.
const EK_CERTIFICATE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.8.1");
/// id-ce-keyUsage (RFC 5280 section 4.2.1.3), and the bits of it that say what an endorsement key does.
const KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.15");
const KEY_ENCIPHERMENT: usize = 2;
const KEY_AGREEMENT: usize = 4;
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
    /// Who certified it, and for which TPM, as its certificate says.
    pub claimed: Option<String>,
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
                    return Ok(Endorsed { key, name, fingerprint, vouched, claimed: claimed(entry) });
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
    let key = match public::to_pkey(&entry.public) {
        Ok(key) => key,
        Err(error) => return Ok(Err(format!("it is not a key ({})", chain(&error)))),
    };
    Ok(if is_flawed(&key)? { Err(format!("it {FLAWED}")) } else { Ok(key) })
}

/// What the certificate says, checked or not.
fn claimed(entry: &EndorsementKey) -> Option<String> {
    let certificate = X509::from_der(entry.certificate.as_deref()?).ok()?;
    Some(says(&certificate).to_string())
}

fn says(certificate: &X509Ref) -> Vouched {
    Vouched::Certificate { issuer: in_words(certificate.issuer_name()), tpm: tpm_of(certificate) }
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
    match is_for_endorsement(der) {
        Ok(true) => {}
        Ok(false) => return Ok(Err(format!("{} is not for an endorsement key", of()))),
        Err(error) => return Ok(Err(format!("{} cannot be read ({error})", of()))),
    }
    Ok(Ok(says(&certificate)))
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

/// Whether a certificate is for an endorsement key: one that decrypts or agrees (TCG EK Credential Profile, section 3.1.3),
/// and that says of itself to be one. libcrypto shows only what it knows. Certificates from before the profile asked for these
/// extensions have none.
fn is_for_endorsement(certificate: &[u8]) -> der::Result<bool> {
    let extensions = extensions(certificate)?;
    let value = |id| extensions.iter().find(|extension| extension.id == id).map(|extension| extension.value.as_bytes());
    let usage = value(KEY_USAGE).map(BitString::from_der).transpose()?;
    let decrypts = usage.is_none_or(|usage| {
        let mut bits = usage.bits().enumerate().filter_map(|(at, bit)| bit.then_some(at));
        bits.any(|at| matches!(at, KEY_ENCIPHERMENT | KEY_AGREEMENT))
    });
    let purposes = value(EXTENDED_KEY_USAGE).map(Vec::<ObjectIdentifier>::from_der).transpose()?;
    Ok(decrypts && purposes.is_none_or(|purposes| purposes.contains(&EK_CERTIFICATE)))
}

fn extensions(certificate: &[u8]) -> der::Result<Vec<Extension>> {
    let parts = Vec::<Any>::from_der(certificate)?;
    let to_be_signed: Vec<Any> = parts.first().ok_or(der::ErrorKind::Failed)?.decode_as()?;
    let tagged = to_be_signed
        .iter()
        .find(|part| matches!(part.tag(), Tag::ContextSpecific { number, .. } if number.value() == 3));
    tagged.map_or_else(|| Ok(Vec::new()), |tagged| Vec::from_der(tagged.value()))
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

#[cfg(test)]
mod tests {
    use openssl::{
        hash::MessageDigest,
        x509::{
            X509Builder, X509Extension,
            extension::{ExtendedKeyUsage, KeyUsage},
        },
    };

    use super::*;

    fn certificate(extensions: Vec<X509Extension>) -> Vec<u8> {
        let key = PKey::ec_gen("prime256v1").unwrap();
        let mut builder = X509Builder::new().unwrap();
        builder.set_version(2).unwrap();
        builder.set_pubkey(&key).unwrap();
        extensions.into_iter().for_each(|extension| builder.append_extension(extension).unwrap());
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        builder.build().to_der().unwrap()
    }

    #[test]
    fn a_certificate_of_an_endorsement_key_is_for_decryption_and_says_so() {
        let is_for = |extensions| is_for_endorsement(&certificate(extensions)).unwrap();
        let says_so = || ExtendedKeyUsage::new().other("2.23.133.8.1").build().unwrap();
        let other = || ExtendedKeyUsage::new().client_auth().build().unwrap();
        let usage = |build: fn(&mut KeyUsage) -> &mut KeyUsage| build(&mut KeyUsage::new()).build().unwrap();
        assert!(is_for(vec![]), "from before the profile");
        assert!(is_for(vec![usage(KeyUsage::key_agreement), says_so()]));
        assert!(is_for(vec![usage(KeyUsage::key_encipherment)]));
        assert!(!is_for(vec![usage(KeyUsage::digital_signature), says_so()]));
        assert!(!is_for(vec![usage(KeyUsage::key_cert_sign)]));
        assert!(!is_for(vec![usage(KeyUsage::key_agreement), other()]));
    }
}
