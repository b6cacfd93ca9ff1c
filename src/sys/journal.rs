//! Entries of the systemd journal: written by its native protocol, one datagram; read by journalctl.

use std::{io, os::unix::net::UnixDatagram, path::Path, process::Command, time::Duration};

use super::programs;

/// Where journald listens (systemd's "Native Journal Protocol").
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// How long an entry may take, and how long journalctl.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most entries that are read, the latest ones.
const MOST_ENTRIES: &str = "10000";

/// Writes an entry with these fields. A value has no newline: one would begin another field.
pub fn write(socket: &Path, fields: &[(&str, &str)]) -> io::Result<()> {
    let mut entry = String::new();
    for (name, value) in fields {
        if value.contains('\n') {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        entry.extend([name, "=", value, "\n"]);
    }
    let journal = UnixDatagram::unbound()?;
    journal.set_write_timeout(Some(PATIENCE))?;
    journal.send_to(entry.as_bytes(), socket).map(drop)
}

/// The latest entries that fit, oldest first, as lines of JSON. Each match is `FIELD=VALUE`; those that begin with `_` are
/// journald's own word.
pub fn read(matches: &[&str]) -> io::Result<Vec<u8>> {
    let mut journalctl = Command::new("journalctl");
    journalctl.args(["--quiet", "--no-pager", "--output=json", "--lines", MOST_ENTRIES]).args(matches);
    let said = programs::output_of(&mut journalctl, PATIENCE)?;
    if said.status.success() { Ok(said.stdout) } else { Err(io::Error::other(String::from_utf8_lossy(&said.stderr))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_datagram_and_no_value_begins_another_field() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let journal = UnixDatagram::bind(&socket).unwrap();
        write(&socket, &[("MESSAGE", "a=b"), ("PRIORITY", "5")]).unwrap();
        let mut bytes = [0; 64];
        let len = journal.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"MESSAGE=a=b\nPRIORITY=5\n");
        let error = write(&socket, &[("MESSAGE", "a\n_UID=0")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        drop(journal);
        write(&socket, &[("MESSAGE", "a")]).unwrap_err();
    }
}
