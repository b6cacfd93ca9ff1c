//! Mappings in use, workers that die, clients that die.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    time::Duration,
};

use crate::site::{LoopDevice, Site, sh};

#[test]
fn detach_says_who_uses_the_mapping() {
    let site = Site::new();
    let (volume, _) = site.volume("busy", &[]);
    let name = site.name("busy");
    let device = site.attach(&volume, &name, &[]);
    sh(&format!("mkfs.ext4 -q {}", device.display()));
    {
        let files = site.mount(&device);
        let refused = site.fails(75, &["detach", &name]);
        assert!(refused.contains(&format!("mounted on {}", files.path().display())), "{refused}");
        assert!(refused.contains("--deferred"), "{refused}");
        fs::write(files.path().join("still"), "works").unwrap();
    }
    let mut reader = Command::new("sleep").arg("60").stdin(fs::File::open(&device).unwrap()).spawn().unwrap();
    let refused = site.fails(75, &["detach", &name]);
    assert!(refused.contains("sleep") && refused.contains(&reader.id().to_string()), "{refused}");
    reader.kill().unwrap();
    reader.wait().unwrap();
    site.ok(&["detach", &name]);
}

#[test]
fn a_deferred_detach_waits_for_the_last_user() {
    let site = Site::new();
    let (volume, _) = site.volume("deferred", &[]);
    let name = site.name("deferred");
    let device = site.attach(&volume, &name, &[]);
    sh(&format!("mkfs.ext4 -q {}", device.display()));
    let files = site.mount(&device);
    site.ok(&["detach", &name, "--deferred"]);
    fs::write(files.path().join("late"), "written after the detach").unwrap();
    let status = site.json(&["status", &name]);
    assert!(status["trouble"].as_str().unwrap().contains("last user"), "{status}");
    drop(files);
    wait_until("the mapping is gone", || !site.run(&["status", &name]).status.success());

    let device = site.attach(&volume, &name, &["--read-only"]);
    let files = site.mount(&device);
    assert_eq!(fs::read_to_string(files.path().join("late")).unwrap(), "written after the detach");
    drop(files);
    site.ok(&["detach", &name]);
}

#[test]
fn other_programs_read_the_header_of_a_file_that_is_attached() {
    let site = Site::new();
    let (volume, _) = site.volume("read", &[]);
    let name = site.name("read");
    site.attach(&volume, &name, &[]);
    for command in ["luksDump", "isLuks", "luksUUID"] {
        sh(&format!("timeout 5 cryptsetup {command} {volume}"));
    }
    sh(&format!("timeout 5 blkid -p {volume}"));
    site.ok(&["detach", &name]);
}

#[test]
fn a_copy_of_the_mount_in_another_namespace_keeps_no_worker() {
    let site = Site::new();
    let (volume, _) = site.volume("copy", &[]);
    let name = site.name("copy");
    let device = site.attach(&volume, &name, &[]);
    let mut copy = Command::new("unshare").args(["-m", "--propagation", "private", "sleep", "60"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    fs::write(&device, "written before").unwrap();
    let begun = std::time::Instant::now();
    site.ok(&["detach", &name]);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let device = site.attach(&volume, &name, &["--read-only"]);
    assert!(fs::read(&device).unwrap().starts_with(b"written before"));
    site.ok(&["detach", &name]);
    copy.kill().unwrap();
    copy.wait().unwrap();
}

#[test]
fn who_may_only_read_the_store_keeps_nobody_waiting() {
    let site = Site::new();
    let folder = site.keys("cinder");
    let mut reader = Command::new("flock").args(["-x", folder, "sleep", "60"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let begun = std::time::Instant::now();
    site.volume("unhindered", &[]);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    reader.kill().unwrap();
    reader.wait().unwrap();
}

#[test]
fn a_file_in_the_place_of_a_link_is_left_alone() {
    let site = Site::new();
    let (volume, _) = site.volume("link", &[]);
    let name = site.name("link");
    let link = Path::new("/dev/disk/by-cryptattach").join(&name);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    fs::write(&link, "somebody's").unwrap();
    let refused = site.fails(73, &["attach", &volume, &name, "--backend", "userspace"]);
    assert!(refused.contains("is not a link"), "{refused}");
    assert_eq!(fs::read_to_string(&link).unwrap(), "somebody's");
    fs::remove_file(&link).unwrap();
    site.attach(&volume, &name, &[]);
    site.ok(&["detach", &name]);
}

#[test]
fn the_same_volume_is_attached_once() {
    let site = Site::new();
    let (volume, _) = site.volume("once", &[]);
    let (first, second) = (site.name("first"), site.name("second"));
    site.attach(&volume, &first, &[]);
    let link = site.path("link");
    std::os::unix::fs::symlink(&volume, &link).unwrap();
    let loops = [LoopDevice::new(volume.as_ref(), "--read-only"), LoopDevice::new(volume.as_ref(), "")];
    for other in [&volume, link.to_str().unwrap(), loops[0].path(), loops[1].path()] {
        let refused = site.fails(75, &["attach", other, &second, "--backend", "userspace"]);
        assert!(refused.contains(&format!("attached already, as '{first}'")), "{refused}");
        let refused = site.fails(75, &["format", other, "--force"]);
        assert!(refused.contains(&format!("attached already, as '{first}'")), "{refused}");
    }
    site.fails(66, &["status", &second]);
    site.ok(&["detach", &first]);
}

#[test]
fn a_killed_worker_is_reported_and_cleaned_up() {
    let site = Site::new();
    let (volume, _) = site.volume("killed", &[]);
    let name = site.name("killed");
    let device = site.attach(&volume, &name, &[]);
    sh(&format!("mkfs.ext4 -q {}", device.display()));
    {
        let files = site.mount(&device);
        fs::write(files.path().join("kept"), "synced").unwrap();
        sh(&format!("sync -f {}", files.path().display()));
        sh(&format!("kill -9 {}", worker(&name)));
        wait_until("the worker's death shows", || !site.json(&["status", &name])["trouble"].is_null());
    }
    let status = site.ok(&["status", &name]);
    assert!(status.contains("trouble"), "{status}");
    site.ok(&["detach", &name]);
    assert!(!device.exists() && !Path::new("/run/cryptattach").join(&name).exists());

    let device = site.attach(&volume, &name, &[]);
    sh(&format!("e2fsck -fy {} >/dev/null || test $? -le 1", device.display()));
    let files = site.mount(&device);
    assert_eq!(fs::read_to_string(files.path().join("kept")).unwrap(), "synced");
    drop(files);
    site.ok(&["detach", &name]);
}

/// What the device itself has cached by then, nobody has flushed.
#[test]
fn a_worker_that_is_killed_while_it_is_detached_is_an_error() {
    let site = Site::new();
    let (volume, _) = site.volume("flushing", &[]);
    let name = site.name("flushing");
    let device = site.attach(&volume, &name, &[]);
    sh(&format!("dd if=/dev/urandom of={} bs=1M count=4 status=none", device.display()));
    let worker = worker(&name);
    sh(&format!("kill -STOP {worker}"));
    let mut detach = site.command();
    let detach = detach.args(["detach", &name]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // Before that, the worker would have been dead when it was asked.
    let flush = format!("{} ", nix::libc::SYS_fsync);
    let waits = || fs::read_to_string(format!("/proc/{}/syscall", detach.id())).unwrap().starts_with(&flush);
    wait_until("it waits for the flush", waits);
    sh(&format!("kill -KILL {worker}"));
    let told = detach.wait_with_output().unwrap();
    let text = String::from_utf8(told.stderr).unwrap();
    assert!(!told.status.success() && text.contains("but with errors"), "{text}");
    assert!(!device.exists() && !Path::new("/run/cryptattach").join(&name).exists());
}

#[test]
fn a_client_that_is_killed_at_any_step_leaves_all_or_nothing() {
    let site = Site::new();
    let (volume, _) = site.volume("client", &[]);
    // Milliseconds after the start: from before the key is fetched to after the mapping is there.
    for delay in [2, 5, 10, 15, 20, 30, 45, 70, 100, 150] {
        let name = site.name(&format!("client{delay}"));
        let mut client = site.command();
        let mut client = client.args(["attach", &volume, &name, "--backend", "userspace"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        let _ = client.kill();
        client.wait().unwrap();
        // Whatever the killed client left, the next one gets the volume, and nothing stays behind after it.
        wait_until(&format!("attach works, {delay} ms"), || {
            site.run(&["attach", &volume, &name, "--backend", "userspace"]).status.success()
        });
        site.ok(&["detach", &name]);
        assert!(!Path::new("/run/cryptattach").join(&name).exists(), "{delay} ms");
    }
}

/// A worker that is told to end has another process detach it, which may come to its turn late.
#[test]
fn a_signal_to_a_worker_does_not_take_away_who_has_its_name_next() {
    let site = Site::new();
    let (volume, _) = site.volume("next", &[]);
    let name = site.name("next");
    site.attach(&volume, &name, &[]);
    let lock = fs::File::options().write(true).open(format!("/run/cryptattach/.{name}.lock")).unwrap();
    lock.lock().unwrap();
    let worker = worker(&name);
    sh(&format!("kill -TERM {worker}"));
    let children = || sh(&format!("pgrep -P {worker} || true"));
    wait_until("it has started a process", || !children().is_empty());
    sh(&format!("kill -TERM {worker}; kill -TERM {worker}; sleep 0.5"));
    let detaching = children();
    assert!(!detaching.contains('\n'), "one is enough: {detaching}");
    sh(&format!("kill -STOP {detaching}"));
    lock.unlock().unwrap();
    site.ok(&["detach", &name]);
    let device = site.attach(&volume, &name, &[]);
    sh(&format!("kill -CONT {detaching}"));
    wait_until("it has ended", || !Path::new("/proc").join(&detaching).exists());
    assert!(device.exists(), "it was another worker's");
    site.ok(&["detach", &name]);
}

/// The process id of a mapping's worker.
pub fn worker(name: &str) -> String {
    let state = fs::read(Path::new("/run/cryptattach").join(name).join("state.json")).unwrap();
    serde_json::from_slice::<serde_json::Value>(&state).unwrap()["worker"]["pid"].to_string()
}

/// Waits until a command has come so far, or has ended: a fast machine is killed at the same point as a slow one.
pub fn wait_for_progress(child: &mut Child, reached: impl Fn() -> bool) {
    while !reached() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(100));
    }
}

pub fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    for _ in 0..100 {
        if reached() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("waited 10 s in vain: {what}");
}
