//! Copies of LUKS2 headers in files, in the form of `cryptsetup luksHeaderBackup`: both copies of the metadata, and the keyslots.
//!
//! A header from before a rotation says that data is under a key that it is under no more, and one from before a change of
//! passphrases brings the old ones back. So what it is to replace is compared with it first.

use std::{
    borrow::Cow,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde_json::Value;
use uuid::Uuid;

use super::{
    Header, HeaderImage, Volume, VolumeError,
    copies::Copies,
    encrypting,
    header_image::LARGEST_BYTES,
    reencryption::{self, State, digest_of, our_token},
    rekey, signatures,
};
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyId, KeyReference, StoreName},
    },
    sys::{device::Device, durable},
};

/// A header is not backed up, or not restored.
#[derive(Debug, thiserror::Error)]
pub enum HeaderBackupError {
    #[error("cannot {action} the header backup {}", .path.display())]
    File {
        /// "read", "write".
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a backup of a LUKS2 header: {why}", .path.display())]
    NoBackup { path: PathBuf, why: String },
    /// A copy of it is stale a moment later, and an older header in its place loses data.
    #[error("the key of {} is being rotated, or its data is being re-encrypted", .0.display())]
    MidWay(PathBuf),
    #[error("{} is being encrypted in place", .0.display())]
    Encrypting(PathBuf),
    #[error("the header backup belongs to the volume {is}, but {} is the volume {now}", .device.display())]
    OtherVolume { device: PathBuf, is: Uuid, now: Uuid },
    #[error("{} has no LUKS2 header, but holds {found}", .device.display())]
    Foreign { device: PathBuf, found: String },
    #[error("the header backup is from another volume key than the one that {} has now", .0.display())]
    OldKey(PathBuf),
    #[error("the passphrase that is sealed with the key {key} opens no keyslot of the header backup for {}", .device.display())]
    OldPassphrase { device: PathBuf, key: KeyReference },
    #[error("the header backup has no token of ours that could name a key")]
    NoToken,
    #[error("the header backup has another layout than the header of {}", .0.display())]
    Layout(PathBuf),
    #[error("the header backup is not the header of {}; restored, it would change: {}", .device.display(), .changes.join(", "))]
    Older { device: PathBuf, changes: Vec<String> },
    /// Nothing there says that it is the volume.
    #[error("nothing on {} says that it is the volume {volume}", .device.display())]
    NoTrace { device: PathBuf, volume: Uuid },
    /// Its header is a file, or it has none.
    #[error("the configuration says that the header of {} is not on the device itself", .0.display())]
    HeaderElsewhere(PathBuf),
    /// Another device is the volume, with its header.
    #[error("{} is the volume {volume}, and has its header", .device.display())]
    AnotherIs { device: PathBuf, volume: Uuid },
    /// The header on the device, which would say whether its key was rotated, is lost.
    #[error(
        "nothing proves that the key of the header backup is the present one: the store '{store}' has other keys of the volume {volume}: {}",
        .others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    OtherKeys { volume: Uuid, store: StoreName, others: Vec<KeyId> },
}

impl Advice for HeaderBackupError {
    fn exit(&self) -> Exit {
        match self {
            Self::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => Exit::InTheWay,
            Self::File { .. } => Exit::Io,
            Self::Foreign { .. } | Self::NoTrace { .. } | Self::HeaderElsewhere(_) | Self::AnotherIs { .. } => {
                Exit::InTheWay
            }
            Self::MidWay(_)
            | Self::Encrypting(_)
            | Self::NoBackup { .. }
            | Self::OtherVolume { .. }
            | Self::OldKey(_)
            | Self::Layout(_)
            | Self::NoToken
            | Self::OldPassphrase { .. }
            | Self::Older { .. }
            | Self::OtherKeys { .. } => Exit::Header,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                "a backup never overwrites a file: name a new one"
            }
            Self::Encrypting(device) => {
                return Some(
                    format!("'cryptattach encrypt {}' finishes it; back the header up then", device.display()).into(),
                );
            }
            Self::MidWay(device) => {
                return Some(
                    format!("'cryptattach key rotate {}' finishes it; back the header up then", device.display())
                        .into(),
                );
            }
            Self::OtherVolume { .. } | Self::Foreign { .. } | Self::HeaderElsewhere(_) | Self::AnotherIs { .. } => {
                "check that this is the right device"
            }
            Self::NoTrace { .. } => {
                "check that this is the right device: what is at its beginning is written over; if all of its header is lost: --lost"
            }
            Self::OldKey(_) => "take a header backup from after the last rotation: with this one, data would be lost",
            Self::Older { .. } => {
                "--older restores it nevertheless: passphrases and tokens are then those of the time of the backup"
            }
            Self::OtherKeys { .. } => {
                "find out which of them is the present one; --older restores this header nevertheless: write nothing to the volume \
                 until its data was read"
            }
            Self::OldPassphrase { device, .. } => {
                let step = format!(
                    "take a backup from after the last 'key rotate --passphrase'; --older restores this one nevertheless: then \
                     'cryptattach key rotate --passphrase {}' makes a keyslot that opens",
                    device.display()
                );
                return Some(step.into());
            }
            Self::File { .. } | Self::NoBackup { .. } | Self::Layout(_) | Self::NoToken => return None,
        };
        Some(step.into())
    }
}

/// A header as a file has it.
pub struct HeaderBackup {
    image: HeaderImage,
    copies: Copies,
    bytes: u64,
}

/// What restoring a header would do to the one that is there.
#[derive(Debug, PartialEq, Eq)]
pub enum Differs {
    /// Nothing.
    No,
    /// It makes a damaged header whole.
    Repairs,
    /// It changes keyslots or tokens.
    Changes(Vec<String>),
}

/// The bytes of a device's header.
pub fn take(device: &Device) -> Result<Vec<u8>, HeaderBackupError> {
    let failed = |source| HeaderBackupError::File { action: "read", path: device.path.clone(), source };
    let no_header = |why: &str| HeaderBackupError::NoBackup { path: device.path.clone(), why: why.to_owned() };
    let file = device.reopen().map_err(io::Error::other).map_err(failed)?;
    let before = Copies::read(&file).map_err(failed)?.ok_or_else(|| no_header("there is no LUKS2 header"))?;
    check_whole(&before.json, device)?;
    let len = len_of(&before).filter(|len| *len <= device.size_bytes);
    let len = len.ok_or_else(|| no_header("its keyslots reach beyond the device"))?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    let after = Copies::read(&file).map_err(failed)?;
    match after.is_some_and(|after| after.is(&before)) {
        true => Ok(bytes),
        false => Err(failed(io::Error::other("another program has changed the header meanwhile"))),
    }
}

/// Refuses a header that says how far something is.
fn check_whole(json: &Value, device: &Device) -> Result<(), HeaderBackupError> {
    match reencryption::state(json) {
        State::None => Ok(()),
        _ if encrypting::is_begun(json) => Err(HeaderBackupError::Encrypting(device.path.clone())),
        _ => Err(HeaderBackupError::MidWay(device.path.clone())),
    }
}

/// Both copies of the metadata, and the keyslots (LUKS2 On-Disk Format section 2); `None` if that is more than any header has.
fn len_of(copies: &Copies) -> Option<u64> {
    let keyslots: u64 = copies.json["config"]["keyslots_size"].as_str()?.parse().ok()?;
    (copies.size() * 2).checked_add(keyslots).filter(|len| *len <= LARGEST_BYTES)
}

impl HeaderBackup {
    pub fn read(path: &Path) -> Result<Self, HeaderBackupError> {
        let failed = |source| HeaderBackupError::File { action: "read", path: path.to_owned(), source };
        let wrong = |why: &str| HeaderBackupError::NoBackup { path: path.to_owned(), why: why.to_owned() };
        let most = usize::try_from(LARGEST_BYTES).unwrap_or(usize::MAX);
        let bytes = durable::read_bounded(path, most).map_err(failed)?;
        let image = HeaderImage::empty(LARGEST_BYTES).map_err(failed)?;
        image.file().write_all_at(&bytes[..bytes.len().min(most)], 0).map_err(failed)?;
        let copies = Copies::read(image.file()).map_err(failed)?.ok_or_else(|| wrong("it has no whole header"))?;
        let len = len_of(&copies).ok_or_else(|| wrong("its keyslots have no size"))?;
        if bytes.len() as u64 != len {
            return Err(wrong(&format!("it has {} bytes; its header says {len}", bytes.len())));
        }
        if reencryption::state(&copies.json) != State::None {
            return Err(wrong("it was made while the volume was being re-encrypted"));
        }
        copies.uuid().ok_or_else(|| wrong("it has no UUID"))?;
        Ok(Self { image, copies, bytes: len })
    }

    pub fn uuid(&self) -> Uuid {
        self.copies.uuid().unwrap_or_default()
    }

    /// Has it name another place of the key. What it says of keys is proven by nothing here.
    pub fn name_key(&mut self, key: &KeyReference) -> Result<(), HeaderBackupError> {
        let named = our_token(&self.copies.json).and_then(|(number, token)| {
            let token = serde_json::to_value(token.moved(key)).ok()?;
            Some((number.to_owned(), token))
        });
        let (number, token) = named.ok_or(HeaderBackupError::NoToken)?;
        self.copies.json["tokens"][number] = token;
        Ok(())
    }

    /// The volume as it would be on this device, with its keyslots: judged as any header is.
    pub fn on(&self, device: &Device) -> Result<Volume, VolumeError> {
        let mut volume = rekey::view(device, &self.copies, &self.copies.json)?;
        if let Header::Luks(header) = &mut volume.header {
            header.keyslots_in = Some(self.image.clone());
        }
        Ok(volume)
    }

    /// Compares it with the header that it is to replace; `None`: neither copy of that is whole.
    pub fn compare(&self, device: &Device, now: Option<&Copies>, file: &File) -> Result<Differs, HeaderBackupError> {
        let path = || device.path.clone();
        let failed = |source| HeaderBackupError::File { action: "compare", path: path(), source };
        let Some(now) = now else {
            let found = signatures::find(&device.path).map_err(|error| failed(io::Error::other(error)))?;
            return match found.filter(|found| !found.starts_with("crypto_LUKS")) {
                Some(found) => Err(HeaderBackupError::Foreign { device: path(), found }),
                None => Ok(Differs::Repairs),
            };
        };
        let (is, of_device) = (self.uuid(), now.uuid().unwrap_or_default());
        if is != of_device {
            return Err(HeaderBackupError::OtherVolume { device: path(), is, now: of_device });
        }
        check_whole(&now.json, device)?;
        if key_digest(&self.copies.json) != key_digest(&now.json) {
            return Err(HeaderBackupError::OldKey(path()));
        }
        if (self.copies.size(), Some(self.bytes)) != (now.size(), len_of(now)) {
            return Err(HeaderBackupError::Layout(path()));
        }
        let changes = changes(&now.json, &self.copies.json);
        let same_keyslots = || Ok::<_, io::Error>(self.keyslots(file)? == self.keyslots(self.image.file())?);
        Ok(match changes.is_empty() {
            // A passphrase may have been changed in its place: that changes the salt, which the JSON area has.
            true if now.is_whole() && same_keyslots().map_err(failed)? => Differs::No,
            true => Differs::Repairs,
            // Whatever the sequence numbers say: whoever holds the file can write a higher one.
            false => Differs::Changes(changes),
        })
    }

    /// Writes it: the keyslots, then one copy of the metadata, then the other, each flushed. Of a header that is whole one copy
    /// stays so at each moment.
    pub fn write(&self, now: Option<&Copies>, file: &File) -> io::Result<()> {
        if let Some(keyslots) = self.keyslots(self.image.file())? {
            file.write_all_at(&keyslots, self.copies.size() * 2)?;
            file.sync_all()?;
        }
        now.unwrap_or(&self.copies).write(file, &self.copies.json)
    }

    /// The keyslots' area in a file; `None` if there are no keyslots.
    fn keyslots(&self, file: &File) -> io::Result<Option<Vec<u8>>> {
        if self.copies.json["keyslots"].as_object().is_none_or(serde_json::Map::is_empty) {
            return Ok(None);
        }
        let start = self.copies.size() * 2;
        let mut bytes = vec![0; usize::try_from(self.bytes - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, start)?;
        Ok(Some(bytes))
    }

    /// Where it ends: the data must not begin before.
    pub fn end(&self) -> u64 {
        self.bytes
    }
}

/// What proves the volume key of the data.
fn key_digest(json: &Value) -> Option<[&Value; 4]> {
    let digest = &json["digests"][digest_of(json, "0")?];
    Some(["hash", "iterations", "salt", "digest"].map(|member| &digest[member]))
}

/// What another JSON area changes, in words.
fn changes(now: &Value, then: &Value) -> Vec<String> {
    let mut changes = Vec::new();
    for (part, one) in [("keyslots", "keyslot"), ("tokens", "token")] {
        let members = |json: &Value| json[part].as_object().cloned().unwrap_or_default();
        let (now, then) = (members(now), members(then));
        let gone = now.keys().filter(|id| !then.contains_key(*id)).map(|id| format!("{one} {id} goes"));
        let back = then.iter().filter(|(id, value)| now.get(*id) != Some(value));
        let back = back.map(|(id, _)| match now.contains_key(id) {
            true => format!("{one} {id} becomes what it was"),
            false => format!("{one} {id} comes back"),
        });
        changes.extend(gone.chain(back));
    }
    let others = |json: &Value| {
        let mut json = json.clone();
        if let Some(members) = json.as_object_mut() {
            members.retain(|name, _| !matches!(name.as_str(), "keyslots" | "tokens"));
        }
        json
    };
    changes.extend((others(now) != others(then)).then(|| "segments, digests or settings".to_owned()));
    changes
}
