//! Owners: P-256 and RSA keys in PEM files, and X.509 certificates.

use std::{fs::File, io::Read, os::unix::fs::MetadataExt, path::Path};

use base64ct::{Base64UrlUnpadded, Encoding};
use openssl::{
    asn1::Asn1Time,
    ec::EcKey,
    error::ErrorStack,
    pkey::{HasPublic, Id, PKey, PKeyRef, Private, Public},
    x509::X509,
};
use serde_json::json;

use super::{Identity, Kind};
use crate::{
    base::key::{JoseHeader, JweRecipient, Place, SecretBytes},
    config::{ConfigPath, TpmConfig},
    keys::{
        seal::{ContentKey, Recipient, SealError, Shape, ecdh_es, jwk, key_wrap, members, rsa_oaep},
        tpm::IdentityFile,
    },
};

/// The largest key file that is read; a chain of certificates with 4096-bit keys has a tenth of that.
const MOST_FILE_BYTES: u64 = 256 * 1024;

/// An owner's or escrow's public key: seals.
pub struct OwnerRecipient {
    key: PKey<Public>,
    algorithm: Algorithm,
    kid: String,
}

/// An owner's private key: opens.
pub struct OwnerKey {
    key: PKey<Private>,
    algorithm: Algorithm,
    kid: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    EcdhEs,
    RsaOaep,
}

/// What is wrong with a key that [`is_flawed`].
pub const FLAWED: &str = "is by a flawed generator: its private key can be computed (ROCA, CVE-2017-15361)";

/// Whether a private key can be computed from its public key.
pub fn is_flawed<T: HasPublic>(key: &PKeyRef<T>) -> Result<bool, ErrorStack> {
    if key.id() == Id::RSA { rsa_oaep::is_roca(key.rsa()?.n()) } else { Ok(false) }
}

/// The algorithm for a key and the key's thumbprint, or what is wrong with it.
fn examine<T: HasPublic>(key: &PKeyRef<T>) -> Result<Result<(Algorithm, String), String>, SealError> {
    Ok(match key.id() {
        Id::EC => {
            let ec = key.ec_key()?;
            if ecdh_es::is_p256(&ec)? {
                Ok((Algorithm::EcdhEs, jwk::thumbprint(&jwk::of_p256(&ec)?)))
            } else {
                Err("is a key on another curve than P-256".to_owned())
            }
        }
        Id::RSA if key.bits() >= rsa_oaep::LEAST_BITS => {
            Ok((Algorithm::RsaOaep, jwk::thumbprint(&jwk::of_rsa(&*key.rsa()?))))
        }
        Id::RSA => Err(format!("is an RSA key of {} bits; at least {} are needed", key.bits(), rsa_oaep::LEAST_BITS)),
        _ => Err("is neither a P-256 nor an RSA key".to_owned()),
    })
}

impl OwnerRecipient {
    /// Reads a public key (SubjectPublicKeyInfo) or a certificate, in PEM.
    pub fn read(path: &Path) -> Result<Self, SealError> {
        let pem = read(path)?;
        let unusable = |why: &str| SealError::KeyFile { path: path.to_owned(), why: why.to_owned() };
        if contains(pem.expose(), b"PRIVATE KEY-----") {
            return Err(unusable("is a private key; name a recipient by its public key or certificate"));
        }
        let key = match X509::from_pem(pem.expose()) {
            Ok(certificate) => {
                warn_if_not_valid_now(&certificate, path)?;
                certificate.public_key()
            }
            Err(_) => PKey::public_key_from_pem(pem.expose()),
        };
        let key = key.map_err(|_| unusable("is neither a public key nor a certificate in PEM"))?;
        Self::of(key)?.map_err(|why| unusable(&why))
    }

    /// The holder of this key.
    pub fn of_public(key: PKey<Public>) -> Result<Self, SealError> {
        Self::of(key)?.map_err(|why| SealError::Unsupported(format!("the public key {why}")))
    }

    fn of(key: PKey<Public>) -> Result<Result<Self, String>, SealError> {
        // What was sealed before still has to open.
        if is_flawed(&key)? {
            return Ok(Err(FLAWED.to_owned()));
        }
        Ok(examine(&key)?.map(|(algorithm, kid)| Self { key, algorithm, kid }))
    }

    /// The holder of a public key on P-256; the error says what is wrong with it.
    pub fn from_jwk(members: &JoseHeader) -> Result<Self, String> {
        let key = jwk::p256(members)?;
        Self::of(key).map_err(|error| error.to_string())?
    }

    /// The public key as JWK, if it is on P-256.
    pub fn jwk(&self) -> Result<JoseHeader, SealError> {
        let ec = self.key.ec_key().map_err(|_| SealError::Unsupported("it is not a key on P-256".to_owned()))?;
        Ok(members(jwk::of_p256(&ec)?))
    }

    /// Whether it seals with RSA.
    pub fn is_rsa(&self) -> bool {
        self.algorithm == Algorithm::RsaOaep
    }

    /// The key's RFC 7638 thumbprint.
    pub fn kid(&self) -> &str {
        &self.kid
    }
}

/// A certificate out of its time still names the right key, and data must not be lost over it: a warning.
fn warn_if_not_valid_now(certificate: &X509, path: &Path) -> Result<(), ErrorStack> {
    let now = Asn1Time::days_from_now(0)?;
    if certificate.not_after() < now {
        tracing::warn!("the certificate {} expired on {}", path.display(), certificate.not_after());
    } else if certificate.not_before() > now {
        tracing::warn!("the certificate {} is not valid before {}", path.display(), certificate.not_before());
    }
    Ok(())
}

impl Recipient for OwnerRecipient {
    fn seal(&self, content_key: &ContentKey) -> Result<JweRecipient, SealError> {
        let (header, encrypted_key) = match self.algorithm {
            Algorithm::EcdhEs => {
                let ephemeral = ecdh_es::ephemeral()?;
                let epk = jwk::of_p256(&*ephemeral.ec_key()?)?;
                let header = json!({"alg": ecdh_es::ALG, "kid": self.kid, "epk": epk});
                let header = members(header);
                let z = ecdh_es::shared(&ephemeral, &self.key)?;
                let wrapped = key_wrap::wrap(&ecdh_es::wrapping_key(&z, &header)?, content_key)?;
                (header, wrapped)
            }
            Algorithm::RsaOaep => {
                let header = members(json!({"alg": rsa_oaep::ALG, "kid": self.kid}));
                (header, rsa_oaep::encrypt(&self.key, content_key)?)
            }
        };
        Ok(JweRecipient { header, encrypted_key: Base64UrlUnpadded::encode_string(&encrypted_key) })
    }

    fn shape(&self) -> Shape {
        Shape::Key(self.kid.clone())
    }
}

impl OwnerKey {
    /// A new P-256 key.
    pub fn generate() -> Result<Self, SealError> {
        Self::of_p256(ecdh_es::ephemeral()?)
    }

    /// This key, which is on P-256.
    pub(in crate::keys::seal) fn of_p256(key: PKey<Private>) -> Result<Self, SealError> {
        let kid = jwk::thumbprint(&jwk::of_p256(&*key.ec_key()?)?);
        Ok(Self { key, algorithm: Algorithm::EcdhEs, kid })
    }

    /// Reads a private key in PEM: PKCS #8, or the older forms of EC (SEC 1) and RSA (PKCS #1).
    pub fn read(path: &Path) -> Result<Self, SealError> {
        let pem = read(path)?;
        let unusable = |why: &str| SealError::KeyFile { path: path.to_owned(), why: why.to_owned() };
        if contains(pem.expose(), b"ENCRYPTED") {
            return Err(unusable("is protected by a passphrase, which nobody can type when a device is attached"));
        }
        // The passphrase callback of the plain function would ask on the terminal.
        let key = PKey::private_key_from_pem_passphrase(pem.expose(), b"")
            .map_err(|_| unusable("is not a private key in PEM"))?;
        if File::open(path).and_then(|file| file.metadata()).is_ok_and(|metadata| metadata.mode() & 0o077 != 0) {
            tracing::warn!("users other than its owner can read the private key {}", path.display());
        }
        let (algorithm, kid) = examine(&key)?.map_err(|why| unusable(&why))?;
        Ok(Self { key, algorithm, kid })
    }

    /// The recipient that this key opens for.
    pub fn recipient(&self) -> Result<OwnerRecipient, SealError> {
        let key = PKey::public_key_from_der(&self.key.public_key_to_der()?)?;
        Ok(OwnerRecipient { key, algorithm: self.algorithm, kid: self.kid.clone() })
    }

    /// The private key as PKCS #8 PEM, for its file.
    pub fn private_pem(&self) -> Result<SecretBytes, SealError> {
        let mut pem = self.key.private_key_to_pem_pkcs8()?;
        let secret = SecretBytes::copy_of(&pem);
        zeroize::Zeroize::zeroize(&mut pem);
        Ok(secret?)
    }

    /// The key, if it is on P-256.
    pub(in crate::keys::seal) fn p256(&self) -> Result<EcKey<Private>, SealError> {
        self.key.ec_key().map_err(|_| SealError::Unsupported("it is not a key on P-256".to_owned()))
    }

    /// The private number of a key on P-256.
    pub(in crate::keys::seal) fn private_number(&self) -> Result<SecretBytes, SealError> {
        let len = i32::try_from(jwk::COORDINATE_BYTES).unwrap_or_default();
        let mut bytes = self.key.ec_key()?.private_key().to_vec_padded(len)?;
        let secret = SecretBytes::copy_of(&bytes);
        zeroize::Zeroize::zeroize(&mut bytes);
        Ok(secret?)
    }

    /// The public key as PEM.
    pub fn public_pem(&self) -> Result<Vec<u8>, SealError> {
        Ok(self.key.public_key_to_pem()?)
    }
}

impl Identity for OwnerKey {
    fn kid(&self) -> &str {
        &self.kid
    }

    fn alg(&self) -> &str {
        match self.algorithm {
            Algorithm::EcdhEs => ecdh_es::ALG,
            Algorithm::RsaOaep => rsa_oaep::ALG,
        }
    }

    fn unwrap(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
        match self.algorithm {
            Algorithm::EcdhEs => {
                let ephemeral = ecdh_es::ephemeral_key(header)?;
                let z = ecdh_es::shared(&self.key, &ephemeral)?;
                key_wrap::unwrap(&ecdh_es::wrapping_key(&z, header)?, encrypted_key)
            }
            Algorithm::RsaOaep => rsa_oaep::decrypt(&self.key, encrypted_key),
        }
    }
}

/// `PATH` in `identities`.
struct PemFile<'a>(&'a ConfigPath);

/// What is in this file.
pub(super) fn kind(path: &ConfigPath) -> Box<dyn Kind + '_> {
    Box::new(PemFile(path))
}

impl Kind for PemFile<'_> {
    fn open(&self, _: &TpmConfig) -> Result<Box<dyn Identity>, SealError> {
        self.check()?;
        Ok(Box::new(OwnerKey::read(self.0)?))
    }

    fn check(&self) -> Result<(), SealError> {
        let path = self.0.to_path_buf();
        match IdentityFile::is_at(&path) {
            true => {
                let why = format!("is a key of the TPM: write 'tpm:{}' in identities", path.display());
                Err(SealError::KeyFile { path, why })
            }
            false => Ok(()),
        }
    }

    fn place(&self) -> Place {
        Place::path("private key", &**self.0, true)
    }

    fn files(&self) -> Vec<&Path> {
        vec![self.0]
    }

    fn is_secret(&self) -> bool {
        true
    }
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}

/// Reads a key file straight into secret memory.
fn read(path: &Path) -> Result<SecretBytes, SealError> {
    let failed = |source| SealError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len().min(MOST_FILE_BYTES);
    let mut secret = SecretBytes::zeroed(usize::try_from(len).unwrap_or(0))?;
    file.read_exact(secret.expose_mut()).map_err(failed)?;
    Ok(secret)
}
