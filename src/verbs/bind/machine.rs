//! What the machine has that a volume is bound on.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use uuid::Uuid;

use super::{
    boot::{Maker, crypttab_text},
    journal,
};
use crate::{
    base::{
        chain::chain,
        key::{KeyReference, StoreName},
        pcr_set::PcrSet,
    },
    config::{Config, StoreConfig, crypttab},
    keys::{
        seal::identities,
        tpm::{BootChain, IdentityFile, Tpm},
    },
    sys::{
        block::{BlockDevice, DeviceNumber},
        device::Identity,
        sysfs::{self, Sysfs},
    },
    verbs::{boot::root, error::Error},
    volumes::header::{Binding, Volume, signatures},
};

/// What the machine has.
#[derive(Clone, Debug)]
pub struct Machine {
    pub device: PathBuf,
    pub volume: Uuid,
    /// The key that the volume's token names.
    pub bound: Option<KeyReference>,
    /// What others have bound.
    pub others: Vec<Binding>,
    /// Not a file.
    pub is_node: bool,
    /// The root file system rests on it.
    pub is_root: bool,
    /// `[[boot.volumes]]`: whether the volume is among them, if there are any.
    pub boot_lists: Option<bool>,
    /// The configuration or crypttab has the volume already.
    pub is_listed: bool,
    /// `/boot` rests on it, too.
    pub is_boot_encrypted: bool,
    pub disks: usize,
    /// Partitions beside it that another system may be on.
    pub strangers: Vec<String>,
    pub tpm: Option<TpmFound>,
    /// Why there is none, in words.
    pub no_tpm: Option<String>,
    /// This host's key in the TPM, if there is one.
    pub key: Option<TpmKey>,
    /// The stores, and whether what opens them is in the TPM.
    pub stores: Vec<(StoreName, bool)>,
    pub default_store: Option<StoreName>,
    /// The store that an earlier run has made, or begun to.
    pub made: Option<StoreName>,
    pub maker: Option<Maker>,
}

/// The TPM, and what it says of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TpmFound {
    pub chain: BootChain,
    pub secure_boot: Option<bool>,
    /// The configuration says what a new key is bound to: `pcrs` or `site_key`.
    pub configured: bool,
}

/// What a key in the TPM is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TpmKey {
    pub pcrs: PcrSet,
    /// A site signs boot states.
    pub is_signed: bool,
    pub has_pin: bool,
}

impl TpmKey {
    /// Whether another initramfs does not get it.
    pub fn covers_image(self) -> bool {
        self.is_signed || self.pcrs.contains(11) || [4, 8, 9].iter().all(|pcr| self.pcrs.contains(*pcr))
    }
}

impl std::fmt::Display for TpmKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            self.is_signed.then(|| "signed boot states".to_owned()),
            (!self.pcrs.is_empty()).then(|| format!("PCR {}", self.pcrs)),
            self.has_pin.then(|| "a PIN".to_owned()),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        f.write_str(if parts.is_empty() { "any boot state" } else { "" })?;
        f.write_str(&parts.join(", "))
    }
}

/// Looks.
pub fn look(config: &Config, volume: &Volume, uuid: Uuid) -> Result<Machine, Error> {
    let sysfs = Sysfs::this();
    let paths = [volume.device.path.clone()];
    let number = match volume.device.identity {
        Identity::BlockDevice { number, .. } => Some(DeviceNumber(number)),
        _ => None,
    };
    let holds = |path| number.is_some_and(|number| root::is_own(&sysfs, Path::new(path), &[number]));
    let is_it = |entry: &crypttab::Entry| entry.device.is(&paths, Some(uuid));
    let listed = &config.boot.volumes;
    let tpm = Tpm::open(&config.tpm).and_then(|tpm| {
        let (chain, secure_boot) = (tpm.boot_chain()?, tpm.event_log().secure_boot());
        let configured = config.tpm.pcrs.is_some() || config.tpm.site_key.is_some();
        Ok(TpmFound { chain, secure_boot, configured })
    });
    let no_tpm = tpm.as_ref().err().map(|error| chain(error));
    let by_tpm = |store: &StoreConfig| identities::need_tpm(&store.sealing.identities);
    Ok(Machine {
        device: volume.device.path.clone(),
        volume: uuid,
        bound: volume.reference().cloned(),
        others: volume.bindings()?,
        is_node: number.is_some(),
        is_root: holds("/"),
        is_boot_encrypted: holds("/boot"),
        boot_lists: (!listed.is_empty()).then(|| listed.iter().any(|listed| listed.device.is(&paths, Some(uuid)))),
        is_listed: crypttab::parse(&crypttab_text()?.unwrap_or_default()).iter().any(is_it),
        disks: disks(&sysfs),
        strangers: number.map(|number| strangers(&sysfs, number)).unwrap_or_default(),
        tpm: tpm.ok(),
        no_tpm,
        key: tpm_key(config),
        stores: config.stores.iter().map(|(name, store)| (name.clone(), by_tpm(store))).collect(),
        default_store: config.store_or_default(None).ok(),
        made: journal::made(config)?.store,
        maker: Maker::here(),
    })
}

/// Disks that stay in the machine.
fn disks(sysfs: &Sysfs) -> usize {
    let is_zero = |path: &Path| sysfs::attribute(path).is_none_or(|value| value == "0");
    let stays = |disk: &PathBuf| {
        disk.join("device").exists() && !is_zero(&disk.join("size")) && is_zero(&disk.join("removable"))
    };
    sysfs::entries(&sysfs.at("sys/block")).iter().filter(|disk| stays(disk)).count()
}

/// The other partitions of a volume's disk that hold something, and that this system does not use.
fn strangers(sysfs: &Sysfs, volume: DeviceNumber) -> Vec<String> {
    let device = |number| BlockDevice::with_number(sysfs, number);
    let disk = device(volume).and_then(|volume| volume.parent_disk()).and_then(device);
    let others = disk.map(|disk| disk.partitions()).unwrap_or_default().into_iter().filter(|number| *number != volume);
    let stranger = |number| {
        let node = device(number)?.node();
        // What is mounted, swapped to or part of another device is not opened exclusively.
        OpenOptions::new().read(true).custom_flags(OFlag::O_EXCL.bits()).open(&node).ok()?;
        let found = signatures::find(&node).ok()??;
        let kind = found.split([' ', ',']).next()?;
        // Firmware's own partition has no system on it.
        (!["vfat", "swap"].contains(&kind)).then(|| format!("{} ({kind})", node.display()))
    };
    others.filter_map(stranger).collect()
}

/// What this host's key in the TPM is bound to.
pub fn tpm_key(config: &Config) -> Option<TpmKey> {
    let policy = IdentityFile::read(&config.tpm.identity).ok()?.policy;
    Some(TpmKey { pcrs: policy.pcrs.pcrs(), is_signed: policy.signed.is_some(), has_pin: policy.pin })
}

/// Whether the TPM opens nothing more in this boot.
pub fn is_latched(config: &Config) -> bool {
    config.tpm.latch.is_wanted() && Tpm::open(&config.tpm).and_then(|tpm| tpm.is_latched()).unwrap_or(false)
}
