//! Lineages and verdicts on made-up hosts (a directory tree for sysfs and procfs), and on this one.

use std::{fs, os::unix::fs::symlink, path::Path};

use tempfile::TempDir;

use self::made_up::MadeUp;
use super::*;

mod made_up;
mod policies;
mod replicas;
mod targets;

#[test]
fn keys_on_another_disk_are_apart() {
    let report = MadeUp::host().check("/dev/sda2", &["/keys"]);
    assert_eq!(
        report.to_string(),
        "volume  /dev/sda2\n  \
           partition sda2 -> disk sda (WWN 5000aa)\n\
         sealed key  /keys\n  \
           ext4 on partition sdb1 -> disk sdb (WWN 5000bb)\n\
         apart: no place of the key is on the volume's disk sda (WWN 5000aa); all are on disk sdb (WWN 5000bb)"
    );
}

#[test]
fn keys_on_another_partition_of_the_disk_are_shared_and_a_path_in_the_making_counts_by_its_ancestor() {
    let report = MadeUp::host().check("/dev/sda2", &["/etc/new/key", "/keys"]);
    assert_eq!(
        report.to_string(),
        "volume  /dev/sda2\n  \
           partition sda2 -> disk sda (WWN 5000aa)\n\
         sealed key  /etc/new/key (does not exist yet; it would be in /)\n  \
           ext4 on partition sda1 -> disk sda (WWN 5000aa)\n\
         sealed key  /keys\n  \
           ext4 on partition sdb1 -> disk sdb (WWN 5000bb)\n\
         shared: sealed key /etc/new/key is on the volume's disk sda (WWN 5000aa)"
    );
}

#[test]
fn a_key_without_known_place_is_unproven() {
    assert_eq!(MadeUp::host().check("/dev/sda2", &[]).verdict.to_string(), "unproven: key: its place is not known");
}

#[test]
fn a_machine_with_one_disk_has_its_key_apart_in_a_chip() {
    use crate::base::key::{Location, Place};
    let host = MadeUp::host();
    let key = |at| [Place { what: "sealed keys".into(), at, opens: true }];
    let chip = key(Location::Chip { name: "the TPM (IFX)".into() });
    assert_eq!(
        host.check_among("/dev/sda2", &chip, &Surroundings::default()).to_string(),
        "volume  /dev/sda2\n  \
           partition sda2 -> disk sda (WWN 5000aa)\n\
         sealed keys  the TPM (IFX)\n  \
           the TPM (IFX)\n\
         apart: no place of the key is on the volume's disk sda (WWN 5000aa); all are on the TPM (IFX)"
    );
    let program = key(Location::Elsewhere { name: "the TPM (IBM)".into(), why: "it is a virtual one".into() });
    assert_eq!(
        host.check_among("/dev/sda2", &program, &Surroundings::default()).verdict.to_string(),
        "unproven: sealed keys in the TPM (IBM): it is a virtual one"
    );
}

#[test]
fn a_volume_in_a_file_is_on_the_disk_of_its_file_system() {
    let host = MadeUp::host().with_stack("loop0", "7:0", &[("loop/backing_file", "/srv/volume.img")], &[]);
    for volume in ["/dev/loop0", "/srv/volume.img"] {
        assert_eq!(host.check(volume, &["/keys"]).verdict.word(), "apart");
        assert_eq!(host.check(volume, &["/etc/key"]).verdict.word(), "shared");
    }
    assert!(host.check("/dev/loop0", &[]).to_string().starts_with(
        "volume  /dev/loop0\n  loop0 -> /srv/volume.img\n    ext4 on partition sda1 -> disk sda (WWN 5000aa)\n"
    ));
}

#[test]
fn a_mapping_on_raid_on_partitions_rests_on_all_disks() {
    let host = MadeUp::host()
        .with_stack("md0", "9:0", &[("md/level", "raid1")], &["pci0/block/sda/sda1", "pci0/block/sdb/sdb1"])
        .with_stack("dm-0", "253:0", &[("dm/uuid", "LVM-abc"), ("dm/name", "vg-data")], &["virtual/block/md0"]);
    assert_eq!(host.disks("/dev/dm-0"), ["sda (WWN 5000aa)", "sdb (WWN 5000bb)"]);
    let report = host.check("/dev/dm-0", &["/keys"]);
    assert_eq!(report.verdict.to_string(), "shared: sealed key /keys is on the volume's disk sdb (WWN 5000bb)");
    assert!(
        report.to_string().contains(
            "  LVM dm-0 (vg-data) -> RAID md0\n    partition sda1 -> disk sda (WWN 5000aa)\n    partition sdb1 -> disk"
        ),
        "{report}"
    );
}

#[test]
fn a_key_on_the_volumes_own_opened_mapping_is_shared() {
    let host = MadeUp::host()
        .with_stack("dm-0", "253:0", &[("dm/uuid", "CRYPT-LUKS2-1"), ("dm/name", "data")], &["pci0/block/sda/sda2"])
        .with_mount("253:0", "/merged", "ext4 /dev/mapper/data rw");
    // The table says that /merged/keys is on 0:80; the mount knows better.
    assert_eq!(host.check("/dev/sda2", &["/merged/keys"]).verdict.word(), "shared");
}

#[test]
fn each_encrypted_device_on_the_way_is_named() {
    let crypt = [("dm/uuid", "CRYPT-LUKS2-1"), ("dm/name", "data")];
    let on_sda2 = |host: MadeUp| {
        let host = host.with_stack("dm-0", "253:0", &crypt, &["pci0/block/sda/sda2"]);
        host.with_mount("253:0", "/merged", "ext4 /dev/mapper/data rw")
    };
    let paths = |paths: &[&str]| paths.iter().map(std::path::PathBuf::from).collect::<Vec<_>>();
    assert_eq!(on_sda2(MadeUp::host()).lineage("/merged/keys").encrypted(), paths(&["/dev/sda2"]));
    // A loop device over our export of a loop device over a file on a mapping.
    let host = on_sda2(MadeUp::host())
        .with_stack("loop0", "7:0", &[("loop/backing_file", "/merged/keys")], &[])
        .with_stack("loop1", "7:1", &[("loop/backing_file", "/run/plain")], &[])
        .with_mount("0:50", "/run/plain", "fuse.cryptattach /dev/loop0 rw");
    assert_eq!(host.lineage("/dev/loop1").encrypted(), paths(&["/dev/loop0", "/dev/sda2"]));
    assert_eq!(host.lineage("/keys").encrypted(), paths(&[]));
    let integrity = [("dm/uuid", "CRYPT-INTEGRITY-data")];
    let host = MadeUp::host().with_stack("dm-0", "253:0", &integrity, &["pci0/block/sda/sda2"]);
    assert_eq!(host.lineage("/dev/dm-0").encrypted(), paths(&[]), "it encrypts nothing");
}

#[test]
fn two_paths_to_one_disk_are_one_disk() {
    let same = [("device/wwid", "naa.600A0B")];
    let host = MadeUp::host().with_disk("sdc", "8:32", &same).with_disk("sdd", "8:48", &same).with_stack(
        "dm-0",
        "253:0",
        &[("dm/uuid", "mpath-1")],
        &["pci0/block/sdc"],
    );
    let report = host.check("/dev/dm-0", &["/dev/sdd"]);
    assert_eq!(
        report.verdict.to_string(),
        "shared: sealed key /dev/sdd is on disk sdd (WWN 600a0b), which is the volume's disk sdc (WWN 600a0b): \
         they have the same WWN"
    );
}

#[test]
fn udev_knows_serial_numbers_that_sysfs_does_not() {
    let record = "S:disk/by-id/x\nE:ID_WWN=0x600a0b8000\nE:ID_WWN_WITH_EXTENSION=0x600a0b80001\nE:ID_SERIAL_SHORT=S9\n";
    let host = MadeUp::host().with_disk("sdc", "8:32", &[]).with_file("run/udev/data/b8:32", record);
    assert_eq!(host.disks("/dev/sdc"), ["sdc (WWN 600a0b80001, serial S9)"]);
}

#[test]
fn namespaces_of_one_ssd_are_one_device_and_those_of_a_fabric_are_not_known() {
    let ssd = |wwid| [("wwid", wwid), ("device/serial", "S3Z8"), ("device/model", "SSD"), ("device/transport", "pcie")];
    let host =
        MadeUp::host().with_disk("nvme0n1", "259:0", &ssd("eui.01")).with_disk("nvme0n2", "259:1", &ssd("eui.02"));
    assert_eq!(host.check("/dev/nvme0n1", &["/dev/nvme0n2"]).verdict.word(), "shared");

    let array = |wwid| {
        [
            ("wwid", wwid),
            ("device/serial", "S3Z8"),
            ("device/nvme3/transport", "tcp"),
            ("device/nvme3/address", "traddr=::1"),
        ]
    };
    let host =
        MadeUp::host().with_disk("nvme0n1", "259:0", &array("eui.01")).with_disk("nvme0n2", "259:1", &array("eui.02"));
    let report = host.check("/dev/nvme0n1", &["/dev/nvme0n2"]);
    assert_eq!(report.verdict.word(), "unproven");
    assert!(
        report.to_string().contains("disk nvme0n1 (WWN eui.01) -> NVMe-oF target of unknown name at ::1"),
        "{report}"
    );
}

#[test]
fn the_areas_of_an_emmc_are_one_chip() {
    let host = MadeUp::host().with_disk("sdc", "8:32", &[("device/serial", "0x1234abcd")]).with_device(
        "pci0/block/sdc/sdd",
        "8:48",
        &[("size", "8192")],
    );
    symlink("../../../../class/block", host.directory.path().join("sys/devices/pci0/block/sdc/subsystem")).unwrap();
    let verdict = host.check("/dev/sdc", &["/dev/sdd"]).verdict;
    assert_eq!(verdict.word(), "shared", "mmcblk0 and mmcblk0boot0, by other names: {verdict}");
}

#[test]
fn what_this_host_exports_to_itself_as_a_scsi_disk_is_a_gap() {
    let host = MadeUp::host().with_device(
        "tcm_loop_0/tcm_loop_adapter_0/host3/target3:0:1/3:0:1:0/block/sdc",
        "8:32",
        &[("device/wwid", "naa.60014051")],
    );
    let verdict = host.check("/dev/sdc", &["/keys"]).verdict.to_string();
    assert!(verdict.starts_with("unproven: volume /dev/sdc: sdc is a virtual device"), "{verdict}");
}

#[test]
fn what_is_behind_a_network_is_a_gap() {
    let host = MadeUp::host().with_stack("nbd0", "43:0", &[], &[]);
    assert_eq!(
        host.check("/dev/nbd0", &["/keys"]).verdict.to_string(),
        "unproven: volume /dev/nbd0: nbd0 is reached over the network (network block device); the disk behind it is \
         not known"
    );
}

#[test]
fn an_iscsi_lun_names_its_target() {
    let session = "platform/host3/session1";
    let host = MadeUp::host()
        .with_device(&format!("{session}/target3:0:0/3:0:0:0/block/sdc"), "8:32", &[("device/wwid", "naa.6001405")])
        .with_file(
            &format!("sys/devices/{session}/iscsi_session/session1/targetname"),
            "iqn.2010-10.org.openstack:v1\n",
        )
        .with_file(
            &format!("sys/devices/{session}/connection1:0/iscsi_connection/connection1:0/persistent_address"),
            "10.0.0.5\n",
        );
    let report = host.check("/dev/sdc", &["/keys"]);
    assert_eq!(
        report.verdict.to_string(),
        "apart: no place of the key is on the volume's disk sdc (WWN 6001405), iSCSI target \
         iqn.2010-10.org.openstack:v1 at 10.0.0.5; all are on disk sdb (WWN 5000bb)"
    );
}

#[test]
fn a_deleted_or_invisible_backing_file_is_a_gap() {
    for (file, why) in [
        ("/srv/volume.img (deleted)", "/srv/volume.img, the file behind loop0, has been deleted"),
        ("/elsewhere/x", "/elsewhere/x cannot be seen from here (deleted, or in another mount namespace)"),
    ] {
        let host = MadeUp::host().with_stack("loop0", "7:0", &[("loop/backing_file", file)], &[]);
        assert_eq!(host.lineage("/dev/loop0").gaps(), [why]);
    }
}

#[test]
fn our_own_userspace_export_leads_to_the_encrypted_device() {
    let host = MadeUp::host().with_stack("loop1", "7:1", &[("loop/backing_file", "/run/plain")], &[]).with_mount(
        "0:50",
        "/run/plain",
        "fuse.cryptattach /dev/sda2 rw",
    );
    assert_eq!(host.disks("/dev/loop1"), ["sda (WWN 5000aa)"]);
}

#[test]
fn an_export_by_somebody_else_than_root_is_not_believed() {
    let host =
        MadeUp::host().with_mount("0:50", "/run/plain", "fuse.cryptattach /dev/sda2 rw,user_id=1000,group_id=1000");
    let lineage = host.lineage("/run/plain");
    assert_eq!((lineage.leaves().len(), lineage.gaps().len()), (0, 1));
}

#[test]
fn a_circle_is_cut_off() {
    let host = MadeUp::host().with_stack("loop1", "7:1", &[("loop/backing_file", "/run/plain")], &[]).with_mount(
        "0:50",
        "/run/plain",
        "fuse.cryptattach /dev/loop1 rw",
    );
    assert_eq!(host.lineage("/dev/loop1").gaps(), ["loop1 rests on itself"]);
}

#[test]
fn memory_is_apart_from_disks() {
    let host = MadeUp::host().with_stack("zram0", "252:0", &[], &[]);
    assert_eq!(
        host.check("/dev/sda2", &["/run/keys", "/dev/zram0"]).verdict.to_string(),
        "apart: no place of the key is on the volume's disk sda (WWN 5000aa); all are on memory (tmpfs), memory (zram0)"
    );
    assert_eq!(host.check("/dev/zram0", &["/dev/zram0"]).verdict.word(), "shared");
}

#[test]
fn compressed_memory_that_writes_to_a_disk_rests_there_too() {
    let host = MadeUp::host().with_stack("zram0", "252:0", &[("backing_dev", "/dev/sda2")], &[]);
    assert_eq!(host.disks("/dev/zram0"), ["memory (zram0)", "sda (WWN 5000aa)"]);
}

#[test]
fn all_devices_of_a_btrfs_count() {
    let mut host = MadeUp::host().with_mount("0:70", "/pool", "btrfs /dev/sda2 rw,subvol=/");
    let devices = host.directory.path().join("sys/fs/btrfs/1-2-3/devices");
    fs::create_dir_all(&devices).expect("made");
    for (name, path) in [("sda2", "sda/sda2"), ("sdb", "sdb")] {
        symlink(host.directory.path().join("sys/devices/pci0/block").join(path), devices.join(name)).expect("linked");
    }
    assert_eq!(host.disks("/pool/keys"), ["sda (WWN 5000aa)", "sdb (WWN 5000bb)"]);

    host = host.with_file("sys/fs/btrfs/1-2-3/devinfo/3/missing", "1\n");
    assert_eq!(host.lineage("/pool/keys").gaps(), ["device 3 of the btrfs 1-2-3 is missing"]);
}

#[test]
fn all_directories_of_an_overlay_count_and_those_that_cannot_be_seen_are_gaps() {
    let host = MadeUp::host().with_mount(
        "0:80",
        "/merged",
        "overlay overlay rw,lowerdir=/srv/volume.img:/gone:l/ABC,upperdir=/keys,workdir=/keys",
    );
    assert_eq!(host.disks("/merged/keys"), ["sdb (WWN 5000bb)", "sda (WWN 5000aa)"]);
    assert_eq!(
        host.lineage("/merged/keys").gaps(),
        [
            "/gone cannot be seen from here (deleted, or in another mount namespace)",
            "the overlay's directory l/ABC was given relative to an unknown one"
        ]
    );
}

#[test]
fn a_network_file_system_is_a_gap() {
    let host = MadeUp::host().with_mount("0:60", "/nfs", "nfs4 server:/export rw");
    let verdict = host.check("/dev/sda2", &["/nfs/keys"]).verdict.to_string();
    assert!(verdict.starts_with("unproven: sealed key /nfs/keys: nfs4 from server:/export:"), "{verdict}");
}

const SWAPS: &str = "Filename Type Size Used Priority\n/dev/sda1 partition 1048572 0 -2\n";

#[test]
fn swap_on_the_volumes_disk_proves_nothing_and_reaches_keys_in_memory() {
    let host = MadeUp::host().with_file("proc/swaps", SWAPS);
    let gaps = |report: Report| report.gaps.iter().map(|gap| gap.about.clone()).collect::<Vec<_>>();
    assert_eq!(gaps(host.check("/dev/sda2", &["/keys"])), ["swap /dev/sda1"]);
    assert_eq!(gaps(host.check("/dev/sda2", &["/run/keys"])), ["swap /dev/sda1", "sealed key /run/keys"]);
    assert_eq!(gaps(host.check("/dev/sdb", &["/run/keys"])), [""; 0], "swap on another disk");

    let host = host.with_mount("0:21", "/run/keys", "tmpfs tmpfs rw,noswap");
    assert_eq!(gaps(host.check("/dev/sda2", &["/run/keys"])), ["swap /dev/sda1"]);
}

#[test]
fn encrypted_swap_and_swap_in_memory_do_no_harm() {
    let host = MadeUp::host()
        .with_stack("dm-0", "253:0", &[("dm/uuid", "CRYPT-PLAIN-swap")], &["pci0/block/sda/sda1"])
        .with_stack("zram0", "252:0", &[], &[])
        .with_file("proc/swaps", &SWAPS.replace("/dev/sda1", "/dev/dm-0 partition 1 0 -3\n/dev/zram0"));
    let report = host.check("/dev/sda2", &["/run/keys"]);
    assert_eq!((report.verdict.word(), report.swap.len()), ("apart", 2));
}

#[test]
fn what_libcryptsetup_makes_without_a_cipher_does_not_hide_swap() {
    for (uuid, verdict) in [("CRYPT-LUKS2-1-swap", "apart"), ("CRYPT-PLAIN-swap", "apart")]
        .into_iter()
        .chain([("CRYPT-INTEGRITY-swap", "unproven"), ("CRYPT-VERITY-1-swap", "unproven")])
    {
        let host = MadeUp::host()
            .with_stack("dm-0", "253:0", &[("dm/uuid", uuid), ("dm/name", "swap")], &["pci0/block/sda/sda1"])
            .with_file("proc/swaps", "Filename Type Size Used Priority\n/dev/dm-0 partition 1 0 -2\n");
        assert_eq!(host.check("/dev/sda2", &["/keys"]).verdict.word(), verdict, "{uuid}");
    }
}

#[test]
fn the_device_of_a_hibernation_image_is_seen_once() {
    let host = MadeUp::host().with_file("sys/power/resume", "8:1\n");
    let verdict = host.check("/dev/sda2", &["/keys"]).verdict.to_string();
    assert!(
        verdict.starts_with("unproven: hibernation image /dev/block/8:1: it is on the volume's disk sda"),
        "{verdict}"
    );
    let host = host.with_file("proc/swaps", SWAPS);
    assert_eq!(host.check("/dev/sda2", &["/keys"]).swap.len(), 1);
    assert_eq!(MadeUp::host().with_file("sys/power/resume", "0:0\n").check("/dev/sda2", &["/keys"]).swap, []);
}

#[test]
fn a_detached_header_is_shown_but_not_judged() {
    let host = MadeUp::host();
    let place = Place::path("sealed key", "/keys", true);
    let header = Some(Path::new("/keys"));
    let report = check_on(&host.seen(), Path::new("/dev/sda2"), header, &[place], &Surroundings::default());
    assert_eq!(report.verdict.word(), "apart");
    assert!(report.to_string().contains("detached header  /keys\n  ext4 on partition sdb1"), "{report}");
}

#[test]
fn the_json_is_stable() {
    let report = MadeUp::host().check("/dev/sda2", &["/etc"]);
    let disk = serde_json::json!({"kind": "disk", "name": "sda", "number": "8:0", "wwn": "5000aa", "model": "DISK A"});
    let below_partition = |name: &str, number: &str| {
        let mut leaf = disk.clone();
        leaf["step"] = "leaf".into();
        serde_json::json!({"step": "device", "name": name, "number": number, "role": "partition", "below": [leaf]})
    };
    let expected = serde_json::json!({
        "device": "/dev/sda2",
        "verdict": "shared",
        "evidence": ["sealed key /etc is on the volume's disk sda (WWN 5000aa)"],
        "shared": [{"what": "sealed key", "path": "/etc", "device": disk, "volume_device": disk, "same_by": "number"}],
        "gaps": [],
        "volume": {
            "path": "/dev/sda2",
            "devices": [disk],
            "tree": {"step": "path", "path": "/dev/sda2", "below": [below_partition("sda2", "8:2")]},
        },
        "header": null,
        "places": [{
            "what": "sealed key",
            "path": "/etc",
            "devices": [disk],
            "tree": {"step": "path", "path": "/etc", "resolved": "/", "below": [
                {"step": "file-system", "name": "ext4", "mounted_on": "/", "below": [below_partition("sda1", "8:1")]},
            ]},
        }],
        "swap": [],
    });
    assert_eq!(serde_json::to_value(&report).expect("JSON"), expected);
}

#[test]
fn the_longest_way_down_ends() {
    let host = (0..100).fold(MadeUp::host(), |host, n| {
        let below = format!("virtual/block/dm-{}", n + 1);
        host.with_stack(&format!("dm-{n}"), &format!("253:{n}"), &[], &[&below])
    });
    assert_eq!(host.lineage("/dev/dm-0").gaps(), ["more than 32 levels: not followed below dm-32"]);
}

/// This host, as it is, without any privilege.
mod here {
    use super::*;

    #[test]
    fn the_root_file_system_leads_somewhere() {
        let lineage = Lineage::of(Path::new("/"));
        assert!(!lineage.leaves().is_empty() || !lineage.gaps().is_empty(), "{lineage:?}");
    }

    #[test]
    fn shared_memory_is_memory() {
        let lineage = Lineage::of(Path::new("/dev/shm"));
        assert!(matches!(lineage.leaves()[..], [Leaf::Memory(_)]), "{lineage:?}");
        assert!(lineage.gaps().is_empty());
    }

    #[test]
    fn a_file_is_where_its_directory_is_and_a_dangling_link_where_it_points_to() {
        let directory = TempDir::new().expect("a directory");
        let file = directory.path().join("file");
        fs::write(&file, "x").expect("written");
        assert_eq!(Lineage::of(&file).leaves(), Lineage::of(directory.path()).leaves());

        let link = directory.path().join("link");
        symlink("/dev/shm/cryptattach/not/there", &link).expect("linked");
        assert!(matches!(Lineage::of(&link).leaves()[..], [Leaf::Memory(_)]));
    }

    #[test]
    fn links_in_a_circle_are_a_gap() {
        let directory = TempDir::new().expect("a directory");
        let link = directory.path().join("link");
        symlink(&link, &link).expect("linked");
        let lineage = Lineage::of(&link);
        assert!(lineage.leaves().is_empty() && lineage.gaps().len() == 1, "{lineage:?}");
    }

    #[test]
    fn a_file_beside_its_key_is_shared_or_unknown() {
        let directory = TempDir::new().expect("a directory");
        let file = directory.path().join("volume");
        fs::write(&file, "x").expect("written");
        let place = Place::path("sealed key", directory.path(), true);
        assert_ne!(check(&file, None, &[place], &Surroundings::default()).verdict.word(), "apart");
    }
}

#[test]
fn a_store_on_every_disk_and_one_in_memory_are_told_before_there_is_a_volume() {
    use crate::base::key::Place;
    let outlook = |host: &MadeUp, paths: &[&str]| {
        let places: Vec<_> = paths.iter().map(|path| Place::path("sealed keys", *path, true)).collect();
        let lines = host.outlook(&places).iter().map(ToString::to_string).collect::<Vec<_>>();
        lines.join("\n")
    };
    let two = MadeUp::host();
    assert_eq!(outlook(&two, &["/keys"]), "");
    assert!(
        outlook(&two, &["/keys", "/etc"])
            .starts_with("all disks of this machine (sda, sdb) have what opens these keys")
    );
    let one = MadeUp::with_one_disk();
    let told = outlook(&one, &["/etc"]);
    assert!(told.starts_with(
        "the only disk of this machine (sda) has what opens these keys (sealed keys /etc): 'format' refuses"
    ));
    assert!(told.contains("--tpm-nv"));
    // What opens nothing is no hindrance.
    assert_eq!(one.outlook(&[Place::path("configuration", "/etc", false)]), []);
    assert!(outlook(&one, &["/run/keys"]).starts_with("in memory, and lost with the next boot"));
}
