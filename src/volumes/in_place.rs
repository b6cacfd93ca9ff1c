//! Encrypts the data of a device in place: it moves up by the header's length, from its end to its start, so that what is written
//! over has always been moved before. docs/encrypt.md has the table of what a crash leaves at each step.
//!
//! Two places tell how far it is. Before the header is written, a record near the device's end has the header and says that
//! the first part is there, too. From then on the header says it.

use std::{fs::File, io, os::unix::fs::FileExt};

use cryptattach_xts::Xts;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use openssl::sha::sha256;

use super::{
    filesystem,
    header::{
        HeaderImage,
        copies::Copies,
        encrypting::{self, FIRST_BYTES, Part, Progress, SHIFT_BYTES, UNIT_BYTES},
        header_image,
    },
};
use crate::base::hex;

/// So much is encrypted between two updates of the header: so long a signal waits.
pub const STEP_BYTES: u64 = SHIFT_BYTES;
/// What has to be free behind a file system: the header, the first part, and the record.
pub const ROOM_BYTES: u64 = SHIFT_BYTES + 2 * FIRST_BYTES;

/// By which libblkid knows ext4 and xfs, and btrfs: they go before the header comes, so that nobody mounts what is half there.
const SUPERBLOCKS: [u64; 2] = [0, 64 << 10];
/// How a record begins.
const MAGIC: &[u8; 16] = b"cryptattach-ipe1";
const RECORD_AT: u64 = UNIT_BYTES;

/// It does not go on.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What is there is not what the header says.
    #[error("what stands at byte {0} is not what is to be encrypted next")]
    Changed(u64),
    /// The header was not written by who had the volume key.
    #[error("somebody has changed what its header says of how far it is")]
    Forged,
    /// The device does not give back what was written.
    #[error("what was written to byte {0} reads back as something else")]
    ReadBack(u64),
}

/// What a device says.
pub enum Found {
    /// A LUKS2 header.
    Header(Copies),
    /// No header, and a record.
    Record(Record),
    Nothing,
}

/// A header that is to be written to the device's start, which waits at its end.
pub struct Record {
    /// Both copies.
    bytes: Vec<u8>,
    pub copies: Copies,
    pub progress: Progress,
}

/// What has become of the device's start since the record was written.
#[derive(Debug, PartialEq, Eq)]
pub enum Start {
    /// It is as it was, or the header is partly there: the part that waits is what counts.
    Waits,
    /// At this byte somebody else has written, so the part that waits is an old one.
    Used(u64),
}

/// Bytes that a file system on a device may have.
pub fn most_bytes(device_bytes: u64) -> u64 {
    whole(device_bytes).saturating_sub(ROOM_BYTES)
}

fn whole(bytes: u64) -> u64 {
    bytes / UNIT_BYTES * UNIT_BYTES
}

/// Looks at a device. An old LUKS header's second copy may stand in unused blocks of a file system: alone it counts only if it
/// tells of what is done here.
pub fn look(file: &File, device_bytes: u64) -> io::Result<Found> {
    let has_first = header_image::first_block(file)?.starts_with(&header_image::MAGIC);
    match Copies::read(file)? {
        Some(copies) if has_first || encrypting::is_begun(&copies.json) => Ok(Found::Header(copies)),
        _ => Ok(Record::read(file, device_bytes)?.map_or(Found::Nothing, Found::Record)),
    }
}

/// Copies the first part to the device's end, as ciphertext, and then writes the record. The device's start stays as it is.
pub fn prepare(
    file: &File,
    device_bytes: u64,
    file_system_bytes: u64,
    image: &HeaderImage,
    xts: &Xts,
    step: u64,
) -> Result<Record, Fault> {
    let of = file_system_bytes.next_multiple_of(UNIT_BYTES).max(FIRST_BYTES);
    let at = whole(device_bytes) - FIRST_BYTES;
    let first = encrypted(file, xts, 0, FIRST_BYTES)?;
    write_checked(file, at, &first)?;
    let first = Part { at, bytes: FIRST_BYTES, sha256: hex::encode(&sha256(&first)) };
    let next = next(file, xts, of, step)?.map(|(part, _)| part);
    let progress = Progress { of, left: of, next, first, wiped: 0, mac: String::new() }.sealed(xts);
    let not_ours = || io::Error::new(io::ErrorKind::InvalidData, "the new header has no token of ours");
    let copies = Copies::read(image.file())?.ok_or_else(not_ours)?;
    copies.write(image.file(), &encrypting::with(&copies.json, Some(progress)).ok_or_else(not_ours)?)?;
    let mut header = vec![0; 2 * copies.size() as usize];
    image.file().read_exact_at(&mut header, 0)?;
    let mut bytes = vec![0; RECORD_AT as usize];
    bytes[..MAGIC.len()].copy_from_slice(MAGIC);
    bytes[16..48].copy_from_slice(&sha256(&header));
    bytes.extend_from_slice(&header);
    write_checked(file, at - FIRST_BYTES, &bytes)?;
    Record::read(file, device_bytes)?.ok_or(Fault::ReadBack(at - FIRST_BYTES))
}

impl Record {
    /// The record of a device, if the part that waits is whole.
    fn read(file: &File, device_bytes: u64) -> io::Result<Option<Self>> {
        let Some(at) = whole(device_bytes).checked_sub(2 * FIRST_BYTES) else { return Ok(None) };
        let mut start = vec![0; RECORD_AT as usize];
        file.read_exact_at(&mut start, at)?;
        if start[..MAGIC.len()] != *MAGIC {
            return Ok(None);
        }
        // LUKS2 metadata of the size that is made here; another one has no such checksum.
        let image = HeaderImage::empty(SHIFT_BYTES)?;
        let mut bytes = vec![0; 32 << 10];
        file.read_exact_at(&mut bytes, at + RECORD_AT)?;
        if start[16..48] != sha256(&bytes) {
            return Ok(None);
        }
        image.file().write_all_at(&bytes, 0)?;
        let Some(copies) = Copies::read(image.file())? else { return Ok(None) };
        let progress = encrypting::progress(&copies.json, device_bytes);
        let Some(progress) = progress.filter(|progress| progress.first.at == at + FIRST_BYTES) else { return Ok(None) };
        let first = read(file, progress.first.at, FIRST_BYTES)?;
        let is_whole = progress.first.is(&first) && copies.is_whole() && 2 * copies.size() == bytes.len() as u64;
        Ok(is_whole.then_some(Self { bytes, copies, progress }))
    }

    /// Compares the device's start with the part that waits. What differs and is of the header, or blanked to make room for it,
    /// was written from this record.
    pub fn start(&self, file: &File, xts: &Xts) -> io::Result<Start> {
        const SECTOR: usize = 512;
        if !self.progress.is_sealed(xts) {
            return Ok(Start::Used(0));
        }
        let mut plain = read(file, self.progress.first.at, FIRST_BYTES)?;
        xts.decrypt_in_place(0, &mut plain);
        let now = read(file, 0, FIRST_BYTES)?;
        for (index, (now, plain)) in now.chunks(SECTOR).zip(plain.chunks(SECTOR)).enumerate() {
            let at = index * SECTOR;
            let is_blanked = SUPERBLOCKS.iter().any(|block| (*block..block + UNIT_BYTES).contains(&(at as u64)))
                && now.iter().all(|byte| *byte == 0);
            if now != plain && !is_blanked && self.bytes.get(at..at + SECTOR) != Some(now) {
                return Ok(Start::Used(at as u64));
            }
        }
        // It may have been mounted since, and its start be the same.
        let next = self.progress.next.as_ref();
        let changed =
            next.map(|part| Ok::<_, io::Error>((part, encrypted(file, xts, part.at, part.bytes)?))).transpose()?;
        Ok(match changed.filter(|(part, ciphertext)| !part.is(ciphertext)) {
            Some((part, _)) => Start::Used(part.at),
            None => Start::Waits,
        })
    }

    /// Writes the header: the file system's superblock goes first, then each copy comes. Whatever is lost of it in a crash is in
    /// the record.
    pub fn commit(&self, file: &File) -> io::Result<Copies> {
        for at in SUPERBLOCKS {
            file.write_all_at(&[0; UNIT_BYTES as usize], at)?;
        }
        file.sync_all()?;
        let (first, second) = self.bytes.split_at(self.bytes.len() / 2);
        for (copy, at) in [(second, first.len()), (first, 0)] {
            file.write_all_at(copy, at as u64)?;
            file.sync_all()?;
        }
        Copies::read(file)?.filter(Copies::is_whole).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl Part {
    fn is(&self, ciphertext: &[u8]) -> bool {
        self.sha256 == hex::encode(&sha256(ciphertext))
    }
}

/// Goes on where the header says, to the end; `watch` hears how many bytes are done and how many there are before each step,
/// and says whether to go on. Whether it has come to its end.
///
/// Each part is written only if it is the one that the header has announced: by a header from before, or a made-up one, data
/// that is ciphertext already would be encrypted again.
pub fn run(
    file: &File,
    device_bytes: u64,
    mut copies: Copies,
    xts: &Xts,
    step: u64,
    watch: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<bool, Fault> {
    let mut ready: Option<(Part, Vec<u8>)> = None;
    // All superblocks went before the header came: whoever has made a file system since, or has put one back, has data there.
    if let Some(at) = filesystem::superblock(file)? {
        return Err(Fault::Changed(at));
    }
    let is_forged = |progress: Progress| !progress.is_sealed(xts);
    if encrypting::progress(&copies.json, device_bytes).is_some_and(is_forged) {
        return Err(Fault::Forged);
    }
    heal(file, &mut copies)?;
    loop {
        let Some(now) = encrypting::progress(&copies.json, device_bytes) else { return Ok(true) };
        let (done, all) = now.done();
        if !watch(done, all) {
            return Ok(false);
        }
        let after = match &now {
            Progress { next: Some(part), .. } => {
                let ciphertext = match ready.take().filter(|(ready, _)| ready == part) {
                    Some((_, ciphertext)) => ciphertext,
                    None => encrypted(file, xts, part.at, part.bytes)?,
                };
                if !part.is(&ciphertext) {
                    return Err(Fault::Changed(part.at));
                }
                file.write_all_at(&ciphertext, part.at + SHIFT_BYTES)?;
                file.sync_all()?;
                ready = next(file, xts, part.at, step)?;
                let next = ready.as_ref().map(|(part, _)| part.clone());
                Some(Progress { left: part.at, next, ..now.clone() })
            }
            Progress { left: 1.., first, .. } => {
                file.write_all_at(&waiting(file, first)?, SHIFT_BYTES)?;
                file.sync_all()?;
                Some(Progress { left: 0, ..now.clone() })
            }
            Progress { wiped, first, .. } => {
                // It is there until all is done. A header from before the end, of a volume that is in use since, ends here.
                waiting(file, first)?;
                let ((at, bytes), end) = (now.behind(), first.at + first.bytes);
                if *wiped == 0 {
                    wipe(file, 2 * copies.size(), SHIFT_BYTES - 2 * copies.size())?;
                    wipe(file, end, device_bytes - end)?;
                }
                let part = step.min(bytes - wiped);
                wipe(file, at + wiped, part)?;
                file.sync_all()?;
                Some(Progress { wiped: wiped + part, ..now.clone() }).filter(|after| after.wiped < bytes)
            }
        };
        let is_last = after.is_none();
        let after = after.map(|after| after.sealed(xts));
        let json = encrypting::with(&copies.json, after).ok_or(io::ErrorKind::InvalidData).map_err(io::Error::from)?;
        copies.write(file, &json)?;
        copies = read_back(file)?;
        if is_last {
            // No more than ciphertext: nothing is lost if that does not come to its end.
            wipe(file, now.first.at, now.first.bytes)?;
            file.sync_all()?;
        }
    }
}

/// The first part, where it waits.
fn waiting(file: &File, first: &Part) -> Result<Vec<u8>, Fault> {
    let ciphertext = read(file, first.at, first.bytes)?;
    if first.is(&ciphertext) { Ok(ciphertext) } else { Err(Fault::Changed(first.at)) }
}

/// Makes both copies the same: one from before would say that plaintext is where ciphertext is by now.
pub fn heal(file: &File, copies: &mut Copies) -> io::Result<()> {
    if !copies.is_whole() {
        copies.write(file, &copies.json)?;
        *copies = read_back(file)?;
    }
    Ok(())
}

/// The part that is moved after all from `left` on: what it will be, and where.
fn next(file: &File, xts: &Xts, left: u64, step: u64) -> io::Result<Option<(Part, Vec<u8>)>> {
    let bytes = step.min(SHIFT_BYTES).min(left - FIRST_BYTES);
    if bytes == 0 {
        return Ok(None);
    }
    let at = left - bytes;
    let ciphertext = encrypted(file, xts, at, bytes)?;
    Ok(Some((Part { at, bytes, sha256: hex::encode(&sha256(&ciphertext)) }, ciphertext)))
}

fn encrypted(file: &File, xts: &Xts, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut data = read(file, at, bytes)?;
    xts.encrypt_in_place(at, &mut data);
    Ok(data)
}

fn read(file: &File, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut data = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    file.read_exact_at(&mut data, at)?;
    Ok(data)
}

fn read_back(file: &File) -> io::Result<Copies> {
    Copies::read(file)?.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What all depends on is read from the device, and not from memory.
fn write_checked(file: &File, at: u64, bytes: &[u8]) -> Result<(), Fault> {
    file.write_all_at(bytes, at)?;
    file.sync_all()?;
    let length = i64::try_from(bytes.len()).map_err(io::Error::other)?;
    let from = i64::try_from(at).map_err(io::Error::other)?;
    posix_fadvise(file, from, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(io::Error::from)?;
    if read(file, at, bytes.len() as u64)? == bytes { Ok(()) } else { Err(Fault::ReadBack(at)) }
}

fn wipe(file: &File, from: u64, bytes: u64) -> io::Result<()> {
    let mut noise = vec![0; bytes.min(FIRST_BYTES) as usize];
    for at in (from..from + bytes).step_by(FIRST_BYTES as usize) {
        let length = (from + bytes - at).min(FIRST_BYTES) as usize;
        openssl::rand::rand_bytes(&mut noise[..length]).map_err(io::Error::other)?;
        file.write_all_at(&noise[..length], at)?;
    }
    Ok(())
}
