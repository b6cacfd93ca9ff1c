//! Copies of LUKS2 headers: made, and restored where they bring no old key back.

use std::path::Path;

use uuid::Uuid;

use super::{error::Error, rotate};
use crate::{
    base::key::KeyReference,
    config::{Config, crypttab},
    sys::{
        device::{Device, DeviceError, by_uuid},
        durable,
    },
    unlock::{
        self,
        audit::{self, Event},
        case::{Asked, Case, Circumstances, Proven, Strictness},
        container::{Container, Use},
    },
    volumes::{
        backend,
        header::{
            self, Volume, VolumeError,
            backup::{Differs, HeaderBackup, HeaderBackupError, take},
            copies::Copies,
            rekey, wipe,
        },
    },
};

/// A header in a file.
#[derive(Debug, serde::Serialize)]
pub struct Saved {
    pub volume: Uuid,
    /// Where the volume's key is, as the header says.
    pub key: Option<KeyReference>,
    pub bytes: usize,
}

/// A header that was restored.
#[derive(Debug, serde::Serialize)]
pub struct Restored {
    pub volume: Uuid,
    pub key: KeyReference,
    /// It was not as in the backup.
    pub written: bool,
    /// What is as it was then.
    pub changed: Vec<String>,
}

/// How to restore.
pub struct Request<'a> {
    pub device: &'a Path,
    pub file: &'a Path,
    /// Also if that changes keyslots or tokens back.
    pub older: bool,
    /// Also where nothing is left of the header.
    pub lost: bool,
    /// Where the volume's key is now, if the backup is from before it was moved.
    pub key: Option<&'a KeyReference>,
    pub separation: Strictness,
}

/// Writes a device's header into a new file.
pub fn back_up(config: &Config, device: &Path, file: &Path) -> Result<Saved, Error> {
    let device = Device::look(device)?;
    let bytes = take(&device)?;
    // One that would not be let through is no use.
    let volume = header::probe(&device.path, None)?;
    let failed = |source| HeaderBackupError::File { action: "write", path: file.to_owned(), source };
    durable::create(file, &bytes).map_err(failed)?;
    let key = volume.reference().cloned();
    let told = key.as_ref().map(ToString::to_string);
    audit::done(config, &Event { action: "header backup", device: Some(&device.path), key: told, ..Event::default() });
    Ok(Saved { volume: volume.uuid().unwrap_or_default(), key, bytes: bytes.len() })
}

/// Puts a header back on a detached volume, if the key that its store has opens it, before and after.
pub fn restore(config: &Config, request: &Request<'_>) -> Result<Restored, Error> {
    let Request { device, file, older, lost, key: moved, separation } = request;
    let device = Device::look(device)?;
    backend::require_free(&device)?;
    let held = device.open_exclusive()?;
    let mut backup = HeaderBackup::read(file)?;
    moved.map_or(Ok(()), |key| backup.name_key(key))?;
    let (journal, _alone) = rotate::claim(config, backup.uuid())?;
    if journal.exists() {
        return Err(HeaderBackupError::MidWay(device.path.clone()).into());
    }
    let now = Copies::read(&held).map_err(DeviceError::io("read", &device.path))?;
    let differs = backup.compare(&device, now.as_ref(), &held)?;
    let trace = wipe::volume(&held).map_err(DeviceError::io("read", &device.path))?;
    if now.is_none() && trace != Some(backup.uuid()) {
        require_lost(config, &device, backup.uuid(), *lost)?;
    }
    if let Differs::Changes(changes) = &differs
        && !older
    {
        return Err(HeaderBackupError::Older { device: device.path.clone(), changes: changes.clone() }.into());
    }
    let volume = backup.on(&device)?;
    if backup.end() > volume.geometry.data_offset_bytes {
        return Err(HeaderBackupError::Layout(device.path.clone()).into());
    }
    let key = reference(&volume)?;
    let given = || Circumstances { strictness: *separation, ..Circumstances::default() };
    let proven = Case::find(config, volume, Asked::default())?.prove(given())?;
    proven.key()?;
    let is_opened = opens_its_keyslot(&proven)?;
    if !is_opened && differs != Differs::No && !older {
        return Err(HeaderBackupError::OldPassphrase { device: device.path.clone(), key }.into());
    }
    if now.is_none() && !older {
        require_latest_key(config, backup.uuid(), &key, proven.replaces()?.as_ref())?;
    }
    if differs != Differs::No {
        backup.write(now.as_ref(), &held).map_err(DeviceError::io("write the header of", &device.path))?;
    }
    let proven = Case::find(config, header::probe(&device.path, None)?, Asked::default())?.prove(given())?;
    proven.key()?;
    if !is_opened {
        let next = format!("'cryptattach key rotate --passphrase {}' makes one", device.path.display());
        tracing::warn!("the passphrase that is sealed with {key} opens no keyslot; {next}");
    }
    proven.record("header restore");
    let written = differs != Differs::No;
    let changed = if let Differs::Changes(changes) = differs { changes } else { Vec::new() };
    Ok(Restored { volume: backup.uuid(), key, written, changed })
}

/// Whether other programs, which are given the sealed passphrase, can open what the header claims for them.
fn opens_its_keyslot(proven: &Proven<'_>) -> Result<bool, Error> {
    use unlock::Error::{NoPassphrase, ReadBack, Volume};
    if proven.volume().claimed_keyslots()?.is_empty() {
        return Ok(true);
    }
    match proven.keyslot() {
        Ok(_) => Ok(true),
        Err(Volume(VolumeError::WrongPassphrase { .. }) | NoPassphrase(_) | ReadBack(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Where a device does not say that it is the volume, its beginning may be anybody's data.
fn require_lost(config: &Config, device: &Device, volume: Uuid, lost: bool) -> Result<(), Error> {
    let is = |other: &Path| Device::look(other).is_ok_and(|other| other.identity == device.identity);
    let crypttab = crypttab::read(Path::new(crypttab::PATH)).map_err(Error::io("read /etc/crypttab"))?;
    let has_none = |entry: &&crypttab::Entry| entry.has(&["plain", "swap"]);
    let listed = crypttab.iter().map(|entry| (entry.device.path(), entry.header()));
    let configured: Vec<_> = config.devices().chain(listed).collect();
    if configured.iter().any(|(other, header)| header.is_some() && is(other))
        || crypttab.iter().filter(has_none).any(|entry| is(entry.device.path()))
    {
        return Err(HeaderBackupError::HeaderElsewhere(device.path.clone()).into());
    }
    let by_uuid = by_uuid(volume);
    let mut others = configured.iter().map(|(other, _)| *other).chain([&*by_uuid]);
    let has_it = |other: &&Path| rekey::found(other).is_some_and(|(at, is)| at != device.identity && is == volume);
    if let Some(other) = others.find(has_it) {
        return Err(HeaderBackupError::AnotherIs { device: other.to_owned(), volume }.into());
    }
    match lost {
        true => Ok(()),
        false => Err(HeaderBackupError::NoTrace { device: device.path.clone(), volume }.into()),
    }
}

fn reference(volume: &Volume) -> Result<KeyReference, Error> {
    Ok(volume.reference().cloned().ok_or_else(|| unlock::Error::NoReference(volume.device.path.clone()))?)
}

/// A key that was rotated may still be in the store, and would open the header of its time.
fn require_latest_key(
    config: &Config,
    volume: Uuid,
    key: &KeyReference,
    replaces: Option<&KeyReference>,
) -> Result<(), Error> {
    let container = Container::open(config, &key.store, None, Use::Keys)?;
    let mut others = container.keys_of_volume(volume)?;
    others.retain(|id| *id != key.key && replaces != Some(&container.reference(*id)));
    if others.is_empty() {
        return Ok(());
    }
    others.sort_unstable();
    Err(HeaderBackupError::OtherKeys { volume, store: key.store.clone(), others }.into())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, OpenOptions},
        os::unix::fs::FileExt,
        path::PathBuf,
    };

    use super::*;
    use crate::{
        keys::store::{ContainerKeys, KeyStore},
        unlock::testing::Site,
        verbs::{rotate, tests},
        volumes::header::rekey,
    };

    fn formatted(site: &Site, name: &str, keyslot: bool) -> PathBuf {
        tests::formatted(site, name, keyslot).0
    }

    fn backed_up(site: &Site, device: &Path, name: &str) -> PathBuf {
        let file = site.beside_the_keys(name);
        back_up(&site.config, device, &file).unwrap();
        file
    }

    fn restored(site: &Site, device: &Path, file: &Path, older: bool) -> Result<Restored, Error> {
        restore_from(site, device, file, older, None)
    }

    fn restore_from(
        site: &Site,
        device: &Path,
        file: &Path,
        older: bool,
        key: Option<&KeyReference>,
    ) -> Result<Restored, Error> {
        restore(&site.config, &Request { device, file, older, lost: true, key, separation: Strictness::default() })
    }

    #[track_caller]
    fn refused(site: &Site, device: &Path, file: &Path, older: bool) -> HeaderBackupError {
        let before = fs::read(device).unwrap();
        let error = restored(site, device, file, older).unwrap_err();
        assert!(fs::read(device).unwrap() == before, "nothing is written");
        if let Error::Header(error) = error { error } else { panic!("{error:?}") }
    }

    fn overwrite(device: &Path, at: u64, bytes: &[u8]) {
        OpenOptions::new().write(true).open(device).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn change(device: &Path, change: impl FnOnce(&mut serde_json::Value)) {
        let file = OpenOptions::new().read(true).write(true).open(device).unwrap();
        let copies = Copies::read(&file).unwrap().unwrap();
        let mut json = copies.json.clone();
        change(&mut json);
        copies.write(&file, &json).unwrap();
    }

    fn rotated(site: &Site, device: &Path, delete_old: bool) {
        let (hotzone_bytes, separation) = (rekey::HOTZONE_BYTES, Strictness::default());
        let how = rotate::How { drop_others: false, delete_old, hotzone_bytes, bytes_per_second: None, separation };
        rotate::rotate(&site.config, device, &how, &mut |_, _| ()).unwrap();
    }

    #[test]
    fn a_header_comes_back_whatever_of_it_is_lost() {
        let site = Site::with("");
        let device = formatted(&site, "a", true);
        let file = backed_up(&site, &device, "header");
        let before = fs::read(&device).unwrap();
        assert!(!restored(&site, &device, &file, false).unwrap().written);
        assert!(fs::read(&device).unwrap() == before, "nothing to do");
        for (at, len) in [(0, 512), (16 << 10, 512), (0, 1 << 20), (32 << 10, 16 << 10)] {
            overwrite(&device, at, &vec![0x55; len]);
            assert!(restored(&site, &device, &file, false).unwrap().written, "{at} {len}");
            assert!(!restored(&site, &device, &file, false).unwrap().written, "it is whole");
            let now = fs::read(&device).unwrap();
            assert!(now[32 << 10..] == before[32 << 10..], "the keyslots");
        }
    }

    #[test]
    fn what_does_not_say_that_it_is_the_volume_is_not_written_over() {
        let site = Site::with("");
        let (device, data) = (formatted(&site, "a", false), site.blank("b"));
        let file = backed_up(&site, &device, "header");
        fs::write(&data, vec![0xAA; 32 << 20]).unwrap();
        let separation = Strictness::default();
        let request = |lost| Request { device: &data, file: &file, older: true, lost, key: None, separation };
        let refused = restore(&site.config, &request(false)).unwrap_err();
        assert!(matches!(refused, Error::Header(HeaderBackupError::NoTrace { .. })), "{refused:?}");
        assert!(fs::read(&data).unwrap().iter().all(|byte| *byte == 0xAA), "nothing is written");
        // A part of the header is enough to know it by.
        overwrite(&device, 0, &[0; 16 << 10]);
        let request = Request { device: &device, ..request(false) };
        assert!(restore(&site.config, &request).unwrap().written);
        restore(&site.config, &Request { device: &data, lost: true, ..request }).unwrap();
    }

    #[test]
    fn a_header_from_before_a_rotation_is_never_restored() {
        let site = Site::with("");
        let device = formatted(&site, "a", false);
        let old = backed_up(&site, &device, "old");
        rotated(&site, &device, false);
        assert!(matches!(refused(&site, &device, &old, true), HeaderBackupError::OldKey(_)));
        let new = backed_up(&site, &device, "new");
        // Without a header to compare with: the store has both keys, and the new one says whose place it has taken.
        overwrite(&device, 0, &vec![0; 1 << 20]);
        fs::remove_dir_all(site.config.state.join("volumes")).unwrap();
        assert!(matches!(refused(&site, &device, &old, false), HeaderBackupError::OtherKeys { .. }));
        assert!(restored(&site, &device, &new, false).unwrap().written);
        // And this host knows what it has opened.
        overwrite(&device, 0, &vec![0; 1 << 20]);
        let error = restored(&site, &device, &old, true).unwrap_err();
        assert!(matches!(error, Error::Unlock(unlock::Error::NotPinned { .. })), "{error:?}");
    }

    #[test]
    fn what_was_changed_since_comes_back_only_when_asked() {
        let site = Site::with("");
        let device = formatted(&site, "a", true);
        let file = backed_up(&site, &device, "header");
        change(&device, |json| {
            json["keyslots"] = serde_json::json!({});
            json["digests"]["0"]["keyslots"] = serde_json::json!([]);
            json["tokens"]["0"]["keyslots"] = serde_json::json!([]);
        });
        let HeaderBackupError::Older { changes, .. } = refused(&site, &device, &file, false) else { panic!("older") };
        assert!(changes.contains(&"keyslot 0 comes back".to_owned()), "{changes:?}");
        // A later number in the file proves nothing.
        (0..5).for_each(|_| change(&file, |_| ()));
        assert!(matches!(refused(&site, &device, &file, false), HeaderBackupError::Older { .. }));
        assert_eq!(restored(&site, &device, &file, true).unwrap().changed, changes);
        assert!(!restored(&site, &device, &file, false).unwrap().written);
    }

    #[test]
    fn another_volumes_header_and_what_is_no_header_are_refused() {
        let site = Site::with("");
        let (one, other) = (formatted(&site, "one", false), formatted(&site, "other", false));
        let file = backed_up(&site, &one, "header");
        assert!(matches!(refused(&site, &other, &file, true), HeaderBackupError::OtherVolume { .. }));
        let swap = site.blank("swap");
        overwrite(&swap, 4086, b"SWAPSPACE2");
        overwrite(&swap, 1024, &[1, 0, 0, 0, 255]);
        assert!(matches!(refused(&site, &swap, &file, true), HeaderBackupError::Foreign { .. }));
        let bytes = fs::read(&file).unwrap();
        for hostile in
            [&bytes[..0], &bytes[..4096], &bytes[..1 << 20], &[&bytes[..], b"x"].concat(), &vec![0; 16 << 20]]
        {
            fs::write(&file, hostile).unwrap();
            assert!(matches!(refused(&site, &one, &file, true), HeaderBackupError::NoBackup { .. }));
        }
        let again = back_up(&site.config, &one, &file);
        assert!(matches!(again, Err(Error::Header(HeaderBackupError::File { .. }))), "nothing is overwritten");
    }

    #[test]
    fn a_re_encryption_is_not_broken() {
        let site = Site::with("");
        let device = formatted(&site, "a", false);
        let file = backed_up(&site, &device, "header");
        let uuid = header::probe(&device, None).unwrap().uuid().unwrap();
        let journal = site.config.state.join("rekey").join(uuid.to_string());
        fs::create_dir_all(journal.parent().unwrap()).unwrap();
        fs::write(&journal, "{}").unwrap();
        assert!(matches!(refused(&site, &device, &file, true), HeaderBackupError::MidWay(_)));
        fs::remove_file(journal).unwrap();
        change(&device, |json| {
            json["config"]["requirements"] = serde_json::json!({"mandatory": ["online-reencrypt-v2"]});
        });
        assert!(matches!(refused(&site, &device, &file, true), HeaderBackupError::MidWay(_)));
        let backup = back_up(&site.config, &device, &site.beside_the_keys("midway"));
        assert!(matches!(backup, Err(Error::Header(HeaderBackupError::MidWay(_)))), "{backup:?}");
    }

    #[test]
    fn a_store_that_has_the_key_no_more_leaves_the_device_alone() {
        let site = Site::with("");
        let device = formatted(&site, "a", false);
        let file = backed_up(&site, &device, "header");
        overwrite(&device, 0, &[0; 512]);
        let before = fs::read(&device).unwrap();
        let key = site.keys()[0].clone();
        KeyStore::delete(&site.store, &key.key).unwrap();
        assert!(restored(&site, &device, &file, true).is_err());
        assert!(site.store.epochs().unwrap().len() == 1 && fs::read(&device).unwrap() == before);
    }
}
