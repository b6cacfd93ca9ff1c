//! `[volumes.NAME]`: volumes that this host attaches by itself, and under which names.

use serde::Deserialize;

use super::{Config, ConfigPath, DeviceSpec};
use crate::base::key::{KeyReference, StoreName};

/// `[volumes.NAME]`: what `cryptattach@NAME.service` attaches as NAME.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    pub device: DeviceSpec,
    /// Where its key is; as the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A detached LUKS header.
    pub header: Option<ConfigPath>,
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

impl VolumeConfig {
    /// The store of its key, as far as that can be told without the header.
    pub fn store(&self, config: &Config) -> Option<StoreName> {
        let named = self.key.as_ref().map(|key| key.store.clone());
        named.or_else(|| config.store_or_default(None).ok()).filter(|name| config.stores.contains_key(name))
    }
}
