//! What a header may say. Everything that is not listed here is refused before anything is activated.
//!
//! A header is an attacker's input: null ciphers (CVE-2025-59054, CVE-2025-58356), a segment that a surprise
//! re-encryption would rewrite, digests that take hours to compute.

use super::{
    CIPHER, Geometry, SectorSize,
    metadata::{Digest, Kdf, Metadata, Segment},
    token::Token,
};
use crate::base::{
    chain::printable,
    key::{KeyReference, KeySize},
};

/// Digests above this take longer than a few seconds; cryptsetup itself aims at an eighth of a second.
const MOST_DIGEST_ITERATIONS: u64 = 10_000_000;
/// A keyslot above these takes minutes, or memory that cryptsetup itself never asks for (MAX_PBKDF_MEMORY, 4 GiB); cryptsetup
/// makes keyslots of two seconds.
const MOST_KEYSLOT_ITERATIONS: u64 = 200_000_000;
const MOST_KEYSLOT_MEMORY_KIB: u64 = 4 << 20;
const MOST_KEYSLOT_PASSES_KIB: u64 = 128 << 20;
const DIGEST_HASHES: [&str; 3] = ["sha1", "sha256", "sha512"];
const KDFS: [&str; 3] = ["pbkdf2", "argon2i", "argon2id"];

/// Why a header is refused.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

/// What a header says, once checked.
#[derive(Debug)]
pub struct Checked {
    pub geometry: Geometry,
    pub key_size: Option<KeySize>,
    pub digest: String,
    pub reference: Option<KeyReference>,
    pub asks_people: bool,
}

/// Checks LUKS2 metadata for a data device of `device_bytes`.
pub fn luks2(metadata: &Metadata, device_bytes: u64) -> Result<Checked, Refusal> {
    if let Some(unknown) = metadata.config.requirements.as_ref().and_then(|r| r.mandatory.first()) {
        return Err(refused(format!("it requires '{unknown}', as a volume that is being re-encrypted does")));
    }
    let segment = only(&metadata.segments, "segment")?;
    let geometry = segment_geometry(segment, device_bytes)?;
    let digest = only(&metadata.digests, "digest")?;
    check_digest(digest)?;
    Ok(Checked {
        geometry,
        key_size: keyslots(metadata)?,
        // The salt belongs to it: the same key has another digest under another salt.
        digest: format!("{}:{}:{}:{}", digest.hash, digest.iterations, digest.salt, digest.digest),
        reference: reference(metadata)?,
        asks_people: asks_people(metadata),
    })
}

/// Checks what a LUKS1 header says; it has no sector sizes, segments or tokens.
pub fn luks1(header: &super::luks::Luks1, device_bytes: u64) -> Result<Checked, Refusal> {
    check_cipher("cipher", &header.cipher)?;
    let key_size = key_size("volume key", header.key_bytes)?;
    if !DIGEST_HASHES.contains(&header.hash.as_str()) {
        return Err(refused(format!("its hash is '{}'", header.hash)));
    }
    check_iterations(u64::from(header.digest_iterations))?;
    for (number, iterations) in &header.keyslot_iterations {
        check_keyslot_iterations(number, u64::from(*iterations))?;
    }
    Ok(Checked {
        geometry: geometry(SectorSize::B512, header.data_offset_bytes, None, device_bytes)?,
        key_size: Some(key_size),
        digest: header.digest.clone(),
        reference: None,
        asks_people: true,
    })
}

fn segment_geometry(segment: &Segment, device_bytes: u64) -> Result<Geometry, Refusal> {
    if segment.kind != "crypt" {
        return Err(refused(format!("its segment is of type '{}'", segment.kind)));
    }
    check_cipher("cipher", segment.encryption.as_deref().unwrap_or("none"))?;
    if segment.integrity.is_some() {
        return Err(refused("it uses dm-integrity, which is not supported".to_owned()));
    }
    if let Some(flag) = segment.flags.first() {
        return Err(refused(format!("its segment has the flag '{flag}'")));
    }
    if let Some(tweak) = segment.iv_tweak.as_deref().filter(|tweak| *tweak != "0") {
        return Err(refused(format!("its segment starts at the IV {tweak}, not at 0")));
    }
    let sector_size = segment
        .sector_size
        .and_then(SectorSize::from_bytes)
        .ok_or_else(|| refused(format!("its sector size is {:?} bytes", segment.sector_size.unwrap_or(0))))?;
    let number = |what, text: &str| text.parse().map_err(|_| refused(format!("its segment's {what} is '{text}'")));
    let size = match segment.size.as_str() {
        "dynamic" => None,
        fixed => Some(number("size", fixed)?),
    };
    geometry(sector_size, number("offset", &segment.offset)?, size, device_bytes)
}

/// The geometry of a data area inside the device, or why there is none.
pub fn geometry(
    sector_size: SectorSize,
    data_offset_bytes: u64,
    size_bytes: Option<u64>,
    device_bytes: u64,
) -> Result<Geometry, Refusal> {
    let sector_bytes = u64::from(sector_size.bytes());
    if !data_offset_bytes.is_multiple_of(512) {
        return Err(refused(format!("its data begins at byte {data_offset_bytes}, not at a sector")));
    }
    let room = device_bytes.saturating_sub(data_offset_bytes);
    if room < sector_bytes {
        return Err(refused(format!(
            "its data would begin at byte {data_offset_bytes} of a device of {device_bytes} bytes"
        )));
    }
    let size_bytes = size_bytes.unwrap_or(room - room % sector_bytes);
    if size_bytes > room || size_bytes == 0 || !size_bytes.is_multiple_of(sector_bytes) {
        return Err(refused(format!("its data area has {size_bytes} bytes; the device has room for {room}")));
    }
    Ok(Geometry { sector_size, data_offset_bytes, size_bytes, iv_offset_sectors: 0 })
}

fn keyslots(metadata: &Metadata) -> Result<Option<KeySize>, Refusal> {
    let mut size = None;
    for (number, keyslot) in &metadata.keyslots {
        if keyslot.kind != "luks2" {
            return Err(refused(format!("keyslot {number} is of type '{}'", keyslot.kind)));
        }
        check_cipher(&format!("keyslot {number}'s cipher"), keyslot.area.encryption.as_deref().unwrap_or("none"))?;
        if let Some(kdf) = keyslot.kdf.as_ref().filter(|kdf| !KDFS.contains(&kdf.kind.as_str())) {
            return Err(refused(format!("keyslot {number} derives its key by '{}'", kdf.kind)));
        }
        keyslot.kdf.as_ref().map_or(Ok(()), |kdf| check_kdf_cost(number, kdf))?;
        let this = key_size(&format!("keyslot {number}'s key"), keyslot.key_size)?;
        if size.replace(this).is_some_and(|other| other != this) {
            return Err(refused("its keyslots hold keys of different sizes".to_owned()));
        }
    }
    Ok(size)
}

/// Whoever tries a passphrase pays what the header asks for.
fn check_kdf_cost(number: &str, kdf: &Kdf) -> Result<(), Refusal> {
    if kdf.kind == "pbkdf2" {
        return check_keyslot_iterations(number, kdf.iterations);
    }
    let Kdf { time, memory, .. } = kdf;
    if *memory > MOST_KEYSLOT_MEMORY_KIB || time.saturating_mul(*memory) > MOST_KEYSLOT_PASSES_KIB {
        return Err(refused(format!("keyslot {number} takes {time} passes over {memory} KiB of memory")));
    }
    Ok(())
}

fn check_keyslot_iterations(number: impl std::fmt::Display, iterations: u64) -> Result<(), Refusal> {
    if iterations > MOST_KEYSLOT_ITERATIONS {
        return Err(refused(format!(
            "keyslot {number} takes {iterations} iterations (at most {MOST_KEYSLOT_ITERATIONS})"
        )));
    }
    Ok(())
}

fn check_digest(digest: &Digest) -> Result<(), Refusal> {
    if digest.kind != "pbkdf2" || !DIGEST_HASHES.contains(&digest.hash.as_str()) {
        return Err(refused(format!("its digest is '{}' with '{}'", digest.kind, digest.hash)));
    }
    if digest.segments != ["0"] {
        return Err(refused("its digest is not that of its segment".to_owned()));
    }
    check_iterations(digest.iterations)
}

fn check_iterations(iterations: u64) -> Result<(), Refusal> {
    if iterations > MOST_DIGEST_ITERATIONS {
        return Err(refused(format!("its digest takes {iterations} iterations (at most {MOST_DIGEST_ITERATIONS})")));
    }
    Ok(())
}

fn check_cipher(what: &str, cipher: &str) -> Result<(), Refusal> {
    if cipher != CIPHER {
        return Err(refused(format!("{what} is '{cipher}'; only '{CIPHER}' is allowed")));
    }
    Ok(())
}

fn key_size(what: &str, bytes: u32) -> Result<KeySize, Refusal> {
    usize::try_from(bytes)
        .ok()
        .and_then(KeySize::from_bytes)
        .ok_or_else(|| refused(format!("{what} has {bytes} bytes; only 32 and 64 are allowed")))
}

fn reference(metadata: &Metadata) -> Result<Option<KeyReference>, Refusal> {
    let mut ours = metadata.tokens.values().filter_map(Token::from_json);
    let Some(token) = ours.next() else { return Ok(None) };
    if ours.next().is_some() {
        return Err(refused("it has more than one token of type 'cryptattach'".to_owned()));
    }
    let token = token.map_err(|error| refused(format!("its token of type 'cryptattach' is malformed: {error}")))?;
    Ok(Some(token.reference()))
}

/// Whether there is a keyslot that no program opens. The token of a program claims its keyslots, but for the one of a
/// recovery key, which systemd makes and people type.
fn asks_people(metadata: &Metadata) -> bool {
    let member = |token: &serde_json::Value, name: &str| token.get(name).cloned().unwrap_or_default();
    let programs = metadata.tokens.values().filter(|token| member(token, "type") != "systemd-recovery");
    let claimed: Vec<_> =
        programs.filter_map(|token| member(token, "keyslots").as_array().cloned()).flatten().collect();
    metadata.keyslots.keys().any(|number| !claimed.iter().any(|claimed| claimed == number.as_str()))
}

/// The only member, which must be called "0".
fn only<'a, T>(members: &'a std::collections::BTreeMap<String, T>, what: &str) -> Result<&'a T, Refusal> {
    match members.get("0") {
        Some(member) if members.len() == 1 => Ok(member),
        _ => Err(refused(format!("it has {} {what}s; exactly one (number 0) is allowed", members.len()))),
    }
}

/// Text from the header, with control characters replaced: it reaches a terminal.
fn refused(why: String) -> Refusal {
    Refusal(printable(&why))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_keyslot_of_a_program_is_no_persons() {
        let keyslot = json!({"type": "luks2", "key_size": 64, "area": {}});
        let asks = |keyslots: &[&str], tokens: Value| {
            let keyslots: serde_json::Map<_, _> =
                keyslots.iter().map(|number| ((*number).to_owned(), keyslot.clone())).collect();
            let metadata = json!({
                "keyslots": keyslots, "tokens": tokens, "segments": {}, "digests": {}, "config": {},
            });
            asks_people(&serde_json::from_value(metadata).unwrap())
        };
        let ours = json!({"0": {"type": "cryptattach", "keyslots": ["0"]}});
        assert!(!asks(&[], json!({})), "a strict volume");
        assert!(asks(&["0"], json!({})));
        assert!(!asks(&["0"], ours.clone()));
        assert!(asks(&["0", "1"], ours));
        assert!(!asks(&["2"], json!({"0": {"type": "clevis", "keyslots": ["2"]}})));
        assert!(asks(&["3"], json!({"0": {"type": "systemd-recovery", "keyslots": ["3"]}})));
        assert!(asks(&["0"], json!({"0": {"type": "odd", "keyslots": "0"}})), "a malformed token claims nothing");
    }

    #[test]
    fn a_refusal_moves_no_cursor() {
        let refusal = check_cipher("cipher", "null\u{1b}[2J\u{9b}1m").unwrap_err().to_string();
        assert!(refusal.contains("null") && !refusal.contains(char::is_control), "{refusal:?}");
    }
}
