//! Backups of containers: lost stores come back in any kind of store, also by a restore that is killed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use cryptattach::{
    base::key::{ManagedObject, ObjectFacts, ObjectKind, SecretBytes, StoreName},
    config::Config,
    unlock::container::{Container, Use},
};

use crate::{
    busy::wait_for_progress,
    site::{LoopDevice, Site, sh},
};

/// The sealed objects of a directory store, by their paths in it.
fn objects(store: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let folders = [store.to_owned(), store.join("kek"), store.join("host"), store.join("consumers")];
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    let files = files.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    files.map(|entry| (entry.path().strip_prefix(store).unwrap().to_owned(), fs::read(entry.path()).unwrap())).collect()
}

/// Keys of another program, sealed.
pub fn keys(site: &Site, number: usize) {
    let config = Config::read(site.keys("cryptattach.toml").as_ref()).unwrap();
    let name: StoreName = "cinder".parse().unwrap();
    let container = Container::open(&config, &name, None, Use::Keys).unwrap();
    for _ in 0..number {
        let facts = ObjectFacts {
            kind: ObjectKind::Symmetric,
            algorithm: Some("AES".to_owned()),
            bit_length: Some(256),
            name: None,
            created: None,
            fresh: true,
            filling: None,
        };
        container.keep_object(ManagedObject { facts, value: SecretBytes::random(32).unwrap() }).unwrap();
    }
}

/// Moves the directory store away.
fn lose(site: &Site) -> PathBuf {
    let lost = site.path("keys").join("lost");
    let _ = fs::remove_dir_all(&lost);
    fs::rename(site.keys("cinder"), &lost).unwrap();
    lost
}

#[test]
fn volumes_attach_after_their_lost_store_was_restored() {
    let site = Site::new();
    let (one, _) = site.volume("one", &[]);
    let (two, key) = site.volume("two", &["--keyslot"]);
    site.ok(&["container", "rotate", "cinder"]);
    let file = site.keys("backup");
    let made = site.json(&["container", "backup", "cinder", file]);
    assert_eq!((&made["keys"], &made["container_keys"], &made["epoch"]), (&2.into(), &2.into(), &"2".into()));
    assert_eq!(sh(&format!("stat -c %a {file}")), "600");
    site.fails(73, &["container", "backup", "cinder", file]);

    let lost = lose(&site);
    // What is absent may be on a disk that is not mounted.
    let told = site.fails(69, &["container", "restore", "cinder", file]);
    assert!(told.contains("mounted"), "{told}");
    let done = site.json(&["container", "restore", "cinder", file, "--create"]);
    assert_eq!((&done["written"], &done["unchanged"]), (&4.into(), &0.into()));
    assert_eq!(objects(site.keys("cinder").as_ref()), objects(&lost));
    site.attaches(&one);
    site.attaches(&two);
    let rehearsed = site.json(&["container", "rehearse", "cinder", "--identity", site.keys("escrow.key")]);
    assert_eq!((&rehearsed["saved"], &rehearsed["lost"]), (&2.into(), &serde_json::json!([])));

    // A file of the store that was cut.
    fs::write(site.sealed(&key), "{\"protected\":\"ey").unwrap();
    let told = site.fails(73, &["container", "restore", "cinder", file]);
    assert!(told.contains("left alone") && told.contains("--replace"), "{told}");
    let told = site.fails(76, &["container", "backup", "cinder", site.keys("second")]);
    assert!(told.contains("not in the backup"), "{told}");
    site.ok(&["container", "restore", "cinder", file, "--replace"]);
    assert_eq!(objects(site.keys("cinder").as_ref()), objects(&lost));
    let audit = fs::read_to_string(site.keys("audit")).unwrap();
    assert!(audit.contains("container backup") && audit.contains("\"overridden\":\"--replace\""), "{audit}");
}

#[test]
fn a_restore_that_is_killed_goes_on_by_the_same_command() {
    let site = Site::new();
    keys(&site, 40);
    let file = site.keys("backup");
    site.ok(&["container", "backup", "cinder", file]);
    let lost = objects(&lose(&site));
    let store = PathBuf::from(site.keys("cinder"));
    let mut killed_in_the_middle = 0;
    for at_least in [0, 1, 5, 20, 39] {
        let _ = fs::remove_dir_all(&store);
        let mut restore = site.command();
        restore.args(["container", "restore", "cinder", file, "--create"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut restore = restore.spawn().unwrap();
        wait_for_progress(&mut restore, || objects(&store).len() >= at_least);
        restore.kill().unwrap();
        restore.wait().unwrap();
        let there = objects(&store);
        killed_in_the_middle += usize::from(there.len() < lost.len());
        assert!(there.iter().all(|(name, bytes)| lost.get(name) == Some(bytes)), "what is there is whole");
        site.ok(&["container", "restore", "cinder", file, "--create"]);
        assert_eq!(objects(&store), lost, "killed with {} objects", there.len());
    }
    assert!(killed_in_the_middle > 0);
    let left = fs::read_dir(&store).unwrap().flatten();
    assert!(!left.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(".unfinished")));
}

#[test]
fn a_backup_does_not_rest_on_the_device_of_a_volume_whose_key_it_has() {
    let site = Site::new();
    let (volume, _) = site.volume("one", &[]);
    let beside = site.path("backup").into_os_string().into_string().unwrap();
    // Nobody has told this host of the volume, which is in a file.
    site.ok(&["container", "backup", "cinder", &beside]);
    fs::remove_file(&beside).unwrap();
    let name = site.name("one");
    site.attach(&volume, &name, &[]);
    let told = site.fails(72, &["container", "backup", "cinder", &beside]);
    assert!(told.contains("would rest on a device whose keys it has"), "{told}");
    assert!(!Path::new(&beside).exists());
    site.ok(&["container", "backup", "cinder", site.keys("backup")]);
    site.ok(&["detach", &name]);

    let device = LoopDevice::new(volume.as_ref(), "");
    let path = site.keys("cryptattach.toml");
    let config = fs::read_to_string(path).unwrap();
    fs::write(path, format!("{config}[volumes.one]\ndevice = \"{}\"\n", device.path())).unwrap();
    site.fails(72, &["container", "backup", "cinder", &beside]);
}

#[test]
fn an_older_backup_says_what_it_would_bring_back() {
    let site = Site::new();
    let (volume, key) = site.volume("one", &[]);
    let file = site.keys("backup");
    site.ok(&["container", "backup", "cinder", file]);
    site.ok(&["container", "rotate", "cinder"]);
    fs::remove_file(site.sealed(&key)).unwrap();
    let told = site.fails(68, &["container", "restore", "cinder", file]);
    let (_, id) = key.split_once('/').unwrap();
    assert!(told.contains(&format!("would bring back: key {id}")) && told.contains("fingerprint"), "{told}");
    let done = site.json(&["container", "restore", "cinder", file, "--older"]);
    assert_eq!((&done["sealed_anew"], &done["brought_back"]), (&1.into(), &serde_json::json!([format!("key {id}")])));
    assert_eq!(site.json(&["key", "show", &key])["recipients"][0]["kid"], "cinder/kek/2");
    site.attaches(&volume);
}

#[test]
fn a_hostile_file_is_refused_and_nothing_is_written() {
    let site = Site::new();
    keys(&site, 2);
    let file = site.keys("backup");
    site.ok(&["container", "backup", "cinder", file]);
    let text = fs::read_to_string(file).unwrap();
    let lost = lose(&site);
    fs::create_dir(site.keys("cinder")).unwrap();
    let second = text.lines().nth(2).unwrap();
    for (hostile, code) in [
        (text[..text.len() / 2].to_owned(), 76),
        (text.replace(second, &format!("{second}\n{second}")), 76),
        (text.replace("\"part\":\"key\",\"name\":\"", "\"part\":\"key\",\"name\":\"../"), 76),
        (text.replace("\"made\":", "\"made\":1"), 68),
        ("x".repeat(1 << 20), 76),
        (String::new(), 76),
    ] {
        fs::write(site.keys("hostile"), hostile).unwrap();
        site.fails(code, &["container", "restore", "cinder", site.keys("hostile"), "--older", "--replace"]);
        assert!(objects(site.keys("cinder").as_ref()).is_empty());
    }
    // Endless, and no memory is taken for it.
    site.fails(74, &["container", "restore", "cinder", "/dev/zero"]);
    site.fails(66, &["container", "restore", "cinder", site.keys("nothing")]);
    site.ok(&["container", "restore", "cinder", file]);
    assert_eq!(objects(site.keys("cinder").as_ref()), objects(&lost));
}

#[test]
fn a_key_that_was_erased_or_deleted_comes_back_only_when_asked() {
    let site = Site::new();
    let (volume, erased) = site.volume("one", &[]);
    let (_, deleted) = site.volume("two", &[]);
    let file = site.path("backup").into_os_string().into_string().unwrap();
    site.ok(&["container", "backup", "cinder", &file]);
    // Wherever its receipt is, and whatever becomes of that.
    let receipt = site.path("receipt").into_os_string().into_string().unwrap();
    site.ok(&["key", "erase", &volume, "--yes", "--receipt", &receipt]);
    fs::write(receipt, "damaged").unwrap();
    site.ok(&["key", "delete", &deleted, "--yes"]);
    let told = site.fails(68, &["container", "restore", "cinder", &file]);
    for key in [&erased, &deleted] {
        assert!(told.contains(&format!("key {}, which this host has deleted", &key[7..])), "{told}");
    }
    assert!(site.ok(&["key", "list"]).is_empty());
    let restore = ["container", "restore", "cinder", &file, "--older"];
    assert_eq!(site.json(&restore)["brought_back"].as_array().unwrap().len(), 2);
    // Now it has not deleted them any more.
    fs::remove_file(site.sealed(&erased)).unwrap();
    assert_eq!(site.json(&restore[..4])["written"], 1);
    assert_eq!(site.ok(&["key", "list"]).lines().count(), 2);
}

/// What cannot be deleted was not.
#[test]
fn a_key_whose_deletion_has_failed_comes_back_unasked() {
    let site = Site::new();
    let (_, key) = site.volume("one", &[]);
    let file = site.path("backup").into_os_string().into_string().unwrap();
    site.ok(&["container", "backup", "cinder", &file]);
    let sealed = site.sealed(&key);
    sh(&format!("mount --bind {0} {0}", sealed.display()));
    let told = site.run(&["key", "delete", &key, "--yes"]);
    sh(&format!("umount {}", sealed.display()));
    assert!(!told.status.success(), "{told:?}");
    fs::remove_file(sealed).unwrap();
    assert_eq!(site.json(&["container", "restore", "cinder", &file])["written"], 1);
}
