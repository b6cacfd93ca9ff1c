//! Lineage on real device-mapper, LVM and RAID devices.

use serde_json::Value;

use crate::{
    Story,
    machine::{DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("a volume on LVM on RAID is followed to its disks", stacked),
    ("a store on the volume's own disk is refused, through a mapping as well", own_disk),
];

fn stacked(machine: &mut Machine) {
    let disks = [machine.plug(64 << 20, DiskOptions::default()), machine.plug(64 << 20, DiskOptions::default())];
    let (first, second) = (disks[0].path(), disks[1].path());
    machine.ok(&format!(
        "modprobe raid1; mdadm --create /dev/md0 --run --metadata=1.2 --level=1 --raid-devices=2 {first} {second} 2>&1 &&
         pvcreate -q /dev/md0 && vgcreate -q group /dev/md0 && lvcreate -q -y -L 40M -n volume group"
    ));
    machine.ok("cryptattach format /dev/group/volume && cryptattach attach /dev/group/volume data");
    let report: Value = serde_json::from_str(&machine.ok("cryptattach separation /dev/mapper/data --json")).unwrap();
    assert_eq!(report["verdict"], "apart", "{report}");
    let serials: Vec<_> =
        report["volume"]["devices"].as_array().unwrap().iter().map(|leaf| leaf["serial"].clone()).collect();
    let expected: Vec<Value> = [&first, &second].map(|path| path.rsplit_once('-').unwrap().1.into()).to_vec();
    assert_eq!(serials, expected);
    println!("{}", machine.ok("cryptattach separation /dev/mapper/data"));
    machine.ok("cryptattach detach data && vgremove -q -y group && pvremove -q /dev/md0 && mdadm --stop /dev/md0");
    disks.iter().for_each(|disk| machine.unplug(disk));
}

fn own_disk(machine: &mut Machine) {
    let disk = machine.plug(256 << 20, DiskOptions::default());
    let path = disk.path();
    // Two partitions: a volume, and an encrypted file system with a key store in it.
    machine.ok(&format!("printf ',128M\\n,\\n' | sfdisk -q --label gpt {path} && udevadm settle"));
    machine.ok(&format!("cryptattach format {path}-part2 && cryptattach attach {path}-part2 near"));
    machine.ok("mkfs.ext4 -q /dev/mapper/near && mkdir -p /near && mount /dev/mapper/near /near");
    machine.ok("cryptattach init --config /keys/near.toml --store near --path /near/store --escrow /keys/escrow.pem");
    let refused = machine.fails(72, &format!("cryptattach --config /keys/near.toml format {path}-part1"));
    assert!(refused.contains("/near/store is on the volume's disk"), "{refused}");
    machine.ok("umount /near && cryptattach detach near");
    machine.unplug(&disk);
}
