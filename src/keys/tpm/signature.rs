//! A site's signatures over boot states: systemd-measure's `tpm2-pcr-signature.json`.
//!
//! ```json
//! {"sha256":[{"pcrs":[11],"pkfp":"<SHA-256 of the public key>","pol":"<policy digest>","sig":"<base64>"}]}
//! ```
//!
//! `pkfp` is over libcrypto's `i2d_PublicKey`: PKCS #1 for RSA, the point for P-256. `sig` is over `pol`: RSASSA-PKCS1-v1_5
//! or (ours) ECDSA in DER, with SHA-256. Ours may have two members more, which systemd ignores: `epoch` (then the signature
//! is over `pol` and the epoch's policyRef) and `values`, the PCRs' values, for the explanation when they differ.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use base64ct::{Base64, Encoding};
use openssl::{
    bn::BigNumContext,
    ec::PointConversionForm,
    ecdsa::EcdsaSig,
    hash::MessageDigest,
    pkey::{HasPublic, Id, PKey, PKeyRef, Private, Public as PublicPart},
    sha::sha256,
    sign::{Signer, Verifier},
    x509::X509,
};
use serde::{Deserialize, Serialize};
use tss_esapi::{
    interface_types::algorithm::HashingAlgorithm,
    structures::{EccParameter, EccSignature, Public, PublicKeyRsa, RsaSignature, Signature},
};

use super::{
    Digest, Name, PcrValues, TpmError,
    policy::{approved_message, pcr_policy},
    public::{name_of, signing_key},
};
use crate::base::{hex, key::SecretBytes, pcr_set::PcrSet};

/// The largest file that is read; systemd-measure's have 1 to 20 KiB.
const MOST_FILE_BYTES: u64 = 1 << 20;

/// The public key whose signatures a policy follows.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SiteKey(PKey<PublicPart>);

impl SiteKey {
    /// Reads a public key or a certificate (PEM).
    pub fn read(path: &Path) -> Result<Self, TpmError> {
        let pem = read(path)?;
        let malformed = |why: &str| TpmError::Malformed { path: path.to_owned(), why: why.to_owned() };
        let key = PKey::public_key_from_pem(&pem).or_else(|_| X509::from_pem(&pem)?.public_key());
        Self::of(key.map_err(|_| malformed("is neither a public key nor a certificate in PEM"))?)
    }

    /// This key, if policies can follow it.
    pub fn of(key: PKey<PublicPart>) -> Result<Self, TpmError> {
        signing_key(&key)?;
        Ok(Self(key))
    }

    /// The key as it is loaded into a TPM.
    pub fn public(&self) -> Result<Public, TpmError> {
        signing_key(&self.0)
    }

    /// The key's name in a TPM.
    pub fn name(&self) -> Result<Name, TpmError> {
        name_of(&self.public()?)
    }

    /// The fingerprint that signature files name the key by.
    pub fn fingerprint(&self) -> Result<Digest, TpmError> {
        fingerprint(&self.0)
    }
}

fn fingerprint<T: HasPublic>(key: &PKeyRef<T>) -> Result<Digest, TpmError> {
    let bytes = match key.id() {
        Id::RSA => key.rsa()?.public_key_to_der_pkcs1()?,
        _ => {
            let (key, mut context) = (key.ec_key()?, BigNumContext::new()?);
            key.public_key().to_bytes(key.group(), PointConversionForm::UNCOMPRESSED, &mut context)?
        }
    };
    Ok(sha256(&bytes))
}

impl PartialEq for SiteKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.public_eq(&other.0)
    }
}

impl Eq for SiteKey {}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.fingerprint().map(|digest| hex::encode(&digest)).unwrap_or_default();
        f.write_str(&digits)
    }
}

impl TryFrom<String> for SiteKey {
    type Error = TpmError;

    fn try_from(text: String) -> Result<Self, TpmError> {
        let der = Base64::decode_vec(&text).map_err(|_| TpmError::Policy("its key is not base64".to_owned()))?;
        Self::of(PKey::public_key_from_der(&der)?)
    }
}

impl From<SiteKey> for String {
    fn from(key: SiteKey) -> Self {
        key.0.public_key_to_der().map(|der| Base64::encode_string(&der)).unwrap_or_default()
    }
}

/// The site's private key; signs boot states, away from the hosts.
pub struct SiteSigner(PKey<Private>);

impl SiteSigner {
    /// Reads a private key (PEM).
    pub fn read(path: &Path) -> Result<Self, TpmError> {
        let pem = read_secret(path)?;
        // The passphrase callback of the plain function would ask on the terminal.
        let key = PKey::private_key_from_pem_passphrase(pem.expose(), b"");
        let why = "is not a private key in PEM, or has a passphrase".to_owned();
        let key = key.map_err(|_| TpmError::Malformed { path: path.to_owned(), why })?;
        signing_key(&key)?;
        Ok(Self(key))
    }

    /// Signs: hosts whose PCRs have these values may open their keys.
    pub fn sign(&self, values: &PcrValues, epoch: u64) -> Result<PcrSignature, TpmError> {
        let policy = pcr_policy(values);
        Ok(PcrSignature { values: Some(values.clone()), ..self.sign_policy(values.pcrs(), &policy, epoch)? })
    }

    /// Signs a policy digest, as it stands in a file of systemd-measure, for another epoch.
    pub fn sign_policy(&self, pcrs: PcrSet, policy: &Digest, epoch: u64) -> Result<PcrSignature, TpmError> {
        let mut signer = Signer::new(MessageDigest::sha256(), &self.0)?;
        let signature = signer.sign_oneshot_to_vec(&approved_message(policy, epoch))?;
        Ok(PcrSignature { pcrs, fingerprint: fingerprint(&self.0)?, policy: *policy, signature, epoch, values: None })
    }
}

/// One signature: this policy is approved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcrSignature {
    /// The PCRs of the policy.
    pub pcrs: PcrSet,
    /// The signer's fingerprint.
    #[serde(rename = "pkfp", with = "hex")]
    pub fingerprint: Digest,
    /// The digest of the policy: these PCRs have certain values.
    #[serde(rename = "pol", with = "hex")]
    pub policy: Digest,
    #[serde(rename = "sig", with = "base64")]
    signature: Vec<u8>,
    /// In which epoch it was made.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub epoch: u64,
    /// The values that `policy` is the digest of, if the signer has said them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<PcrValues>,
}

fn is_zero(epoch: &u64) -> bool {
    *epoch == 0
}

impl PcrSignature {
    /// Whether it is this key's signature, as far as software can tell.
    pub fn is_by(&self, key: &SiteKey) -> Result<bool, TpmError> {
        if key.fingerprint()? != self.fingerprint {
            return Ok(false);
        }
        let mut verifier = Verifier::new(MessageDigest::sha256(), &key.0)?;
        Ok(verifier.verify_oneshot(&self.signature, &approved_message(&self.policy, self.epoch)).unwrap_or(false))
    }

    /// What is signed, hashed: what the TPM verifies.
    pub fn digest(&self) -> Digest {
        sha256(&approved_message(&self.policy, self.epoch))
    }

    /// The signature as the TPM reads it.
    pub fn for_tpm(&self, key: &SiteKey) -> Result<Signature, TpmError> {
        const COORDINATE_BYTES: i32 = 32;
        if key.0.id() == Id::RSA {
            let value = PublicKeyRsa::try_from(self.signature.clone())?;
            return Ok(Signature::RsaSsa(RsaSignature::create(HashingAlgorithm::Sha256, value)?));
        }
        let signature = EcdsaSig::from_der(&self.signature)?;
        Ok(Signature::EcDsa(EccSignature::create(
            HashingAlgorithm::Sha256,
            EccParameter::try_from(signature.r().to_vec_padded(COORDINATE_BYTES)?)?,
            EccParameter::try_from(signature.s().to_vec_padded(COORDINATE_BYTES)?)?,
        )?))
    }
}

/// All signatures of some files.
#[derive(Clone, Debug, Default)]
pub struct PcrSignatures {
    /// The signatures over values in the SHA-256 bank.
    pub signatures: Vec<PcrSignature>,
    /// The files that they come from.
    pub files: Vec<PathBuf>,
}

/// A file. Other banks are there to be ignored.
#[derive(Default, Serialize, Deserialize)]
struct Banks {
    #[serde(default)]
    sha256: Vec<PcrSignature>,
}

impl PcrSignatures {
    /// Reads those of the files that there are.
    pub fn read(paths: &[impl AsRef<Path>]) -> Result<Self, TpmError> {
        let mut all = Self::default();
        for path in paths.iter().map(AsRef::as_ref) {
            match read(path) {
                Ok(json) => {
                    let why = |error| format!("is not a valid tpm2-pcr-signature.json: {error}");
                    let signatures = Self::parse(&json)
                        .map_err(|error| TpmError::Malformed { path: path.to_owned(), why: why(error) })?;
                    all.signatures.extend(signatures);
                    all.files.push(path.to_owned());
                }
                Err(TpmError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Reads a file's content.
    pub fn parse(json: &[u8]) -> Result<Vec<PcrSignature>, serde_json::Error> {
        Ok(serde_json::from_slice::<Banks>(json)?.sha256)
    }

    /// A file's content.
    pub fn to_json(signatures: Vec<PcrSignature>) -> Result<String, serde_json::Error> {
        serde_json::to_string(&Banks { sha256: signatures })
    }
}

/// Reads a file, unless it is implausibly long.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TpmError> {
    let failed = |source| TpmError::File { action: "read", path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > MOST_FILE_BYTES {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    fs::read(path).map_err(failed)
}

/// Reads a private key straight into secret memory.
fn read_secret(path: &Path) -> Result<SecretBytes, TpmError> {
    let failed = |source| TpmError::File { action: "read", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len().min(MOST_FILE_BYTES);
    let mut secret = SecretBytes::zeroed(usize::try_from(len).unwrap_or(0))?;
    file.read_exact(secret.expose_mut()).map_err(failed)?;
    Ok(secret)
}

/// Base64 with padding, for serde's `with`.
mod base64 {
    use base64ct::{Base64, Encoding};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base64::encode_string(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        Base64::decode_vec(&String::deserialize(deserializer)?).map_err(|_| de::Error::custom("not base64"))
    }
}

#[cfg(test)]
mod tests {
    use openssl::{
        ec::{EcGroup, EcKey},
        nid::Nid,
    };

    use super::*;

    fn signer() -> SiteSigner {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        SiteSigner(PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap())
    }

    fn public(signer: &SiteSigner) -> SiteKey {
        SiteKey::of(PKey::public_key_from_der(&signer.0.public_key_to_der().unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn a_signature_is_for_one_key_one_policy_and_one_epoch() {
        let (site, other) = (signer(), signer());
        let signed = site.sign(&[(7, [1; 32])].into_iter().collect(), 1).unwrap();
        let key = public(&site);
        assert!(signed.is_by(&key).unwrap());
        assert!(!signed.is_by(&public(&other)).unwrap());
        assert!(!PcrSignature { epoch: 0, ..signed.clone() }.is_by(&key).unwrap());
        assert!(!PcrSignature { policy: [0; 32], ..signed.clone() }.is_by(&key).unwrap());
        let json = PcrSignatures::to_json(vec![signed.clone()]).unwrap();
        assert_eq!(PcrSignatures::parse(json.as_bytes()).unwrap(), [signed]);
    }

    #[test]
    fn other_banks_are_ignored_and_damage_is_named() {
        let systemd = r#"{"sha1":[{"pcrs":[11],"pkfp":"00","pol":"11","sig":"!"}],"sha256":[]}"#;
        assert_eq!(PcrSignatures::parse(systemd.as_bytes()).unwrap(), []);
        for wrong in [
            "",
            r#"{"sha256":[{"pcrs":[11]}]}"#,
            r#"{"sha256":[{"pcrs":[24],"pkfp":"","pol":"","sig":""}]}"#,
            &format!(r#"{{"sha256":[{{"pcrs":[11],"pkfp":"{0}","pol":"{0}x","sig":""}}]}}"#, "0".repeat(64)),
            &format!(r#"{{"sha256":[{{"pcrs":[11],"pkfp":"{0}","pol":"{0}","sig":"%"}}]}}"#, "0".repeat(64)),
        ] {
            assert!(PcrSignatures::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_that_a_tpm_cannot_verify_by_are_refused() {
        let group = EcGroup::from_curve_name(Nid::SECP384R1).unwrap();
        let p384 = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let public = PKey::public_key_from_der(&p384.public_key_to_der().unwrap()).unwrap();
        assert!(SiteKey::of(public).is_err());
    }
}
