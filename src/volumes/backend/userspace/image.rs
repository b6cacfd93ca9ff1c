//! The encrypted data area as a range of plaintext bytes.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
};

use super::{
    buffers::{Buffer, Buffers},
    ciphers::Ciphers,
    discard::discard,
    ranges::{Access, Ranges},
};
use crate::volumes::header::Geometry;

/// Written again and again where zeroes are to be read.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A volume's plaintext, over its open device.
pub struct Image {
    backing: File,
    cipher: Ciphers,
    data_offset: u64,
    /// It may grow.
    size: AtomicU64,
    /// What is read and written at once: the encryption sector, or the device's block where that is larger.
    unit: u64,
    /// A writer has its units for itself. One that writes a part reads, changes and writes back a whole unit, and would
    /// undo what another wrote to the rest of it; and of two that write the same unit, the device may keep a half each.
    requests: Ranges,
    buffers: Arc<Buffers>,
    discards: bool,
}

/// A request widened to whole units.
struct Span {
    /// Where the first unit begins in the plaintext.
    start: u64,
    /// Length of all units.
    length: usize,
    /// Where the request begins in the span.
    skip: usize,
}

/// A write that has its data.
pub struct Write {
    span: Span,
    /// Of the data; if it is less than the span's, the units are plaintext, with nothing beside the data.
    length: usize,
    units: Buffer,
}

impl Write {
    /// Number of bytes that it writes.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Span {
    fn range(&self) -> Range<u64> {
        self.start..self.start + self.length as u64
    }
}

impl Image {
    /// Takes the open device (or file). `device_block_bytes` is the smallest unit that the device reads or writes.
    ///
    /// The device is switched to direct I/O where that works. Otherwise it is read and written through the page cache,
    /// which is safe, but a host that is short of memory may stall: writing back our plaintext's pages then needs
    /// memory for the ciphertext's pages.
    pub fn new(backing: File, geometry: &Geometry, cipher: Ciphers, device_block_bytes: u32) -> Self {
        let sector = u64::from(geometry.sector_size.bytes());
        let (data_offset, size) = (geometry.data_offset_bytes, geometry.size_bytes);
        // Widening to the device's blocks must not touch what is before or behind the data.
        let fits = |unit: u64| data_offset.is_multiple_of(unit) && size.is_multiple_of(unit);
        let direct = [512, 1024, 2048, 4096]
            .into_iter()
            .filter(|block| *block >= device_block_bytes)
            .find(|block| reads_directly(&backing, *block as usize))
            .map(|block| sector.max(u64::from(block)))
            .filter(|unit| fits(*unit));
        if direct.is_none() {
            tracing::warn!("no direct I/O: reads and writes go through the page cache");
            set_direct(&backing, false).ok();
        }
        let unit = direct.unwrap_or(sector);
        let (size, requests, buffers) = (AtomicU64::new(size), Ranges::default(), Arc::default());
        Self { backing, cipher, data_offset, size, unit, requests, buffers, discards: false }
    }

    /// Has [`Self::discard`] reach the device.
    pub fn with_discards(self, discards: bool) -> Self {
        Self { discards, ..self }
    }

    /// Whether discards reach the device.
    pub fn passes_discards(&self) -> bool {
        self.discards
    }

    /// The name of the XTS engine.
    pub fn engine_name(&self) -> &'static str {
        self.cipher.engine_name()
    }

    /// Number of plaintext bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Makes it larger, if the device is large enough for that.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        let device_bytes = (&self.backing).seek(SeekFrom::End(0))?;
        let most = device_bytes.saturating_sub(self.data_offset);
        if size < self.size() || size > most || !size.is_multiple_of(self.unit) {
            return Err(Errno::EINVAL.into());
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// The unit that needs no read before a write: block size for whatever is put on top.
    pub fn unit_bytes(&self) -> u32 {
        u32::try_from(self.unit).expect("at most 4096")
    }

    /// Reads `length` bytes at `offset`; fewer at the end, none behind it.
    pub fn read_at(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        let rest = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = length.min(rest);
        if length == 0 {
            return Ok(self.buffers.take(0));
        }
        let span = self.span(offset, length);
        let mut units = self.buffers.take(span.length);
        let _shared = self.requests.claim(span.range(), Access::Read);
        self.load(span.start, &mut units)?;
        Ok(units.narrow(span.skip..span.skip + length))
    }

    /// Writes all of `data` at `offset`; beyond the end is `ENOSPC`, as block devices have it.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.commit(self.prepare(offset, data)?)
    }

    /// Takes the data of a write, which is not needed any more then: it is encrypted into a buffer, or copied if it is a
    /// part of a unit.
    pub fn prepare(&self, offset: u64, data: &[u8]) -> io::Result<Write> {
        self.check(offset, data.len() as u64)?;
        let span = self.span(offset, data.len());
        let mut units = self.buffers.take(span.length);
        if span.length == data.len() {
            self.cipher.encrypt(span.start, data, &mut units);
        } else {
            units[span.skip..span.skip + data.len()].copy_from_slice(data);
        }
        Ok(Write { span, length: data.len(), units })
    }

    /// Writes what was prepared.
    pub fn commit(&self, write: Write) -> io::Result<()> {
        let Write { span, length, mut units } = write;
        if length == 0 {
            return Ok(());
        }
        let _alone = self.requests.claim(span.range(), Access::Write);
        if span.length != length {
            let mut whole = self.buffers.take(span.length);
            self.load(span.start, &mut whole)?;
            let data = span.skip..span.skip + length;
            whole[data.clone()].copy_from_slice(&units[data]);
            self.cipher.encrypt(span.start, &whole, &mut units);
        }
        self.backing.write_all_at(&units, self.data_offset + span.start)
    }

    /// Makes the range read as zeroes. The device is written to: a hole in the ciphertext would be noise.
    pub fn write_zeroes(&self, mut offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let end = offset + length;
        while offset < end {
            // Up to the next multiple, so that all but the first and the last are whole units.
            let piece = (ZEROES.len() as u64 - offset % ZEROES.len() as u64).min(end - offset);
            self.write_at(offset, &ZEROES[..usize::try_from(piece).expect("at most all")])?;
            offset += piece;
        }
        Ok(())
    }

    /// Tells the device that the range is not needed any more, where that was allowed; what it reads as is not defined
    /// then. Parts of units keep their data.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let (start, end) = (offset.next_multiple_of(self.unit), (offset + length) / self.unit * self.unit);
        if !self.discards || start >= end {
            return Ok(());
        }
        let _alone = self.requests.claim(start..end, Access::Write);
        match discard(&self.backing, self.data_offset + start..self.data_offset + end) {
            // It is advice. Not every device or file system takes it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    /// Waits until all that was written is on the device, its own cache included.
    pub fn flush(&self) -> io::Result<()> {
        self.backing.sync_data()
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.size());
        if fits { Ok(()) } else { Err(Errno::ENOSPC.into()) }
    }

    fn span(&self, offset: u64, length: usize) -> Span {
        let start = offset - offset % self.unit;
        let end = (offset + length as u64).next_multiple_of(self.unit);
        let fit = |bytes: u64| usize::try_from(bytes).expect("the request itself lies in memory");
        Span { start, length: fit(end - start), skip: fit(offset - start) }
    }

    fn load(&self, start: u64, units: &mut [u8]) -> io::Result<()> {
        self.backing.read_exact_at(units, self.data_offset + start)?;
        self.cipher.decrypt_in_place(start, units);
        Ok(())
    }
}

/// Whether the file does direct I/O in blocks of that size; the file is left in direct mode if so.
fn reads_directly(file: &File, block: usize) -> bool {
    let mut buffer = Arc::<Buffers>::default().take(block);
    // At an odd block, so that a larger block size of the file system below shows as EINVAL.
    set_direct(file, true).is_ok() && file.read_at(&mut buffer, block as u64).is_ok()
}

fn set_direct(file: &File, on: bool) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let direct = OFlag::from_bits_retain(libc::O_DIRECT);
    let flags = if on { flags | direct } else { flags - direct };
    fcntl(file, FcntlArg::F_SETFL(flags)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Arc, thread};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        base::key::{SecretBytes, VolumeKey},
        volumes::header::SectorSize,
    };

    /// One of 100 keys.
    fn key(number: u8) -> VolumeKey {
        let bytes: Vec<u8> = (number..number + 64).collect();
        VolumeKey::from_secret(SecretBytes::copy_of(&bytes).unwrap()).unwrap()
    }

    fn one(geometry: &Geometry) -> Ciphers {
        Ciphers::one(geometry, &key(0))
    }

    /// What rests on the device, without what is tested here.
    fn encrypted(geometry: &Geometry, mut plain: Vec<u8>, old_from: usize) -> Vec<u8> {
        for (number, part) in [(0, 0..old_from), (1, old_from..plain.len())] {
            let key = key(number);
            let key = cryptattach_xts::Key::of(key.expose()).unwrap();
            let sector_bytes = geometry.sector_size.bytes() as usize;
            let xts = cryptattach_xts::Xts::new(key, sector_bytes, geometry.iv_offset_sectors);
            for at in part.step_by(sector_bytes) {
                xts.encrypt_in_place(at as u64, &mut plain[at..at + sector_bytes]);
            }
        }
        plain
    }

    fn geometry(sector_bytes: u32, data_offset_bytes: u64, size_bytes: u64) -> Geometry {
        let sector_size = SectorSize::from_bytes(sector_bytes).unwrap();
        Geometry { sector_size, data_offset_bytes, size_bytes, iv_offset_sectors: 5 }
    }

    fn file(length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read { offset: u64, length: usize },
        Write { offset: u64, length: usize, seed: u8 },
        Zero { offset: u64, length: usize },
        Discard { offset: u64, length: usize },
    }

    fn step(size: u64) -> impl Strategy<Value = Step> {
        let offset = prop_oneof![0..size + 5000, (0..size / 512).prop_map(|sector| sector * 512)];
        let length = prop_oneof![0_usize..20_000, (0_usize..24).prop_map(|sectors| sectors * 512)];
        (offset, length, 0_u8..8, any::<u8>()).prop_map(|(offset, length, kind, seed)| match kind {
            0..3 => Step::Write { offset, length, seed },
            3 => Step::Zero { offset, length },
            4 => Step::Discard { offset, length },
            _ => Step::Read { offset, length },
        })
    }

    const SIZE: u64 = 64 * 1024;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The image behaves as a plain array of bytes, whatever the sector, the device's block and the offset.
        #[test]
        fn behaves_as_a_plain_array(
            sector_bytes in prop::sample::select(vec![512_u32, 1024, 2048, 4096]),
            device_block_bytes in prop::sample::select(vec![512_u32, 4096, 1 << 20]),
            data_offset in prop::sample::select(vec![0_u64, 4096, 1536, 16 << 20]),
            // From there the data has another key.
            old_from in prop::sample::select(vec![None, Some(0), Some(5 * 4096), Some(SIZE)]),
            steps in prop::collection::vec(step(SIZE), 1..40),
        ) {
            let geometry = geometry(sector_bytes, data_offset, SIZE);
            let backing = file(data_offset + SIZE);
            let ciphers = match old_from {
                None => one(&geometry),
                Some(from) => one(&geometry).with_rest(&geometry, from, &key(1)),
            };
            let image = Image::new(backing.try_clone().unwrap(), &geometry, ciphers, device_block_bytes);
            let image = image.with_discards(true);
            let mut model = vec![0; SIZE as usize];
            image.write_at(0, &model).unwrap();
            for step in steps {
                match step {
                    Step::Read { offset, length } => {
                        let from = (offset as usize).min(model.len());
                        let to = (from + length).min(model.len());
                        prop_assert!(*image.read_at(offset, length).unwrap() == model[from..to]);
                    }
                    Step::Zero { offset, length } => {
                        let zeroed = image.write_zeroes(offset, length as u64);
                        prop_assert_eq!(zeroed.is_ok(), offset as usize + length <= model.len());
                        if zeroed.is_ok() {
                            model[offset as usize..][..length].fill(0);
                        }
                    }
                    Step::Discard { offset, length } => {
                        if image.discard(offset, length as u64).is_ok() {
                            // What is in whole units is noise now, the rest stays.
                            let unit = image.unit_bytes() as usize;
                            let end = offset as usize + length;
                            let (from, to) = ((offset as usize).next_multiple_of(unit), end / unit * unit);
                            if from < to {
                                image.write_zeroes(from as u64, (to - from) as u64).unwrap();
                                model[from..to].fill(0);
                            }
                        }
                    }
                    Step::Write { offset, length, seed } => {
                        let data: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_add(seed)).collect();
                        let written = image.write_at(offset, &data);
                        if offset + length as u64 > SIZE {
                            prop_assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
                        } else {
                            written.unwrap();
                            model[offset as usize..][..length].copy_from_slice(&data);
                        }
                    }
                }
            }
            // What rests on the device is the cipher of the whole, and nothing was written beside it.
            image.flush().unwrap();
            drop(image);
            set_direct(&backing, false).unwrap();
            let mut expected = vec![0; data_offset as usize];
            expected.extend(encrypted(&geometry, model, old_from.unwrap_or(SIZE) as usize));
            let mut rests = vec![0; expected.len()];
            backing.read_exact_at(&mut rests, 0).unwrap();
            prop_assert!(rests == expected);
            prop_assert_eq!(backing.metadata().unwrap().len(), data_offset + SIZE);
        }
    }

    /// Eight threads write each its own eighth of every 4096-byte sector: no writer may undo another's part.
    #[test]
    fn partial_writes_do_not_undo_each_other() {
        let image = Arc::new(Image::new(file(SIZE), &geometry(4096, 0, SIZE), one(&geometry(4096, 0, SIZE)), 512));
        let writers: Vec<_> = (0..8_u8)
            .map(|writer| {
                let image = Arc::clone(&image);
                thread::spawn(move || {
                    for sector in 0..SIZE / 4096 {
                        let offset = sector * 4096 + u64::from(writer) * 512;
                        image.write_at(offset, &[writer + 1; 512]).unwrap();
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let all = image.read_at(0, SIZE as usize).unwrap();
        assert!(all.chunks(512).enumerate().all(|(at, part)| part == [(at % 8) as u8 + 1; 512]));
    }

    /// Of two that write the same sectors, one wins, in every sector; and who reads meanwhile sees one of them, whole.
    #[test]
    fn overlapping_writes_do_not_mix() {
        let image = Image::new(file(SIZE), &geometry(4096, 0, SIZE), one(&geometry(4096, 0, SIZE)), 512);
        let whole = |data: &[u8]| data.chunks(4096).all(|sector| sector.iter().all(|byte| *byte == sector[0]));
        image.write_at(0, &vec![1; SIZE as usize]).unwrap();
        thread::scope(|scope| {
            for writer in 1..4_u8 {
                let image = &image;
                scope.spawn(move || {
                    for round in 0..50 {
                        let offset = u64::from(writer + round) % 8 * 4096;
                        image.write_at(offset, &[writer; 32 * 1024]).unwrap();
                    }
                });
            }
            for _ in 0..50 {
                assert!(whole(&image.read_at(0, SIZE as usize).unwrap()));
            }
        });
        assert!(whole(&image.read_at(0, SIZE as usize).unwrap()));
    }

    #[test]
    fn a_device_that_ends_early_is_an_error() {
        let mut short = file(0);
        short.write_all(&[0; 8192]).unwrap();
        let image = Image::new(short, &geometry(512, 0, SIZE), one(&geometry(512, 0, SIZE)), 512);
        assert_eq!(image.read_at(0, 8192).unwrap().len(), 8192);
        assert_eq!(image.read_at(4096, 8192).err().unwrap().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn works_without_direct_io() {
        let image = Image::new(file(SIZE + 512), &geometry(512, 512, SIZE), one(&geometry(512, 512, SIZE)), 4096);
        assert_eq!(image.unit_bytes(), 512, "an offset that is no multiple of the device's block excludes direct I/O");
    }
}
