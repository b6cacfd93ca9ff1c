//! The data area of a volume as a range of plaintext bytes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{PoisonError, RwLock},
};

use nix::libc;

use super::xts::Xts;
use crate::{
    device::{Device, DeviceKind},
    volume::Geometry,
};

/// Reads and writes plaintext; the bytes on the device are always encrypted.
pub struct Image {
    file: File,
    xts: Xts,
    data_offset: u64,
    size: u64,
    /// What is read and written at once: the encryption sector, or the device's logical block if that is larger.
    unit: u64,
    /// Writers of whole units share it; whoever must read, change and write a unit has it alone.
    partial: RwLock<()>,
}

/// Memory for one request, aligned for direct I/O and used again.
#[derive(Default)]
pub struct Buffer(Vec<u8>);

const ALIGNMENT: usize = 4096;

impl Buffer {
    /// `len` bytes at an aligned address; their content is left over from earlier use.
    fn take(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len + ALIGNMENT {
            self.0.resize(len + ALIGNMENT, 0);
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + len]
    }
}

impl Image {
    /// Opens the device, a block device exclusively. Direct I/O where it goes: written back through the page cache, the
    /// worker's own dirty pages would have to wait for the worker when memory is short.
    pub fn open(device: &Device, geometry: &Geometry, xts: Xts, read_only: bool) -> io::Result<Self> {
        let block = u64::from(device.logical_block_bytes);
        let unit = u64::from(geometry.sector_size.bytes()).max(block);
        let aligned = [geometry.data_offset_bytes, geometry.size_bytes].iter().all(|at| at.is_multiple_of(unit));
        let exclusive = if matches!(device.kind, DeviceKind::Block(_)) { libc::O_EXCL } else { 0 };
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!read_only)
                .custom_flags(libc::O_CLOEXEC | exclusive | flags)
                .open(&device.path)
        };
        let buffered = |why: &str| -> io::Result<_> {
            tracing::warn!("{} goes through the page cache: {why}", device.path.display());
            Ok((open(0)?, u64::from(geometry.sector_size.bytes())))
        };
        let (file, unit) = match aligned {
            false => buffered("its data is not aligned to its blocks")?,
            true => match open(libc::O_DIRECT) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => buffered("it has no direct I/O")?,
                file => (file?, unit),
            },
        };
        let Geometry { data_offset_bytes: data_offset, size_bytes: size, .. } = *geometry;
        Ok(Self { file, xts, data_offset, size, unit, partial: RwLock::new(()) })
    }

    /// The backing file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length of the plaintext in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads up to `len` bytes from `at`; fewer only at the end.
    pub fn read<'b>(&self, at: u64, len: usize, buffer: &'b mut Buffer) -> io::Result<&'b [u8]> {
        let end = at.saturating_add(len as u64).min(self.size);
        if at >= end {
            return Ok(&[]);
        }
        let first = at - at % self.unit;
        let units = buffer.take((end.next_multiple_of(self.unit) - first) as usize);
        self.read_units(first, units)?;
        Ok(&units[(at - first) as usize..(end - first) as usize])
    }

    /// Writes all of `data` at `at`, or fails; past the end there is no space.
    pub fn write(&self, at: u64, data: &[u8], buffer: &mut Buffer) -> io::Result<()> {
        let end = at.checked_add(data.len() as u64).filter(|end| *end <= self.size);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        if at.is_multiple_of(self.unit) && end.is_multiple_of(self.unit) {
            let _shared = self.partial.read().unwrap_or_else(PoisonError::into_inner);
            let units = buffer.take(data.len());
            units.copy_from_slice(data);
            return self.write_units(at, units);
        }
        let _alone = self.partial.write().unwrap_or_else(PoisonError::into_inner);
        let first = at - at % self.unit;
        let units = buffer.take((end.next_multiple_of(self.unit) - first) as usize);
        self.read_units(first, units)?;
        units[(at - first) as usize..(end - first) as usize].copy_from_slice(data);
        self.write_units(first, units)
    }

    /// Returns once all that was written is on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn read_units(&self, at: u64, units: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(units, self.data_offset + at)?;
        self.xts.decrypt(units, at);
        Ok(())
    }

    fn write_units(&self, at: u64, units: &mut [u8]) -> io::Result<()> {
        self.xts.encrypt(units, at);
        self.file.write_all_at(units, self.data_offset + at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        key::{KeySize, VolumeKey},
        volume::SectorSize,
    };

    const OFFSET: u64 = 8192;
    const SIZE: u64 = 64 * 1024;

    fn image(sector_size: SectorSize, key: &VolumeKey) -> (tempfile::NamedTempFile, Image) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(OFFSET + SIZE).unwrap();
        let geometry = Geometry { sector_size, data_offset_bytes: OFFSET, size_bytes: SIZE, iv_offset_sectors: 0 };
        let xts = Xts::new(key, sector_size, 0);
        let image = Image::open(&Device::look(file.path()).unwrap(), &geometry, xts, false).unwrap();
        (file, image)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn behaves_like_plain_memory(
            large in any::<bool>(),
            writes in proptest::collection::vec((0..SIZE, 1..9000_usize, any::<u8>()), 1..20),
        ) {
            let sector_size = if large { SectorSize::B4096 } else { SectorSize::B512 };
            let key = VolumeKey::random(KeySize::Bits512).unwrap();
            let (_file, image) = image(sector_size, &key);
            let mut buffer = Buffer::default();
            let mut model = image.read(0, SIZE as usize, &mut buffer).unwrap().to_vec();
            for (at, len, byte) in writes {
                let data = vec![byte; len];
                let end = at as usize + len;
                match image.write(at, &data, &mut buffer) {
                    Ok(()) => model[at as usize..end].copy_from_slice(&data),
                    Err(error) => {
                        prop_assert!(end as u64 > SIZE);
                        prop_assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                    }
                }
                let read = image.read(at, len, &mut buffer).unwrap();
                prop_assert_eq!(read, &model[at as usize..end.min(SIZE as usize)]);
            }
            prop_assert_eq!(image.read(0, SIZE as usize, &mut buffer).unwrap(), &model[..]);
            prop_assert!(image.read(SIZE, 1, &mut buffer).unwrap().is_empty());
        }
    }

    #[test]
    fn overlapping_partial_writes_lose_nothing() {
        let key = VolumeKey::random(KeySize::Bits256).unwrap();
        let (_file, image) = image(SectorSize::B4096, &key);
        // Eight writers, each with its own 512 bytes of one and the same sector.
        std::thread::scope(|scope| {
            for part in 0..8_u8 {
                let image = &image;
                scope.spawn(move || {
                    let mut buffer = Buffer::default();
                    for _ in 0..50 {
                        image.write(u64::from(part) * 512, &[part; 512], &mut buffer).unwrap();
                    }
                });
            }
        });
        let mut buffer = Buffer::default();
        let sector = image.read(0, 4096, &mut buffer).unwrap();
        assert!(sector.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 512));
    }
}
