//! Swift's ring files: where the replicas are, without asking a proxy.
//!
//! A ring file is a gzip stream of a magic, a JSON text with the devices, and for each replica one 16-bit device number per
//! partition (swift.common.ring.ring, RingData.serialize_v1). A path's partition is the beginning of an MD5 with the
//! cluster's secret prefix and suffix (swift.common.utils.hash_path). What comes out has the form of list_endpoints's answer.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;
use openssl::hash::{MessageDigest, hash};
use serde::Deserialize;

use crate::base::key::Ring;

const MAGIC: &[u8; 6] = b"R1NG\x00\x01";
/// JSON of some ten thousand devices.
const MOST_JSON_BYTES: u32 = 16 << 20;
/// Two bytes per partition and replica; more than any cluster has.
const MOST_TABLE_BYTES: u64 = 1 << 30;

/// A ring file, or swift.conf beside it, that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingFileError {
    /// It cannot be read; a stream that ends too early is such a case, too.
    #[error("cannot read the ring file {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    /// It is something else than what its name says.
    #[error("{} is not usable: {why}", .path.display())]
    Malformed { path: PathBuf, why: String },
}

/// What a ring says of itself.
#[derive(Deserialize)]
struct Header {
    devs: Vec<Option<RingDevice>>,
    part_shift: u32,
    replica_count: u32,
    byteorder: Option<String>,
}

#[derive(Deserialize)]
struct RingDevice {
    ip: String,
    port: u16,
    device: String,
}

/// A directory with ring files and swift.conf, as `/etc/swift` is on each node.
pub(super) struct RingFiles {
    folder: PathBuf,
}

impl RingFiles {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Where the replicas of a path (account, container, object) are: a JSON list of URLs. `policy` is the name of the
    /// container's storage policy, if it has one.
    pub(super) fn endpoints(&self, ring: Ring, policy: Option<&str>, path: &[&str]) -> Result<Vec<u8>, RingFileError> {
        let conf = Conf::read(&self.folder.join("swift.conf"))?;
        let file = match (ring, policy) {
            (Ring::Object, Some(policy)) => match conf.policy(policy)? {
                0 => "object.ring.gz".to_owned(),
                index => format!("object-{index}.ring.gz"),
            },
            _ => format!("{ring}.ring.gz"),
        };
        let file = self.folder.join(file);
        let hash = conf.hash(path);
        let (partition, devices) = read(&file, hash)?;
        let below = path.join("/");
        let url =
            |RingDevice { ip, port, device }: RingDevice| format!("http://{ip}:{port}/{device}/{partition}/{below}");
        let urls: Vec<String> = devices.into_iter().map(url).collect();
        serde_json::to_vec(&urls).map_err(|error| malformed(&file, error.to_string()))
    }
}

fn malformed(path: &Path, why: impl Into<String>) -> RingFileError {
    RingFileError::Malformed { path: path.to_owned(), why: why.into() }
}

/// The partition of a hash, and its devices, one per replica.
fn read(path: &Path, hash: u32) -> Result<(u64, Vec<RingDevice>), RingFileError> {
    let failed = |source| RingFileError::Read { path: path.to_owned(), source };
    let mut ring = GzDecoder::new(io::BufReader::new(File::open(path).map_err(failed)?));
    let (mut magic, mut length) = ([0; 6], [0; 4]);
    ring.read_exact(&mut magic).map_err(failed)?;
    if magic != *MAGIC {
        return Err(malformed(path, "it is no ring of version 1"));
    }
    ring.read_exact(&mut length).map_err(failed)?;
    let length = u32::from_be_bytes(length);
    if length > MOST_JSON_BYTES {
        return Err(malformed(path, format!("its list of devices has {length} bytes")));
    }
    let mut json = vec![0; length as usize];
    ring.read_exact(&mut json).map_err(failed)?;
    let header: Header = serde_json::from_slice(&json).map_err(|error| malformed(path, error.to_string()))?;
    let big_endian = match header.byteorder.as_deref() {
        Some("big") => true,
        Some("little") => false,
        None => cfg!(target_endian = "big"),
        Some(_) => return Err(malformed(path, "its byte order is neither little nor big")),
    };
    if header.part_shift > 32 {
        return Err(malformed(path, format!("it cannot have a part_shift of {}", header.part_shift)));
    }
    let partitions = 1_u64 << (32 - header.part_shift);
    if u64::from(header.replica_count) * partitions * 2 > MOST_TABLE_BYTES || header.replica_count == 0 {
        return Err(malformed(path, format!("{} replicas of {partitions} partitions", header.replica_count)));
    }
    let partition = u64::from(hash).checked_shr(header.part_shift).unwrap_or(0);
    let mut numbers = Vec::new();
    for replica in 1..=header.replica_count {
        let mut row = (&mut ring).take(partitions * 2);
        skip(&mut row, partition * 2).map_err(failed)?;
        let mut number = [0; 2];
        match row.read_exact(&mut number) {
            Ok(()) => numbers.push(if big_endian { u16::from_be_bytes(number) } else { u16::from_le_bytes(number) }),
            // A ring of 2.5 replicas: the last row has only some of the partitions.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && replica == header.replica_count => {}
            Err(error) => return Err(failed(error)),
        }
        skip(&mut row, u64::MAX).map_err(failed)?;
        if row.limit() > 0 && replica < header.replica_count {
            return Err(malformed(path, format!("it ends in the row of replica {replica}")));
        }
    }
    // At its end the stream's checksum is compared.
    if skip(&mut ring, 1).map_err(failed)? > 0 {
        return Err(malformed(path, "something follows the last replica"));
    }
    let mut devices: Vec<Option<RingDevice>> = header.devs;
    numbers.sort_unstable();
    numbers.dedup();
    let found = numbers.iter().map(|number| devices.get_mut(usize::from(*number)).and_then(Option::take));
    let found: Option<Vec<RingDevice>> = found.collect();
    match found {
        Some(found) if !found.is_empty() => Ok((partition, found)),
        _ => Err(malformed(path, format!("partition {partition} is on a device that is not listed"))),
    }
}

/// How many bytes were skipped, at most `bytes`.
fn skip(from: &mut impl Read, bytes: u64) -> io::Result<u64> {
    io::copy(&mut from.take(bytes), &mut io::sink())
}

/// swift.conf, as far as it says where things are. Python reads it as Latin-1, so that its bytes are the secret's.
struct Conf {
    path: PathBuf,
    prefix: Vec<u8>,
    suffix: Vec<u8>,
    /// Storage policies: number, names.
    policies: Vec<(u32, Vec<String>)>,
}

impl Conf {
    fn read(path: &Path) -> Result<Self, RingFileError> {
        let bytes = fs::read(path).map_err(|source| RingFileError::Read { path: path.to_owned(), source })?;
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        let mut conf = Self { path: path.to_owned(), prefix: Vec::new(), suffix: Vec::new(), policies: Vec::new() };
        let mut section = String::new();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = name.to_owned();
                if let Some(index) = section.strip_prefix("storage-policy:") {
                    let index = index.parse().map_err(|_| malformed(path, format!("[{section}] has no number")))?;
                    conf.policies.push((index, Vec::new()));
                }
                continue;
            }
            let Some((name, value)) = line.split_once(['=', ':']) else { continue };
            let (name, value) = (name.trim(), value.trim());
            let bytes = || value.chars().map(|char| char as u8).collect();
            match (&*section, name) {
                ("swift-hash", "swift_hash_path_prefix") => conf.prefix = bytes(),
                ("swift-hash", "swift_hash_path_suffix") => conf.suffix = bytes(),
                (section, "name" | "aliases") if section.starts_with("storage-policy:") => {
                    if let Some((_, names)) = conf.policies.last_mut() {
                        names.extend(value.split(',').map(|name| name.trim().to_lowercase()));
                    }
                }
                _ => {}
            }
        }
        if conf.prefix.is_empty() && conf.suffix.is_empty() {
            return Err(malformed(path, "it has neither swift_hash_path_prefix nor swift_hash_path_suffix"));
        }
        Ok(conf)
    }

    /// The number of a storage policy.
    fn policy(&self, name: &str) -> Result<u32, RingFileError> {
        let lower = name.to_lowercase();
        match self.policies.iter().find(|(_, names)| names.contains(&lower)) {
            Some((index, _)) => Ok(*index),
            None if self.policies.is_empty() => Ok(0),
            None => Err(malformed(&self.path, format!("it has no storage policy '{name}'"))),
        }
    }

    /// The first four bytes of the path's MD5.
    fn hash(&self, path: &[&str]) -> u32 {
        let text = [&self.prefix[..], b"/", path.join("/").as_bytes(), &self.suffix].concat();
        hash(MessageDigest::md5(), &text)
            .ok()
            .and_then(|digest| digest.first_chunk().copied())
            .map_or(0, u32::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    const DEVICES: &str =
        r#"[{"ip": "10.0.0.1", "port": 6200, "device": "d1"}, null, {"ip": "fd00::2", "port": 6200, "device": "d2"}]"#;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    fn plain(json: &str, table: &[u8]) -> Vec<u8> {
        let length = u32::try_from(json.len()).unwrap().to_be_bytes();
        [MAGIC, &length[..], json.as_bytes(), table].concat()
    }

    fn header(more: &str) -> String {
        format!(r#"{{"devs": {DEVICES}, "part_shift": 31, {more}}}"#)
    }

    /// Partition 1 of two.
    fn devices(file: &[u8]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("object.ring.gz");
        fs::write(&path, file).unwrap();
        let found = read(&path, 0x8000_0001).map_err(|error| error.to_string());
        let (partition, found) = found.inspect_err(|error| assert!(error.contains("object.ring.gz"), "{error}"))?;
        assert_eq!(partition, 1);
        Ok(found.into_iter().map(|device| device.device).collect())
    }

    #[test]
    fn both_byte_orders_and_a_part_of_a_replica_are_read() {
        let whole = [[0, 0, 0, 2], [0, 2, 0, 0]].concat();
        let big = header(r#""replica_count": 2, "byteorder": "big""#);
        assert_eq!(devices(&packed(&plain(&big, &whole))).unwrap(), ["d1", "d2"]);
        let little = header(r#""replica_count": 2, "byteorder": "little""#);
        assert_eq!(devices(&packed(&plain(&little, &[0, 0, 2, 0, 2, 0]))).unwrap(), ["d2"], "1.5 replicas");
    }

    #[test]
    fn what_is_no_ring_is_refused_by_name() {
        let fine = header(r#""replica_count": 1, "byteorder": "big""#);
        let packed_fine = packed(&plain(&fine, &[0, 0, 0, 2]));
        assert_eq!(devices(&packed_fine).unwrap(), ["d2"]);
        for length in 0..packed_fine.len() {
            assert!(devices(&packed_fine[..length]).is_err(), "cut to {length} bytes");
        }
        let mut changed = packed_fine.clone();
        let checksum = changed.len() - 8;
        changed[checksum] ^= 1;
        assert!(devices(&changed).is_err(), "the checksum is wrong");
        for (file, says) in [
            (b"not gzip".to_vec(), "cannot read"),
            (packed(b"R1NG\x00\x02..."), "no ring of version 1"),
            (packed(&[&MAGIC[..], &[0xff; 4]].concat()), "list of devices has 4294967295 bytes"),
            (packed(&plain("{}", &[])), "missing field"),
            (packed(&plain(&fine, &[0, 0, 0, 1])), "not listed"),
            (packed(&plain(&fine, &[0, 0, 0, 9])), "not listed"),
            (packed(&plain(&fine, &[0, 0, 0, 2, 0])), "something follows"),
            (packed(&plain(&header(r#""replica_count": 3, "byteorder": "big""#), &[0, 0, 0, 2, 0])), "failed to fill"),
            (packed(&plain(&header(r#""replica_count": 1, "byteorder": "x""#), &[0; 4])), "byte order"),
            (packed(&plain(&header(r#""replica_count": 0"#), &[])), "0 replicas"),
            (packed(&plain(&header(r#""replica_count": 4294967295"#), &[])), "4294967295 replicas"),
            (packed(&plain(r#"{"devs": [], "part_shift": 0, "replica_count": 3}"#, &[])), "3 replicas of 4294967296"),
            (packed(&plain(r#"{"devs": [], "part_shift": 33, "replica_count": 3}"#, &[])), "part_shift of 33"),
        ] {
            let error = devices(&file).unwrap_err();
            assert!(error.contains(says), "{says}: {error}");
        }
    }

    #[test]
    fn policies_are_found_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("swift.conf");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            Conf::read(&path).map_err(|error| error.to_string())
        };
        let conf = read(
            "[swift-hash]\n# swift_hash_path_suffix = no\nswift_hash_path_suffix = a=b\nswift_hash_path_prefix: p\n\
             [storage-policy:0]\nname = gold\n[storage-policy:2]\naliases = a, Silver\nname = ec\n",
        )
        .unwrap();
        assert_eq!((&conf.prefix[..], &conf.suffix[..]), (&b"p"[..], &b"a=b"[..]));
        assert_eq!(["Gold", "ec", "silver"].map(|name| conf.policy(name).unwrap()), [0, 2, 2]);
        assert!(conf.policy("x").unwrap_err().to_string().contains("no storage policy 'x'"));
        assert!(read("[swift-hash]\n").err().unwrap().contains("neither"));
        assert_eq!(read("[swift-hash]\nswift_hash_path_suffix = s\n").unwrap().policy("Policy-0").unwrap(), 0);
    }
}
