//! `[boot]`: what `cryptattach boot` opens, what it needs for that, and how long it tries.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Deserializer};

use crate::{
    backend::MappingName,
    key::{KeyReference, Place},
};

/// Whatever the configuration says, a boot does not wait longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Where initramfs images are.
pub const IMAGES: &str = "/boot";

/// `[boot]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Boot {
    /// What to attach; unless given, the entries of crypttab that are ours.
    pub volumes: Vec<BootVolume>,
    /// File systems that stores, keys or headers are on; mounted read-only while the boot needs them.
    pub mounts: Vec<BootMount>,
    /// When a person is asked for a passphrase, if nothing else has opened the volume.
    #[serde(rename = "prompt_after_seconds", deserialize_with = "seconds")]
    pub prompt_after: Duration,
    /// When the boot goes on without the volumes that are not open, with the distribution's own prompt.
    #[serde(rename = "total_seconds", deserialize_with = "seconds")]
    pub total: Duration,
    /// Put private keys, and credentials that release unsealed keys, into the initramfs.
    pub secrets_in_image: bool,
}

/// `[[boot.volumes]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootVolume {
    /// The mapping's name, as crypttab and the root file system's entry have it.
    pub name: MappingName,
    /// The encrypted device.
    pub device: DeviceSpec,
    /// Its keys in different stores, asked at once; what the LUKS2 token says unless given.
    #[serde(default)]
    pub keys: Vec<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<PathBuf>,
    /// No writes.
    #[serde(default)]
    pub read_only: bool,
    /// Pass discards on.
    #[serde(default)]
    pub allow_discards: bool,
    /// No work queue for reads.
    #[serde(default)]
    pub no_read_workqueue: bool,
    /// No work queue for writes.
    #[serde(default)]
    pub no_write_workqueue: bool,
}

/// `[[boot.mounts]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootMount {
    /// The device with the file system.
    pub device: DeviceSpec,
    /// Where it is mounted, as paths in the configuration have it.
    pub at: PathBuf,
    /// Type of the file system: "ext4", "vfat", ...
    #[serde(rename = "type")]
    pub kind: String,
}

/// A device as crypttab and fstab name it: `UUID=`, `LABEL=`, `PARTUUID=`, `PARTLABEL=`, `ID=` or a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceSpec {
    text: String,
    path: PathBuf,
}

/// That names no device.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' names no device (UUID=, LABEL=, PARTUUID=, PARTLABEL=, ID=, or a path below /dev)")]
pub struct ParseDeviceSpecError(String);

impl DeviceSpec {
    /// The path under which udev shows it (systemd's 60-persistent-storage.rules).
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for DeviceSpec {
    type Err = ParseDeviceSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || ParseDeviceSpecError(text.to_owned());
        let path = match text.split_once('=') {
            Some((by @ ("UUID" | "LABEL" | "PARTUUID" | "PARTLABEL" | "ID"), value)) => {
                let value = value.trim_matches('"');
                if value.is_empty() || value == "." || value == ".." {
                    return Err(invalid());
                }
                let value = if by == "UUID" { value.to_ascii_lowercase() } else { encoded(value) };
                Path::new("/dev/disk").join(format!("by-{}", by.to_ascii_lowercase())).join(value)
            }
            _ if text.starts_with("/dev/") => text.into(),
            _ => return Err(invalid()),
        };
        Ok(Self { text: text.to_owned(), path })
    }
}

/// As udev encodes labels in names of links (udev_util_encode_string).
fn encoded(label: &str) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte) || !byte.is_ascii();
    let mut bytes = Vec::new();
    for byte in label.bytes() {
        if keep(byte) { bytes.push(byte) } else { bytes.extend(format!("\\x{byte:02x}").bytes()) }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| label.to_owned())
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

crate::key::serde_as_str!(DeviceSpec);

impl Boot {
    /// The file system of `mounts` that a path is on.
    pub fn mount_of(&self, path: &Path) -> Option<&BootMount> {
        self.mounts.iter().filter(|mount| path.starts_with(&mount.at)).max_by_key(|mount| mount.at.as_os_str().len())
    }
}

impl Boot {
    /// Where the initramfs has copies of private keys, if it has any.
    pub fn place(&self) -> Option<Place> {
        self.secrets_in_image.then(|| Place::path("private keys in the initramfs", IMAGES, true))
    }
}

impl Default for Boot {
    fn default() -> Self {
        Self {
            volumes: Vec::new(),
            mounts: Vec::new(),
            prompt_after: Duration::from_secs(5),
            total: Duration::from_secs(90),
            secrets_in_image: false,
        }
    }
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    let duration = Duration::try_from_secs_f64(seconds);
    Ok(duration.map_err(|_| serde::de::Error::custom("a number of seconds, not negative"))?.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_devices_where_udev_links_them() {
        let cases = [
            ("UUID=AB12-cd", "/dev/disk/by-uuid/ab12-cd"),
            ("UUID=\"ab\"", "/dev/disk/by-uuid/ab"),
            ("LABEL=my root", "/dev/disk/by-label/my\\x20root"),
            ("PARTLABEL=a/b", "/dev/disk/by-partlabel/a\\x2fb"),
            ("ID=virtio-root", "/dev/disk/by-id/virtio-root"),
            ("/dev/vg/root", "/dev/vg/root"),
        ];
        for (text, path) in cases {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().path(), Path::new(path));
        }
        for text in ["", "vda", "UUID=", "UUID=..", "NAME=x"] {
            assert!(text.parse::<DeviceSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn has_defaults_and_bounds() {
        let boot: Boot = toml::from_str("total_seconds = 1e15").unwrap();
        assert_eq!((boot.prompt_after, boot.total), (Duration::from_secs(5), LONGEST));
        assert!(toml::from_str::<Boot>("total_seconds = -1").is_err());
        let text = "[[volumes]]\nname = 'root'\ndevice = 'UUID=ab'\nallow_discards = true\n\
                    [[mounts]]\ndevice = 'LABEL=keys'\nat = '/mnt/keys'\ntype = 'ext4'\n";
        let boot: Boot = toml::from_str(text).unwrap();
        assert!(boot.volumes[0].allow_discards && !boot.volumes[0].read_only);
        assert!(boot.mount_of(Path::new("/mnt/keys/cinder")).is_some());
        assert!(boot.mount_of(Path::new("/mnt/keysmith")).is_none());
    }
}
