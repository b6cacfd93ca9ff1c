//! Which bytes a device stands for: two names may lead to one store, through partitions, loop devices and what is stacked.

use std::{collections::BTreeSet, fmt, ops::Range};

use super::{
    block::{BlockDevice, DeviceNumber},
    device::Identity,
    loop_device::{self, Shown},
    sysfs::Sysfs,
};

/// Deeper than any real stack.
const MOST_STRETCHES: usize = 1024;

/// A block device or file that has bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Store {
    Block(DeviceNumber),
    /// File system and inode.
    File(u64, u64),
}

/// A stretch of a store, and the device by which it was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    store: Store,
    bytes: Range<u64>,
    above: Option<Store>,
    /// What is above divides the store with others of its kind, and the kernel lets nobody else have it: device-mapper, RAID.
    divided: bool,
}

/// All that a device stands on, itself included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footing(Vec<Stretch>);

impl Footing {
    /// What a device or file stands on.
    pub fn of(identity: Identity) -> Self {
        Self::on(&Sysfs::this(), &loop_device::shown, store(identity))
    }

    /// What a mapping stands on that the kernel shows as a block device: all that is below it.
    pub fn below(number: DeviceNumber) -> Self {
        let mut footing = Self::on(&Sysfs::this(), &loop_device::shown, Store::Block(number));
        footing.0.remove(0);
        footing
    }

    fn on(sysfs: &Sysfs, shown: &dyn Fn(&str) -> Option<Shown>, store: Store) -> Self {
        let mut footing = Self(Vec::new());
        footing.walk(sysfs, shown, Stretch { store, bytes: 0..u64::MAX, above: None, divided: false });
        footing
    }

    fn walk(&mut self, sysfs: &Sysfs, shown: &dyn Fn(&str) -> Option<Shown>, stretch: Stretch) {
        if self.0.len() >= MOST_STRETCHES || self.0.contains(&stretch) {
            return;
        }
        self.0.push(stretch.clone());
        let Stretch { store: Store::Block(number), bytes, .. } = stretch else { return };
        let Some(device) = BlockDevice::with_number(sysfs, number) else { return };
        let shifted = |offset: u64, limit: u64| {
            let end = bytes.end.min(limit).saturating_add(offset);
            bytes.start.saturating_add(offset)..end
        };
        let above = Some(stretch.store);
        let sectors = |name| device.attribute(name).and_then(|text| text.parse::<u64>().ok());
        if let (Some(parent), Some(start), Some(size)) = (device.parent_disk(), sectors("start"), sectors("size")) {
            let bytes = shifted(start.saturating_mul(512), size.saturating_mul(512));
            self.walk(sysfs, shown, Stretch { store: Store::Block(parent), bytes, above, divided: false });
        } else if let Some(Shown { on, inode, block, offset, limit }) = shown(&device.name) {
            let store = block.map_or(Store::File(on, inode), |number| Store::Block(DeviceNumber(number)));
            let bytes = shifted(offset, if limit == 0 { u64::MAX } else { limit });
            self.walk(sysfs, shown, Stretch { store, bytes, above, divided: false });
        }
        for slave in device.slaves() {
            self.walk(sysfs, shown, Stretch { store: Store::Block(slave), bytes: 0..u64::MAX, above, divided: true });
        }
    }

    /// Whether they have bytes in common, except where one stands upon the other or the kernel divides them.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().any(|one| {
            other.0.iter().any(|two| {
                // What two devices reach through the same third one, they share there.
                let same_way = one.above.is_some() && one.above == two.above;
                let common = one.bytes.start < two.bytes.end && two.bytes.start < one.bytes.end;
                one.store == two.store && common && !same_way && !(one.divided && two.divided)
            })
        })
    }

    /// Whether the other one is below this one.
    pub fn stands_on(&self, other: &Self) -> bool {
        self.0[1..].iter().any(|stretch| stretch.store == other.0[0].store)
    }

    /// The stores at the end of all ways, in order.
    pub fn roots(&self) -> BTreeSet<Store> {
        let above: BTreeSet<_> = self.0.iter().filter_map(|stretch| stretch.above).collect();
        self.0.iter().map(|stretch| stretch.store).filter(|store| !above.contains(store)).collect()
    }
}

fn store(identity: Identity) -> Store {
    match identity {
        Identity::BlockDevice { number, .. } => Store::Block(DeviceNumber(number)),
        Identity::File { on, inode } => Store::File(on, inode),
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(number) => write!(f, "{number}"),
            Self::File(on, inode) => write!(f, "{on}-{inode}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io, os::unix::fs::symlink, path::Path};

    use tempfile::TempDir;

    use super::*;

    /// A disk sda (8:0) with sda1 (8:1, from 1 MiB) and sda2 (8:2, from 2 MiB); loop0 and loop1 (7:0, 7:1) show one file,
    /// loop2 shows its second half, loop3 shows sda1; dm-0 and dm-1 (253:0, 253:1) lie on sda1, dm-2 on loop0, dm-3 on dm-2.
    fn host() -> TempDir {
        let root = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        };
        let device = |directory: &str, number: &str| {
            write(&format!("{directory}/dev"), number);
            let link = root.path().join("sys/dev/block").join(number);
            fs::create_dir_all(link.parent().expect("a parent")).expect("made");
            symlink(root.path().join(directory), link).expect("linked");
            let subsystem = root.path().join(directory).join("subsystem");
            symlink("/sys/class/block", subsystem).expect("linked");
        };
        let on = |upper: &str, lower: &str| {
            let slaves = root.path().join(upper).join("slaves");
            fs::create_dir_all(&slaves).expect("made");
            symlink(root.path().join(lower), slaves.join("slave")).expect("linked");
        };
        device("sys/devices/sda", "8:0");
        for (name, number, start) in [("sda1", "8:1", "2048"), ("sda2", "8:2", "4096")] {
            let directory = format!("sys/devices/sda/{name}");
            device(&directory, number);
            write(&format!("{directory}/partition"), "1");
            write(&format!("{directory}/start"), start);
            write(&format!("{directory}/size"), "2048");
        }
        for n in 0..4 {
            device(&format!("sys/devices/virtual/block/loop{n}"), &format!("7:{n}"));
            device(&format!("sys/devices/virtual/block/dm-{n}"), &format!("253:{n}"));
        }
        let [dm0, dm1, dm2, dm3] = [0, 1, 2, 3].map(|n| format!("sys/devices/virtual/block/dm-{n}"));
        on(&dm0, "sys/devices/sda/sda1");
        on(&dm1, "sys/devices/sda/sda1");
        on(&dm2, "sys/devices/virtual/block/loop0");
        on(&dm3, &dm2);
        root
    }

    fn shown(name: &str) -> Option<Shown> {
        let file = Shown { on: 42, inode: 7, block: None, offset: 0, limit: 0 };
        match name {
            "loop0" | "loop1" => Some(file),
            "loop2" => Some(Shown { offset: 1 << 20, ..file }),
            "loop3" => Some(Shown { block: Some(nix::sys::stat::makedev(8, 1)), ..file }),
            _ => None,
        }
    }

    fn nothing(_: &Path) -> io::Result<crate::sys::sysfs::Seen> {
        Err(io::ErrorKind::NotFound.into())
    }

    #[test]
    fn names_that_lead_to_the_same_bytes_overlap() {
        let root = host();
        let sysfs = Sysfs::fixture(root.path(), nothing, || Ok(Vec::new()));
        let block = |number: &str| Footing::on(&sysfs, &shown, Store::Block(number.parse().expect("a number")));
        let file = Footing::on(&sysfs, &shown, Store::File(42, 7));
        // A mapping of the device-mapper is all that is below it.
        let mapping = |number: &str| {
            let mut footing = block(number);
            footing.0.remove(0);
            footing
        };
        for (one, two, why) in [
            (block("7:0"), block("7:1"), "two loop devices over one file"),
            (block("7:0"), file.clone(), "a loop device and its file"),
            (block("7:0"), block("7:2"), "a part of the same file"),
            (block("8:0"), block("8:1"), "a disk and its partition"),
            (block("8:1"), block("7:3"), "a loop device over a partition"),
            (block("8:0"), block("7:3"), "and over a part of the disk"),
            (block("253:0"), block("8:1"), "a logical volume and its physical one"),
            (mapping("253:2"), block("7:1"), "a mapping over another loop device of the file"),
            (mapping("253:2"), file, "or over the file"),
            (block("8:1"), block("8:1"), "itself"),
        ] {
            assert!(one.overlaps(&two) && two.overlaps(&one), "{why}");
        }
        for (one, two, why) in [
            (block("8:1"), block("8:2"), "two partitions"),
            (block("253:0"), block("253:1"), "two logical volumes of one physical one"),
            (block("7:0"), block("8:0"), "nothing in common"),
            (mapping("253:2"), block("253:2"), "a volume in a volume"),
            (mapping("253:2"), block("253:3"), "and what lies on that"),
            (block("253:0"), block("8:2"), "another partition"),
        ] {
            assert!(!one.overlaps(&two) && !two.overlaps(&one), "{why}");
        }
        let roots = |footing: Footing| footing.roots().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(roots(block("253:3")), ["42-7"]);
        assert_eq!(roots(block("7:3")), ["8:0"]);
    }
}
