//! The file system on a device: how large it is, which libblkid of many distributions does not say, and whether it may be moved.

use std::{
    fmt,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use super::header::{VolumeError, signatures};
use crate::sys::device::DeviceError;

/// Those whose size is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext,
    Xfs,
    Btrfs,
}

/// A file system.
#[derive(Debug)]
pub struct FileSystem {
    pub kind: Kind,
    pub size_bytes: u64,
    /// It reads and writes no less at a time: a device with larger sectors than that it cannot use.
    pub unit_bytes: u64,
}

/// What is on the device is not a file system that can be moved, in words.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfit {
    /// What is there instead, if anything.
    Other(Option<String>),
    /// It was not unmounted in good order.
    Unclean(Kind),
    /// It has other devices, too.
    Spread(Kind),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        })
    }
}

/// The first bytes of a device: all superblocks that are read here.
const START_BYTES: usize = (64 << 10) + 4096;

/// The one file system on an open device, if there is nothing else. `path` is for messages.
pub fn find(path: &Path, device: &File) -> Result<Result<FileSystem, Unfit>, VolumeError> {
    // By its descriptor: the path may lead elsewhere by now.
    let opened = format!("/proc/self/fd/{}", device.as_raw_fd());
    let found = signatures::find(opened.as_ref());
    let found = found.map_err(|source| VolumeError::Signatures { path: path.to_owned(), source })?;
    let is_one = found.as_deref().is_some_and(|found| {
        let name = found.split_whitespace().next().unwrap_or_default();
        !found.contains(',') && ["ext2", "ext3", "ext4", "xfs", "btrfs"].contains(&name)
    });
    if !is_one {
        return Ok(Err(Unfit::Other(found)));
    }
    let mut start = vec![0; START_BYTES];
    match device.read_exact_at(&mut start, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Err(Unfit::Other(found))),
        read => read.map_err(DeviceError::io("read", path))?,
    }
    Ok(parse(&start).map_or(Err(Unfit::Other(found)), |(_, found)| found))
}

/// Where a device has a superblock that is read here, whatever else is on it.
pub fn superblock(device: &File) -> io::Result<Option<u64>> {
    let mut start = vec![0; START_BYTES];
    device.read_exact_at(&mut start, 0)?;
    Ok(parse(&start).map(|(at, _)| at))
}

/// Where the superblock's part of the device begins, and what it says; `None` if there is none of those.
fn parse(start: &[u8]) -> Option<(u64, Result<FileSystem, Unfit>)> {
    let at_start = ext(&start[1024..2048]).or_else(|| xfs(&start[..512])).map(|found| (0, found));
    at_start.or_else(|| btrfs(&start[64 << 10..]).map(|found| (64 << 10, found)))
}

/// Documentation/filesystems/ext4/super.rst
fn ext(block: &[u8]) -> Option<Result<FileSystem, Unfit>> {
    const CLEAN: u16 = 1;
    const ERRORS: u16 = 2;
    const NEEDS_RECOVERY: u32 = 4;
    const JOURNAL_DEVICE: u32 = 8;
    const HAS_JOURNAL: u32 = 4;
    const SIXTY_FOUR_BITS: u32 = 0x80;
    let number = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let short = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    if short(56) != 0xEF53 {
        return None;
    }
    let (features, state) = (number(96), short(58));
    let is_journal_elsewhere = number(92) & HAS_JOURNAL != 0 && number(224) == 0;
    if features & JOURNAL_DEVICE != 0 || is_journal_elsewhere {
        return Some(Err(Unfit::Spread(Kind::Ext)));
    }
    if features & NEEDS_RECOVERY != 0 || state & CLEAN == 0 || state & ERRORS != 0 {
        return Some(Err(Unfit::Unclean(Kind::Ext)));
    }
    let high = if features & SIXTY_FOUR_BITS == 0 { 0 } else { u64::from(number(336)) << 32 };
    let unit_bytes = 1024_u64.checked_shl(number(24)).filter(|bytes| *bytes <= 64 << 10)?;
    sized(Kind::Ext, high | u64::from(number(4)), unit_bytes, unit_bytes)
}

/// The xfs_dsb structure (fs/xfs/libxfs/xfs_format.h).
fn xfs(block: &[u8]) -> Option<Result<FileSystem, Unfit>> {
    if !block.starts_with(b"XFSB") {
        return None;
    }
    let long = |at: usize| block[at..at + 8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let block_bytes = long(4) >> 32;
    let (blocks, real_time_blocks, log) = (long(8), long(16), long(48));
    if real_time_blocks != 0 || log == 0 {
        return Some(Err(Unfit::Spread(Kind::Xfs)));
    }
    if block[126] != 0 {
        return Some(Err(Unfit::Unclean(Kind::Xfs)));
    }
    sized(Kind::Xfs, blocks, block_bytes, u64::from(u16::from_be_bytes([block[102], block[103]])))
}

/// The btrfs_super_block structure (include/uapi/linux/btrfs_tree.h).
fn btrfs(block: &[u8]) -> Option<Result<FileSystem, Unfit>> {
    if block[64..72] != *b"_BHRfS_M" {
        return None;
    }
    let long = |at: usize| block[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    if long(136) != 1 {
        return Some(Err(Unfit::Spread(Kind::Btrfs)));
    }
    // A tree that is to be replayed.
    if long(96) != 0 {
        return Some(Err(Unfit::Unclean(Kind::Btrfs)));
    }
    // The device's own bytes, in its item.
    sized(Kind::Btrfs, long(201 + 8), 1, long(144) & 0xffff_ffff)
}

fn sized(kind: Kind, blocks: u64, block_bytes: u64, unit_bytes: u64) -> Option<Result<FileSystem, Unfit>> {
    let size_bytes = blocks.checked_mul(block_bytes).filter(|bytes| *bytes > 0 && unit_bytes.is_power_of_two())?;
    (unit_bytes >= 512).then_some(Ok(FileSystem { kind, size_bytes, unit_bytes }))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn made(make: &str) -> (tempfile::NamedTempFile, Result<FileSystem, Unfit>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(400 << 20).unwrap();
        let command = format!("{make} {}", file.path().display());
        let made = Command::new("sh").args(["-c", &command]).output().unwrap();
        assert!(made.status.success(), "{command}: {}", String::from_utf8_lossy(&made.stderr));
        let found = find(file.path(), file.as_file()).unwrap();
        (file, found)
    }

    #[test]
    fn the_size_is_what_the_tool_has_made() {
        for (make, kind, size_bytes, unit_bytes) in [
            ("f() { mkfs.ext4 -qF $1 100m; }; f", Kind::Ext, 100 << 20, 1024),
            ("f() { mkfs.ext4 -qF -b 4096 $1 300m; }; f", Kind::Ext, 300 << 20, 4096),
            ("f() { mkfs.ext2 -qF -b 1024 $1 77m; }; f", Kind::Ext, 77 << 20, 1024),
        ] {
            let found = made(make).1.unwrap();
            assert_eq!((found.kind, found.size_bytes, found.unit_bytes), (kind, size_bytes, unit_bytes), "{make}");
        }
        let has = |program: &str| {
            Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success()
        };
        if has("mkfs.xfs") {
            let found = made("mkfs.xfs -q -f -d size=320m").1.unwrap();
            assert_eq!((found.kind, found.size_bytes, found.unit_bytes), (Kind::Xfs, 320 << 20, 512));
        }
        if has("mkfs.btrfs") {
            let found = made("mkfs.btrfs -q -f -b 256m").1.unwrap();
            assert_eq!((found.kind, found.size_bytes, found.unit_bytes), (Kind::Btrfs, 256 << 20, 4096));
        }
    }

    #[test]
    fn what_is_no_file_system_or_not_that_alone_is_unfit() {
        let words = |make: &str| match made(make).1.unwrap_err() {
            Unfit::Other(found) => found.unwrap_or_default(),
            other => panic!("{other:?}"),
        };
        assert_eq!(words("true"), "");
        assert!(words("mkswap -q").starts_with("swap"));
        assert!(words("f() { echo ,,L | sfdisk -q $1; }; f").contains("partition table"));
        let both = words("f() { mkfs.ext4 -qF $1; printf _BHRfS_M | dd of=$1 bs=1 seek=65600 conv=notrunc; }; f");
        assert!(both.contains("ext4") && both.contains("btrfs"), "{both}");
        assert_eq!(
            made("f() { mkfs.ext4 -qF $1; debugfs -w -R 'feature needs_recovery' $1; }; f").1.unwrap_err(),
            Unfit::Unclean(Kind::Ext)
        );
    }

    #[test]
    fn a_superblock_of_odd_numbers_is_none() {
        for fill in [0, 0xff] {
            let mut start = vec![fill; START_BYTES];
            start[1024 + 56..][..2].copy_from_slice(&0xEF53_u16.to_le_bytes());
            assert!(!matches!(parse(&start), Some((_, Ok(_)))));
            let mut start = vec![fill; START_BYTES];
            start[..4].copy_from_slice(b"XFSB");
            assert!(!matches!(parse(&start), Some((_, Ok(_)))));
            let mut start = vec![fill; START_BYTES];
            start[(64 << 10) + 64..][..8].copy_from_slice(b"_BHRfS_M");
            assert!(!matches!(parse(&start), Some((_, Ok(_)))));
        }
    }
}
