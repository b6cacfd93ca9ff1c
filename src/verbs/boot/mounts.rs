//! File systems with keys on them, mounted read-only for as long as the boot needs them.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, TryLockError},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::BootError;
use crate::{
    config::BootMount,
    sys::{mounts, sysfs::Sysfs},
};

/// What a boot has mounted, or was about to, each place with a zero byte behind it: for whoever ends a boot that was killed.
const NOTE: &str = "/run/cryptattach/mounted";

/// The mounts of a boot.
pub struct Mounts {
    places: Vec<(PathBuf, Mutex<Is>)>,
    note: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    Unknown,
    Mounted,
    /// By somebody else: not ours to unmount.
    Found,
}

impl Mounts {
    /// Of the configuration; nothing is mounted yet.
    pub fn of(mounts: &[BootMount]) -> Self {
        let place = |mount: &BootMount| (mount.at.clone(), Mutex::new(Is::Unknown));
        Self { places: mounts.iter().map(place).collect(), note: NOTE.into() }
    }

    /// Those of a boot that was killed.
    pub fn left() -> Self {
        let note = PathBuf::from(NOTE);
        let places = noted(&note).into_iter().map(|at| (at, Mutex::new(Is::Mounted))).collect();
        Self { places, note }
    }

    /// Mounts a file system whose device is there, unless it is mounted.
    pub fn mount(&self, wanted: &BootMount) -> Result<(), BootError> {
        let Some((at, is)) = self.places.iter().find(|(at, _)| *at == wanted.at) else { return Ok(()) };
        let mut is = is.lock().unwrap_or_else(PoisonError::into_inner);
        if *is != Is::Unknown {
            return Ok(());
        }
        if is_mount_point(&Sysfs::this(), at) {
            // By an earlier run of this boot that was killed, perhaps.
            *is = if noted(&self.note).contains(at) { Is::Mounted } else { Is::Found };
            return Ok(());
        }
        let failed = |source| BootError::Mount { device: wanted.device.clone(), at: at.clone(), source };
        fs::create_dir_all(at).map_err(failed)?;
        let _ = note(&self.note, at);
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some(wanted.device.path()), at, Some(wanted.kind.as_str()), flags, None::<&str>)
            .map_err(|errno| failed(errno.into()))?;
        *is = Is::Mounted;
        Ok(())
    }

    /// Unmounts what this boot has mounted.
    pub fn unmount(&self) {
        let mut is_left = false;
        for (at, is) in &self.places {
            // One that is just being mounted, from a disk that does not answer, perhaps: the boot does not wait for it.
            let mut is = match is.try_lock() {
                Ok(is) => is,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    is_left = true;
                    continue;
                }
            };
            // Detached: a source that lost the race may still be reading.
            if *is == Is::Mounted && umount2(at, MntFlags::MNT_DETACH).is_ok() {
                *is = Is::Unknown;
            }
        }
        if !is_left {
            let _ = fs::remove_file(&self.note);
        }
    }
}

/// Notes that a file system is about to be mounted.
fn note(file: &Path, at: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(file)?;
    file.write_all(&[at.as_os_str().as_bytes(), b"\0"].concat())
}

/// What was noted, but for what was not noted to its end.
fn noted(file: &Path) -> Vec<PathBuf> {
    let bytes = fs::read(file).unwrap_or_default();
    let mut places: Vec<PathBuf> =
        bytes.split(|byte| *byte == 0).map(|at| OsString::from_vec(at.to_vec()).into()).collect();
    places.pop();
    places
}

fn is_mount_point(sysfs: &Sysfs, path: &Path) -> bool {
    mounts::seen_by(sysfs, "self").iter().any(|mount| mount.point == path)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn the_end_does_not_wait_for_a_mount_that_hangs() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("mounted");
        fs::write(&note, "/nonexistent\0").unwrap();
        let mounts = Mounts { places: vec![(PathBuf::from("/nonexistent"), Mutex::new(Is::Unknown))], note };
        let (done, unmounted) = mpsc::channel();
        thread::scope(|scope| {
            let hangs = mounts.places[0].1.lock().unwrap();
            let mounts = &mounts;
            scope.spawn(move || {
                mounts.unmount();
                done.send(()).unwrap();
            });
            let unmounted = unmounted.recv_timeout(Duration::from_secs(5));
            drop(hangs);
            assert!(unmounted.is_ok());
        });
        assert!(mounts.note.exists(), "whoever ends the boot tries again");
        mounts.unmount();
        assert!(!mounts.note.exists());
    }

    #[test]
    fn what_is_about_to_be_mounted_is_noted_whatever_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mounted");
        assert!(noted(&file).is_empty());
        let places = ["/mnt/keys", "/mnt/two\nlines", "/mnt/a b"].map(PathBuf::from);
        places.iter().for_each(|at| note(&file, at).unwrap());
        assert_eq!(noted(&file), places);
        fs::write(&file, "/mnt/keys\0/mnt").unwrap();
        assert_eq!(noted(&file), places[..1], "the kill came too early for the other");
    }

    #[test]
    fn a_mount_point_with_a_blank_in_its_name_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "36 35 98:1 / /mnt/my\\040keys rw shared:1 - ext4 /dev/sda1 rw\n";
        fs::create_dir_all(folder.path().join("proc/self")).unwrap();
        fs::write(folder.path().join("proc/self/mountinfo"), lines).unwrap();
        let none = || Err(io::ErrorKind::Unsupported.into());
        let sysfs = Sysfs::fixture(folder.path(), |_| Err(io::ErrorKind::Unsupported.into()), none);
        assert!(is_mount_point(&sysfs, Path::new("/mnt/my keys")));
        assert!(!is_mount_point(&sysfs, Path::new("/mnt/my\\040keys")));
    }
}
