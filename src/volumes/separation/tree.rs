//! The tree of a lineage: how a path leads to disks, for machines and as text.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};

use super::disk::{Leaf, Memory};
use crate::{
    base::chain::printable,
    sys::block::{self, BlockDevice, DeviceNumber},
};

/// One step of a lineage, and what is below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// The step.
    #[serde(flatten)]
    pub step: Step,
    /// What it rests on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub below: Vec<Node>,
}

/// A path, file system, device or disk on the way down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// A path.
    Path {
        /// As the user or the kernel names it.
        #[serde(serialize_with = "as_text")]
        path: PathBuf,
        /// What it leads to, if that is another path: the target of a link, or the nearest ancestor that exists.
        #[serde(serialize_with = "as_text_if_any", skip_serializing_if = "Option::is_none")]
        resolved: Option<PathBuf>,
    },
    /// A file system.
    FileSystem {
        /// "ext4", "btrfs", ...
        name: String,
        /// Where it is mounted.
        #[serde(serialize_with = "as_text")]
        mounted_on: PathBuf,
    },
    /// A block device that rests on others.
    Device(Device),
    /// The end: a disk, memory, or a host on the network.
    Leaf(Leaf),
    /// Parts of a key; this many of them are enough.
    Threshold { least: usize },
    /// What could not be followed.
    Gap {
        /// Why, in words.
        why: String,
    },
}

/// A block device that rests on others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// The kernel's name: "dm-3".
    pub name: String,
    pub number: DeviceNumber,
    /// What makes it.
    pub role: Role,
    /// The name that device-mapper gives it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub called: Option<String>,
}

/// What makes a block device out of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A partition.
    Partition,
    /// A loop device over a file.
    Loop,
    /// dm-crypt.
    DmCrypt,
    /// A logical volume.
    Lvm,
    /// Several paths to one disk.
    Multipath,
    /// Another target of device-mapper.
    Mapping,
    /// md.
    Raid,
    /// zram that writes to a disk.
    CompressedMemory,
    /// bcache, DRBD, ...
    Stacked,
}

impl Role {
    /// What makes a device that has slaves.
    pub(crate) fn of(device: &BlockDevice) -> Self {
        // The subsystem that made a mapping writes its name before the first hyphen (libdevmapper, dm_task_set_uuid).
        let uuid = device.attribute("dm/uuid").unwrap_or_default();
        let mut parts = uuid.split('-');
        match (parts.next(), parts.next()) {
            // libcryptsetup makes these too, and they encrypt nothing: dm-integrity, also below dm-crypt, and dm-verity.
            (Some("CRYPT"), Some("INTEGRITY" | "VERITY" | "SUBDEV" | "TEMP")) => Self::Mapping,
            (Some("CRYPT"), _) => Self::DmCrypt,
            (Some("LVM"), _) => Self::Lvm,
            (Some("mpath"), _) => Self::Multipath,
            (Some(part), _) if part.starts_with("part") => Self::Partition,
            _ if device.directory.join("dm").is_dir() => Self::Mapping,
            _ if device.directory.join("md").is_dir() => Self::Raid,
            _ => Self::Stacked,
        }
    }
}

impl Device {
    pub(crate) fn new(device: &BlockDevice, role: Role) -> Self {
        let called = device.attribute("dm/name");
        Self { name: device.name.clone(), number: device.number, role, called }
    }
}

impl Step {
    /// Whether nothing readable gets below this step.
    pub(crate) fn encrypts(&self) -> bool {
        match self {
            Self::Device(device) => device.role == Role::DmCrypt,
            Self::FileSystem { name, .. } => name == "fuse.cryptattach",
            _ => false,
        }
    }
}

impl Node {
    pub(crate) fn at(path: &Path, resolved: Option<PathBuf>, below: Vec<Self>) -> Self {
        Self { step: Step::Path { path: path.to_owned(), resolved }, below }
    }

    pub(crate) fn device(device: Device, below: Vec<Self>) -> Self {
        Self { step: Step::Device(device), below }
    }

    pub(crate) fn memory(name: &str, number: DeviceNumber, swappable: bool) -> Self {
        let memory = Memory { name: name.to_owned(), number, swappable };
        Self::leaf(Leaf::Memory(memory), Vec::new())
    }

    pub(crate) fn leaf(leaf: Leaf, below: Vec<Self>) -> Self {
        Self { step: Step::Leaf(leaf), below }
    }

    pub(crate) fn threshold(least: usize, below: Vec<Self>) -> Self {
        Self { step: Step::Threshold { least }, below }
    }

    pub(crate) fn gap(why: String) -> Self {
        Self { step: Step::Gap { why }, below: Vec::new() }
    }

    /// The leaves, each once, that are reached through steps that let pass.
    pub(crate) fn leaves(&self, lets_pass: &dyn Fn(&Step) -> bool) -> Vec<&Leaf> {
        self.collect(lets_pass, &|step| match step {
            Step::Leaf(leaf) => Some(leaf),
            _ => None,
        })
    }

    /// The leaves, each once, below which there is nothing more, that are reached through steps that let pass: not the disk
    /// that stands for one on the network.
    pub(crate) fn ends(&self, lets_pass: &dyn Fn(&Step) -> bool) -> Vec<&Leaf> {
        let mut found = Vec::new();
        if let (Step::Leaf(leaf), []) = (&self.step, &self.below[..]) {
            found.push(leaf);
        }
        if lets_pass(&self.step) {
            for leaf in self.below.iter().flat_map(|node| node.ends(lets_pass)) {
                if !found.contains(&leaf) {
                    found.push(leaf);
                }
            }
        }
        found
    }

    /// The gaps, each once, that are reached through steps that let pass.
    pub(crate) fn gaps(&self, lets_pass: &dyn Fn(&Step) -> bool) -> Vec<&str> {
        self.collect(lets_pass, &|step| match step {
            Step::Gap { why } => Some(why.as_str()),
            _ => None,
        })
    }

    /// What is encrypted below each step that encrypts, each once.
    pub(crate) fn encrypted(&self) -> Vec<PathBuf> {
        let here = self.below.iter().filter(|_| self.step.encrypts()).filter_map(Self::opened);
        let mut found = Vec::new();
        for path in here.chain(self.below.iter().flat_map(Self::encrypted)) {
            if !found.contains(&path) {
                found.push(path);
            }
        }
        found
    }

    /// The path of a device, or of a file that stands for one.
    fn opened(&self) -> Option<PathBuf> {
        match &self.step {
            Step::Path { path, .. } => Some(path.clone()),
            Step::Device(found) => Some(block::node(&found.name)),
            Step::Leaf(Leaf::Disk(disk)) => Some(block::node(&disk.name)),
            Step::Leaf(_) | Step::FileSystem { .. } | Step::Threshold { .. } | Step::Gap { .. } => None,
        }
    }

    fn collect<'a, T: PartialEq>(
        &'a self,
        lets_pass: &dyn Fn(&Step) -> bool,
        pick: &dyn Fn(&'a Step) -> Option<T>,
    ) -> Vec<T> {
        let mut found = Vec::from_iter(pick(&self.step));
        if lets_pass(&self.step) {
            for one in self.below.iter().flat_map(|node| node.collect(lets_pass, pick)) {
                if !found.contains(&one) {
                    found.push(one);
                }
            }
        }
        found
    }

    /// Writes the tree with this indentation: what has one thing below it goes on in the line, a path or what has several
    /// things below it begins new lines.
    pub(crate) fn write(&self, f: &mut fmt::Formatter<'_>, indent: usize) -> fmt::Result {
        write!(f, "{:indent$}", "")?;
        let mut node = self;
        loop {
            write!(f, "{}", printable(&node.step.to_string()))?;
            match &node.below[..] {
                [only] if !matches!(node.step, Step::Path { .. }) => {
                    f.write_str(if matches!(node.step, Step::FileSystem { .. }) && !only.is_gap_or_path() {
                        " on "
                    } else {
                        " -> "
                    })?;
                    node = only;
                }
                below => {
                    f.write_str("\n")?;
                    return below.iter().try_for_each(|node| node.write(f, indent + 2));
                }
            }
        }
    }

    fn is_gap_or_path(&self) -> bool {
        matches!(self.step, Step::Gap { .. } | Step::Path { .. })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path { path, resolved: None } => write!(f, "{}", path.display()),
            Self::Path { path, resolved: Some(resolved) } if path.starts_with(resolved) => {
                write!(f, "{} (does not exist yet; it would be in {})", path.display(), resolved.display())
            }
            Self::Path { path, resolved: Some(resolved) } => write!(f, "{} = {}", path.display(), resolved.display()),
            Self::FileSystem { name, .. } => f.write_str(name),
            Self::Device(device) => device.fmt(f),
            Self::Leaf(leaf) => leaf.fmt(f),
            Self::Threshold { least } => write!(f, "{least} of these"),
            Self::Gap { why } => write!(f, "? {why}"),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match (self.role, &self.called) {
            (Role::Loop, _) => return f.write_str(name),
            (Role::Partition, _) => write!(f, "partition {name}"),
            (Role::DmCrypt, _) => write!(f, "dm-crypt {name}"),
            (Role::Lvm, _) => write!(f, "LVM {name}"),
            (Role::Multipath, _) => write!(f, "multipath {name}"),
            (Role::Mapping, _) => write!(f, "mapping {name}"),
            (Role::Raid, _) => write!(f, "RAID {name}"),
            (Role::CompressedMemory | Role::Stacked, _) => f.write_str(name),
        }?;
        self.called.iter().try_for_each(|called| write!(f, " ({called})"))
    }
}

/// A path as text; what is no UTF-8 in it is replaced, since JSON has no other text.
pub(crate) fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

fn as_text_if_any<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().unwrap_or(Path::new("")).display().to_string().serialize(serializer)
}
