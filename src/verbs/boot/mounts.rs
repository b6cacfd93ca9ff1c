//! File systems with keys on them, mounted read-only for as long as the boot needs them.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Mutex, PoisonError, TryLockError},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::BootError;
use crate::config::BootMount;

/// The mounts of a boot.
pub struct Mounts(Vec<(PathBuf, Mutex<Is>)>);

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
        Self(mounts.iter().map(|mount| (mount.at.clone(), Mutex::new(Is::Unknown))).collect())
    }

    /// Mounts a file system whose device is there, unless it is mounted.
    pub fn mount(&self, wanted: &BootMount) -> Result<(), BootError> {
        let Some((at, is)) = self.0.iter().find(|(at, _)| *at == wanted.at) else { return Ok(()) };
        let mut is = is.lock().unwrap_or_else(PoisonError::into_inner);
        if *is != Is::Unknown {
            return Ok(());
        }
        if is_mount_point(at) {
            *is = Is::Found;
            return Ok(());
        }
        let failed = |source| BootError::Mount { device: wanted.device.clone(), at: at.clone(), source };
        fs::create_dir_all(at).map_err(failed)?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some(wanted.device.path()), at, Some(wanted.kind.as_str()), flags, None::<&str>)
            .map_err(|errno| failed(errno.into()))?;
        *is = Is::Mounted;
        Ok(())
    }

    /// Unmounts what this boot has mounted.
    pub fn unmount(&self) {
        for (at, is) in &self.0 {
            // One that is just being mounted, from a disk that does not answer, perhaps: the boot does not wait for it.
            let mut is = match is.try_lock() {
                Ok(is) => is,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => continue,
            };
            // Detached: a source that lost the race may still be reading.
            if *is == Is::Mounted && umount2(at, MntFlags::MNT_DETACH).is_ok() {
                *is = Is::Unknown;
            }
        }
    }
}

/// The fifth member of a line of /proc/self/mountinfo (proc(5)).
fn is_mount_point(path: &std::path::Path) -> bool {
    let table: io::Result<String> = fs::read_to_string("/proc/self/mountinfo");
    table.is_ok_and(|table| {
        table.lines().any(|line| line.split(' ').nth(4).is_some_and(|at| path == std::path::Path::new(at)))
    })
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn the_end_does_not_wait_for_a_mount_that_hangs() {
        let mounts = Mounts(vec![(PathBuf::from("/nonexistent"), Mutex::new(Is::Unknown))]);
        let (done, unmounted) = mpsc::channel();
        thread::scope(|scope| {
            let hangs = mounts.0[0].1.lock().unwrap();
            let mounts = &mounts;
            scope.spawn(move || {
                mounts.unmount();
                done.send(()).unwrap();
            });
            let unmounted = unmounted.recv_timeout(Duration::from_secs(5));
            drop(hangs);
            assert!(unmounted.is_ok());
        });
    }
}
