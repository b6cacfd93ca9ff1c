//! A volume that is being encrypted in place, as its header tells it: a requirement that no other program knows, and in our
//! token how far it is. docs/encrypt.md has the whole way.

use cryptattach_xts::Xts;
use openssl::{memcmp, sha::sha256};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{HEADER_BYTES, Volume, VolumeError, copies::Copies, reencryption::our_token, rekey::view};
use crate::{base::hex, sys::device::Device};

/// Of the header: whoever does not know it leaves the volume alone.
pub const REQUIREMENT: &str = "cryptattach-encrypt";
/// The data moves up by this: the header takes its place.
pub const SHIFT_BYTES: u64 = HEADER_BYTES;
/// So much of the file system's start waits at the device's end, until all else is encrypted.
pub const FIRST_BYTES: u64 = 1 << 20;
/// All that is moved lies at multiples of it.
pub const UNIT_BYTES: u64 = 4096;

/// Beyond all devices.
const NOWHERE: u64 = 1 << 62;

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Bytes of the file system.
    pub of: u64,
    /// So many of them stand as plaintext where they were, from the device's start: but for the first ones, which wait at its
    /// end. 0 once all are encrypted in their place.
    pub left: u64,
    /// The last of those, which are encrypted next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Part>,
    /// Where the first ones wait, as ciphertext.
    pub first: Part,
    /// Once all are in their place: so many bytes behind them are overwritten.
    #[serde(default)]
    pub wiped: u64,
    /// Of all that, by the volume key: nobody else makes the header say that more is done than is.
    #[serde(default)]
    pub mac: String,
}

/// A part of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    pub at: u64,
    pub bytes: u64,
    /// Of its ciphertext, so that it says nothing of the data. Only what fits is ever written over.
    pub sha256: String,
}

impl Progress {
    /// With its code of authentication.
    pub fn sealed(self, xts: &Xts) -> Self {
        let mac = self.code(xts);
        Self { mac, ..self }
    }

    /// Whether whoever has written it had the volume key.
    pub fn is_sealed(&self, xts: &Xts) -> bool {
        memcmp::eq(self.code(xts).as_bytes(), self.mac.as_bytes().get(..64).unwrap_or(&[0; 64]))
    }

    /// The hash of its words, encrypted as a sector that no device has.
    fn code(&self, xts: &Xts) -> String {
        let Self { of, left, next, first, wiped, mac: _ } = self;
        let part = |part: &Part| format!("{} {} {}", part.at, part.bytes, part.sha256);
        let words = format!("{of} {left} {wiped} {} {:?}", part(first), next.as_ref().map(part));
        let mut sector = [0; UNIT_BYTES as usize];
        sector[..32].copy_from_slice(&sha256(words.as_bytes()));
        xts.encrypt_in_place(NOWHERE, &mut sector);
        hex::encode(&sha256(&sector))
    }

    /// Bytes that are done, and the bytes of all.
    pub fn done(&self) -> (u64, u64) {
        let done = self.of.saturating_sub(self.left).saturating_add(self.wiped);
        (done, self.of.saturating_add(self.behind().1))
    }

    /// Where what is behind the data begins, and its bytes up to the first part: it held plaintext.
    pub fn behind(&self) -> (u64, u64) {
        let at = self.of.saturating_add(SHIFT_BYTES);
        (at, self.first.at.saturating_sub(at))
    }

    fn is_bounded(&self, device_bytes: u64) -> bool {
        let Self { of, left, next, first, wiped, mac: _ } = self;
        let numbers = [*of, *left, first.at].into_iter().chain(next.iter().flat_map(|next| [next.at, next.bytes]));
        let are_whole = numbers.into_iter().all(|number| number.is_multiple_of(UNIT_BYTES) && number <= device_bytes);
        let is_first_apart = first.bytes == FIRST_BYTES
            && of.saturating_add(SHIFT_BYTES + FIRST_BYTES) <= first.at
            && first.at.saturating_add(FIRST_BYTES) <= device_bytes;
        let is_next_right = match next {
            None => [0, FIRST_BYTES].contains(left),
            Some(next) => {
                let end = next.at.saturating_add(next.bytes);
                next.at >= FIRST_BYTES && (1..=SHIFT_BYTES).contains(&next.bytes) && end == *left
            }
        };
        let is_wiped_right = *wiped == 0 || *left == 0 && *wiped <= self.behind().1;
        are_whole
            && is_first_apart
            && is_next_right
            && is_wiped_right
            && (FIRST_BYTES..=device_bytes).contains(of)
            && left <= of
    }
}

/// Whether the header says that the volume is being encrypted in place, rightly or not.
pub fn is_begun(json: &Value) -> bool {
    let requirements = json["config"]["requirements"]["mandatory"].as_array();
    requirements.into_iter().flatten().any(|requirement| requirement == REQUIREMENT)
}

/// How far it is, if the header is one that we make, and keeps within the device.
pub fn progress(json: &Value, device_bytes: u64) -> Option<Progress> {
    let is_alone = json["config"]["requirements"]["mandatory"] == json!([REQUIREMENT]);
    let is_shifted = json["segments"]["0"]["offset"] == json!(SHIFT_BYTES.to_string());
    let (_, token) = our_token(json).filter(|_| is_alone && is_shifted)?;
    token.encrypting.filter(|progress| progress.is_bounded(device_bytes))
}

/// The header of a volume with what it says while it is being encrypted.
pub fn with(json: &Value, progress: Option<Progress>) -> Option<Value> {
    let (id, token) = our_token(json)?;
    let (id, mut header) = (id.to_owned(), json.clone());
    let config = header["config"].as_object_mut()?;
    match progress {
        Some(_) => config.insert("requirements".to_owned(), json!({ "mandatory": [REQUIREMENT] })),
        None => config.remove("requirements"),
    };
    header["tokens"][id] = serde_json::to_value(token.with_progress(progress)).ok()?;
    Some(header)
}

/// The volume as it will be, judged as any other: for who holds its key to it, or is to go on.
pub fn volume(device: &Device, copies: &Copies) -> Result<Volume, VolumeError> {
    let as_done = progress(&copies.json, device.size_bytes).and_then(|_| with(&copies.json, None));
    // The allow-list says what is wrong with it.
    view(device, copies, as_done.as_ref().unwrap_or(&copies.json))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: u64 = 64 << 20;

    fn right() -> Progress {
        let part = |at, bytes| Part { at, bytes, sha256: String::new() };
        let next = Some(part(3 << 20, 2 << 20));
        Progress { of: 40 << 20, left: 5 << 20, next, first: part(63 << 20, FIRST_BYTES), wiped: 0, mac: String::new() }
    }

    #[test]
    fn whoever_has_no_key_says_nothing_of_it() {
        let xts = |byte| Xts::new(cryptattach_xts::Key::of(&[[byte; 32], [7; 32]].concat()).unwrap(), 4096, 0);
        let sealed = right().sealed(&xts(1));
        assert!(sealed.is_sealed(&xts(1)) && !sealed.is_sealed(&xts(2)) && !right().is_sealed(&xts(1)));
        let done = Progress { left: 0, next: None, ..sealed.clone() };
        assert!(!done.is_sealed(&xts(1)) && !Progress { of: 39 << 20, ..sealed }.is_sealed(&xts(1)));
    }

    #[test]
    fn what_leads_out_of_its_bounds_is_no_progress() {
        assert!(right().is_bounded(DEVICE));
        assert!(Progress { next: None, left: FIRST_BYTES, ..right() }.is_bounded(DEVICE));
        assert!(Progress { next: None, left: 0, wiped: 7 << 20, ..right() }.is_bounded(DEVICE));
        type Change = fn(&mut Progress);
        let changes: [(&str, Change); 17] = [
            ("beyond the device", |p| p.of = 65 << 20),
            ("over the part that waits", |p| p.of = 47 << 20),
            ("no first part", |p| p.of = 0),
            ("more left than there is", |p| p.left = 41 << 20),
            ("not the end of what is left", |p| p.left = 6 << 20),
            ("no next part", |p| p.next = None),
            ("a next part though all is done", |p| p.left = 0),
            ("a next part of no bytes", |p| p.next.as_mut().unwrap().bytes = 0),
            ("a next part over the first one", |p| {
                p.next = Some(Part { at: 0, bytes: 5 << 20, sha256: String::new() })
            }),
            ("a part longer than the shift", |p| {
                p.left = 19 << 20;
                p.next = Some(Part { at: 2 << 20, bytes: 17 << 20, sha256: String::new() });
            }),
            ("an end beyond all numbers", |p| p.next.as_mut().unwrap().at = u64::MAX - 4095),
            ("a file system beyond all numbers", |p| p.of = u64::MAX - 4095),
            ("half a block", |p| p.first.at += 512),
            ("a first part beyond the end", |p| p.first.at = DEVICE),
            ("a longer first part", |p| p.first.bytes *= 2),
            ("wiped too early", |p| p.wiped = 4096),
            ("wiped too much", |p| {
                (p.left, p.next, p.wiped) = (0, None, 8 << 20);
            }),
        ];
        for (what, change) in changes {
            let mut progress = right();
            change(&mut progress);
            assert!(!progress.is_bounded(DEVICE), "{what}");
        }
        assert!(!right().is_bounded(63 << 20), "a device that was cut short");
    }

    #[test]
    fn a_header_says_it_and_no_more_once_it_is_done() {
        let plain = json!({
            "config": {"json_size": "12288"}, "segments": {"0": {"offset": "16777216"}},
            "tokens": {"3": {"type": "cryptattach", "keyslots": [], "store": "s", "key": "77b0c1aa-7d44-4c1b-9d0a-52b1a6f0c3de"}},
        });
        let begun = with(&plain, Some(right())).unwrap();
        assert!(is_begun(&begun) && !is_begun(&plain));
        assert_eq!(progress(&begun, DEVICE), Some(right()));
        assert_eq!(with(&begun, None).unwrap(), plain);
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 5] = [
            ("another requirement beside", |h| h["config"]["requirements"]["mandatory"] = json!([REQUIREMENT, "x"])),
            ("none", |h| h["config"] = json!({})),
            ("another place of the data", |h| h["segments"]["0"]["offset"] = json!("8388608")),
            ("a member that nobody knows", |h| h["tokens"]["3"]["encrypting"]["x"] = json!(1)),
            ("no token", |h| h["tokens"] = json!({})),
        ];
        for (what, change) in changes {
            let mut json = begun.clone();
            change(&mut json);
            assert_eq!(progress(&json, DEVICE), None, "{what}");
        }
    }
}
