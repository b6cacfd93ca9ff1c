//! What the entries of crypttab ask of a boot, and those that the kernel's command line makes.

use std::path::Path;

use super::Planned;
use crate::{
    config::crypttab::{self, Entry},
    verbs::attach::Options,
};

/// initramfs-tools' crypttab, with what the root file system needs. No word of systemd's is about that.
const CRYPTROOT: &str = "/cryptroot/crypttab";

/// A crypttab.
pub struct Crypttab {
    pub entries: Vec<Entry>,
    /// systemd reads it, with what the kernel's command line says.
    pub is_systemds: bool,
}

impl Crypttab {
    /// One that has this text.
    pub fn of(text: &str) -> Self {
        Self { entries: crypttab::parse(text), is_systemds: true }
    }

    /// That of this boot; `None` if there is none.
    pub fn of_this_boot() -> Option<Self> {
        let read = |path: &str| crypttab::text(Path::new(path)).ok();
        let cryptroot = read(CRYPTROOT).map(|text| Self { is_systemds: false, ..Self::of(&text) });
        cryptroot.or_else(|| Some(Self::of(&read(crypttab::PATH)?)))
    }
}

/// What is to be done with an entry. What cannot be ours (swap with random keys, names that no mapping has) is left out, and so
/// are files: the disk that they are on is mounted later.
pub fn planned(entry: Entry) -> Option<Planned> {
    if !entry.device.is_node() || entry.has(&["swap", "tmp", "plain", "noauto", "tcrypt", "bitlk"]) {
        return None;
    }
    if let Some(header) =
        entry.header().filter(|header| !header.is_absolute() || header.to_string_lossy().contains(':'))
    {
        tracing::warn!("{} is left to the system: its header {} is not a file's path", entry.name, header.display());
        return None;
    }
    Some(Planned {
        name: entry.name.parse().ok()?,
        header: entry.header().map(Path::to_owned),
        keys: Vec::new(),
        options: options(&entry),
        optional: entry.has(&["nofail"]),
        device: entry.device,
        configured: false,
    })
}

/// How an entry is to be mapped.
pub fn options(entry: &Entry) -> Options {
    Options {
        read_only: entry.has(&["readonly", "read-only"]),
        allow_discards: entry.has(&["discard"]),
        no_read_workqueue: entry.has(&["no-read-workqueue"]),
        no_write_workqueue: entry.has(&["no-write-workqueue"]),
        export: None,
    }
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
            far LABEL=far none luks,header=/far.header:LABEL=headers\n\
            odd vda none luks\n\
            late\n";
        let planned: Vec<_> = crypttab::parse(text).into_iter().filter_map(planned).collect();
        let names: Vec<_> = planned.iter().map(|planned| planned.name.as_str()).collect();
        assert_eq!(names, ["root", "data"]);
        assert!(planned[0].options.allow_discards && !planned[0].options.read_only);
        assert_eq!(planned[0].header.as_deref(), Some(Path::new("/boot/root.header")));
        assert!(planned[1].options.read_only && planned[1].options.no_read_workqueue);
    }
}
