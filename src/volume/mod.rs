//! Volumes: what is encrypted, and how. Headers are untrusted until the allow-list has passed them.

use std::{fmt, path::PathBuf};

use uuid::Uuid;

use crate::{
    device::Device,
    key::{KeyReference, KeySize},
};

/// Format of a volume's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// LUKS version 1.
    Luks1,
    /// LUKS version 2.
    Luks2,
    /// dm-crypt without any header.
    Plain,
}

/// The only data cipher that is let through: AES-XTS with the sector number as tweak, dm-crypt's `aes-xts-plain64`.
pub const CIPHER: &str = "aes-xts-plain64";

/// Encryption sector size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SectorSize(u32);

impl SectorSize {
    /// 512 bytes.
    pub const B512: Self = Self(512);
    /// 4096 bytes.
    pub const B4096: Self = Self(4096);

    /// The size for a number of bytes: 512, 1024, 2048 or 4096 (dm-crypt's limits).
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        matches!(bytes, 512 | 1024 | 2048 | 4096).then_some(Self(bytes))
    }

    /// Number of bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }
}

/// How a volume's sectors are encrypted and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the volume key.
    pub key_size: KeySize,
    /// Encryption sector size.
    pub sector_size: SectorSize,
    /// Where the data begins on the data device.
    pub data_offset_bytes: u64,
    /// Length of the data, a multiple of the sector size.
    pub size_bytes: u64,
    /// Added to the sector number for the tweak, in units of 512 bytes as dm-crypt's `iv_offset`. Zero for LUKS.
    ///
    /// The tweak of the sector at byte B of the plaintext is `B / 512 + iv_offset_sectors`, whatever the sector size
    /// (LUKS2 does not set dm-crypt's `iv_large_sectors`).
    pub iv_offset_sectors: u64,
}

/// A volume whose header has passed the allow-list.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The device (or file) with the data.
    pub device: Device,
    /// A detached header's path.
    pub header: Option<PathBuf>,
    /// Format of the header.
    pub format: Format,
    /// UUID in the LUKS header.
    pub uuid: Option<Uuid>,
    /// How and where the sectors are.
    pub geometry: Geometry,
    /// The header's digest of the volume key, as the header spells it.
    pub digest: Option<String>,
    /// Where the key is, from the LUKS2 token.
    pub reference: Option<KeyReference>,
}

impl fmt::Display for SectorSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
