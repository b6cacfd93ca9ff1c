//! `[volumes.NAME]`: volumes that this host attaches by itself, and under which names.

use std::{
    convert::Infallible,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::Deserialize;
use uuid::Uuid;

use super::{Config, Location};
use crate::key::{KeyReference, StoreName, serde_as_str};

/// `[volumes.NAME]`: what `cryptattach@NAME.service` attaches as NAME.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// The encrypted device.
    pub device: DeviceSpec,
    /// Where its key is; as the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<PathBuf>,
    /// No writes.
    #[serde(default)]
    pub read_only: bool,
    /// Pass discards on.
    #[serde(default)]
    pub allow_discards: bool,
    /// Whether its key comes over a network, for systemd's ordering; as its store says unless given.
    pub network: Option<bool>,
}

/// Which volumes that appear are attached unasked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hotplug {
    /// Those that `[volumes]` lists. A host of Nova or Cinder sees volumes that are not its own to attach.
    #[default]
    Listed,
    /// And all others with a token of ours, as `luks-UUID`, unless /etc/crypttab has them.
    All,
}

/// A device as in fstab(5) and crypttab(5): a path, or `UUID=`, `LABEL=`, `PARTUUID=`, `PARTLABEL=`, `ID=` and a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec(String);

impl FromStr for DeviceSpec {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_str!(DeviceSpec);

impl DeviceSpec {
    /// The path where udev puts the device.
    pub fn path(&self) -> PathBuf {
        let tags = ["UUID", "LABEL", "PARTUUID", "PARTLABEL", "ID"];
        match self.0.split_once('=').filter(|(tag, _)| tags.contains(tag)) {
            Some((tag, value)) => {
                let value = match self.uuid() {
                    Some(uuid) => uuid.to_string(),
                    None => encoded(value),
                };
                Path::new("/dev/disk").join(format!("by-{}", tag.to_lowercase())).join(value)
            }
            None => PathBuf::from(&self.0),
        }
    }

    fn uuid(&self) -> Option<Uuid> {
        Uuid::try_parse(self.0.strip_prefix("UUID=")?.trim_matches('"')).ok()
    }

    /// Whether it means this device: one of its paths, or the volume's UUID. Links may not be there yet when udev asks.
    pub fn is(&self, paths: &[PathBuf], volume: Option<Uuid>) -> bool {
        let own = self.path();
        let resolved = |path: &Path| path.canonicalize().ok();
        (volume.is_some() && self.uuid() == volume)
            || paths.contains(&own)
            || resolved(&own).is_some_and(|own| paths.iter().any(|path| resolved(path).as_ref() == Some(&own)))
    }
}

/// A value as udev writes it into the name of a link (systemd: encode_devnode_name).
fn encoded(value: &str) -> String {
    let value = value.trim_matches('"');
    let plain = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii();
    value.chars().map(|c| if plain(c) { c.to_string() } else { format!("\\x{:02x}", c as u32) }).collect()
}

impl VolumeConfig {
    /// The store of its key, as far as that can be told without the header.
    pub fn store(&self, config: &Config) -> Option<StoreName> {
        let named = self.key.as_ref().map(|key| key.store.clone());
        named.or_else(|| config.store_or_default(None).ok()).filter(|name| config.stores.contains_key(name))
    }

    /// Whether attaching it needs a network: if its store may be one of several, that any of them does.
    pub fn needs_network(&self, config: &Config) -> bool {
        let remote = |name: &StoreName| !matches!(config.stores[name].location, Location::Directory { .. });
        self.network.unwrap_or_else(|| match self.store(config) {
            Some(store) => remote(&store),
            None => config.stores.keys().any(remote),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_devices_as_fstab_names_them() {
        let paths = [
            ("/dev/vdb", "/dev/vdb"),
            ("UUID=7d1f0c9e-0000-4000-8000-000000000001", "/dev/disk/by-uuid/7d1f0c9e-0000-4000-8000-000000000001"),
            ("UUID=7D1F0C9E-0000-4000-8000-000000000001", "/dev/disk/by-uuid/7d1f0c9e-0000-4000-8000-000000000001"),
            ("UUID=AB12-CD34", "/dev/disk/by-uuid/AB12-CD34"),
            ("LABEL=my data", "/dev/disk/by-label/my\\x20data"),
            ("PARTLABEL=\"keys/1\"", "/dev/disk/by-partlabel/keys\\x2f1"),
        ];
        for (name, path) in paths {
            assert_eq!(name.parse::<DeviceSpec>().unwrap().path(), Path::new(path));
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
}
