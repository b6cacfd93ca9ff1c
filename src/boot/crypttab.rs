//! crypttab(5): which volumes the distribution opens, and under which names. Debian's and systemd's words are both read.

use std::{fs, path::PathBuf};

use super::Planned;
use crate::{attach::Options, config::DeviceSpec};

/// The entries of a crypttab; what cannot be ours (swap with random keys, names that no mapping has) is left out.
pub fn entries(text: &str) -> Vec<Planned> {
    text.lines().filter_map(entry).collect()
}

fn entry(line: &str) -> Option<Planned> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let mut fields = line.split_ascii_whitespace();
    let (name, device) = (fields.next()?.parse().ok()?, fields.next()?.parse::<DeviceSpec>().ok()?);
    let (_key, options) = (fields.next(), fields.next().unwrap_or_default());
    let options: Vec<&str> = options.split(',').collect();
    let has = |words: &[&str]| options.iter().any(|option| words.contains(option));
    if has(&["swap", "tmp", "plain", "noauto", "tcrypt", "bitlk"]) {
        return None;
    }
    let header = options.iter().find_map(|option| option.strip_prefix("header=")).map(PathBuf::from);
    Some(Planned {
        name,
        device,
        header: header.filter(|path| path.is_absolute()),
        keys: Vec::new(),
        options: Options {
            read_only: has(&["readonly", "read-only"]),
            allow_discards: has(&["discard"]),
            no_read_workqueue: has(&["no-read-workqueue"]),
            no_write_workqueue: has(&["no-write-workqueue"]),
            export: None,
        },
        configured: false,
    })
}

/// What the kernel's command line asks of systemd-cryptsetup: `rd.luks.name=UUID=NAME`, `rd.luks.uuid=UUID`
/// (systemd-cryptsetup-generator(8)).
pub fn from_kernel(command_line: &str) -> Vec<Planned> {
    let words = || command_line.split_ascii_whitespace();
    let named = words().filter_map(|word| word.strip_prefix("rd.luks.name=")?.split_once('='));
    let unnamed = words().filter_map(|word| {
        let uuid = word.strip_prefix("rd.luks.uuid=")?;
        Some((uuid.strip_prefix("luks-").unwrap_or(uuid), ""))
    });
    let mut planned: Vec<Planned> = Vec::new();
    for (uuid, name) in named.chain(unnamed) {
        let name = if name.is_empty() { format!("luks-{uuid}") } else { name.to_owned() };
        let (Ok(name), Ok(device)) = (name.parse(), format!("UUID={uuid}").parse::<DeviceSpec>()) else { continue };
        if planned.iter().all(|other| other.device != device) {
            let (header, keys, options) = (None, Vec::new(), Options::default());
            planned.push(Planned { name, device, header, keys, options, configured: false });
        }
    }
    planned
}

/// The entries of this boot's crypttab: initramfs-tools' own with what the root file system needs, or the machine's; `None` if
/// there is none.
pub fn of_this_boot() -> Option<Vec<Planned>> {
    let text = ["/cryptroot/crypttab", "/etc/crypttab"].into_iter().find_map(|path| fs::read_to_string(path).ok());
    text.as_deref().map(entries)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn reads_debians_and_systemds_words() {
        let text = "# name device key options\n\n\
            root UUID=11111111-2222-3333-4444-555555555555 none luks,discard,header=/boot/root.header\n\
            swap /dev/sda3 /dev/urandom swap\n\
            data LABEL=data none luks,readonly,no-read-workqueue\n\
            bad/name UUID=ab none luks\n\
            odd vda none luks\n\
            late\n";
        let planned = entries(text);
        let names: Vec<_> = planned.iter().map(|planned| planned.name.as_str()).collect();
        assert_eq!(names, ["root", "data"]);
        assert!(planned[0].options.allow_discards && !planned[0].options.read_only);
        assert_eq!(planned[0].header.as_deref(), Some(Path::new("/boot/root.header")));
        assert!(planned[1].options.read_only && planned[1].options.no_read_workqueue);
    }

    #[test]
    fn reads_the_kernels_command_line() {
        let planned = from_kernel("quiet rd.luks.name=aa-bb=root rd.luks.uuid=luks-aa-bb rd.luks.uuid=cc rd.luks=1");
        let names: Vec<_> = planned.iter().map(|planned| planned.name.as_str()).collect();
        assert_eq!(names, ["root", "luks-cc"]);
    }
}
