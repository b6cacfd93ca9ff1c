//! Mounts, as `/proc/PID/mountinfo` lists them (proc_pid_mountinfo(5)).

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use super::{
    block::{DeviceNumber, linked},
    sysfs::{Seen, Sysfs, attribute, base_name, entries},
};

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Unique while it is mounted.
    pub id: u64,
    /// `st_dev` of its files; btrfs has another one for each subvolume.
    pub number: DeviceNumber,
    /// Where it is mounted.
    pub point: PathBuf,
    /// "ext4", "fuse.sshfs", ...
    pub kind: String,
    /// What is mounted: a device for some, any text for others.
    pub source: OsString,
    /// The options of the file system itself ("lowerdir=/a:/b"), decoded.
    pub options: Vec<OsString>,
}

impl Mount {
    /// The values of an option, in order.
    pub fn values<'a>(&'a self, option: &str) -> impl Iterator<Item = &'a OsStr> {
        let name = option.as_bytes().to_vec();
        self.options.iter().filter_map(move |option| {
            Some(OsStr::from_bytes(option.as_bytes().strip_prefix(&name[..])?.strip_prefix(b"=")?))
        })
    }

    /// Whether an option without a value is set.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|set| set == option)
    }
}

/// The mounts that a process sees; none if they cannot be read.
pub(crate) fn seen_by(sysfs: &Sysfs, process: &str) -> Vec<Mount> {
    fs::read(sysfs.at(&format!("proc/{process}/mountinfo"))).map(|text| parse(&text)).unwrap_or_default()
}

/// The mount that a path is on: the one whose id the kernel told, else the longest mount point above the path, of equals
/// the last, which covers the others; one with the path's device number goes before any other.
pub(crate) fn mount_of<'a>(mounts: &'a [Mount], seen: &Seen) -> Option<&'a Mount> {
    seen.mount.and_then(|id| mounts.iter().find(|mount| mount.id == id)).or_else(|| {
        let above = mounts.iter().filter(|mount| seen.path.starts_with(&mount.point));
        above.max_by_key(|mount| (mount.number == seen.on, mount.point.components().count()))
    })
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    // 36 35 98:0 /root /mount/point rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue
    let mut fields = line.split(|byte| *byte == b' ');
    let id = ascii(fields.next()?)?.parse().ok()?;
    let number = ascii(fields.nth(1)?)?.parse().ok()?;
    let point = PathBuf::from(decoded(fields.nth(1)?));
    fields.by_ref().skip(1).find(|field| *field == b"-")?;
    let kind = decoded(fields.next()?).to_string_lossy().into_owned();
    let source = decoded(fields.next()?);
    let options = fields.next().unwrap_or_default().split(|byte| *byte == b',').map(decoded).collect();
    Some(Mount { id, number, point, kind, source, options })
}

fn ascii(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Undoes the kernel's escapes: blank, tab, newline, backslash and others as `\` and three octal digits.
pub(crate) fn decoded(mut field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    while let [first, rest @ ..] = field {
        let (byte, rest) = match field {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', rest @ ..] => {
                ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), rest)
            }
            _ => (*first, rest),
        };
        bytes.push(byte);
        field = rest;
    }
    OsString::from_vec(bytes)
}

/// The directories of an overlay: all of them, since a file may rest in any (Documentation/filesystems/overlayfs.rst).
pub(crate) fn overlay_directories(mount: &Mount) -> Vec<PathBuf> {
    let lower = mount.values("lowerdir").flat_map(|value| split_at_colons(value.as_bytes()));
    let single = ["upperdir", "workdir", "lowerdir+", "datadir+"]
        .into_iter()
        .flat_map(|option| mount.values(option).map(PathBuf::from).collect::<Vec<_>>());
    single.chain(lower).collect()
}

/// Splits at colons that have no backslash before them; empty parts ("::" goes before data-only layers) are left out.
fn split_at_colons(value: &[u8]) -> Vec<PathBuf> {
    let mut parts = vec![Vec::new()];
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        match (byte, parts.last_mut()) {
            (b':', _) => parts.push(Vec::new()),
            (b'\\', Some(part)) => part.extend(bytes.next()),
            (_, Some(part)) => part.push(*byte),
            (_, None) => {}
        }
    }
    parts.into_iter().filter(|part| !part.is_empty()).map(|part| PathBuf::from(OsString::from_vec(part))).collect()
}

/// Whether the path lies in a directory of the kernel's own, which no disk holds.
pub(crate) fn is_kernels_own(kind: &str) -> bool {
    matches!(
        kind,
        "proc"
            | "sysfs"
            | "cgroup"
            | "cgroup2"
            | "debugfs"
            | "tracefs"
            | "securityfs"
            | "configfs"
            | "devpts"
            | "mqueue"
    )
}

/// The absolute path that a mount's source names.
pub(crate) fn source_path(mount: &Mount) -> Option<&Path> {
    Some(Path::new(&mount.source)).filter(|path| path.is_absolute())
}

/// What sysfs knows of a mounted btrfs.
pub(crate) struct Btrfs {
    /// The file system's UUID.
    pub uuid: String,
    /// All devices that it is on.
    pub devices: Vec<DeviceNumber>,
    /// The ids of devices that it should be on.
    pub missing: Vec<String>,
}

/// The mounted btrfs that is on a device: sysfs knows all devices by its UUID, the mount only one of them by name.
pub(crate) fn btrfs_with(sysfs: &Sysfs, device: DeviceNumber) -> Option<Btrfs> {
    entries(&sysfs.at("sys/fs/btrfs")).into_iter().find_map(|directory| {
        let devices = linked(&directory.join("devices"));
        let is_missing = |info: &PathBuf| attribute(&info.join("missing")).as_deref() == Some("1");
        devices.contains(&device).then(|| Btrfs {
            uuid: base_name(&directory),
            devices,
            missing: entries(&directory.join("devinfo"))
                .iter()
                .filter(|info| is_missing(info))
                .map(|i| base_name(i))
                .collect(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(text: &str) -> Vec<Mount> {
        parse(text.as_bytes())
    }

    #[test]
    fn a_line_is_taken_apart_with_any_number_of_optional_fields() {
        for optional in ["", "shared:1 ", "shared:1 master:2 "] {
            let line = format!("36 35 98:1 / /mnt/a\\040b rw,noatime {optional}- ext4 /dev/sda\\0401 rw,discard\n");
            let [mount] = &mounts(&line)[..] else { panic!("one mount") };
            assert_eq!((mount.id, mount.number.to_string()), (36, "98:1".to_owned()));
            assert_eq!((mount.point.as_path(), mount.kind.as_str()), (Path::new("/mnt/a b"), "ext4"));
            assert_eq!(mount.source, "/dev/sda 1");
            assert!(mount.has("discard") && !mount.has("noatime"));
        }
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for line in ["", "36", "36 35 98 / /mnt rw - ext4 a rw", "36 35 98:1 / /mnt rw ext4 /dev/sda rw"] {
            assert_eq!(mounts(line), []);
        }
    }

    #[test]
    fn escapes_are_undone() {
        for (field, text) in [("a\\040b", "a b"), ("\\134", "\\"), ("a\\", "a\\"), ("\\09", "\\09"), ("\\999", "\\999")]
        {
            assert_eq!(decoded(field.as_bytes()), text);
        }
    }

    #[test]
    fn the_mount_of_a_path_is_the_longest_and_last_one() {
        let mounts = mounts(
            "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
             2 1 8:2 / /mnt rw - ext4 /dev/sda2 rw\n\
             3 1 8:3 / /mnt rw - ext4 /dev/sda3 rw\n\
             4 1 8:4 / /mntnot rw - ext4 /dev/sda4 rw\n",
        );
        let id_of = |path: &str, on: &str, mount| {
            let on = on.parse().expect("a number");
            mount_of(&mounts, &Seen { path: path.into(), block: None, on, mount }).map(|mount| mount.id)
        };
        assert_eq!(id_of("/mnt/x", "0:9", None), Some(3), "the later mount covers the earlier");
        assert_eq!(id_of("/mnt/x", "8:2", None), Some(2), "the device number decides");
        assert_eq!(id_of("/mnt/x", "8:3", Some(2)), Some(2), "the kernel's word decides");
        assert_eq!(id_of("/mnt/x", "8:3", Some(99)), Some(3), "an id that is not there is passed over");
        assert_eq!(id_of("/srv", "0:9", None), Some(1));
    }

    #[test]
    fn an_overlay_names_all_its_directories() {
        let mounts = mounts(
            "5 1 0:40 / /merged rw - overlay overlay rw,lowerdir=/a:/b\\134:c::/d\\054e,upperdir=/u,workdir=/w\n\
             6 1 0:41 / /merged rw - overlay overlay rw,lowerdir+=/a,lowerdir+=/b,datadir+=/d\n",
        );
        let directories =
            |mount| overlay_directories(mount).iter().map(|d| d.display().to_string()).collect::<Vec<_>>();
        assert_eq!(directories(&mounts[0]), ["/u", "/w", "/a", "/b:c", "/d,e"]);
        assert_eq!(directories(&mounts[1]), ["/a", "/b", "/d"]);
    }
}
