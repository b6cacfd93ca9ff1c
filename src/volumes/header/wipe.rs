//! The end of a LUKS2 header. Keyslots go first, and last of all the block by which the header says whose it is: so a wipe that
//! was killed is known for what it is, and no other device is ever wiped in its place.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    copies::{BINARY_BYTES, Copies, UUID},
    header_image::{LARGEST_BYTES, MAGIC, SECOND_COPIES, SECOND_MAGIC},
};

/// So much is written at once.
const AT_ONCE: usize = 1 << 20;

/// Where a header stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// The two copies of its metadata; the one that goes last comes last.
    copies: [u64; 2],
    copy_bytes: u64,
    keyslots: Range<u64>,
}

impl Extent {
    /// Of a header on a device of `len` bytes whose data, if they are there as well, begin at `data`.
    pub fn of(copies: &Copies, len: u64, data: Option<u64>) -> Self {
        let said = copies.json["config"]["keyslots_size"].as_str().and_then(|bytes| bytes.parse().ok());
        let start = copies.size() * 2;
        let end = start.saturating_add(said.unwrap_or(LARGEST_BYTES));
        let end = end.min(LARGEST_BYTES).min(len).min(data.unwrap_or(u64::MAX)).max(start);
        Self { copies: copies.order(), copy_bytes: copies.size(), keyslots: start..end }
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.keyslots.end
    }

    /// Writes over it: the keyslots with random bytes, the metadata with zeroes.
    pub fn wipe(&self, file: &File) -> io::Result<()> {
        let binary_bytes = BINARY_BYTES as u64;
        let [first, last] = self.copies.map(|at| at..at + self.copy_bytes);
        let mut random = vec![0; AT_ONCE];
        openssl::rand::rand_bytes(&mut random).map_err(io::Error::other)?;
        overwrite(file, self.keyslots.clone(), &random)?;
        let zeroes = vec![0; AT_ONCE];
        overwrite(file, first, &zeroes)?;
        overwrite(file, last.start + binary_bytes..last.end, &zeroes)?;
        overwrite(file, last.start..last.start + binary_bytes, &zeroes)
    }
}

/// All of it is on the disk when this returns.
fn overwrite(file: &File, range: Range<u64>, with: &[u8]) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let bytes = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(with.len());
        file.write_all_at(&with[..bytes], at)?;
        at += bytes as u64;
    }
    file.sync_all()
}

/// Whose header is there, whole or half wiped.
pub fn volume(file: &File) -> io::Result<Option<Uuid>> {
    if let Some(copies) = Copies::read(file)? {
        return Ok(copies.uuid());
    }
    for (_, block) in beginnings(file)? {
        let text = block[UUID].split(|byte| *byte == 0).next().unwrap_or_default();
        if let Ok(uuid) = Uuid::try_parse_ascii(text) {
            return Ok(Some(uuid));
        }
    }
    Ok(None)
}

/// Whether nothing there begins as a LUKS header does. The disk is asked, and not the kernel's memory of what was written.
pub fn is_gone(file: &File) -> io::Result<bool> {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(beginnings(file)?.is_empty())
}

/// Where a copy may stand and begins like one, with its first block.
fn beginnings(file: &File) -> io::Result<Vec<(u64, [u8; 512])>> {
    let mut found = Vec::new();
    for at in [0].into_iter().chain(SECOND_COPIES.map(|power| 1 << power)) {
        let mut block = [0; 512];
        match file.read_exact_at(&mut block, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            read => read?,
        }
        let magic = if at == 0 { MAGIC } else { SECOND_MAGIC.first_chunk().copied().unwrap_or_default() };
        if block[..6] == magic {
            found.push((at, block));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPY: u64 = 16 << 10;
    const END: u64 = 1 << 20;

    /// A header of cryptsetup's own, with a keyslot, before a MiB of data.
    fn header() -> (tempfile::NamedTempFile, Uuid) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * END).unwrap();
        let uuid = Uuid::from_u128(7);
        let format = "printf x | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --offset 2048 \
                      --luks2-metadata-size 16k --luks2-keyslots-size 512k --uuid";
        let mut made = std::process::Command::new("sh");
        made.args(["-c", &format!("{format} {uuid} \"$0\" -")]).arg(file.path());
        assert!(made.status().unwrap().success());
        (file, uuid)
    }

    fn extent(file: &File) -> Extent {
        Extent::of(&Copies::read(file).unwrap().unwrap(), 2 * END, Some(END))
    }

    #[test]
    fn nothing_of_the_header_stays_and_no_data_goes() {
        let (file, uuid) = header();
        let file = file.as_file();
        file.write_all_at(b"data", END).unwrap();
        let extent = extent(file);
        assert_eq!(extent.bytes(), 2 * COPY + (512 << 10));
        let mut before = vec![0; extent.bytes() as usize];
        file.read_exact_at(&mut before, 0).unwrap();
        assert_eq!((volume(file).unwrap(), is_gone(file).unwrap()), (Some(uuid), false));
        extent.wipe(file).unwrap();
        assert_eq!((volume(file).unwrap(), is_gone(file).unwrap()), (None, true));
        let mut after = vec![0; extent.bytes() as usize];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(after[..2 * COPY as usize].iter().all(|byte| *byte == 0));
        // By chance one byte of 256 is what it was: two of a sector.
        let [before, after] = [&before, &after].map(|bytes| bytes[2 * COPY as usize..].chunks(512));
        for (sector, (one, other)) in before.zip(after).enumerate() {
            let same = one.iter().zip(other).filter(|(one, other)| one == other).count();
            assert!(same < 32, "{same} bytes of sector {sector} are what they were");
        }
        let mut data = [0; 4];
        file.read_exact_at(&mut data, END).unwrap();
        assert_eq!(&data, b"data");
    }

    /// The last block goes last, also if one of the copies was damaged before.
    #[test]
    fn a_wipe_that_stops_is_known_by_the_volumes_uuid_and_goes_on() {
        for damaged in [None, Some(0), Some(COPY)] {
            let (named, uuid) = header();
            let file = named.as_file();
            if let Some(at) = damaged {
                file.write_all_at(&[0; 512], at).unwrap();
            }
            let extent = extent(file);
            let whole = std::fs::read(named.path()).unwrap();
            let [first, last] = extent.copies;
            assert_eq!([first, last].iter().max(), Some(&COPY));
            assert_ne!(Some(last), damaged);
            let steps = [extent.keyslots.clone(), first..first + COPY, last + 4096..last + COPY];
            for stops_in in 0..steps.len() {
                for part in [0, 512, 4096, COPY] {
                    file.write_all_at(&whole, 0).unwrap();
                    for (index, step) in steps.iter().enumerate().take(stops_in + 1) {
                        let end = if index == stops_in { (step.start + part).min(step.end) } else { step.end };
                        overwrite(file, step.start..end, &[0; 4096]).unwrap();
                    }
                    assert_eq!(volume(file).unwrap(), Some(uuid), "{damaged:?} {stops_in} {part}");
                    extent.wipe(file).unwrap();
                    assert!(is_gone(file).unwrap());
                }
            }
        }
    }

    #[test]
    fn a_header_that_says_too_much_of_itself_costs_no_more_than_any() {
        let (file, _) = header();
        let mut copies = Copies::read(file.as_file()).unwrap().unwrap();
        let end = |copies: &Copies, len, data| Extent::of(copies, len, data).keyslots.end;
        for said in ["18446744073709551615", "-1", "x"] {
            copies.json["config"]["keyslots_size"] = said.into();
            assert_eq!(end(&copies, u64::MAX, None), LARGEST_BYTES);
            assert_eq!(end(&copies, 2 * END, None), 2 * END);
            assert_eq!(end(&copies, 2 * END, Some(END)), END);
        }
        assert_eq!(end(&copies, 0, None), 2 * COPY);
    }
}
