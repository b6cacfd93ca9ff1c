//! Which volumes the distribution opens at this boot, and under which names: crypttab and the kernel's command line say so.

use std::path::Path;

use super::Planned;
use crate::{
    config::{
        DeviceSpec,
        crypttab::{self, Entry},
    },
    verbs::attach::Options,
};

/// The entries of a crypttab; what cannot be ours (swap with random keys, names that no mapping has) is left out, and so are
/// files: the disk that they are on is mounted later.
pub fn entries(text: &str) -> Vec<Planned> {
    crypttab::parse(text).into_iter().filter_map(planned).collect()
}

fn planned(entry: Entry) -> Option<Planned> {
    if !entry.device.is_node() || entry.has(&["swap", "tmp", "plain", "noauto", "tcrypt", "bitlk"]) {
        return None;
    }
    Some(Planned {
        name: entry.name.parse().ok()?,
        header: entry.header().map(Path::to_owned),
        keys: Vec::new(),
        options: Options {
            read_only: entry.has(&["readonly", "read-only"]),
            allow_discards: entry.has(&["discard"]),
            no_read_workqueue: entry.has(&["no-read-workqueue"]),
            no_write_workqueue: entry.has(&["no-write-workqueue"]),
            export: None,
        },
        optional: entry.has(&["nofail"]),
        device: entry.device,
        configured: false,
    })
}

/// What the kernel's command line asks of systemd-cryptsetup: `rd.luks.name=UUID=NAME`, `rd.luks.uuid=UUID`, and the same
/// without `rd.`, which an initramfs heeds as well (systemd-cryptsetup-generator(8)).
pub fn from_kernel(command_line: &str) -> Vec<Planned> {
    let words = || command_line.split_ascii_whitespace().map(|word| word.strip_prefix("rd.").unwrap_or(word));
    let named = words().filter_map(|word| word.strip_prefix("luks.name=")?.split_once('='));
    let unnamed = words().filter_map(|word| {
        let uuid = word.strip_prefix("luks.uuid=")?;
        Some((uuid.strip_prefix("luks-").unwrap_or(uuid), ""))
    });
    let mut planned: Vec<Planned> = Vec::new();
    for (uuid, name) in named.chain(unnamed) {
        let name = if name.is_empty() { format!("luks-{uuid}") } else { name.to_owned() };
        let (Ok(name), Ok(device)) = (name.parse(), format!("UUID={uuid}").parse::<DeviceSpec>()) else { continue };
        if planned.iter().all(|other| other.device != device) {
            let (header, keys, options) = (None, Vec::new(), Options::default());
            planned.push(Planned { name, device, header, keys, options, configured: false, optional: false });
        }
    }
    planned
}

/// The entries of this boot's crypttab: initramfs-tools' own with what the root file system needs, or the machine's; `None` if
/// there is none.
pub fn of_this_boot() -> Option<Vec<Planned>> {
    let text =
        ["/cryptroot/crypttab", crypttab::PATH].into_iter().find_map(|path| crypttab::text(Path::new(path)).ok());
    text.as_deref().map(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_debians_and_systemds_words() {
        let text = "# name device key options\n\n\
            root UUID=11111111-2222-3333-4444-555555555555 none luks,discard,header=/boot/root.header\n\
            swap /dev/sda3 /dev/urandom swap\n\
            data LABEL=data none luks,readonly,no-read-workqueue\n\
            bad/name UUID=ab none luks\n\
            file /srv/data.img none luks\n\
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
        let planned = from_kernel("luks.name=aa=root luks.uuid=bb");
        let names: Vec<_> = planned.iter().map(|planned| planned.name.as_str()).collect();
        assert_eq!(names, ["root", "luks-bb"], "for the initramfs, too");
    }
}
