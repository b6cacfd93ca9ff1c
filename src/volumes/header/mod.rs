//! Volumes: what is encrypted, and how. Headers are untrusted until the allow-list has passed them.

mod allow_list;
pub mod backup;
pub mod blank;
mod claimed;
pub mod copies;
pub mod encrypting;
pub(super) mod header_image;
mod keyslots;
pub mod library;
mod luks;
mod metadata;
mod midway;
mod plain;
pub mod reencryption;
pub mod rekey;
pub mod signatures;
mod token;
pub mod wipe;

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, KeySize, SecretBytes, SecretMemoryError, VolumeKey},
        plain_hash::PlainHash,
    },
    sys::device::{Device, DeviceError},
};
pub use allow_list::Refusal;
pub use claimed::Binding;
pub use header_image::HeaderImage;
pub use keyslots::Keyslot;
pub use library::LibraryError;
pub use luks::{HEADER_BYTES, NewHeader};
pub use midway::{Midway, Rest, find_to_map};
pub use token::ClevisToken;

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
    /// Where the header is, and the bytes that were checked.
    pub header: Header,
    /// How and where the sectors are.
    pub geometry: Geometry,
    /// Size of the volume key, where the header tells: a strict LUKS2 header does not.
    pub key_size: Option<KeySize>,
    /// The part of the data that has another key yet. Only [`find_to_map`] lets such a volume through.
    pub rest: Option<Rest>,
}

/// What stands before the data, or says what does.
#[derive(Clone, Debug)]
pub enum Header {
    /// LUKS, version 1 or 2.
    Luks(LuksHeader),
    /// None: plain dm-crypt, and how its key is made of a passphrase.
    Plain(PlainHash),
}

/// A checked LUKS header.
#[derive(Clone, Debug)]
pub struct LuksHeader {
    /// 1 or 2.
    pub format: Format,
    /// The volume's UUID.
    pub uuid: Uuid,
    /// The digest of the volume key, as the header spells it.
    pub digest: String,
    /// Where the key is, from the LUKS2 token.
    pub reference: Option<KeyReference>,
    /// What clevis has bound.
    pub clevis: Vec<ClevisToken>,
    /// A person's passphrase or recovery key may open a keyslot: not all of them are a program's.
    pub asks_people: bool,
    /// The keyslots that hold the volume key.
    pub keyslots: Vec<Keyslot>,
    /// The path of a detached header.
    pub detached: Option<PathBuf>,
    /// The bytes that were checked, and no others, are what is activated.
    pub image: HeaderImage,
    /// The keyslots of a header that is not in its place yet.
    pub keyslots_in: Option<HeaderImage>,
}

/// What the user says of a volume that has no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainParameters {
    /// Size of the volume key.
    pub key_size: KeySize,
    /// Encryption sector size.
    pub sector_size: SectorSize,
    /// Where the data begins, in units of 512 bytes (`cryptsetup --offset`).
    pub offset_sectors: u64,
    /// Added to the sector number for the tweak, in units of 512 bytes (`cryptsetup --skip`).
    pub skip_sectors: u64,
    /// If a passphrase and not the key itself opens it (`cryptsetup --hash`).
    pub hash: PlainHash,
}

/// Reads the header of a device, or a detached one, and checks it against the allow-list.
///
/// Nothing is written, not even to repair a header.
pub fn probe(device: &Path, detached: Option<&Path>) -> Result<Volume, VolumeError> {
    luks::UntrustedHeader::read(device, detached)?.check()
}

/// The volume on a device: as its header says, or without a header as the user says.
pub fn find(
    device: &Path,
    detached: Option<&Path>,
    described: Option<&PlainParameters>,
) -> Result<Volume, VolumeError> {
    match described {
        Some(parameters) => plain(device, parameters),
        None => probe(device, detached),
    }
}

/// Checks a header that is in memory and not (or not yet) on the device, as [`probe`] does.
pub fn probe_image(device: &Device, detached: Option<&Path>, image: &HeaderImage) -> Result<Volume, VolumeError> {
    luks::UntrustedHeader::parse(device.clone(), detached.map(Path::to_owned), image.clone())?.check()
}

/// A volume without a header, as the user describes it.
pub fn plain(device: &Path, parameters: &PlainParameters) -> Result<Volume, VolumeError> {
    let device = Device::look(device)?;
    let refused = |refusal| VolumeError::Refused { path: device.path.clone(), refusal };
    let offset = parameters.offset_sectors.saturating_mul(512);
    let geometry = allow_list::geometry(parameters.sector_size, offset, None, device.size_bytes).map_err(refused)?;
    let geometry = Geometry { iv_offset_sectors: parameters.skip_sectors, ..geometry };
    Ok(Volume {
        device,
        header: Header::Plain(parameters.hash),
        geometry,
        key_size: Some(parameters.key_size),
        rest: None,
    })
}

impl Volume {
    /// Format of the header.
    pub fn format(&self) -> Format {
        match &self.header {
            Header::Luks(header) => header.format,
            Header::Plain(_) => Format::Plain,
        }
    }

    /// The LUKS header, if there is one.
    pub fn luks(&self) -> Option<&LuksHeader> {
        match &self.header {
            Header::Luks(header) => Some(header),
            Header::Plain(_) => None,
        }
    }

    /// Where its key is, if its header has a token of ours.
    pub fn reference(&self) -> Option<&KeyReference> {
        self.luks()?.reference.as_ref()
    }

    /// The volume's UUID, if it has a header.
    pub fn uuid(&self) -> Option<Uuid> {
        self.luks().map(|header| header.uuid)
    }

    /// Checks the key against the header's digest. Without a header nothing can tell a wrong key but its size.
    pub fn verify_key(&self, key: &VolumeKey) -> Result<(), VolumeError> {
        let right = match &self.header {
            Header::Luks(header) => header.verify_key(key)?,
            Header::Plain(_) => self.key_size == Some(key.size()),
        };
        if right { Ok(()) } else { Err(VolumeError::WrongKey { path: self.device.path.clone() }) }
    }

    /// Whether [`Volume::write_token`] can be done: a LUKS2 header has room for one token of ours.
    pub fn takes_token(&self) -> Result<&LuksHeader, VolumeError> {
        let why = match self.luks() {
            Some(luks) if luks.format == Format::Luks2 => match &luks.reference {
                None => return Ok(luks),
                Some(reference) => format!("it has one already, for {reference}"),
            },
            _ => return Err(VolumeError::NotLuks2 { path: self.device.path.clone() }),
        };
        Err(self.no_token(why))
    }

    /// Writes into a LUKS2 header where the key is; nothing else there is changed.
    pub fn write_token(&self, reference: &KeyReference) -> Result<(), VolumeError> {
        self.takes_token()?.write_token(&self.device.path, reference)
    }

    /// Adds a keyslot for a passphrase of 256 random bits to a LUKS2 header, and the token of it; its number.
    pub fn add_keyslot(
        &self,
        key: &VolumeKey,
        passphrase: &SecretBytes,
        token: &dyn Fn(u32) -> serde_json::Value,
    ) -> Result<u32, VolumeError> {
        match self.luks() {
            Some(luks) if luks.format == Format::Luks2 => luks.add_keyslot(&self.device.path, key, passphrase, token),
            _ => Err(VolumeError::NotLuks2 { path: self.device.path.clone() }),
        }
    }

    fn no_token(&self, why: String) -> VolumeError {
        VolumeError::NoToken { path: self.device.path.clone(), why }
    }

    /// The volume key by a passphrase: out of a keyslot, or of a plain volume made of it.
    pub fn unlock(&self, passphrase: &SecretBytes) -> Result<VolumeKey, VolumeError> {
        match (&self.header, self.key_size) {
            (Header::Plain(hash), Some(size)) => plain::key_of(passphrase, *hash, size, &self.device),
            _ => self.open_keyslot(passphrase),
        }
    }

    /// The volume key out of a keyslot.
    pub fn open_keyslot(&self, passphrase: &SecretBytes) -> Result<VolumeKey, VolumeError> {
        Ok(self.open_keyslot_of(passphrase, None)?.0)
    }

    /// The volume key out of one of these keyslots, or of any; and the keyslot's number.
    pub fn open_keyslot_of(
        &self,
        passphrase: &SecretBytes,
        keyslots: Option<&[u32]>,
    ) -> Result<(VolumeKey, u32), VolumeError> {
        let (Header::Luks(header), Some(size)) = (&self.header, self.key_size) else {
            return Err(VolumeError::NoKeyslot { path: self.device.path.clone() });
        };
        header.open_keyslot(self, passphrase, size, keyslots)
    }
}

/// A volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is no LUKS header.
    #[error("{} has no LUKS header{}", .path.display(), found_instead(.found.as_deref()))]
    NoHeader {
        path: PathBuf,
        /// What libblkid finds there.
        found: Option<String>,
    },
    /// There is a LUKS header, but it is damaged or truncated.
    #[error("the LUKS header of {} is damaged", .path.display())]
    Damaged {
        path: PathBuf,
        /// What libcryptsetup says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The header says something that is not on the allow-list.
    #[error("the header of {} is refused", .path.display())]
    Refused {
        path: PathBuf,
        #[source]
        refusal: Refusal,
    },
    /// The key does not belong to the volume.
    #[error("the volume key does not match the digest in the header of {}", .path.display())]
    WrongKey { path: PathBuf },
    /// The separation of another device's key was proven.
    #[error("the key of {} is not released: its separation was proven for {}", .path.display(), .proven.display())]
    OtherProof {
        path: PathBuf,
        /// What was proven apart.
        proven: PathBuf,
    },
    /// A passphrase opens nothing here.
    #[error("{} has no keyslot", .path.display())]
    NoKeyslot { path: PathBuf },
    /// The passphrase opens no keyslot.
    #[error("the passphrase opens no keyslot of {}", .path.display())]
    WrongPassphrase { path: PathBuf },
    /// A header takes no token of ours.
    #[error("no token can be written to {}: {why}", .path.display())]
    NoToken { path: PathBuf, why: String },
    /// It is LUKS1, or plain.
    #[error("the header of {} is not LUKS2; only LUKS2 has tokens, which say where the key is", .path.display())]
    NotLuks2 { path: PathBuf },
    /// The header on the device is another one than a moment ago.
    #[error("the header of {} has been changed meanwhile by another program", .path.display())]
    HeaderChanged { path: PathBuf },
    /// A re-encryption that is not ours to go on with.
    #[error("the re-encryption of {} is none of 'cryptattach key rotate': {why}", .path.display())]
    NotRotating { path: PathBuf, why: String },
    /// Its data has two keys, and one of them is at hand.
    #[error("the key of {} is being rotated: its data has two keys now, and only both of them open it", .path.display())]
    TwoKeys { path: PathBuf },
    /// The header is older than what it says.
    #[error("the header of {} is from the middle of a rotation of its key that has ended", .path.display())]
    HasEnded { path: PathBuf },
    /// A rotation of its key was killed in a stretch.
    #[error("a stretch of {} is half written: 'cryptattach key rotate' was killed there", .path.display())]
    HalfWritten { path: PathBuf },
    /// Storage has damaged what it was writing.
    #[error("{blocks} blocks of {} are neither as they were nor as they would be", .path.display())]
    Torn {
        path: PathBuf,
        /// How many, of the stretch that was being written.
        blocks: u64,
    },
    /// libcryptsetup failed.
    #[error("cannot {action} {}", .path.display())]
    Library {
        /// "make a header for", ...
        action: &'static str,
        path: PathBuf,
        #[source]
        source: LibraryError,
    },
    /// libblkid failed.
    #[error("cannot look for signatures on {}", .path.display())]
    Signatures {
        path: PathBuf,
        #[source]
        source: libblkid_rs::BlkidErr,
    },
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl VolumeError {
    /// The two keys that a header names have nothing to do with each other.
    pub fn no_successor(path: &Path) -> Self {
        let why = "its next key was not made to take the place of its key".to_owned();
        Self::NotRotating { path: path.to_owned(), why }
    }
}

impl Advice for VolumeError {
    fn exit(&self) -> Exit {
        match self {
            Self::Device(error) => error.exit(),
            Self::Memory(error) => error.exit(),
            Self::WrongPassphrase { .. } => Exit::KeyRefused,
            Self::Signatures { .. } => Exit::Io,
            Self::NoHeader { .. }
            | Self::Damaged { .. }
            | Self::Refused { .. }
            | Self::WrongKey { .. }
            | Self::OtherProof { .. }
            | Self::NoKeyslot { .. }
            | Self::NoToken { .. }
            | Self::NotLuks2 { .. }
            | Self::NotRotating { .. }
            | Self::TwoKeys { .. }
            | Self::HasEnded { .. }
            | Self::HalfWritten { .. }
            | Self::Torn { .. }
            | Self::Library { .. } => Exit::Header,
            Self::HeaderChanged { .. } => Exit::Busy,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Device(error) => return error.next_step(),
            Self::NoHeader { .. } => {
                "'cryptattach format' makes a volume; --header names a detached header, --plain is for a volume without one"
            }
            Self::Damaged { .. } => {
                "'cryptsetup repair' may help if one copy of the header is whole; else restore a backup of it"
            }
            Self::Refused { refusal, .. } => refusal.next_step(),
            Self::NoToken { .. } => {
                "'cryptsetup luksDump' shows the header's tokens; 'cryptsetup token remove' removes one"
            }
            Self::NotLuks2 { .. } => {
                "back the header up ('cryptsetup luksHeaderBackup'), then 'cryptsetup convert --type luks2' makes LUKS2 of LUKS1, while \
                 the volume is closed"
            }
            Self::HeaderChanged { .. } => "find out which program uses the device, then try again",
            Self::NotRotating { .. } => "'cryptsetup luksDump' shows it; finish it with the program that has begun it",
            Self::TwoKeys { path } => {
                return Some(format!("go on with it: cryptattach key rotate {}", path.display()).into());
            }
            Self::HasEnded { .. } => {
                "by this header new data is taken for old: restore the one from after the end; if it was restored by mistake, write \
                 nothing to the device"
            }
            Self::HalfWritten { path } => {
                let path = path.display();
                return Some(
                    format!("an attach for writing recovers it; so does 'cryptattach key rotate {path}', and goes on")
                        .into(),
                );
            }
            Self::Torn { .. } => {
                "the disk has damaged what it was writing: nothing more is written; make a copy of the whole device, and restore the \
                 blocks from a backup"
            }
            Self::WrongKey { .. } => "check that this is the right volume for the key",
            Self::NoKeyslot { .. }
            | Self::OtherProof { .. }
            | Self::WrongPassphrase { .. }
            | Self::Library { .. }
            | Self::Signatures { .. } => return None,
            Self::Memory(error) => return error.next_step(),
        };
        Some(step.into())
    }
}

fn found_instead(found: Option<&str>) -> String {
    found.map(|found| format!(" (found: {found})")).unwrap_or_default()
}

impl fmt::Display for SectorSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
