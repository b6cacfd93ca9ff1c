//! The plan: which volumes a boot attaches, under which names, by which keys.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    command_line::{CommandLine, Stage},
    crypttab_entries::{self, Crypttab},
};
use crate::{
    base::{key::KeyReference, mapping_name::MappingName},
    config::{BootVolume, Config, DeviceSpec, crypttab::Entry},
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

    /// Never for writing where somebody wants it read only.
    fn restricted_by<'a>(mut self, mut entries: impl Iterator<Item = &'a Entry>) -> Self {
        let path = [self.device.path().to_owned()];
        let same = |entry: &Entry| entry.name == self.name.as_str() || entry.device.is(&path, None);
        self.options.read_only |= entries.any(|entry| same(entry) && crypttab_entries::options(entry).read_only);
        self
    }
}

/// For which boot a plan is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The one that goes on: what its command line switches off is off.
    This,
    /// A later one. This one may be a rescue, whose command line switches things off.
    Later,
}

/// The volumes: those of the configuration, or of crypttab (its text, if it is not the one of this boot), or, where there is
/// none, all that are here and ours.
pub fn plan(config: &Config, crypttab: Option<&str>, which: Which) -> Vec<Planned> {
    let crypttab = crypttab.map(Crypttab::of).or_else(Crypttab::of_this_boot);
    planned(config, crypttab, &CommandLine::read(Stage::Initrd), which)
}

fn planned(config: &Config, crypttab: Option<Crypttab>, said: &CommandLine, which: Which) -> Vec<Planned> {
    if which == Which::This && !said.luks {
        tracing::warn!("no volume is attached: the kernel's command line says luks=no");
        return Vec::new();
    }
    let listed = listed(crypttab, said, which);
    if !config.boot.volumes.is_empty() {
        let configured = config.boot.volumes.iter().map(Planned::configured);
        return configured.map(|planned| planned.restricted_by(listed.iter().flatten())).collect();
    }
    match listed {
        Some(entries) => entries.into_iter().filter_map(crypttab_entries::planned).collect(),
        None => present(config, said),
    }
}

/// What crypttab and the kernel's command line list, if either does: an image that is not of one machine only has no crypttab.
fn listed(crypttab: Option<Crypttab>, said: &CommandLine, which: Which) -> Option<Vec<Entry>> {
    let counts = which == Which::Later || said.crypttab;
    let crypttab = match crypttab {
        None if said.lists() => Crypttab { entries: Vec::new(), is_systemds: true },
        None => return None,
        Some(crypttab) if !crypttab.is_systemds || counts => crypttab,
        Some(crypttab) => Crypttab { entries: Vec::new(), ..crypttab },
    };
    let all = which == Which::Later || !crypttab.is_systemds || !said.lists();
    let mut listed: Vec<Entry> = crypttab.entries.into_iter().filter(|entry| all || said.has(entry)).collect();
    listed = listed.into_iter().map(|entry| said.amend(entry)).collect();
    for entry in said.entries() {
        if listed.iter().all(|other| other.device.path() != entry.device.path()) {
            listed.push(entry);
        }
    }
    Some(listed)
}

/// The LUKS2 devices that are here, with a token for a store that is configured.
fn present(config: &Config, said: &CommandLine) -> Vec<Planned> {
    let devices = fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
    let ours = devices.filter_map(|entry| {
        let path = Path::new("/dev").join(entry.file_name());
        let volume = header::find_to_map(&path, None, None).ok()?;
        let reference = volume.luks()?.reference.clone()?;
        config.store(&reference.store).ok()?;
        let entry = Entry::new(format!("luks-{}", volume.uuid()?), path.to_str()?.parse().ok()?, said.options());
        Some(Planned { keys: vec![reference], ..crypttab_entries::planned(entry)? })
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

    fn names(config: &Config, crypttab: Option<&str>, command_line: &str, which: Which) -> Vec<String> {
        let said = CommandLine::parse(command_line, Stage::Initrd);
        let planned = planned(config, crypttab.map(Crypttab::of), &said, which);
        planned.into_iter().map(|planned| planned.name.to_string()).collect()
    }

    const CRYPTTAB: Option<&str> = Some("root UUID=aa none luks\ndata UUID=bb none luks,discard\n");
    const ONE: &str = "[[boot.volumes]]\nname = 'system'\ndevice = 'UUID=aa'\n";

    #[test]
    fn the_configurations_volumes_go_before_crypttabs() {
        let names = |config: &str, crypttab| names(&self::config(config), crypttab, "", Which::This);
        assert_eq!(names("", CRYPTTAB), ["root", "data"]);
        assert_eq!(names(ONE, CRYPTTAB), ["system"]);
        assert!(names("", Some("")).is_empty(), "a crypttab without entries is no reason to look around");
    }

    #[test]
    fn the_kernels_command_line_lists_and_switches_off() {
        let nothing = config("");
        let this = |crypttab, command_line| names(&nothing, crypttab, command_line, Which::This);
        assert_eq!(this(None, "quiet rd.luks.name=aa=root"), ["root"]);
        assert_eq!(this(CRYPTTAB, "rd.luks.uuid=bb"), ["data"], "with crypttab's name, and nothing else of it");
        assert_eq!(this(CRYPTTAB, "rd.luks.name=cc=more"), ["more"]);
        assert!(this(CRYPTTAB, "rd.luks.crypttab=no").is_empty());
        assert_eq!(this(CRYPTTAB, "rd.luks.crypttab=no rd.luks.uuid=bb"), ["luks-bb"]);
        for off in ["luks=no", "rd.luks=0 rd.luks.uuid=aa"] {
            assert!(this(CRYPTTAB, off).is_empty() && names(&config(ONE), None, off, Which::This).is_empty());
        }
        let later = names(&nothing, CRYPTTAB, "luks=no rd.luks.crypttab=no rd.luks.uuid=cc", Which::Later);
        assert_eq!(later, ["root", "data", "luks-cc"], "the next boot is no rescue");
    }

    #[test]
    fn initramfs_tools_crypttab_is_not_systemds() {
        let said = CommandLine::parse("rd.luks.uuid=cc rd.luks.crypttab=no", Stage::Initrd);
        let crypttab = || Some(Crypttab { is_systemds: false, ..Crypttab::of("root UUID=aa none luks\n") });
        let names: Vec<_> =
            listed(crypttab(), &said, Which::This).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["root", "luks-cc"]);
    }

    #[test]
    fn whoever_asks_for_read_only_gets_it() {
        let read_only = |config: &str, crypttab: &str, command_line| {
            let said = CommandLine::parse(command_line, Stage::Initrd);
            let planned = planned(&self::config(config), Some(Crypttab::of(crypttab)), &said, Which::This);
            planned[0].options.read_only
        };
        assert!(read_only("", "", "rd.luks.name=aa=x rd.luks.options=aa=read-only"));
        assert!(read_only("", "", "rd.luks.name=aa=x luks.options=discard,readonly"));
        assert!(read_only("", "x UUID=aa none luks", "luks.options=aa=read-only"));
        assert!(!read_only("", "x UUID=aa none luks", "luks.options=read-only"), "crypttab's own hold");
        assert!(read_only(ONE, "x UUID=aa none luks,readonly", ""));
        assert!(read_only(ONE, "", "rd.luks.uuid=aa rd.luks.options=aa=read-only"));
        assert!(!read_only(ONE, "x UUID=bb none luks,readonly", ""));
    }
}
