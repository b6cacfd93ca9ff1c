//! Devices as fstab and crypttab name them.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use uuid::Uuid;

/// What a device may be named by, besides its path.
const TAGS: [&str; 5] = ["UUID", "LABEL", "PARTUUID", "PARTLABEL", "ID"];

/// A device as in fstab(5) and crypttab(5): `UUID=`, `LABEL=`, `PARTUUID=`, `PARTLABEL=`, `ID=` and a value, or the path of a
/// device or file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceSpec {
    text: String,
    path: PathBuf,
}

/// That names no device.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' does not name a device (UUID=, LABEL=, PARTUUID=, PARTLABEL=, ID=, or an absolute path)")]
pub struct ParseDeviceSpecError(String);

impl DeviceSpec {
    /// The path under which udev shows it (systemd's 60-persistent-storage.rules), or the file's.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a device, and not a file somewhere.
    pub fn is_node(&self) -> bool {
        self.path.starts_with("/dev")
    }

    /// Whether it means this device: one of its paths, or the volume's UUID. Links may not be there yet when udev asks.
    pub fn is(&self, paths: &[PathBuf], volume: Option<Uuid>) -> bool {
        let resolved = |path: &Path| path.canonicalize().ok();
        (volume.is_some() && self.uuid() == volume)
            || paths.contains(&self.path)
            // Not a file's path: looking for it may ask a network, or wait for the very device that udev is telling of.
            || (self.is_node()
                && resolved(&self.path).is_some_and(|own| paths.iter().any(|path| resolved(path).as_ref() == Some(&own))))
    }

    /// The path of a device as a command line names it: a path of any kind is one.
    pub fn path_of(text: &str) -> Result<PathBuf, ParseDeviceSpecError> {
        match text.split_once('=') {
            Some((by, _)) if TAGS.contains(&by) => Ok(text.parse::<Self>()?.path),
            _ => Ok(text.into()),
        }
    }

    fn uuid(&self) -> Option<Uuid> {
        Uuid::try_parse(self.text.strip_prefix("UUID=")?.trim_matches('"')).ok()
    }
}

impl FromStr for DeviceSpec {
    type Err = ParseDeviceSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || ParseDeviceSpecError(text.to_owned());
        let path = match text.split_once('=') {
            Some((by, value)) if TAGS.contains(&by) => {
                let value = value.trim_matches('"');
                if matches!(value, "" | "." | "..") {
                    return Err(invalid());
                }
                // LUKS and most file systems have theirs in small letters. FAT's "AB12-CD34" is no UUID and stays as it is.
                let value = match Uuid::try_parse(value) {
                    Ok(uuid) if by == "UUID" => uuid.to_string(),
                    _ => encoded(value),
                };
                Path::new("/dev/disk").join(format!("by-{}", by.to_ascii_lowercase())).join(value)
            }
            _ if text.starts_with('/') => text.into(),
            _ => return Err(invalid()),
        };
        Ok(Self { text: text.to_owned(), path })
    }
}

/// A value as udev writes it into the name of a link (systemd: encode_devnode_name).
fn encoded(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii();
    value.chars().map(|c| if plain(c) { c.to_string() } else { format!("\\x{:02x}", c as u32) }).collect()
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

crate::base::key::serde_as_str!(DeviceSpec);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_devices_where_udev_links_them() {
        let cases = [
            ("UUID=7d1f0c9e-0000-4000-8000-000000000001", "/dev/disk/by-uuid/7d1f0c9e-0000-4000-8000-000000000001"),
            ("UUID=\"7D1F0C9E-0000-4000-8000-000000000001\"", "/dev/disk/by-uuid/7d1f0c9e-0000-4000-8000-000000000001"),
            ("UUID=AB12-CD34", "/dev/disk/by-uuid/AB12-CD34"),
            ("LABEL=my root", "/dev/disk/by-label/my\\x20root"),
            ("PARTLABEL=\"keys/1\"", "/dev/disk/by-partlabel/keys\\x2f1"),
            ("ID=virtio-root", "/dev/disk/by-id/virtio-root"),
            ("/dev/vg/root", "/dev/vg/root"),
            ("/srv/volume.img", "/srv/volume.img"),
        ];
        for (text, path) in cases {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().path(), Path::new(path));
        }
        for text in ["", "vda", "UUID=", "UUID=..", "NAME=x"] {
            assert!(text.parse::<DeviceSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn recognises_a_device_before_its_links_are_there() {
        let uuid = Uuid::try_parse("7d1f0c9e-0000-4000-8000-000000000001").unwrap();
        let by_uuid: DeviceSpec = "UUID=7D1F0C9E-0000-4000-8000-000000000001".parse().unwrap();
        let by_id: DeviceSpec = "/dev/disk/by-id/virtio-x".parse().unwrap();
        let paths = ["/dev/vdb".into(), "/dev/disk/by-id/virtio-x".into()];
        assert!(by_uuid.is(&paths, Some(uuid)) && by_id.is(&paths, None));
        assert!(!by_uuid.is(&paths, None) && !by_id.is(&paths[..1], Some(uuid)));
    }

    #[test]
    fn looks_for_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &file).unwrap();
        let spec: DeviceSpec = file.to_str().unwrap().parse().unwrap();
        assert!(!spec.is(&["/dev/null".into()], None) && spec.is(&[file], None));
    }
}
