//! Content encryption: AES-256-GCM (RFC 7518 section 5.3).

use openssl::symm::{Cipher, Crypter, Mode};

use super::SealError;
use crate::base::key::{SecretBytes, SecretMemoryError};

/// Value of `enc`.
pub const ENC: &str = "A256GCM";
const IV_BYTES: usize = 12;
const TAG_BYTES: usize = 16;

/// The content encryption key of one sealed key (RFC 7516 section 2, "CEK"): 32 bytes.
pub struct ContentKey(SecretBytes);

impl ContentKey {
    /// Number of bytes.
    pub const BYTES: usize = 32;

    /// A new random key.
    pub fn random() -> Result<Self, SecretMemoryError> {
        SecretBytes::random(Self::BYTES).map(Self)
    }

    /// Takes the bytes as a key, if there are 32.
    pub fn from_secret(bytes: SecretBytes) -> Option<Self> {
        (bytes.len() == Self::BYTES).then_some(Self(bytes))
    }

    /// The raw key.
    pub fn expose(&self) -> &[u8] {
        self.0.expose()
    }
}

/// An encrypted payload.
pub struct Sealed {
    pub iv: Vec<u8>,
    pub ciphertext: Vec<u8>,
    pub tag: Vec<u8>,
}

/// Encrypts under a fresh IV. A content key encrypts once, so the IV cannot repeat.
pub fn encrypt(key: &ContentKey, authenticated: &[u8], payload: &SecretBytes) -> Result<Sealed, SealError> {
    let cipher = Cipher::aes_256_gcm();
    let (mut iv, mut tag) = (vec![0; IV_BYTES], vec![0; TAG_BYTES]);
    openssl::rand::rand_bytes(&mut iv)?;
    let mut ciphertext = vec![0; payload.len() + cipher.block_size()];
    let mut crypter = Crypter::new(cipher, Mode::Encrypt, key.expose(), Some(&iv))?;
    crypter.aad_update(authenticated)?;
    let mut len = crypter.update(payload.expose(), &mut ciphertext)?;
    len += crypter.finalize(&mut ciphertext[len..])?;
    ciphertext.truncate(len);
    crypter.get_tag(&mut tag)?;
    Ok(Sealed { iv, ciphertext, tag })
}

impl Sealed {
    /// Decrypts straight into secret memory; nothing is returned unless the tag is right.
    pub fn open(&self, key: &ContentKey, authenticated: &[u8]) -> Result<SecretBytes, SealError> {
        // libcrypto takes shorter tags as well; a one-byte tag is guessed in no time.
        if self.iv.len() != IV_BYTES || self.tag.len() != TAG_BYTES {
            return Err(SealError::Unsupported("its IV or tag has the wrong length".to_owned()));
        }
        let cipher = Cipher::aes_256_gcm();
        let mut payload = SecretBytes::zeroed(self.ciphertext.len() + cipher.block_size())?;
        let mut crypter = Crypter::new(cipher, Mode::Decrypt, key.expose(), Some(&self.iv))?;
        crypter.set_tag(&self.tag)?;
        crypter.aad_update(authenticated)?;
        let len = crypter.update(&self.ciphertext, payload.expose_mut())?;
        crypter.finalize(&mut payload.expose_mut()[len..]).map_err(|_| SealError::Tampered)?;
        payload.truncate(len);
        Ok(payload)
    }
}
