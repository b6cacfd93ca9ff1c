//! The event log of firmware and boot loader (TCG PC Client Platform Firmware Profile, section 10).
//!
//! It explains; nothing is decided by it. Who controls the boot controls the log, so it is read as hostile input: bounded,
//! and what it says is cleaned before it is printed.

use std::{
    cell::OnceCell,
    fmt,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{Digest, esys::SHA256};
use crate::base::{chain::printable, hex};

/// The most that is read of a log; real ones have 20 to 200 KiB.
const MOST_BYTES: u64 = 4 << 20;
/// Banks that a log may have at most.
const MOST_BANKS: u32 = 16;
/// Characters of a description that are shown.
const MOST_CHARACTERS: usize = 160;
/// `EV_NO_ACTION`: says something, is not measured.
const NO_ACTION: u32 = 3;

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Into this PCR.
    pub pcr: u8,
    /// What kind of thing (TCG's name, without `EV_`).
    pub kind: String,
    /// What it says of itself, cleaned.
    pub description: String,
    /// The SHA-256 digest that the PCR was extended by.
    #[serde(with = "hex")]
    pub digest: Digest,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} into PCR {}", self.kind, self.pcr)?;
        if self.description.is_empty() { Ok(()) } else { write!(f, ": {}", self.description) }
    }
}

/// A log, read when it is first asked for.
pub struct EventLog {
    path: PathBuf,
    events: OnceCell<Option<Vec<Event>>>,
}

impl EventLog {
    /// The log in this file.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), events: OnceCell::new() }
    }

    /// All events; `None` if there is no log, or none that makes sense.
    pub fn events(&self) -> Option<&[Event]> {
        let read = || {
            let mut bytes = Vec::new();
            let read = File::open(&self.path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes));
            if let Err(error) = read {
                tracing::debug!("no event log {}: {error}", self.path.display());
                return None;
            }
            let events = parse(&bytes);
            if events.is_none() {
                tracing::warn!("the event log {} is damaged", self.path.display());
            }
            events
        };
        self.events.get_or_init(read).as_deref()
    }

    /// The last events of a PCR, the latest last.
    ///
    /// systemd-stub measures a section's name and then the section, and says the same of both: one event here.
    pub fn last(&self, pcr: u8, most: usize) -> Vec<Event> {
        let mut all: Vec<_> = self.events().unwrap_or_default().iter().filter(|event| event.pcr == pcr).collect();
        all.dedup_by(|later, earlier| {
            let same = later.description == earlier.description && !later.description.is_empty();
            if same {
                *earlier = *later;
            }
            same
        });
        all[all.len().saturating_sub(most)..].iter().map(|event| (*event).clone()).collect()
    }

    /// Whether Secure Boot is on, as the firmware has measured it; `None` if the log does not say.
    pub fn secure_boot(&self) -> Option<bool> {
        self.events()?.iter().filter(|event| event.pcr == 7).find_map(|event| match event.description.as_str() {
            "SecureBoot = 1" => Some(true),
            "SecureBoot = 0" => Some(false),
            _ => None,
        })
    }
}

/// Bytes that are taken off the front, never more than there are.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn sized(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.take(usize::try_from(len).ok()?)
    }
}

/// The events of a log in the crypto-agile format; `None` if it is in another one, or damaged.
pub fn parse(log: &[u8]) -> Option<Vec<Event>> {
    let mut bytes = Bytes(log);
    // The first event, in the old format, says which digests the others have.
    let _head = bytes.take(4 + 4 + 20)?;
    let banks = banks(bytes.sized()?)?;
    let mut events = Vec::new();
    while !bytes.0.is_empty() {
        // The kernel's copy may end in padding: an event of zeroes.
        let (pcr, kind, count) = (bytes.u32()?, bytes.u32()?, bytes.u32()?);
        if (pcr, kind, count) == (0, 0, 0) {
            break;
        }
        if count > MOST_BANKS {
            return None;
        }
        let mut sha256 = None;
        for _ in 0..count {
            let algorithm = bytes.u16()?;
            let (_, len) = banks.iter().find(|(known, _)| *known == algorithm)?;
            let digest = bytes.take(usize::from(*len))?;
            if algorithm == SHA256 {
                sha256 = Some(digest.try_into().ok()?);
            }
        }
        let data = bytes.sized()?;
        match (u8::try_from(pcr), sha256) {
            (Ok(pcr), Some(digest)) if kind != NO_ACTION => {
                events.push(Event { pcr, kind: kind_name(kind), description: describe(kind, data), digest });
            }
            _ => {}
        }
    }
    Some(events)
}

/// Algorithms and digest sizes, from a TCG_EfiSpecIDEvent.
fn banks(data: &[u8]) -> Option<Vec<(u16, u16)>> {
    let mut bytes = Bytes(data);
    if bytes.take(16)? != b"Spec ID Event03\0" {
        return None;
    }
    let _versions = bytes.take(8)?;
    let count = bytes.u32()?;
    (0..count.min(MOST_BANKS)).map(|_| Some((bytes.u16()?, bytes.u16()?))).collect()
}

fn kind_name(kind: u32) -> String {
    match kind {
        0x0000_0001 => "POST_CODE",
        0x0000_0004 => "SEPARATOR",
        0x0000_0005 => "ACTION",
        0x0000_0006 => "EVENT_TAG",
        0x0000_0007 => "S_CRTM_CONTENTS",
        0x0000_0008 => "S_CRTM_VERSION",
        0x0000_0009 => "CPU_MICROCODE",
        0x0000_000A => "PLATFORM_CONFIG_FLAGS",
        0x0000_000B => "TABLE_OF_DEVICES",
        0x0000_000C => "COMPACT_HASH",
        0x0000_000D => "IPL",
        0x0000_0010 => "NONHOST_CODE",
        0x0000_0012 => "NONHOST_INFO",
        0x8000_0001 => "EFI_VARIABLE_DRIVER_CONFIG",
        0x8000_0002 => "EFI_VARIABLE_BOOT",
        0x8000_0003 => "EFI_BOOT_SERVICES_APPLICATION",
        0x8000_0004 => "EFI_BOOT_SERVICES_DRIVER",
        0x8000_0005 => "EFI_RUNTIME_SERVICES_DRIVER",
        0x8000_0006 => "EFI_GPT_EVENT",
        0x8000_0007 => "EFI_ACTION",
        0x8000_0008 => "EFI_PLATFORM_FIRMWARE_BLOB",
        0x8000_0009 => "EFI_HANDOFF_TABLES",
        0x8000_000A => "EFI_PLATFORM_FIRMWARE_BLOB2",
        0x8000_000B => "EFI_HANDOFF_TABLES2",
        0x8000_000C => "EFI_VARIABLE_BOOT2",
        0x8000_00E0 => "EFI_VARIABLE_AUTHORITY",
        other => return format!("event 0x{other:x}"),
    }
    .to_owned()
}

/// The text in an event, as far as it has any.
fn describe(kind: u32, data: &[u8]) -> String {
    let text = match kind {
        // A UEFI_VARIABLE_DATA: vendor's GUID, lengths of name and value, the name in UTF-16.
        0x8000_0001 | 0x8000_0002 | 0x8000_000C | 0x8000_00E0 => variable_name(data).unwrap_or_default(),
        // Texts: GRUB's commands and files, systemd-stub's sections, the firmware's actions.
        0x0000_0005 | 0x0000_000D | 0x8000_0007 | 0x0000_0008 => text(data),
        // An EFI_IMAGE_LOAD_EVENT: address, length, link time, then the device path.
        0x8000_0003..=0x8000_0005 => data.get(32..).and_then(file_in_device_path).unwrap_or_default(),
        _ => String::new(),
    };
    clean(&text)
}

fn variable_name(data: &[u8]) -> Option<String> {
    let mut bytes = Bytes(data);
    let (_guid, characters, _size) = (bytes.take(16)?, bytes.u64()?, bytes.u64()?);
    let name = utf16(bytes.take(usize::try_from(characters).ok()?.checked_mul(2)?)?);
    // Flags are worth seeing, and short: SecureBoot.
    Some(if let [flag] = bytes.0 { format!("{name} = {flag}") } else { name })
}

/// UTF-16 if every other byte is zero, else ASCII.
fn text(data: &[u8]) -> String {
    let wide = data.len() >= 4 && data.chunks_exact(2).all(|pair| pair[1] == 0);
    if wide { utf16(data) } else { String::from_utf8_lossy(data).into_owned() }
}

fn utf16(data: &[u8]) -> String {
    let units: Vec<u16> = data.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    String::from_utf16_lossy(&units)
}

/// The file path node of a device path (UEFI Specification, section 10.3.5.4).
fn file_in_device_path(path: &[u8]) -> Option<String> {
    let mut bytes = Bytes(path);
    loop {
        let (kind, subkind) = (bytes.take(1)?[0], bytes.take(1)?[0]);
        let node = bytes.u16()?.checked_sub(4)?;
        let node = bytes.take(node.into())?;
        match (kind, subkind) {
            (4, 4) => return Some(utf16(node)),
            (0x7F, _) => return None,
            _ => {}
        }
    }
}

/// Printable, on one line, not too long.
fn clean(text: &str) -> String {
    let text = text.trim_end_matches('\0');
    let mut cleaned = printable(&text.chars().take(MOST_CHARACTERS).collect::<String>());
    if text.chars().nth(MOST_CHARACTERS).is_some() {
        cleaned.push_str("...");
    }
    cleaned
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A log of SHA-1 and SHA-256 with these events.
    pub fn log(events: &[(u32, u32, Digest, &[u8])]) -> Vec<u8> {
        let mut head = b"Spec ID Event03\0".to_vec();
        head.extend([0, 0, 0, 0, 0, 2, 0, 2]);
        head.extend(2_u32.to_le_bytes());
        head.extend([4, 0, 20, 0, 11, 0, 32, 0, 0]);
        let mut log = [0, NO_ACTION].map(u32::to_le_bytes).concat();
        log.extend([0; 20]);
        log.extend((head.len() as u32).to_le_bytes());
        log.extend(head);
        for (pcr, kind, digest, data) in events {
            log.extend([*pcr, *kind, 2].map(u32::to_le_bytes).concat());
            log.extend([4, 0]);
            log.extend([0; 20]);
            log.extend([11, 0]);
            log.extend(digest);
            log.extend((data.len() as u32).to_le_bytes());
            log.extend(*data);
        }
        log
    }

    fn wide(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn says_what_was_measured() {
        let mut variable = vec![0; 16];
        variable.extend(10_u64.to_le_bytes());
        variable.extend(1_u64.to_le_bytes());
        variable.extend(wide("SecureBoot"));
        variable.push(1);
        let mut image = vec![0; 32];
        image.extend([4, 4, 4 + 2 * 9, 0]);
        image.extend(wide("\\grub.efi"));
        let log = log(&[
            (7, 0x8000_0001, [1; 32], &variable),
            (4, 0x8000_0003, [2; 32], &image),
            (8, 0xD, [3; 32], b"grub_cmd: linux /vmlinuz\n\x1b[31m\0"),
            (11, 0xD, [4; 32], &wide(".linux\0")),
        ]);
        let lines: Vec<_> = parse(&log).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "EFI_VARIABLE_DRIVER_CONFIG into PCR 7: SecureBoot = 1",
                "EFI_BOOT_SERVICES_APPLICATION into PCR 4: \\grub.efi",
                "IPL into PCR 8: grub_cmd: linux /vmlinuz\u{FFFD}\u{FFFD}[31m",
                "IPL into PCR 11: .linux",
            ]
        );
    }

    #[test]
    fn the_last_events_of_a_pcr_leave_those_of_others_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, log(&[(7, 4, [1; 32], b""), (4, 4, [9; 32], b""), (7, 4, [2; 32], b"")])).unwrap();
        let events = EventLog::at(&path);
        let digests = |most| events.last(7, most).iter().map(|event| event.digest).collect::<Vec<_>>();
        assert_eq!((digests(1), digests(3)), (vec![[2; 32]], vec![[1; 32], [2; 32]]));
        assert_eq!(EventLog::at(&folder.path().join("none")).events(), None);
    }

    #[test]
    fn a_section_is_one_event() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let events: [(u32, u32, Digest, &[u8]); 5] = [
            (11, 0xD, [1; 32], b".cmdline"),
            (11, 0xD, [2; 32], b".cmdline"),
            (9, 0xD, [3; 32], b".initrd"),
            (11, 0xD, [4; 32], b".initrd"),
            (11, 0xD, [5; 32], b".initrd"),
        ];
        std::fs::write(&path, log(&events)).unwrap();
        let digests: Vec<_> = EventLog::at(&path).last(11, 3).iter().map(|event| event.digest[0]).collect();
        assert_eq!(digests, [2, 5]);
    }

    #[test]
    fn damage_is_no_log() {
        let whole = log(&[(7, 4, [1; 32], b"data"), (8, 0xD, [3; 32], b"text")]);
        for len in 0..whole.len() {
            let events = parse(&whole[..len]);
            assert!(events.is_none_or(|events| events.len() < 2), "{len}");
        }
        let mut many = log(&[]);
        many.extend([7, 4, u32::MAX].map(u32::to_le_bytes).concat());
        assert!(parse(&many).is_none());
    }

    proptest::proptest! {
        #[test]
        fn nothing_in_a_log_can_harm(start in 0_usize..200, noise: Vec<u8>) {
            let mut log = log(&[(7, 0x8000_0001, [1; 32], &[0; 40]), (4, 0x8000_0003, [2; 32], &[4; 64])]);
            let start = start.min(log.len());
            let end = (start + noise.len()).min(log.len());
            log[start..end].copy_from_slice(&noise[..end - start]);
            let _ = parse(&log);
        }
    }
}
