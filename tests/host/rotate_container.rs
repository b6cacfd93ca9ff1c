//! Rotation of all keys of a container: order, what is left and what fails, pause, kill -9, leaks.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::Pid};
use serde_json::Value;

use crate::site::{LoopDevice, Site, sh};

const HEADER: u64 = 16 << 20;

/// A store that no other test has, for all loop devices of the machine are looked at; and its volumes.
struct Many {
    site: Site,
    store: String,
}

impl Many {
    fn new() -> Self {
        let site = Site::bare();
        let store = site.name("many");
        site.ok(&["init", "--store", &store, "--path", site.keys("store"), "--escrow", site.keys("escrow.pem")]);
        Self { site, store }
    }

    /// A volume with data, which are returned.
    fn volume(&self, name: &str, mib: u64, arguments: &[&str]) -> (String, Vec<u8>) {
        let Self { site, .. } = self;
        let path = site.file(name, HEADER + (mib << 20)).into_os_string().into_string().unwrap();
        site.ok(&[&["format", &path], arguments].concat());
        let mapping = site.name("fill");
        let device = site.attach(&path, &mapping, &[]);
        sh(&format!(
            "head -c {} /dev/urandom | dd of={} bs=64k iflag=fullblock conv=fsync status=none",
            mib << 20,
            device.display()
        ));
        let plain = fs::read(device).unwrap();
        site.ok(&["detach", &mapping]);
        (path, plain)
    }

    /// Lists it in the configuration.
    fn list(&self, name: &str, device: &str) -> String {
        let name = self.site.name(name);
        sh(&format!("printf \"[volumes.{name}]\\ndevice = '{device}'\\n\" >> {}", self.site.keys("cryptattach.toml")));
        name
    }

    fn check(&self, volume: &str, plain: &[u8]) {
        let name = self.site.name("check");
        let device = self.site.attach(volume, &name, &["--read-only"]);
        let is_same = fs::read(device).unwrap() == plain;
        self.site.ok(&["detach", &name]);
        assert!(is_same, "{volume}: DATA LOST");
    }

    fn rotate(&self, code: i32, more: &[&str]) -> (Value, Vec<Value>) {
        let output = self.site.run(&[&["key", "rotate", "--container", &self.store, "--json"], more].concat());
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{told}");
        (serde_json::from_slice(&output.stdout).unwrap(), events(&told))
    }

    fn keys(&self) -> Vec<String> {
        self.site.ok(&["key", "list"]).lines().map(str::to_owned).collect()
    }
}

/// What was told of volumes.
fn events(told: &str) -> Vec<Value> {
    let lines = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["event"] == "volume").collect()
}

fn devices(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|one| one["device"].as_str().unwrap()).collect()
}

#[test]
fn the_volumes_of_a_container_are_rotated_and_what_is_left_or_fails_is_named() {
    let many = Many::new();
    let Many { site, store, .. } = &many;
    let (used, used_plain) = many.volume("used", 1, &[]);
    let (first, first_plain) = many.volume("first", 1, &[]);
    let (others, _) = many.volume("others", 1, &[]);
    sh(&format!("echo '{{\"type\":\"clevis\",\"keyslots\":[],\"jwe\":{{}}}}' | cryptsetup token import {others}"));
    // Ages are told apart by seconds.
    thread::sleep(Duration::from_millis(1100));
    let (second, second_plain) = many.volume("second", 1, &["--keyslot"]);
    // Found by itself: a block device. The others are files, which the configuration has to name.
    let device = LoopDevice::new(first.as_ref(), "");
    let names: Vec<_> =
        [&used, &second, &others].iter().map(|path| many.list(path.rsplit('/').next().unwrap(), path)).collect();
    let absent = many.list("absent", "/dev/disk/by-uuid/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de");
    site.attach(&used, &names[0], &[]);
    let before = many.keys();

    let (report, told) = many.rotate(83, &[]);
    let done = devices(&report["done"]);
    assert_eq!(done, [device.path(), &second], "the oldest first: {report}");
    assert_eq!(report["left"].as_array().unwrap().len(), 2, "{report}");
    let left = |path: &str| report["left"].as_array().unwrap().iter().find(|one| one["device"] == path).cloned();
    assert_eq!(
        left(&used).unwrap()["next"],
        format!("cryptattach detach {}; then run the same command again", names[0])
    );
    assert!(left("/dev/disk/by-uuid/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de").is_some());
    assert_eq!(devices(&report["failed"]), [&others]);
    assert!(report["failed"][0]["next"].as_str().unwrap().contains("--drop-others"), "{report}");
    assert_eq!(told.len(), 5, "each is told at once");
    assert_eq!(many.keys().len(), before.len() + 2, "old keys stay");

    // The same command goes on with the others only.
    site.ok(&["detach", &names[0]]);
    let without = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let (without, _) = without.split_once(&format!("[volumes.{absent}]")).unwrap();
    fs::write(site.keys("cryptattach.toml"), without).unwrap();
    let (report, _) = many.rotate(83, &[]);
    assert_eq!((devices(&report["done"]), report["done_before"].as_u64()), (vec![&*used], Some(2)), "{report}");
    let refused = site.fails(64, &["key", "rotate", "--container", store, "--because-leaked"]);
    assert!(refused.contains("begun without --because-leaked") && refused.contains("--anew"), "{refused}");
    let (report, _) = many.rotate(0, &["--drop-others"]);
    assert_eq!(devices(&report["done"]), [&others]);
    for (volume, plain) in [(&used, &used_plain), (&second, &second_plain)] {
        many.check(volume, plain);
    }
    many.check(device.path(), &first_plain);

    // All is done, so the next one begins anew: a leak. The volume with a passphrase comes first, and no old key stays.
    let human = site.ok(&["key", "rotate", "--container", store, "--because-leaked", "--drop-others"]);
    assert!(human.starts_with(&format!("container '{store}': 4 done, 0 left, 0 failed\n")), "{human}");
    let order: Vec<_> = human.lines().filter(|line| line.contains(" done  ")).collect();
    assert!(order[0].contains(&second) && order.iter().all(|line| line.contains(", deleted ")), "{human}");
    let keys = many.keys();
    assert!(keys.len() == before.len() + 3 + 1 && before.iter().all(|old| keys.contains(old)), "{keys:?}");
    drop(device);
    many.check(&first, &first_plain);
}

#[test]
fn a_rotation_of_a_container_that_is_killed_or_paused_goes_on_and_does_nothing_twice() {
    let many = Many::new();
    let Many { site, store, .. } = &many;
    let volumes: Vec<_> = ["a", "b", "c"].map(|name| many.volume(name, 8, &[])).into();
    for (path, _) in &volumes {
        many.list(path.rsplit('/').next().unwrap(), path);
    }
    // While one is being re-encrypted, and before that; slow enough that none of the runs comes to the end.
    for (signal, is_midway) in
        [(Signal::SIGTERM, true), (Signal::SIGKILL, true), (Signal::SIGKILL, false), (Signal::SIGTERM, true)]
    {
        let mut command = site.command();
        command.args(["key", "rotate", "--container", store, "--because-leaked", "--rate", "1", "--json"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
        if is_midway {
            assert!(told.any(|line| line.unwrap().contains("\"progress\"")));
        }
        thread::sleep(Duration::from_millis(300));
        nix::sys::signal::kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        told.for_each(drop);
        let expected = if signal == Signal::SIGTERM { Some(83) } else { None };
        assert_eq!(child.wait().unwrap().code(), expected);
    }
    let journal = Path::new(site.keys("site-state")).join("rotations").join(store);
    assert!(journal.exists());
    let (report, _) = many.rotate(0, &["--because-leaked"]);
    assert!(!journal.exists());
    assert_eq!(
        report["done"].as_array().unwrap().len() as u64 + report["done_before"].as_u64().unwrap(),
        3,
        "{report}"
    );
    let audit = fs::read_to_string(site.keys("audit")).unwrap();
    assert_eq!(audit.matches("\"key rotate begin\"").count(), 3, "each volume is rotated once: {audit}");
    for (path, plain) in &volumes {
        many.check(path, plain);
    }
    assert_eq!(many.keys().len(), volumes.len(), "no old key stays, and none that a kill has left");
}

#[test]
fn of_a_volume_and_its_copy_neither_is_rotated() {
    let many = Many::new();
    let (volume, plain) = many.volume("one", 1, &[]);
    let copy = many.site.path("copy");
    fs::copy(&volume, &copy).unwrap();
    let devices = [LoopDevice::new(volume.as_ref(), ""), LoopDevice::new(&copy, "")];
    let keys = many.keys();
    let (report, _) = many.rotate(83, &["--because-leaked"]);
    let why = report["failed"][0]["why"].as_str().unwrap();
    assert!(devices.iter().all(|device| why.contains(device.path())), "{report}");
    assert!(report["done"].as_array().unwrap().is_empty() && many.keys() == keys);
    drop(devices);
    many.check(&volume, &plain);
}
