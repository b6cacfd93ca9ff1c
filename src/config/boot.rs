//! `[boot]`: what `cryptattach boot` opens, what it needs for that, and how long it tries.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer};

use super::{ConfigPath, DeviceSpec};
use crate::base::{
    key::{KeyReference, Place},
    mapping_name::MappingName,
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
    /// When the boot stops waiting for volumes, and leaves them to the distribution's own prompt.
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
    #[serde(deserialize_with = "node")]
    pub device: DeviceSpec,
    /// Its keys in different stores, asked at once; what the LUKS2 token says unless given.
    #[serde(default)]
    pub keys: Vec<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<ConfigPath>,
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
    #[serde(deserialize_with = "node")]
    pub device: DeviceSpec,
    /// Where it is mounted, as paths in the configuration have it.
    pub at: PathBuf,
    /// Type of the file system: "ext4", "vfat", ...
    #[serde(rename = "type")]
    pub kind: String,
}

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

/// A boot waits for devices, and for no file on a disk that is mounted later.
fn node<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DeviceSpec, D::Error> {
    let device = DeviceSpec::deserialize(deserializer)?;
    if device.is_node() { Ok(device) } else { Err(serde::de::Error::custom(format!("'{device}' is not below /dev"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_defaults_and_bounds() {
        let boot: Boot = toml::from_str("total_seconds = 1e15").unwrap();
        assert_eq!((boot.prompt_after, boot.total), (Duration::from_secs(5), LONGEST));
        assert!(toml::from_str::<Boot>("total_seconds = -1").is_err());
        assert!(toml::from_str::<Boot>("[[volumes]]\nname = 'root'\ndevice = '/srv/volume.img'\n").is_err());
        let text = "[[volumes]]\nname = 'root'\ndevice = 'UUID=ab'\nallow_discards = true\n\
                    [[mounts]]\ndevice = 'LABEL=keys'\nat = '/mnt/keys'\ntype = 'ext4'\n";
        let boot: Boot = toml::from_str(text).unwrap();
        assert!(boot.volumes[0].allow_discards && !boot.volumes[0].read_only);
        assert!(boot.mount_of(Path::new("/mnt/keys/cinder")).is_some());
        assert!(boot.mount_of(Path::new("/mnt/keysmith")).is_none());
    }
}
