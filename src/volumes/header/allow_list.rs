//! What a header may say. Everything that is not listed here is refused before anything is activated.
//!
//! A header is an attacker's input: null ciphers (CVE-2025-59054, CVE-2025-58356), a segment that a surprise
//! re-encryption would rewrite, digests that take hours to compute.

use super::{
    CIPHER, Geometry, SectorSize, encrypting,
    keyslots::Keyslot,
    metadata::{Digest, Keyslot as Described, Metadata, Segment},
    reencryption::{self, State},
    token::Token,
};
use serde_json::Value;

use crate::base::{
    chain::printable,
    key::{KeyReference, KeySize},
};

/// Digests above this take longer than a few seconds; cryptsetup itself aims at an eighth of a second, that is at most a
/// million on the fastest machine of today.
const MOST_DIGEST_ITERATIONS: u64 = 4_000_000;
const DIGEST_HASHES: [&str; 3] = ["sha1", "sha256", "sha512"];
const KDFS: [&str; 3] = ["pbkdf2", "argon2i", "argon2id"];
/// The only number that libcryptsetup makes and reads (LUKS_STRIPES).
const STRIPES: u64 = 4000;
const DATA_SEGMENT: &str = "0";

/// Why a header is refused.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Refusal {
    why: String,
    kind: Kind,
}

/// What stands behind a refusal: it need not be an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole header that asks for what cryptattach does not do.
    Unsupported,
    /// The volume's re-encryption is not finished.
    UnderWay(State),
    /// Our own rotation of its key is not finished.
    Rotating,
    /// It is being encrypted in place, by us.
    Encrypting,
    /// Trying a passphrase would take too long, or too much memory.
    TooMuchWork,
    /// It does not fit the device that it stands on.
    Elsewhere,
    /// Tokens of ours that contradict each other.
    Tokens,
    /// No program makes such a header.
    Odd,
}

impl Refusal {
    /// Text from the header reaches a terminal: control characters are replaced.
    pub(super) fn new(kind: Kind, why: &str) -> Self {
        Self { why: printable(why), kind }
    }

    /// Whether our own rotation of its key is not finished, and nothing else is odd.
    pub(super) fn is_rotating(&self) -> bool {
        self.kind == Kind::Rotating
    }

    /// What to do next.
    pub fn next_step(&self) -> &'static str {
        match self.kind {
            Kind::Unsupported => {
                "nothing is wrong with the volume: cryptsetup opens it, and 'cryptsetup reencrypt' can change how it is encrypted"
            }
            Kind::Rotating => "'cryptattach key rotate' with this device goes on where it was stopped; then try again",
            Kind::Encrypting => "'cryptattach encrypt' with this device goes on where it was stopped; then try again",
            Kind::UnderWay(State::Clean | State::None) => {
                "'cryptsetup reencrypt --resume-only' finishes a re-encryption; it must not be killed near its end; then try again"
            }
            Kind::UnderWay(State::Crash) => {
                "it was killed while it wrote: make a copy of the whole device first; then 'cryptsetup reencrypt --resume-only' \
                 finishes it; it must not be killed near its end"
            }
            Kind::UnderWay(State::AllDone | State::Foreign) => {
                "do not resume it before you have a copy of the whole device: near its end 'cryptsetup reencrypt' may destroy what it \
                 resumes; 'cryptsetup luksDump' shows the segments"
            }
            Kind::TooMuchWork => {
                "'cryptsetup luksConvertKey' makes a keyslot anew at a lower cost; if nobody made it so dear, distrust this header"
            }
            Kind::Elsewhere => "check that this is the whole device: a copy or partition may have been cut short",
            Kind::Tokens => {
                "'cryptsetup luksDump' shows the tokens; 'cryptsetup token remove --token-id N' removes the wrong one"
            }
            Kind::Odd => {
                "do not use this volume unless you know why its header says so; 'cryptsetup luksDump' shows it"
            }
        }
    }
}

/// What a header says, once checked.
#[derive(Debug)]
pub struct Checked {
    pub geometry: Geometry,
    pub key_size: Option<KeySize>,
    pub digest: String,
    pub reference: Option<KeyReference>,
    pub asks_people: bool,
    pub keyslots: Vec<Keyslot>,
}

/// Checks LUKS2 metadata, `json` as it is typed, for a data device of `device_bytes`.
pub fn luks2(metadata: &Metadata, json: &Value, device_bytes: u64) -> Result<Checked, Refusal> {
    if encrypting::is_begun(json) {
        return Err(being_encrypted(json, device_bytes));
    }
    if let Some(unknown) = metadata.config.requirements.as_ref().and_then(|r| r.mandatory.first()) {
        return Err(match unknown.contains("reencrypt") {
            true => under_way(unknown, json, device_bytes),
            false => unsupported(format!("it requires '{unknown}'")),
        });
    }
    let segment = data_segment(metadata)?;
    let geometry = segment_geometry(segment, device_bytes)?;
    let (number, digest) = data_digest(metadata)?;
    check_digest(digest)?;
    let (key_size, keyslots) = keyslots(metadata, digest)?;
    Ok(Checked {
        geometry,
        key_size,
        // The salt belongs to it: the same key has another digest under another salt.
        digest: format!("{}:{}:{}:{}", digest.hash, digest.iterations, digest.salt, digest.digest),
        reference: reference(metadata, number)?,
        asks_people: asks_people(metadata, digest),
        keyslots,
    })
}

/// A re-encryption is told by how far it is, for what helps at one moment destroys the volume at another.
pub(super) fn under_way(requirement: &str, json: &Value, device_bytes: u64) -> Refusal {
    if reencryption::check_midway(json).is_err() {
        let why = format!("its re-encryption is not finished (it requires '{requirement}')");
        // Somebody has changed the header of our rotation: cryptsetup would destroy what it resumes.
        let state = if reencryption::is_rotation(json) { State::Foreign } else { reencryption::state(json) };
        return Refusal::new(Kind::UnderWay(state), &why);
    }
    let percent = reencryption::percent(reencryption::progress(json, device_bytes));
    Refusal::new(Kind::Rotating, &format!("its key is being rotated: {percent} % of its data have the new key"))
}

fn being_encrypted(json: &Value, device_bytes: u64) -> Refusal {
    match encrypting::progress(json, device_bytes) {
        Some(progress) => {
            let percent = reencryption::percent(progress.done());
            Refusal::new(Kind::Encrypting, &format!("it is being encrypted in place: {percent} % are done"))
        }
        None => refused("it says that it is being encrypted in place, and how far that is makes no sense".to_owned()),
    }
}

/// Checks what a LUKS1 header says; it has no sector sizes, segments or tokens.
pub fn luks1(header: &super::luks::Luks1, device_bytes: u64) -> Result<Checked, Refusal> {
    check_cipher("cipher", &header.cipher)?;
    let key_size = key_size("volume key", header.key_bytes)?;
    if !DIGEST_HASHES.contains(&header.hash.as_str()) {
        return Err(unsupported(format!("its hash is '{}'", header.hash)));
    }
    let digest_work = u64::from(header.digest_iterations);
    check_iterations(digest_work)?;
    let keyslot = |&(number, iterations): &(u32, u32)| {
        Keyslot::luks1(number, &header.hash, iterations, header.key_bytes, digest_work)
    };
    let keyslots: Vec<_> = header.keyslot_iterations.iter().map(keyslot).collect();
    keyslots.iter().try_for_each(Keyslot::check)?;
    Ok(Checked {
        geometry: geometry(SectorSize::B512, header.data_offset_bytes, None, device_bytes)?,
        key_size: Some(key_size),
        digest: header.digest.clone(),
        reference: None,
        asks_people: true,
        keyslots,
    })
}

fn segment_geometry(segment: &Segment, device_bytes: u64) -> Result<Geometry, Refusal> {
    if segment.kind != "crypt" {
        return Err(unsupported(format!("its segment is of type '{}'", segment.kind)));
    }
    check_cipher("cipher", segment.encryption.as_deref().unwrap_or("none"))?;
    if segment.integrity.is_some() {
        return Err(unsupported("it uses dm-integrity".to_owned()));
    }
    if let Some(flag) = segment.flags.first() {
        return Err(unsupported(format!("its segment has the flag '{flag}'")));
    }
    if let Some(tweak) = segment.iv_tweak.as_deref().filter(|tweak| *tweak != "0") {
        return Err(unsupported(format!("its segment starts at the IV {tweak}, not at 0")));
    }
    let sector_size = segment
        .sector_size
        .and_then(SectorSize::from_bytes)
        .ok_or_else(|| unsupported(format!("its sector size is {} bytes", segment.sector_size.unwrap_or(0))))?;
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
        let why = format!("its data would begin at byte {data_offset_bytes} of a device of {device_bytes} bytes");
        return Err(Refusal::new(Kind::Elsewhere, &why));
    }
    let size_bytes = size_bytes.unwrap_or(room - room % sector_bytes);
    if size_bytes > room {
        let why = format!("its data area has {size_bytes} bytes; the device has room for {room}");
        return Err(Refusal::new(Kind::Elsewhere, &why));
    }
    if size_bytes == 0 || !size_bytes.is_multiple_of(sector_bytes) {
        return Err(refused(format!("its data area has {size_bytes} bytes, in sectors of {sector_bytes}")));
    }
    Ok(Geometry { sector_size, data_offset_bytes, size_bytes, iv_offset_sectors: 0 })
}

/// The segment that is encrypted: number 0, as libcryptsetup has it.
fn data_segment(metadata: &Metadata) -> Result<&Segment, Refusal> {
    match metadata.segments.get(DATA_SEGMENT) {
        Some(segment) if metadata.segments.len() == 1 => Ok(segment),
        _ => Err(unsupported(format!(
            "it has {} segments; exactly one (number {DATA_SEGMENT}) is supported",
            metadata.segments.len()
        ))),
    }
}

/// The digest of the data's key, whatever its number: `cryptsetup reencrypt` leaves number 1, unbound keyslots have others.
fn data_digest(metadata: &Metadata) -> Result<(&str, &Digest), Refusal> {
    let covers = |digest: &Digest| digest.segments.iter().any(|segment| segment == DATA_SEGMENT);
    let mut of_data = metadata.digests.iter().filter(|(_, digest)| covers(digest));
    match (of_data.next(), of_data.next()) {
        (Some((number, digest)), None) => Ok((number, digest)),
        (None, _) => Err(refused("it has no digest of its data's key".to_owned())),
        (Some(_), Some(_)) => Err(refused("it has more than one digest of its data's key".to_owned())),
    }
}

/// The keyslots with the data's key. Those with other keys are never tried, so what they say does not count.
fn keyslots(metadata: &Metadata, digest: &Digest) -> Result<(Option<KeySize>, Vec<Keyslot>), Refusal> {
    let (mut size, mut keyslots) = (None, Vec::new());
    for (number, keyslot) in of_data(metadata, digest) {
        if keyslot.kind != "luks2" {
            return Err(unsupported(format!("keyslot {number} is of type '{}'", keyslot.kind)));
        }
        check_cipher(&format!("keyslot {number}'s cipher"), keyslot.area.encryption.as_deref().unwrap_or("none"))?;
        if let Some(kdf) = keyslot.kdf.as_ref().filter(|kdf| !KDFS.contains(&kdf.kind.as_str())) {
            return Err(unsupported(format!("keyslot {number} derives its key by '{}'", kdf.kind)));
        }
        if let Some(splitter) = keyslot.af.as_ref().filter(|splitter| splitter.stripes != STRIPES) {
            return Err(refused(format!("keyslot {number} has {} stripes, not {STRIPES}", splitter.stripes)));
        }
        let area_key_bytes = keyslot.area.key_size.unwrap_or(keyslot.key_size);
        key_size(&format!("keyslot {number}'s own key"), area_key_bytes)?;
        let this = key_size(&format!("keyslot {number}'s key"), keyslot.key_size)?;
        if size.replace(this).is_some_and(|other| other != this) {
            return Err(refused("its keyslots hold keys of different sizes".to_owned()));
        }
        let keyslot = Keyslot::luks2(number, keyslot, area_key_bytes, digest.iterations)?;
        keyslot.check()?;
        keyslots.push(keyslot);
    }
    Ok((size, keyslots))
}

fn of_data<'a>(metadata: &'a Metadata, digest: &'a Digest) -> impl Iterator<Item = (&'a String, &'a Described)> {
    metadata.keyslots.iter().filter(|(number, _)| digest.keyslots.contains(number))
}

fn check_digest(digest: &Digest) -> Result<(), Refusal> {
    if digest.kind != "pbkdf2" || !DIGEST_HASHES.contains(&digest.hash.as_str()) {
        return Err(unsupported(format!("its digest is '{}' with '{}'", digest.kind, digest.hash)));
    }
    check_iterations(digest.iterations)
}

fn check_iterations(iterations: u64) -> Result<(), Refusal> {
    if iterations > MOST_DIGEST_ITERATIONS {
        return Err(Refusal::new(
            Kind::TooMuchWork,
            &format!("its digest takes {iterations} iterations (at most {MOST_DIGEST_ITERATIONS})"),
        ));
    }
    Ok(())
}

fn check_cipher(what: &str, cipher: &str) -> Result<(), Refusal> {
    let why = || format!("{what} is '{cipher}'; only '{CIPHER}' is supported");
    match cipher {
        CIPHER => Ok(()),
        // It encrypts nothing: what an attacker writes who wants to read along.
        null if null == "none" || null.contains("null") => Err(refused(why())),
        _ => Err(unsupported(why())),
    }
}

fn key_size(what: &str, bytes: u32) -> Result<KeySize, Refusal> {
    usize::try_from(bytes)
        .ok()
        .and_then(KeySize::from_bytes)
        .ok_or_else(|| unsupported(format!("{what} has {bytes} bytes; only 32 and 64 are supported")))
}

fn reference(metadata: &Metadata, digest: &str) -> Result<Option<KeyReference>, Refusal> {
    let mut ours = metadata.tokens.values().filter_map(Token::from_json);
    let Some(token) = ours.next() else { return Ok(None) };
    if ours.next().is_some() {
        return Err(tokens("it has more than one token of type 'cryptattach'".to_owned()));
    }
    let token = token.map_err(|error| tokens(format!("its token of type 'cryptattach' is malformed: {error}")))?;
    if token.encrypting.is_some() {
        return Err(tokens(
            "its token says that it is being encrypted in place, the rest of the header does not".to_owned(),
        ));
    }
    Ok(Some(token.reference(digest)))
}

/// Whether there is a keyslot that no program opens. The token of a program claims its keyslots, but for the one of a
/// recovery key, which systemd makes and people type.
fn asks_people(metadata: &Metadata, digest: &Digest) -> bool {
    let member = |token: &serde_json::Value, name: &str| token.get(name).cloned().unwrap_or_default();
    let programs = metadata.tokens.values().filter(|token| member(token, "type") != "systemd-recovery");
    let claimed: Vec<_> =
        programs.filter_map(|token| member(token, "keyslots").as_array().cloned()).flatten().collect();
    of_data(metadata, digest).any(|(number, _)| !claimed.iter().any(|claimed| claimed == number.as_str()))
}

pub(super) fn refused(why: String) -> Refusal {
    Refusal::new(Kind::Odd, &why)
}

fn unsupported(why: String) -> Refusal {
    Refusal::new(Kind::Unsupported, &why)
}

fn tokens(why: String) -> Refusal {
    Refusal::new(Kind::Tokens, &why)
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
                "keyslots": keyslots, "tokens": tokens, "segments": {}, "config": {}, "digests": {"7": {
                    "type": "pbkdf2", "segments": ["0"], "keyslots": keyslots.keys().filter(|number| *number != "9").collect::<Vec<_>>(),
                    "hash": "sha256", "iterations": 1000, "salt": "", "digest": "",
                }},
            });
            let metadata: Metadata = serde_json::from_value(metadata).unwrap();
            asks_people(&metadata, &metadata.digests["7"])
        };
        let ours = json!({"0": {"type": "cryptattach", "keyslots": ["0"]}});
        assert!(!asks(&[], json!({})), "a strict volume");
        assert!(asks(&["0"], json!({})));
        assert!(!asks(&["0"], ours.clone()));
        assert!(asks(&["0", "1"], ours));
        assert!(!asks(&["2"], json!({"0": {"type": "clevis", "keyslots": ["2"]}})));
        assert!(asks(&["3"], json!({"0": {"type": "systemd-recovery", "keyslots": ["3"]}})));
        assert!(!asks(&["9"], json!({})), "a keyslot with another key than the data's");
        assert!(asks(&["0"], json!({"0": {"type": "odd", "keyslots": "0"}})), "a malformed token claims nothing");
    }

    #[test]
    fn a_refusal_moves_no_cursor() {
        let refusal = check_cipher("cipher", "null\u{1b}[2J\u{9b}1m").unwrap_err().to_string();
        assert!(refusal.contains("null") && !refusal.contains(char::is_control), "{refusal:?}");
    }
}
