//! Loop devices: what makes a block device of the exported file (loop(4), linux/loop.h).
#![allow(unsafe_code)] // ioctl(2)

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};
use serde::{Deserialize, Serialize};

use super::kernel_files::KernelFile;

/// How often a loop device that was free a moment ago may turn out to be taken.
const ATTEMPTS: u32 = 64;
const POLL: Duration = Duration::from_millis(20);

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// A loop device by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LoopDevice {
    number: u32,
}

/// What became of an attempt to clear a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleared {
    /// It shows nothing any more.
    Gone,
    /// Someone has it open.
    InUse,
}

/// Whether a loop device may go with writes that its file did not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// It stays, so that someone learns of it.
    Required,
    /// They are lost: nobody serves the file any more, or someone has learned of it.
    Attempted,
}

impl Flush {
    /// Flushes a device that is to go.
    pub fn carry_out(self, node: &File, path: &Path) -> io::Result<()> {
        match node.sync_all() {
            Err(error) if self == Self::Attempted => {
                tracing::warn!("{} has lost data that it had not flushed: {error}", path.display());
                Ok(())
            }
            flushed => flushed,
        }
    }
}

/// `struct loop_info64`
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

mod ioctl {
    use super::{LoopConfig, LoopInfo64};
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4c82);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, LoopConfig);
    nix::ioctl_write_ptr_bad!(loop_set_status64, 0x4c04, LoopInfo64);
    nix::ioctl_read_bad!(loop_get_status64, 0x4c05, LoopInfo64);
    nix::ioctl_none_bad!(loop_clr_fd, 0x4c01);
    nix::ioctl_none_bad!(loop_set_capacity, 0x4c07);
}

impl LoopInfo64 {
    /// The whole of a file, under the name that tools show without looking into sysfs.
    fn new(file_name: &Path, flags: u32) -> Self {
        let mut name = [0; 64];
        let bytes = file_name.as_os_str().as_bytes();
        let length = bytes.len().min(name.len() - 1);
        name[..length].copy_from_slice(&bytes[..length]);
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// What a loop device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// The file's file system (`st_dev`).
    pub on: u64,
    pub inode: u64,
    /// The number of the block device that the file is.
    pub block: Option<u64>,
    /// Where in the file it begins.
    pub offset: u64,
    /// How much of it is shown; 0 for all.
    pub limit: u64,
}

impl Shown {
    /// What an open loop device shows.
    pub fn by(node: &File) -> io::Result<Self> {
        let mut info = LoopInfo64::new(Path::new(""), 0);
        // SAFETY: the kernel writes one `struct loop_info64`, which `info` has the layout of, and the descriptor is open.
        unsafe { ioctl::loop_get_status64(node.as_raw_fd(), &raw mut info) }?;
        let LoopInfo64 { device: on, inode, rdevice, offset, size_limit: limit, .. } = info;
        Ok(Self { on, inode, block: (rdevice != 0).then_some(rdevice), offset, limit })
    }
}

/// What the loop device of that name shows; `None` if it is none, or shows nothing.
pub(crate) fn shown(name: &str) -> Option<Shown> {
    name.strip_prefix("loop")?.parse::<u32>().ok()?;
    let node = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(Path::new("/dev").join(name))
        .ok()?;
    Shown::by(&node).ok()
}

impl LoopDevice {
    /// Makes a free loop device show the file, in blocks of `block_size` bytes.
    pub fn configure(file: &File, file_name: &Path, block_size: u32, read_only: bool) -> io::Result<Self> {
        KernelFile::LoopControl.require().map_err(io::Error::other)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let fd = u32::try_from(file.as_raw_fd()).expect("an open file has no negative descriptor");
        let flags = if read_only { LO_FLAGS_DIRECT_IO | LO_FLAGS_READ_ONLY } else { LO_FLAGS_DIRECT_IO };
        let config = LoopConfig { fd, block_size, info: LoopInfo64::new(file_name, flags), reserved: [0; 8] };
        for _ in 0..ATTEMPTS {
            // SAFETY: the ioctl takes no argument and the descriptor is open.
            let number = unsafe { ioctl::loop_ctl_get_free(control.as_raw_fd()) }?;
            let device = Self { number: number.unsigned_abs() };
            let node = OpenOptions::new().read(true).write(!read_only).open(device.path())?;
            // SAFETY: the kernel reads one `struct loop_config`, which `config` has the layout of; both files are open.
            match unsafe { ioctl::loop_configure(node.as_raw_fd(), &raw const config) } {
                Ok(_) => return Ok(device),
                // Someone else took it in between.
                Err(Errno::EBUSY) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::EBUSY.into())
    }

    /// The loop device that shows the file of that path, if there is one.
    pub fn showing(file: &Path) -> Option<Self> {
        fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok()?;
            let device = Self { number };
            (device.file()? == file).then_some(device)
        })
    }

    /// Whether it shows that file, and has not been given another one since.
    pub fn shows(&self, file: &Path) -> bool {
        self.file().is_some_and(|shown| {
            // A process outside of the file's mount namespace is shown the path from the root of the file's mount.
            shown == file || file.file_name().is_some_and(|name| shown == Path::new("/").join(name))
        })
    }

    /// Its node in `/dev`.
    pub fn path(&self) -> PathBuf {
        format!("/dev/loop{}", self.number).into()
    }

    /// Whether it passes reads and writes on without a page cache of its own in between.
    pub fn is_direct(&self) -> bool {
        self.attribute("dio").is_some_and(|value| value == "1")
    }

    /// Whether it goes when its last user closes it.
    pub fn is_going(&self) -> bool {
        self.attribute("autoclear").is_some_and(|value| value == "1")
    }

    /// Takes over the size that its file has now; the size in bytes.
    pub fn take_size(&self) -> io::Result<u64> {
        let mut node = self.open(0)?;
        // SAFETY: the ioctl takes no argument and the descriptor is open.
        unsafe { ioctl::loop_set_capacity(node.as_raw_fd()) }?;
        node.seek(SeekFrom::End(0))
    }

    /// Writes out what was written to it and lets go of the file, unless someone else has it open for all of `patience`:
    /// programs that look at every device, such as udev's, do so for a moment.
    ///
    /// Not to be called by the process that serves the file, nor any other method that opens the device.
    pub fn clear(&self, patience: Duration, flush: Flush) -> io::Result<Cleared> {
        let deadline = Instant::now() + patience;
        // Opened exclusively: it is neither mounted nor part of another device, and cannot become so meanwhile.
        let node = loop {
            match self.open(libc::O_EXCL) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() >= deadline {
                        return Ok(Cleared::InUse);
                    }
                    thread::sleep(POLL);
                }
                // It is being cleared already.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(Cleared::Gone),
                result => break result?,
            }
        };
        flush.carry_out(&node, &self.path())?;
        let file = self.file();
        clear_on_last_close(&node)?;
        drop(node);
        if self.let_go_of(file.as_deref(), deadline) {
            return Ok(Cleared::Gone);
        }
        self.keep_after_all(file.as_deref())
    }

    /// Removes it when its last user closes it, or at once if it has no user.
    pub fn clear_when_unused(&self, patience: Duration) -> io::Result<Cleared> {
        let node = self.open(0)?;
        // The users' writes are theirs to flush; that an error is lost here is as with any device that is closed.
        node.sync_all().ok();
        let file = self.file();
        clear_on_last_close(&node)?;
        drop(node);
        let gone = self.let_go_of(file.as_deref(), Instant::now() + patience);
        Ok(if gone { Cleared::Gone } else { Cleared::InUse })
    }

    /// Takes back [`clear_on_last_close`], which others must not suffer from without having been asked.
    fn keep_after_all(&self, file: Option<&Path>) -> io::Result<Cleared> {
        let info = LoopInfo64::new(file.unwrap_or(Path::new("")), 0);
        let node = match self.open(0) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(Cleared::Gone),
            node => node?,
        };
        // SAFETY: the kernel reads one `struct loop_info64`, which `info` has the layout of, and the descriptor is open.
        match unsafe { ioctl::loop_set_status64(node.as_raw_fd(), &raw const info) } {
            Ok(_) => Ok(Cleared::InUse),
            // Its last user went just now.
            Err(Errno::ENXIO) => Ok(Cleared::Gone),
            Err(errno) => Err(errno.into()),
        }
    }

    fn let_go_of(&self, file: Option<&Path>, deadline: Instant) -> bool {
        // Looking into sysfs only: whoever opens the device is a user of it.
        while self.file().as_deref() == file {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }

    fn open(&self, flags: i32) -> io::Result<File> {
        let read_only = self.block_attribute("ro").is_some_and(|value| value == "1");
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(self.path())
    }

    /// The file that it shows, as the kernel names it.
    fn file(&self) -> Option<PathBuf> {
        let path = self.attribute("backing_file")?;
        Some(path.strip_suffix(" (deleted)").unwrap_or(&path).into())
    }

    fn attribute(&self, name: &str) -> Option<String> {
        self.block_attribute(&format!("loop/{name}"))
    }

    fn block_attribute(&self, name: &str) -> Option<String> {
        let value = fs::read_to_string(format!("/sys/block/loop{}/{name}", self.number)).ok()?;
        Some(value.trim_end_matches('\n').to_owned())
    }
}

/// What LOOP_CLR_FD does since Linux 6.11; before, it cleared at once if there was no other user.
fn clear_on_last_close(node: &File) -> nix::Result<()> {
    // SAFETY: the ioctl takes no argument and the descriptor is open.
    match unsafe { ioctl::loop_clr_fd(node.as_raw_fd()) } {
        Ok(_) | Err(Errno::ENXIO) => Ok(()),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// linux/loop.h on 64-bit machines.
    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!((size_of::<LoopInfo64>(), size_of::<LoopConfig>()), (232, 304));
        assert_eq!(std::mem::offset_of!(LoopInfo64, flags), 52);
    }

    #[test]
    fn unbound_devices_show_nothing() {
        let device = LoopDevice { number: 9999 };
        assert!(!device.shows(Path::new("/x/volume")) && !device.is_going() && !device.is_direct());
        assert_eq!(LoopDevice::showing(Path::new("/no/such/file")), None);
    }
}
