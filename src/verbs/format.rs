//! Format: make a new volume. Its key is sealed, stored, read back and opened before its header is written.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    base::key::{KeyReference, KeySize, SecretBytes, StoreName, VolumeKey},
    config::Config,
    sys::{
        device::{Device, DeviceError, DeviceKind},
        durable::folder_of,
    },
    unlock::{
        case::{self, Case, Circumstances, Strictness},
        container::{Container, Use},
        loops,
    },
    verbs::error::Error,
    volumes::{
        backend,
        header::{self, HEADER_BYTES, NewHeader, SectorSize, Volume, blank},
    },
};

/// What to format, and how.
pub struct Request<'a> {
    pub device: &'a Path,
    /// The store for the key; the configuration's default unless given.
    pub store: Option<StoreName>,
    /// Make one keyslot, so that programs that know passphrases only can open the volume.
    pub keyslot: bool,
    /// Put the header into this file.
    pub header: Option<&'a Path>,
    /// Size of the volume key.
    pub key_size: KeySize,
    /// Encryption sector size; 4096 bytes where the device's size allows, unless given.
    pub sector_size: Option<SectorSize>,
    /// Overwrite what is there.
    pub force: bool,
    /// How strict to be about separation.
    pub separation: Strictness,
}

/// A new volume.
#[derive(Debug)]
pub struct Formatted {
    /// The volume, as read back from the device.
    pub volume: Volume,
    pub reference: KeyReference,
}

/// Makes a new volume.
pub fn format(config: &Config, request: &Request<'_>) -> Result<Formatted, Error> {
    let ground = Ground::claim(request)?;
    let store_name = config.store_or_default(request.store.as_ref())?;
    let container = Arc::new(Container::open(config, &store_name, None, Use::Keys)?);
    let reference = container.new_reference()?;

    let prepare = || -> Result<_, Error> {
        let key = VolumeKey::random(request.key_size)?;
        let passphrase = request.keyslot.then(case::random_passphrase).transpose()?;
        let volume = plan(request, &ground.device, &reference, &key, passphrase.as_ref())?;
        let case = Case::of_new_key(config, volume, reference.clone(), container.clone());
        let proven = case.prove(Circumstances { strictness: request.separation, ..Circumstances::default() })?;
        loops::check(config, &store_name, &proven.report().key_places())?;
        Ok((key, passphrase, proven))
    };
    let (key, passphrase, proven) = prepare().inspect_err(|_| container.store().abandon(&reference.key))?;

    proven.store_key(key, passphrase)?;
    // From the store once more: what opens the volume is what the store has, not what this process remembers.
    let written = ground.write(proven.volume()).and_then(|()| Ok(proven.verify_written()?));
    let proven = written.map_err(|source| Error::HalfFormatted {
        device: request.device.to_owned(),
        reference: reference.clone(),
        source: Box::new(source),
    })?;
    proven.record("format");
    let volume = proven.volume().clone();
    Ok(Formatted { volume, reference })
}

/// The header in memory, judged as if a stranger had made it.
pub fn plan(
    request: &Request<'_>,
    device: &Device,
    reference: &KeyReference,
    key: &VolumeKey,
    passphrase: Option<&SecretBytes>,
) -> Result<Volume, Error> {
    let fits_4096 = device.size_bytes.is_multiple_of(4096);
    let sector_size = request.sector_size.unwrap_or(if fits_4096 { SectorSize::B4096 } else { SectorSize::B512 });
    let header = NewHeader {
        uuid: Uuid::new_v4(),
        key,
        sector_size,
        reference,
        keyslot: passphrase,
        detached: request.header.is_some(),
    };
    let image = header.make(device)?;
    Ok(header::probe_image(device, request.header, &image)?)
}

/// A device that was found blank (or is to be overwritten), held exclusively so that it stays so.
pub struct Ground {
    pub device: Device,
    /// It, open.
    pub data: File,
    header: Option<File>,
    force: bool,
}

impl Ground {
    /// Finds nothing on the device, unless it is to be overwritten, and holds it.
    pub fn claim(request: &Request<'_>) -> Result<Self, Error> {
        let device = Device::look(request.device)?;
        let needed_bytes =
            u64::from(SectorSize::B4096.bytes()) + if request.header.is_some() { 0 } else { HEADER_BYTES };
        if device.size_bytes < needed_bytes {
            let (path, size_bytes) = (device.path, device.size_bytes);
            return Err(DeviceError::TooSmall { path, size_bytes, needed_bytes }.into());
        }
        backend::require_free(&device)?;
        let data = device.open_exclusive()?;
        let ground = Self { device, data, header: None, force: request.force };
        ground.check_blank()?;
        let header = request.header.map(|path| claim_header(path, request.force)).transpose()?;
        Ok(Self { header, ..ground })
    }

    /// Makes sure that the device is blank, unless what is there may be overwritten.
    pub fn check_blank(&self) -> Result<(), Error> {
        if self.force { Ok(()) } else { check_blank(&self.device, &self.data) }
    }

    /// Writes the volume's header.
    pub fn write(&self, volume: &Volume) -> Result<(), Error> {
        if self.force {
            self.erase_signatures().map_err(DeviceError::io("erase old signatures on", &self.device.path))?;
        }
        let Some(luks) = volume.luks() else { return Ok(()) };
        let (target, path) = match (&self.header, &luks.detached) {
            (Some(header), Some(path)) => (header, path),
            _ => (&self.data, &self.device.path),
        };
        Ok(luks.image.write_to(target, HEADER_BYTES).map_err(DeviceError::io("write the header of", path))?)
    }

    /// Old signatures that the header does not cover: file systems' and GPT's at the start, and at the end GPT's
    /// second copy, RAID members', ZFS labels.
    fn erase_signatures(&self) -> std::io::Result<()> {
        const REACH: u64 = 1 << 20;
        let zeroes = vec![0; REACH.min(self.device.size_bytes) as usize];
        self.data.write_all_at(&zeroes, 0)?;
        self.data.write_all_at(&zeroes, self.device.size_bytes - zeroes.len() as u64)?;
        self.data.sync_all()
    }
}

fn check_blank(device: &Device, open: &File) -> Result<(), Error> {
    match blank::find(&device.path, open, device.size_bytes)? {
        None => Ok(()),
        Some(found) => Err(Error::NotBlank { path: device.path.clone(), found }),
    }
}

/// The place of a detached header, held as the data is: neither that itself nor what is mapped. A file that is there already
/// is looked at before it is made longer.
fn claim_header(path: &Path, force: bool) -> Result<File, Error> {
    let device = match Device::look(path) {
        Err(DeviceError::Missing(_)) => return Ok(new_header_file(path).map_err(DeviceError::io("make", path))?),
        device => device?,
    };
    if device.kind != DeviceKind::File && device.size_bytes < HEADER_BYTES {
        let (path, size_bytes) = (device.path, device.size_bytes);
        return Err(DeviceError::TooSmall { path, size_bytes, needed_bytes: HEADER_BYTES }.into());
    }
    backend::require_free(&device)?;
    let file = device.open_exclusive()?;
    if !force && device.size_bytes > 0 {
        check_blank(&device, &file)?;
    }
    let is_file = device.kind == DeviceKind::File;
    if is_file && device.size_bytes < HEADER_BYTES {
        file.set_len(HEADER_BYTES).map_err(DeviceError::io("make room in", path))?;
    }
    Ok(file)
}

fn new_header_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(HEADER_BYTES)?;
    // Its name has to survive a power cut as well (fsync(2)).
    File::open(folder_of(path))?.sync_all()?;
    Ok(file)
}
