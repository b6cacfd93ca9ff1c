//! Keys in an object store against volumes on this host and on the network, on made-up hosts with the address 10.0.0.9.

use std::fs;

use serde_json::json;
use tempfile::TempDir;

use super::{super::*, made_up::MadeUp};
use crate::{
    base::advice::Advice,
    base::key::{Location, Place, Replica, Ring},
    config::{SeparationLevel, SeparationPolicy},
};

/// Where a key rests, what is known besides, and what comes of it.
pub(super) struct Case {
    host: MadeUp,
    inventory: Inventory,
    target: Option<Target>,
    level: SeparationLevel,
}

impl Case {
    pub fn new() -> Self {
        Self::on(MadeUp::host())
    }

    pub fn on(host: MadeUp) -> Self {
        Self { host, inventory: Inventory::default(), target: None, level: SeparationLevel::Host }
    }

    /// The volume /dev/sda2 comes from there, says OpenStack.
    pub fn served(self, kind: &str, data: serde_json::Value) -> Self {
        let info = json!({"driver_volume_type": kind, "data": data});
        Self { target: Some(Target::parse(info.to_string().as_bytes()).expect("connection information")), ..self }
    }

    pub fn served_by_iscsi(self, portal: &str) -> Self {
        self.served("iscsi", json!({"target_portal": portal, "target_iqn": "iqn.1:v"}))
    }

    pub fn known(self, inventory: &str) -> Self {
        let folder = TempDir::new().expect("a directory");
        let file = folder.path().join("inventory.toml");
        fs::write(&file, inventory).expect("written");
        Self { inventory: Inventory::read(&file).expect("an inventory"), ..self }
    }

    pub fn at(self, level: SeparationLevel) -> Self {
        Self { level, ..self }
    }

    pub fn check(&self, device: &str, places: &[Place]) -> Report {
        let surroundings = Surroundings { target: self.target.as_ref(), inventory: &self.inventory, level: self.level };
        self.host.check_among(device, places, &surroundings)
    }

    /// The verdict on a volume in /dev/sda2.
    pub fn verdict(&self, places: &[Place]) -> String {
        self.check("/dev/sda2", places).verdict.to_string()
    }
}

fn replica(ring: Ring, host: &str, device: &str) -> Place {
    let replica = Replica { ring, host: host.into(), port: 6200, device: device.into() };
    Place { what: "sealed key".into(), at: Location::Replica(replica), opens: true }
}

pub(super) fn object_on(host: &str) -> Place {
    replica(Ring::Object, host, "sdb1")
}

/// Two racks; storage1 is on two networks.
pub(super) const STORAGE: &str = "
    [[host]]
    name = 'storage1'
    addresses = ['10.0.0.5', '10.1.0.5', 'fd00::5', 'storage1.example']
    rack = 'r1'
    [[host]]
    name = 'storage2'
    addresses = ['10.0.0.6']
    rack = 'r1'
    [[host]]
    name = 'storage3'
    addresses = ['10.0.0.7']
    rack = 'r2'
";

#[test]
fn a_replica_on_the_host_of_the_iscsi_portal_is_shared() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260");
    assert_eq!(
        case.verdict(&[object_on("10.0.0.6"), object_on("10.0.0.5")]),
        "shared: the object's replica on 10.0.0.5 device sdb1 is on the host that serves the volume \
         (iSCSI target iqn.1:v at 10.0.0.5:3260)"
    );
}

#[test]
fn after_the_ring_has_moved_the_device_to_another_host_they_are_apart() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260");
    assert_eq!(
        case.verdict(&[object_on("10.0.0.6"), object_on("10.0.0.7")]),
        "apart: no place of the key is on the volume's disk sda (WWN 5000aa), iSCSI target iqn.1:v at 10.0.0.5:3260; all \
         are on device sdb1 of 10.0.0.6, device sdb1 of 10.0.0.7 (the volume is held by 10.0.0.5, the key's replicas by \
         10.0.0.6, 10.0.0.7)"
    );
}

#[test]
fn the_row_of_the_account_alone_is_shared() {
    let case = Case::new().served_by_iscsi("[::ffff:10.0.0.5]:3260");
    let places = [object_on("10.0.0.6"), replica(Ring::Container, "10.0.0.6", "sdb1")];
    assert!(case.verdict(&places).starts_with("apart"), "{}", case.verdict(&places));
    let account = replica(Ring::Account, "10.0.0.5", "sdc1");
    let verdict = case.verdict(&[&places[..], std::slice::from_ref(&account)].concat());
    assert!(verdict.starts_with("shared: the account's replica on 10.0.0.5 device sdc1 is on the host"), "{verdict}");

    let tells = Place { opens: false, ..account };
    let verdict = case.verdict(&[&places[..], &[tells]].concat());
    assert!(
        verdict.starts_with("unproven: the account's replica on 10.0.0.5 device sdc1: it is on the host"),
        "{verdict}"
    );
    assert!(verdict.ends_with("it opens nothing, but names the key"), "{verdict}");
}

#[test]
fn addresses_of_one_host_in_the_inventory_are_one_host() {
    let case = Case::new().served_by_iscsi("10.1.0.5:3260").known(STORAGE);
    for address in ["10.0.0.5", "fd00::5", "::ffff:10.0.0.5", "storage1.example", "Storage1.Example."] {
        assert_eq!(
            case.verdict(&[object_on(address)]),
            format!(
                "shared: the object's replica on {address} device sdb1 is on storage1, the host that serves the volume \
                 (iSCSI target iqn.1:v at 10.1.0.5:3260)"
            )
        );
    }
    assert!(case.verdict(&[object_on("10.0.0.6")]).ends_with("held by storage1, the key's replicas by storage2)"));
}

#[test]
fn a_volume_on_this_hosts_disk_is_held_by_this_host() {
    let case = Case::new().known("[[host]]\nname = 'compute1'\naddresses = ['10.0.0.9', '10.1.0.9']\n");
    for address in ["10.0.0.9", "127.0.0.1", "127.1.2.3", "::1", "::ffff:10.0.0.9", "fd00::9", "10.1.0.9", "localhost"]
    {
        assert_eq!(
            case.verdict(&[object_on(address)]),
            format!(
                "shared: the object's replica on {address} device sdb1 is on this host, which holds the volume \
                 (disk sda (WWN 5000aa))"
            )
        );
    }
    assert_eq!(case.check("/dev/sda2", &[object_on("10.0.0.5")]).verdict.word(), "apart");
    let local = case.served("local", json!({"device_path": "/dev/sda2"}));
    assert!(local.verdict(&[object_on("10.0.0.9")]).starts_with("shared"));
}

#[test]
fn an_address_of_the_loopback_network_is_another_host_where_the_inventory_says_so() {
    let case = Case::new().known("[[host]]\nname = 'made-up'\naddresses = ['127.0.0.2']\n");
    assert!(case.verdict(&[object_on("127.0.0.2")]).starts_with("apart"));
    let case = Case::new().known("[[host]]\nname = 'here'\naddresses = ['127.0.0.1']\n");
    assert!(case.verdict(&[object_on("127.0.0.1")]).starts_with("shared"));
}

#[test]
fn a_key_on_this_hosts_disk_is_apart_from_another_hosts_volume_and_unknown_beside_its_own() {
    let key = Place::path("sealed key", "/keys", true);
    let apart = Case::new().served_by_iscsi("10.0.0.5:3260");
    assert_eq!(apart.check("/dev/sda2", std::slice::from_ref(&key)).verdict.word(), "apart");
    assert_eq!(apart.check("/dev/sdb", std::slice::from_ref(&key)).verdict.word(), "shared", "the disk itself");
    let own = Case::new().served_by_iscsi("127.0.0.1:3260");
    assert_eq!(
        own.verdict(&[key]),
        "unproven: sealed key /keys: it is on this host, like the volume's iSCSI target iqn.1:v at 127.0.0.1:3260, and \
         may be on the same device: disk sdb (WWN 5000bb) shows no serial number, the inventory has no serial number \
         of iSCSI target iqn.1:v at 127.0.0.1:3260"
    );
}

#[test]
fn at_the_level_of_devices_serial_numbers_decide() {
    let case = |more: &str| {
        let inventory = format!("{STORAGE}{more}");
        Case::new().served_by_iscsi("10.0.0.5:3260").at(SeparationLevel::Device).known(&inventory)
    };
    let device = |serial| format!("[[device]]\nhost = 'storage1'\ndevice = 'sdb1'\nserial = '{serial}'\n");
    let target = |by| format!("[[target]]\n{by}\nhost = 'storage1'\nserial = 'WD-1'\n");
    let by_portal = target("portal = '10.0.0.5:3260'");
    assert_eq!(
        case(&(device("WD-1") + &by_portal)).verdict(&[object_on("10.0.0.5")]),
        "shared: the object's replica on 10.0.0.5 device sdb1 is on the volume's iSCSI target iqn.1:v at 10.0.0.5:3260: \
         they have the same serial number"
    );
    for by in ["portal = '10.0.0.5:3260'", "iqn = 'iqn.1:V'"] {
        let verdict = case(&(device("WD-2") + &target(by))).verdict(&[object_on("10.0.0.5")]);
        assert!(verdict.starts_with("apart"), "{verdict}");
    }
    assert_eq!(
        case(&by_portal).verdict(&[object_on("10.0.0.5")]),
        "unproven: the object's replica on 10.0.0.5 device sdb1: it is on storage1, like the volume's iSCSI target \
         iqn.1:v at 10.0.0.5:3260, and may be on the same device: the inventory has no serial number of device sdb1 of \
         10.0.0.5"
    );
    assert!(case(&device("WD-1")).verdict(&[object_on("10.0.0.5")]).starts_with("unproven"));
    assert!(case("").verdict(&[object_on("10.0.0.6")]).starts_with("apart"), "another host needs no serial number");
}

#[test]
fn at_the_level_of_devices_a_replica_on_this_host_is_followed_to_its_disk() {
    let path = |path| {
        format!(
            "[[host]]\nname = 'here'\naddresses = ['10.0.0.9']\n[[device]]\nhost = 'here'\ndevice = 'd1'\npath = '{path}'\n"
        )
    };
    let case = || Case::new().at(SeparationLevel::Device);
    let place = [replica(Ring::Object, "10.0.0.9", "d1")];
    assert!(case().known(&path("/keys")).verdict(&place).starts_with("apart"));
    assert_eq!(
        case().known(&path("/srv/volume.img")).verdict(&place),
        "shared: the object's replica on 10.0.0.9 device d1 is on the volume's disk sda (WWN 5000aa)"
    );
    let unknown =
        "unproven: the object's replica on 10.0.0.9 device d1: it is on this host, like the volume's disk sda";
    assert!(case().verdict(&place).starts_with(unknown), "{}", case().verdict(&place));

    let on = |ring, host, device| replica(ring, host, device);
    let swift = [
        on(Ring::Object, "127.0.0.1", "d2"),
        on(Ring::Object, "10.0.0.6", "d1"),
        on(Ring::Container, "127.0.0.1", "d2"),
        on(Ring::Container, "127.0.0.1", "d2"),
    ];
    let report = case().check("/dev/sda2", &swift);
    let tree = "sealed key  in Swift, whose replicas are\n  \
                  object, container: device d2 of 127.0.0.1 -> /srv/node/d2\n    \
                    ext4 on partition sdb1 -> disk sdb (WWN 5000bb)\n  \
                  object: device d1 of 10.0.0.6\n\
                apart: ";
    assert!(report.to_string().contains(tree), "{report}");
    assert_eq!(serde_json::to_value(&report).unwrap()["places"].as_array().unwrap().len(), swift.len());
    assert_eq!(report.verdict.word(), "apart");
}

#[test]
fn at_the_level_of_racks_neighbours_are_shared_and_unknown_racks_are_gaps() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").at(SeparationLevel::Rack).known(STORAGE);
    assert_eq!(
        case.verdict(&[object_on("10.0.0.6")]),
        "shared: the object's replica on 10.0.0.6 device sdb1 is in rack r1, where the volume is as well \
         (iSCSI target iqn.1:v at 10.0.0.5:3260)"
    );
    assert!(case.verdict(&[object_on("10.0.0.5")]).contains("is on storage1, the host that serves the volume"));
    assert!(case.verdict(&[object_on("10.0.0.7")]).starts_with("apart"));
    assert_eq!(
        case.verdict(&[object_on("10.0.0.8")]),
        "unproven: the object's replica on 10.0.0.8 device sdb1: the rack of 10.0.0.8 is not known: name it in the inventory"
    );
}

#[test]
fn a_refusal_says_what_both_are_on() {
    let refused = |level, host: &str| {
        let case = Case::new().served_by_iscsi("10.0.0.5:3260").at(level).known(STORAGE);
        let places = [object_on(host), Place::path("private key", "/keys", true)];
        let report = case.check("/dev/sda2", &places);
        report.judge(SeparationPolicy::Warn).expect_err("refused").to_string()
    };
    assert!(refused(SeparationLevel::Host, "10.0.0.5").starts_with("key and data are on the same host: the object's"));
    assert!(refused(SeparationLevel::Rack, "10.0.0.6").starts_with("key and data are on the same rack: the object's"));
}

#[test]
fn on_one_host_for_all_the_replicas_are_told_once_and_how_to_have_it_so() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known(STORAGE);
    let report = case.check(
        "/dev/sda2",
        &[object_on("10.0.0.5"), object_on("10.0.0.5"), replica(Ring::Account, "10.0.0.5", "sdb1")],
    );
    let refusal = report.judge(SeparationPolicy::Warn).expect_err("refused");
    let text = refusal.to_string();
    assert_eq!(text.matches("the host that serves the volume").count(), 1, "{text}");
    assert_eq!(text.matches("the object's replica on 10.0.0.5").count(), 1, "{text}");
    assert!(text.contains(", the account's replica on 10.0.0.5"), "{text}");
    let next = refusal.next_step().expect("there is one");
    assert!(next.contains("level = \"device\" in [separation]") && next.contains("whoever takes the host"), "{next}");
}

#[test]
fn what_several_places_rest_on_is_told_once() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known(STORAGE);
    let (object, container) = (object_on("10.0.0.6"), replica(Ring::Container, "10.0.0.6", "sdb1"));
    let told = |places: &[Place]| {
        let report = case.check("/dev/sda2", places).to_string();
        report
            .lines()
            .skip_while(|line| !line.starts_with("sealed key"))
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    };
    let head = "sealed key  in Swift, whose replicas are\n";
    let one = told(&[object.clone(), object.clone(), container]);
    assert!(one.starts_with(&format!("{head}  object, container: device sdb1 of 10.0.0.6\napart: ")), "{one}");
    let two = told(&[object, object_on("10.0.0.7")]);
    let lines = "  object: device sdb1 of 10.0.0.6\n  object: device sdb1 of 10.0.0.7\n";
    assert!(two.starts_with(&format!("{head}{lines}apart: ")), "{two}");
}

#[test]
fn what_cannot_be_told_from_the_volumes_host_is_a_gap() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known("[[host]]\nname = 's2'\naddresses = ['10.0.0.6']\n");
    for address in ["storage1", "fd00::5", "0.0.0.0", "fe80::5", "169.254.0.5"] {
        assert_eq!(
            case.verdict(&[object_on(address)]),
            format!(
                "unproven: the object's replica on {address} device sdb1: {address} and 10.0.0.5 may be the same \
                 host: name them, with all their addresses, in the inventory"
            )
        );
    }
    let by_name = Case::new().served_by_iscsi("storage1:3260");
    assert!(by_name.verdict(&[object_on("Storage1")]).starts_with("shared"));
    assert!(by_name.verdict(&[object_on("storage2")]).starts_with("apart"));
    assert!(by_name.verdict(&[object_on("10.0.0.6")]).starts_with("unproven"));
}

#[test]
fn what_is_elsewhere_or_of_an_unknown_kind_is_a_gap() {
    let at = Location::Elsewhere { name: "Barbican".into(), why: "its database cannot be seen".into() };
    let elsewhere = Place { what: "sealed key".into(), at, opens: true };
    assert_eq!(Case::new().verdict(&[elsewhere]), "unproven: sealed key in Barbican: its database cannot be seen");
    let unknown = Case::new().served("quobyte", json!({}));
    assert_eq!(
        unknown.verdict(&[object_on("10.0.0.5")]),
        "unproven: volume /dev/sda2: the server of a volume of the kind \"quobyte\" is not known"
    );
}

#[test]
fn the_json_names_replicas_and_targets() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known(STORAGE);
    let report = serde_json::to_value(case.check("/dev/sda2", &[object_on("10.0.0.5")])).expect("JSON");
    let (replica, remote) = (
        json!({"kind": "replica", "ring": "object", "host": "10.0.0.5", "port": 6200, "device": "sdb1"}),
        json!({"kind": "remote", "protocol": "iscsi", "names": ["iqn.1:v"], "addresses": ["10.0.0.5:3260"]}),
    );
    assert_eq!(
        report["shared"],
        json!([{"what": "sealed key", "path": "swift://10.0.0.5:6200/sdb1", "device": replica, "volume_device": remote,
                "same_by": "host", "within": "storage1"}])
    );
    assert_eq!(report["places"][0]["path"], "swift://10.0.0.5:6200/sdb1");
    assert_eq!(report["places"][0]["devices"], json!([replica]));
    assert_eq!(report["volume"]["devices"][1], remote);
}
