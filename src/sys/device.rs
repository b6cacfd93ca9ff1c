//! Devices as the kernel shows them: block devices and regular files that stand for one.

use std::{
    borrow::Cow,
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::libc;
use serde::{Deserialize, Serialize};

use super::kernel_files::{KernelFile, MissingKernelFile};
use crate::base::{advice::Advice, exit::Exit};

/// A block device, or a regular file with a volume in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// As the user named it.
    pub path: PathBuf,
    pub kind: DeviceKind,
    /// Which one the path led to.
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

/// Which device or file a path led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// A block device's number.
    BlockDevice(u64),
    /// A file's file system and inode.
    File(u64, u64),
}

impl Identity {
    /// What that metadata is of.
    pub fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::BlockDevice(metadata.rdev())
        } else {
            Self::File(metadata.dev(), metadata.ino())
        }
    }
}

/// A device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Another device has got the name.
    #[error("{} is another device now than the one whose header was read", .0.display())]
    Exchanged(PathBuf),
    /// The kernel cannot be asked about it.
    #[error(transparent)]
    Kernel(#[from] MissingKernelFile),
    /// No such file, or the device has gone.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
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
            Self::Missing(_) | Self::Exchanged(_) => Exit::Missing,
            Self::WrongKind(_) | Self::TooSmall { .. } => Exit::Header,
            Self::ReadOnly(_) | Self::Io { .. } => Exit::Io,
            Self::Busy { .. } => Exit::Busy,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Kernel(missing) => missing.next_step(),
            Self::Missing(_) => "check the path ('lsblk' shows the block devices)",
            Self::Exchanged(_) => "name the device by what does not change: a path below /dev/disk",
            Self::Busy { .. } => "unmount or detach the device first",
            Self::ReadOnly(_) => "attach it with --read-only; it cannot be formatted",
            Self::WrongKind(_) | Self::TooSmall { .. } | Self::Io { .. } => return None,
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
            Some(libc::EBUSY) => Self::Busy { holders: crate::sys::users::of_path(&path), path },
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
}

impl Device {
    /// Looks at the device; opens it for reading only, for a moment.
    pub fn look(path: &Path) -> Result<Self, DeviceError> {
        // Whatever is done with a device needs both, and fails in odd ways without them.
        KernelFile::Proc.require()?;
        KernelFile::Sys.require()?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(DeviceError::io("open", path))?;
        let metadata = file.metadata().map_err(DeviceError::io("stat", path))?;
        let (path, identity) = (path.to_owned(), Identity::of(&metadata));
        if metadata.file_type().is_block_device() {
            Self::look_block(path, &file, metadata.rdev())
        } else if metadata.is_file() {
            let read_only = nix::unistd::access(&path, nix::unistd::AccessFlags::W_OK).is_err();
            let size_bytes = metadata.len();
            let kind = DeviceKind::File;
            Ok(Self {
                path,
                kind,
                identity,
                size_bytes,
                read_only,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
            })
        } else {
            Err(DeviceError::WrongKind(path))
        }
    }

    #[allow(unsafe_code)]
    fn look_block(path: PathBuf, file: &File, number: u64) -> Result<Self, DeviceError> {
        let fd = file.as_raw_fd();
        let (mut size_bytes, mut read_only, mut logical, mut physical) = (0, 0, 0, 0);
        // SAFETY: each ioctl writes one integer of the type that its wrapper names (linux/fs.h), and fd is open.
        unsafe {
            ioctl::blkgetsize64(fd, &raw mut size_bytes)
                .and_then(|_| ioctl::blkroget(fd, &raw mut read_only))
                .and_then(|_| ioctl::blksszget(fd, &raw mut logical))
                .and_then(|_| ioctl::blkpbszget(fd, &raw mut physical))
        }
        .map_err(|errno| DeviceError::io("query", &path)(errno.into()))?;
        Ok(Self {
            path,
            kind: DeviceKind::Block(number),
            identity: Identity::BlockDevice(number),
            size_bytes,
            read_only: read_only != 0,
            logical_block_bytes: logical.unsigned_abs(),
            physical_block_bytes: physical,
        })
    }

    /// Refuses a path that has come to lead to another device.
    pub fn check_identity(&self) -> Result<(), DeviceError> {
        let now = fs::metadata(&self.path).map_err(DeviceError::io("stat", &self.path))?;
        if Identity::of(&now) == self.identity { Ok(()) } else { Err(DeviceError::Exchanged(self.path.clone())) }
    }

    /// Whether it is a file, or a loop device, which stands for one.
    pub fn is_loop_or_file(&self) -> bool {
        const LOOP_MAJOR: u64 = 7; // Documentation/admin-guide/devices.txt
        match self.kind {
            DeviceKind::File => true,
            DeviceKind::Block(number) => libc::major(number) as u64 == LOOP_MAJOR,
        }
    }

    /// Opens it for writing and for nobody else: a block device with `O_EXCL`, so that a mounted one is busy; a file locked
    /// (flock(2)), and only if no loop device stands for it.
    pub fn open_exclusive(&self) -> Result<File, DeviceError> {
        if self.read_only {
            return Err(DeviceError::ReadOnly(self.path.clone()));
        }
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_CLOEXEC | flags)
                .open(&self.path)
                .map_err(DeviceError::io("open", &self.path))
        };
        if let DeviceKind::Block(_) = self.kind {
            return open(libc::O_EXCL);
        }
        let file = open(0)?;
        let holders = crate::sys::users::of_path(&self.path);
        let loops = || holders.iter().any(|holder| holder.starts_with("behind the loop device"));
        if file.try_lock().is_err() || loops() {
            return Err(DeviceError::Busy { path: self.path.clone(), holders });
        }
        Ok(file)
    }
}
