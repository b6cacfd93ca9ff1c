//! The plan: which volumes a boot attaches, under which names, by which keys.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::crypttab_entries;
use crate::{
    base::{key::KeyReference, mapping_name::MappingName},
    config::{BootVolume, Config, DeviceSpec},
    verbs::attach::Options,
    volumes::header,
};

/// A volume that this boot attaches.
#[derive(Clone, Debug)]
pub struct Planned {
    pub name: MappingName,
    pub device: DeviceSpec,
    pub header: Option<PathBuf>,
    /// The keys; what the token says if there are none.
    pub keys: Vec<KeyReference>,
    /// How to map it.
    pub options: Options,
    /// The configuration names it: then it has to be ours. Otherwise its token tells.
    pub configured: bool,
    /// The boot does not wait for its device (`nofail` in crypttab(5)).
    pub optional: bool,
}

impl Planned {
    fn configured(volume: &BootVolume) -> Self {
        let BootVolume { name, device, keys, header, read_only, allow_discards, no_read_workqueue, no_write_workqueue } =
            volume.clone();
        let options = Options { read_only, export: None, allow_discards, no_read_workqueue, no_write_workqueue };
        Self { name, device, header: header.map(PathBuf::from), keys, options, configured: true, optional: false }
    }
}

/// The volumes: those of the configuration, or of crypttab (its text, if it is not the one of this boot), or, where there is
/// none, all that are here and ours.
pub fn plan(config: &Config, crypttab: Option<&str>) -> Vec<Planned> {
    if !config.boot.volumes.is_empty() {
        return config.boot.volumes.iter().map(Planned::configured).collect();
    }
    let in_crypttab = crypttab.map(crypttab_entries::entries).or_else(crypttab_entries::of_this_boot);
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    listed(in_crypttab, &command_line).unwrap_or_else(|| present(config))
}

/// What crypttab and the kernel's command line list, if either does: an image that is not of one machine only has no crypttab.
fn listed(in_crypttab: Option<Vec<Planned>>, command_line: &str) -> Option<Vec<Planned>> {
    let from_kernel = crypttab_entries::from_kernel(command_line);
    if in_crypttab.is_none() && from_kernel.is_empty() {
        return None;
    }
    let mut listed = in_crypttab.unwrap_or_default();
    for planned in from_kernel {
        if listed.iter().all(|other| other.device.path() != planned.device.path()) {
            listed.push(planned);
        }
    }
    Some(listed)
}

/// The LUKS2 devices that are here, with a token for a store that is configured.
fn present(config: &Config) -> Vec<Planned> {
    let devices = fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
    let ours = devices.filter_map(|entry| {
        let path = Path::new("/dev").join(entry.file_name());
        let volume = header::probe(&path, None).ok()?;
        let reference = volume.luks()?.reference.clone()?;
        config.store(&reference.store).ok()?;
        Some(Planned {
            name: format!("luks-{}", volume.uuid()?).parse().ok()?,
            device: path.to_str()?.parse().ok()?,
            header: None,
            keys: vec![reference],
            options: Options::default(),
            configured: false,
            optional: false,
        })
    });
    ours.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path).unwrap()
    }

    #[test]
    fn the_configurations_volumes_go_before_crypttabs() {
        let crypttab = Some("root UUID=aa none luks\ndata UUID=bb none luks,discard\n");
        let names = |config: &Config| {
            plan(config, crypttab).into_iter().map(|planned| planned.name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&config("")), ["root", "data"]);
        let one = "[[boot.volumes]]\nname = 'system'\ndevice = 'LABEL=root'\n";
        assert_eq!(names(&config(one)), ["system"]);
        assert!(plan(&config(""), Some("")).is_empty(), "a crypttab without entries is no reason to look around");
    }

    #[test]
    fn the_kernels_command_line_does_without_a_crypttab() {
        let names = |crypttab: Option<&str>, command_line| {
            let planned = listed(crypttab.map(crypttab_entries::entries), command_line)?;
            Some(planned.into_iter().map(|planned| planned.name.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(names(None, "quiet rd.luks.name=aa=root").unwrap(), ["root"]);
        assert_eq!(names(Some("data UUID=bb none luks"), "rd.luks.name=aa=root").unwrap(), ["data", "root"]);
        assert!(names(None, "quiet").is_none(), "then what is there is looked at");
    }
}
