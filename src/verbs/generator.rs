//! systemd's units for the volumes of the configuration, as systemd-cryptsetup-generator makes them for /etc/crypttab.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use crate::{
    base::{key::StoreName, mapping_name::MappingName},
    config::{Config, VolumeConfig},
    keys::{seal::identities, store},
    sys::systemd::{escape_path, rekey_unit, unit},
    unlock,
    verbs::{
        boot::command_line::{CommandLine, Stage},
        rotate::standing,
    },
};

/// The template that attaches a volume of the configuration.
const TEMPLATE: &str = "/usr/lib/systemd/system/cryptattach@.service";

/// The template that goes on with a rotation.
const REKEY: &str = "/usr/lib/systemd/system/cryptattach-rekey@.service";

/// Writes, for each volume: what its unit waits for, and that /dev/mapper/NAME needs the unit, so that a mount or swap on it
/// brings it up (systemd.generator(7)).
///
/// One whose units cannot be, as a name too long for a unit, keeps no other from having theirs; the last error is told. With
/// `luks=no` on the kernel's command line there are none: a person wants a system without its volumes.
pub fn generate(config: &Config, into: &Path) -> io::Result<()> {
    if !CommandLine::read(Stage::System).luks {
        return Ok(());
    }
    let mut generated = go_on_with_rotations(config, into);
    for (name, volume) in &config.volumes {
        generated = generate_for(config, name, volume, into).and(generated);
    }
    generated
}

/// Whatever ended a rotation of this host before its end, it goes on once the system is up.
fn go_on_with_rotations(config: &Config, into: &Path) -> io::Result<()> {
    for volume in standing::unfinished(config) {
        let wants = into.join("multi-user.target.wants");
        fs::create_dir_all(&wants)?;
        symlink(REKEY, wants.join(rekey_unit(volume)))?;
    }
    Ok(())
}

fn generate_for(config: &Config, name: &MappingName, volume: &VolumeConfig, into: &Path) -> io::Result<()> {
    let unit = unit(name);
    let settings = into.join(format!("{unit}.d"));
    fs::create_dir_all(&settings)?;
    fs::write(settings.join("50-volume.conf"), dependencies(config, volume))?;
    let mapping = Path::new("/dev/mapper").join(name.as_str());
    let requires = into.join(format!("{}.device.requires", escape_path(&mapping)));
    fs::create_dir_all(&requires)?;
    symlink(TEMPLATE, requires.join(unit))
}

fn dependencies(config: &Config, volume: &VolumeConfig) -> String {
    let mut text = format!("# Made by cryptattach-generator of {}\n[Unit]\n", config.path.display());
    let device = volume.device.path();
    if device.starts_with("/dev") {
        let unit = format!("{}.device", escape_path(device));
        // Gone with its device.
        let _ = writeln!(text, "BindsTo={unit}\nAfter={unit}");
    } else {
        let _ = writeln!(text, "RequiresMountsFor={}", quoted(device));
    }
    if needs_network(config, volume) {
        // As systemd orders crypttab's _netdev: not before sysinit.target, which the network itself needs.
        text += "Wants=network-online.target\nAfter=network-online.target remote-fs-pre.target\nBefore=remote-cryptsetup.target\n";
    } else {
        text += "Before=cryptsetup.target\n";
    }
    let files = volume.header.iter().map(|header| header.to_path_buf()).chain(files(config, volume));
    for file in files.filter(|file| file.is_absolute()) {
        let _ = writeln!(text, "RequiresMountsFor={}", quoted(&file));
    }
    text
}

/// The files that are needed to get the key.
fn files(config: &Config, volume: &VolumeConfig) -> Vec<PathBuf> {
    let Some(store) = volume.store(config).map(|name| &config.stores[&name]) else { return Vec::new() };
    let directory = store::kind(store).ok().and_then(|kind| kind.directory().map(Path::to_owned));
    directory.into_iter().chain(identities::files(&store.sealing.identities)).collect()
}

/// Whether attaching it needs a network: if its store may be one of several, that any of them does.
fn needs_network(config: &Config, volume: &VolumeConfig) -> bool {
    let remote = |name: &StoreName| {
        let store = &config.stores[name];
        let leaves =
            || unlock::container::servers_to_open(config, store, false).is_ok_and(|servers| !servers.is_empty());
        store::kind(store).is_ok_and(|kind| kind.needs_network()) || leaves()
    };
    volume.network.unwrap_or_else(|| match volume.store(config) {
        Some(store) => remote(&store),
        None => config.stores.keys().any(remote),
    })
}

/// A path as unit files want it: `%` introduces a specifier, and a blank ends a word.
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generated(toml: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        fs::write(&path, toml).unwrap();
        generate(&Config::outline(&path).unwrap(), folder.path()).unwrap();
        folder
    }

    const STORES: &str = "[stores.local]\ntype = 'directory'\npath = '/mnt/my keys'\nowner = 'o.pem'\nno_escrow = true\n\
                          identities = ['credential:owner', '/mnt/usb/o.key']\n\
                          [stores.remote]\ntype = 'swift'\nowner = 'o.pem'\nno_escrow = true\n";

    #[test]
    fn a_local_volume_waits_for_its_device_and_its_store() {
        let folder = generated(&format!("default_store = 'local'\n{STORES}[volumes.data-1]\ndevice = 'UUID=7d1f'\n"));
        let settings = folder.path().join("cryptattach@data\\x2d1.service.d/50-volume.conf");
        let text = fs::read_to_string(settings).unwrap();
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "[Unit]",
                "BindsTo=dev-disk-by\\x2duuid-7d1f.device",
                "After=dev-disk-by\\x2duuid-7d1f.device",
                "Before=cryptsetup.target",
                "RequiresMountsFor=\"/mnt/my keys\"",
                "RequiresMountsFor=\"/mnt/usb/o.key\"",
            ]
        );
        let link = folder.path().join("dev-mapper-data\\x2d1.device.requires/cryptattach@data\\x2d1.service");
        assert_eq!(fs::read_link(link).unwrap(), Path::new(TEMPLATE));
    }

    #[test]
    fn a_rotation_that_has_not_ended_goes_on() {
        let state = tempfile::tempdir().unwrap();
        let volume = "7d1f0c3d-7d44-4c1b-9d0a-52b1a6f0c3de";
        let key = |end: &str| format!("local/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3{end}");
        let journal = |old, new| serde_json::json!({"device": "/dev/vdb", "old": old, "new": new, "begun": true});
        fs::create_dir(state.path().join("rekey")).unwrap();
        fs::write(state.path().join("rekey").join(volume), journal(key("de"), key("df")).to_string()).unwrap();
        let folder = generated(&format!("state = '{}'\ndefault_store = 'local'\n{STORES}", state.path().display()));
        let unit = "cryptattach-rekey@7d1f0c3d\\x2d7d44\\x2d4c1b\\x2d9d0a\\x2d52b1a6f0c3de.service";
        let link = folder.path().join("multi-user.target.wants").join(unit);
        assert_eq!(fs::read_link(link).unwrap(), Path::new(REKEY));
        assert!(!generated(STORES).path().join("multi-user.target.wants").exists(), "there is none");
    }

    #[test]
    fn a_remote_volume_waits_for_the_network() {
        let folder = generated(&format!(
            "{STORES}[volumes.a]\ndevice = '/dev/vdb'\nkey = 'remote/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de'\n\
             [volumes.b]\ndevice = '/dev/vdc'\n[volumes.c]\ndevice = '/dev/vdd'\nnetwork = false\n"
        ));
        let network = |name: &str| {
            let settings = folder.path().join(format!("cryptattach@{name}.service.d/50-volume.conf"));
            fs::read_to_string(settings).unwrap().contains("After=network-online.target")
        };
        assert!(network("a"), "its key is in the remote store");
        assert!(network("b"), "its key may be in the remote store");
        assert!(!network("c"), "the user knows better");
    }

    #[test]
    fn a_name_too_long_for_a_unit_keeps_no_other_volume_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        let long = "a-".repeat(60);
        fs::write(&path, format!("[volumes.{long}]\ndevice = '/dev/vdb'\n[volumes.b]\ndevice = '/dev/vdc'\n")).unwrap();
        assert!(generate(&Config::outline(&path).unwrap(), folder.path()).is_err());
        assert!(folder.path().join("dev-mapper-b.device.requires/cryptattach@b.service").is_symlink());
    }
}
