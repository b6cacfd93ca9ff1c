//! The key of a volume is rotated while dm-crypt has it: what libcryptsetup puts below the mapping meanwhile, what a killed run
//! leaves of that, and where it must not be begun.
//!
//! While it runs, NAME is linear upon NAME-overlay, which has both keys; the stretch that is being written is below that, in
//! NAME-hotzone-forward, and suspended (lib/luks2/luks2_reencrypt.c, reencrypt_init_device_stack). A run that is killed leaves
//! all three, perhaps suspended: whoever reads or writes there waits, and so would a run that goes on.

use devicemapper::{DevId, DmFlags, DmName, DmOptions};
use nix::libc;
use uuid::Uuid;
use zeroize::Zeroize;

use super::{
    BackendError,
    dm_crypt::{DmCrypt, Table},
};
use crate::{
    base::mapping_name::MappingName,
    sys::{
        block::{BlockDevice, DeviceNumber},
        device::{Device, DeviceKind},
        lock,
        sysfs::Sysfs,
    },
    volumes::header::library,
};

/// libcryptsetup's marks on what it puts below a mapping for a while (lib/utils_dm.h).
const BELOW: [&str; 2] = ["CRYPT-SUBDEV-", "CRYPT-TEMP-"];
/// What stands for the stretch that is being written, behind the mapping's name.
const HOTZONE: &str = "hotzone-forward";
/// libcryptsetup's locks.
pub const LOCKS: &str = "/run/cryptsetup";

/// What a killed run has left below a mapping, or a run that is at work has put there.
pub struct Stack {
    /// NAME-overlay, then NAME-hotzone-forward, as far as they are there.
    pub(super) names: Vec<String>,
    /// That of the hotzone, if it is suspended, and its size in sectors: what is asked of it waits.
    suspended: Option<(String, u64)>,
}

impl Stack {
    /// Whether I/O waits for who will not come.
    pub fn hangs(&self) -> bool {
        self.suspended.is_some()
    }
}

/// Whether a device of this UUID is one below a mapping, and none itself.
pub(super) fn is_below(uuid: &str) -> bool {
    BELOW.iter().any(|mark| uuid.starts_with(mark))
}

/// Whether a process re-encrypts the volume now, be it ours or cryptsetup: libcryptsetup holds a lock meanwhile.
pub fn is_running(volume: Uuid) -> bool {
    lock::is_held(format!("{LOCKS}/LN_LUKS2-reencryption-{volume}").as_ref())
}

impl DmCrypt {
    /// What stands below a mapping for a rotation's sake.
    pub fn stack(&self, name: &MappingName) -> Result<Option<Stack>, BackendError> {
        let mut stack = Stack { names: Vec::new(), suspended: None };
        for part in ["overlay", HOTZONE].map(|part| format!("{name}-{part}")) {
            // A name that the device-mapper does not take is none of its devices.
            let Ok(id) = DmName::new(&part) else { continue };
            let Some(found) = self.look(id)? else { continue };
            if !is_below(&found.uuid) {
                continue;
            }
            if found.info.flags().contains(DmFlags::DM_SUSPEND) {
                let sectors = self.table(&part)?.iter().map(|target| target.1).sum();
                stack.suspended = Some((part.clone(), sectors));
            }
            stack.names.push(part);
        }
        Ok(Some(stack).filter(|stack| !stack.names.is_empty()))
    }

    /// Whether the key of the volume that is attached as `name` can be rotated now; why not, if not.
    pub(super) fn check_online(&self, device: &Device, name: &MappingName, volume: Uuid) -> Result<(), BackendError> {
        if is_running(volume) {
            return Err(BackendError::BeingRotated(name.clone()));
        }
        if let Some(stack) = self.stack(name)? {
            return Err(BackendError::LeftOver { name: name.clone(), hangs: stack.hangs() });
        }
        let refused = |why: &str| {
            let (device, name, why) = (device.path.clone(), name.clone(), why.to_owned());
            Err(BackendError::NotOnline { device, name, why })
        };
        let DeviceKind::Block(number) = device.kind else {
            return refused("it is a file, and not the loop device that is attached");
        };
        let Some(found) = self.find(name)? else { return Err(BackendError::NotActive(name.clone())) };
        if found.uuid != format!("CRYPT-LUKS2-{}-{name}", volume.simple()) || !self.lies_on(name, device)? {
            return refused("the mapping is not of this volume on this device");
        }
        let flags = found.info.flags();
        if flags.contains(DmFlags::DM_READONLY) || device.read_only {
            return refused("the mapping is read-only");
        }
        if flags.contains(DmFlags::DM_DEFERRED_REMOVE) {
            return refused("the mapping will be removed when its last user closes it");
        }
        if flags.contains(DmFlags::DM_SUSPEND) {
            return refused("the mapping is suspended");
        }
        let mut table = self.table(name.as_str())?;
        let why = unlike_ours(&table);
        table.iter_mut().for_each(|target| target.3.zeroize());
        match why.or_else(|| self.unfit(DeviceNumber(number))).or_else(|| unfit_version(library::version(&device.path)))
        {
            Some(why) => refused(&why),
            None => Ok(()),
        }
    }

    /// Why libcryptsetup cannot rewrite the device below a mapping.
    fn unfit(&self, number: DeviceNumber) -> Option<String> {
        let sysfs = Sysfs::this();
        let device = BlockDevice::with_number(&sysfs, number)?;
        let disk = device.parent_disk().and_then(|disk| BlockDevice::with_number(&sysfs, disk));
        let disk = disk.as_ref().unwrap_or(&device);
        let is_zoned = disk.attribute("queue/zoned").is_some_and(|zoned| zoned != "none");
        let is_dax = disk.attribute("queue/dax").is_some_and(|dax| dax == "1");
        let below = device.attribute("dm/name").and_then(|name| self.table(&name).ok()).unwrap_or_default();
        let why = match () {
            () if is_zoned => "the device is zoned",
            () if is_dax => "the device is memory that is used directly (DAX)",
            () if below.iter().any(|target| target.2 == "integrity") => "the device is one of dm-integrity",
            () => return None,
        };
        Some(why.to_owned())
    }

    /// The targets of a device of the device-mapper. They may show a key.
    fn table(&self, name: &str) -> Result<Vec<Target>, BackendError> {
        let read = || {
            let id = DevId::Name(DmName::new(name)?);
            self.dm.table_status(&id, DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE))
        };
        Ok(read().map_err(BackendError::failed(format!("cannot read the table of '{name}'")))?.1)
    }

    /// What is known of a mapping that has a rotation's devices below it, by the table of the lower one that encrypts.
    pub(super) fn table_below(&self, name: &MappingName, stack: &Stack) -> Result<Table, BackendError> {
        let size_bytes = self.table(name.as_str())?.iter().map(|target| target.1 * 512).sum();
        let hotzone = DmName::new(&format!("{name}-{HOTZONE}")).ok().map(|id| self.look(id)).transpose()?.flatten();
        let hotzone = hotzone.map(|found| DeviceNumber(found.info.device().into()));
        let mut targets = stack.names.first().map(|overlay| self.table(overlay)).transpose()?.unwrap_or_default();
        // The parts beside the stretch stand on the device itself.
        let described = targets.iter().find_map(|target| {
            let table = described(&target.3).filter(|_| target.2 == "crypt")?;
            Some(table).filter(|(_, number)| Some(*number) != hotzone)
        });
        targets.iter_mut().for_each(|target| target.3.zeroize());
        let Some((table, number)) = described else { return Ok(Table { size_bytes, ..Table::default() }) };
        let source = BlockDevice::with_number(&Sysfs::this(), number).map(|device| device.node()).unwrap_or_default();
        Ok(Table { source, size_bytes, ..table })
    }

    /// Has what waits for a killed run fail: users of the mapping get I/O errors, and can close it.
    pub(super) fn fail_hanging(&self, stack: &Stack) -> Result<(), BackendError> {
        let Some((name, sectors)) = &stack.suspended else { return Ok(()) };
        let fail = || {
            let id = DevId::Name(DmName::new(name)?);
            self.dm.table_load(&id, &[(0, *sectors, "error".to_owned(), String::new())], DmOptions::default())?;
            // Resumes it. Nothing of what waits is flushed to where it was meant for.
            self.dm.device_suspend(&id, DmOptions::default().set_flags(DmFlags::DM_NOFLUSH | DmFlags::DM_SKIP_LOCKFS))
        };
        fail().map(drop).map_err(BackendError::failed(format!("cannot have the I/O on '{name}' fail")))
    }

    /// Removes a mapping that nobody uses, and what a killed run has left below it.
    pub(super) fn remove_left_over(&self, name: &MappingName, stack: &Stack) -> Result<(), BackendError> {
        let users = self.find(name)?.map(|found| found.info.open_count());
        if users.is_some_and(|users| users > 0) {
            return Err(BackendError::LeftOver { name: name.clone(), hangs: stack.hangs() });
        }
        self.fail_hanging(stack)?;
        let mapping = users.map(|_| name.to_string());
        for part in mapping.iter().chain(&stack.names) {
            let remove = || self.dm.device_remove(&DevId::Name(DmName::new(part)?), DmOptions::default());
            remove().map_err(BackendError::failed(format!("cannot remove '{part}'")))?;
        }
        Ok(())
    }
}

/// `CIPHER :BYTES:logon:NAME IV MAJOR:MINOR START [COUNT OPTION...]`
fn described(parameters: &str) -> Option<(Table, DeviceNumber)> {
    let words: Vec<_> = parameters.split(' ').collect();
    let [cipher, key, _, number, _, options @ ..] = &words[..] else { return None };
    let key_bytes: u32 = key.strip_prefix(':')?.split(':').next()?.parse().ok()?;
    let (major, minor) = number.split_once(':')?;
    let number = DeviceNumber(libc::makedev(major.parse().ok()?, minor.parse().ok()?));
    let sector = options.iter().find_map(|option| option.strip_prefix("sector_size:")?.parse().ok());
    let table = Table {
        cipher: (*cipher).to_owned(),
        key_size_bits: key_bytes * 8,
        sector_size_bytes: sector.unwrap_or(512),
        ..Table::default()
    };
    Some((table, number))
}

/// Start and length in sectors, type, parameters.
type Target = (u64, u64, String, String);

/// Why a mapping is none that libcryptsetup may take apart.
fn unlike_ours(table: &[Target]) -> Option<String> {
    let is_plain =
        |target: &Target| target.2 == "crypt" && !target.3.split(' ').any(|word| word.starts_with("integrity:"));
    (table.is_empty() || !table.iter().all(is_plain)).then(|| "the mapping is more than a plain dm-crypt".to_owned())
}

/// Why this libcryptsetup is not used for it: in 2.7.0 to 2.7.4 it corrupts data (release notes of 2.7.5). Nothing is wrong with
/// those while the volume is detached.
fn unfit_version(version: Option<&str>) -> Option<String> {
    let Some(version) = version else { return Some("libcryptsetup does not say its version".to_owned()) };
    let mut numbers = version.split(['.', '-']).map(|number| number.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten(), numbers.next().flatten()) {
        (Some(2), Some(7), patch) if patch.is_none_or(|patch| patch < 5) => {
            Some(format!("libcryptsetup {version} can corrupt data then; 2.7.5 does not"))
        }
        (Some(_), Some(_), _) => None,
        _ => Some(format!("libcryptsetup has a version that nobody knows: '{version}'")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_that_corrupt_data_are_refused() {
        for version in ["2.7.0", "2.7.1", "2.7.4", "2.7.0-rc1", "2.7", "x", ""] {
            assert!(unfit_version(Some(version)).is_some(), "{version}");
        }
        for version in ["2.6.1", "2.7.5", "2.7.12", "2.8.0", "3.0.0", "2.8.0-rc0"] {
            assert_eq!(unfit_version(Some(version)), None);
        }
        assert!(unfit_version(None).is_some());
    }

    #[test]
    fn a_table_is_described_without_its_key() {
        let (table, number) =
            described("aes-xts-plain64 :64:logon:cryptsetup:x-d0 1024 254:48 33792 2 allow_discards sector_size:4096")
                .unwrap();
        assert_eq!(number, DeviceNumber(libc::makedev(254, 48)));
        assert_eq!(
            (table.cipher.as_str(), table.key_size_bits, table.sector_size_bytes),
            ("aes-xts-plain64", 512, 4096)
        );
        assert_eq!(described("aes-xts-plain64 :32:logon:x 0 7:1 0").unwrap().0.sector_size_bytes, 512);
        assert!(["", "254:16 0", "aes-xts-plain64 00ff 0 7:1 0"].iter().all(|other| described(other).is_none()));
    }

    #[test]
    fn a_mapping_that_is_more_than_dm_crypt_is_refused() {
        let target = |kind: &str, parameters: &str| (0, 8, kind.to_owned(), parameters.to_owned());
        let ours = target("crypt", "aes-xts-plain64 :64:logon:cryptsetup:x-d0 0 254:16 32768 1 sector_size:4096");
        assert_eq!(unlike_ours(std::slice::from_ref(&ours)), None);
        assert_eq!(unlike_ours(&[ours.clone(), ours.clone()]), None, "two keys");
        for other in [
            target("linear", "253:1 0"),
            target("crypt", "aes-xts-plain64 :64:logon:x 0 253:1 0 2 integrity:28:aead sector_size:4096"),
        ] {
            assert!(unlike_ours(&[ours.clone(), other]).is_some());
        }
        assert!(unlike_ours(&[]).is_some());
    }
}
