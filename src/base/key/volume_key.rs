//! The volume key: what dm-crypt encrypts sectors with.

use super::{SecretBytes, SecretMemoryError};

/// Size of an AES-XTS volume key: two AES keys of equal length (IEEE 1619).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySize {
    /// AES-128-XTS: 32 bytes.
    Bits256,
    /// AES-256-XTS: 64 bytes.
    Bits512,
}

impl KeySize {
    /// The size for a number of bytes, if there is one.
    pub fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            32 => Some(Self::Bits256),
            64 => Some(Self::Bits512),
            _ => None,
        }
    }

    /// The size for a number of bits, as `cryptsetup --key-size` counts, if there is one.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Self::from_bytes(usize::try_from(bits).ok()? / 8).filter(|size| size.bits() == bits)
    }

    /// Number of bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bits256 => 32,
            Self::Bits512 => 64,
        }
    }

    /// Number of bits.
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits256 => 256,
            Self::Bits512 => 512,
        }
    }
}

/// A volume key in secret memory.
#[derive(PartialEq)]
pub struct VolumeKey {
    bytes: SecretBytes,
    size: KeySize,
}

impl VolumeKey {
    /// A new random key.
    pub fn random(size: KeySize) -> Result<Self, SecretMemoryError> {
        loop {
            let key = Self { bytes: SecretBytes::random(size.bytes())?, size };
            // XTS with two equal halves loses its proof; FIPS 140 (IG A.9) and OpenSSL refuse such a key.
            let (data, tweak) = key.expose().split_at(size.bytes() / 2);
            if data != tweak {
                return Ok(key);
            }
        }
    }

    /// Takes the bytes as a key, unless no AES-XTS key has that size.
    pub fn from_secret(bytes: SecretBytes) -> Option<Self> {
        let size = KeySize::from_bytes(bytes.len())?;
        Some(Self { bytes, size })
    }

    /// The key's size.
    pub fn size(&self) -> KeySize {
        self.size
    }

    /// The secret memory that it is in.
    pub fn secret(&self) -> &SecretBytes {
        &self.bytes
    }

    /// The raw key, for the one call that needs it.
    pub fn expose(&self) -> &[u8] {
        self.bytes.expose()
    }
}
