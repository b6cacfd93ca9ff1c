//! The host as the kernel shows it: `/sys`, `/proc`, udev's database, and what a path is.
//!
//! Tests put a directory tree and a table of paths in its place.

use std::{
    fs::{self, OpenOptions},
    io,
    net::IpAddr,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    libc,
};

use super::block::DeviceNumber;
use crate::sys::{durable::folder_of, loop_device::shown};

/// Where the kernel's file systems are, and how to look at a path.
pub(crate) struct Sysfs {
    root: PathBuf,
    look: fn(&Path) -> io::Result<Seen>,
    addresses: fn() -> io::Result<Vec<IpAddr>>,
    shows: fn(&str, &Path) -> Option<bool>,
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The path without symbolic links.
    pub path: PathBuf,
    /// The number of the block device that it is.
    pub block: Option<DeviceNumber>,
    /// The device that its file system says it is on (`st_dev`).
    pub on: DeviceNumber,
    /// The mount that it is on, if the kernel said.
    pub mount: Option<u64>,
}

impl Sysfs {
    /// This host.
    pub fn this() -> Self {
        Self { root: PathBuf::from("/"), look, addresses, shows }
    }

    /// A tree under `root` that stands for a host; `look` answers what its paths are, `addresses` those of its interfaces.
    #[cfg(test)]
    pub fn fixture(
        root: &Path,
        look: fn(&Path) -> io::Result<Seen>,
        addresses: fn() -> io::Result<Vec<IpAddr>>,
    ) -> Self {
        Self { root: root.to_owned(), look, addresses, shows: |_, _| None }
    }

    /// A path of `/sys`, `/proc` or `/run`, given without the leading slash.
    pub fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The addresses of its network interfaces.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        (self.addresses)()
    }

    /// Whether the file at this path is the one that a loop device shows; `None` if the device cannot be asked.
    pub fn shows(&self, loop_device: &str, path: &Path) -> Option<bool> {
        (self.shows)(loop_device, path)
    }

    /// What a path is, symbolic links followed.
    pub fn look(&self, path: &Path) -> io::Result<Seen> {
        (self.look)(path)
    }

    /// What a path is, or if it does not exist, where it would be made: its nearest ancestor that exists.
    pub fn look_nearest(&self, path: &Path) -> io::Result<Seen> {
        // 40: as many symbolic links as the kernel follows (path_resolution(7)); ancestors are bounded by the path.
        self.look_nearest_within(path, 40)
    }

    fn look_nearest_within(&self, path: &Path, links_left: u32) -> io::Result<Seen> {
        match self.look(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A dangling link is made where it points to, not where it is.
                if let (Ok(target), 1..) = (fs::read_link(path), links_left) {
                    return self.look_nearest_within(&folder_of(path).join(target), links_left - 1);
                }
                let parent = folder_of(path);
                if parent == path { Err(error) } else { self.look_nearest_within(parent, links_left) }
            }
            seen => seen,
        }
    }
}

fn look(path: &Path) -> io::Result<Seen> {
    let path = fs::canonicalize(path)?;
    // O_PATH neither needs permission to read nor wakes a device (open(2)).
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(&path)?;
    let metadata = file.metadata()?;
    let block = metadata.file_type().is_block_device().then(|| DeviceNumber(metadata.rdev()));
    // The mount id is exact where mounts are stacked, bound or of btrfs subvolumes (proc_pid_fdinfo(5)).
    let mount = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))
        .ok()
        .and_then(|info| info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok()));
    Ok(Seen { path, block, on: DeviceNumber(metadata.dev()), mount })
}

fn shows(loop_device: &str, path: &Path) -> Option<bool> {
    let (shown, file) = (shown(loop_device)?, fs::metadata(path).ok()?);
    Some((file.dev(), file.ino()) == (shown.on, shown.inode))
}

fn addresses() -> io::Result<Vec<IpAddr>> {
    let address = |interface: InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    Ok(getifaddrs()?.filter_map(address).map(|address| address.to_canonical()).collect())
}

/// The text of a sysfs or procfs attribute, trimmed; `None` if there is none or it is empty.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// The entries of a directory, in order; none if it cannot be read.
pub(crate) fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The last part of a path, as text.
pub(crate) fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
