//! Lineage: from a path or block device down to the disks that its bytes rest on.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    disk::{Disk, Leaf, Memory},
    network::RemoteEnd,
    remote::{Remote, protocol_of},
    target::Target,
    tree::{Device, Node, Role, Step},
};
use crate::sys::{
    block::{BlockDevice, DeviceNumber},
    mounts::{self, Mount},
    sysfs::{Seen, Sysfs},
};

/// Deeper than any real stack; a lineage that goes on is cut off with a gap.
const MOST_LEVELS: usize = 32;
/// A stack of volumes that share layers is walked once for each way; this bounds the whole.
const MOST_STEPS: usize = 4096;

/// The way from a path down to the disks below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// The path and all that is below it.
    pub tree: Node,
}

impl Lineage {
    /// Follows a path: a block device, a file or directory, or one that does not exist yet and would be made in its nearest
    /// ancestor that does. What cannot be followed becomes a gap; nothing fails.
    pub fn of(path: &Path) -> Self {
        Self::on(&Sysfs::this(), path)
    }

    pub(crate) fn on(sysfs: &Sysfs, path: &Path) -> Self {
        Self::of_volume(sysfs, path, None)
    }

    /// Follows a volume of which somebody knows who serves it.
    pub(crate) fn of_volume(sysfs: &Sysfs, path: &Path, target: Option<&Target>) -> Self {
        let (mut walk, seen) = (Walk::on(sysfs), sysfs.look_nearest(path));
        if let Some(Target::Remote(remote)) = target {
            walk.target = Some(remote);
        }
        let mut tree = match seen {
            Ok(seen) => walk.path(path, &seen),
            Err(error) => Node::at(path, None, vec![Node::gap(cannot_look_at(path, &error))]),
        };
        match target {
            Some(Target::Remote(remote)) if !walk.met_target => tree.below.push(remote_leaf(remote.clone())),
            Some(Target::Unknown { why }) => tree.below.push(Node::gap(why.clone())),
            _ => {}
        }
        Self { tree }
    }

    /// Follows a path that the kernel names; see [`Walk::existing`].
    pub(crate) fn of_existing(sysfs: &Sysfs, path: &Path) -> Self {
        Self { tree: Walk::on(sysfs).existing(path) }
    }

    pub(crate) fn of_number(sysfs: &Sysfs, number: DeviceNumber) -> Self {
        Self { tree: Walk::on(sysfs).device(number) }
    }

    /// The disks and the memory at the end of all ways, each once.
    pub fn leaves(&self) -> Vec<&Leaf> {
        self.tree.leaves(&|_| true)
    }

    /// The disks and the memory that can be reached without passing an encrypted mapping: what rests there is readable there.
    pub fn plain_leaves(&self) -> Vec<&Leaf> {
        self.tree.leaves(&|step| !step.encrypts())
    }

    /// The encrypted devices whose plaintext is on the way, each once: nothing is there before they are opened.
    pub fn encrypted(&self) -> Vec<PathBuf> {
        self.tree.encrypted()
    }

    /// What could not be followed, in words.
    pub fn gaps(&self) -> Vec<&str> {
        self.tree.gaps(&|_| true)
    }

    /// The gaps that can be reached without passing an encrypted mapping.
    pub fn plain_gaps(&self) -> Vec<&str> {
        self.tree.gaps(&|step| !step.encrypts())
    }
}

/// What the walk has passed on its way down, so that a circle is seen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Passed {
    Device(DeviceNumber),
    Mount(u64),
}

struct Walk<'a> {
    sysfs: &'a Sysfs,
    mounts: Vec<Mount>,
    way: Vec<Passed>,
    steps_left: usize,
    /// Who serves the volume, if somebody else than the kernel knows it.
    target: Option<&'a Remote>,
    met_target: bool,
}

impl<'a> Walk<'a> {
    fn on(sysfs: &'a Sysfs) -> Self {
        let mounts = mounts::seen_by(sysfs, "self");
        Self { sysfs, mounts, way: Vec::new(), steps_left: MOST_STEPS, target: None, met_target: false }
    }

    /// The tree of a path as given, of which `seen` is what exists.
    fn path(&mut self, given: &Path, seen: &Seen) -> Node {
        let resolved = (given != seen.path).then(|| seen.path.clone());
        let below = match seen.block {
            Some(number) => self.device(number),
            None => self.file_system(seen),
        };
        Node::at(given, resolved, vec![below])
    }

    /// The tree of a path that the kernel names. It must exist: in another mount namespace the same words name other files,
    /// and an ancestor that exists here says nothing about them.
    fn existing(&mut self, path: &Path) -> Node {
        match self.sysfs.look(path) {
            Ok(seen) => self.path(path, &seen),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let why =
                    format!("{} cannot be seen from here (deleted, or in another mount namespace)", path.display());
                Node::at(path, None, vec![Node::gap(why)])
            }
            Err(error) => Node::at(path, None, vec![Node::gap(cannot_look_at(path, &error))]),
        }
    }

    /// One level down, unless that goes in a circle or has no end.
    fn down(&mut self, to: Passed, name: &str, follow: impl FnOnce(&mut Self) -> Node) -> Node {
        if self.way.contains(&to) {
            return Node::gap(format!("{name} rests on itself"));
        }
        if self.way.len() >= MOST_LEVELS {
            return Node::gap(format!("more than {MOST_LEVELS} levels: not followed below {name}"));
        }
        let Some(steps_left) = self.steps_left.checked_sub(1) else {
            return Node::gap(format!("more than {MOST_STEPS} devices and file systems: not followed below {name}"));
        };
        self.steps_left = steps_left;
        self.way.push(to);
        let node = follow(self);
        self.way.pop();
        node
    }

    fn devices(&mut self, numbers: &[DeviceNumber]) -> Vec<Node> {
        numbers.iter().map(|number| self.device(*number)).collect()
    }

    fn device(&mut self, number: DeviceNumber) -> Node {
        match BlockDevice::with_number(self.sysfs, number) {
            None => Node::gap(format!("/sys shows no block device {number}")),
            Some(device) => self.down(Passed::Device(number), &device.name, |walk| walk.below_device(&device)),
        }
    }

    fn below_device(&mut self, device: &BlockDevice) -> Node {
        if let Some(disk) = device.parent_disk() {
            return Node::device(Device::new(device, Role::Partition), vec![self.device(disk)]);
        }
        if device.directory.join("loop").is_dir() {
            let file = self.backing_file(device);
            return Node::device(Device::new(device, Role::Loop), vec![file]);
        }
        if device.is_memory() {
            return self.memory(device);
        }
        let slaves = device.slaves();
        let remote_end = RemoteEnd::of(device);
        if !slaves.is_empty() {
            let mut below = self.devices(&slaves);
            // A DRBD peer: another one than the target that the volume comes from.
            below.extend(remote_end.map(|remote_end| match remote_end {
                RemoteEnd::Known(remote) => remote_leaf(remote),
                RemoteEnd::Unknown(what) => Node::gap(behind_the_network(&device.name, &what)),
            }));
            return Node::device(Device::new(device, Role::of(device)), below);
        }
        let below = match remote_end {
            Some(RemoteEnd::Known(remote)) => self.served_by(remote),
            Some(RemoteEnd::Unknown(what)) => vec![self.served(behind_the_network(&device.name, &what))],
            None if device.name.starts_with("loop") => vec![Node::gap(format!("{} is bound to no file", device.name))],
            None if device.is_virtual() => {
                let why = format!("{} is a virtual device; the disk behind it cannot be seen", device.name);
                vec![self.served(why)]
            }
            None => Vec::new(),
        };
        Node::leaf(Leaf::Disk(Disk::read(self.sysfs, device)), below)
    }

    /// What serves a network device as the kernel knows it, and what is said to serve the volume: both count.
    fn served_by(&mut self, mut remote: Remote) -> Vec<Node> {
        let Some(target) = self.target else {
            return vec![remote_leaf(remote)];
        };
        self.met_target = true;
        if remote.protocol == target.protocol {
            remote.add(target);
            return vec![remote_leaf(remote)];
        }
        vec![remote_leaf(remote), remote_leaf(target.clone())]
    }

    /// What is said to serve the volume where the kernel does not tell it, or else that gap.
    fn served(&mut self, gap: String) -> Node {
        match self.target {
            Some(target) => {
                self.met_target = true;
                remote_leaf(target.clone())
            }
            None => Node::gap(gap),
        }
    }

    fn backing_file(&mut self, device: &BlockDevice) -> Node {
        let Some(path) = device.attribute("loop/backing_file") else {
            return Node::gap(format!("the file behind {} is not known", device.name));
        };
        match path.strip_suffix(" (deleted)") {
            Some(path) if self.sysfs.look(Path::new(&format!("{path} (deleted)"))).is_err() => {
                Node::gap(format!("{path}, the file behind {}, has been deleted", device.name))
            }
            // The kernel names the file by its path under its own mount. Where another is mounted over that, or it is mounted in
            // another namespace or no longer, the same words lead to another file.
            _ if self.sysfs.shows(&device.name, Path::new(&path)) == Some(false) => Node::gap(format!(
                "{path} is not the file behind {}, which has that path where it is mounted, but not here",
                device.name
            )),
            _ => self.existing(Path::new(&path)),
        }
    }

    /// A disk in memory; zram may write to a disk behind it (Documentation/admin-guide/blockdev/zram.rst, writeback).
    fn memory(&mut self, device: &BlockDevice) -> Node {
        let memory = Memory { name: device.name.clone(), number: device.number, swappable: false };
        let leaf = Node::leaf(Leaf::Memory(memory), Vec::new());
        match device.attribute("backing_dev").filter(|path| path != "none") {
            None => leaf,
            Some(path) => {
                let below = vec![leaf, self.existing(Path::new(&path))];
                Node::device(Device::new(device, Role::CompressedMemory), below)
            }
        }
    }

    fn file_system(&mut self, seen: &Seen) -> Node {
        match mounts::mount_of(&self.mounts, seen).cloned() {
            Some(mount) => {
                let name = format!("{} at {}", mount.kind, mount.point.display());
                self.down(Passed::Mount(mount.id), &name, |walk| walk.below_mount(&mount, seen))
            }
            None if seen.on.is_anonymous() => Node::gap(format!("no known mount contains {}", seen.path.display())),
            None => self.device(seen.on),
        }
    }

    fn below_mount(&mut self, mount: &Mount, seen: &Seen) -> Node {
        let below = match mount.kind.as_str() {
            // tmpfs(5): "noswap" since Linux 6.4; ramfs and the kernel's own are never written to swap.
            kind @ ("tmpfs" | "devtmpfs") => return Node::memory(kind, mount.number, !mount.has("noswap")),
            // The kernel's first root: a tmpfs or a ramfs, which of them it does not say.
            "rootfs" => return Node::memory("rootfs", mount.number, true),
            kind if kind == "ramfs" || mounts::is_kernels_own(kind) => return Node::memory(kind, mount.number, false),
            "btrfs" => self.btrfs(mount),
            "overlay" => {
                let directories = mounts::overlay_directories(mount);
                directories.iter().map(|directory| self.overlay_directory(directory)).collect()
            }
            // These name the path below as their source: our own export the encrypted device (whoever may mount FUSE can
            // claim that, so only root is believed), ecryptfs the lower directory, erofs the image file.
            "fuse.cryptattach" if mount.values("user_id").all(|user| user == "0") => self.source(mount),
            "ecryptfs" => self.source(mount),
            "erofs" if seen.on.is_anonymous() => self.source(mount),
            // "/dev/sda:/dev/sdb"
            "bcachefs" => {
                let source = mount.source.to_string_lossy();
                source.split(':').map(|device| self.existing(Path::new(device))).collect()
            }
            _ if !seen.on.is_anonymous() => self.own_device(mount, seen.on),
            _ if !mount.number.is_anonymous() => self.own_device(mount, mount.number),
            "autofs" => vec![Node::gap(format!("{} will be mounted when it is used", mount.point.display()))],
            kind => {
                let from = mount.source.display();
                let gap = format!("{kind} from {from}: the disks behind it cannot be seen from here");
                let protocol = self.target.map(|target| target.protocol);
                vec![if protocol.is_some() && protocol == protocol_of(kind) {
                    self.served(gap)
                } else {
                    Node::gap(gap)
                }]
            }
        };
        let unknown = below.is_empty().then(|| Node::gap(format!("the disks below {} are not known", mount.kind)));
        Node {
            step: Step::FileSystem { name: mount.kind.clone(), mounted_on: mount.point.clone() },
            below: below.into_iter().chain(unknown).collect(),
        }
    }

    /// The block device of a file system, and those that XFS keeps its log and its real-time files on (xfs(5)).
    fn own_device(&mut self, mount: &Mount, number: DeviceNumber) -> Vec<Node> {
        let more: Vec<_> =
            ["logdev", "rtdev"].iter().flat_map(|option| mount.values(option)).map(PathBuf::from).collect();
        let mut below = vec![self.device(number)];
        below.extend(more.iter().map(|path| self.existing(path)));
        below
    }

    fn source(&mut self, mount: &Mount) -> Vec<Node> {
        mounts::source_path(mount).map(|path| self.existing(path)).into_iter().collect()
    }

    fn overlay_directory(&mut self, directory: &Path) -> Node {
        if directory.is_absolute() {
            self.existing(directory)
        } else {
            let why = format!("the overlay's directory {} was given relative to an unknown one", directory.display());
            Node::gap(why)
        }
    }

    fn btrfs(&mut self, mount: &Mount) -> Vec<Node> {
        let source = mounts::source_path(mount).and_then(|path| self.sysfs.look(path).ok()?.block);
        let Some(known) = source.and_then(|source| mounts::btrfs_with(self.sysfs, source)) else {
            let why = format!("/sys/fs/btrfs does not list the devices of btrfs {}", mount.source.display());
            return vec![Node::gap(why)];
        };
        let mut below = self.devices(&known.devices);
        below.extend(
            known.missing.iter().map(|id| Node::gap(format!("device {id} of the btrfs {} is missing", known.uuid))),
        );
        below
    }
}

fn remote_leaf(remote: Remote) -> Node {
    Node::leaf(Leaf::Remote(remote), Vec::new())
}

fn behind_the_network(name: &str, what: &str) -> String {
    format!("{name} is reached over the network ({what}); the disk behind it is not known")
}

fn cannot_look_at(path: &Path, error: &io::Error) -> String {
    format!("cannot look at {}: {error}", path.display())
}
