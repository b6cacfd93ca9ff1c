//! /etc/crypttab: which volumes the distribution opens, from which devices (crypttab(5)). Debian's and systemd's words are both read.

use std::{fs, io, path::Path};

use crate::config::DeviceSpec;

/// The file.
pub const PATH: &str = "/etc/crypttab";

/// One line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The mapping's name.
    pub name: String,
    /// The encrypted device.
    pub device: DeviceSpec,
    options: Vec<String>,
}

impl Entry {
    /// Whether it has one of these options.
    pub fn has(&self, words: &[&str]) -> bool {
        self.options.iter().any(|option| words.contains(&option.as_str()))
    }

    /// A detached LUKS header (`header=`).
    pub fn header(&self) -> Option<&Path> {
        let header = self.options.iter().find_map(|option| option.strip_prefix("header=")).map(Path::new);
        header.filter(|path| path.is_absolute())
    }
}

/// All its lines; none if there is no such file.
pub fn read(path: &Path) -> io::Result<Vec<Entry>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        text => Ok(parse(&text?)),
    }
}

/// Its lines; one that names no device is none.
pub fn parse(text: &str) -> Vec<Entry> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let entry = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (name, device) = (fields.next()?.to_owned(), fields.next()?.parse().ok()?);
        let options = fields.nth(1).unwrap_or_default().split(',').map(str::to_owned).collect();
        Some(Entry { name, device, options })
    };
    lines.filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lines_as_systemd_does() {
        let entries = parse(
            "# NAME DEVICE KEY OPTIONS\n\n  data\tUUID=7d1f none luks,_netdev,header=/boot/data.header\nswap /dev/vda3\n\
             late\nodd vda none luks\n",
        );
        let names: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.device.to_string())).collect();
        assert_eq!(names, [("data", "UUID=7d1f".to_owned()), ("swap", "/dev/vda3".to_owned())]);
        assert_eq!(entries[0].header(), Some(Path::new("/boot/data.header")));
        assert!(entries[0].has(&["noauto", "_netdev"]) && !entries[0].has(&["noauto"]));
        assert_eq!(entries[1].header(), None);
    }

    #[test]
    fn does_without() {
        assert_eq!(read(Path::new("/nonexistent/crypttab")).unwrap(), []);
    }
}
