//! Moves of keys to another store: what is refused, and what a kill or a power cut leaves at each write.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    busy::wait_for_progress,
    rotate::{Counts, DATA, Filled, Random, all_crashes, record, replay, told},
    site::{Site, sh},
};

/// A second store, `vault`, on the key disk.
pub fn with_vault(site: &Site) {
    let keys = site.keys("");
    sh(&format!(
        "cd {keys} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out vault.key 2>/dev/null && \
         openssl pkey -in vault.key -pubout -out vault.pem && \
         printf '[stores.vault]\ntype = \"directory\"\npath = \"vault\"\nowner = \"vault.pem\"\nno_escrow = true\nidentities = \
         [\"vault.key\"]\n' >>cryptattach.toml && mkdir vault"
    ));
    site.ok(&["container", "create", "vault"]);
}

/// The configuration has these volumes.
fn with_volumes(site: &Site, volumes: &[(&str, &str, &str)]) {
    let mut text = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    for (name, device, more) in volumes {
        text += &format!("[volumes.{name}]\ndevice = \"{device}\"\n{more}");
    }
    fs::write(site.keys("cryptattach.toml"), text).unwrap();
}

fn keys(site: &Site, store: &str) -> Vec<String> {
    site.ok(&["key", "list", "--store", store]).lines().map(str::to_owned).collect()
}

fn token(volume: &str) -> serde_json::Value {
    serde_json::from_str(&sh(&format!("cryptsetup token export --token-id 0 {volume}"))).unwrap()
}

#[test]
fn a_moved_key_opens_its_volume_from_the_new_store_and_is_gone_from_the_old_one() {
    for arguments in [&[][..], &["--keyslot"]] {
        let filled = Filled::new(arguments, DATA);
        let Filled { site, volume, .. } = &filled;
        with_vault(site);
        let header = fs::read(volume).unwrap()[..32 << 10].to_vec();
        let (old, before) = (site.ok(&["key", "list", "--store", "cinder"]), token(volume));
        assert!(site.fails(66, &["key", "move", &old, "--to", "vault"]).contains("no LUKS2 header has that UUID"));
        let moved = site.json(&["key", "move", &old, "--to", "vault", "--volume", volume]);
        let id = old.strip_prefix("cinder/").unwrap();
        assert_eq!((moved["key"].as_str(), moved["old"].as_str()), (Some(&*format!("vault/{id}")), Some(&*old)));
        assert_eq!((keys(site, "cinder").len(), keys(site, "vault").len()), (0, 1));
        let after = token(volume);
        assert_eq!((&after["store"], &after["key"]), (&"vault".into(), &before["key"]), "the same id");
        assert_eq!(after["keyslots"], before["keyslots"]);
        filled.check("moved");
        if arguments == ["--keyslot"] {
            let ours = format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"));
            sh(&format!(
                "{ours} key passphrase --for {volume} | cryptsetup open --test-passphrase --key-file=- {volume}"
            ));
        }
        // A backup of the header names the old place. The key opens it by its new name, and the same command puts it right.
        let new = fs::read(volume).unwrap();
        fs::write(volume, [&header[..], &new[header.len()..]].concat()).unwrap();
        site.fails(67, &["test", volume]);
        site.ok(&["test", volume, "--key", &format!("vault/{id}")]);
        site.ok(&["key", "move", &old, "--to", "vault", "--volume", volume]);
        filled.check("by the header of a backup");
        // It finds it done, too; and the key goes back, although this host has seen that id there before.
        site.ok(&["key", "move", &old, "--to", "vault", "--volume", volume]);
        assert_eq!(
            site.ok(&["key", "move", &format!("vault/{id}"), "--to", "cinder", "--volume", volume]).lines().next(),
            Some(&*old)
        );
        filled.check("moved back");
        assert!(!Path::new(site.keys("site-state")).join("move/vault").join(id).exists(), "no journal is left");
        let audit = fs::read_to_string(site.keys("audit")).unwrap();
        assert!(audit.contains("\"action\":\"key move\"") && audit.contains("\"action\":\"key delete\""), "{audit}");
    }
}

#[test]
fn an_attached_volume_stays_attached_and_a_detached_header_is_found() {
    let filled = Filled::new(&[], DATA);
    let Filled { site, volume, plain } = &filled;
    with_vault(site);
    let (apart, header) = (site.file("apart", 32 << 20), site.path("header"));
    let (apart, header) = (apart.to_str().unwrap(), header.to_str().unwrap());
    site.ok(&["format", apart, "--header", header, "--store", "cinder"]);
    with_volumes(site, &[("data", volume, ""), ("apart", apart, &format!("header = \"{header}\"\n"))]);
    let name = site.name("used");
    let device = site.attach(volume, &name, &[]);
    let text = site.ok(&["key", "move", "--container", "cinder", "--to", "vault"]);
    assert!(text.contains("moved            2"), "{text}");
    assert!(fs::read(&device).unwrap() == *plain);
    assert_eq!(site.attach(volume, &name, &[]), device, "it is attached still");
    site.ok(&["detach", &name]);
    filled.check("moved while it was attached");
    site.ok(&["test", apart, "--header", header]);
    assert_eq!(keys(site, "cinder").len(), 0);
}

#[test]
fn a_container_is_moved_but_for_what_is_not_here_or_not_to_be_moved() {
    let site = Site::new();
    with_vault(&site);
    let format = |name: &str| {
        let path = site.file(name, 20 << 20).into_os_string().into_string().unwrap();
        let key = site.ok(&["format", &path, "--store", "cinder"]);
        (path, key)
    };
    let [(one, _), (two, damaged), (three, named), (_, _)] = ["one", "two", "three", "four"].map(format);
    with_volumes(&site, &[("one", &one, ""), ("two", &two, ""), ("three", &three, &format!("key = \"{named}\"\n"))]);
    let sealed = fs::read(site.sealed(&damaged)).unwrap();
    fs::write(site.sealed(&damaged), &sealed[..sealed.len() / 2]).unwrap();
    let output = site.run(&["key", "move", "--container", "cinder", "--to", "vault", "--json"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(69) && said.contains("--container cinder --to vault"), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["moved"].as_array().unwrap().len(), 1, "{report}");
    let left = report["left"].to_string();
    assert!(left.contains("the configuration names it") && left.contains("is not on this host"), "{report}");
    assert_eq!(report["failed"][0][0].as_str(), damaged.strip_prefix("cinder/"), "{report}");
    site.attaches(&one);
    // The same command goes on at what has failed.
    fs::write(site.sealed(&damaged), sealed).unwrap();
    let report = site.json(&["key", "move", "--container", "cinder", "--to", "vault"]);
    assert_eq!((report["moved"].as_array().unwrap().len(), report["failed"].as_array().unwrap().len()), (1, 0));
    site.attaches(&two);
    site.attaches(&three);
}

#[test]
fn of_two_volumes_with_one_uuid_a_person_has_to_say_which_it_is() {
    let site = Site::new();
    with_vault(&site);
    let path = site.file("volume", 20 << 20).into_os_string().into_string().unwrap();
    let key = site.ok(&["format", &path, "--store", "cinder"]);
    let copy = site.path("copy").into_os_string().into_string().unwrap();
    fs::copy(&path, &copy).unwrap();
    with_volumes(&site, &[("volume", &path, ""), ("copy", &copy, "")]);
    let refused = site.fails(73, &["key", "move", &key, "--to", "vault"]);
    assert!(refused.contains("have the same UUID"), "{refused}");
    let output = site.run(&["key", "move", "--container", "cinder", "--to", "vault", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!output.status.success() && report["failed"][0][1].as_str().unwrap().contains("same UUID"), "{report}");
    assert_eq!(keys(&site, "cinder"), std::slice::from_ref(&key));
    site.ok(&["key", "move", &key, "--to", "vault", "--volume", &path]);
    site.attaches(&path);
}

#[test]
fn nothing_is_moved_if_one_of_the_keys_would_rest_on_its_volumes_disk() {
    let site = Site::new();
    with_vault(&site);
    // The new store is on the disk of the volumes.
    let beside = site.path("vault");
    sh(&format!(
        "cp -a {} {} && sed -i 's|path = \"vault\"|path = \"{1}\"|' {2}",
        site.keys("vault"),
        beside.display(),
        site.keys("cryptattach.toml")
    ));
    let (one, key) = site.volume("one", &["--store", "cinder"]);
    with_volumes(&site, &[("one", &one, "")]);
    let before = fs::read(&one).unwrap();
    for arguments in [&["--container", "cinder"][..], &["--container", "cinder", "--allow-shared"], &[&key]] {
        site.fails(72, &[&["key", "move", "--to", "vault"], arguments].concat());
        assert!(fs::read(&one).unwrap() == before && keys(&site, "vault").is_empty(), "nothing is written");
    }
    site.attaches(&one);
}

#[test]
fn a_key_that_rests_on_its_volumes_disk_may_be_moved_away() {
    let site = Site::new();
    with_vault(&site);
    let (one, key) = site.volume("one", &["--store", "cinder"]);
    let beside = site.path("cinder");
    sh(&format!(
        "mv {} {}; sed -i 's|{0}\"|{1}\"|' {2}",
        site.keys("cinder"),
        beside.display(),
        site.keys("cryptattach.toml")
    ));
    site.fails(72, &["test", &one]);
    site.fails(72, &["key", "move", &key, "--to", "vault", "--volume", &one]);
    site.ok(&["key", "move", &key, "--to", "vault", "--volume", &one, "--allow-shared"]);
    assert!(!beside.join(key.strip_prefix("cinder/").unwrap()).exists());
}

/// Volumes that the configuration names, with their keys in `cinder`.
fn many(site: &Site, count: usize) -> Vec<String> {
    with_vault(site);
    let names: Vec<_> = (0..count).map(|number| format!("v{number}")).collect();
    let format = |(index, name): (usize, &String)| {
        let path = site.file(name, 17 << 20).into_os_string().into_string().unwrap();
        let keyslot: &[&str] = if index % 2 == 0 { &["--keyslot"] } else { &[] };
        site.ok(&[&["format", &path, "--store", "cinder"], keyslot].concat());
        path
    };
    let volumes: Vec<_> = names.iter().enumerate().map(format).collect();
    with_volumes(site, &names.iter().zip(&volumes).map(|(name, path)| (&**name, &**path, "")).collect::<Vec<_>>());
    volumes
}

fn begin(site: &Site, from: &str, to: &str) -> Child {
    let mut command = site.command();
    command.args(["key", "move", "--container", from, "--to", to]).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Waits until the store has so many keys, or the command has ended.
fn wait_for_keys(site: &Site, store: &str, count: usize, child: &mut Child) {
    let is_key = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().ends_with(b".jwe");
    let stored = || fs::read_dir(site.keys(store)).unwrap().flatten().filter(is_key).count();
    wait_for_progress(child, || stored() >= count);
}

#[test]
fn sigterm_pauses_a_move_of_all_keys_and_the_same_command_goes_on() {
    let site = Site::new();
    let volumes = many(&site, 24);
    for round in 0.. {
        let mut child = begin(&site, "cinder", "vault");
        wait_for_keys(&site, "vault", 1, &mut child);
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        match child.wait().unwrap().code() {
            Some(83) => break,
            // It was done, or had not begun.
            code => assert!(round < 20 && matches!(code, None | Some(0)), "{code:?}"),
        }
        site.ok(&["key", "move", "--container", "vault", "--to", "cinder"]);
    }
    volumes.iter().for_each(|volume| drop(site.ok(&["test", volume])));
    site.ok(&["key", "move", "--container", "cinder", "--to", "vault"]);
    assert_eq!((keys(&site, "cinder").len(), keys(&site, "vault").len()), (0, 24));
    volumes.iter().for_each(|volume| drop(site.ok(&["test", volume])));
}

#[test]
fn kill_9_in_a_move_of_all_keys_loses_none() {
    let site = Site::new();
    let volumes = many(&site, 12);
    let (mut kills, mut random) = (0, Random(3));
    for (from, to) in [("cinder", "vault"), ("vault", "cinder"), ("cinder", "vault")] {
        for count in 1.. {
            let mut child = begin(&site, from, to);
            wait_for_keys(&site, to, count, &mut child);
            thread::sleep(Duration::from_micros(random.below(5000)));
            let _ = child.kill();
            let status = child.wait().unwrap();
            volumes.iter().for_each(|volume| drop(site.ok(&["test", volume])));
            match status.signal() {
                Some(_) => kills += 1,
                None => {
                    assert!(status.success(), "{status:?}");
                    break;
                }
            }
        }
        assert_eq!((keys(&site, from).len(), keys(&site, to).len()), (0, 12));
    }
    println!("{kills} kills");
    assert!(kills >= 3, "{kills} kills");
}

/// A store that is a file system of its own, which is not mounted, is not one that has lost its keys.
#[test]
fn a_store_that_is_not_mounted_stops_a_move_and_nothing_is_lost() {
    let site = Site::new();
    let (volume, old) = site.volume("one", &[]);
    with_vault(&site);
    let vault = site.keys("vault");
    // The target: a folder that is empty without its file system.
    let kept = site.keys("kept");
    sh(&format!("cp -a {vault} {kept} && mkdir -p {vault}.empty && mount --bind {vault}.empty {vault}"));
    let move_it = ["key", "move", &old, "--to", "vault", "--volume", &volume];
    let told = site.run(&move_it);
    sh(&format!("umount {vault}"));
    assert!(!told.status.success(), "{told:?}");
    site.attaches(&volume);
    // The source, after the header names the new place: the old key is there when its file system is.
    sh(&format!(
        "strace -f -qq -o /dev/null -P {} -e trace=unlink,unlinkat -e inject=unlink,unlinkat:signal=KILL:when=1 {} --config {} key move \
         {old} --to vault --volume {volume} 2>/dev/null || true",
        site.sealed(&old).display(),
        env!("CARGO_BIN_EXE_cryptattach"),
        site.keys("cryptattach.toml")
    ));
    assert_eq!((keys(&site, "cinder").len(), keys(&site, "vault").len()), (1, 1));
    let cinder = site.keys("cinder");
    sh(&format!("mkdir {cinder}.empty && mount --bind {cinder}.empty {cinder}"));
    let told = site.run(&move_it);
    sh(&format!("umount {cinder}"));
    assert!(!told.status.success(), "an old key that is still there is not told as deleted: {told:?}");
    site.attaches(&volume);
    site.ok(&move_it);
    assert!(keys(&site, "cinder").is_empty());
    site.attaches(&volume);
}

/// The volume attaches as it is; the same command ends the move.
fn trial(filled: &Filled, old: &str, what: &str) -> &'static str {
    let Filled { site, volume, .. } = filled;
    let image = fs::read(volume).unwrap();
    filled.check(what);
    assert!(fs::read(volume).unwrap() == image, "{what}: attaching has written");
    let stores = (keys(site, "cinder").len(), keys(site, "vault").len());
    let names_new = token(volume)["store"] == "vault";
    let moved = site.run(&["key", "move", old, "--to", "vault", "--volume", volume]);
    assert!(moved.status.success(), "{what}: {}", String::from_utf8_lossy(&moved.stderr));
    filled.check(what);
    assert_eq!((keys(site, "cinder").len(), keys(site, "vault").len()), (0, 1), "{what}");
    let journals = sh(&format!("find {}/move -type f ! -name '.*'", site.keys("site-state")));
    assert!(journals.is_empty(), "{what}: {journals}");
    match (stores, names_new) {
        ((1, 0), false) => "opened by the old key, none stored yet",
        ((1, 1), false) => "opened by the old key",
        ((1, 1), true) => "opened by the new key",
        ((0, 1), true) => "opened by the new key, old one gone",
        state => panic!("{what}: {state:?}"),
    }
}

/// The key disk as it is now.
pub fn snapshot(site: &Site) -> PathBuf {
    let snapshot = site.path("snapshot");
    sh(&format!("rm -rf {0} && cp -a {1} {0}", snapshot.display(), site.keys("")));
    snapshot
}

/// What changes something, in a store, in the state directory or on the volume.
pub const WRITES: [&str; 10] =
    ["write", "pwrite64", "fsync", "rename", "renameat2", "link", "linkat", "unlink", "mkdir", "ftruncate"];

/// Whether the command was killed before this one of its system calls of that name; else it was done.
pub fn killed_before(site: &Site, call: &str, when: usize, arguments: &[&str]) -> bool {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:signal=KILL:when={when}")]);
    command.arg(env!("CARGO_BIN_EXE_cryptattach")).env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml"));
    let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success() || status.signal().is_some() || status.code() == Some(137), "{status:?}");
    !status.success()
}

#[test]
fn kill_9_before_any_system_call_that_writes_loses_nothing() {
    let mut counts = Counts::new();
    // Every other call for a kind of volume, the rest for the other one.
    let step = if all_crashes() { 1 } else { 2 };
    for (phase, arguments) in [&[][..], &["--keyslot"]].into_iter().enumerate() {
        let filled = Filled::new(arguments, DATA);
        let Filled { site, volume, .. } = &filled;
        with_vault(site);
        let old = site.ok(&["key", "list", "--store", "cinder"]);
        let (image, disk) = (fs::read(volume).unwrap(), snapshot(site));
        for call in WRITES {
            for when in (1 + phase % step..).step_by(step) {
                filled.restore(&image, &disk);
                if !killed_before(site, call, when, &["key", "move", &old, "--to", "vault", "--volume", volume]) {
                    break;
                }
                let outcome = trial(&filled, &old, &format!("{arguments:?} killed before {call} {when}"));
                *counts.entry(("kill", outcome)).or_insert(0) += 1;
            }
        }
    }
    assert!(told(&counts) > 60 / step as i32);
    assert_eq!(counts.len(), 4, "at each of the steps");
}

#[test]
fn a_crash_at_any_write_to_the_header_and_lost_or_torn_blocks_lose_nothing() {
    let mut counts = Counts::new();
    for arguments in [&["--keyslot"][..], &[]] {
        let filled = Filled::new(arguments, DATA);
        let Filled { site, volume, .. } = &filled;
        with_vault(site);
        let old = site.ok(&["key", "list", "--store", "cinder"]);
        let recorded = record(&filled, &["key", "move", &old, "--to", "vault", "--volume", volume]);
        replay(recorded, &format!("{arguments:?}"), (true, 0), &mut counts, &|what, image, keys| {
            filled.restore(image, keys);
            trial(&filled, &old, what)
        });
    }
    assert!(told(&counts) > 30);
}
