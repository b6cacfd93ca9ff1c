//! Container keys in a directory: made, rotated, sealed to hosts that are admitted, and to none that was removed.

use std::{fs, path::PathBuf, sync::Once, time::Duration};

use cryptattach::{
    base::key::{Epoch, HostName, SealedKey, StoreName},
    config::Config,
    keys::seal::OwnerKey,
    unlock::container::{Container, Step, Use},
};
use serde_json::Value;

use crate::site::{Site, sh};

struct Containers {
    site: Site,
}

impl Containers {
    /// A store `logs`, made by `container create`.
    fn new() -> Self {
        let site = Site::new();
        site.ok(&[
            "container",
            "create",
            "logs",
            "--path",
            site.keys("logs"),
            "--owner",
            site.keys("cinder.owner.pem"),
            "--identity",
            site.keys("cinder.owner.key"),
            "--escrow",
            site.keys("escrow.pem"),
        ]);
        Self { site }
    }

    fn container(&self) -> Container {
        let config = Config::read(self.site.keys("cryptattach.toml").as_ref()).unwrap();
        Container::open(&config, &"logs".parse::<StoreName>().unwrap(), None, Use::Keys).unwrap()
    }

    fn kek(&self, epoch: u32) -> PathBuf {
        PathBuf::from(self.site.keys("logs")).join(format!("kek/{epoch}.jwe"))
    }

    fn is_for(&self, epoch: u32, host: &OwnerKey) -> bool {
        let sealed = SealedKey::from_json(&fs::read(self.kek(epoch)).unwrap()).unwrap();
        sealed.recipient_kids().any(|kid| kid == host.recipient().unwrap().kid())
    }

    /// As a rotation leaves it that was killed between making its key and announcing it.
    fn rotation_is_killed(&self) {
        let site = &self.site;
        let before = fs::read(PathBuf::from(site.keys("logs")).join("container.json")).unwrap();
        let trusted = PathBuf::from(site.keys("site-state")).join("containers/logs");
        let known = fs::read(&trusted).unwrap();
        site.ok(&["container", "rotate", "logs"]);
        fs::write(PathBuf::from(site.keys("logs")).join("container.json"), before).unwrap();
        fs::write(trusted, known).unwrap();
    }
}

#[test]
fn a_directory_has_container_keys_as_swift_has() {
    let containers = Containers::new();
    let site = &containers.site;
    let volume = site.file("volume", 64 << 20).into_os_string().into_string().unwrap();
    let reference = site.ok(&["format", &volume, "--store", "logs"]);
    assert_eq!(site.json(&["key", "show", &reference])["recipients"][0]["kid"], "logs/kek/1");
    let first = site.json(&["container", "show", "logs"]);
    assert_eq!((&first["epoch"], &first["keys"], &first["rotating"]), (&"1".into(), &1.into(), &false.into()));
    let rotated = site.json(&["container", "rotate", "logs"]);
    assert_eq!((&rotated["epoch"], &rotated["resealed"]), (&"2".into(), &1.into()));
    assert_eq!(site.json(&["container", "show", "logs"])["fingerprint"], rotated["fingerprint"]);
    assert_ne!(rotated["fingerprint"], first["fingerprint"]);
    site.attaches(&volume);
    assert_eq!(sh(&format!("stat -c %a {0} {0}/kek {0}/kek/2.jwe", site.keys("logs"))), "700\n700\n600");

    // A key of somebody else's, of the same number and sealed to the right owner, is not sealed under.
    let thief = Containers::new();
    thief.site.ok(&["container", "rotate", "logs"]);
    let owner = fs::read(thief.site.keys("cinder.owner.key")).unwrap();
    fs::write(site.keys("thief.key"), owner).unwrap();
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let both = format!("\", \"{}\"]", site.keys("thief.key"));
    fs::write(site.keys("cryptattach.toml"), config.replace("\"]", &both)).unwrap();
    let kept = fs::read(containers.kek(2)).unwrap();
    fs::copy(thief.kek(2), containers.kek(2)).unwrap();
    let other = site.file("other", 64 << 20).into_os_string().into_string().unwrap();
    let refused = site.fails(68, &["format", &other, "--store", "logs"]);
    assert!(refused.contains("logs/kek/2") && refused.contains("fingerprint"), "{refused}");
    fs::write(containers.kek(2), kept).unwrap();
    site.ok(&["format", &other, "--store", "logs"]);
}

#[test]
fn init_makes_the_first_container_key() {
    let site = Site::new();
    let (volume, reference) = site.volume("one", &[]);
    assert_eq!(site.json(&["key", "show", &reference])["recipients"][0]["kid"], "cinder/kek/1");
    site.fails(73, &["container", "create", "cinder", "--path", site.keys("elsewhere")]);
    let shown = site.ok(&["container", "create", "cinder"]);
    assert!(shown.contains("cinder/kek/1"), "{shown}");
    assert_eq!(site.json(&["container", "rotate", "cinder"])["resealed"], 1);
    assert_eq!(site.json(&["key", "show", &reference])["recipients"][0]["kid"], "cinder/kek/2");
    site.attaches(&volume);
}

#[test]
fn hosts_come_and_go_even_if_a_rotation_was_killed_between() {
    let containers = Containers::new();
    let (stays, goes) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
    let [one, two]: [HostName; 2] = ["one", "two"].map(|name| name.parse().unwrap());
    // Admitted after a next key was made and before it was announced: the key after that is sealed to the host as well.
    containers.rotation_is_killed();
    containers.container().admit_host(&one, &stays.recipient().unwrap()).unwrap();
    assert!(containers.is_for(1, &stays) && !containers.is_for(2, &stays));
    containers.site.ok(&["container", "rotate", "logs"]);
    assert!(!containers.is_for(2, &stays) && containers.is_for(3, &stays));

    containers.container().admit_host(&two, &goes.recipient().unwrap()).unwrap();
    assert!(containers.is_for(2, &goes) && containers.is_for(3, &goes), "the key before may still be in use");
    assert_eq!(containers.container().hosts().unwrap(), [one.clone(), two.clone()]);
    let shown: Value = containers.site.json(&["container", "show", "logs"]);
    assert_eq!(shown["epoch"], "3", "admission needs no new key");

    // Removed after a next key was made that it can open: only the one after that is without it.
    containers.rotation_is_killed();
    assert!(containers.is_for(4, &goes));
    let rotation = containers.container().remove_host(&two, &|_| {}).unwrap();
    assert_eq!(rotation.epoch, "5".parse::<Epoch>().unwrap());
    assert!(containers.is_for(5, &stays) && !containers.is_for(5, &goes));
    assert_eq!(containers.container().hosts().unwrap(), [one]);
}

#[test]
fn a_rotation_takes_back_nothing_of_one_that_began_later() {
    let containers = Containers::new();
    let site = &containers.site;
    let keys: Vec<String> = (0..3)
        .map(|number| {
            let volume = site.file(&format!("volume{number}"), 64 << 20).into_os_string().into_string().unwrap();
            site.ok(&["format", &volume, "--store", "logs"])
        })
        .collect();
    let (goes, host) = (OwnerKey::generate().unwrap(), "two".parse::<HostName>().unwrap());
    containers.container().admit_host(&host, &goes.recipient().unwrap()).unwrap();
    let meanwhile = Once::new();
    let remove = |step: Step<'_>| {
        if let Step::Done(1, _) = step {
            meanwhile.call_once(|| drop(containers.container().remove_host(&host, &|_| {}).unwrap()));
        }
    };
    let rotation = containers.container().rotate(Duration::from_secs(3600), &remove).unwrap();
    assert_eq!(rotation.epoch, "3".parse::<Epoch>().unwrap());
    assert!(containers.is_for(2, &goes) && !containers.is_for(3, &goes));
    let shown = site.json(&["container", "show", "logs"]);
    assert_eq!((&shown["epoch"], &shown["rotating"]), (&"3".into(), &false.into()));
    for key in keys {
        assert_eq!(site.json(&["key", "show", &key])["recipients"][0]["kid"], "logs/kek/3");
    }
}
