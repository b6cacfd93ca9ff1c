//! The two copies of a LUKS2 header, read and written without libcryptsetup (LUKS2 On-Disk Format section 2).
//!
//! libcryptsetup acts on what it reads: it repairs a copy, recovers a re-encryption, begins one again. So a header is looked
//! at here before libcryptsetup sees it.

use std::{fs::File, io, os::unix::fs::FileExt};

use openssl::hash::{MessageDigest, hash};
use serde_json::Value;
use uuid::Uuid;

use super::header_image::{MAGIC, SECOND_COPIES, SECOND_MAGIC, number};

/// What stands before the JSON area of each copy.
const BINARY_BYTES: usize = 4096;
const SEQUENCE: usize = 16;
const ALGORITHM: std::ops::Range<usize> = 72..104;
const SALT: std::ops::Range<usize> = 104..168;
const UUID: std::ops::Range<usize> = 168..208;
const OFFSET: usize = 256;
const CHECKSUM: std::ops::Range<usize> = 448..512;

/// A LUKS2 header: the newer one of its two copies.
#[derive(Clone, Debug)]
pub struct Copies {
    binary: Vec<u8>,
    size: usize,
    sequence: u64,
    /// Where this copy stands if the other one is damaged or older.
    alone_at: Option<u64>,
    /// The JSON area.
    pub json: Value,
}

impl Copies {
    /// Reads both copies; `None` if neither is whole. At most 16 MiB are read, whatever the header says.
    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let first = Self::at(file, 0)?;
        let second = match &first {
            Some(first) => Self::at(file, first.size as u64)?,
            None => {
                let mut found = None;
                for at in SECOND_COPIES.map(|power| 1 << power) {
                    found = found.or(Self::at(file, at)?);
                }
                found
            }
        };
        Ok(match (first, second) {
            (Some(first), Some(second)) if first.sequence == second.sequence => Some(first),
            (Some(first), Some(second)) if second.sequence > first.sequence => Some(second.alone()),
            (Some(first), _) => Some(Self { alone_at: Some(0), ..first }),
            (None, second) => second.map(Self::alone),
        })
    }

    fn alone(self) -> Self {
        Self { alone_at: Some(self.size as u64), ..self }
    }

    fn at(file: &File, at: u64) -> io::Result<Option<Self>> {
        let mut bytes = vec![0; BINARY_BYTES];
        if !read_whole(file, &mut bytes, at)? {
            return Ok(None);
        }
        let magic = if at == 0 { &[&MAGIC[..], &[0, 2]].concat() } else { &SECOND_MAGIC[..] };
        let size = number(&bytes, 8);
        let is_right = size.is_power_of_two() && SECOND_COPIES.contains(&size.trailing_zeros());
        if bytes[..8] != *magic || !is_right || number(&bytes, OFFSET) != at {
            return Ok(None);
        }
        let size = size as usize;
        bytes.resize(size, 0);
        if !read_whole(file, &mut bytes, at)? {
            return Ok(None);
        }
        let said = bytes[CHECKSUM].to_vec();
        let Some(computed) = checksum(&mut bytes) else { return Ok(None) };
        let area = bytes[BINARY_BYTES..].split(|byte| *byte == 0).next().unwrap_or_default();
        let json = serde_json::from_slice(area).ok().filter(|_| said.starts_with(&computed));
        bytes.truncate(BINARY_BYTES);
        let sequence = number(&bytes, SEQUENCE);
        Ok(json.map(|json| Self { binary: bytes, size, sequence, alone_at: None, json }))
    }

    /// Bytes of one copy.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Each header that is written has a higher one.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The volume's UUID, if it is one.
    pub fn uuid(&self) -> Option<Uuid> {
        let text = self.binary[UUID].split(|byte| *byte == 0).next()?;
        Uuid::try_parse_ascii(text).ok()
    }

    /// Whether both are the same header, of the same sequence number and words.
    pub fn is(&self, other: &Self) -> bool {
        (self.size, self.sequence, &self.json) == (other.size, other.sequence, &other.json)
    }

    /// Writes the header with this JSON area, under the next sequence number: one copy, fsync, the other one, fsync. So one
    /// copy is whole at every moment; a copy that was alone is the last to be written over.
    pub fn write(&self, file: &File, json: &Value) -> io::Result<()> {
        let text = serde_json::to_vec(json)?;
        if text.len() >= self.size - BINARY_BYTES {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the header has no room for it"));
        }
        for at in self.order() {
            file.write_all_at(&self.copy(at, &text)?, at)?;
            file.sync_all()?;
        }
        Ok(())
    }

    fn order(&self) -> [u64; 2] {
        if self.alone_at == Some(0) { [self.size(), 0] } else { [0, self.size()] }
    }

    fn copy(&self, at: u64, text: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = self.binary.clone();
        bytes.resize(self.size, 0);
        bytes[BINARY_BYTES..][..text.len()].copy_from_slice(text);
        bytes[..6].copy_from_slice(if at == 0 { &MAGIC } else { &SECOND_MAGIC[..6] });
        let sequence = self.sequence.checked_add(1).ok_or(io::ErrorKind::InvalidData)?;
        bytes[SEQUENCE..SEQUENCE + 8].copy_from_slice(&sequence.to_be_bytes());
        bytes[OFFSET..OFFSET + 8].copy_from_slice(&at.to_be_bytes());
        openssl::rand::rand_bytes(&mut bytes[SALT]).map_err(io::Error::other)?;
        let checksum = checksum(&mut bytes).ok_or(io::ErrorKind::InvalidData)?;
        bytes[CHECKSUM][..checksum.len()].copy_from_slice(&checksum);
        Ok(bytes)
    }
}

/// Of a copy, with zeroes in the checksum's place, where they stay; `None` if nobody knows the algorithm.
fn checksum(copy: &mut [u8]) -> Option<Vec<u8>> {
    let name = copy[ALGORITHM].split(|byte| *byte == 0).next()?;
    let algorithm = MessageDigest::from_name(std::str::from_utf8(name).ok()?)?;
    copy[CHECKSUM].fill(0);
    let computed = hash(algorithm, copy).ok()?.to_vec();
    (1..=CHECKSUM.len()).contains(&computed.len()).then_some(computed)
}

/// Whether the file is that long.
fn read_whole(file: &File, bytes: &mut [u8], at: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SIZE: usize = 16 << 10;

    fn header() -> (File, Copies) {
        let file = tempfile::tempfile().unwrap();
        let mut binary = vec![0; BINARY_BYTES];
        binary[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        binary[8..16].copy_from_slice(&(SIZE as u64).to_be_bytes());
        binary[72..78].copy_from_slice(b"sha256");
        let copies = Copies { binary, size: SIZE, sequence: 7, alone_at: None, json: json!({}) };
        copies.write(&file, &json!({"a": 1})).unwrap();
        let read = Copies::read(&file).unwrap().unwrap();
        (file, read)
    }

    #[test]
    fn what_is_written_is_read_under_the_next_number() {
        let (file, copies) = header();
        assert_eq!((copies.sequence, copies.alone_at, &copies.json), (8, None, &json!({"a": 1})));
        let long = json!({"a": "x".repeat(SIZE)});
        assert_eq!(copies.write(&file, &long).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert!(Copies::read(&file).unwrap().unwrap().is(&copies), "nothing is written");
        let last = Copies { sequence: u64::MAX, ..copies };
        assert!(last.write(&file, &json!({})).is_err(), "0 would be older");
    }

    #[test]
    fn one_copy_is_whole_whenever_the_write_of_a_copy_stops() {
        let (file, before) = header();
        let after = json!({"b": 2});
        let text = serde_json::to_vec(&after).unwrap();
        // Which copies are the newest before: both, the first alone, the second alone.
        for newest in [vec![0, SIZE as u64], vec![0], vec![SIZE as u64]] {
            for (stops_in, reach) in [(0, 0), (0, 512), (0, 4096), (0, 5000), (0, SIZE), (1, 512), (1, 5000), (1, SIZE)]
            {
                before.write(&file, &json!({"stale": true})).unwrap();
                let stale = Copies::read(&file).unwrap().unwrap();
                let newer = stale.copy(0, b"{\"a\":1}").unwrap();
                for at in &newest {
                    let copy = if *at == 0 { newer.clone() } else { stale.copy(*at, b"{\"a\":1}").unwrap() };
                    file.write_all_at(&copy, *at).unwrap();
                }
                let copies = Copies::read(&file).unwrap().unwrap();
                for (index, at) in copies.order().into_iter().enumerate().take(stops_in + 1) {
                    let reach = if index == stops_in { reach } else { SIZE };
                    file.write_all_at(&copies.copy(at, &text).unwrap()[..reach], at).unwrap();
                }
                let json = Copies::read(&file).unwrap().expect("a whole copy").json;
                assert!(json == json!({"a": 1}) || json == after, "{newest:?} {stops_in} {reach}: {json}");
            }
        }
    }
}
