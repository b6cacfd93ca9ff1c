//! A re-encryption as the header tells it: how far it is, and how it ends.
//!
//! libcryptsetup must not see a header whose last segment is done while the flag still stands: it begins such a
//! re-encryption once more at 0, from old to new over data that is new already, or opens the volume never again. So that is
//! judged here first, and the header is finished as libcryptsetup's teardown would have done. docs/rotation.md has the table.

use serde_json::{Map, Value, json};

use super::token::{self, Token};
use crate::base::key::KeyReference;

const REQUIREMENT: &str = "online-reencrypt";
const PREVIOUS: &str = "backup-previous";
const FINAL: &str = "backup-final";
const HOTZONE: &str = "in-reencryption";

/// How far a re-encryption is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There is none.
    None,
    /// Between two hotzones.
    Clean,
    /// In a hotzone: what is in it is partly old, partly new.
    Crash,
    /// All data has the new key; the header still says that it is under way. Only [`finished`] may go on from here.
    AllDone,
    /// It encrypts or decrypts in place, or nobody knows it.
    Foreign,
}

/// Of the two keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Old,
    New,
}

/// Judges the JSON area.
pub fn state(json: &Value) -> State {
    let requirements = json["config"]["requirements"]["mandatory"].as_array().map(Vec::as_slice).unwrap_or_default();
    let (previous, last) = (by_flag(json, PREVIOUS), by_flag(json, FINAL));
    let digests = (previous.and_then(|id| digest_of(json, id)), last.and_then(|id| digest_of(json, id)));
    match (requirements, digests) {
        ([], _) => State::None,
        ([Value::String(one)], (Some(old), Some(new))) if one.starts_with(REQUIREMENT) && old != new => {
            let mut data = data_segments(json);
            match () {
                () if data.iter().any(|(_, segment)| has_flag(segment, HOTZONE)) => State::Crash,
                () if !data.is_empty() && data.iter().all(|(id, _)| digest_of(json, id) == Some(new)) => State::AllDone,
                () if data.drain(..).all(|(id, _)| digest_of(json, id).is_some()) => State::Clean,
                () => State::Foreign,
            }
        }
        _ => State::Foreign,
    }
}

/// The JSON area that libcryptsetup's teardown would have left of an all-done header; the token names the new key. `None` of
/// any other.
pub fn finished(json: &Value) -> Option<Value> {
    (state(json) == State::AllDone).then(|| one_side(json, Side::New)).flatten()
}

/// The header as if all data were under one of the keys; for checks of that key, never for a mapping.
pub fn one_side(json: &Value, side: Side) -> Option<Value> {
    let mut header = side_of(json, side)?;
    promote(&mut header);
    Some(header)
}

fn side_of(json: &Value, side: Side) -> Option<Value> {
    let (flag, other) = match side {
        Side::Old => (PREVIOUS, FINAL),
        Side::New => (FINAL, PREVIOUS),
    };
    let id = by_flag(json, flag)?;
    let (kept, gone) = (digest_of(json, id)?, digest_of(json, by_flag(json, other)?)?);
    let mut segment = json["segments"][id].clone();
    segment.as_object_mut()?.remove("flags");
    collapsed(json, kept, gone, segment)
}

/// The header with one segment, of this key, and without the other one's keyslots.
fn collapsed(json: &Value, kept: &str, gone: &str, segment: Value) -> Option<Value> {
    let mut header = json.clone();
    header["segments"] = json!({ "0": segment });
    header["config"].as_object_mut()?.remove("requirements");
    let of_gone = strings(&json["digests"][gone]["keyslots"]);
    header["keyslots"]
        .as_object_mut()?
        .retain(|number, keyslot| keyslot["type"] != "reencrypt" && !of_gone.contains(&number.as_str()));
    for (id, digest) in header["digests"].as_object_mut()? {
        digest.as_object_mut()?.insert("segments".to_owned(), if id == kept { json!(["0"]) } else { json!([]) });
    }
    forget_missing_keyslots(&mut header);
    Some(header)
}

/// No digest and no token names a keyslot that is not there.
fn forget_missing_keyslots(header: &mut Value) {
    let there: Vec<_> = header["keyslots"].as_object().into_iter().flat_map(Map::keys).cloned().collect();
    let keep = |thing: &mut Value| {
        if let Some(list) = thing.get_mut("keyslots").and_then(Value::as_array_mut) {
            list.retain(|number| there.iter().any(|there| number == there));
        }
    };
    if let Some(digests) = header["digests"].as_object_mut() {
        digests.values_mut().for_each(keep);
        digests
            .retain(|_, digest| !strings(&digest["keyslots"]).is_empty() || !strings(&digest["segments"]).is_empty());
    }
    header["tokens"].as_object_mut().into_iter().flat_map(Map::values_mut).for_each(keep);
}

/// A header whose data is under the key that its token names as the next one, in its last form: the token names that key
/// alone, and of the keyslots that the token claims those stay that are to stay. `None` if nothing is to be changed.
pub fn settled(json: &Value) -> Option<Value> {
    let mut header = if state(json) == State::AllDone { side_of(json, Side::New)? } else { json.clone() };
    if state(&header) != State::None {
        return None;
    }
    let (id, token) = our_token(&header)?;
    let next = token.next.as_ref().filter(|next| digest_of(&header, "0") == Some(&next.digest))?;
    let (id, stay) = (id.to_owned(), next.keyslots.clone());
    let goes = |number: &String| token.keyslots.contains(number) && !stay.contains(number);
    header["keyslots"].as_object_mut()?.retain(|number, _| !goes(number));
    header["tokens"][&id] = serde_json::to_value(Token::new(&next.reference(), stay)).ok()?;
    forget_missing_keyslots(&mut header);
    Some(header)
}

/// A header that has both keys and no re-encryption yet, as if it were done.
pub(super) fn as_next(json: &Value) -> Option<Value> {
    let (_, token) = our_token(json)?;
    let mut header = collapsed(json, &token.next?.digest, digest_of(json, "0")?, json["segments"]["0"].clone())?;
    promote(&mut header);
    Some(header)
}

/// Makes the next key of our token the one that it names, if the data is under that.
fn promote(header: &mut Value) {
    let promoted = our_token(header).and_then(|(id, token)| {
        let next = token.next.as_ref().filter(|next| digest_of(header, "0") == Some(&next.digest))?;
        let token = Token::new(&next.reference(), token.keyslots.clone());
        Some((id.to_owned(), serde_json::to_value(token).ok()?))
    });
    if let Some((id, token)) = promoted {
        header["tokens"][id] = token;
    }
}

/// Our token, and its number.
pub fn our_token(json: &Value) -> Option<(&str, Token)> {
    let tokens = json["tokens"].as_object()?;
    let (id, token) = tokens.iter().find(|(_, token)| token["type"] == token::TYPE)?;
    Some((id, Token::from_json(token)?.ok()?))
}

/// The key that our token names as the next one.
pub fn next_reference(json: &Value) -> Option<KeyReference> {
    Some(our_token(json)?.1.next?.reference())
}

/// Whether our token names a next key.
pub fn is_rotation(json: &Value) -> bool {
    our_token(json).is_some_and(|(_, token)| token.next.is_some())
}

/// Whether no keyslot stays, once a rotation has ended.
pub fn is_strict(json: &Value) -> bool {
    our_token(json).is_some_and(|(_, token)| token.next.map_or(token.keyslots, |next| next.keyslots).is_empty())
}

/// Bytes of the data that have the new key, and the bytes of all; for the second one the device's size is needed.
pub fn progress(json: &Value, device_bytes: u64) -> (u64, u64) {
    let (data, new) = (data_segments(json), by_flag(json, FINAL).and_then(|id| digest_of(json, id)));
    let start = data.first().map_or(0, |(_, segment)| number(&segment["offset"]));
    let left = data.iter().find(|(id, segment)| digest_of(json, id) != new || has_flag(segment, HOTZONE));
    let done = left.map_or(device_bytes, |(_, segment)| number(&segment["offset"]));
    (done.saturating_sub(start), device_bytes.saturating_sub(start))
}

/// Between two stretches: where the part of the data begins that has the old key, which is all that follows.
pub fn boundary(json: &Value) -> Option<u64> {
    let (old, new) = (by_flag(json, PREVIOUS)?, by_flag(json, FINAL)?);
    let data = data_segments(json);
    let has_key_of = |(id, _): &(&String, &Value), backup| digest_of(json, id) == digest_of(json, backup);
    let done = data.iter().take_while(|segment| has_key_of(segment, new)).count();
    let is_clean = state(json) == State::Clean && data[done..].iter().all(|segment| has_key_of(segment, old));
    let start = |segment: &(&String, &Value)| number(&segment.1["offset"]);
    let (first, rest) = (data.first().map(start)?, data.get(done).map(start)?);
    rest.checked_sub(first).filter(|_| is_clean)
}

/// The same in a hundred parts.
pub fn percent((done, all): (u64, u64)) -> u64 {
    u64::try_from(u128::from(done) * 100 / u128::from(all.max(1))).unwrap_or(100)
}

/// Whether the header is one that `key rotate` has made and libcryptsetup has brought forward, and nothing else: a
/// surprise re-encryption is a way to have a disk decrypted (CVE-2021-4122). In words, what is not.
pub fn check_midway(json: &Value) -> Result<(), String> {
    let wrong = |what: &str| Err(what.to_owned());
    if json["config"]["requirements"]["mandatory"] != json!(["online-reencrypt-v2"]) {
        return wrong("its requirement is not 'online-reencrypt-v2'");
    }
    if our_token(json).is_none_or(|(_, token)| token.next.is_none()) {
        return wrong("its token names no next key: 'cryptattach key rotate' has not begun this");
    }
    let (Some(previous), Some(last)) = (by_flag(json, PREVIOUS), by_flag(json, FINAL)) else {
        return wrong("it has no backup segments");
    };
    let (mut before, mut after) = (json["segments"][previous].clone(), json["segments"][last].clone());
    [&mut before, &mut after].into_iter().for_each(|segment| segment["flags"] = Value::Null);
    let data = data_segments(json);
    if before != after || before["size"] != "dynamic" || !(1..=3).contains(&data.len()) {
        return wrong("its old and new segments differ in more than the key");
    }
    let backups = json["segments"].as_object().map_or(0, Map::len) - data.len();
    let (start, mut at) = (number(&before["offset"]), number(&before["offset"]));
    for (index, (id, segment)) in data.iter().enumerate() {
        let tweak = at.checked_sub(start).map(|distance| (distance / 512).to_string());
        let is_last = index + 1 == data.len();
        let flags = strings(&segment["flags"]);
        let is_right = segment["type"] == "crypt"
            && number(&segment["offset"]) == at
            && segment["iv_tweak"].as_str() == tweak.as_deref()
            && ["encryption", "sector_size", "integrity"].iter().all(|member| segment[member] == before[member])
            && (segment["size"] != "dynamic" || is_last)
            && (flags.is_empty() || flags == [HOTZONE])
            && digest_of(json, id).is_some();
        let end = at.checked_add(if segment["size"] == "dynamic" { 512 } else { number(&segment["size"]) });
        match end.filter(|end| is_right && *end > at) {
            Some(end) => at = end,
            None => return wrong("its segments are not those of a re-encryption from start to end"),
        }
    }
    let mut runs = json["keyslots"].as_object().into_iter().flatten().filter(|(_, slot)| slot["type"] == "reencrypt");
    let run = runs.next();
    let is_ours = |slot: &Value| {
        slot["mode"] == "reencrypt"
            && slot["direction"] == "forward"
            && slot["area"]["type"] == "checksum"
            && slot["area"]["hash"] == "sha256"
    };
    let is_known = match run {
        Some((_, slot)) => is_ours(slot),
        // Teardown removes it before the flag.
        None => state(json) == State::AllDone,
    };
    if backups != 2 || runs.next().is_some() || !is_known {
        return wrong("it is not re-encrypted forward, with SHA-256 checksums");
    }
    let sides = [digest_of(json, previous), digest_of(json, last)];
    let is_of_run = |digest: &Value| run.is_some_and(|(number, _)| strings(&digest["keyslots"]) == [number.as_str()]);
    let mut digests = json["digests"].as_object().into_iter().flatten();
    match digests.all(|(id, digest)| sides.contains(&Some(id)) || is_of_run(digest)) {
        true => Ok(()),
        false => wrong("it has digests of other keys than the two"),
    }
}

/// The segments with the data, in their order.
fn data_segments(json: &Value) -> Vec<(&String, &Value)> {
    let segments = json["segments"].as_object().into_iter().flatten();
    let is_backup = |segment: &Value| strings(&segment["flags"]).iter().any(|flag| flag.starts_with("backup-"));
    let mut data: Vec<_> = segments.filter(|(_, segment)| !is_backup(segment)).collect();
    data.sort_by_key(|(id, _)| id.parse::<u32>().unwrap_or(u32::MAX));
    data
}

/// The hotzone: where it begins on the device, its bytes, where that is in the data, and the encryption sector's bytes.
pub(super) fn hotzone(json: &Value) -> Option<(u64, u64, u64, u64)> {
    let data = data_segments(json);
    let (_, hot) = data.iter().find(|(_, segment)| has_flag(segment, HOTZONE))?;
    let (offset, start) = (number(&hot["offset"]), number(&json["segments"][by_flag(json, FINAL)?]["offset"]));
    Some((offset, number(&hot["size"]), offset.checked_sub(start)?, hot["sector_size"].as_u64()?))
}

/// The keyslot whose area has the checksums of the hotzone, and the bytes of the block that each is of.
pub(super) fn checksums(json: &Value) -> Option<(&Value, u64)> {
    let mut keyslots = json["keyslots"].as_object()?.values();
    let keyslot = keyslots.find(|keyslot| keyslot["type"] == "reencrypt")?;
    let area = &keyslot["area"];
    let is_known = area["type"] == "checksum" && area["hash"] == "sha256";
    is_known.then(|| Some((keyslot, area["sector_size"].as_u64()?)))?
}

/// Where the key material of a keyslot stands: offset and bytes.
pub(super) fn area(keyslot: &Value) -> (u64, u64) {
    (number(&keyslot["area"]["offset"]), number(&keyslot["area"]["size"]))
}

fn by_flag<'a>(json: &'a Value, flag: &str) -> Option<&'a String> {
    json["segments"].as_object()?.iter().find(|(_, segment)| has_flag(segment, flag)).map(|(id, _)| id)
}

fn has_flag(segment: &Value, flag: &str) -> bool {
    strings(&segment["flags"]).contains(&flag)
}

/// The number of the digest that a segment's key has; of a hotzone's two the first.
pub fn digest_of<'a>(json: &'a Value, segment: &str) -> Option<&'a String> {
    let mut digests = json["digests"].as_object()?.iter();
    digests.find(|(_, digest)| strings(&digest["segments"]).contains(&segment)).map(|(id, _)| id)
}

/// The texts of a list; none if it is no list.
pub fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// LUKS2 writes 64-bit numbers as texts.
fn number(text: &Value) -> u64 {
    text.as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{super::allow_list, *};

    macro_rules! header {
        ($name:literal) => {
            serde_json::from_str::<Value>(include_str!(concat!("../../../fuzz/corpus/reencryption/", $name))).unwrap()
        };
    }

    /// As cryptsetup 2.6.1 left them when it was killed, with a token of ours.
    fn killed() -> [(Value, State); 6] {
        [
            (header!("begun"), State::Clean),
            (header!("clean"), State::Clean),
            (header!("crash"), State::Crash),
            (header!("all-done"), State::AllDone),
            (header!("without-old-keyslot"), State::AllDone),
            (header!("done"), State::None),
        ]
    }

    #[test]
    fn each_moment_is_judged() {
        let mib = |(done, all): (u64, u64)| (done >> 20, all >> 20);
        let done: Vec<_> = killed().iter().map(|(json, _)| mib(progress(json, 20 << 20))).collect();
        assert_eq!(done[..4], [(0, 4), (2, 4), (2, 4), (4, 4)]);
        let old_from: Vec<_> = killed().iter().map(|(json, _)| boundary(json)).collect();
        assert_eq!(old_from, [Some(0), Some(2 << 20), None, None, None, None]);
        // An old part before a new one is none of ours.
        let mut json = header!("clean");
        for digest in json["digests"].as_object_mut().unwrap().values_mut() {
            let segments = digest["segments"].as_array_mut().unwrap();
            segments.iter_mut().for_each(|segment| match segment.as_str() {
                Some("0") => *segment = json!("1"),
                Some("1") => *segment = json!("0"),
                _ => {}
            });
        }
        assert_eq!((state(&json), boundary(&json)), (State::Clean, None));
        for (json, expected) in killed() {
            assert_eq!(state(&json), expected, "{json}");
            assert_eq!(check_midway(&json).is_ok(), expected != State::None, "{:?}", check_midway(&json));
            assert_eq!(finished(&json).is_some(), expected == State::AllDone);
        }
    }

    #[test]
    fn a_finished_header_is_the_one_that_libcryptsetup_would_have_left() {
        let mut done = header!("done");
        let token = json!({"type": "cryptattach", "keyslots": ["1"], "store": "s", "key": "77b0c1aa-7d44-4c1b-9d0a-52b1a6f0c3de"});
        done["tokens"]["0"] = token;
        for mut json in [header!("all-done"), header!("without-old-keyslot")] {
            // Made by runs of their own, with salts of their own.
            json["digests"]["1"] = done["digests"]["1"].clone();
            json["digests"]["1"]["segments"] = json!(["0", "2"]);
            json["keyslots"]["1"] = done["keyslots"]["1"].clone();
            assert_eq!(finished(&json).unwrap(), done);
            let settled = settled(&json).unwrap();
            assert_eq!((&settled["keyslots"], &settled["tokens"]["0"]["keyslots"]), (&json!({}), &json!([])));
            assert!(super::settled(&settled).is_none(), "nothing is left to do");
        }
    }

    #[test]
    fn a_re_encryption_that_is_not_ours_to_the_letter_is_refused() {
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 16] = [
            ("no next key", |h| drop(h["tokens"]["0"].as_object_mut().unwrap().remove("next"))),
            ("another requirement", |h| h["config"]["requirements"]["mandatory"][0] = json!("online-reencrypt-v3")),
            ("two requirements", |h| h["config"]["requirements"]["mandatory"] = json!(["online-reencrypt-v2", "x"])),
            ("decryption", |h| h["keyslots"]["2"]["mode"] = json!("decrypt")),
            ("backward", |h| h["keyslots"]["2"]["direction"] = json!("backward")),
            ("journal", |h| h["keyslots"]["2"]["area"]["type"] = json!("journal")),
            ("another hash", |h| h["keyslots"]["2"]["area"]["hash"] = json!("sha1")),
            ("two runs", |h| h["keyslots"]["5"] = h["keyslots"]["2"].clone()),
            ("a plain part", |h| h["segments"]["0"]["type"] = json!("linear")),
            ("a null cipher", |h| h["segments"]["1"]["encryption"] = json!("cipher_null-ecb")),
            ("another cipher at the end", |h| h["segments"]["3"]["encryption"] = json!("cipher_null-ecb")),
            ("a gap", |h| h["segments"]["1"]["offset"] = json!("18878464")),
            ("another IV", |h| h["segments"]["1"]["iv_tweak"] = json!("0")),
            ("another sector size", |h| h["segments"]["1"]["sector_size"] = json!(512)),
            ("another flag", |h| h["segments"]["1"]["flags"] = json!(["x"])),
            ("a third key", |h| h["digests"]["7"] = json!({"keyslots": ["7"], "segments": ["1"]})),
        ];
        for (what, change) in changes {
            let mut json = header!("clean");
            change(&mut json);
            assert!(check_midway(&json).is_err(), "{what}");
        }
        // Nobody is sent to the program that would destroy it.
        let mut json = header!("clean");
        json["segments"]["1"]["iv_tweak"] = json!("0");
        assert!(allow_list::under_way("online-reencrypt-v2", &json, 1 << 30).next_step().starts_with("do not resume"));
    }
}
