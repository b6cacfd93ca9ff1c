//! LUKS headers through libcryptsetup: read, make, check a key, open a keyslot.

use std::path::{Path, PathBuf};

use either::Either;
use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsLuks2, CryptParamsLuks2Ref, CryptPbkdfType, LibcryptErr, TokenInput,
    consts::{
        flags::{CryptPbkdf, CryptVolumeKey},
        vals::{CryptKdf, EncryptionFormat},
    },
};
use nix::libc;
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::{
    CIPHER, Format, Header, HeaderImage, LuksHeader, SectorSize, Volume, VolumeError, allow_list, header_image,
    keyslots, library,
    metadata::Metadata,
    reencryption, signatures,
    token::{ClevisToken, Token},
};
use crate::{
    base::{
        hex,
        key::{KeyReference, KeySize, SecretBytes, VolumeKey},
    },
    sys::device::{Device, DeviceError},
};

/// A header as it was read, before anything in it is believed.
pub struct UntrustedHeader {
    device: Device,
    detached: Option<PathBuf>,
    /// The device or file that the header stands on.
    path: PathBuf,
    image: HeaderImage,
    uuid: Uuid,
    contents: Contents,
}

enum Contents {
    Luks1(Luks1),
    /// Typed, and as it is.
    Luks2(Metadata, Value),
}

/// What a LUKS1 header says (LUKS1 On-Disk Format Specification, table 1).
pub struct Luks1 {
    pub cipher: String,
    pub hash: String,
    pub key_bytes: u32,
    pub data_offset_bytes: u64,
    pub digest: String,
    pub digest_iterations: u32,
    /// Of each keyslot in use: its number and what trying a passphrase takes.
    pub keyslot_iterations: Vec<(u32, u32)>,
}

impl UntrustedHeader {
    /// Reads the header's metadata once, into memory.
    pub fn read(device: &Path, detached: Option<&Path>) -> Result<Self, VolumeError> {
        let (device, file) = Device::open(device)?;
        let path = detached.unwrap_or(&device.path).to_owned();
        let (header_bytes, file) = match detached {
            Some(header) => Device::open(header).map(|(header, file)| (header.size_bytes, file))?,
            None => (device.size_bytes, file),
        };
        let Some(wanted) = header_image::metadata_len(&file).map_err(DeviceError::io("read", &path))? else {
            let unreadable = |source| VolumeError::Signatures { path: path.clone(), source };
            let found = signatures::find(&path).map_err(unreadable)?;
            return Err(VolumeError::NoHeader { path, found });
        };
        let image = HeaderImage::read(&file, header_bytes, wanted).map_err(DeviceError::io("read", &path))?;
        Self::parse(device, detached.map(Path::to_owned), image)
    }

    /// Takes apart a header that is in memory.
    pub fn parse(device: Device, detached: Option<PathBuf>, image: HeaderImage) -> Result<Self, VolumeError> {
        let path = detached.as_ref().unwrap_or(&device.path).clone();
        let damaged = |source| VolumeError::Damaged { path: path.clone(), source };
        let is_finished = image.finish().map_err(|e| damaged(e.into()))?;
        if is_finished {
            tracing::warn!(
                "all data of {0} has its new key, but the re-encryption was stopped before its header said so; 'cryptattach key \
                 rotate {0}' finishes the header; never resume it with cryptsetup, which may begin again and destroy the data",
                path.display()
            );
        }
        let as_read = image.metadata().map_err(|e| damaged(e.into()))?;
        let mut context = library::call(|| load_header(&image)).map_err(|error| match error.errno() {
            Some(libc::EINVAL) | None => damaged(error.into()),
            // The header is not what it fails on.
            Some(_) => VolumeError::Library { action: "read the header of", path: path.clone(), source: error },
        })?;
        // libcryptsetup has written over the damaged copy, in memory.
        let is_repaired = image.metadata().map_err(|e| damaged(e.into()))? != as_read;
        let uuid = library::call(|| context.status_handle().get_uuid()).map_err(|e| damaged(e.into()))?;
        let format = library::call(|| context.format_handle().get_type()).map_err(|e| damaged(e.into()))?;
        let contents = if format == EncryptionFormat::Luks2 {
            let json = library::call(|| context.status_handle().dump_json()).map_err(|e| damaged(e.into()))?;
            Contents::Luks2(Metadata::deserialize(&json).map_err(|e| damaged(e.into()))?, json)
        } else {
            Contents::Luks1(Luks1::parse(&image.first_block().map_err(|e| damaged(e.into()))?))
        };
        if is_repaired {
            // No backup is made of the header of a volume mid-way, and cryptsetup is to be kept from it.
            let is_midway =
                is_finished || matches!(&contents, Contents::Luks2(_, json) if reencryption::is_rotation(json));
            let at = path.display();
            let next = match is_midway {
                true => format!("'cryptattach key rotate {at}' writes both again"),
                false => format!("back {at}'s header up, then repair it: cryptsetup repair {at}"),
            };
            tracing::warn!("one of the two copies of the LUKS header of {at} is damaged; using the other one; {next}");
        }
        Ok(Self { device, detached, path, image, uuid, contents })
    }

    /// Checks what it says against the allow-list.
    pub fn check(self) -> Result<Volume, VolumeError> {
        let device_bytes = self.device.size_bytes;
        let (format, checked) = match &self.contents {
            Contents::Luks1(header) => (Format::Luks1, allow_list::luks1(header, device_bytes)),
            Contents::Luks2(metadata, json) => (Format::Luks2, allow_list::luks2(metadata, json, device_bytes)),
        };
        let checked = checked.map_err(|refusal| VolumeError::Refused { path: self.path, refusal })?;
        let header = LuksHeader {
            format,
            uuid: self.uuid,
            digest: checked.digest,
            reference: checked.reference,
            clevis: match &self.contents {
                Contents::Luks1(_) => Vec::new(),
                Contents::Luks2(metadata, _) => ClevisToken::all(metadata.tokens.iter()),
            },
            asks_people: checked.asks_people,
            keyslots: checked.keyslots,
            detached: self.detached,
            image: self.image,
            keyslots_in: None,
        };
        Ok(Volume {
            device: self.device,
            header: Header::Luks(header),
            geometry: checked.geometry,
            key_size: checked.key_size,
            rest: None,
        })
    }
}

impl Luks1 {
    fn parse(first: &[u8; 4096]) -> Self {
        let text = |at: usize, len: usize| {
            let bytes = &first[at..at + len];
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(len);
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        };
        let number = |at: usize| u32::from_be_bytes([first[at], first[at + 1], first[at + 2], first[at + 3]]);
        let hex = |at: usize, len: usize| hex::encode(&first[at..at + len]);
        let (hash, iterations) = (text(72, 32), number(164));
        const ENABLED: u32 = 0x00ac_71f3;
        let keyslots = (0..8).zip((208..).step_by(48)).filter(|(_, at)| number(*at) == ENABLED);
        Self {
            cipher: format!("{}-{}", text(8, 32), text(40, 32)),
            key_bytes: number(108),
            data_offset_bytes: u64::from(number(104)) * 512,
            digest: format!("{hash}:{iterations}:{}:{}", hex(132, 32), hex(112, 20)),
            digest_iterations: iterations,
            keyslot_iterations: keyslots.map(|(slot, at)| (slot, number(at + 4))).collect(),
            hash,
        }
    }
}

impl LuksHeader {
    /// libcryptsetup's context over exactly the bytes that were checked.
    pub fn load(&self, device: &Path) -> Result<CryptDevice, library::LibraryError> {
        library::call(|| load(&self.image, device))
    }

    /// Adds our token to the header on the device, through libcryptsetup: both copies, under its lock.
    pub(super) fn write_token(&self, device: &Path, reference: &KeyReference) -> Result<(), VolumeError> {
        let path = self.detached.as_deref().unwrap_or(device);
        let add = || {
            let mut context = CryptInit::init(path)?;
            context.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
            let token = serde_json::to_value(Token::new(reference, Vec::new())).map_err(LibcryptErr::JsonError)?;
            context.token_handle().json_set(TokenInput::AddToken(&token)).map(drop)
        };
        let failed = |source| VolumeError::Library { action: "write the token to", path: path.to_owned(), source };
        library::call(add).map_err(failed)
    }

    /// Adds a keyslot for a random passphrase, and the token that `token` makes for its number: both, or neither.
    pub(super) fn add_keyslot(
        &self,
        device: &Path,
        key: &VolumeKey,
        passphrase: &SecretBytes,
        token: &dyn Fn(u32) -> Value,
    ) -> Result<u32, VolumeError> {
        let path = self.detached.as_deref().unwrap_or(device);
        let add = || {
            let mut context = CryptInit::init(path)?;
            context.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
            context.settings_handle().set_pbkdf_type(&least_pbkdf())?;
            // What the header on the device says of ciphers now was not checked.
            context.keyslot_handle().set_encryption(CIPHER, KeySize::Bits512.bytes())?;
            let (key, flags) = (Some(Either::Left(key.expose())), CryptVolumeKey::empty());
            let number = context.keyslot_handle().add_by_key(None, key, passphrase.expose(), flags)?;
            let added = context.token_handle().json_set(TokenInput::AddToken(&token(number)));
            if added.is_err() {
                context.keyslot_handle().destroy(number)?;
            }
            added.map(|_| number)
        };
        library::call(add).map_err(|source| {
            let path = path.to_owned();
            match source.errno() {
                Some(libc::ENOSPC) => VolumeError::NoToken { path, why: "its header has no room for it".to_owned() },
                _ => VolumeError::Library { action: "add a keyslot to", path, source },
            }
        })
    }

    pub(super) fn verify_key(&self, key: &VolumeKey) -> Result<bool, VolumeError> {
        let failed = |source| VolumeError::Library { action: "check the key of", path: self.image.path(), source };
        let mut context = library::call(|| load_header(&self.image)).map_err(failed)?;
        match library::call(|| context.volume_key_handle().verify(key.expose())) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.errno(), Some(libc::EPERM | libc::EINVAL)) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Only here the keyslots are read: from the header's own place, for the image holds the metadata only. What a second read
    /// says in the place of the metadata was not checked, and is not used: a null cipher would open by any passphrase.
    pub(super) fn open_keyslot(
        &self,
        volume: &Volume,
        passphrase: &SecretBytes,
        size: KeySize,
        only: Option<&[u32]>,
    ) -> Result<(VolumeKey, u32), VolumeError> {
        let path = self.detached.as_deref().unwrap_or(&volume.device.path);
        let (header_bytes, file) = match (&self.keyslots_in, &self.detached) {
            (Some(image), _) => {
                (header_image::LARGEST_BYTES, image.file().try_clone().map_err(DeviceError::io("read", path))?)
            }
            (None, Some(header)) => Device::open(header).map(|(header, file)| (header.size_bytes, file))?,
            (None, None) => (volume.device.size_bytes, volume.device.reopen()?),
        };
        let keyslots_end = match volume.geometry.data_offset_bytes {
            0 => header_bytes,
            data => data,
        };
        let image = HeaderImage::read(&file, header_bytes, keyslots_end.min(header_image::LARGEST_BYTES))
            .map_err(DeviceError::io("read", path))?;
        image.take_metadata(&self.image).map_err(DeviceError::io("read", path))?;
        let refused = |refusal| VolumeError::Refused { path: path.to_owned(), refusal };
        let failed = |source| VolumeError::Library { action: "open a keyslot of", path: path.to_owned(), source };
        let mut context = library::call(|| load_header(&image)).map_err(failed)?;
        let mut key = SecretBytes::zeroed(size.bytes())?;
        for number in keyslots::to_be_tried(&self.keyslots, only).map_err(refused)? {
            let mut open = || {
                let (key, passphrase) = (key.expose_mut(), Some(passphrase.expose()));
                context.volume_key_handle().get(Some(number), key, passphrase).map(drop)
            };
            match library::call(&mut open) {
                Err(error) if matches!(error.errno(), Some(libc::EPERM | libc::ENOENT)) => {}
                Err(error) => return Err(failed(error)),
                Ok(()) => {
                    let key = VolumeKey::from_secret(key).map(|key| (key, number));
                    return key.ok_or_else(|| VolumeError::NoKeyslot { path: path.to_owned() });
                }
            }
        }
        Err(VolumeError::WrongPassphrase { path: path.to_owned() })
    }
}

/// What a new header is made of.
pub struct NewHeader<'a> {
    /// The volume's UUID.
    pub uuid: Uuid,
    pub key: &'a VolumeKey,
    /// Encryption sector size.
    pub sector_size: SectorSize,
    /// Where the key will be.
    pub reference: &'a KeyReference,
    /// A keyslot, for programs that know passphrases only.
    ///
    /// Its passphrase must have 256 random bits.
    pub keyslot: Option<&'a SecretBytes>,
    /// The header will stand apart from the data.
    pub detached: bool,
}

/// Stretching protects weak secrets. Ours are random, 256 bits or more, so the least that LUKS2 allows will do.
pub(super) fn least_pbkdf() -> CryptPbkdfType {
    CryptPbkdfType {
        type_: CryptKdf::Pbkdf2,
        hash: Some("sha256".to_owned()),
        time_ms: 0,
        iterations: 1000,
        max_memory_kb: 0,
        parallel_threads: 0,
        flags: CryptPbkdf::NO_BENCHMARK,
    }
}

/// Size of a LUKS2 header as cryptsetup makes it: two times 16 KiB of metadata and the keyslots' area.
pub const HEADER_BYTES: u64 = 16 << 20;

impl NewHeader<'_> {
    /// Makes the header in memory. Nothing is written to the device.
    pub fn make(&self, device: &Device) -> Result<HeaderImage, VolumeError> {
        let len = if self.detached { HEADER_BYTES } else { device.size_bytes };
        let image = HeaderImage::empty(len).map_err(DeviceError::io("make a header for", &device.path))?;
        library::call(|| self.format(&image, device)).map_err(|source| VolumeError::Library {
            action: "make a header for",
            path: device.path.clone(),
            source,
        })?;
        Ok(image)
    }

    fn format(&self, image: &HeaderImage, device: &Device) -> Result<(), LibcryptErr> {
        let mut context = CryptInit::init(&image.path())?;
        // libcryptsetup wants to see the data device of a detached header; an empty file of its size will do, for the
        // device itself is held exclusively by the caller.
        let stand_in = HeaderImage::empty(device.size_bytes).map_err(LibcryptErr::IOError)?;
        context.settings_handle().set_pbkdf_type(&least_pbkdf())?;
        let parameters = CryptParamsLuks2 {
            pbkdf: Some(least_pbkdf()),
            integrity: None,
            integrity_params: None,
            data_alignment: 0,
            data_device: self.detached.then(|| stand_in.path()),
            sector_size: self.sector_size.bytes(),
            label: None,
            subsystem: None,
        };
        let mut parameters: CryptParamsLuks2Ref<'_> = (&parameters).try_into()?;
        context.context_handle().format(
            EncryptionFormat::Luks2,
            ("aes", "xts-plain64"),
            Some(self.uuid),
            Either::Left(self.key.expose()),
            Some(&mut parameters),
        )?;
        let mut keyslots = Vec::new();
        if let Some(passphrase) = self.keyslot {
            let number = context.keyslot_handle().add_by_key(
                Some(0),
                Some(Either::Left(self.key.expose())),
                passphrase.expose(),
                CryptVolumeKey::empty(),
            )?;
            keyslots.push(number.to_string());
        }
        let token = serde_json::to_value(Token::new(self.reference, keyslots)).map_err(LibcryptErr::JsonError)?;
        context.token_handle().json_set(TokenInput::AddToken(&token))?;
        Ok(())
    }
}

/// libcryptsetup's context over a header in memory, and the device with the data.
pub(super) fn load(image: &HeaderImage, device: &Path) -> Result<CryptDevice, LibcryptErr> {
    let mut context = CryptInit::init_with_data_device(Either::Right((&image.path(), device)))?;
    context.context_handle().load::<()>(None, None)?;
    Ok(context)
}

pub(super) fn load_header(image: &HeaderImage) -> Result<CryptDevice, LibcryptErr> {
    let mut context = CryptInit::init(&image.path())?;
    context.context_handle().load::<()>(None, None)?;
    Ok(context)
}
