//! Servers that are down, hang or have missed something.

use std::time::Duration;

use crate::{
    Story,
    cloud::{Cloud, Site},
    keys::forget_tokens,
    shell::sh,
};

pub const STORIES: &[Story] = &[
    ("one_then_two_storage_nodes_stop", nodes_down),
    ("a_node_hangs", node_hangs),
    ("a_node_has_missed_a_rotation", stale),
    ("keystone_is_down", keystone_down),
    ("swift_is_down", swift_down),
    ("barbican_is_down", barbican_down),
];

/// Two tries and the pause between them are enough to see; the default is 30 s.
const SHORT: &str = "[network]\ntotal_seconds = 4\n";

fn nodes_down(cloud: &Cloud) {
    let site = Site::new(cloud);
    site.configure(SHORT);
    let (volume, other) = (site.file("volume"), site.file("other"));
    site.ok(&["format", &volume]);
    cloud.stop("object1");
    site.attaches(&volume);
    site.ok(&["format", &other]);
    site.attaches(&other);
    cloud.stop("object2");
    site.attaches(&volume);
    let (text, _) = site.fails_within(69, Duration::from_secs(12), &["format", &site.file("third")]);
    assert!(text.contains("too few of its replicas answer (503"), "{text}");
    assert!(text.contains("trying again for up to"), "it says what it waits for: {text}");
    // Swift cannot know, of one replica of three, that a key does not exist.
    let missing = format!("cinder/{}", cryptattach::base::key::KeyId::random());
    let (text, _) = site.fails_within(69, Duration::from_secs(12), &["key", "show", &missing]);
    assert!(text.contains("503"), "{text}");
    cloud.repair();
    let text = site.fails(67, &["key", "show", &missing]);
    assert!(text.contains("there is no key"), "{text}");
}

fn node_hangs(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    cloud.signal("object1", "STOP");
    let start = std::time::Instant::now();
    site.attaches(&volume);
    println!("attach and detach with one of three nodes hanging: {:.1?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(20));
}

/// A replica that was away during a rotation has the old form of a key. It must not come back.
fn stale(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    cloud.stop("object1");
    site.ok(&["container", "rotate", "cinder"]);
    cloud.repair();
    for _ in 0..12 {
        assert_eq!(site.json(&["key", "show", &reference])["claims"]["generation"], 2);
    }
    assert_eq!(site.json(&["container", "rotate", "cinder"])["resealed"], 1);
    site.attaches(&volume);
    // Likewise a deletion.
    cloud.stop("object1");
    site.ok(&["key", "delete", &reference, "--yes"]);
    cloud.repair();
    for _ in 0..12 {
        site.fails(67, &["key", "show", &reference]);
    }
}

fn keystone_down(cloud: &Cloud) {
    let site = Site::new(cloud);
    site.configure(SHORT);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    cloud.stop("keystone");
    forget_tokens();
    let arguments = ["attach", &volume, "x", "--backend", "userspace"];
    let (text, _) = site.fails_within(69, Duration::from_secs(8), &arguments);
    assert!(text.contains("cannot log in") && text.contains("cannot connect to http://127.0.0.1:"), "{text}");
    cloud.repair();
    site.attaches(&volume);
    // Hanging is not down.
    cloud.signal("keystone", "STOP");
    forget_tokens();
    let (text, _) = site.fails_within(69, Duration::from_secs(8), &arguments);
    assert!(text.contains("did not answer within"), "{text}");
}

fn swift_down(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    cloud.stop("proxy");
    // With the limits that users have: the whole phase is 30 s.
    let (text, took) =
        site.fails_within(69, Duration::from_secs(35), &["attach", &volume, "x", "--backend", "userspace"]);
    assert!(text.contains("cannot connect to http://127.0.0.1:"), "{text}");
    assert!(took > Duration::from_secs(20), "it was tried again");
    // A second proxy of the same cluster, named in the configuration, takes over.
    cloud.repair();
    let urls = format!(
        "urls = [\"http://127.0.0.1:1/v1/AUTH_{0}\", \"{1}/v1/AUTH_{0}\"]",
        cloud.var("PROJECT_ID_KEYS"),
        cloud.var("SWIFT_URL")
    );
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write("cryptattach.toml", &text.replace("type = \"swift\"", &format!("type = \"swift\"\n{urls}")));
    let name = site.name("once");
    let output = site.run(&["attach", &volume, &name, "--backend", "userspace"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !text.contains("trying again"), "{text}");
    site.ok(&["detach", &name]);
}

fn barbican_down(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.barbican("barbican", true);
    site.configure(SHORT);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    site.attaches(&volume);
    cloud.stop("barbican");
    let (text, _) = site.fails_within(69, Duration::from_secs(8), &["attach", &volume, "x", "--backend", "userspace"]);
    assert!(text.contains("Barbican"), "{text}");
    let token = cloud.token("cinder");
    assert!(!sh(&format!("cat {}", site.path("audit").display())).contains(&token));
}
