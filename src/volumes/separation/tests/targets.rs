//! Who serves a volume: what sysfs shows, what OpenStack says, and what neither tells.

use serde_json::json;

use super::{
    made_up::MadeUp,
    replicas::{Case, STORAGE, object_on},
};
use crate::base::key::Place;

#[test]
fn what_sysfs_knows_of_an_iscsi_device_is_enough_and_counts_beside_the_target() {
    let session = "platform/host3/session1";
    let connection = format!("sys/devices/{session}/connection1:0/iscsi_connection/connection1:0");
    let host = MadeUp::host()
        .with_device(&format!("{session}/target3:0:0/3:0:0:0/block/sdc"), "8:32", &[("device/wwid", "naa.6001405")])
        .with_file(&format!("sys/devices/{session}/iscsi_session/session1/targetname"), "iqn.1:v\n")
        .with_file(&format!("{connection}/persistent_address"), "10.0.0.5\n")
        .with_file(&format!("{connection}/persistent_port"), "3260\n")
        .with_file(&format!("{connection}/address"), "fd00::6\n")
        .with_file(&format!("{connection}/port"), "3260\n");
    let case = Case::on(host);
    for (address, word) in [("10.0.0.5", "shared"), ("fd00::6", "shared"), ("10.0.0.7", "unproven")] {
        assert_eq!(case.check("/dev/sdc", &[object_on(address)]).verdict.word(), word, "{address}");
    }
    let case = case.served_by_iscsi("10.0.0.7:3260");
    let report = case.check("/dev/sdc", &[object_on("10.0.0.7")]);
    assert!(
        report.to_string().contains(
            "disk sdc (WWN 6001405) -> iSCSI target iqn.1:v at 10.0.0.5:3260, [fd00::6]:3260, 10.0.0.7:3260\n\
         sealed key  in Swift, whose replicas are\n  object: device sdb1 of 10.0.0.7\nshared: "
        ),
        "{report}"
    );
}

#[test]
fn all_controllers_of_an_nvme_device_count() {
    let first = [
        ("wwid", "eui.01"),
        ("device/nvme3/transport", "tcp"),
        ("device/nvme3/address", "traddr=10.0.0.5,trsvcid=4420,src_addr=10.0.0.9"),
        ("device/nvme3/subsysnqn", "nqn.1:v"),
        ("device/nvme4/transport", "rdma"),
    ];
    let host = || MadeUp::host().with_disk("nvme0n1", "259:0", &first);
    let unknown = host().check("/dev/nvme0n1", &["/keys"]).verdict.to_string();
    assert!(unknown.starts_with("unproven: volume /dev/nvme0n1: nvme0n1 is reached over the network"), "{unknown}");
    let address = ("sys/devices/pci0/block/nvme0n1/device/nvme4/address", "traddr=fd00::5,trsvcid=4420\n");
    let case = Case::on(host().with_file(address.0, address.1));
    let report = case.check("/dev/nvme0n1", &[object_on("fd00::5")]);
    assert!(report.to_string().contains("-> NVMe-oF target nqn.1:v at 10.0.0.5:4420, [fd00::5]:4420\n"), "{report}");
    assert_eq!(report.verdict.word(), "shared");
}

#[test]
fn a_key_on_a_network_disk_is_apart_only_where_the_inventory_tells_the_hosts_apart() {
    let session = "platform/host3/session1";
    let address = format!("sys/devices/{session}/connection1:0/iscsi_connection/connection1:0/address");
    let host = || {
        MadeUp::host()
            .with_device(&format!("{session}/target3:0:0/3:0:0:0/block/sdc"), "8:32", &[])
            .with_file(&format!("sys/devices/{session}/iscsi_session/session1/targetname"), "iqn.1:k\n")
            .with_file(&address, "10.1.0.5\n")
    };
    let key = [Place::path("sealed key", "/dev/sdc", true)];
    let case = |portal| Case::on(host()).served_by_iscsi(portal);
    for portal in ["10.0.0.5:3260", "10.1.0.5:3260"] {
        assert!(case(portal).verdict(&key).starts_with("unproven: sealed key /dev/sdc: "), "{portal}");
    }
    assert!(case("10.0.0.5:3260").known(STORAGE).verdict(&key).starts_with("unproven"), "one host, one disk or two");
    assert!(case("10.0.0.6:3260").known(STORAGE).verdict(&key).starts_with("apart"));
}

#[test]
fn fibre_channel_is_a_gap_until_the_inventory_names_all_ports() {
    let case = || Case::new().served("fibre_channel", json!({"target_wwn": ["50:01", "50:02"], "target_lun": 1}));
    let port = |wwn| format!("[[target]]\nwwn = '{wwn}'\nhost = 'storage1'\n");
    let verdict = case().verdict(&[object_on("10.0.0.6")]);
    assert!(
        verdict.starts_with("unproven: volume /dev/sda2: the server of the Fibre Channel target 5001 is not"),
        "{verdict}"
    );
    let verdict = case().known(&format!("{STORAGE}{}", port("5001"))).verdict(&[object_on("10.0.0.6")]);
    assert!(
        verdict.starts_with("unproven: volume /dev/sda2: the server of the Fibre Channel target 5002 is not"),
        "{verdict}"
    );
    let known = case().known(&format!("{STORAGE}{}{}", port("0x5001"), port("50:02")));
    assert!(known.verdict(&[object_on("10.0.0.6")]).starts_with("apart"));
    assert!(known.verdict(&[object_on("10.0.0.5")]).starts_with("shared"));
}

#[test]
fn a_host_of_an_rbd_monitor_is_shared_and_others_are_known_by_the_inventory_only() {
    let data = json!({"name": "volumes/v", "hosts": ["10.0.0.5", "10.0.0.6"], "ports": ["6789", "6789"]});
    let host = || MadeUp::host().with_stack("nbd0", "43:0", &[], &[]);
    let case = || Case::on(host()).served("rbd", data.clone());
    let verdict = |case: &Case, address| case.check("/dev/nbd0", &[object_on(address)]).verdict.to_string();
    assert!(verdict(&case(), "10.0.0.6").starts_with("shared"));
    assert_eq!(
        verdict(&case(), "10.0.0.7"),
        "unproven: volume /dev/nbd0: the Ceph RBD image ceph/volumes/v with monitors at 10.0.0.5:6789, 10.0.0.6:6789 may \
         rest on other hosts than these: name all that hold data of it in the inventory (cluster)"
    );
    let on = |host| format!("[[target]]\ncluster = 'ceph'\nhost = '{host}'\n");
    let known = case().known(&format!("{STORAGE}{}{}", on("storage1"), on("storage2")));
    assert!(verdict(&known, "10.0.0.7").starts_with("apart"));
    assert!(verdict(&known, "10.1.0.5").starts_with("shared"));
}

#[test]
fn the_server_of_an_nfs_export_is_the_volumes_host() {
    let host = MadeUp::host().with_mount("0:60", "/nfs", "nfs4 10.0.0.5:/srv/v rw");
    let case = Case::on(host).served("nfs", json!({"export": "10.0.0.5:/srv/v", "name": "volume-1"}));
    let report = case.check("/nfs/keys", &[object_on("10.0.0.5")]);
    assert_eq!(report.verdict.word(), "shared");
    assert!(report.to_string().contains("  nfs4 on NFS export 10.0.0.5:/srv/v\n"), "{report}");
    assert_eq!(case.check("/nfs/keys", &[object_on("10.0.0.6")]).verdict.word(), "apart");
}

#[test]
fn swap_that_may_be_where_the_volume_is_leaves_it_unproven() {
    let swap = "Filename Type Size Used Priority\n/dev/sdb1 partition 1048572 0 -2\n";
    let case = |portal| Case::on(MadeUp::host().with_file("proc/swaps", swap)).served_by_iscsi(portal);
    assert!(case("10.0.0.5:3260").verdict(&[object_on("10.0.0.6")]).starts_with("apart"));
    let verdict = case("127.0.0.1:3260").verdict(&[object_on("10.0.0.6")]);
    assert!(
        verdict.starts_with("unproven: swap /dev/sdb1: it is on this host, like the volume's iSCSI target"),
        "{verdict}"
    );
}
