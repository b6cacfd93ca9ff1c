//! Telling a device or file that a range is not needed any more.
#![allow(unsafe_code)] // ioctl(2)

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    libc,
};

mod ioctl {
    // linux/fs.h
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// Discards a range of a block device (its start and length are multiples of the device's blocks), or makes it a hole in a
/// file. `EOPNOTSUPP` if that cannot be done here.
pub fn discard(backing: &File, bytes: Range<u64>) -> io::Result<()> {
    let (start, length) = (bytes.start, bytes.end - bytes.start);
    if backing.metadata()?.file_type().is_block_device() {
        let range = [start, length];
        // SAFETY: the kernel reads two 64-bit numbers, start and length, and the descriptor is open.
        unsafe { ioctl::blkdiscard(backing.as_raw_fd(), &raw const range) }?;
        return Ok(());
    }
    let fits = |number: u64| libc::off_t::try_from(number).map_err(|_| Errno::EFBIG);
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(backing, hole, fits(start)?, fits(length)?)?)
}
