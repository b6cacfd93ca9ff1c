//! What is done with the audit record as a whole: it is verified, and its head is put where others keep it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    base::{
        chain::{chain, printable},
        hex,
    },
    config::Config,
    keys::tpm::{self, AuditIndex, IdentityFile, Name, Tpm, TpmError},
    sys::journal,
    unlock::audit::{
        Chain, Digest, Event, Head,
        verify::{self, Anchor, Files, Verdict, Verifier},
    },
    verbs::error::Error,
};

/// The kind of our entries in the journal.
const MESSAGE_ID: &str = "MESSAGE_ID=2f0d5c1b6e8a4c7f9b3d1e5a7c9f0b24";
const JOURNAL: &str = "the journal";
const STATE: &str = "the state directory";

/// The head of this host's record, for others to keep.
#[derive(Debug, Serialize)]
pub struct Anchored {
    #[serde(flatten)]
    pub head: Head,
    pub host: String,
}

/// Where a head goes, beside what is printed.
pub struct Places<'a> {
    /// To the systemd journal.
    pub journal: bool,
    /// To the TPM.
    pub tpm: bool,
    /// File with the owner's password, for making the TPM's index.
    pub owner_password: Option<&'a Path>,
}

/// Puts the head where it is to be kept. The anchor in the TPM is a record of its own, and the head then.
pub fn anchor(config: &Config, places: &Places<'_>) -> Result<Anchored, Error> {
    let mut record = Chain::open(config)?;
    if places.tpm {
        anchor_in_tpm(config, &mut record, places.owner_password)?;
    }
    let head = record.head().ok_or_else(|| {
        Error::Usage(format!("the audit record {} is empty: there is nothing to anchor", config.audit.file.display()))
    })?;
    let host = nix::sys::utsname::uname().map_err(|errno| Error::io("ask for this host's name")(errno.into()))?;
    let anchored = Anchored { head, host: host.nodename().to_string_lossy().into_owned() };
    if places.journal {
        write_to_journal(config, &anchored).map_err(Error::io("write to the journal"))?;
    }
    Ok(anchored)
}

/// The record has what the index had before. So the record that the last anchor was made of can be told from any other, whatever
/// became of the records before.
fn anchor_in_tpm(config: &Config, record: &mut Chain, password: Option<&Path>) -> Result<(), Error> {
    let (tpm, root) = (Tpm::open(&config.tpm)?, storage_root(config)?);
    let index = AuditIndex::at(&tpm, config.audit.tpm_index);
    let given = password.map(tpm::first_line).transpose()?;
    index.make(given.as_ref(), root).map_err(|error| match error.code() {
        Some(code) if code.is_auth() => Error::Usage(format!(
            "the owner's password of this TPM is {}: --owner-password FILE",
            if given.is_some() { "wrong" } else { "needed to make the NV index" }
        )),
        _ => error.into(),
    })?;
    let before = index.value()?.unwrap_or_default();
    let head = record.append(&Event { action: "anchor", tpm: Some(hex::encode(&before)), ..Event::default() })?;
    Ok(index.extend(&head.hash, root)?)
}

/// The name of the storage root key, if this host has a key under it.
fn storage_root(config: &Config) -> Result<Option<Name>, Error> {
    let identity = &config.tpm.identity;
    let identity = identity.exists().then(|| IdentityFile::read(identity)).transpose()?;
    Ok(identity.map(|file| file.storage_root))
}

/// The record's path as a field has it.
fn file_of(config: &Config) -> String {
    printable(&config.audit.file.display().to_string())
}

fn write_to_journal(config: &Config, anchored: &Anchored) -> std::io::Result<()> {
    let Anchored { head, host } = anchored;
    let (seq, hash) = (head.seq.to_string(), hex::encode(&head.hash));
    let message =
        format!("the audit record of {} has {seq} as its latest record, with the hash {hash}", printable(host));
    let id = MESSAGE_ID.trim_start_matches("MESSAGE_ID=");
    let fields = [
        ("MESSAGE", &*message),
        ("MESSAGE_ID", id),
        ("PRIORITY", "5"),
        ("SYSLOG_IDENTIFIER", "cryptattach"),
        ("CRYPTATTACH_FILE", &file_of(config)),
        ("CRYPTATTACH_SEQ", &seq),
        ("CRYPTATTACH_HASH", &hash),
    ];
    journal::write(journal::SOCKET.as_ref(), &fields)
}

/// An entry as journalctl prints it.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "CRYPTATTACH_FILE")]
    file: String,
    #[serde(rename = "CRYPTATTACH_SEQ")]
    seq: String,
    #[serde(rename = "CRYPTATTACH_HASH")]
    hash: String,
}

/// The anchors of a record in what journalctl has printed. Entries of other records, or of another form, are not ours.
pub fn anchors_in_journal(printed: &[u8], record: &str) -> Vec<Anchor> {
    let anchor = |line: &[u8]| {
        let entry: Entry = serde_json::from_slice(line).ok().filter(|entry: &Entry| entry.file == record)?;
        let hash: Digest = hex::decode(&entry.hash)?.try_into().ok()?;
        Some(Anchor { kept_in: JOURNAL.to_owned(), seq: entry.seq.parse().ok()?, hash })
    };
    printed.split(|byte| *byte == b'\n').filter_map(anchor).collect()
}

/// Verifies the files that are named, or this host's record. What this host has of anchors is compared if the files end with its
/// record; `anchors` are files of them.
pub fn verify(config: &Config, files: &[PathBuf], anchors: &[PathBuf]) -> Result<Verdict, Error> {
    let mut known = Vec::new();
    for path in anchors {
        known.extend(verify::anchors_in(path)?);
    }
    let files = Files::of(config, files)?;
    let (mut not_compared, mut tpm) = (Vec::new(), None);
    if files.end_here {
        match &files.head {
            Some(head) => known.push(Anchor { kept_in: STATE.to_owned(), seq: head.seq, hash: head.hash }),
            None => not_compared.push(format!("{STATE}, which has no head of this record")),
        }
        // Root's entries are root's own, by journald's word.
        let by = format!("_UID={}", nix::unistd::geteuid());
        match journal::read(&[MESSAGE_ID, &by]) {
            Ok(printed) => known.extend(anchors_in_journal(&printed, &file_of(config))),
            Err(error) => not_compared.push(format!("{JOURNAL}: {}", chain(&error))),
        }
        match in_tpm(config) {
            Ok(value) => tpm = Some(value),
            Err(error) => not_compared.push(format!("the TPM: {}", chain(&error))),
        }
    } else {
        not_compared.push(format!("what this host has of {}, for the files do not end with it", file_of(config)));
    }
    let mut verdict = files.verify(Verifier::new(known, tpm))?;
    not_compared.append(&mut verdict.not_compared);
    verdict.not_compared = not_compared;
    Ok(verdict)
}

fn in_tpm(config: &Config) -> Result<Option<Digest>, TpmError> {
    AuditIndex::at(&Tpm::open(&config.tpm)?, config.audit.tpm_index).value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journals_anchors_are_those_of_this_record() {
        let hash = "ab".repeat(32);
        let entry = |file: &str, seq: &str, hash: &str| {
            let fields =
                [("CRYPTATTACH_FILE", file), ("CRYPTATTACH_SEQ", seq), ("CRYPTATTACH_HASH", hash), ("_UID", "0")];
            serde_json::to_string(&fields.into_iter().collect::<std::collections::BTreeMap<_, _>>()).unwrap() + "\n"
        };
        let printed = [
            entry("/a", "7", &hash),
            entry("/b", "8", &hash),
            entry("/a", "-1", &hash),
            entry("/a", "9", "ab"),
            "{\"CRYPTATTACH_FILE\":[1,2]}\nnot JSON\n".to_owned(),
        ];
        let anchors = anchors_in_journal(printed.concat().as_bytes(), "/a");
        assert_eq!(anchors, [Anchor { kept_in: JOURNAL.to_owned(), seq: 7, hash: [0xab; 32] }]);
    }
}
