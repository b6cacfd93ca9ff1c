//! What systemd calls its units, and whether it runs.

use std::{fmt::Write as _, io, os::unix::ffi::OsStrExt, path::Path, time::Duration};

use serde::{Deserialize, Serialize};

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

/// A timer that starts a unit of ours, or is one.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Timer {
    pub unit: String,
    /// What it starts.
    pub activates: String,
    /// When it runs next, in seconds since 1970; `None`: not by itself.
    pub next: Option<u64>,
}

/// The timers of ours; none where systemd does not run or does not say.
pub fn timers() -> Vec<Timer> {
    if !is_running() {
        return Vec::new();
    }
    let mut command = programs::bare("systemctl");
    let listed = command.args(["list-timers", "--all", "--output=json"]);
    let output = programs::output_of(listed, Duration::from_secs(5)).ok().filter(|output| output.status.success());
    output.map(|output| timers_in(&output.stdout)).unwrap_or_default()
}

/// Out of what `systemctl list-timers` prints (systemd 249 or later): times are in microseconds.
fn timers_in(json: &[u8]) -> Vec<Timer> {
    #[derive(Deserialize)]
    struct Listed {
        unit: Option<String>,
        activates: Option<String>,
        next: Option<u64>,
    }
    let listed: Vec<Listed> = serde_json::from_slice(json).unwrap_or_default();
    let timer = |Listed { unit, activates, next }| {
        let timer = Timer {
            unit: unit.unwrap_or_default(),
            activates: activates.unwrap_or_default(),
            next: next.filter(|next| (1..u64::MAX).contains(next)).map(|next| next / 1_000_000),
        };
        [&timer.unit, &timer.activates].iter().any(|name| name.starts_with("cryptattach")).then_some(timer)
    };
    listed.into_iter().filter_map(timer).collect()
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

    /// As systemd 252 prints them; 257 has null where nothing is planned.
    #[test]
    fn timers_of_ours_are_found_among_the_others() {
        let json = br#"[{"next":1795866000000000,"left":1,"last":0,"passed":0,"unit":"apt-daily.timer","activates":"apt-daily.service"},
            {"next":1795866001500000,"left":1,"last":0,"passed":0,"unit":"renew.timer","activates":"cryptattach-renew.service"},
            {"next":null,"left":null,"last":null,"passed":null,"unit":"cryptattach-x.timer","activates":null},
            {"next":18446744073709551615,"unit":"cryptattach-y.timer","activates":"y.service"}]"#;
        let found = timers_in(json);
        let next: Vec<_> = found.iter().map(|timer| (timer.unit.as_str(), timer.next)).collect();
        assert_eq!(
            next,
            [("renew.timer", Some(1_795_866_001)), ("cryptattach-x.timer", None), ("cryptattach-y.timer", None)]
        );
        assert!(timers_in(b"no json").is_empty());
    }

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
