//! TPM2_MakeCredential without a TPM (TPM 2.0 Part 1, sections 11.4.10, 24 and annexes B.10.4 and C.6.4).

use openssl::{
    bn::{BigNum, BigNumContext},
    derive::Deriver,
    ec::{EcGroup, EcKey},
    encrypt::Encrypter,
    error::ErrorStack,
    hash::MessageDigest,
    nid::Nid,
    pkey::{Id, PKey, PKeyRef, Public},
    rsa::Padding,
    sha::Sha256,
    sign::Signer,
    symm::{Cipher, Crypter, Mode},
};

use crate::{
    base::key::{SecretBytes, SecretMemoryError},
    keys::tpm::{Digest, Name},
};

/// Bytes of a secret: the most that a credential for a key under SHA-256 takes.
pub const SECRET_BYTES: usize = 32;
const SEED_BYTES: usize = 32;
const COORDINATE_BYTES: i32 = 32;
/// AES-128: both templates of endorsement keys encrypt by it.
const KEY_BITS: u32 = 128;
const LABEL: &str = "IDENTITY";

/// An encrypted credential.
pub struct Credential {
    /// TPMS_ID_OBJECT.
    pub id_object: Vec<u8>,
    /// The content of TPM2B_ENCRYPTED_SECRET.
    pub encrypted_seed: Vec<u8>,
}

/// A credential cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// libcrypto failed.
    #[error("libcrypto failed")]
    Crypto(#[from] ErrorStack),
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

/// Encrypts `secret` so that only a TPM with this endorsement key *and* the object of this name decrypts it. The key is of one
/// of the templates ([`crate::keys::tpm::EndorsementKind`]): its name and its children are under SHA-256 and AES-128 in CFB mode.
pub fn make(
    endorsement_key: &PKeyRef<Public>,
    object: &Name,
    secret: &SecretBytes,
) -> Result<Credential, CredentialError> {
    let (seed, encrypted_seed) = match endorsement_key.id() {
        Id::RSA => rsa_seed(endorsement_key)?,
        _ => ecc_seed(endorsement_key)?,
    };
    let key = kdfa(&seed, "STORAGE", object.as_bytes(), KEY_BITS)?;
    let mut clear = SecretBytes::zeroed(2 + secret.len())?;
    clear.expose_mut()[..2].copy_from_slice(&(secret.len() as u16).to_be_bytes());
    clear.expose_mut()[2..].copy_from_slice(secret.expose());
    let encrypted = encrypt_cfb(&key, &clear)?;
    let integrity_key = kdfa(&seed, "INTEGRITY", &[], 256)?;
    let mac = hmac(&integrity_key, &[&encrypted, object.as_bytes()])?;
    Ok(Credential { id_object: [&(mac.len() as u16).to_be_bytes(), &mac[..], &encrypted].concat(), encrypted_seed })
}

/// A random seed, by RSA-OAEP. The label's zero byte belongs to it (annex B.4).
fn rsa_seed(key: &PKeyRef<Public>) -> Result<(SecretBytes, Vec<u8>), CredentialError> {
    let seed = SecretBytes::random(SEED_BYTES)?;
    let mut encrypter = Encrypter::new(key)?;
    encrypter.set_rsa_padding(Padding::PKCS1_OAEP)?;
    encrypter.set_rsa_oaep_md(MessageDigest::sha256())?;
    encrypter.set_rsa_mgf1_md(MessageDigest::sha256())?;
    encrypter.set_rsa_oaep_label(format!("{LABEL}\0").as_bytes())?;
    let mut encrypted = vec![0; encrypter.encrypt_len(seed.expose())?];
    let len = encrypter.encrypt(seed.expose(), &mut encrypted)?;
    encrypted.truncate(len);
    Ok((seed, encrypted))
}

/// A seed agreed upon with a new key pair, whose public point the TPM is given.
fn ecc_seed(key: &PKeyRef<Public>) -> Result<(SecretBytes, Vec<u8>), CredentialError> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    let ephemeral = PKey::from_ec_key(EcKey::generate(&group)?)?;
    let mut deriver = Deriver::new(&ephemeral)?;
    deriver.set_peer(key)?;
    let mut z = SecretBytes::zeroed(COORDINATE_BYTES as usize)?;
    let len = deriver.derive(z.expose_mut())?;
    z.truncate(len);
    let ([our_x, our_y], [their_x, _]) = (coordinates(&*ephemeral.ec_key()?)?, coordinates(&*key.ec_key()?)?);
    // KDFe (Part 1, section 11.4.10.3): one round gives all 256 bits.
    let mut hash = Sha256::new();
    for part in [&1_u32.to_be_bytes()[..], z.expose(), LABEL.as_bytes(), &[0], &our_x, &their_x] {
        hash.update(part);
    }
    let point = [our_x, our_y].map(|coordinate| [&(coordinate.len() as u16).to_be_bytes(), &coordinate[..]].concat());
    Ok((secret_of(hash.finish())?, point.concat()))
}

fn coordinates<T: openssl::pkey::HasPublic>(key: &openssl::ec::EcKeyRef<T>) -> Result<[Vec<u8>; 2], ErrorStack> {
    let (mut x, mut y, mut context) = (BigNum::new()?, BigNum::new()?, BigNumContext::new()?);
    key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context)?;
    Ok([x.to_vec_padded(COORDINATE_BYTES)?, y.to_vec_padded(COORDINATE_BYTES)?])
}

/// KDFa (Part 1, section 11.4.10.2): one round of HMAC-SHA256 gives up to 256 bits.
fn kdfa(key: &SecretBytes, label: &str, context: &[u8], bits: u32) -> Result<SecretBytes, CredentialError> {
    let parts = [&1_u32.to_be_bytes()[..], label.as_bytes(), &[0], context, &bits.to_be_bytes()];
    let mut derived = secret_of(hmac(key, &parts)?)?;
    derived.truncate(bits as usize / 8);
    Ok(derived)
}

fn secret_of(mut digest: Digest) -> Result<SecretBytes, SecretMemoryError> {
    let secret = SecretBytes::copy_of(&digest);
    zeroize::Zeroize::zeroize(&mut digest);
    secret
}

fn hmac(key: &SecretBytes, parts: &[&[u8]]) -> Result<Digest, ErrorStack> {
    let key = PKey::hmac(key.expose())?;
    let mut signer = Signer::new(MessageDigest::sha256(), &key)?;
    parts.iter().try_for_each(|part| signer.update(part))?;
    let mut mac = [0; 32];
    signer.sign(&mut mac)?;
    Ok(mac)
}

fn encrypt_cfb(key: &SecretBytes, clear: &SecretBytes) -> Result<Vec<u8>, ErrorStack> {
    let cipher = Cipher::aes_128_cfb128();
    let mut crypter = Crypter::new(cipher, Mode::Encrypt, key.expose(), Some(&[0; 16]))?;
    let mut encrypted = vec![0; clear.len() + cipher.block_size()];
    let mut len = crypter.update(clear.expose(), &mut encrypted)?;
    len += crypter.finalize(&mut encrypted[len..])?;
    encrypted.truncate(len);
    Ok(encrypted)
}
