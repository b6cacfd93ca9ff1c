//! One record as a line: what makes it a link of the chain, and how it is shortened to fit.

use serde::Deserialize;
use serde_json::Value;

use super::{Digest, Event};
use crate::base::hex;

/// The most bytes of a line, with its end.
pub const MOST_BYTES: usize = 1024;

/// What the chain needs of a record; its other members are not looked at.
#[derive(Deserialize)]
pub struct Link {
    /// The number of the record: one more than that of the record before.
    pub seq: u64,
    /// The hash of the record before; zeros if there is none.
    #[serde(with = "hex")]
    pub prev: Digest,
    /// Seconds since 1970-01-01 UTC.
    pub time: u64,
    /// The line before it was not finished.
    #[serde(default)]
    pub torn: bool,
    /// See [`Event::tpm`].
    pub tpm: Option<String>,
}

impl Link {
    /// `None` if the line is not a record.
    pub fn of(line: &[u8]) -> Option<Self> {
        // Its end is not in it.
        if line.len() < MOST_BYTES { serde_json::from_slice(line).ok() } else { None }
    }

    /// What the TPM's index had before this record was anchored there, and what it has since then; the record has this hash.
    pub fn extended(&self, hash: &Digest) -> Option<[Digest; 2]> {
        let before = hex::decode(self.tpm.as_deref()?)?.try_into().ok()?;
        Some([before, openssl::sha::sha256(&[before, *hash].concat())])
    }
}

/// Members of the evidence that a step leaves out, with those of the steps before it.
const LEFT_OUT: [&str; 8] = ["tree", "devices", "device", "swap", "header", "gaps", "volume", "places"];

/// So many are left out where of each place nothing is kept but its path: of replicas that says most.
const PLACES_AS_PATHS: usize = 7;

/// How a record that is too long is shortened: the first step after which it fits. In each: how many of [`LEFT_OUT`] are left out
/// of the evidence, and the most bytes of a text and the most items of a list.
const STEPS: [(usize, usize, usize); 7] = [
    (1, usize::MAX, usize::MAX),
    (6, usize::MAX, usize::MAX),
    (PLACES_AS_PATHS, usize::MAX, usize::MAX),
    (8, usize::MAX, usize::MAX),
    (8, 160, 4),
    (8, 48, 2),
    (8, 16, 1),
];

/// The line, with its end.
pub fn line(
    seq: u64,
    prev: &Digest,
    (time, uid): (u64, u32),
    torn: bool,
    event: &Event<'_>,
) -> serde_json::Result<String> {
    let start = format!("{{\"seq\":{seq},\"prev\":\"{}\",\"time\":{time},\"uid\":{uid}", hex::encode(prev));
    let torn = if torn { ",\"torn\":true" } else { "" };
    // An event has an action at least, so a member follows.
    let joined = |shortened: &str, event: String| format!("{start}{torn}{shortened},{}\n", &event[1..]);
    let mut line = joined("", serde_json::to_string(event)?);
    for (number, step) in STEPS.iter().enumerate() {
        if line.len() <= MOST_BYTES {
            break;
        }
        let mut event = serde_json::to_value(event)?;
        shorten(&mut event, step, false);
        line = joined(&format!(",\"shortened\":{}", number + 1), serde_json::to_string(&event)?);
    }
    Ok(line)
}

fn shorten(value: &mut Value, step: &(usize, usize, usize), in_evidence: bool) {
    let (left_out, most_bytes, most_items) = *step;
    match value {
        Value::Object(members) => {
            members.retain(|name, _| !in_evidence || !LEFT_OUT[..left_out].contains(&&**name));
            for (name, value) in members.iter_mut() {
                if in_evidence && name == "places" && left_out == PLACES_AS_PATHS {
                    *value = paths_of(value);
                }
                shorten(value, step, in_evidence || name == "separation");
            }
        }
        Value::Array(items) => {
            items.truncate(most_items);
            items.iter_mut().for_each(|item| shorten(item, step, in_evidence));
        }
        Value::String(text) if text.len() > most_bytes => *text = middle_left_out(text, most_bytes),
        Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn paths_of(places: &Value) -> Value {
    places.as_array().into_iter().flatten().filter_map(|place| place.get("path").cloned()).collect()
}

/// The beginning and the end: a path says most there.
fn middle_left_out(text: &str, most_bytes: usize) -> String {
    // Six bytes of JSON for one.
    let text = text.replace(char::is_control, "\u{fffd}");
    let half = most_bytes.saturating_sub('…'.len_utf8()) / 2;
    let from = text.len().saturating_sub(half);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let until = (0..=half.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}…{}", &text[..until], &text[from..])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_fits_whatever_is_in_it_and_stays_a_record() {
        let (long, wild) = ("ä".repeat(3000), "\u{1}\"\\".repeat(2000));
        let place = json!({"what": "sealed key", "path": "swift://10.0.0.5:6200/sdb1", "devices": [wild], "tree": {"path": long}});
        let few = json!({"verdict": "apart", "evidence": ["it is"], "places": [place], "volume": {"tree": wild}});
        let replica = json!({"what": "a replica of the sealed key".repeat(6), "path": "swift://10.0.0.5:6200/sdb1"});
        let replicas = json!({"verdict": "apart", "evidence": ["it is"], "places": vec![replica; 6]});
        let many = json!({"verdict": "shared", "evidence": vec![&wild; 100], "places": vec![place; 100]});
        for (text, evidence, step) in [
            ("short", few, 2),
            ("short", replicas, 3),
            ("short", many.clone(), 5),
            (&long, many.clone(), 6),
            (&wild, many, 7),
        ] {
            let event = Event {
                action: "attach",
                device: Some(Path::new(text)),
                key: Some(text.to_owned()),
                name: Some(text.to_owned()),
                volume_id: Some(text),
                separation: Some(evidence),
                overridden: Some("--allow-shared"),
                ..Event::default()
            };
            let line = line(u64::MAX, &[0xab; 32], (u64::MAX, u32::MAX), true, &event).unwrap();
            assert!(line.len() <= MOST_BYTES, "{}: {line}", line.len());
            let link = Link::of(line.trim_end().as_bytes()).unwrap();
            assert_eq!((link.seq, link.prev, link.time, link.torn), (u64::MAX, [0xab; 32], u64::MAX, true));
            let record: Value = serde_json::from_str(&line).unwrap();
            let shortened = record["shortened"].as_u64().unwrap();
            assert!(shortened == step || step > 3 && shortened > 3, "{line}");
            assert!(record["separation"]["verdict"].is_string() && record["overridden"] == "--allow-shared", "{line}");
            assert_eq!(step <= 3, line.contains("swift://10.0.0.5:6200/sdb1"), "{line}");
        }
    }

    #[test]
    fn a_text_is_cut_in_its_middle_and_between_letters() {
        assert_eq!(middle_left_out("/srv/volumes/volume-0001/disk.img", 16), "/srv/v…sk.img");
        for most in 0..20 {
            assert!(middle_left_out("äöüäöüäöüäöü", most).len() <= most.max('…'.len_utf8()));
        }
    }

    #[test]
    fn what_is_not_a_record_is_not_taken_for_one() {
        let prev = hex::encode(&[0; 32]);
        let record = format!("{{\"seq\":1,\"prev\":\"{prev}\",\"time\":2,\"uid\":0,\"action\":\"attach\"}}");
        assert!(Link::of(record.as_bytes()).is_some());
        for wrong in [
            &record[..record.len() - 1],
            "",
            "\0\0\0",
            "{}",
            &record.replace("00\"", "\""),
            &record.replace("2", "2,\"seq\":1"),
        ] {
            assert!(Link::of(wrong.as_bytes()).is_none(), "{wrong}");
        }
        assert!(Link::of(format!("{record}{}", " ".repeat(MOST_BYTES)).as_bytes()).is_none());
    }
}
