//! What systemd calls its units, and whether it runs.

use std::{fmt::Write as _, io, os::unix::ffi::OsStrExt, path::Path, time::Duration};

use super::programs;
use crate::base::mapping_name::MappingName;

/// The unit that attaches a volume of the configuration.
pub fn unit(name: &MappingName) -> String {
    format!("cryptattach@{}.service", escape(name.as_str().as_bytes()))
}

/// The scope of a userspace mapping's worker.
pub fn scope(name: &MappingName) -> String {
    format!("cryptattach-{}.scope", escape(name.as_str().as_bytes()))
}

/// Whether systemd is this system's init (sd_booted(3)).
pub fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Has systemd start a unit, and does not wait for that.
pub fn start(unit: &str) -> io::Result<()> {
    let mut command = programs::bare("systemctl");
    let output = programs::output_of(command.args(["start", "--no-block", unit]), Duration::from_secs(10))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(io::Error::other(said.trim().to_owned())) }
}

/// The unit that attaches a volume which no configuration names, by its UUID.
pub fn hotplug_unit(volume: uuid::Uuid) -> String {
    format!("cryptattach-hotplug@{}.service", escape(volume.to_string().as_bytes()))
}

/// The unit that goes on with the rotation of a volume's key.
pub fn rekey_unit(volume: uuid::Uuid) -> String {
    format!("cryptattach-rekey@{}.service", escape(volume.to_string().as_bytes()))
}

/// A text as part of a unit's name (systemd-escape(1)).
pub fn escape(text: &[u8]) -> String {
    let mut escaped = String::new();
    for (at, byte) in text.iter().enumerate() {
        match byte {
            b'/' => escaped.push('-'),
            b'.' if at == 0 => escaped += "\\x2e",
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b':' | b'_' | b'.' => escaped.push(char::from(*byte)),
            _ => {
                let _ = write!(escaped, "\\x{byte:02x}");
            }
        }
    }
    escaped
}

/// A path as part of a unit's name (`systemd-escape --path`).
pub fn escape_path(path: &Path) -> String {
    let words: Vec<_> =
        path.as_os_str().as_bytes().split(|byte| *byte == b'/').filter(|word| !word.is_empty()).collect();
    if words.is_empty() { "-".to_owned() } else { escape(&words.join(&b'/')) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn escapes_as_systemd_does() {
        for text in ["data", "data-1", "luks-7d1f", "a.b", ".a", "a@b=c#d+e", "ä"] {
            assert_eq!(escape(text.as_bytes()), said("", text), "{text}");
        }
        for path in ["/dev/mapper/data-1", "/dev/disk/by-uuid/7d1f-2", "/", "//a//b/", "/dev/disk/by-label/my\\x20data"]
        {
            assert_eq!(escape_path(Path::new(path)), said("--path", path), "{path}");
        }
    }

    fn said(option: &str, text: &str) -> String {
        let mut command = Command::new("systemd-escape");
        if !option.is_empty() {
            command.arg(option);
        }
        let output =
            command.args(["--", text]).output().expect("systemd-escape is missing: scripts/prerequisites unit");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}
