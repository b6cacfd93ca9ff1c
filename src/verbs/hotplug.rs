//! Hot-plug: what udev's rule wants to know of a device. Headers and sysfs are read; no key, no secret, no network.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use crate::{
    base::{chain::chain, key::KeyReference},
    config::{Config, Hotplug, crypttab},
    sys::systemd,
    verbs::error::Error,
    volumes::header::{self, VolumeError},
};

/// A volume of ours that has appeared.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Appeared {
    /// Where its key is.
    pub key: Option<KeyReference>,
    /// The unit that attaches it, if it is to be attached.
    pub unit: Option<String>,
}

/// What stands on the device, and what is to be done about it; `links` are udev's further names of it.
///
/// Nothing for a device without our token. A refused header counts as foreign; attaching it says why.
pub fn appeared(config: Option<&Config>, device: &Path, links: &[PathBuf]) -> Result<Appeared, Error> {
    let volume = match header::find_to_map(device, None, None) {
        Ok(volume) => Some(volume),
        Err(error @ VolumeError::Device(_)) => return Err(error.into()),
        Err(error) => {
            tracing::debug!("{}: {}", device.display(), chain(&error));
            None
        }
    };
    let luks = volume.as_ref().and_then(header::Volume::luks);
    let (key, uuid) = (luks.and_then(|luks| luks.reference.clone()), luks.map(|luks| luks.uuid));
    let paths: Vec<PathBuf> = [device.to_owned()].into_iter().chain(links.iter().cloned()).collect();
    let unit = config.and_then(|config| wanted(config, &paths, uuid, key.is_some()));
    Ok(Appeared { key, unit })
}

/// The unit for a device: of the volume that is configured for it, or by the UUID of one with a token of ours.
fn wanted(config: &Config, paths: &[PathBuf], uuid: Option<Uuid>, ours: bool) -> Option<String> {
    if let Some((name, _)) = config.volumes.iter().find(|(_, volume)| volume.device.is(paths, uuid)) {
        return Some(systemd::unit(name));
    }
    // One that is held already was attached by the initramfs, or by someone, under a name of their choice.
    let uuid = uuid.filter(|_| ours && config.hotplug == Hotplug::All && !paths.iter().any(|path| is_held(path)))?;
    let crypttab = crypttab::read(Path::new(crypttab::PATH)).unwrap_or_default();
    let others = crypttab.iter().any(|entry| entry.device.is(paths, Some(uuid)));
    (!others).then(|| systemd::hotplug_unit(uuid))
}

fn is_held(device: &Path) -> bool {
    let name = device.file_name().unwrap_or_default();
    let holders = fs::read_dir(Path::new("/sys/class/block").join(name).join("holders"));
    holders.is_ok_and(|mut holders| holders.next().is_some())
}

/// The device below a mapping, by the mapping's own device (/dev/dm-0).
pub fn below(mapping: &Path) -> io::Result<Option<PathBuf>> {
    let name = mapping.file_name().unwrap_or_default();
    let mut slaves = fs::read_dir(Path::new("/sys/class/block").join(name).join("slaves"))?;
    Ok(slaves.next().transpose()?.map(|slave| Path::new("/dev").join(slave.file_name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(toml: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        fs::write(&path, toml).unwrap();
        Config::outline(&path).unwrap()
    }

    const UUID: Uuid = Uuid::from_u128(0x7d1f_0c9e_0000_4000_8000_0000_0000_0001);

    #[test]
    fn a_volume_that_is_listed_is_wanted_under_its_name() {
        let config = config("[volumes.data]\ndevice = 'UUID=7d1f0c9e-0000-4000-8000-000000000001'\n");
        let paths = ["/dev/vdb".into()];
        assert_eq!(wanted(&config, &paths, Some(UUID), true).as_deref(), Some("cryptattach@data.service"));
        assert_eq!(wanted(&config, &paths, Some(Uuid::nil()), true), None);
    }

    #[test]
    fn others_are_wanted_only_where_all_are_and_only_ours() {
        let (listed, all) = (config(""), config("hotplug = 'all'\n"));
        let paths = ["/dev/vdb".into()];
        assert_eq!(wanted(&listed, &paths, Some(UUID), true), None);
        let unit = wanted(&all, &paths, Some(UUID), true);
        assert_eq!(
            unit.as_deref(),
            Some("cryptattach-hotplug@7d1f0c9e\\x2d0000\\x2d4000\\x2d8000\\x2d000000000001.service")
        );
        assert_eq!(wanted(&all, &paths, Some(UUID), false), None);
    }
}
