//! /etc/crypttab: which volumes the distribution opens, from which devices (crypttab(5)). Debian's and systemd's words are both read.

use std::{fs, io, path::Path};

use crate::{config::DeviceSpec, sys::mounts::decoded};

/// The file.
pub const PATH: &str = "/etc/crypttab";

/// One line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub device: DeviceSpec,
    options: Vec<String>,
}

impl Entry {
    /// An entry with these options, parted by commas.
    pub fn new(name: String, device: DeviceSpec, options: &str) -> Self {
        Self { name, device, options: options.split(',').map(str::to_owned).collect() }
    }

    /// The same with other options.
    pub fn with_options(self, options: &str) -> Self {
        Self::new(self.name, self.device, options)
    }

    /// Whether it has one of these options.
    pub fn has(&self, words: &[&str]) -> bool {
        self.options.iter().any(|option| words.contains(&option.as_str()))
    }

    /// A detached LUKS header (`header=`).
    pub fn header(&self) -> Option<&Path> {
        self.options.iter().find_map(|option| option.strip_prefix("header=")).map(Path::new)
    }
}

/// All its lines; none if there is no such file.
pub fn read(path: &Path) -> io::Result<Vec<Entry>> {
    match text(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        text => Ok(parse(&text?)),
    }
}

/// Its text. Invalid UTF-8 (a comment in Latin-1) is replaced, not an error.
pub fn text(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// Its lines; a line that names no device is left out.
pub fn parse(text: &str) -> Vec<Entry> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let entry = |line: &str| {
        let mut fields = line.split_ascii_whitespace().map(unescaped);
        let (name, device) = (fields.next()?, fields.next()?.parse().ok()?);
        Some(Entry::new(name, device, &fields.nth(1).unwrap_or_default()))
    };
    lines.filter_map(entry).collect()
}

/// A field without Debian's octal escapes: a blank is `\040` (crypttab(5)). udev's own, `\x20`, are part of a path.
fn unescaped(field: &str) -> String {
    decoded(field.as_bytes()).to_string_lossy().into_owned()
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

    #[test]
    fn reads_blanks_as_debian_writes_them() {
        let entries = parse(
            "data LABEL=my\\040data none luks,header=/boot/a\\040b\nold /dev/disk/by-label/my\\x20data\nodd /dev/a\\4\n",
        );
        let paths: Vec<_> = entries.iter().map(|entry| entry.device.path()).collect();
        assert_eq!(
            paths,
            ["/dev/disk/by-label/my\\x20data", "/dev/disk/by-label/my\\x20data", "/dev/a\\4"].map(Path::new)
        );
        assert_eq!(entries[0].header(), Some(Path::new("/boot/a b")));
        assert_eq!(unescaped("\\303\\244\\x20\\9"), "ä\\x20\\9");
    }

    #[test]
    fn reads_what_is_not_utf_8() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"# Schl\xfcssel\ndata UUID=7d1f none luks\n").unwrap();
        assert_eq!(read(file.path()).unwrap().len(), 1);
    }
}
