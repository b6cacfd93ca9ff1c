//! Whether a device is blank: neither a signature that libblkid knows, nor any byte that is not zero.
//!
//! What has no signature may be plain dm-crypt, a data base's raw device, or a volume whose header was lost: only the bytes
//! tell. All of a device's bytes are looked at up to a gigabyte (of a file: what is not a hole). Of more, the start, the end
//! and samples between are.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use nix::unistd::{Whence, lseek};

use super::{VolumeError, signatures};
use crate::sys::device::DeviceError;

/// So much is looked at in full.
const FULL_BYTES: u64 = 1 << 30;
/// All of the end: RAID members, GPT's second copy, ZFS labels.
const END_BYTES: u64 = 1 << 20;
/// In between, so many blocks, evenly spread.
const SAMPLES: u64 = 4096;
const BLOCK_BYTES: u64 = 4096;

/// What stands on an open device, and where, in words; `None` if it is blank. `path` is for messages.
pub fn find(path: &Path, device: &File, size_bytes: u64) -> Result<Option<String>, VolumeError> {
    // By its descriptor: the path may lead elsewhere by now.
    let opened = format!("/proc/self/fd/{}", device.as_raw_fd());
    let known = signatures::find(opened.as_ref());
    if let Some(found) = known.map_err(|source| VolumeError::Signatures { path: path.to_owned(), source })? {
        return Ok(Some(found));
    }
    let data = first_data(device, size_bytes).map_err(DeviceError::io("read", path))?;
    Ok(data.map(|at| format!("data at byte {at}, of no known kind (plain dm-crypt looks like that)")))
}

/// Where the first byte that is not zero was found; `None` if all that was looked at is zero.
fn first_data(device: &File, size_bytes: u64) -> io::Result<Option<u64>> {
    let (mut reader, mut looked_at, mut at) = (Reader::new(device), 0, 0);
    while at < size_bytes && looked_at < FULL_BYTES {
        let Some(data) = next_data(device, at, size_bytes)? else { return Ok(None) };
        let range = data.start..data.end.min(data.start + FULL_BYTES - looked_at);
        if let Some(found) = reader.first_data(range.clone())? {
            return Ok(Some(found));
        }
        looked_at += range.end - range.start;
        at = range.end;
    }
    if at >= size_bytes {
        return Ok(None);
    }
    let end = size_bytes.saturating_sub(END_BYTES).max(at)..size_bytes;
    let step = (end.start - at) / SAMPLES;
    let blocks = (0..SAMPLES).filter(|_| step > 0).map(|n| at + n * step / BLOCK_BYTES * BLOCK_BYTES);
    let between = blocks.map(|at| at..(at + BLOCK_BYTES).min(end.start));
    for range in [end.clone()].into_iter().chain(between) {
        if let Some(found) = reader.first_data(range)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The next stretch that is not a hole (lseek(2), SEEK_DATA); a block device and some file systems have no holes.
fn next_data(device: &File, at: u64, size_bytes: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |at: u64, whence| {
        let found = lseek(device, i64::try_from(at).map_err(io::Error::other)?, whence);
        Ok::<_, io::Error>(found.map(|found| found.unsigned_abs().min(size_bytes)))
    };
    let start = match seek(at, Whence::SeekData)? {
        Err(nix::errno::Errno::ENXIO) if is_file(device)? => return Ok(None),
        Err(_) => return Ok(Some(at..size_bytes)),
        Ok(start) if start >= size_bytes => return Ok(None),
        Ok(start) => start,
    };
    let end = seek(start, Whence::SeekHole)?.unwrap_or(size_bytes);
    Ok(Some(start..end.max(start + 1)))
}

fn is_file(device: &File) -> io::Result<bool> {
    Ok(device.metadata()?.is_file())
}

struct Reader<'a> {
    device: &'a File,
    buffer: Vec<u8>,
    zeroes: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(device: &'a File) -> Self {
        const AT_ONCE: usize = 1 << 20;
        Self { device, buffer: vec![0; AT_ONCE], zeroes: vec![0; AT_ONCE] }
    }

    fn first_data(&mut self, range: Range<u64>) -> io::Result<Option<u64>> {
        let mut at = range.start;
        while at < range.end {
            let length = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(self.buffer.len());
            let bytes = &mut self.buffer[..length];
            self.device.read_exact_at(bytes, at)?;
            if *bytes != self.zeroes[..length] {
                return Ok(bytes.iter().position(|byte| *byte != 0).map(|found| at + found as u64));
            }
            at += length as u64;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_data_anywhere_that_matters() {
        let size = 8 << 30;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        assert_eq!(first_data(&file, size).unwrap(), None);
        // One byte, wherever: a sparse file has not much to look at.
        for at in [0, (32 << 20) - 1, 5 << 30 | 4711, size - 1] {
            file.write_all_at(&[1], at).unwrap();
            assert_eq!(first_data(&file, size).unwrap(), Some(at));
            file.write_all_at(&[0], at).unwrap();
        }
        let small = tempfile::tempfile().unwrap();
        small.set_len(5000).unwrap();
        small.write_all_at(&[1], 4999).unwrap();
        assert_eq!(first_data(&small, 5000).unwrap(), Some(4999));
    }

    #[test]
    fn says_what_stands_where() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let find = || find(file.path(), file.as_file(), 1 << 20).unwrap();
        assert_eq!(find(), None);
        file.as_file().write_all_at(b"x", 70_000).unwrap();
        assert!(find().unwrap().starts_with("data at byte 70000, of no known kind"));
        file.as_file().write_all_at(&[1, 0, 0, 0, 255], 1024).unwrap();
        file.as_file().write_all_at(b"SWAPSPACE2", 4086).unwrap();
        assert_eq!(find().unwrap(), "swap (at byte 4086)");
    }
}
