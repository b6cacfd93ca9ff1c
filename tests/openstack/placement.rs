//! Where the replicas are, and who serves the volume.

use crate::{
    Story,
    cloud::{Cloud, Site},
};

pub const STORIES: &[Story] = &[("a_replica_beside_the_volume_is_refused_until_it_moves", replica_beside_the_volume)];

fn replica_beside_the_volume(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    let info = |portal: &str| {
        let path = site.path("connection_info");
        let text = format!(
            r#"{{"driver_volume_type": "iscsi", "data": {{"target_portal": "{portal}:3260", "target_iqn": "iqn.2010-10.org.openstack:volume-1", "target_lun": 1}}}}"#
        );
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let served_by = |portal: &str| {
        let output = site.run(&["separation", &volume, "--connection-info", &info(portal)]);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text)
    };
    // Storage host 2 serves the volume and has a replica of its key.
    let (code, text) = served_by("127.0.0.12");
    println!("{text}");
    assert_eq!(code, Some(72), "{text}");
    assert!(text.contains("the object's replica on 127.0.0.12 device sdb2"), "{text}");
    assert!(text.contains("iSCSI target iqn.2010-10.org.openstack:volume-1"), "{text}");
    // The host of the account's and the container's rows counts as well.
    let (code, text) = served_by("127.0.0.10");
    assert_eq!(code, Some(72), "{text}");
    assert!(text.contains("the account's replica on 127.0.0.10"), "{text}");
    let (code, text) = served_by("127.0.0.14");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("apart"), "{text}");

    cloud.move_ring_device("sdb2", "127.0.0.14");
    let (code, text) = served_by("127.0.0.12");
    println!("{text}");
    assert_eq!(code, Some(0), "after the ring device has moved: {text}");
    assert!(text.contains("apart"), "{text}");
    cloud.move_ring_device("sdb2", "127.0.0.12");

    // A hook's attach is judged in the same way.
    let request = format!(
        r#"{{"version": 1, "device": "{volume}", "link": null, "name": "{}", "key_id": "{}", "volume_id": "volume-7", "connection_info": {}}}"#,
        site.name("hook"),
        &reference[7..],
        std::fs::read_to_string(info("127.0.0.12")).unwrap()
    );
    let output = crate::keys::run_hook(&site, "attach", &request);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(72), "{text}");
    assert!(text.contains("on 127.0.0.12 device sdb2"), "{text}");
    let audit = std::fs::read_to_string(site.path("audit")).unwrap();
    let refused: serde_json::Value = serde_json::from_str(audit.lines().last().unwrap()).unwrap();
    assert_eq!((&refused["action"], &refused["volume_id"]), (&"refused".into(), &"volume-7".into()));
    assert_eq!(refused["key"], *reference);
    assert!(refused["separation"].to_string().contains("swift://127.0.0.12:"), "with the evidence: {refused}");
}
