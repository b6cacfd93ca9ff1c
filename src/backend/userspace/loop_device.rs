//! Loop devices (loop(4)): the file system's file becomes a block device.
#![allow(unsafe_code)] // ioctl(2)

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use nix::{errno::Errno, libc};

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` (linux/loop.h, since 5.8).
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
nix::ioctl_none_bad!(loop_clr_fd, 0x4C01);
nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);

/// A loop device, by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// The loop device at a path.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes a free loop device stand for a file.
    pub fn attach(file: &Path, block_size: u32, read_only: bool) -> io::Result<Self> {
        let backing = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(file)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        // Between the question for a free one and its use another process may take it.
        const TRIES: usize = 64;
        for _ in 0..TRIES {
            // SAFETY: the ioctl takes no argument, and the descriptor is open.
            let number = unsafe { loop_ctl_get_free(control.as_raw_fd()) }?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = OpenOptions::new().read(true).write(!read_only).open(&path)?;
            match configure(&device, backing.as_raw_fd(), block_size, read_only) {
                Err(Errno::EBUSY) => {}
                configured => return configured.map(|()| Self(path)).map_err(io::Error::from),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// The file that it stands for now, if any.
    pub fn backing_file(&self) -> Option<PathBuf> {
        let text = fs::read_to_string(self.sysfs("backing_file")?).ok()?;
        let path = text.strip_suffix('\n').unwrap_or(&text);
        // The kernel's mark on a file without a name, as one of an unmounted file system.
        Some(path.strip_suffix(" (deleted)").unwrap_or(path).into())
    }

    /// Whether it goes when its last user closes it.
    pub fn is_going(&self) -> bool {
        self.sysfs("autoclear").and_then(|path| fs::read_to_string(path).ok()).is_some_and(|text| text.trim() == "1")
    }

    /// Whether someone has it open exclusively: mounted, in a RAID, a mapping.
    pub fn is_claimed(&self) -> io::Result<bool> {
        match OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&self.0) {
            Ok(_) => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Returns once all that was written has reached the file.
    pub fn flush(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }

    /// Takes the file from it. If someone has it open, that happens when the last one closes it.
    pub fn clear(&self) -> io::Result<()> {
        let device = File::open(&self.0)?;
        // SAFETY: the ioctl takes no argument, and the descriptor is open.
        match unsafe { loop_clr_fd(device.as_raw_fd()) } {
            Ok(_) | Err(Errno::ENXIO) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn sysfs(&self, attribute: &str) -> Option<PathBuf> {
        Some(Path::new("/sys/block").join(self.0.file_name()?).join("loop").join(attribute))
    }
}

fn configure(device: &File, backing: RawFd, block_size: u32, read_only: bool) -> Result<(), Errno> {
    let info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        // Without it the plaintext would be in the page cache twice.
        flags: LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let config = LoopConfig { fd: backing.cast_unsigned(), block_size, info, reserved: [0; 8] };
    // SAFETY: `config` has the layout of struct loop_config and lives through the call; both descriptors are open.
    unsafe { loop_configure(device.as_raw_fd(), &raw const config) }.map(drop)
}
