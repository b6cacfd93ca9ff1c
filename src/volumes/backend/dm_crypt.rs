//! The dm-crypt backend: libcryptsetup activates, the device-mapper tells and removes.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use devicemapper::{DM, DevId, DeviceInfo, DmError, DmFlags, DmName, DmOptions, errors::Error as DmCoreError};
use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsPlain, CryptParamsPlainRef, LibcryptErr,
    consts::{flags::CryptActivate, vals::EncryptionFormat},
    get_sector_size,
};
use nix::{errno::Errno, libc};
use uuid::Uuid;
use zeroize::Zeroize;

use super::{
    Activate, Backend, BackendError, BackendKind, Deferred, Mapping, MappingStatus,
    once::{self, Occupied},
    online,
    userspace::{Paths, Userspace},
};
use crate::{
    base::{chain::chain, key::VolumeKey, mapping_name::MappingName},
    sys::{
        block::DeviceNumber,
        device::{Device, DeviceError, DeviceKind},
        kernel_files::KernelFile,
        stores::Footing,
        users,
    },
    volumes::{
        Unlocked,
        header::{CIPHER, Format, Header, Midway, Volume, VolumeError, library},
    },
};

/// libcryptsetup's mark on its mappings: `CRYPT-LUKS2-UUID-NAME`, the UUID without hyphens (lib/utils_dm.h, libdevmapper.c).
const DM_UUID_PREFIX: &str = "CRYPT-";

/// The kernel's dm-crypt.
pub struct DmCrypt {
    pub(super) dm: DM,
}

/// What the device-mapper knows of a mapping.
pub(super) struct Found {
    pub info: DeviceInfo,
    pub uuid: String,
}

impl DmCrypt {
    /// The backend, if this kernel has a device-mapper.
    pub fn open() -> Result<Self, BackendError> {
        // The node exists on every kernel that may load dm_mod; only using it tells.
        let usable = || DM::new().and_then(|dm| dm.version().map(|_| dm));
        match usable() {
            Ok(dm) => Ok(Self { dm }),
            Err(error) => {
                tracing::debug!("{error}");
                // The kernel has it, but the way to it is missing.
                let known = fs::read_to_string("/proc/misc").is_ok_and(|misc| misc.contains("device-mapper"));
                match KernelFile::MapperControl.require() {
                    Err(missing) if known => Err(DeviceError::from(missing).into()),
                    _ => Err(BackendError::Unavailable("this kernel has no device-mapper".to_owned())),
                }
            }
        }
    }

    pub(super) fn find(&self, name: &MappingName) -> Result<Option<Found>, BackendError> {
        self.look(dm_name(name)?)
    }

    /// What the device-mapper has by that name, whoever has made it.
    pub(super) fn look(&self, name: &DmName) -> Result<Option<Found>, BackendError> {
        match self.dm.device_info(&DevId::Name(name)) {
            Ok(info) => {
                let uuid = info.uuid().map(ToString::to_string).unwrap_or_default();
                Ok(Some(Found { info, uuid }))
            }
            Err(error) if errno(&error) == Some(Errno::ENXIO) => Ok(None),
            Err(error) => Err(BackendError::failed(format!("cannot look up the mapping '{name}'"))(error)),
        }
    }

    /// A mapping of libcryptsetup's.
    pub(super) fn find_ours(&self, name: &MappingName) -> Result<Option<Found>, BackendError> {
        let is_mapping = |uuid: &str| uuid.starts_with(DM_UUID_PREFIX) && !online::is_below(uuid);
        Ok(self.find(name)?.filter(|found| is_mapping(&found.uuid)))
    }

    /// All mappings of libcryptsetup's, by name.
    fn mappings(&self) -> Result<Vec<(MappingName, Found)>, BackendError> {
        let devices =
            self.dm.list_devices().map_err(BackendError::failed("cannot list the device-mapper's devices"))?;
        let mut mappings = Vec::new();
        for (name, ..) in devices {
            // A name that we would not write (spaces, slashes) is another program's.
            let Ok(name) = name.to_string().parse::<MappingName>() else { continue };
            if let Some(found) = self.find_ours(&name)? {
                mappings.push((name, found));
            }
        }
        mappings.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(mappings)
    }

    /// Whether the mapping is this volume's, on this device: idempotence goes by the UUID that libcryptsetup gave it.
    fn is_mapping_of(&self, found: &Found, volume: &Volume, name: &MappingName) -> Result<bool, BackendError> {
        let expected = match (volume.format(), volume.uuid()) {
            (Format::Luks1, Some(uuid)) => format!("CRYPT-LUKS1-{}-{name}", uuid.simple()),
            (Format::Luks2, Some(uuid)) => format!("CRYPT-LUKS2-{}-{name}", uuid.simple()),
            _ => format!("CRYPT-PLAIN-{name}"),
        };
        Ok(found.uuid == expected && self.lies_on(name, &volume.device)?)
    }

    pub(super) fn lies_on(&self, name: &MappingName, device: &Device) -> Result<bool, BackendError> {
        // While the volume's key is being rotated, something stands in between.
        let between = self.stack(name)?.map_or_else(Vec::new, |stack| stack.names);
        let mut below = Vec::new();
        for name in [name.as_str()].into_iter().chain(between.iter().map(String::as_str)) {
            let look = || self.dm.table_deps(&DevId::Name(DmName::new(name)?), DmOptions::default());
            below.extend(look().map_err(BackendError::failed(format!("cannot find the device below '{name}'")))?);
        }
        Ok(below.iter().any(|dependency| match device.kind {
            DeviceKind::Block(number) => libc::makedev(dependency.major, dependency.minor) == number,
            DeviceKind::File => loop_backs(dependency.major, dependency.minor, &device.path),
        }))
    }

    /// Size of a key in the kernel keyring. A header without keyslots does not tell it, so libcryptsetup does not know; the
    /// table says `:BYTES:TYPE:DESCRIPTION` in the key's place (kernel: device-mapper/dm-crypt.rst).
    fn keyring_key_bits(&self, name: &MappingName) -> Option<u32> {
        let options = DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE);
        let (_, mut table) = self.dm.table_status(&DevId::Name(dm_name(name).ok()?), options).ok()?;
        let parameters = &mut table.first_mut()?.3;
        let bytes = parameters.split(' ').nth(1).and_then(|key| key.strip_prefix(':')?.split(':').next()?.parse().ok());
        parameters.zeroize();
        bytes.map(|bytes: u32| bytes * 8)
    }

    /// Nothing is below the mapping but its device.
    fn require_alone(&self, name: &MappingName, found: &Found) -> Result<(), BackendError> {
        match self.stack(name)? {
            Some(_) if volume_uuid(&found.uuid).is_some_and(online::is_running) => {
                Err(BackendError::BeingRotated(name.clone()))
            }
            Some(stack) => Err(BackendError::LeftOver { name: name.clone(), hangs: stack.hangs() }),
            None => Ok(()),
        }
    }

    fn foreign(&self, name: &MappingName, found: &Found) -> BackendError {
        let by = match found.uuid.as_str() {
            "" => "a device-mapper device without UUID".to_owned(),
            uuid => format!("the device-mapper device {uuid}"),
        };
        BackendError::Foreign { name: name.clone(), by }
    }
}

impl Backend for DmCrypt {
    fn active(&self, volume: &Volume, options: &Activate) -> Result<Option<Mapping>, BackendError> {
        let name = &options.name;
        let Some(found) = self.find(name)? else {
            return once::require_free(&[self, &Userspace::default()], &volume.device, Some(name)).map(|()| None);
        };
        if !self.is_mapping_of(&found, volume, name)? {
            return Err(self.foreign(name, &found));
        }
        let foreign = |by: &str| Err(BackendError::Foreign { name: name.clone(), by: by.to_owned() });
        match (found.info.flags().contains(DmFlags::DM_READONLY), options.read_only) {
            (true, false) => foreign("the same volume is attached under it, but read-only"),
            (false, true) => foreign("the same volume is attached under it, but for writing"),
            _ => Ok(Some(mapping(name, true))),
        }
    }

    fn activate(&self, unlocked: &Unlocked, options: &Activate) -> Result<Mapping, BackendError> {
        let volume = unlocked.volume();
        let (device, midway) = (&volume.device.path, volume.midway()?);
        let failed = |source: library::LibraryError| match source.errno() {
            // libcryptsetup compares the key with the digest.
            Some(libc::EPERM) => VolumeError::WrongKey { path: device.clone() }.into(),
            Some(libc::EBUSY) => {
                BackendError::Device(DeviceError::Busy { path: device.clone(), holders: users::of_path(device) })
            }
            Some(libc::ENODEV | libc::ENXIO | libc::ENOENT) if !device.exists() => {
                BackendError::Device(DeviceError::Missing(device.clone()))
            }
            _ => BackendError::failed(format!("cannot map {} as '{}'", device.display(), options.name))(source),
        };
        let userspace = Userspace::default();
        let _claim = once::claim(&Paths::default(), &[self, &userspace], &volume.device, &options.name)?;
        volume.device.require_unused_beside()?;
        let opened = Opened::again(&volume.device)?;
        activate(unlocked, &opened, options)?.map_err(failed)?;
        // The kernel's own word: libcryptsetup was given a path and not the open device. Nobody else can write to that now; a
        // rotation of its key may have gone on since its header was read.
        let judge = || match self.lies_on(&options.name, &volume.device)? {
            false => Err(DeviceError::Replaced(device.clone()).into()),
            true if Midway::of(&opened.0, volume.uuid()).map_err(DeviceError::io("read", device))? != midway => {
                Err(VolumeError::HeaderChanged { path: device.clone() }.into())
            }
            true => Ok(mapping(&options.name, false)),
        };
        judge().or_else(|error| self.deactivate(&options.name, Deferred::No).and(Err(error)))
    }

    fn resize(&self, name: &MappingName, unlocked: &Unlocked) -> Result<u64, BackendError> {
        let (volume, key) = (unlocked.volume(), unlocked.key());
        let found = self.find(name)?.ok_or_else(|| BackendError::NotActive(name.clone()))?;
        if !self.is_mapping_of(&found, volume, name)? {
            return Err(self.foreign(name, &found));
        }
        self.require_alone(name, &found)?;
        let action = format!("cannot resize the mapping '{name}'");
        let failed = |source: library::LibraryError| BackendError::failed(action.as_str())(source);
        let (has, room) = (library::call(|| table(name)).map_err(failed)?.size_bytes, volume.geometry.size_bytes);
        if room < has {
            let why = format!("its device has become smaller: it has room for {room} bytes; the mapping has {has}");
            return Err(BackendError::failed(action)(why));
        }
        let opened = Opened::again(&volume.device)?;
        let mut context = context(volume, key, &opened).map_err(failed)?;
        library::call(|| {
            if volume.format() == Format::Luks2 {
                // Without a name: the key goes into the keyring, from where the new table takes it.
                context.context_handle().volume_key_keyring(true)?;
                let flags = CryptActivate::KEYRING_KEY;
                context.activate_handle().activate_by_volume_key(None, Some(key.expose()), flags)?;
            }
            context.context_handle().resize(name.as_str(), 0)
        })
        .map_err(failed)?;
        Ok(library::call(|| table(name)).map_err(failed)?.size_bytes)
    }

    fn deactivate(&self, name: &MappingName, deferred: Deferred) -> Result<(), BackendError> {
        let (found, stack) = (self.find(name)?, self.stack(name)?);
        match (found, stack) {
            (None, None) => return Err(BackendError::NotActive(name.clone())),
            (Some(found), _) if !found.uuid.starts_with(DM_UUID_PREFIX) => return Err(self.foreign(name, &found)),
            (Some(found), _) if volume_uuid(&found.uuid).is_some_and(online::is_running) => {
                return Err(BackendError::BeingRotated(name.clone()));
            }
            (_, Some(stack)) => return self.remove_left_over(name, &stack),
            (Some(_), None) => {}
        }
        let flags = match deferred {
            Deferred::Yes => DmFlags::DM_DEFERRED_REMOVE,
            Deferred::No => DmFlags::empty(),
        };
        // The crate tries again for a while when the device is busy: udev looks at new devices at odd times.
        match self.dm.device_remove(&DevId::Name(dm_name(name)?), DmOptions::default().set_flags(flags)) {
            Ok(_) => Ok(()),
            Err(error) if errno(&error) == Some(Errno::EBUSY) => {
                Err(BackendError::Busy { name: name.clone(), holders: users::of_path(&device_path(name)) })
            }
            Err(error) => Err(BackendError::failed(format!("cannot remove the mapping '{name}'"))(error)),
        }
    }

    fn status(&self, name: &MappingName) -> Result<Option<MappingStatus>, BackendError> {
        let Some(found) = self.find_ours(name)? else { return Ok(None) };
        // Not the table itself: it shows the key of a LUKS1 or plain mapping, which libcryptsetup knows to keep off.
        let stack = self.stack(name)?;
        let mut table = match &stack {
            // libcryptsetup reads a sector of each device, which may wait there for ever.
            Some(stack) => self.table_below(name, stack)?,
            None => library::call(|| table(name))
                .map_err(BackendError::failed(format!("cannot read the mapping '{name}'")))?,
        };
        if table.key_size_bits == 0 {
            table.key_size_bits = self.keyring_key_bits(name).unwrap_or(0);
        }
        let device = device_path(name);
        let volume = volume_uuid(&found.uuid);
        let left_over = stack.filter(|_| !volume.is_some_and(online::is_running));
        let trouble = match left_over {
            Some(stack) => Some(chain(&BackendError::LeftOver { name: name.clone(), hangs: stack.hangs() })),
            None => (found.info.flags().contains(DmFlags::DM_DEFERRED_REMOVE))
                .then(|| "it will be removed when its last user closes it".to_owned()),
        };
        Ok(Some(MappingStatus {
            name: name.clone(),
            backend: BackendKind::DmCrypt,
            holders: users::of_path(&device),
            device,
            export: None,
            source: table.source,
            volume,
            cipher: table.cipher,
            key_size_bits: table.key_size_bits,
            sector_size_bytes: table.sector_size_bytes,
            size_bytes: table.size_bytes,
            read_only: found.info.flags().contains(DmFlags::DM_READONLY),
            trouble,
        }))
    }

    fn fail_hanging(&self, name: &MappingName) -> Result<(), BackendError> {
        let Some(stack) = self.stack(name)? else { return Ok(()) };
        if self.find(name)?.is_some_and(|found| volume_uuid(&found.uuid).is_some_and(online::is_running)) {
            return Err(BackendError::BeingRotated(name.clone()));
        }
        DmCrypt::fail_hanging(self, &stack)
    }

    fn device(&self, name: &MappingName) -> Result<Option<PathBuf>, BackendError> {
        Ok(self.find_ours(name)?.map(|_| device_path(name)))
    }

    fn list(&self) -> Result<Vec<MappingName>, BackendError> {
        Ok(self.mappings()?.into_iter().map(|(name, _)| name).collect())
    }

    fn occupied(&self) -> Result<Vec<Occupied>, BackendError> {
        let below = |info: &DeviceInfo| Footing::below(DeviceNumber(u64::from(info.device())));
        let occupied = |(name, found): (_, Found)| Occupied { name, footing: below(&found.info) };
        Ok(self.mappings()?.into_iter().map(occupied).collect())
    }
}

/// Persistent flags in the header are ignored: the header is not trusted, discards least of all.
fn flags(options: &Activate) -> CryptActivate {
    let chosen = [
        (options.read_only, CryptActivate::READONLY),
        (options.allow_discards, CryptActivate::ALLOW_DISCARDS),
        (options.no_read_workqueue, CryptActivate::NO_READ_WORKQUEUE),
        (options.no_write_workqueue, CryptActivate::NO_WRITE_WORKQUEUE),
    ];
    chosen
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(CryptActivate::IGNORE_PERSISTENT, |flags, (_, flag)| flags | flag)
}

/// The device that was judged, held open: libcryptsetup and the kernel find it by its descriptor and so put this very one
/// into the table, whatever its path leads to by now.
struct Opened(File);

impl Opened {
    fn again(device: &Device) -> Result<Self, DeviceError> {
        device.reopen().map(Self)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// Has libcryptsetup make the mapping: by the volume key, or where there are two by the passphrase of their keyslots, for it
/// takes no two keys. It makes one table of both parts, and names the keys in it as its own re-encryption expects.
fn activate(
    unlocked: &Unlocked,
    opened: &Opened,
    options: &Activate,
) -> Result<Result<(), library::LibraryError>, VolumeError> {
    let (volume, key, name) = (unlocked.volume(), unlocked.key(), Some(options.name.as_str()));
    let Some((rest, (_, passphrase))) = volume.rest.as_ref().zip(unlocked.rest()) else {
        return Ok(context(volume, key, opened).and_then(|mut context| {
            library::call(|| {
                context.context_handle().volume_key_keyring(true)?;
                context.activate_handle().activate_by_volume_key(name, Some(key.expose()), flags(options))
            })
        }));
    };
    let (_image, mut context) = rest.load(&opened.path())?;
    Ok(library::call(|| {
        context.context_handle().volume_key_keyring(true)?;
        context.activate_handle().activate_by_passphrase(name, None, passphrase.expose(), flags(options)).map(drop)
    }))
}

fn context(volume: &Volume, key: &VolumeKey, opened: &Opened) -> Result<CryptDevice, library::LibraryError> {
    match &volume.header {
        Header::Luks(header) => header.load(&opened.path()),
        Header::Plain(_) => library::call(|| plain_context(volume, key, opened)),
    }
}

fn plain_context(volume: &Volume, key: &VolumeKey, opened: &Opened) -> Result<CryptDevice, LibcryptErr> {
    let geometry = &volume.geometry;
    let mut context = CryptInit::init(&opened.path())?;
    let parameters = CryptParamsPlain {
        hash: "plain".to_owned(),
        offset: geometry.data_offset_bytes / 512,
        sector_size: geometry.sector_size.bytes(),
        size: geometry.size_bytes / 512,
        skip: geometry.iv_offset_sectors,
    };
    let mut parameters: CryptParamsPlainRef<'_> = (&parameters).try_into()?;
    let (cipher, mode) = CIPHER.split_once('-').ok_or(LibcryptErr::InvalidConversion)?;
    context.context_handle().format(
        EncryptionFormat::Plain,
        (cipher, mode),
        None,
        either::Either::Right(key.size().bytes()),
        Some(&mut parameters),
    )?;
    Ok(context)
}

#[derive(Default)]
pub(super) struct Table {
    pub(super) source: PathBuf,
    pub(super) cipher: String,
    pub(super) key_size_bits: u32,
    pub(super) sector_size_bytes: u32,
    pub(super) size_bytes: u64,
}

fn table(name: &MappingName) -> Result<Table, LibcryptErr> {
    let mut context = CryptInit::init_by_name_and_header(name.as_str(), None)?;
    let active = context.runtime_handle(name.as_str()).get_active_device()?;
    let mut status = context.status_handle();
    Ok(Table {
        source: status.get_device_path()?.to_owned(),
        cipher: format!("{}-{}", status.get_cipher()?, status.get_cipher_mode()?),
        key_size_bits: u32::try_from(status.get_volume_key_size()).unwrap_or(0) * 8,
        size_bytes: active.size * 512,
        sector_size_bytes: u32::try_from(get_sector_size(Some(&mut context))).unwrap_or(512),
    })
}

fn mapping(name: &MappingName, already_active: bool) -> Mapping {
    Mapping { name: name.clone(), device: device_path(name), uri: None, backend: BackendKind::DmCrypt, already_active }
}

fn device_path(name: &MappingName) -> PathBuf {
    Path::new("/dev/mapper").join(name.as_str())
}

fn dm_name(name: &MappingName) -> Result<&DmName, BackendError> {
    DmName::new(name.as_str()).map_err(BackendError::failed(format!("cannot use the name '{name}'")))
}

fn errno(error: &DmError) -> Option<Errno> {
    match error {
        DmError::Core(DmCoreError::Ioctl(.., errno)) => Some(**errno),
        _ => None,
    }
}

/// The volume's UUID in libcryptsetup's `CRYPT-LUKS2-UUID-NAME`.
fn volume_uuid(dm_uuid: &str) -> Option<Uuid> {
    Uuid::try_parse(dm_uuid.strip_prefix(DM_UUID_PREFIX)?.split('-').nth(1)?).ok()
}

/// Whether the loop device with this number stands for `file`, as libcryptsetup makes one for a volume in a file.
fn loop_backs(major: u32, minor: u32, file: &Path) -> bool {
    let backing = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file"));
    let same = |backing: &str| {
        let (backing, file) = (std::fs::metadata(backing.trim_end())?, std::fs::metadata(file)?);
        std::io::Result::Ok((backing.dev(), backing.ino()) == (file.dev(), file.ino()))
    };
    backing.is_ok_and(|backing| same(&backing).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_uuid_that_libcryptsetup_gives_its_mappings() {
        let uuid = volume_uuid("CRYPT-LUKS2-0123456789abcdef0123456789abcdef-my-name").unwrap();
        assert_eq!(uuid.simple().to_string(), "0123456789abcdef0123456789abcdef");
        assert_eq!(volume_uuid("CRYPT-PLAIN-name"), None);
        assert_eq!(volume_uuid("LVM-0123"), None);
    }
}
