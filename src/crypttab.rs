//! /etc/crypttab: which volumes the distribution opens, from which devices (crypttab(5)).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

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
    /// A detached LUKS header (`header=`).
    pub header: Option<PathBuf>,
}

/// All its lines; none if there is no such file.
pub fn read(path: &Path) -> io::Result<Vec<Entry>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        text => Ok(parse(&text?)),
    }
}

fn parse(text: &str) -> Vec<Entry> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (name, device) = (fields.next()?.to_owned(), fields.next()?.parse().ok()?);
            let options = fields.nth(1).unwrap_or_default();
            let header = options.split(',').find_map(|option| option.strip_prefix("header=")).map(PathBuf::from);
            Some(Entry { name, device, header })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lines_as_systemd_does() {
        let entries = parse(
            "# NAME DEVICE KEY OPTIONS\n\n  data\tUUID=7d1f none luks,_netdev,header=/boot/data.header\nswap /dev/vda3\nbad\n",
        );
        let names: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.device.to_string())).collect();
        assert_eq!(names, [("data", "UUID=7d1f".to_owned()), ("swap", "/dev/vda3".to_owned())]);
        assert_eq!(entries[0].header.as_deref(), Some(Path::new("/boot/data.header")));
        assert_eq!(entries[1].header, None);
    }

    #[test]
    fn does_without() {
        assert_eq!(read(Path::new("/nonexistent/crypttab")).unwrap(), []);
    }
}
