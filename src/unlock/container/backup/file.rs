//! The file of a backup: a line that says what it is, one line for each object, in order, and the author's word for all of it.
//!
//! Two backups can be compared by `diff`. The file is not trusted: it is read with an end, and each line has one form.

use std::{collections::BTreeMap, fmt, ops::Range};

use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::slot::Slot;
use crate::{
    base::key::{Consumer, ContainerKeyId, Epoch, HostName, KeyId, MAX_SEALED_BYTES, SealedKey, StoreName},
    keys::store::Current,
    unlock::enrol::Admitted,
};

/// The largest file: 200,000 keys fit.
pub const MOST_BYTES: usize = 512 << 20;
/// The longest line: a sealed key, and what names it.
const MOST_BYTES_OF_LINE: usize = MAX_SEALED_BYTES + 1024;

/// More objects than any container has; memory for their places is bounded.
const MOST_OBJECTS: usize = 1_000_000;

const VERSION: u32 = 1;

/// Why bytes are no backup.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct MalformedBackup {
    /// From 1.
    pub line: usize,
    pub why: String,
}

/// What a backup says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    cryptattach: Kind,
    version: u32,
    pub container: StoreName,
    /// Seconds since 1970-01-01 UTC.
    pub made: u64,
    /// The current container key, whose holder vouches for the backup.
    pub epoch: Epoch,
    /// Keys were being sealed anew under it.
    pub rotating: bool,
    pub fingerprint: String,
    /// What may open the container, as the configuration said then; for people.
    pub policy: String,
    /// How many lines follow before the last one.
    objects: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Backup,
}

impl Head {
    pub fn of(container: StoreName, made: u64, current: Current, fingerprint: String, policy: String) -> Self {
        let Current { epoch, rotating } = current;
        let (cryptattach, version) = (Kind::Backup, VERSION);
        Self { cryptattach, version, container, made, epoch, rotating, fingerprint, policy, objects: 0 }
    }

    pub fn current(&self) -> Current {
        Current { epoch: self.epoch, rotating: self.rotating }
    }
}

/// What an object is called. The order is that of the lines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    Consumers(KeyId),
    Sealed(Slot),
    /// A host in the administrator's register.
    Register(HostName),
}

impl Name {
    fn parse(part: &str, name: &str) -> Option<Self> {
        Some(match part {
            "consumers" => Self::Consumers(name.parse().ok()?),
            "container-key" => Self::Sealed(Slot::ContainerKey(name.parse().ok()?)),
            "host" => Self::Sealed(Slot::Host(name.parse().ok()?)),
            "key" => Self::Sealed(Slot::Key(name.parse().ok()?)),
            "register" => Self::Register(name.parse().ok()?),
            _ => return None,
        })
    }

    fn parts(&self) -> (&'static str, String) {
        match self {
            Self::Consumers(key) => ("consumers", key.to_string()),
            Self::Sealed(Slot::ContainerKey(epoch)) => ("container-key", epoch.to_string()),
            Self::Sealed(Slot::Host(host)) => ("host", host.to_string()),
            Self::Sealed(Slot::Key(key)) => ("key", key.to_string()),
            Self::Register(host) => ("register", host.to_string()),
        }
    }
}

/// An object of a backup.
#[derive(Clone)]
pub enum Object {
    Sealed(SealedKey),
    Consumers(Vec<Consumer>),
    Register(Box<Admitted>),
}

impl Object {
    fn read(name: &Name, value: Value) -> Result<Self, String> {
        let sealed = |value| SealedKey::from_value(value).map_err(|error| error.to_string());
        let json = |error: serde_json::Error| error.to_string();
        Ok(match name {
            Name::Sealed(slot) => {
                let key = sealed(value)?;
                if let Slot::Key(id) = slot {
                    key.claimed_context_of(id).map_err(|error| error.to_string())?;
                }
                Self::Sealed(key)
            }
            Name::Consumers(_) => {
                let consumers: Vec<Consumer> = serde_json::from_value(value).map_err(json)?;
                if consumers.is_empty() || !consumers.iter().all(Consumer::is_valid) {
                    return Err("these are no consumers".to_owned());
                }
                Self::Consumers(consumers)
            }
            Name::Register(host) => {
                let admitted: Admitted = serde_json::from_value(value).map_err(json)?;
                if admitted.host != *host {
                    return Err(format!("it is the register entry of {}", admitted.host));
                }
                Self::Register(Box::new(admitted))
            }
        })
    }

    fn value(&self) -> serde_json::Result<Value> {
        match self {
            Self::Sealed(key) => serde_json::to_value(key),
            Self::Consumers(consumers) => serde_json::to_value(consumers),
            Self::Register(admitted) => serde_json::to_value(admitted),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Consumers(key) => write!(f, "consumers of key {key}"),
            Self::Sealed(slot) => slot.fmt(f),
            Self::Register(host) => write!(f, "register entry of host {host}"),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    part: String,
    name: String,
    value: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Last {
    /// The container key whose holder has made the backup.
    author: String,
    mac: String,
}

/// A backup that is about to be written.
pub struct Draft {
    text: Vec<u8>,
    author: ContainerKeyId,
}

impl Draft {
    pub fn of(head: Head, objects: &BTreeMap<Name, Object>) -> serde_json::Result<Self> {
        let author = ContainerKeyId { container: head.container.clone(), epoch: head.epoch };
        let mut text = Vec::new();
        let mut add = |json: serde_json::Result<Vec<u8>>| {
            text.extend(json?);
            text.push(b'\n');
            Ok::<_, serde_json::Error>(())
        };
        add(serde_json::to_vec(&Head { objects: objects.len(), ..head }))?;
        for (name, object) in objects {
            let (part, name) = name.parts();
            add(serde_json::to_vec(&Line { part: part.to_owned(), name, value: object.value()? }))?;
        }
        Ok(Self { text, author })
    }

    /// What the author has to vouch for.
    pub fn digest(&self) -> [u8; 32] {
        sha256(&self.text)
    }

    /// The whole file.
    pub fn vouched(self, mac: String) -> serde_json::Result<Vec<u8>> {
        let Self { mut text, author } = self;
        serde_json::to_writer(&mut text, &Last { author: author.to_string(), mac })?;
        text.push(b'\n');
        Ok(text)
    }
}

/// A file that has the form of a backup. Whether it is authentic, its author's container key tells.
pub struct BackupFile {
    bytes: Vec<u8>,
    pub head: Head,
    /// Where the lines are.
    index: BTreeMap<Name, Range<usize>>,
    /// The author's word.
    pub mac: String,
    pub digest: [u8; 32],
}

impl BackupFile {
    pub fn parse(bytes: Vec<u8>) -> Result<Self, MalformedBackup> {
        let wrong = |line, why: &str| MalformedBackup { line, why: why.to_owned() };
        if bytes.len() > MOST_BYTES {
            return Err(wrong(1, &format!("the file has more than {MOST_BYTES} bytes")));
        }
        let mut lines = Vec::new();
        let mut start = 0;
        for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            lines.push(start..at);
            start = at + 1;
            if lines.len() > MOST_OBJECTS + 2 {
                return Err(wrong(lines.len(), &format!("the file has more than {MOST_OBJECTS} objects")));
            }
        }
        let cut = |line| wrong(line, "the file is cut off: its last line is not its author's");
        if start != bytes.len() || lines.len() < 2 {
            return Err(cut(lines.len() + 1));
        }
        if let Some(at) = lines.iter().position(|line| line.len() > MOST_BYTES_OF_LINE) {
            return Err(wrong(at + 1, &format!("it has more than {MOST_BYTES_OF_LINE} bytes")));
        }
        let head: Head = serde_json::from_slice(&bytes[lines[0].clone()])
            .map_err(|error| wrong(1, &format!("it is not the first line of a backup: {error}")))?;
        if head.version != VERSION {
            return Err(wrong(1, &format!("the backup has version {}; expected {VERSION}", head.version)));
        }
        let (last, objects) = (lines.len() - 1, lines.len() - 2);
        let Ok(Last { author, mac }) = serde_json::from_slice(&bytes[lines[last].clone()]) else {
            return Err(cut(last + 1));
        };
        if head.objects != objects {
            return Err(wrong(1, &format!("it says {} objects, but {objects} follow", head.objects)));
        }
        if author != format!("{}/kek/{}", head.container, head.epoch) {
            return Err(wrong(last + 1, "the author is not the holder of the container key that the first line names"));
        }
        let mut index: BTreeMap<Name, Range<usize>> = BTreeMap::new();
        for (at, range) in lines.iter().enumerate().take(last).skip(1) {
            let (name, _) = read(&bytes[range.clone()]).map_err(|why| wrong(at + 1, &why))?;
            if index.last_key_value().is_some_and(|(before, _)| *before >= name) {
                return Err(wrong(at + 1, "it is there twice, or not in its place: lines are in order"));
            }
            index.insert(name, range.clone());
        }
        let digest = sha256(&bytes[..lines[last].start]);
        Ok(Self { bytes, head, index, mac, digest })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The names of all objects, in order.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.index.keys()
    }

    pub fn object(&self, name: &Name) -> Option<Object> {
        // Each line was read before.
        read(&self.bytes[self.index.get(name)?.clone()]).ok().map(|(_, object)| object)
    }

    pub fn sealed(&self, slot: &Slot) -> Option<SealedKey> {
        match self.object(&Name::Sealed(slot.clone())) {
            Some(Object::Sealed(key)) => Some(key),
            _ => None,
        }
    }

    pub fn consumers(&self, key: &KeyId) -> Vec<Consumer> {
        match self.object(&Name::Consumers(*key)) {
            Some(Object::Consumers(consumers)) => consumers,
            _ => Vec::new(),
        }
    }

    /// The entries of the administrator's register.
    pub fn register(&self) -> impl Iterator<Item = Box<Admitted>> {
        let hosts = self.names().filter(|name| matches!(name, Name::Register(_)));
        hosts.filter_map(
            |name| if let Some(Object::Register(admitted)) = self.object(name) { Some(admitted) } else { None },
        )
    }

    /// The sealed objects, in order.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.names().filter_map(|name| if let Name::Sealed(slot) = name { Some(slot) } else { None })
    }
}

fn read(line: &[u8]) -> Result<(Name, Object), String> {
    let Line { part, name, value } = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let name = Name::parse(&part, &name).ok_or("it does not name an object of a container")?;
    let object = Object::read(&name, value)?;
    Ok((name, object))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "3f2a9c1e-0000-4000-8000-000000000001";

    fn backup() -> String {
        let current = Current { epoch: Epoch::FIRST, rotating: false };
        let head = Head::of("logs".parse().unwrap(), 7, current, "ab".to_owned(), "any(owner)".to_owned());
        let consumer =
            Consumer { service: "cinder".into(), resource_type: "volume".into(), resource_id: "1".to_owned() };
        let consumers = |id: &str| (Name::Consumers(id.parse().unwrap()), Object::Consumers(vec![consumer.clone()]));
        let objects = [consumers(KEY), consumers(&KEY.replace("e-", "f-"))].into_iter().collect();
        let draft = Draft::of(head, &objects).unwrap();
        String::from_utf8(draft.vouched("word".to_owned()).unwrap()).unwrap()
    }

    fn refused(text: &str) -> String {
        BackupFile::parse(text.as_bytes().to_vec()).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read() {
        let text = backup();
        let file = BackupFile::parse(text.clone().into_bytes()).unwrap();
        assert_eq!((file.head.container.as_str(), file.mac.as_str(), file.names().count()), ("logs", "word", 2));
        assert!(
            matches!(file.object(&Name::Consumers(KEY.parse().unwrap())), Some(Object::Consumers(of)) if of.len() == 1)
        );
        assert_eq!(text.lines().count(), 4, "an object a line");
    }

    #[test]
    fn a_file_that_ends_anywhere_before_its_end_is_refused() {
        let text = backup();
        for end in 0..text.len() {
            assert!(BackupFile::parse(text.as_bytes()[..end].to_vec()).is_err(), "{end}");
        }
    }

    #[test]
    fn hostile_files_are_refused() {
        let text = backup();
        let lines: Vec<&str> = text.lines().collect();
        let of = |lines: &[&str]| lines.join("\n") + "\n";
        let [first, one, two, last] = lines[..] else { panic!("{text}") };
        let without = |from: &str, to: &str| of(&[first, &one.replace(from, to), two, last]);
        for (text, told) in [
            (of(&[first, one, one, last]), "line 3: it is there twice"),
            (of(&[first, two, one, last]), "line 3: it is there twice, or not in its place"),
            (of(&[first, one, last]), "line 1: it says 2 objects, but 1 follow"),
            (of(&[first, one, two, two]), "line 4: the file is cut off"),
            (of(&[&first.replace("\"version\":1", "\"version\":2"), one, two, last]), "version 2"),
            (of(&[&first.replace("\"backup\"", "\"audit\""), one, two, last]), "not the first line of a backup"),
            (of(&[first, one, two, &last.replace("logs/kek/1", "logs/kek/2")]), "the author is not"),
            (without(KEY, "../../etc/passwd"), "line 2: it does not name an object"),
            (without("\"consumers\"", "\"kek\""), "line 2: it does not name an object"),
            (without("cinder", ""), "no consumers"),
            (without("\"value\"", "\"value\":[],\"value\""), "duplicate field"),
            (without("cinder", &"x".repeat(MOST_BYTES_OF_LINE)), "line 2: it has more than"),
            (without("[{", &("[".repeat(100_000) + "[{")), "recursion limit"),
            ("\n\n\n".to_owned(), "line 1: "),
        ] {
            assert!(refused(&text).contains(told), "{told}: {}", refused(&text));
        }
    }
}
