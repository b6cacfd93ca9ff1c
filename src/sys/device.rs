//! Devices as the kernel shows them: block devices and regular files that stand for one.

use std::{
    borrow::Cow,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{self, Path, PathBuf},
};

use nix::libc;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    kernel_files::{KernelFile, MissingKernelFile},
    users,
};
use crate::base::{advice::Advice, exit::Exit};

/// A block device, or a regular file with a volume in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// As the user named it.
    pub path: PathBuf,
    pub kind: DeviceKind,
    /// Which one it is, whatever it is called.
    pub identity: Identity,
    /// Size in bytes.
    pub size_bytes: u64,
    /// The kernel (or the file's permissions) lets nobody write.
    pub read_only: bool,
    /// Smallest unit that can be read or written, in bytes; 512 for files.
    pub logical_block_bytes: u32,
    /// Unit that is best read or written, in bytes; 4096 for files.
    pub physical_block_bytes: u32,
}

/// Block device or file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A block device with its number (`st_rdev`).
    Block(u64),
    /// A regular file.
    File,
}

/// Where udev has a link to the device with a volume.
pub fn by_uuid(volume: Uuid) -> PathBuf {
    Path::new("/dev/disk/by-uuid").join(volume.to_string())
}

/// What a path leads to in the end; the path itself where it leads nowhere.
pub fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// Which device or file that is. A path may lead to another one a moment later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Identity {
    /// A block device.
    BlockDevice {
        /// Its number (`st_rdev`), which another device has after it.
        number: u64,
        /// The kernel's count of disks, which no other has (Linux 5.15: BLKGETDISKSEQ).
        sequence: Option<u64>,
    },
    /// A file's file system and inode.
    File { on: u64, inode: u64 },
}

/// A device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel cannot be asked about it.
    #[error(transparent)]
    Kernel(#[from] MissingKernelFile),
    /// No such file, or the device has gone.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// The path leads to another device than a moment ago.
    #[error("{} is not the device that was checked: another one has taken its place", .0.display())]
    Replaced(PathBuf),
    /// A directory, a character device, ...
    #[error("{} is neither a block device nor a regular file", .0.display())]
    WrongKind(PathBuf),
    /// It can only be read.
    #[error("{} is read-only", .0.display())]
    ReadOnly(PathBuf),
    /// Someone has it open exclusively: mounted, part of a RAID or a mapping, ...
    #[error("{} is in use{}", .path.display(), in_use(.holders))]
    Busy {
        path: PathBuf,
        /// Who, as far as can be seen.
        holders: Vec<String>,
    },
    /// There is not enough room for a header and one sector of data.
    #[error("{} is too small: it has {size_bytes} bytes; at least {needed_bytes} are needed", .path.display())]
    TooSmall { path: PathBuf, size_bytes: u64, needed_bytes: u64 },
    /// Opening, reading or writing failed.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// "open", "read", "write", ...
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Advice for DeviceError {
    fn exit(&self) -> Exit {
        match self {
            Self::Kernel(_) => Exit::System,
            Self::Missing(_) | Self::Replaced(_) => Exit::Missing,
            Self::WrongKind(_) | Self::TooSmall { .. } => Exit::Header,
            Self::ReadOnly(_) | Self::Io { .. } => Exit::Io,
            Self::Busy { .. } => Exit::Busy,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Kernel(missing) => missing.next_step(),
            Self::Replaced(_) => "try again once the devices are settled ('udevadm settle')",
            Self::Missing(_) => "check the path ('lsblk' shows the block devices)",
            Self::Busy { .. } => "unmount or detach the device first",
            Self::ReadOnly(_) => "attach it with --read-only; it cannot be formatted",
            Self::WrongKind(_) => "name a block device ('lsblk' shows them), or a file that stands for one",
            Self::TooSmall { .. } => "take a larger device, or another one ('lsblk' shows them)",
            Self::Io { .. } => return None,
        };
        Some(step.into())
    }
}

/// ": mounted on /srv, opened by fio (pid 412)", or nothing.
pub(crate) fn in_use(holders: &[String]) -> String {
    if holders.is_empty() { String::new() } else { format!(": {}", holders.join(", ")) }
}

impl DeviceError {
    /// A closure that turns an I/O error on `path` into the variant that says most.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Self::Missing(path),
            Some(libc::EROFS) => Self::ReadOnly(path),
            Some(libc::EBUSY) => Self::Busy { holders: users::of_path(&path), path },
            _ => Self::Io { action, path, source },
        }
    }
}

mod ioctl {
    #![allow(unsafe_code)] // the wrappers that nix's macros make are unsafe functions
    use nix::libc::{c_int, c_uint};
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), c_int);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), c_uint);
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
}

impl Device {
    /// Looks at the device; opens it for reading only, for a moment.
    pub fn look(path: &Path) -> Result<Self, DeviceError> {
        Self::open(path).map(|(device, _)| device)
    }

    /// Looks at the device, and keeps it open for reading.
    pub fn open(path: &Path) -> Result<(Self, File), DeviceError> {
        // Whatever is done with a device needs them, and fails in odd ways without.
        for file in [KernelFile::Proc, KernelFile::Sys, KernelFile::Random] {
            file.require()?;
        }
        let file = for_reading().open(path).map_err(DeviceError::io("open", path))?;
        Ok((Self::of(path, &file)?, file))
    }

    /// Looks at a device that is open.
    fn of(path: &Path, file: &File) -> Result<Self, DeviceError> {
        let metadata = file.metadata().map_err(DeviceError::io("stat", path))?;
        let path = path.to_owned();
        if metadata.file_type().is_block_device() {
            Self::look_block(path, file, metadata.rdev())
        } else if metadata.is_file() {
            let read_only = nix::unistd::access(&path, nix::unistd::AccessFlags::W_OK).is_err();
            let size_bytes = metadata.len();
            let kind = DeviceKind::File;
            let identity = Identity::File { on: metadata.dev(), inode: metadata.ino() };
            let (logical_block_bytes, physical_block_bytes) = (512, 4096);
            Ok(Self { path, kind, identity, size_bytes, read_only, logical_block_bytes, physical_block_bytes })
        } else {
            Err(DeviceError::WrongKind(path))
        }
    }

    /// Opens it again for reading. Only the device that was looked at counts, and not whatever its path leads to by now.
    pub fn reopen(&self) -> Result<File, DeviceError> {
        self.reopen_with(&for_reading())
    }

    /// Makes sure that its path still leads to it.
    pub fn still_there(&self) -> Result<(), DeviceError> {
        self.reopen().map(drop)
    }

    fn reopen_with(&self, options: &OpenOptions) -> Result<File, DeviceError> {
        let file = options.open(&self.path).map_err(DeviceError::io("open", &self.path))?;
        if Self::of(&self.path, &file)?.identity == self.identity {
            Ok(file)
        } else {
            Err(DeviceError::Replaced(self.path.clone()))
        }
    }

    #[allow(unsafe_code)]
    fn look_block(path: PathBuf, file: &File, number: u64) -> Result<Self, DeviceError> {
        let fd = file.as_raw_fd();
        let (mut size_bytes, mut read_only, mut logical, mut physical, mut sequence) = (0, 0, 0, 0, 0);
        // SAFETY: each ioctl writes one integer of the type that its wrapper names (linux/fs.h), and fd is open.
        unsafe {
            ioctl::blkgetsize64(fd, &raw mut size_bytes)
                .and_then(|_| ioctl::blkroget(fd, &raw mut read_only))
                .and_then(|_| ioctl::blksszget(fd, &raw mut logical))
                .and_then(|_| ioctl::blkpbszget(fd, &raw mut physical))
        }
        .map_err(|errno| DeviceError::io("query", &path)(errno.into()))?;
        // SAFETY: as above.
        let sequence = unsafe { ioctl::blkgetdiskseq(fd, &raw mut sequence) }.ok().map(|_| sequence);
        Ok(Self {
            path,
            kind: DeviceKind::Block(number),
            identity: Identity::BlockDevice { number, sequence },
            size_bytes,
            read_only: read_only != 0,
            logical_block_bytes: logical.unsigned_abs(),
            physical_block_bytes: physical,
        })
    }

    /// Its path for whoever reads it later, perhaps in another folder.
    pub fn lasting_path(&self) -> Result<PathBuf, DeviceError> {
        path::absolute(&self.path).map_err(DeviceError::io("resolve the path of", &self.path))
    }

    /// Whether it is a file, or a loop device, which stands for one.
    pub fn is_loop_or_file(&self) -> bool {
        const LOOP_MAJOR: u64 = 7; // Documentation/admin-guide/devices.txt
        match self.kind {
            DeviceKind::File => true,
            DeviceKind::Block(number) => libc::major(number) as u64 == LOOP_MAJOR,
        }
    }

    /// Opens it for writing and for nobody else, see [`Device::claim`]; nor may anybody use its bytes by another name, to which
    /// the kernel does not object.
    pub fn open_exclusive(&self) -> Result<File, DeviceError> {
        if self.read_only {
            return Err(DeviceError::ReadOnly(self.path.clone()));
        }
        let file = self.claim(true)?;
        self.require_unused_beside()?;
        Ok(file)
    }

    /// Refuses a device whose bytes somebody uses by another name: another loop device of the same file, a partition of that.
    pub fn require_unused_beside(&self) -> Result<(), DeviceError> {
        let holders = users::beside(self.identity);
        if holders.is_empty() { Ok(()) } else { Err(DeviceError::Busy { path: self.path.clone(), holders }) }
    }

    /// Opens a block device for writing beside the mapping that has it.
    pub fn open_beside(&self) -> Result<File, DeviceError> {
        self.reopen_with(OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC))
    }

    /// Opens it for nobody else: a block device with `O_EXCL`, so that a mounted one is busy; a file locked as a whole
    /// (fcntl(2), F_OFD_SETLK). Other programs' flock(2), by which cryptsetup reads and writes headers, goes on beside that lock.
    pub fn claim(&self, write: bool) -> Result<File, DeviceError> {
        let exclusive = if matches!(self.kind, DeviceKind::Block(_)) { libc::O_EXCL } else { 0 };
        let file =
            self.reopen_with(OpenOptions::new().read(true).write(write).custom_flags(libc::O_CLOEXEC | exclusive))?;
        if exclusive == 0 && lock_whole(&file, write).is_err() {
            return Err(DeviceError::Busy { path: self.path.clone(), holders: users::of_path(&self.path) });
        }
        Ok(file)
    }
}

fn for_reading() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK);
    options
}

/// Locks the file for as long as this description of it is open; a lock for reading lets others read.
fn lock_whole(file: &File, write: bool) -> nix::Result<()> {
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_the_place_of_a_device_is_not_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("volume");
        std::fs::write(&path, "judged").expect("written");
        let device = Device::look(&path).expect("a file");
        device.still_there().expect("the same");
        let other = folder.path().join("other");
        std::fs::write(&other, "not judged").expect("written");
        std::fs::rename(&other, &path).expect("replaced");
        assert!(matches!(device.open_exclusive(), Err(DeviceError::Replaced(_))));
        assert!(matches!(device.still_there(), Err(DeviceError::Replaced(_))));
    }

    #[test]
    fn a_claimed_file_is_claimed_once_and_other_programs_read_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let device = Device::look(file.path()).expect("a file");
        let claim = device.open_exclusive().expect("nobody has it");
        assert!(matches!(device.open_exclusive(), Err(DeviceError::Busy { .. })));
        assert!(matches!(device.claim(false), Err(DeviceError::Busy { .. })));
        // What cryptsetup does to read a header, and to write one.
        file.as_file().try_lock_shared().expect("read");
        file.as_file().unlock().expect("done");
        file.as_file().try_lock().expect("written");
        drop(claim);
        device.open_exclusive().expect("nobody has it any more");
    }
}
