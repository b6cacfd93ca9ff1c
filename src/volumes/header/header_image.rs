//! A header in memory: read once, then checked and used, or made and then written.
//!
//! Storage may be hostile and answer a second read with other bytes than the first, so what was checked must be what is
//! activated; and a header that is being made must be whole before any of it is on the device.

use std::{
    fs::File,
    io,
    ops::RangeInclusive,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
    sync::Arc,
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{copies::Copies, reencryption};

/// The first bytes of LUKS headers, version 1 and 2 (LUKS2 On-Disk Format section 2.1).
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// The largest keyslot area that libcryptsetup makes (LUKS2_MAX_KEYSLOTS_SIZE), and the metadata before it.
pub const LARGEST_BYTES: u64 = (128 + 8) << 20;

/// The bytes of a header, in an anonymous sparse file at least as long as the device at whose start they stand.
#[derive(Clone, Debug)]
pub struct HeaderImage(Arc<File>);

impl HeaderImage {
    /// An empty image for a device of `len` bytes.
    pub fn empty(len: u64) -> io::Result<Self> {
        let file = File::from(memfd_create(c"cryptattach header", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len)?;
        Ok(Self(Arc::new(file)))
    }

    /// The first `wanted` bytes of `device`, which is `len` bytes long. The image is as long as any header, also if the device
    /// was cut short: then the checks blame the device, and libcryptsetup does not blame the header.
    pub fn read(device: &File, len: u64, wanted: u64) -> io::Result<Self> {
        let image = Self::empty(len.max(LARGEST_BYTES))?;
        image.copy(device, &image.0, 0, wanted.min(len))?;
        Ok(image)
    }

    /// The metadata of a header with another JSON area, for a device of `len` bytes.
    pub fn of(len: u64, copies: &Copies, json: &serde_json::Value) -> io::Result<Self> {
        let image = Self::empty(len.max(LARGEST_BYTES))?;
        copies.write(&image.0, json)?;
        Ok(image)
    }

    /// Takes over the metadata of an image that was checked, so that what was read later adds the keyslots only.
    pub fn take_metadata(&self, checked: &Self) -> io::Result<()> {
        let end = checked.metadata_len()?;
        self.copy(&checked.0, &self.0, 0, end)
    }

    /// Finishes a re-encryption that has done all data, so that libcryptsetup never sees it in its last moments. Whether there
    /// was one.
    pub fn finish(&self) -> io::Result<bool> {
        let Some(copies) = Copies::read(&self.0)? else { return Ok(false) };
        let finished = reencryption::finished(&copies.json);
        finished.map_or(Ok(false), |json| copies.write(&self.0, &json).map(|()| true))
    }

    /// The bytes of its metadata.
    pub fn metadata(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.metadata_len()?).map_err(io::Error::other)?];
        self.0.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn metadata_len(&self) -> io::Result<u64> {
        Ok(metadata_len(&self.0)?.unwrap_or(0).min(self.0.metadata()?.len()))
    }

    /// The file that it is in.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// Its first block.
    pub fn first_block(&self) -> io::Result<[u8; 4096]> {
        first_block(&self.0)
    }

    /// A path by which libcryptsetup opens the image.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    /// Writes the first `len` bytes to `device`, the first block last: until all else is on stable storage the device
    /// carries no LUKS magic, so that a half-written header is never taken for a whole one.
    pub fn write_to(&self, device: &File, len: u64) -> io::Result<()> {
        const FIRST_BLOCK: u64 = 4096;
        device.write_all_at(&[0; FIRST_BLOCK as usize], 0)?;
        device.sync_all()?;
        self.copy(&self.0, device, FIRST_BLOCK, len)?;
        device.sync_all()?;
        self.copy(&self.0, device, 0, FIRST_BLOCK)?;
        device.sync_all()
    }

    fn copy(&self, from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
        const CHUNK: u64 = 1 << 20;
        let mut buffer = vec![0; CHUNK as usize];
        let mut at = start;
        while at < end {
            let chunk = &mut buffer[..(end - at).min(CHUNK) as usize];
            from.read_exact_at(chunk, at)?;
            to.write_all_at(chunk, at)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }
}

/// The first block of a device; a shorter one is filled up with zeroes.
pub fn first_block(device: &File) -> io::Result<[u8; 4096]> {
    let (mut block, mut filled) = ([0; 4096], 0);
    while filled < block.len() {
        match device.read_at(&mut block[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(block)
}

/// How far the metadata of the LUKS header on a device reaches; `None` if there is none.
///
/// The answer is bounded whatever the header says: LUKS2 metadata has at most 4 MiB (twice), and a LUKS1 header's 592
/// bytes fit the first block. Where the first copy of a LUKS2 header is damaged, its second one tells.
pub fn metadata_len(device: &File) -> io::Result<Option<u64>> {
    const LARGEST_LUKS2_METADATA: u64 = 4 << 20;
    let first = first_block(device)?;
    if first[..6] != MAGIC {
        return Ok(second_copy(device)?.map(|at| at * 2));
    }
    if first[6..8] != [0, 2] {
        return Ok(Some(4096));
    }
    // Binary header and JSON area, and their second copy behind them.
    let size = number(&first, 8);
    let is_right =
        size.is_power_of_two() && SECOND_COPIES.contains(&size.trailing_zeros()) && is_second_copy(device, size)?;
    let size = if is_right { size } else { second_copy(device)?.unwrap_or(size) };
    Ok(Some(size.clamp(4096, LARGEST_LUKS2_METADATA) * 2))
}

/// Where the second copy of a LUKS2 header may stand (LUKS2 On-Disk Format section 2.2), as powers of two.
pub const SECOND_COPIES: RangeInclusive<u32> = 14..=22;
/// How it begins.
pub const SECOND_MAGIC: [u8; 8] = *b"SKUL\xba\xbe\0\x02";

fn second_copy(device: &File) -> io::Result<Option<u64>> {
    for at in SECOND_COPIES.map(|power| 1 << power) {
        if is_second_copy(device, at)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

fn is_second_copy(device: &File, at: u64) -> io::Result<bool> {
    let mut block = [0; 512];
    match device.read_exact_at(&mut block, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        read => read?,
    }
    // It says itself where it is; an old one in the middle of other data does not fool us.
    Ok(block[..8] == SECOND_MAGIC && number(&block, 8) == at && number(&block, 256) == at)
}

/// A big-endian number in a header.
pub fn number(block: &[u8], at: usize) -> u64 {
    block[at..at + 8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
