//! A new passphrase for a volume's keyslot, and what a kill or a power cut leaves at each write.

use std::{fs, path::Path, process::Command};

use crate::{
    moving::{WRITES, killed_before, snapshot},
    rotate::{Counts, DATA, Filled, all_crashes, record, replay, told},
    site::{Site, sh},
};

fn ours(site: &Site) -> String {
    format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"))
}

/// Whether cryptsetup opens a keyslot with what a file has.
fn opens(volume: &str, key_file: &str) -> bool {
    let arguments = ["open", "--test-passphrase", "--key-file", key_file, volume];
    Command::new("cryptsetup").args(arguments).output().unwrap().status.success()
}

/// The passphrase that the store gives now, in a file.
fn passphrase(site: &Site, volume: &str, name: &str) -> String {
    let file = site.path(name).into_os_string().into_string().unwrap();
    sh(&format!("{} key passphrase --for {volume} >{file}", ours(site)));
    file
}

fn header(volume: &str) -> serde_json::Value {
    serde_json::from_str(&sh(&format!("cryptsetup luksDump --dump-json-metadata {volume}"))).unwrap()
}

fn rotates(filled: &Filled) -> serde_json::Value {
    filled.site.json(&["key", "rotate", "--passphrase", &filled.volume])
}

#[test]
fn a_new_passphrase_opens_the_keyslot_and_the_old_one_does_not() {
    let filled = Filled::new(&["--keyslot"], DATA);
    let Filled { site, volume, plain } = &filled;
    let key = site.ok(&["key", "list"]);
    let old = passphrase(site, volume, "old");
    // What a person has put there stays.
    let person = site.path("person").into_os_string().into_string().unwrap();
    fs::write(&person, "a person's").unwrap();
    let pbkdf = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";
    sh(&format!("cryptsetup luksAddKey -q {pbkdf} --key-file {old} {volume} {person}"));
    let name = site.name("used");
    let device = site.attach(volume, &name, &[]);
    let rotated = rotates(&filled);
    assert_eq!((rotated["key"].as_str(), rotated["keyslot"].as_u64()), (Some(&*key), Some(2)));
    assert!(fs::read(&device).unwrap() == *plain, "it stays attached");
    site.ok(&["detach", &name]);
    let new = passphrase(site, volume, "new");
    assert_eq!((opens(volume, &new), opens(volume, &old), opens(volume, &person)), (true, false, true));
    let json = header(volume);
    assert_eq!(
        (&json["tokens"]["0"]["keyslots"], json["keyslots"].as_object().unwrap().len()),
        (&serde_json::json!(["2"]), 2)
    );
    filled.check("with a new passphrase");
    rotates(&filled);
    assert!(opens(volume, &passphrase(site, volume, "newer")) && !opens(volume, &new));
    assert_eq!(site.ok(&["key", "list"]), key);
    assert!(site.ok(&["test", volume]).contains("its passphrase opens the keyslot"));
    // The volume key is rotated as ever.
    site.ok(&["key", "rotate", volume, "--drop-others"]);
    filled.check("with a new volume key");
}

#[test]
fn it_is_refused_for_a_strict_volume_and_while_the_volume_key_is_rotated() {
    let filled = Filled::new(&[], DATA);
    let Filled { site, volume, .. } = &filled;
    let before = fs::read(volume).unwrap();
    assert!(site.fails(68, &["key", "rotate", "--passphrase", volume]).contains("formatted without --keyslot"));
    let uuid = sh(&format!("cryptsetup luksUUID {volume}"));
    let folder = Path::new(site.keys("site-state")).join("rekey");
    fs::write(folder.join(uuid.trim()), "{}").unwrap();
    let refused = site.fails(64, &["key", "rotate", "--passphrase", volume]);
    assert!(refused.contains("end it with 'cryptattach key rotate"), "{refused}");
    assert!(fs::read(volume).unwrap() == before, "nothing is written");
}

/// What the store gives opens the keyslot as it is; the same command ends the rotation.
fn trial(filled: &Filled, old: &str, what: &str) -> &'static str {
    let Filled { site, volume, .. } = filled;
    let image = fs::read(volume).unwrap();
    filled.check(what);
    let given = passphrase(site, volume, "given");
    assert!(fs::read(volume).unwrap() == image, "{what}: looking has written");
    // cryptsetup repairs what it looks at.
    let copy = site.path("copy").into_os_string().into_string().unwrap();
    fs::write(&copy, &image).unwrap();
    assert!(opens(&copy, &given), "{what}: what the store gives opens nothing");
    let (is_new, opens_old) = (fs::read(&given).unwrap() != fs::read(old).unwrap(), opens(&copy, old));
    let slots = header(&copy)["keyslots"].as_object().unwrap().len();
    rotates(filled);
    filled.check(what);
    assert!(opens(volume, &passphrase(site, volume, "given")) && !opens(volume, old), "{what}");
    let json = header(volume);
    assert_eq!(
        (json["keyslots"].as_object().unwrap().len(), json["tokens"].as_object().unwrap().len()),
        (1, 1),
        "{what}"
    );
    assert_eq!(json["tokens"]["0"]["keyslots"].as_array().unwrap().len(), 1, "{what}");
    match (is_new, slots, opens_old) {
        (false, 1, true) => "opened by the old one",
        (false, 2, true) => "opened by the old one, both there",
        (true, 2, true) => "opened by the new one, both there",
        (true, 2, false) => "opened by the new one, old one wiped",
        (true, 1, false) => "opened by the new one",
        state => panic!("{what}: {state:?}"),
    }
}

#[test]
fn kill_9_before_any_system_call_that_writes_loses_no_passphrase() {
    let filled = Filled::new(&["--keyslot"], DATA);
    let Filled { site, volume, .. } = &filled;
    let old = passphrase(site, volume, "old");
    let (image, disk) = (fs::read(volume).unwrap(), snapshot(site));
    let mut counts = Counts::new();
    for call in WRITES {
        for when in 1.. {
            filled.restore(&image, &disk);
            if !killed_before(site, call, when, &["key", "rotate", "--passphrase", volume]) {
                break;
            }
            let outcome = trial(&filled, &old, &format!("killed before {call} {when}"));
            *counts.entry(("kill", outcome)).or_insert(0) += 1;
        }
    }
    assert!(told(&counts) > 40);
    assert_eq!(counts.len(), 5, "at each of the steps");
}

#[test]
fn a_crash_at_any_write_and_lost_or_torn_blocks_lose_no_passphrase() {
    let filled = Filled::new(&["--keyslot"], DATA);
    let Filled { site, volume, .. } = &filled;
    let old = passphrase(site, volume, "old");
    let recorded = record(&filled, &["key", "rotate", "--passphrase", volume]);
    let mut counts = Counts::new();
    replay(recorded, "a new passphrase", (all_crashes(), 0), &mut counts, &|what, image, keys| {
        filled.restore(image, keys);
        trial(&filled, &old, what)
    });
    assert!(told(&counts) > 15);
}
